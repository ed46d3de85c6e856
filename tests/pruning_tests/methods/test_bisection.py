"""Bisection against a walk over every number, and what it tries."""

from __future__ import annotations

import pytest

from pruning.methods.bisection import bisect, bisect_whole


@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize("place", [1.0, 1.3, 7.9, 50.0, 99.0])
def test_the_ends_come_to_lie_around_the_place_where_the_condition_begins_to_hold(
    place: float, geometric: bool
) -> None:
    tried: list[float] = []

    def holds(number: float) -> bool:
        tried.append(number)
        return number >= place

    low, high = bisect(holds, 0.5, 100.0, 30, geometric=geometric)
    assert low < place <= high and high - low < 1e-5
    assert len(tried) == 30
    assert (low, high) == (max(x for x in tried if x < place), min(x for x in tried if x >= place))
    assert tried[0] == (pytest.approx(50.0**0.5) if geometric else 50.25)


def test_ends_that_nothing_between_passes_stay_as_they_were() -> None:
    assert bisect(lambda number: False, 0.0, 1.0, 5) == (1 - 2**-5, 1.0)
    assert bisect(lambda number: True, 0.0, 1.0, 5) == (0.0, 2**-5)
    assert bisect(lambda number: True, 3.0, 4.0, 0) == (3.0, 4.0)


def test_the_least_whole_number_is_found_in_few_tries_none_of_them_an_end() -> None:
    for high in range(1, 34):
        for place in range(1, high + 1):
            tried: list[int] = []

            def holds(number: int, place: int = place, tried: list[int] = tried) -> bool:
                tried.append(number)
                return number >= place

            assert bisect_whole(holds, 0, high) == place
            assert len(tried) <= (high - 1).bit_length() and not {0, high} & {*tried}
