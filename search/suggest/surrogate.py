"""Suggests where to try next: Gaussian processes of the outcomes, and the gain of hypervolume a second they expect."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from search.method import Method
from search.outcome import Candidate
from search.parameter import Choice, Parameter
from search.pareto import non_dominated, selection_order
from search.space import Space
from search.suggest.duration import UNKNOWN, Duration, fit_log_seconds, seconds_at
from search.suggest.gaussian_process import GaussianProcess

Values = NDArray[np.float64]

NUM_UNIFORM, NUM_NEAR_BEST = 300, 300
"""Numbers of candidates whose gain is computed for a suggestion, before the best of them are mutated: drawn from all
of the space, and near the best observations."""

NUM_PARENTS, NUM_CHILDREN, NUM_GENERATIONS = 10, 10, 3
"""Numbers of candidates with the largest gains that are mutated, of mutations of each, and of repetitions."""

MAX_FITTED = 200
"""The most observations that processes are fitted to: half of them the best, the others the latest of the rest."""

DAMPING = 0.5
"""A trial counts as its predicted seconds and this share of a typical trial's: cheap ones are not preferred for the
noise of their seconds. On the recorded digits, hypervolume after 30, 50, 75, 100 s with it: 0.697, 1.072, 1.128, 1.157;
with the seconds alone 0.639, 0.986, 1.096, 1.130; with their root 0.758, 1.007, 1.071, 1.174 (means of 6 seeds, within
their intervals)."""

SCALES = (0.05, 0.1, 0.2, 0.4)
"""Standard deviations of a mutation, as shares of a parameter's range."""


def expected_gain(mean: Values, deviation: Values, front: Values, reference: Values) -> Values:
    """Computes the expected gain of hypervolume by each of some normally distributed points, in closed form.

    Above the reference, the strips between neighbouring points of the front add up; in each, both objectives gain
    independently (after Emmerich et al. 2011).

    Args:
        mean: (m, 2), of two objectives that are maximised.
        deviation: (m, 2)
        front: (n, 2); dominated points add nothing, n = 0 is fine.
        reference: (2,)

    Returns:
        (m,)
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
    """Computes by how much a normally distributed number exceeds a level, in expectation; it counts as 0 below."""
    away = (mean - level) / deviation
    excess: Values = deviation * (away * norm.cdf(away) + norm.pdf(away))
    return np.maximum(excess, 0.0)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A candidate that was tried, with what is known of it."""

    candidate: Candidate
    values: tuple[float, float] | None
    """Values of both objectives, maximised; None if the trial failed or was stopped."""
    excesses: Mapping[str, float]
    """Limit -> how far the trial is beyond it; 0 or less is within."""
    rungs: tuple[tuple[float, float], ...] = ()
    """Values of both objectives on the way, at the first rung and at later ones."""
    duration: Duration = UNKNOWN
    """Seconds that the trial took."""

    @property
    def is_stopped(self) -> bool:
        """True if the trial was stopped at a rung."""
        return self.values is None and len(self.rungs) > 0


def best_and_latest(observations: Sequence[Observation]) -> list[Observation]:
    """Returns at most `MAX_FITTED` observations in their order: the best of those with values, and the latest."""
    rows = [row for row, each in enumerate(observations) if each.values is not None]
    order = selection_order(np.array([observations[row].values for row in rows]))
    best = [rows[place] for place in order[: MAX_FITTED // 2]]
    others = [row for row in range(len(observations)) if row not in set(best)]
    return [observations[row] for row in sorted(best + others[len(best) - MAX_FITTED :])]


@dataclass(frozen=True, kw_only=True)
class _Expectation:
    """The expected gain of hypervolume a second at points of the unit cube."""

    objectives: tuple[GaussianProcess, GaussianProcess]
    """Processes of accuracy and speed-up; where trials pass rungs, how far one has come is their last axis."""
    limits: Sequence[GaussianProcess]
    """Processes of values that are at most 0 where a trial is within a limit, or succeeds."""
    has_progress: bool
    """True if the objectives have the axis of progress."""
    front: Values
    """(n, 2): values of both objectives that are gained already; dominated ones add nothing."""
    reference: Values
    """(2,): the point at which the hypervolume starts."""
    log_seconds: GaussianProcess | None
    """The process of the logarithm of a trial's seconds; None where none is known, and a trial counts as a second."""
    typical_seconds: float
    """Median of the seconds of the trials so far."""

    def at(self, points: Values) -> Values:
        """Computes the expected gain, times the chance that a trial is within the limits, over the seconds that it
        takes: (m, d) -> (m,)."""
        gains = expected_gain(*_final_values(self.objectives, points, self.has_progress), self.front, self.reference)
        for process in self.limits:
            mean, deviation = process.at(points)
            gains = gains * norm.cdf(-mean / deviation)
        if self.log_seconds is None:
            return gains
        seconds = np.exp(self.log_seconds.at(points)[0])
        return gains / (seconds + DAMPING * self.typical_seconds)


def _final_values(objectives: Sequence[GaussianProcess], points: Values, has_progress: bool) -> tuple[Values, Values]:
    """Computes means and deviations of the objectives at the end of a trial: (m, d) -> (m, 2) each."""
    at_end = _with_progress(points, [1.0] * len(points)) if has_progress else points
    means, deviations = zip(*(process.at(at_end) for process in objectives), strict=True)
    return np.column_stack(means), np.column_stack(deviations)


def _with_progress(points: Values, progress: Sequence[float]) -> Values:
    """Adds the axis of progress, 0 at the first rung and 1 at the end of a trial: (m, d) -> (m, d + 1)."""
    return np.column_stack((points, progress))


class Surrogate:
    """Suggests candidates, by a process of each objective, of each limit, and of whether a trial succeeds at all.

    Where trials pass rungs, the objectives have one axis more: how far a trial has come. Values that were seen early
    are not taken for final, but tell as much of the end as they do for trials that went on (after Kandasamy et al.
    2017, "BOCA"). So a candidate that was stopped by bad luck is recognised, and suggested once more.

    A further process is of the seconds of a trial: what counts is the gain a second (Snoek et al. 2012). Where all
    trials take as long, or nobody knows how long, that is the gain.
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
            reference: point at which the hypervolume starts, by default the worst values that were measured. First
                values (accuracies) below it are clamped to it.
        """
        self._space, self._candidate_of, self._reference = space, candidate_of, reference
        self._parameters = space.parameters()
        self._rng = np.random.default_rng(seed)
        self._logs: dict[str, Values] = {}
        """Name of a process -> the `logs` of its last fit."""
        self._timed: tuple[GaussianProcess, frozenset[Method]] | None = None
        """The process of seconds of the last suggestion, and the methods of which seconds were known then; None where
        none of a trial on this machine were."""

    def sample_uniform(self, methods: Collection[Method] | None = None) -> Candidate:
        """Draws a candidate from all of the space, each as likely.

        Args:
            methods: methods of the space that it may be of; by default all.
        """
        parameters = dict(self._parameters)
        if methods is not None and "method" in parameters:
            parameters["method"] = Choice(values=tuple(name for name in self._space.method if name in methods))
        return self._candidate_of({name: self._sample(each) for name, each in parameters.items()})

    def predicted_seconds(self, candidate: Candidate) -> float | None:
        """Predicts the seconds of a trial; None if none of its method were known at the last suggestion."""
        timed = self._timed  # read once: another thread may make a suggestion
        if timed is None or candidate.method not in timed[1]:
            return None
        return float(seconds_at(timed[0], self._points([candidate]))[0])

    def suggest(
        self, observations: Sequence[Observation], running: Sequence[Candidate],
        methods: Collection[Method] | None = None,
    ) -> Candidate | None:  # fmt: skip
        """Returns the candidate with the largest expected gain a second that is new or was stopped, and does not run.

        Running ones count as if they gave the values that are expected of them (Ginsbourger et al. 2010, "kriging
        believer").

        Args:
            observations: at least one with values.
            methods: methods of the space that the candidate may be of; by default all.

        Returns:
            None if every candidate that was looked at is known already.
        """

        def is_allowed(candidate: Candidate) -> bool:
            return methods is None or candidate.method in methods

        excluded = {each.candidate for each in observations if not each.is_stopped} | set(running)
        fitted = best_and_latest(observations)
        measured = [each for each in fitted if each.values is not None]
        expectation = self._expectation(fitted, running)
        gains: dict[Candidate, float] = {}

        def look_at(candidates: Iterable[Candidate]) -> None:
            known = excluded | gains.keys()
            new = [each for each in dict.fromkeys(candidates) if each not in known and is_allowed(each)]
            if new:
                gains.update(zip(new, expectation.at(self._points(new)).tolist(), strict=True))

        best = [measured[row].candidate for row in non_dominated(np.array([each.values for each in measured]))]
        look_at(each.candidate for each in observations if each.is_stopped)
        best = [candidate for candidate in best if is_allowed(candidate)]
        look_at(self.sample_uniform(methods) for _ in range(NUM_UNIFORM))
        look_at(self._mutated(best[index % len(best)]) for index in range(NUM_NEAR_BEST if best else 0))
        for _ in range(NUM_GENERATIONS):
            parents = sorted(gains, key=lambda each: -gains[each])[:NUM_PARENTS]
            look_at(self._mutated(parent) for parent in parents for _ in range(NUM_CHILDREN))
        return max(gains, key=lambda each: gains[each], default=None)

    def _expectation(self, observations: Sequence[Observation], running: Sequence[Candidate]) -> _Expectation:
        """Fits all processes to the observations."""
        measured = [each for each in observations if each.values is not None]
        values = np.array([each.values for each in measured] + [one for each in observations for one in each.rungs])
        reference = values.min(axis=0) if self._reference is None else np.array(self._reference)
        has_progress = any(each.rungs for each in observations)
        waiting = self._points(running)
        objectives = self._objectives(observations, waiting, reference)
        limits = self._limits(observations, waiting)
        # The front is of expected values, not of measured ones: the best of many measurements were lucky.
        is_within = np.array([all(excess <= 0 for excess in each.excesses.values()) for each in measured])
        points = self._points([each.candidate for each in measured])
        front, _ = _final_values(objectives, np.vstack((points[is_within], waiting)), has_progress)
        return _Expectation(
            objectives=objectives, limits=limits, has_progress=has_progress, front=front, reference=reference,
            log_seconds=self._log_seconds(observations),
            typical_seconds=float(np.median([each.duration.seconds for each in observations])),
        )  # fmt: skip

    def _log_seconds(self, observations: Sequence[Observation]) -> GaussianProcess | None:
        """Fits the logarithm of a trial's seconds, if any are known, and keeps the fit for `predicted_seconds`."""
        known = [each for each in observations if each.duration.seconds > 0]
        points = self._points([each.candidate for each in known])
        fitted = fit_log_seconds(points, [each.duration for each in known], self._logs.get("seconds"))
        if fitted is not None:
            self._logs["seconds"] = fitted.logs
            whole = [each for each in known if not each.duration.is_least]
            if any(not each.duration.is_elsewhere for each in whole):
                self._timed = fitted, frozenset(each.candidate.method for each in whole)
        return fitted

    def _objectives(
        self, observations: Sequence[Observation], waiting: Values, reference: Values
    ) -> tuple[GaussianProcess, GaussianProcess]:
        """Fits accuracy and speed-up to final values and to those at rungs; accuracies are clamped to the reference.

        Args:
            waiting: (n, d), points of the running candidates.
        """
        num_rungs = max(len(each.rungs) for each in observations)
        rows = [(each.candidate, 1.0, each.values) for each in observations if each.values is not None]
        for observation in observations:
            at_rungs = enumerate(observation.rungs)
            rows += [(observation.candidate, rung / num_rungs, values) for rung, values in at_rungs]
        candidates, progress, pairs = zip(*rows, strict=True)
        points = self._points(candidates)
        if num_rungs:
            points, waiting = _with_progress(points, progress), _with_progress(waiting, [1.0] * len(waiting))
        accuracies, speedups = np.array(pairs).T
        return (
            self._process("accuracy", points, np.maximum(accuracies, reference[0]), waiting),
            self._process("speed-up", points, speedups, waiting),
        )

    def _limits(self, observations: Sequence[Observation], waiting: Values) -> list[GaussianProcess]:
        """Fits the excess over each limit; and, if any trial failed, 1 where one did and -1 where one was measured."""
        measured = [each for each in observations if each.values is not None]
        points = self._points([each.candidate for each in measured])
        limits = [
            self._process(name, points, np.array([each.excesses[name] for each in measured]), waiting)
            for name in measured[0].excesses
        ]
        ended = [each for each in observations if not each.is_stopped]
        if len(measured) < len(ended):
            failures = np.array([1.0 if each.values is None else -1.0 for each in ended])
            points = self._points([each.candidate for each in ended])
            limits.append(self._process("failed", points, failures, waiting))
        return limits

    def _process(self, name: str, points: Values, values: Values, waiting: Values) -> GaussianProcess:
        """Fits a process to measured values, then adds the expected values of points that wait for theirs.

        Args:
            name: of the process; its fit starts from the last one of that name.
            points: (n, d)
            values: (n,)
            waiting: (m, d)
        """
        start = self._logs.get(name)
        has_same_axes = start is not None and len(start) == points.shape[1] + 1  # the first rung adds one
        fitted = GaussianProcess.fitted(points, values, start if has_same_axes else None)
        self._logs[name] = fitted.logs
        if len(waiting) == 0:
            return fitted
        expected, _ = fitted.at(waiting)
        return GaussianProcess(np.vstack((points, waiting)), np.append(values, expected), fitted.logs)

    def _points(self, candidates: Sequence[Candidate]) -> Values:
        """Places candidates in the unit cube, (n, d): a number by its share of its range, a choice with an axis for
        each of its values."""
        axes = sum(len(each.values) if isinstance(each, Choice) else 1 for each in self._parameters.values())
        points = [self._point(self._space.values_of(candidate)) for candidate in candidates]
        return np.array(points, dtype=np.float64).reshape(len(points), axes)

    def _point(self, values: Mapping[str, Any]) -> list[float]:
        point: list[float] = []
        for name, parameter in self._parameters.items():
            if isinstance(parameter, Choice):
                point += [float(values[name] == value) for value in parameter.values]
            else:
                point.append(parameter.share(values[name]))
        return point

    def _sample(self, parameter: Parameter) -> Any:
        if isinstance(parameter, Choice):
            return parameter.values[self._rng.integers(len(parameter.values))]
        return parameter.at(self._rng.random())

    def _mutated(self, candidate: Candidate) -> Candidate:
        """Draws a neighbour: some of its parameters, two on average, are moved a little."""
        values = self._space.values_of(candidate)
        is_moved = self._rng.random(len(values)) < 2 / len(values)
        is_moved[self._rng.integers(len(values))] = True
        scale = self._rng.choice(SCALES)
        for name, moves in zip(values, is_moved, strict=True):
            parameter = self._parameters[name]
            if not moves:
                continue
            if isinstance(parameter, Choice):
                values[name] = self._sample(parameter)
            else:
                share = parameter.share(values[name]) + scale * self._rng.standard_normal()
                values[name] = parameter.at(min(max(share, 0.0), 1.0))
        return self._candidate_of(values)
