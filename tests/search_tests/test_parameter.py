"""Ranges and choices: the value at a share of a range and the share of a value, ends included."""

from __future__ import annotations

from typing import Any

import pytest

from search.parameter import Choice, Numbers, Parameter, value_of

LINEAR = Numbers(low=2.0, high=4.0)
LOG = Numbers(low=0.01, high=1.0, is_log=True)
WHOLE = Numbers(low=3, high=6, is_whole=True)


@pytest.mark.parametrize(
    ("numbers", "share", "value"),
    [
        (LINEAR, 0.0, 2.0), (LINEAR, 0.25, 2.5), (LINEAR, 1.0, 4.0),
        (LOG, 0.0, 0.01), (LOG, 0.5, 0.1), (LOG, 1.0, 1.0),
        (WHOLE, 0.0, 3), (WHOLE, 2 / 3, 5), (WHOLE, 1.0, 6),
    ],
)  # fmt: skip
def test_value_at_a_share_of_the_range_and_back(numbers: Numbers, share: float, value: float) -> None:
    assert numbers.at(share) == pytest.approx(value)
    assert numbers.share(value) == pytest.approx(share)
    assert numbers.low <= numbers.at(share) <= numbers.high


def test_whole_numbers_are_rounded() -> None:
    assert [WHOLE.at(share) for share in (0.1, 0.2, 0.45, 0.55)] == [3, 4, 4, 5]
    assert all(isinstance(value, int) for value in WHOLE.levels(4))


@pytest.mark.parametrize(
    ("numbers", "count", "levels"),
    [(LINEAR, 2, (2.0, 4.0)), (LINEAR, 3, (2.0, 3.0, 4.0)), (LOG, 3, (0.01, 0.1, 1.0)), (WHOLE, 9, (3, 4, 5, 6))],
)
def test_levels_are_evenly_spread_from_end_to_end(numbers: Numbers, count: int, levels: tuple[float, ...]) -> None:
    assert numbers.levels(count) == pytest.approx(levels)
    assert (numbers.levels(count)[0], numbers.levels(count)[-1]) == (numbers.low, numbers.high)


class Recording:
    """A chooser that records how it was asked, and chooses the last value."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.calls.append(("float", name, low, high, log))
        return high

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.calls.append(("int", name, low, high))
        return high

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.calls.append(("categorical", name, choices))
        return choices[-1]


@pytest.mark.parametrize(
    ("parameter", "call", "value"),
    [
        (LINEAR, ("float", "x", 2.0, 4.0, False), 4.0),
        (LOG, ("float", "x", 0.01, 1.0, True), 1.0),
        (WHOLE, ("int", "x", 3, 6), 6),
        (Choice(values=("a", "b")), ("categorical", "x", ("a", "b")), "b"),
    ],
)
def test_chooser_is_asked_by_the_kind_of_the_parameter(parameter: Parameter, call: tuple[Any, ...], value: Any) -> None:
    chooser = Recording()
    assert value_of(parameter, "x", chooser) == value
    assert chooser.calls == [call]
