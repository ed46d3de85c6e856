"""The rungs of a search as Ray calls them."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import TrialScheduler

from search.cluster.scheduler import RungScheduler


def test_ray_is_told_to_go_on_or_to_stop() -> None:
    asked: list[tuple[int, tuple[float, float]]] = []

    def promotes(rung: int, values: tuple[float, float]) -> bool:
        asked.append((rung, values))
        return values[0] > 0.45

    scheduler: Any = RungScheduler(promotes)
    results = [
        {"rungs": [(0.5, 1.5)]},
        {"progress": {}},
        {"rungs": [(0.4, 1.4)]},
        {"rungs": [[0.5, 1.5], [0.1, 1.1]]},
        {"outcomes": "[]"},
    ]
    words = [scheduler.on_trial_result(None, None, result) for result in results]
    go_on, stop = TrialScheduler.CONTINUE, TrialScheduler.STOP
    assert words == [go_on, go_on, stop, stop, go_on]
    assert asked == [(0, (0.5, 1.5)), (0, (0.4, 1.4)), (1, (0.1, 1.1))]
