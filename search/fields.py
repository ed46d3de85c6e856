"""The types of a recipe's values, and what each refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, Field

from pruning.plan import TokenReduction
from pruning.scores.criteria import CRITERIA
from search.errors import ConfigError
from search.limits import parse_limit


def _ordered(bounds: Any) -> Any:
    if isinstance(bounds, tuple) and bounds[0] > bounds[1]:
        raise ValueError(f"bounds {list(bounds)} are upside down; give the lower one first")
    return bounds


def _each_once(choices: Any) -> Any:
    if isinstance(choices, tuple):
        if not choices:
            raise ValueError("an empty list leaves no choice; give one value at least")
        if twice := [choice for choice in choices if choices.count(choice) > 1]:
            raise ValueError(f"{twice[0]!r} is given twice; give each choice once")
    return choices


def _known_criterion(name: str) -> str:
    if name not in CRITERIA:
        raise ValueError(f"no criterion {name!r}; there are {', '.join(CRITERIA)}")
    return name


def _known_reduction(name: str) -> str:
    names = ("auto", *get_args(TokenReduction))
    if name not in names:
        raise ValueError(f"no token reduction {name!r}; there are {', '.join(names)}")
    return name


def auto_alone(choices: Any) -> Any:
    """Refuses `auto` within a list."""
    if isinstance(choices, tuple) and "auto" in choices:
        raise ValueError("auto stands for one of the others; leave it out of the list")
    return choices


def _multiple_or_auto(value: int | str) -> int | str:
    if value != "auto" and (isinstance(value, str) or value < 1):
        raise ValueError(f"{value!r} is no width to round to; give a whole number of at least 1, or auto")
    return value


def _known_pattern(text: str) -> str:
    if text != "any":
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or not 1 <= int(match[1]) < int(match[2]):
            raise ValueError(f"{text!r} is no pattern; give any, or N:M with N below M, as 2:4")
    return text


def _known_limit(text: str) -> str:
    try:
        return parse_limit(text).text
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else Path(path).expanduser().absolute()


def parse_seconds(text: str | float) -> float:
    """Gives the seconds of `90`, `90s`, `10m` or `2h`.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip())
    if match is None:
        raise ConfigError(f"time budget {text!r} is no time; give seconds, or 90s, 10m, 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


T = TypeVar("T")

Bounds = Annotated[T | tuple[T, T], AfterValidator(_ordered)]
"""A value, which fixes the parameter, or [low, high]."""
Choices = Annotated[T | tuple[T, ...], AfterValidator(_each_once)]
"""A value, which fixes the choice, or a list of values."""
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Points = Annotated[float, Field(ge=0, le=100)]
"""Accuracy points: 1 is one percent of the images."""
Criterion = Annotated[str, AfterValidator(_known_criterion)]
Reduction = Annotated[str, AfterValidator(_known_reduction)]
"""A token reduction, or `auto`."""
SparsityPattern = Annotated[str, AfterValidator(_known_pattern)]
"""`any`, or N:M."""
LimitText = Annotated[str, AfterValidator(_known_limit)]
Multiple = Annotated[int | str, AfterValidator(_multiple_or_auto)]
"""A width to round to, or `auto`."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed, as NumPy takes it."""
LocalPath = Annotated[Path | None, AfterValidator(_absolute)]
"""A path on this machine, made absolute."""
