"""Where to try next: Gaussian processes of what the candidates gave, and the gain of hypervolume they expect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.stats import norm

from search.outcome import Candidate
from search.pareto import non_dominated
from search.space import Choice, Parameter, Space

Values = NDArray[np.float64]

NUM_ANYWHERE, NUM_NEAR = 300, 300
"""Candidates that are looked at for a suggestion, before the best of them are moved: from all of the space, and near
the best that is known."""

NUM_MOVED, NUM_MOVES, NUM_ROUNDS = 10, 10, 3
"""So many of the best are moved, so many times each, so often."""

SCALES = (0.05, 0.1, 0.2, 0.4)
"""Of moves, as shares of a parameter's range."""


class GaussianProcess:
    """Of one value over the unit cube: Matern 5/2, a length for each axis, a constant mean, noise.

    Lengths and noise are the most likely ones under a prior whose lengths grow with the root of the number of axes
    (Hvarfner et al. 2024, "Vanilla Bayesian Optimization Performs Great in High Dimensions").
    """

    def __init__(self, points: Values, values: Values, logs: Values) -> None:
        """
        Args:
            points: (n, d), n >= 1.
            values: (n,)
            logs: (d + 1,), of the lengths and of the noise's variance; the values have mean 0 and variance 1 for it.
        """
        self.points, self.logs = points, logs
        self._mean, self._scale = values.mean(), values.std() or 1.0
        covariance, _ = _covariance(points, points, logs[:-1])
        self._factor = cho_factor(covariance + np.exp(logs[-1]) * np.eye(len(points)), lower=True)
        self._weights = cho_solve(self._factor, (values - self._mean) / self._scale)

    @classmethod
    def fitted(cls, points: Values, values: Values, start: Values | None = None) -> GaussianProcess:
        """With the most likely lengths and noise, looked for from `start` on, those of an earlier fit."""
        scaled = (values - values.mean()) / (values.std() or 1.0)
        axes = points.shape[1]
        middle = np.append(np.full(axes, np.sqrt(2) + np.log(axes) / 2), -4.0)
        width = np.append(np.full(axes, np.sqrt(3)), 1.0)

        def loss(logs: Values) -> tuple[float, Values]:
            """Minus the log of likelihood and prior, and its gradient."""
            covariance, slope = _covariance(points, points, logs[:-1])
            factor = cho_factor(covariance + np.exp(logs[-1]) * np.eye(len(points)), lower=True)
            weights = cho_solve(factor, scaled)
            away = (logs - middle) / width
            value = scaled @ weights / 2 + np.log(np.diag(factor[0])).sum() + away @ away / 2
            inner = cho_solve(factor, np.eye(len(points))) - np.outer(weights, weights)
            weighted = inner * slope  # times the squared distance along an axis: what its length changes
            lengths = weighted.sum(axis=1) @ points**2 - (points * (weighted @ points)).sum(axis=0)
            gradient = np.append(lengths * np.exp(-2 * logs[:-1]), np.trace(inner) * np.exp(logs[-1]) / 2)
            return float(value), gradient + away / width

        bounds = [(np.log(0.05), np.log(50.0))] * axes + [(-12.0, 1.0)]
        found = minimize(loss, middle if start is None else start, jac=True, bounds=bounds, options={"maxiter": 50})
        return cls(points, values, found.x)

    def at(self, points: Values) -> tuple[Values, Values]:
        """Mean and standard deviation of the value, without noise, at (m, d) points."""
        across, _ = _covariance(points, self.points, self.logs[:-1])
        reduced = solve_triangular(self._factor[0], across.T, lower=True)
        variance = np.maximum(1.0 - (reduced**2).sum(axis=0), 1e-12)
        return self._mean + self._scale * (across @ self._weights), self._scale * np.sqrt(variance)


def _covariance(one: Values, other: Values, logs: Values) -> tuple[Values, Values]:
    """Of points, and by how much it grows with the log of an axis's length, over the squared distance along it."""
    lengths = np.exp(logs)
    distance = np.sqrt(5) * cdist(one / lengths, other / lengths)
    fading = np.exp(-distance)
    return (1 + distance + distance**2 / 3) * fading, 5 / 3 * (1 + distance) * fading


def expected_gain(mean: Values, deviation: Values, front: Values, reference: Values) -> Values:
    """Expected gain of hypervolume by each of some normally distributed points, in closed form.

    Above the reference, the strips between neighbouring points of the front add up; in each, both objectives gain
    independently (after Emmerich et al. 2011).

    Args:
        mean: (m, 2), of two objectives that are maximised.
        deviation: (m, 2)
        front: (n, 2); dominated points add nothing, n = 0 is fine.
        reference: (2,)
    """
    front = front[(front > reference).all(axis=1)]
    front = front[non_dominated(front)]
    front = front[np.argsort(front[:, 0])]
    edges = np.concatenate(([reference[0]], front[:, 0]))
    heights = np.append(front[:, 1], reference[1])
    over_edges = _expected_excess(mean[:, :1], deviation[:, :1], edges)
    in_strips = over_edges - np.append(over_edges[:, 1:], np.zeros((len(mean), 1)), axis=1)
    gains: Values = (in_strips * _expected_excess(mean[:, 1:], deviation[:, 1:], heights)).sum(axis=1)
    return gains


def _expected_excess(mean: Values, deviation: Values, level: Values) -> Values:
    """Of a normally distributed number over a level, 0 where it is below."""
    away = (mean - level) / deviation
    excess: Values = deviation * (away * norm.cdf(away) + norm.pdf(away))
    return np.maximum(excess, 0.0)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What came of a candidate."""

    candidate: Candidate
    values: tuple[float, float] | None
    """Of both objectives, maximised; None if it failed or was stopped."""
    excesses: Mapping[str, float]
    """Limit -> how far it is beyond; 0 or less is within."""
    rungs: tuple[tuple[float, float], ...] = ()
    """Values on the way, at the first rung and at later ones."""

    @property
    def is_stopped(self) -> bool:
        """At a rung."""
        return self.values is None and len(self.rungs) > 0


class Surrogate:
    """Suggests candidates, by a process of each objective, of each limit, and of whether a trial succeeds at all.

    Where trials pass rungs, how far one has come is an axis more of the objectives: what was seen early is not taken
    for final, but tells of it as much as it does for those that went on (after Kandasamy et al. 2017, "BOCA"). So what
    was stopped by bad luck is found out, and suggested once more.
    """

    def __init__(
        self,
        space: Space,
        candidate_of: Callable[[Mapping[str, Any]], Candidate],
        reference: tuple[float, float] | None,
        seed: int,
    ) -> None:
        """
        Args:
            candidate_of: values of the space's parameters -> the candidate that is tried for them.
            reference: where hypervolume begins, in both objectives; by default with the worst that was measured. All
                that is below in the first one is the same.
        """
        self._space, self._candidate_of, self._reference = space, candidate_of, reference
        self._parameters = space.parameters()
        self._rng = np.random.default_rng(seed)
        self._logs: dict[str, Values] = {}
        """Of the last fits."""

    def sample_uniform(self) -> Candidate:
        """A candidate from all of the space, each as likely."""
        return self._candidate_of({name: self._drawn(each) for name, each in self._parameters.items()})

    def suggest(self, tried: Sequence[Observation], running: Sequence[Candidate]) -> Candidate | None:
        """The candidate with the largest expected gain, of those that were not tried, or stopped, and do not run; None
        if all that were looked at are. At least one must have been measured.

        Running ones count as if they gave what is expected of them (Ginsbourger et al. 2010, "kriging believer").
        """
        measured = [each for each in tried if each.values is not None]
        known = {each.candidate for each in tried if not each.is_stopped} | set(running)
        expect = self._expectations(tried, measured, list(running))
        gains: dict[Candidate, float] = {}

        def look_at(candidates: Iterable[Candidate]) -> None:
            new = [each for each in dict.fromkeys(candidates) if each not in known and each not in gains]
            if new:
                gains.update(zip(new, expect(self._rows(new)).tolist(), strict=True))

        best = [measured[row].candidate for row in non_dominated(np.array([each.values for each in measured]))]
        look_at(each.candidate for each in tried if each.is_stopped)
        look_at(self.sample_uniform() for _ in range(NUM_ANYWHERE))
        look_at(self._mutated(best[index % len(best)]) for index in range(NUM_NEAR))
        for _ in range(NUM_ROUNDS):
            best = sorted(gains, key=lambda each: -gains[each])[:NUM_MOVED]
            look_at(self._mutated(each) for each in best for _ in range(NUM_MOVES))
        return max(gains, key=lambda each: gains[each], default=None)

    def _expectations(
        self, tried: Sequence[Observation], measured: Sequence[Observation], running: Sequence[Candidate]
    ) -> Callable[[Values], Values]:
        """The expected gain of hypervolume at points, times the chance that the trial succeeds within the limits."""
        seen = [(each.candidate, 1.0, each.values) for each in measured]
        num_rungs = max(len(each.rungs) for each in tried)
        for each in tried:
            seen += [(each.candidate, rung / num_rungs, values) for rung, values in enumerate(each.rungs)]

        def placed(rows: Values, progress: Sequence[float]) -> Values:
            return np.column_stack((rows, progress)) if num_rungs else rows

        candidates, progress, found = zip(*seen, strict=True)
        values = np.array(found)
        reference = values.min(axis=0) if self._reference is None else np.array(self._reference)
        values[:, 0] = np.maximum(values[:, 0], reference[0])
        points, waiting = self._rows([each.candidate for each in measured]), self._rows(running)
        names = list(measured[0].excesses)
        within = np.array([[each.excesses[name] <= 0 for name in names] for each in measured]).all(axis=1)
        objectives = [
            self._process(name, placed(self._rows(candidates), progress), column, placed(waiting, [1.0] * len(waiting)))
            for name, column in zip(("accuracy", "speed-up"), values.T, strict=True)
        ]
        limits = [
            self._process(name, points, np.array([each.excesses[name] for each in measured]), waiting) for name in names
        ]
        ended = [each for each in tried if not each.is_stopped]
        if len(measured) < len(ended):
            failed = np.array([1.0 if each.values is None else -1.0 for each in ended])
            limits.append(self._process("failed", self._rows([each.candidate for each in ended]), failed, waiting))

        def at_end(rows: Values) -> tuple[Values, Values]:
            """Means and deviations of both objectives, (m, 2) each."""
            whole = placed(rows, [1.0] * len(rows))
            means, deviations = zip(*(process.at(whole) for process in objectives), strict=True)
            return np.column_stack(means), np.column_stack(deviations)

        # What is expected at the front's points, not what was measured there: the best of many measurements are lucky.
        front, _ = at_end(np.vstack((points[within], waiting)))

        def expect(at: Values) -> Values:
            gains = expected_gain(*at_end(at), front, reference)
            for process in limits:
                mean, deviation = process.at(at)
                gains = gains * norm.cdf(-mean / deviation)
            return gains

        return expect

    def _process(self, name: str, points: Values, values: Values, waiting: Values) -> GaussianProcess:
        """Of measured values, and of the expected ones of points that wait for theirs."""
        start = self._logs.get(name)
        is_fit = start is not None and len(start) == points.shape[1] + 1  # not before there were rungs
        fitted = GaussianProcess.fitted(points, values, start if is_fit else None)
        self._logs[name] = fitted.logs
        if len(waiting) == 0:
            return fitted
        expected, _ = fitted.at(waiting)
        return GaussianProcess(np.vstack((points, waiting)), np.append(values, expected), fitted.logs)

    def _rows(self, candidates: Sequence[Candidate]) -> Values:
        """(n, d) of the unit cube: a number's place in its range, an axis for each choice."""
        axes = sum(len(each.values) if isinstance(each, Choice) else 1 for each in self._parameters.values())
        rows = [self._row(self._space.values_of(each)) for each in candidates]
        return np.array(rows, dtype=np.float64).reshape(len(rows), axes)

    def _row(self, values: Mapping[str, Any]) -> list[float]:
        row: list[float] = []
        for name, parameter in self._parameters.items():
            if isinstance(parameter, Choice):
                row += [float(values[name] == each) for each in parameter.values]
            else:
                row.append(parameter.share(values[name]))
        return row

    def _drawn(self, parameter: Parameter) -> Any:
        if isinstance(parameter, Choice):
            return parameter.values[self._rng.integers(len(parameter.values))]
        return parameter.at(self._rng.random())

    def _mutated(self, candidate: Candidate) -> Candidate:
        """A neighbour: some of its parameters, two on average, moved a little."""
        values = self._space.values_of(candidate)
        chosen = self._rng.random(len(values)) < 2 / len(values)
        chosen[self._rng.integers(len(values))] = True
        scale = self._rng.choice(SCALES)
        for name, is_moved in zip(values, chosen, strict=True):
            parameter = self._parameters[name]
            if not is_moved:
                continue
            if isinstance(parameter, Choice):
                values[name] = self._drawn(parameter)
            else:
                place = parameter.share(values[name]) + scale * self._rng.standard_normal()
                values[name] = parameter.at(min(max(place, 0.0), 1.0))
        return self._candidate_of(values)
