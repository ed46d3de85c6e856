"""Compares sweeps: hypervolume after so many trials, and after so many seconds.

Sweeps whose names differ in a number at the end (`gp-0`, `gp-1`) are averaged as seeds of one line (`gp`). All are
measured against the dense model of the first sweep, so that hypervolumes compare.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from search.errors import SweepError
from search.front import Front, running_hypervolume
from search.outcome import Measurement
from search.records import ledger
from search.records.folder import Folder

Array = NDArray[np.float64]

MILESTONES = (10, 20, 40, 80, 120, 200, 400, 800)
"""Numbers of trials at which hypervolumes are told."""

STEPS = 200
"""Number of steps of a curve over time."""


@dataclass(frozen=True, kw_only=True)
class SweepTrace:
    """The hypervolume of one sweep, trial by trial."""

    line: str
    """Name of the sweep without the number at its end."""
    hypervolumes: tuple[float, ...]
    """Hypervolume after each trial, in the order in which the trials ended."""
    seconds: tuple[float, ...]
    """Time at which each trial ended, in seconds since the sweep began."""

    def after(self, seconds: float) -> float:
        """Returns the hypervolume of the trials that had ended by then; 0 before the first."""
        ends = zip(self.hypervolumes, self.seconds, strict=True)
        return max((hypervolume for hypervolume, end in ends if end <= seconds), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The hypervolume of one line, as mean over its seeds."""

    line: str
    num_seeds: int
    x: tuple[float, ...]
    """Numbers of trials, or seconds."""
    mean: tuple[float, ...]
    low: tuple[float, ...]
    """Lower end of the 95 % interval of the mean, by the t distribution; for one seed the mean itself."""
    high: tuple[float, ...]
    """Upper end of the 95 % interval of the mean."""


def compare_sweeps(runs: Path, names: Sequence[str]) -> dict[str, Any]:
    """Returns the curves of several sweeps as plain values.

    Returns:
        `by_trial` and `by_second`: the curves, a dict each; `milestones`: numbers of trials to read them at.

    Raises:
        SweepError: there is no such sweep, it has no front yet, it was recorded before times were, or its accuracies
            are those of other val images than the first sweep's.
    """
    fronts = [Folder(runs, name).read_front() for name in names]
    _check_same_val(fronts)
    dense = fronts[0].goal.dense
    lines: dict[str, list[SweepTrace]] = {}
    for name in names:
        trace = read_trace(runs, name, dense)
        lines.setdefault(trace.line, []).append(trace)
    by_trial, by_second = [], []
    for line, traces in lines.items():
        count = min(len(trace.hypervolumes) for trace in traces)
        by_trial.append(_curve(line, range(1, count + 1), [trace.hypervolumes[:count] for trace in traces]))
        end = min(trace.seconds[-1] for trace in traces)
        grid = [end * step / STEPS for step in range(STEPS + 1)]
        by_second.append(_curve(line, grid, [[trace.after(x) for x in grid] for trace in traces]))
    most_trials = max(len(curve.x) for curve in by_trial)
    return {
        "by_trial": [asdict(curve) for curve in by_trial],
        "by_second": [asdict(curve) for curve in by_second],
        "milestones": [count for count in MILESTONES if count <= most_trials],
    }


def _check_same_val(fronts: Sequence[Front]) -> None:
    """Raises SweepError if the accuracies of sweeps do not compare.

    Images that were prepared otherwise have another hash though they may be the same, so they are not compared.
    """
    first = fronts[0].fingerprints or {}
    for front in fronts[1:]:
        other = front.fingerprints or {}
        same = {key: first.get(key) == other.get(key) for key in ("preprocessing", "val")}
        if "val" in first and "val" in other and same["preprocessing"] and not same["val"]:
            raise SweepError(f"sweeps {fronts[0].name!r} and {front.name!r} do not compare: their val images differ")


def read_trace(runs: Path, name: str, dense: Measurement | None = None) -> SweepTrace:
    """Reads the hypervolumes of a sweep from its ledger.

    Args:
        dense: model to measure the hypervolumes against; by default the sweep's own dense model.

    Raises:
        SweepError: there is no such sweep, it has no front yet, or it was recorded before times were.
    """
    folder = Folder(runs, name)
    goal, outcomes = folder.read_front().goal, ledger.read(folder.ledger)
    if dense is not None:
        goal = replace(goal, dense=dense)
    ends: dict[str, tuple[float, float]] = {}
    for outcome, hypervolume in zip(outcomes, running_hypervolume(outcomes, goal), strict=True):
        ends[outcome.trial] = (hypervolume, outcome.ended_s)  # the exits of a trial count together
    if any(ended_s <= 0 for _, ended_s in ends.values()):
        raise SweepError(f"sweep {name!r} was recorded before the times of its trials were; run it again")
    hypervolumes, seconds = zip(*ends.values(), strict=True)
    return SweepTrace(line=re.sub(r"-\d+$", "", name), hypervolumes=hypervolumes, seconds=seconds)


def _curve(line: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> Curve:
    """Averages the values of several seeds, (seeds, n)."""
    table = np.array(values, dtype=np.float64)
    mean, half_interval = table.mean(axis=0), _half_interval(table)
    return Curve(
        line=line, num_seeds=len(table), x=tuple(map(float, x)), mean=tuple(mean), low=tuple(mean - half_interval),
        high=tuple(mean + half_interval),
    )  # fmt: skip


def _half_interval(table: Array) -> Array:
    """Computes half the 95 % interval of the mean over the seeds, (seeds, n) -> (n,); 0 for one seed."""
    num_seeds, count = table.shape
    if num_seeds == 1:
        return np.zeros(count)
    quantile: float = t.ppf(0.975, num_seeds - 1)
    return quantile * table.std(axis=0, ddof=1) / np.sqrt(num_seeds)
