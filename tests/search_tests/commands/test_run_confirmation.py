"""The confirmation of a front as jobs: what is timed, what is built once more, on which images, what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pruning.artifact import save_weights
from pruning.measure.stopwatch import MIN_LAP_S, MIN_ROUNDS
from pruning.model.anatomy import examine
from pruning.model.surgery import keep_all_plan
from search.commands.run_confirmation import BUDGET_SHARE, CONFIRMING, REPAIR_SHARE, Confirmation
from search.front import front_of
from search.goal import Goal
from search.outcome import Measurement, Outcome
from search.trial.jobs import LOOK, Job, Rebuild, Timed
from tests.search_tests import builders, tiny
from tests.search_tests.commands.driving import sweep_in, timing

DENSE = builders.measurement(0.9, 1.0, latency_ms_p50=100.0)
GOAL = Goal(dense=DENSE)
CONDITIONS: dict[str, str | int] = {"device": "cpu"}


def outcome(trial_id: str, top1: float, speedup: float, *, seconds: float = 4.0, **candidate: Any) -> Outcome:
    """An outcome of a pruned model of two blocks whose plan is its own."""
    one = builders.outcome(trial_id, top1, speedup, latency_ms_p50=100.0 / speedup)
    assert one.plan is not None
    block = replace(one.plan.blocks[0], num_tokens=10 + int(trial_id[1:4]))
    settings: dict[str, Any] = {"method": "cascade", "exit_block": 2, "target_ratio": 0.5} | candidate
    return replace(
        one, plan=replace(one.plan, blocks=(block,) * 2), seconds=seconds, candidate=builders.candidate(**settings)
    )


SLOW, MIDDLE, FAST, BEATEN = (
    outcome("t000", 0.88, 1.5), outcome("t001", 0.8, 2.0), outcome("t002", 0.7, 3.0), outcome("t003", 0.6, 1.6)
)  # fmt: skip
OUTCOMES = [SLOW, MIDDLE, FAST, BEATEN]


def confirmation(folder: Path, goal: Goal = GOAL, **changes: Any) -> Confirmation:
    return Confirmation(sweep_in(folder, **changes), goal)


def timed(*speedups: float) -> Timed:
    return Timed(dense=timing(1.0), timings=[timing(speedup) for speedup in speedups], conditions=CONDITIONS)


def the(job: Job | None) -> Job:
    assert job is not None
    return job


def order_of(job: Job | None) -> Rebuild:
    subject = the(job).subject
    assert isinstance(subject, Rebuild)
    return subject


def orders(confirming: Confirmation, outcomes: Sequence[Outcome], left_s: float | None = None) -> dict[str, Job]:
    """Takes all jobs that are there now, by id."""
    jobs = {}
    while (job := confirming.next(outcomes, left_s)) is not None:
        jobs[job.id] = job
    return jobs


# The timing


def test_all_that_may_be_on_the_front_is_timed_once_in_three_times_the_rounds(tmp_path: Path) -> None:
    confirming = confirmation(tmp_path)
    close = outcome("t004", 0.69, 2.95)  # beaten, but not beyond the noise of its speed
    job = the(confirming.next([*OUTCOMES, close], None))
    assert (job.kind, confirming.is_handed_out) == ("time", False)
    plans, num_rounds = job.subject
    assert plans == [one.plan for one in (SLOW, MIDDLE, FAST, close)]
    assert num_rounds == CONFIRMING * 6
    assert confirming.next(OUTCOMES, None) is None  # until it is timed


def test_models_of_other_trials_and_failures_are_not_timed(tmp_path: Path) -> None:
    same, failed = replace(SLOW, id="t005", same_as="t000", has_weights=True), builders.failed("t006")
    plans, _ = the(confirmation(tmp_path).next([SLOW, same, failed], None)).subject
    assert plans == [SLOW.plan]


def test_models_beyond_a_limit_are_not_timed(tmp_path: Path) -> None:
    goal = Goal.of(DENSE, "top1", ["top1 >= 0.75"])
    plans, _ = the(confirmation(tmp_path, goal).next(OUTCOMES, None)).subject
    assert plans == [SLOW.plan, MIDDLE.plan]


def test_the_timing_needs_what_cutting_the_models_needs(tmp_path: Path) -> None:
    assert the(confirmation(tmp_path / "a").next([SLOW], None)).needs == (LOOK, "exits", "sensitivity-2")
    uncut = outcome("t001", 0.8, 2.0, exit_block=3, method="global", round_to="auto")
    job = the(confirmation(tmp_path / "b").next([uncut, SLOW], None))
    assert set(job.needs) == {LOOK, "exits", "sensitivity-2", "sensitivity-3"}  # no widths, no profile
    whole = outcome("t002", 0.9, 1.0, exit_block=3, target_ratio=1.0)
    assert the(confirmation(tmp_path / "c").next([whole], None)).needs == (LOOK,)


@pytest.mark.parametrize(
    ("budget_s", "expected"),
    [(1e6, CONFIRMING * 6), (0.01, MIN_ROUNDS), (20.0, int(BUDGET_SHARE * 20.0 / (0.1 + 0.1 / 1.5 + 0.1 / 2)) - 1)],
)
def test_a_time_budget_limits_the_rounds(tmp_path: Path, budget_s: float, expected: int) -> None:
    confirming = confirmation(tmp_path, search__time_budget=budget_s)
    _, num_rounds = the(confirming.next([SLOW, MIDDLE], 100.0)).subject
    assert num_rounds == expected


def test_the_last_timing_leaves_time_for_the_models(tmp_path: Path) -> None:
    confirming = confirmation(tmp_path, search__time_budget=1e6)
    rebuilds_s, round_s = 2 * REPAIR_SHARE * 4.0, 0.1 + 0.1 / 1.5 + 0.1 / 2
    _, num_rounds = the(confirming.next([SLOW, MIDDLE], rebuilds_s + 10.5 * round_s)).subject
    assert num_rounds == 9  # beside a warm-up


def test_models_that_are_worth_nothing_are_not_built_unless_nothing_is_worth_more(tmp_path: Path) -> None:
    poor = outcome("t003", 0.3, 3.0)  # less than half the dense accuracy
    for number, (found, expected) in enumerate((([SLOW, poor], ["t000"]), ([poor], ["t003"]))):
        confirming = confirmation(tmp_path / str(number), splits=tiny.splits(test=False))
        confirming.next(found, None)
        confirming.timed(timed(*(one.measurement.speedup for one in found if one.measurement)))
        assert list(orders(confirming, found)) == [f"rebuild-{name}" for name in expected]


# The models


def test_the_front_by_the_last_timing_is_built_once_more(tmp_path: Path) -> None:
    confirming = confirmation(tmp_path, splits=tiny.splits(test=False))
    confirming.next(OUTCOMES, None)
    confirming.timed(timed(1.5, 1.2, 3.0))  # the middle one is slower than the slow one, which is as accurate
    assert not confirming.is_handed_out
    jobs = orders(confirming, OUTCOMES)
    assert list(jobs) == ["rebuild-t000", "rebuild-t002"]
    assert confirming.is_handed_out
    order = order_of(jobs["rebuild-t002"])
    assert (order.plan, order.weights, order.trial_s, order.on_all_images) == (FAST.plan, None, 4.0, True)
    assert order.measured == replace(
        FAST.measurement, speedup=3.0, speedup_low=0.99 * 3, speedup_high=1.01 * 3, latency_ms_p50=30.0,
        throughput_img_s=333.0,
    )  # fmt: skip
    assert jobs["rebuild-t002"].needs == (LOOK, "exits", "sensitivity-2")


@pytest.mark.parametrize("split", ["test", "confirm"])
def test_where_other_images_than_val_count_the_dense_model_is_measured_on_them(tmp_path: Path, split: str) -> None:
    splits = replace(tiny.splits(test=False), **{split: tiny.images(12, seed=8)})
    confirming = confirmation(tmp_path, splits=splits)
    confirming.next([], None)
    confirming.timed(timed())
    job = the(confirming.next([], None))
    order = order_of(job)
    assert (job.id, job.needs) == ("rebuild-dense", (LOOK,))
    assert order.plan == keep_all_plan(examine(tiny.model()))
    assert not order.on_all_images  # nothing of it is repaired
    assert order.measured.speedup == 1.0
    measured = replace(order.measured, top1=0.5, top1_test=0.25)
    confirming.rebuilt("rebuild-dense", measured, nn.Identity())
    assert confirming.result().dense == measured


def test_an_empty_front_has_a_dense_model_that_was_timed_anew(tmp_path: Path) -> None:
    confirming = confirmation(tmp_path, splits=tiny.splits(test=False))
    plans, _ = the(confirming.next([], 5.0)).subject
    assert plans == []
    confirming.timed(timed())
    assert confirming.is_handed_out
    confirmed = confirming.result()
    assert (confirmed.outcomes, confirmed.models, confirmed.conditions) == ([], {}, CONDITIONS)
    assert (confirmed.dense.throughput_img_s, confirmed.dense.top1) == (111.0, DENSE.top1)


def test_trained_models_are_built_with_the_weights_that_their_trial_kept(tmp_path: Path) -> None:
    weights = {"head.weight": torch.arange(4.0)}
    trained = replace(SLOW, has_weights=True)
    confirming = confirmation(tmp_path, splits=tiny.splits(test=False))
    save_weights(weights, confirming._sweep.folder.weights_of("t000"))
    confirming.next([trained, FAST], None)
    confirming.timed(timed(1.5, 3.0))
    jobs = orders(confirming, [])
    kept = order_of(jobs["rebuild-t000"]).weights
    assert kept is not None
    assert torch.equal(kept["head.weight"], weights["head.weight"])
    assert order_of(jobs["rebuild-t002"]).weights is None


def test_the_result_has_the_models_with_their_last_measurements(tmp_path: Path) -> None:
    confirming = confirmation(tmp_path, splits=tiny.splits(test=False))
    confirming.next(OUTCOMES, None)
    confirming.timed(timed(1.5, 2.0, 3.0))
    models = {job_id: nn.Linear(1, 1) for job_id in orders(confirming, OUTCOMES)}
    measured: dict[str, Measurement] = {}
    for number, (job_id, model) in enumerate(reversed(models.items())):  # in any order
        measured[job_id] = builders.measurement(0.5 + number / 10, 2.0)
        confirming.rebuilt(job_id, measured[job_id], model)
    confirmed = confirming.result()
    assert [one.id for one in confirmed.outcomes] == ["t000", "t001", "t002"]
    for one in confirmed.outcomes:
        assert one.measurement == measured[f"rebuild-{one.id}"]
        assert confirmed.models[one.id] is models[f"rebuild-{one.id}"]
    assert confirmed.dense.latency_ms_p50 == 90.0


# Time


def with_front(confirming: Confirmation) -> Confirmation:
    confirming.next(OUTCOMES, None)
    confirming.timed(timed(1.5, 2.0, 3.0))
    return confirming


def test_with_time_enough_or_without_a_budget_models_are_repaired_on_all_images(tmp_path: Path) -> None:
    for number, left_s in enumerate((None, 1000.0)):
        confirming = with_front(confirmation(tmp_path / str(number), splits=tiny.splits(test=False)))
        assert [order_of(job).on_all_images for job in orders(confirming, OUTCOMES, left_s).values()] == [True] * 3


def test_without_time_models_are_built_as_their_trials_made_them(tmp_path: Path) -> None:
    for number, left_s in enumerate((0.0, -5.0)):
        confirming = with_front(confirmation(tmp_path / str(number), splits=tiny.splits(test=False)))
        assert [order_of(job).on_all_images for job in orders(confirming, OUTCOMES, left_s).values()] == [False] * 3


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_repair_on_all_images_leaves_time_for_the_models_after_it(tmp_path: Path, num_slots: int) -> None:
    """56 training images, 16 of them for calibration: 3.5 times the repair, beside all else that a rebuild takes."""
    own_s, others_s = REPAIR_SHARE * (1 + 3.5) * 4.0, 2 * REPAIR_SHARE * 4.0 / num_slots
    for number, (spare_s, expected) in enumerate(((-0.01, False), (0.01, True))):
        folder = tmp_path / str(number)
        confirming = with_front(confirmation(folder, splits=tiny.splits(test=False), num_slots=num_slots))
        job = confirming.next(OUTCOMES, own_s + others_s + spare_s)
        assert order_of(job).on_all_images is expected


def test_the_estimate_of_its_seconds_grows_with_the_front_and_shrinks_with_the_slots(tmp_path: Path) -> None:
    one, two = (confirmation(tmp_path / str(number), num_slots=number) for number in (1, 2))
    assert one.seconds([]) == one.seconds([builders.failed("t000")]) == pytest.approx((MIN_ROUNDS + 2) * 0.1)
    [point] = front_of([SLOW], GOAL)
    rounds_s = (MIN_ROUNDS + 2) * (0.1 + 0.1 / 1.5)
    assert one.seconds([point]) == two.seconds([point]) == pytest.approx(rounds_s + 4.0 * REPAIR_SHARE)
    rounds_s = (MIN_ROUNDS + 2) * (0.1 + 0.1 / 1.5 + 0.1 / 2 + MIN_LAP_S)  # no batch counts less
    assert one.seconds(OUTCOMES) == pytest.approx(rounds_s + 3 * 4.0 * REPAIR_SHARE)
    assert two.seconds(OUTCOMES) == pytest.approx(rounds_s + 2 * 4.0 * REPAIR_SHARE)
