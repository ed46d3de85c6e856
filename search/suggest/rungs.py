"""Decides which trials go on at a rung: successive halving by non-dominated rank, asynchronously.

A trial passes rungs, each of which measures more of it than the one before. A trial that comes to a rung is compared
with all that came there before, at once: none waits for others. This is ASHA's stopping rule (Li et al., MLSys 2020),
for two objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from search.outcome import Outcome
from search.pareto import selection_order

RungValues = tuple[float, float]
"""Accuracy and speed-up of a trial at a rung."""

Promotion = Callable[[int, RungValues], bool]
"""Tells from the number of a rung and a trial's values there whether the trial goes on; `Rungs.promotes` is one."""


def is_promoted(values: RungValues, earlier: Sequence[RungValues], reduction_factor: float) -> bool:
    """Tells whether a trial goes on from a rung: the best `1 / reduction_factor` of all that came there do.

    The order is by non-dominated rank, then by crowding; at least the best trial goes on. A trial that is no faster
    than the dense model does not go on, and is not counted among the others.

    Args:
        values: of the trial.
        earlier: values of the trials that came to this rung before, in any order.
        reduction_factor: at least 1, with which every trial goes on that is faster than the dense model.
    """
    if not _is_faster(values):
        return False
    points = np.array([*filter(_is_faster, earlier), values])
    last = len(points) - 1
    [place] = np.flatnonzero(selection_order(points) == last)
    return bool(place < max(1, len(points) / reduction_factor))


class Rungs:
    """The rungs of a search, with the values of every trial that came to each of them."""

    def __init__(self, reduction_factor: float, outcomes: Sequence[Outcome] = ()) -> None:
        """
        Args:
            reduction_factor: see `is_promoted`.
            outcomes: of an earlier run of the sweep, with the values that they had at their rungs.
        """
        self._reduction_factor = reduction_factor
        self._values: dict[int, list[RungValues]] = {}
        for outcome in outcomes:
            for rung, values in enumerate(outcome.rungs):
                self._values.setdefault(rung, []).append(values)

    def promotes(self, rung: int, values: RungValues) -> bool:
        """Tells whether a trial goes on from a rung, and keeps its values for those that come there later."""
        earlier = self._values.setdefault(rung, [])
        promoted = is_promoted(values, earlier, self._reduction_factor)
        earlier.append(values)
        return promoted


def _is_faster(values: RungValues) -> bool:
    """Tells whether a trial is faster than the dense model; NaN is not."""
    return values[1] > 1.0
