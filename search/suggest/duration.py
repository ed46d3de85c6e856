"""The seconds of a trial: what is known of them, and a Gaussian process that predicts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.outcome import Outcome, State
from search.suggest.gaussian_process import GaussianProcess, Values

OVERHEAD_S = 0.2
"""Seconds that a slot waits between two trials; without them a trial of 10 ms would seem a hundred times cheaper than
one of a second."""


@dataclass(frozen=True, kw_only=True)
class Duration:
    """The seconds that a trial took, with what they say of a trial that runs to its end on this machine."""

    seconds: float
    """Wall-clock seconds; 0 where they are unknown."""
    is_least: bool = False
    """The trial did less than all, so that to its end it takes at least these seconds: it failed, was stopped at a
    rung, or took over the fine-tune of another."""
    is_elsewhere: bool = False
    """The trial is of another sweep, maybe on another machine: its seconds only compare with each other."""

    @classmethod
    def of(cls, outcome: Outcome, *, is_elsewhere: bool = False) -> Duration:
        """Reads the seconds of a trial from its own outcome."""
        is_least = outcome.state is not State.MEASURED or outcome.same_as is not None
        return cls(seconds=outcome.seconds, is_least=is_least, is_elsewhere=is_elsewhere)


UNKNOWN = Duration(seconds=0.0)
"""The duration of a trial of which nothing is known."""


def fit_log_seconds(
    points: Values, durations: Sequence[Duration], start: Values | None = None
) -> GaussianProcess | None:
    """Fits a process to the logarithms of the seconds of trials.

    Trials of other sweeps are all taken to be from one machine, which is slower or faster than this one by one factor:
    the median over the trials here of what they took against what trials there would have. While there is none here,
    seconds are those of that machine, whose ratios are right.

    Seconds that are a lower bound count, as the bound, where more was predicted without them, and not at all where the
    prediction is above.

    Args:
        points: (n, d), of the trials in the unit cube.
        durations: one a point, whose seconds are above 0.
        start: (d + 1,), the `logs` of an earlier fit to start from.

    Returns:
        None if no trial ran to its end.
    """
    logs = np.log([duration.seconds + OVERHEAD_S for duration in durations])
    is_least = np.array([duration.is_least for duration in durations], dtype=bool)
    is_there = np.array([duration.is_elsewhere for duration in durations], dtype=bool)
    here, there = ~is_least & ~is_there, ~is_least & is_there
    if here.any() and there.any():
        predicted, _ = GaussianProcess.fitted(points[there], logs[there], start).at(points[here])
        logs = np.where(is_there, logs + np.median(logs[here] - predicted), logs)
    if not (here | there).any():
        return None
    fitted = GaussianProcess.fitted(points[~is_least], logs[~is_least], start)
    counts = ~is_least
    if is_least.any():
        counts[is_least] = logs[is_least] > fitted.at(points[is_least])[0]
    return fitted if counts.sum() == len(fitted.points) else GaussianProcess(points[counts], logs[counts], fitted.logs)


def seconds_at(log_seconds: GaussianProcess, points: Values) -> Values:
    """Predicts the seconds of trials at points, (m, d) -> (m,): as many take longer as take less."""
    mean, _ = log_seconds.at(points)
    return np.maximum(np.exp(mean) - OVERHEAD_S, 0.0)
