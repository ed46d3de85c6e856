"""What is best when two things count: the front, its hypervolume, its knee, and the pick of one point. numpy only."""

# n points, m objectives; inside this file every objective is maximised

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.errors import SweepError
from search.limits import Limit, acceptable
from search.outcome import Measurement, Outcome

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One thing that counts."""

    name: str
    """A field of `Measurement`."""
    direction: str
    """`maximize` or `minimize`."""


ACCURACIES = {"top1": "top-1", "recall_at_1": "recall@1", "mean_average_precision": "mAP"}
"""Field of `Measurement` -> how it is called in tables and pictures. A sweep searches by one of them."""


def objectives(accuracy: str) -> tuple[Objective, Objective]:
    """What counts in a sweep.

    Args:
        accuracy: one of `ACCURACIES`, as everywhere below.
    """
    return Objective(name=accuracy, direction="maximize"), Objective(name="speedup", direction="maximize")


def accuracy_of(record: Mapping[str, Any]) -> str:
    """Which of `ACCURACIES` the sweep of a `front.json` was searched by."""
    (accuracy,) = (each["name"] for each in record["objectives"] if each["name"] in ACCURACIES)
    return str(accuracy)


def non_dominated(values: Values) -> NDArray[np.intp]:
    """Which points no other point beats.

    A point dominates another if it is as good in every objective and better in one. Of equal points only the
    first counts; a point with a NaN never does.

    Args:
        values: (n, m), all maximised; n = 0 is fine.

    Returns:
        Row numbers, ascending.
    """
    (rows,) = np.nonzero(~np.isnan(values).any(axis=1))
    # Best first, objective by objective: no row is dominated by a later one. lexsort is stable, equal rows keep order.
    order = rows[np.lexsort(-values[rows].T[::-1])]
    front: list[int] = []
    for row in order:
        if not (values[front] >= values[row]).all(axis=1).any():
            front.append(int(row))
    return np.sort(np.array(front, dtype=np.intp))


def selection_order(values: Values) -> NDArray[np.intp]:
    """Rows, the best first: by non-dominated rank, within a rank by crowding distance (NSGA-II, Deb et al. 2002).

    The first rank is the front, the next the front of the rest, and so on. The distance of a point is the perimeter of
    the box between its neighbours of the same rank, each objective scaled to its range there; ends come first. Equal
    points keep their order, each at a rank of its own; a point with a NaN comes last.

    Args:
        values: (n, m), all maximised.
    """
    is_number = ~np.isnan(values).any(axis=1)
    rows = np.arange(len(values))
    as_good = (values[:, None] >= values[None]).all(axis=2)  # (n, n): of a row against a column
    beats = as_good & (~as_good.T | (rows[:, None] < rows[None]))
    num_better, left, order = beats.sum(axis=0), rows[is_number], list[int]()
    while len(left):
        is_front = num_better[left] == 0
        front, left = left[is_front], left[~is_front]
        order += front[np.argsort(-_crowding(values[front]), kind="stable")].tolist()
        num_better = num_better - beats[front].sum(axis=0)
    return np.array([*order, *rows[~is_number]], dtype=np.intp)


def _crowding(values: Values) -> Values:
    """(n, m) -> (n,)"""
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance


def hypervolume(values: Values, reference: Values) -> float:
    """Volume that the points dominate above the reference, exactly.

    Points at or below the reference in any objective add nothing, nor do duplicates, dominated points and NaNs.

    Args:
        values: (n, m), all maximised, m >= 1; n = 0 gives 0.
        reference: (m,).
    """
    gains = values - reference
    gains = gains[(gains > 0).all(axis=1)]
    return _volume(gains[non_dominated(gains)])


def _volume(gains: Values) -> float:
    """Volume of the union of the boxes from the origin to each point; (n, m), positive, non-dominated."""
    if len(gains) == 0:
        return 0.0
    if gains.shape[1] == 1:
        return float(gains.max())
    gains = gains[np.argsort(-gains[:, -1])]
    heights = -np.diff(gains[:, -1], append=0.0)
    if gains.shape[1] == 2:  # a staircase: as the last objective falls, the first rises
        return float(gains[:, 0] @ heights)
    # Between two neighbouring heights, the slice is the union of all boxes at least as high.
    tops = (gains[: count + 1, :-1] for count in range(len(gains)))
    return sum(float(height) * _volume(top[non_dominated(top)]) for height, top in zip(heights, tops, strict=True))


def knee(values: Values) -> int:
    """The point of a front after which more of one objective costs much of the other.

    Both objectives are scaled to [0, 1]; the knee is the point nearest to (1, 1), the best of both. The usual
    distance above the line between the ends finds no knee on a front that sags below it, and would give an end.
    Ties, and so a front of two points, go to the first objective (the more accurate model).

    Args:
        values: (n, 2), non-dominated, n >= 1.

    Returns:
        Its row.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    missing = (high - values) / np.where(high > low, high - low, 1.0)
    distance = np.linalg.norm(missing, axis=1).round(12)  # rounded, so that a tie stays one
    return int(np.lexsort((-values[:, 0], distance))[0])


def front_of(outcomes: Sequence[Outcome], accuracy: str = "top1") -> tuple[Outcome, ...]:
    """The measured outcomes that no other dominates, the slowest first."""
    measured = [outcome for outcome in outcomes if outcome.measurement is not None]
    front = [measured[row] for row in non_dominated(_values(measured, accuracy))]
    return tuple(sorted(front, key=lambda outcome: _metric(outcome, "throughput_img_s")))


def contenders(outcomes: Sequence[Outcome], accuracy: str = "top1") -> tuple[Outcome, ...]:
    """The measured outcomes that may be on the front, given how well their speed-ups are known.

    Out is who is beaten beyond the noise: by one at least as accurate whose speed-up interval lies above its own.
    """
    measured = [outcome for outcome in outcomes if outcome.measurement is not None]
    names = ("speedup_low", "speedup_high", accuracy)
    low, high, top = np.array([[_metric(outcome, name) for outcome in measured] for name in names])
    is_beaten = ((low > high[:, None]) & (top >= top[:, None])).any(axis=1)
    return tuple(outcome for outcome, beaten in zip(measured, is_beaten, strict=True) if not beaten)


def distinct(front: Sequence[Outcome], dense: Measurement, accuracy: str = "top1") -> tuple[Outcome, ...]:
    """The points of a front that noise does not make: without those that can be told neither from the dense model nor
    from a point before them, in no objective.

    Two values are told apart if they differ by more than the root of the sum of their squared half-intervals.

    Args:
        front: the slowest first, as `front_of` gives it; of points that are the same, the most accurate stays.
    """
    kept, found = [dense], list[Outcome]()
    for outcome in front:
        own = outcome.measurement
        assert own is not None
        if all(_differ(own, other, accuracy) or _differ(own, other, "speedup") for other in kept):
            kept.append(own)
            found.append(outcome)
    return tuple(found)


def _differ(one: Measurement, other: Measurement, metric: str) -> bool:
    """Beyond the noise; a metric without an interval is taken to be exact."""
    values = [getattr(each, metric) for each in (one, other)]
    noise = [
        (getattr(each, f"{metric}_high", value) - getattr(each, f"{metric}_low", value)) / 2
        for each, value in zip((one, other), values, strict=True)
    ]
    return bool(abs(values[0] - values[1]) > np.hypot(*noise))


def reference_point(dense: Measurement, accuracy: str = "top1") -> dict[str, float]:
    """Where the hypervolume starts: half the accuracy of the dense model, at its speed.

    A model slower than the dense one, or with less than half its accuracy, is worth nothing to anyone. Both come
    from the dense model alone, so hypervolumes of one model and machine compare across sweeps.
    """
    return {accuracy: getattr(dense, accuracy) / 2, "speedup": 1.0}


def hypervolume_of(outcomes: Sequence[Outcome], dense: Measurement, accuracy: str = "top1") -> float:
    """Hypervolume of all measured outcomes."""
    return (0.0, *running_hypervolume(outcomes, dense, accuracy))[-1]


def running_hypervolume(
    outcomes: Sequence[Outcome], dense: Measurement, accuracy: str = "top1", limits: Sequence[Limit] = ()
) -> tuple[float, ...]:
    """Hypervolume after each outcome, of those within the limits; it never falls."""
    growing = GrowingFront(dense, accuracy, limits)
    return tuple(growing.add(outcome) for outcome in outcomes)


class GrowingFront:
    """The front of outcomes that come one by one."""

    def __init__(self, dense: Measurement, accuracy: str, limits: Sequence[Limit]) -> None:
        start = reference_point(dense, accuracy)
        self._reference = np.array([_oriented(objective, start[objective.name]) for objective in objectives(accuracy)])
        self._dense, self._accuracy, self._limits = dense, accuracy, limits
        self._values = _values([], accuracy)
        self._hypervolume = 0.0

    def add(self, outcome: Outcome) -> float:
        """The hypervolume of all outcomes within the limits, this one included; it never falls."""
        for each in acceptable([outcome], self._limits, self._dense):
            values = _values([each], self._accuracy)
            if not (self._values >= values).all(axis=1).any():
                front = np.vstack((self._values, values))
                self._values = front[non_dominated(front)]
                self._hypervolume = hypervolume(self._values, self._reference)
        return self._hypervolume


def front_record(name: str, outcomes: Sequence[Outcome], dense: Measurement, accuracy: str = "top1") -> dict[str, Any]:
    """What `front.json` holds: the distinct points of the front of the sweep `name`, the hypervolume of all of it, and
    what it is compared with."""
    front = distinct(front_of(outcomes, accuracy), dense, accuracy)
    return {
        "name": name,
        "objectives": [asdict(objective) for objective in objectives(accuracy)],
        "dense": asdict(dense),
        "reference_point": reference_point(dense, accuracy),
        "hypervolume": hypervolume_of(outcomes, dense, accuracy),
        "knee": front[knee(_values(front, accuracy))].id if front else None,
        "points": [_point(outcome) for outcome in front],
    }


def _point(outcome: Outcome) -> dict[str, Any]:
    assert outcome.measurement is not None
    assert outcome.plan is not None
    asked = {"candidate": asdict(outcome.candidate), "plan": outcome.plan.to_json()}
    return {"id": outcome.id} | asdict(outcome.measurement) | asked


def within(
    front: Sequence[Outcome], at_least: Mapping[str, float], at_most: Mapping[str, float]
) -> tuple[Outcome, ...]:
    """The measured outcomes that keep every bound; one whose metric was not taken does not keep it.

    Args:
        front: in any order, which stays.
        at_least: metric (a field of `Measurement`) -> smallest value allowed.
        at_most: metric -> largest value allowed.

    Raises:
        SweepError: there is no such metric.
    """
    known = [field.name for field in fields(Measurement)]
    for metric in (*at_least, *at_most):
        if metric not in known:
            raise SweepError(f"no metric {metric!r}; there are {', '.join(known)}")

    def keeps(outcome: Outcome) -> bool:
        return all(_metric(outcome, metric) >= bound for metric, bound in at_least.items()) and all(
            _metric(outcome, metric) <= bound for metric, bound in at_most.items()
        )

    return tuple(outcome for outcome in front if outcome.measurement is not None and keeps(outcome))


def pick(
    front: Sequence[Outcome],
    how: str,
    at_least: Mapping[str, float],
    at_most: Mapping[str, float],
    accuracy: str = "top1",
) -> Outcome:
    """One point of the front, out of those within the bounds.

    Args:
        front: non-dominated outcomes.
        how: `knee`, `fastest`, `most-accurate`, or the id of a point.
        at_least: as in `within`.
        at_most: as in `within`.

    Raises:
        SweepError: no such point or metric, or the bounds leave nothing; it says what there is.
    """
    if not front:
        raise SweepError("the front is empty: no trial was measured; run more trials, or look at why they failed")
    left = within(front, at_least, at_most)
    if not left:
        raise SweepError(_why_nothing_is_left(front, at_least, at_most))
    if how == "knee":
        return left[knee(_values(left, accuracy))]
    if how == "fastest":
        return max(left, key=lambda outcome: _metric(outcome, "throughput_img_s"))
    if how == "most-accurate":
        return max(left, key=lambda outcome: _metric(outcome, accuracy))
    for outcome in left:
        if outcome.id == how:
            return outcome
    there = ", ".join(outcome.id for outcome in left)
    raise SweepError(f"no point {how!r} to pick; there are {there}, and knee, fastest, most-accurate")


def _why_nothing_is_left(front: Sequence[Outcome], at_least: Mapping[str, float], at_most: Mapping[str, float]) -> str:
    wanted = [f"{metric} >= {bound:g}" for metric, bound in at_least.items()]
    wanted += [f"{metric} <= {bound:g}" for metric, bound in at_most.items()]
    reached = []
    for metrics, best, word in ((at_least, max, "up to"), (at_most, min, "down to")):
        for metric in metrics:
            values = [value for outcome in front if not np.isnan(value := _metric(outcome, metric))]
            reached.append(f"{metric} {word} {best(values):.4g}" if values else f"{metric} not measured")
    return f"no point of the front has {' and '.join(wanted)}; it reaches {', '.join(reached)}"


def _metric(outcome: Outcome, name: str) -> float:
    """NaN, which keeps no bound, if it was not taken."""
    value = getattr(outcome.measurement, name)
    return np.nan if value is None else float(value)


def _values(outcomes: Sequence[Outcome], accuracy: str) -> Values:
    """(n, m), one column an objective, maximised."""
    columns = [[_oriented(each, _metric(outcome, each.name)) for outcome in outcomes] for each in objectives(accuracy)]
    return np.array(columns, dtype=np.float64).T


def _oriented(objective: Objective, value: float) -> float:
    return value if objective.direction == "maximize" else -value
