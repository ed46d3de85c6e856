"""Bisection: where a condition begins to hold, by halving the interval in which that must be."""

from __future__ import annotations

import math
from collections.abc import Callable


def bisect(
    holds: Callable[[float], bool], low: float, high: float, num_steps: int, *, geometric: bool = False
) -> tuple[float, float]:
    """Narrows an interval around the place where a condition begins to hold.

    Args:
        holds: False below some place, True above it. It is taken to be False at `low` and True at `high`, which are
            not tried.
        num_steps: halvings, each of which tries the condition once.
        geometric: halves the ratio of the ends, which are above 0, in place of their difference.

    Returns:
        The ends: the largest number tried at which it does not hold (or `low`), and the least at which it does (or
        `high`).
    """
    for _ in range(num_steps):
        middle = math.sqrt(low * high) if geometric else (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def bisect_whole(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least whole number above `low` at which a condition holds, that holds at `high` and from some number on.

    Neither end is tried.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
