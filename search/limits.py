"""Limits that a model must keep to be of use: `top1 >= dense - 0.01`, `macs <= 60%`, `latency_ms_p50 <= 5`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from search.errors import ConfigError
from search.outcome import Measurement

RETRIEVAL = frozenset({"recall_at_1", "mean_average_precision"})
"""Metrics that are measured only where the recipe searches by one of them."""

METRICS = tuple(field.name for field in fields(Measurement) if field.name != "top1_test")
"""Metrics that a limit may bound: all fields of `Measurement` but the one that is measured after the search."""

_FORM = re.compile(r"(\w+) *(<=|>=) *(?:(\d[\d.]*) *%|(dense) *(?:([+-]) *([\d.]+))?|(-?[\d.]+(?:e-?\d+)?))")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A bound on one metric: metric <= bound, or metric >= bound, where bound = share * dense + offset."""

    text: str
    """The limit as the user wrote it."""
    metric: str
    """The metric that is bounded, one of `METRICS`."""
    is_most: bool
    """True for metric <= bound, False for metric >= bound."""
    share: float
    """Factor of the dense model's value in the bound; 0 for a bound that does not depend on it."""
    offset: float
    """Summand of the bound, in the unit of the metric."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(f"limit {self.text!r}: no metric {self.metric!r}; there are {', '.join(METRICS)}")

    def bound(self, dense: Measurement) -> float:
        """Computes the bound, in the unit of the metric."""
        return (self.share * float(getattr(dense, self.metric)) if self.share else 0.0) + self.offset

    def excess(self, measurement: Measurement, dense: Measurement) -> float:
        """Computes how far a measurement is beyond the bound, as a share of the dense value; 0 or less is within."""
        over = float(getattr(measurement, self.metric)) - self.bound(dense)
        share = (over if self.is_most else -over) / (abs(float(getattr(dense, self.metric))) or 1.0)
        return round(share, 12)  # a value at the bound is within, whatever binary fractions make of it


def parse_limit(text: str) -> Limit:
    """Parses `metric <= bound` or `metric >= bound`.

    Args:
        text: the bound in it is a number, a share of the dense model's value (`60%`), or `dense`, `dense - 0.01`,
            `dense + 2`.

    Raises:
        ConfigError: the text is of no such form, or there is no such metric; the message says which there are.
    """
    match = _FORM.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        metric, relation, percent, dense, sign, offset, number = match.groups()
        share = float(percent) / 100 if percent else float(bool(dense))
        summand = float(number or offset or 0) * (-1 if sign == "-" else 1)
    except ValueError:
        raise ConfigError(
            f"limit {text!r} is of no known form; give metric <= 5, metric <= 60% (of the dense model's) or "
            "metric >= dense - 0.01"
        ) from None
    return Limit(text=text.strip(), metric=metric, is_most=relation == "<=", share=share, offset=summand)
