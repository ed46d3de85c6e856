"""The front of a sweep: its record (front.json), its points among outcomes, and the pick of one point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from pruning.plan import Plan
from search.errors import SweepError
from search.goal import ACCURACIES, Goal, metric_of
from search.outcome import Candidate, Measurement, Outcome, State
from search.pareto import hypervolume, knee, non_dominated


@dataclass(frozen=True, kw_only=True)
class Front:
    """The non-dominated models of a sweep with what they are compared with: the content of front.json."""

    name: str
    """Name of the sweep."""
    goal: Goal
    """Objectives, limits and dense model that the points are measured against."""
    points: tuple[Outcome, ...]
    """Measured outcomes, the slowest first; only their id, candidate, plan and measurement are kept."""
    hypervolume: float
    """Hypervolume of all acceptable outcomes above the goal's reference point."""
    knee: str | None
    """Id of the point after which more speed starts to cost much accuracy; None for an empty front."""
    trials: int = 0
    """Number of trials of the sweep."""
    ended_by: str | None = None
    """Reason why the search ended: trials, time, saturation, interrupt or exhaustion; None for a replay."""
    idle_share: float | None = None
    """Share of their time in which the workers waited for trials; None for a replay."""
    busy_share: float | None = None
    """Share of the seconds of the command, from its start to its end, in which the slots worked; None for a replay."""
    conditions: Mapping[str, str | int] | None = None
    """Device, precision, threads, batch size and torch version that the figures hold for; None for a replay."""
    fingerprints: Mapping[str, str] | None = None
    """Hashes of the weights and images that the figures hold for; None for a replay."""

    @classmethod
    def of(
        cls, name: str, outcomes: Sequence[Outcome], goal: Goal, *, trials: int = 0, ended_by: str | None = None,
        idle_share: float | None = None, busy_share: float | None = None,
        conditions: Mapping[str, str | int] | None = None, fingerprints: Mapping[str, str] | None = None,
    ) -> Front:  # fmt: skip
        """Finds the front of a sweep among its outcomes; points that noise makes are left out.

        The other arguments are the fields of the same names.
        """
        points = distinct(front_of(outcomes, goal), goal)
        return cls(
            name=name, goal=goal, points=points, hypervolume=hypervolume_of(outcomes, goal),
            knee=points[knee(goal.values(points))].id if points else None,
            trials=trials, ended_by=ended_by, idle_share=idle_share, busy_share=busy_share, conditions=conditions,
            fingerprints=fingerprints,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Returns the content of front.json, plain values only."""
        record: dict[str, Any] = {
            "name": self.name,
            "objectives": [{"name": name, "direction": "maximize"} for name in self.goal.objectives],
            "dense": asdict(self.goal.dense),
            "reference_point": self.goal.reference_point,
            "hypervolume": self.hypervolume,
            "knee": self.knee,
            "points": [_point_to_json(point) for point in self.points],
            "limits": [limit.text for limit in self.goal.limits],
            "trials": self.trials,
        }
        names = ("ended_by", "idle_share", "busy_share", "conditions", "fingerprints")
        return record | {name: value for name in names if (value := getattr(self, name)) is not None}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Front:
        """Reads what `to_json` wrote, in this or an earlier version.

        Raises:
            SweepError: the record is not of a front.
        """
        try:
            objectives = [objective["name"] for objective in record["objectives"]]
            (accuracy,) = (name for name in objectives if name in ACCURACIES)
            return cls(
                name=record["name"],
                goal=Goal.of(_measurement(record["dense"]), accuracy, record.get("limits", ())),
                points=tuple(map(_point_from_json, record["points"])),
                hypervolume=record["hypervolume"],
                knee=record["knee"],
                trials=record["trials"],
                ended_by=record.get("ended_by"),
                idle_share=record.get("idle_share"),
                busy_share=record.get("busy_share"),
                conditions=record.get("conditions"),
                fingerprints=record.get("fingerprints"),
            )
        except KeyError as error:
            raise SweepError(f"it is not a front: it has no key {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise SweepError(f"it is not a front: {error}") from None

    def within(self, at_least: Mapping[str, float], at_most: Mapping[str, float]) -> Front:
        """Returns this front with only the points that keep every bound.

        Args:
            at_least: metric (a field of `Measurement`) -> smallest value allowed.
            at_most: metric -> largest value allowed.

        Raises:
            SweepError: there is no such metric.
        """
        return replace(self, points=within(self.points, at_least, at_most))

    def pick(
        self, how: str, at_least: Mapping[str, float] | None = None, at_most: Mapping[str, float] | None = None
    ) -> Outcome:
        """Picks one point among those within the bounds.

        Args:
            how: `knee`, `fastest`, `most-accurate`, or the id of a point.
            at_least: metric (a field of `Measurement`) -> smallest value allowed.
            at_most: metric -> largest value allowed.

        Raises:
            SweepError: no such point or metric, or the bounds leave nothing; the message says what there is.
        """
        at_least, at_most = at_least or {}, at_most or {}
        if not self.points:
            raise SweepError(
                f"the front is empty: none of {self.trials} trials keeps the limits and differs from the dense model; "
                "run more trials"
            )
        points = within(self.points, at_least, at_most)
        if not points:
            raise SweepError(_why_nothing_is_left(self.points, at_least, at_most))
        if how == "knee":
            return points[knee(self.goal.values(points))]
        if how == "fastest":
            return max(points, key=lambda point: metric_of(point.measurement, "throughput_img_s"))
        if how == "most-accurate":
            return max(points, key=lambda point: metric_of(point.measurement, self.goal.accuracy))
        for point in points:
            if point.id == how:
                return point
        ids = ", ".join(point.id for point in points)
        raise SweepError(f"no point {how!r} to pick; there are {ids}, and knee, fastest, most-accurate")


def _point_to_json(point: Outcome) -> dict[str, Any]:
    assert point.measurement is not None
    assert point.plan is not None
    origin = {"candidate": asdict(point.candidate), "plan": point.plan.to_json()}
    return {"id": point.id} | asdict(point.measurement) | origin


def _point_from_json(record: Mapping[str, Any]) -> Outcome:
    return Outcome(
        id=record["id"],
        state=State.MEASURED,
        candidate=Candidate.from_json(record["candidate"]),
        plan=Plan.from_json(record["plan"]),
        measurement=_measurement(record),
    )


def _measurement(record: Mapping[str, Any]) -> Measurement:
    return Measurement(**{field.name: record[field.name] for field in fields(Measurement) if field.name in record})


def front_of(outcomes: Sequence[Outcome], goal: Goal) -> tuple[Outcome, ...]:
    """Returns the acceptable outcomes that no other dominates, the slowest first."""
    acceptable = goal.acceptable(outcomes)
    front = [acceptable[row] for row in non_dominated(goal.values(acceptable))]
    return tuple(sorted(front, key=lambda outcome: metric_of(outcome.measurement, "throughput_img_s")))


def contenders(outcomes: Sequence[Outcome], goal: Goal) -> tuple[Outcome, ...]:
    """Returns the measured outcomes that may be on the front, given how well their speed-ups are known.

    An outcome is out if another is at least as accurate and has a speed-up interval that lies above its own. The goal's
    limits are not looked at: a model close to one is judged by its final timing.
    """
    measured = [outcome for outcome in outcomes if outcome.measurement is not None]
    names = ("speedup_low", "speedup_high", goal.accuracy)
    low, high, top = np.array([[metric_of(outcome.measurement, name) for outcome in measured] for name in names])
    is_beaten = ((low > high[:, None]) & (top >= top[:, None])).any(axis=1)
    return tuple(outcome for outcome, beaten in zip(measured, is_beaten, strict=True) if not beaten)


def distinct(front: Sequence[Outcome], goal: Goal) -> tuple[Outcome, ...]:
    """Returns the points of a front without those that differ from the dense model, or from a point before them, by no
    more than noise in every objective.

    Two values differ if they are apart by more than the root of the sum of their squared half-intervals.

    Args:
        front: the slowest first, as `front_of` gives it; of points that do not differ, the most accurate stays.
    """
    kept, points = [goal.dense], list[Outcome]()
    for outcome in front:
        measurement = outcome.measurement
        assert measurement is not None
        if all(any(_differ(measurement, other, name) for name in goal.objectives) for other in kept):
            kept.append(measurement)
            points.append(outcome)
    return tuple(points)


def _differ(one: Measurement, other: Measurement, metric: str) -> bool:
    """Tells whether a metric of two models differs beyond the noise; a metric without an interval is exact."""
    first, second = getattr(one, metric), getattr(other, metric)
    half_intervals = [
        (getattr(measurement, f"{metric}_high", value) - getattr(measurement, f"{metric}_low", value)) / 2
        for measurement, value in ((one, first), (other, second))
    ]
    return bool(abs(first - second) > np.hypot(*half_intervals))


def hypervolume_of(outcomes: Sequence[Outcome], goal: Goal) -> float:
    """Computes the hypervolume of all acceptable outcomes."""
    return (0.0, *running_hypervolume(outcomes, goal))[-1]


def running_hypervolume(outcomes: Sequence[Outcome], goal: Goal) -> tuple[float, ...]:
    """Computes the hypervolume of the acceptable outcomes after each outcome; it never falls."""
    growing = GrowingFront(goal)
    return tuple(growing.add(outcome) for outcome in outcomes)


class GrowingFront:
    """A front of outcomes that come one by one, with its hypervolume."""

    def __init__(self, goal: Goal) -> None:
        self._goal, self._reference = goal, np.array(goal.reference)
        self._values = goal.values([])
        self._hypervolume = 0.0

    def add(self, outcome: Outcome) -> float:
        """Takes one more outcome and returns the hypervolume of all acceptable ones so far; it never falls."""
        for acceptable in self._goal.acceptable([outcome]):
            values = self._goal.values([acceptable])
            if not (self._values >= values).all(axis=1).any():
                front = np.vstack((self._values, values))
                self._values = front[non_dominated(front)]
                self._hypervolume = hypervolume(self._values, self._reference)
        return self._hypervolume


def within(
    front: Sequence[Outcome], at_least: Mapping[str, float], at_most: Mapping[str, float]
) -> tuple[Outcome, ...]:
    """Returns the measured outcomes that keep every bound; one whose metric was not taken does not keep it.

    Args:
        front: in any order, which stays.
        at_least: metric (a field of `Measurement`) -> smallest value allowed.
        at_most: metric -> largest value allowed.

    Raises:
        SweepError: there is no such metric.
    """
    metrics = [field.name for field in fields(Measurement)]
    for metric in (*at_least, *at_most):
        if metric not in metrics:
            raise SweepError(f"no metric {metric!r}; there are {', '.join(metrics)}")

    def keeps(outcome: Outcome) -> bool:
        return all(metric_of(outcome.measurement, metric) >= bound for metric, bound in at_least.items()) and all(
            metric_of(outcome.measurement, metric) <= bound for metric, bound in at_most.items()
        )

    return tuple(outcome for outcome in front if outcome.measurement is not None and keeps(outcome))


def _why_nothing_is_left(front: Sequence[Outcome], at_least: Mapping[str, float], at_most: Mapping[str, float]) -> str:
    wanted = [f"{metric} >= {bound:g}" for metric, bound in at_least.items()]
    wanted += [f"{metric} <= {bound:g}" for metric, bound in at_most.items()]
    reached = []
    for metrics, best, word in ((at_least, max, "up to"), (at_most, min, "down to")):
        for metric in metrics:
            values = [value for point in front if not np.isnan(value := metric_of(point.measurement, metric))]
            reached.append(f"{metric} {word} {best(values):.4g}" if values else f"{metric} not measured")
    return f"no point of the front has {' and '.join(wanted)}; it reaches {', '.join(reached)}"
