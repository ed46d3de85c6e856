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

from search.front import non_dominated, selection_order
from search.outcome import Outcome


class NonDominatedHalving(FIFOScheduler):
    """Of all that came to a rung, the best `1 / reduction_factor` go on: by non-dominated rank, then by crowding; and
    so does whoever is on their front, of whom none of the others is better.

    The first at a rung go on until there are enough to compare.
    """

    def __init__(self, reduction_factor: float, known: Sequence[Outcome] = ()) -> None:
        """
        Args:
            reduction_factor: at least 1, which lets everybody go on.
            known: outcomes of an earlier run of the sweep, with what they had at their rungs.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._reduction_factor = reduction_factor
        self._rungs: dict[int, list[tuple[float, float]]] = {}
        for outcome in known:
            for rung, values in enumerate(outcome.rungs):
                self._rungs.setdefault(rung, []).append(values)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "rungs" not in result:
            return TrialScheduler.CONTINUE
        *earlier, values = result["rungs"]
        return TrialScheduler.CONTINUE if self.promotes(len(earlier), tuple(values)) else TrialScheduler.STOP

    def promotes(self, rung: int, values: tuple[float, float]) -> bool:
        """Whether a trial with these values goes on from a rung, where they are remembered; both are maximised."""
        there = self._rungs.setdefault(rung, [])
        there.append(values)
        last, points = len(there) - 1, np.array(there)
        if len(there) < self._reduction_factor or last in non_dominated(points):
            return True
        [place] = np.flatnonzero(selection_order(points) == last)
        return bool(place < len(there) / self._reduction_factor)
