"""Which trials go on: successive halving by non-dominated rank, asynchronously, as a Ray `TrialScheduler`.

A trial passes rungs, each of which measures more of it than the one before. Whoever comes to a rung is held against
all that came there before, at once: nobody waits for others. ASHA's stopping rule (Li et al., MLSys 2020), for two
objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.outcome import Outcome
from search.pareto import selection_order


class NonDominatedHalving(FIFOScheduler):
    """Of all that came to a rung, the best `1 / reduction_factor` go on, and at least the best: by non-dominated rank,
    then by crowding. Who is no faster than the dense model does not, and does not count.
    """

    def __init__(self, reduction_factor: float, known: Sequence[Outcome] = ()) -> None:
        """
        Args:
            reduction_factor: at least 1, which lets everybody go on that is faster.
            known: outcomes of an earlier run of the sweep, with what they had at their rungs.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._reduction_factor = reduction_factor
        self._rungs: dict[int, list[tuple[float, float]]] = {}
        for outcome in known:
            for rung, values in enumerate(outcome.rungs):
                self._remember(rung, values)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "rungs" not in result:
            return TrialScheduler.CONTINUE
        *earlier, values = result["rungs"]
        return TrialScheduler.CONTINUE if self.promotes(len(earlier), tuple(values)) else TrialScheduler.STOP

    def promotes(self, rung: int, values: tuple[float, float]) -> bool:
        """Whether a trial with this accuracy and speed-up goes on from a rung, where others will be held against it."""
        if not self._remember(rung, values):
            return False
        points = np.array(self._rungs[rung])
        last = len(points) - 1
        [place] = np.flatnonzero(selection_order(points) == last)
        return bool(place < max(1, len(points) / self._reduction_factor))

    def _remember(self, rung: int, values: tuple[float, float]) -> bool:
        """Whether they count."""
        is_faster = values[1] > 1.0
        if is_faster:
            self._rungs.setdefault(rung, []).append(values)
        return is_faster
