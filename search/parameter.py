"""The parameters of a search space: a range of numbers or a choice, and whoever chooses a value of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Chooser(Protocol):
    """Chooses a value of a range or of a list: an Optuna trial, or a test's fake."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A range of numbers, ends included."""

    low: float
    high: float
    is_whole: bool = False
    is_log: bool = False

    def at(self, share: float) -> float:
        """Gives the value at a share of the range, in [0, 1]."""
        value = self.low * (self.high / self.low) ** share if self.is_log else self.low + share * (self.high - self.low)
        return round(value) if self.is_whole else min(max(value, self.low), self.high)  # rounding errors

    def share(self, value: float) -> float:
        """Gives the share of the range that lies below a value; the inverse of `at`."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def levels(self, count: int) -> tuple[float, ...]:
        """Gives `count` values, evenly spread from end to end; fewer if there are fewer whole numbers."""
        return tuple(dict.fromkeys(self.at(index / (count - 1)) for index in range(count)))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A list of values, one of which is chosen."""

    values: tuple[Any, ...]


Parameter = Numbers | Choice


def value_of(parameter: Parameter, name: str, chooser: Chooser) -> Any:
    """Lets the chooser choose a value of the parameter."""
    if isinstance(parameter, Choice):
        return chooser.suggest_categorical(name, parameter.values)
    if parameter.is_whole:
        return chooser.suggest_int(name, int(parameter.low), int(parameter.high))
    return chooser.suggest_float(name, parameter.low, parameter.high, log=parameter.is_log)
