"""The goal of a sweep: an accurate and fast model, within limits, compared with the dense one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from search.limits import Limit, parse_limit
from search.outcome import Measurement, Outcome
from search.pareto import Values

ACCURACIES = {"top1": "top-1", "recall_at_1": "recall@1", "mean_average_precision": "mAP"}
"""Fields of `Measurement` that a sweep can search by -> their names in tables and pictures."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The two objectives of a sweep, accuracy and speed-up, with the limits that a model must keep.

    Both objectives are maximised. Hypervolumes start at half the dense accuracy and the dense speed: a model that is
    slower than the dense one, or has less than half its accuracy, is worth nothing to anyone. Both come from the dense
    model alone, so hypervolumes of one model and machine compare across sweeps.
    """

    dense: Measurement
    """Measurement of the dense model, which speed-ups, limits and the reference point refer to."""
    accuracy: str = "top1"
    """Accuracy that counts, one of `ACCURACIES`."""
    limits: tuple[Limit, ...] = ()
    """Limits that a model must keep to be of use."""

    @classmethod
    def of(cls, dense: Measurement, accuracy: str, limits: Iterable[str]) -> Goal:
        """Makes a goal from limits as texts, such as `top1 >= dense - 0.01`.

        Raises:
            ConfigError: a limit has no known form or names an unknown metric.
        """
        return cls(dense=dense, accuracy=accuracy, limits=tuple(map(parse_limit, limits)))

    @property
    def objectives(self) -> tuple[str, str]:
        """The fields of `Measurement` that are maximised."""
        return self.accuracy, "speedup"

    @property
    def reference(self) -> tuple[float, float]:
        """The point at which the hypervolume starts, in the order of `objectives`."""
        return metric_of(self.dense, self.accuracy) / 2, 1.0

    @property
    def reference_point(self) -> dict[str, float]:
        """The point at which the hypervolume starts, by objective."""
        return dict(zip(self.objectives, self.reference, strict=True))

    def values(self, outcomes: Sequence[Outcome]) -> Values:
        """Returns the objectives of outcomes, (n, 2); NaN for a metric that was not taken."""
        rows = [[metric_of(outcome.measurement, name) for name in self.objectives] for outcome in outcomes]
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    def excesses(self, measurement: Measurement) -> dict[str, float]:
        """Computes limit -> share of the dense value by which a measurement is beyond it; 0 or less is within."""
        return {limit.text: limit.excess(measurement, self.dense) for limit in self.limits}

    def acceptable(self, outcomes: Iterable[Outcome]) -> tuple[Outcome, ...]:
        """Returns the measured outcomes that keep every limit."""
        return tuple(
            outcome
            for outcome in outcomes
            if outcome.measurement is not None
            and all(excess <= 0 for excess in self.excesses(outcome.measurement).values())
        )


def metric_of(measurement: Measurement | None, name: str) -> float:
    """Returns a metric of a measurement as a number; NaN if the metric or the measurement was not taken."""
    value = None if measurement is None else getattr(measurement, name)
    return nan if value is None else float(value)
