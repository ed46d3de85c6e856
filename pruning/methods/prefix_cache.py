"""A cache of states that cascades passed through, for later cascades that begin in the same way.

A cascade is given numbers (its target, the budget of each block) that it only compares with measured ones. It would
have gone the same way for all numbers by which these comparisons come out alike: each number remembers their interval.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

T = TypeVar("T")


class Threshold:
    """A number that is only compared with others, and remembers the interval in which no comparison would change."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.low, self.high = -inf, inf
        """Ends of the interval [low, high) of numbers that would have given the same answers so far."""

    def reaches(self, other: float) -> bool:
        """Tells whether this number is at least the other one."""
        if self.value >= other:
            self.low = max(self.low, other)
            return True
        self.high = min(self.high, other)
        return False


@dataclass(frozen=True, kw_only=True)
class _Kept(Generic[T]):
    settings: Hashable
    intervals: tuple[tuple[float, float], ...]
    num_steps: int
    state: T
    num_bytes: int


class PrefixCache(Generic[T]):
    """States of cascades: those used last, as many as fit into a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: list[_Kept[T]] = []  # the last used at the end

    @property
    def num_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._kept)

    def keep(
        self, settings: Hashable, thresholds: Sequence[Threshold], num_steps: int, state: T, num_bytes: int
    ) -> None:
        """Keeps the state of a cascade after so many steps; nobody may change it from now on.

        Args:
            settings: all that the cascade depends on beside the thresholds.
            num_bytes: size of the state.
        """
        intervals = tuple((threshold.low, threshold.high) for threshold in thresholds)
        self._kept.append(
            _Kept(settings=settings, intervals=intervals, num_steps=num_steps, state=state, num_bytes=num_bytes)
        )
        while self.num_bytes > self.max_bytes:
            self._kept.pop(0)

    def farthest(self, settings: Hashable, thresholds: Sequence[Threshold]) -> T | None:
        """The state after the most steps that a cascade with these settings and thresholds would come to as well.

        The thresholds then remember the comparisons on the way there.

        Returns:
            None where no kept state is on the way.
        """

        def is_on_the_way(kept: _Kept[T]) -> bool:
            pairs = zip(thresholds, kept.intervals, strict=True)
            return kept.settings == settings and all(low <= t.value < high for t, (low, high) in pairs)

        best = max(filter(is_on_the_way, self._kept), key=lambda kept: kept.num_steps, default=None)
        if best is None:
            return None
        self._kept = [*(kept for kept in self._kept if kept is not best), best]
        for threshold, interval in zip(thresholds, best.intervals, strict=True):
            threshold.low, threshold.high = interval
        return best.state
