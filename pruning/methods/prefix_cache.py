"""What a walk through the blocks found out, for later walks that begin as it did.

A walk is told numbers (the target, what each block may cost) that it only compares with what it finds. It would have
gone the same way for all numbers by which these comparisons come out alike, and each number remembers which those are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

T = TypeVar("T")


class Threshold:
    """A number that is only asked whether it reaches others."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.low, self.high = -inf, inf
        """Any number from `low` on and below `high` would have given the same answers so far."""

    def reaches(self, other: float) -> bool:
        """Whether it is at least the other one."""
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
    """States of walks: those that were used last, of no more bytes together than a given number."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: list[_Kept[T]] = []  # the last used at the end

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self._kept)

    def keep(
        self, settings: Hashable, thresholds: Sequence[Threshold], num_steps: int, state: T, num_bytes: int
    ) -> None:
        """Keeps the state of a walk after so many steps; nobody may change it from now on.

        Args:
            settings: all that the walk depends on beside the thresholds.
            num_bytes: size of the state.
        """
        intervals = tuple((each.low, each.high) for each in thresholds)
        self._kept.append(
            _Kept(settings=settings, intervals=intervals, num_steps=num_steps, state=state, num_bytes=num_bytes)
        )
        while self.num_bytes > self.max_bytes:
            self._kept.pop(0)

    def farthest(self, settings: Hashable, thresholds: Sequence[Threshold]) -> T | None:
        """The state after the most steps that a walk with these settings and thresholds would come to as well.

        The thresholds then know what they were asked on the way. None where no state is kept.
        """

        def comes_there(kept: _Kept[T]) -> bool:
            pairs = zip(thresholds, kept.intervals, strict=True)
            return kept.settings == settings and all(low <= each.value < high for each, (low, high) in pairs)

        best = max(filter(comes_there, self._kept), key=lambda kept: kept.num_steps, default=None)
        if best is None:
            return None
        self._kept = [*(each for each in self._kept if each is not best), best]
        for threshold, interval in zip(thresholds, best.intervals, strict=True):
            threshold.low, threshold.high = interval
        return best.state
