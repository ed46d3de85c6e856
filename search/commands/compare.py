"""Several sweeps against each other: hypervolume after so many trials, and after so many seconds.

Sweeps whose names differ in a number at the end (`gp-0`, `gp-1`) are one line, over its seeds. All are held against the
dense model of the first sweep, so that hypervolumes compare.
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
from search.front import running_hypervolume
from search.outcome import Measurement
from search.records import ledger
from search.records.folder import Folder

Array = NDArray[np.float64]

MILESTONES = (10, 20, 40, 80, 120, 200, 400, 800)
"""Trials."""

STEPS = 200
"""Of a curve over time."""


@dataclass(frozen=True, kw_only=True)
class SweepTrace:
    """One sweep, trial by trial."""

    line: str
    """Its name without the number at the end."""
    hypervolumes: tuple[float, ...]
    """After each trial, in the order in which they ended."""
    seconds: tuple[float, ...]
    """At which each ended, from the start of the first."""

    def after(self, seconds: float) -> float:
        """The hypervolume that there was by then."""
        return max((v for v, end in zip(self.hypervolumes, self.seconds, strict=True) if end <= seconds), default=0.0)


def read_trace(runs: Path, name: str, dense: Measurement | None = None) -> SweepTrace:
    """What a sweep found, against a dense model; by default its own.

    Raises:
        SweepError: there is no such sweep, it has no front yet, or it was recorded before times were.
    """
    folder = Folder(runs, name)
    goal, outcomes = folder.read_front().goal, ledger.read(folder.ledger)
    if dense is not None:
        goal = replace(goal, dense=dense)
    ends: dict[str, tuple[float, float]] = {}
    for outcome, volume in zip(outcomes, running_hypervolume(outcomes, goal), strict=True):
        ends[outcome.trial] = (volume, outcome.ended_s)
    if any(end <= 0 for _, end in ends.values()):
        raise SweepError(f"sweep {name!r} was recorded before the times of its trials were; run it again")
    volumes, seconds = zip(*ends.values(), strict=True)
    return SweepTrace(line=re.sub(r"-\d+$", "", name), hypervolumes=volumes, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Hypervolume of one line, over its seeds."""

    line: str
    num_seeds: int
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    """Ends of the 95 % interval of the mean, by the t distribution; of one seed the mean itself."""
    high: tuple[float, ...]


def compare_sweeps(runs: Path, names: Sequence[str]) -> dict[str, Any]:
    """The curves of several sweeps: `by_trial` and `by_second`, and at which trials to read them.

    Raises:
        SweepError: as `read_trace`.
    """
    dense = Folder(runs, names[0]).read_front().goal.dense
    courses = [read_trace(runs, name, dense) for name in names]
    lines: dict[str, list[SweepTrace]] = {}
    for trace in courses:
        lines.setdefault(trace.line, []).append(trace)
    by_trial, by_second = [], []
    for line, some in lines.items():
        count = min(len(trace.hypervolumes) for trace in some)
        by_trial.append(_curve(line, range(1, count + 1), [trace.hypervolumes[:count] for trace in some]))
        end = min(trace.seconds[-1] for trace in some)
        grid = [end * step / STEPS for step in range(STEPS + 1)]
        by_second.append(_curve(line, grid, [[trace.after(x) for x in grid] for trace in some]))
    most = max(len(curve.x) for curve in by_trial)
    return {
        "by_trial": [asdict(curve) for curve in by_trial],
        "by_second": [asdict(curve) for curve in by_second],
        "milestones": [count for count in MILESTONES if count <= most],
    }


def _curve(line: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> Curve:
    table = np.array(values, dtype=np.float64)
    spread = _half_interval(table)
    mean = table.mean(axis=0)
    return Curve(
        line=line, num_seeds=len(table), x=tuple(map(float, x)), mean=tuple(mean), low=tuple(mean - spread),
        high=tuple(mean + spread),
    )  # fmt: skip


def _half_interval(table: Array) -> Array:
    """(seeds, n) -> (n,)"""
    seeds, count = table.shape
    if seeds == 1:
        return np.zeros(count)
    quantile: float = t.ppf(0.975, seeds - 1)
    return quantile * table.std(axis=0, ddof=1) / np.sqrt(seeds)
