"""A recorded sweep in the place of the models: what a search would have found, in seconds and on any machine.

The recorded candidates alone can be tried: what a sampler suggests is moved to the nearest of them. Workers are
simulated: each is busy for as long as the recorded trial took, so trials end in the order in which they would, and
hypervolume can be told against trials and against time. Where every trial passed rungs and went on, a search that stops
some of them can be replayed, and one that has no rungs as well: it saves the time of measuring there.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from search.cluster.scheduler import NonDominatedHalving
from search.cluster.searcher import StudySearcher
from search.config import Config
from search.errors import SweepError
from search.front import Front
from search.goal import Goal
from search.outcome import Candidate, Measurement, Outcome, State, num_trials
from search.records import ledger
from search.records.files import write_atomically
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.space import Choice, Numbers, Space


class Recorded:
    """The trials of a finished sweep, found by their candidates."""

    def __init__(self, outcomes: Sequence[Outcome], dense: Measurement, space: Space) -> None:
        """
        Args:
            outcomes: of the sweep; those that were not measured are as much an answer as the others.
            dense: what they are compared with.
            space: that is searched now; distances are shares of its ranges, and candidates outside are left out.

        Raises:
            SweepError: there are none within.
        """
        self.dense, self.space = dense, space
        self.outcomes = tuple(outcome for outcome in outcomes if space.holds(outcome.candidate))
        if not self.outcomes:
            raise SweepError("nothing was recorded within the recipe's search space")
        by_trial: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            by_trial.setdefault(outcome.trial, []).append(outcome)
        trials = sorted(by_trial.values(), key=lambda trial: trial[0].state is State.STOPPED)  # a later try counts
        self._trials = {trial[0].candidate: trial for trial in reversed(trials)}
        self._candidates = list(reversed(self._trials))
        self._is_choice = np.array([isinstance(each, Choice) for each in space.parameters().values()])
        self._rows = np.array([self._row(each) for each in self._candidates])

    @classmethod
    def read(cls, path: Path, config: Config) -> Recorded:
        """A finished sweep's folder, to be searched by the space of a recipe.

        Raises:
            SweepError: there is no such sweep, or it has no front.
            ConfigError: the space does not fit its model.
        """
        folder = Folder(path.parent, path.name)
        dense = folder.read_front().goal.dense
        outcomes = ledger.read(folder.ledger)
        if not outcomes:
            raise SweepError(f"nothing was recorded in {folder.path}")
        depth = len(outcomes[0].candidate.drop_budget)
        exits = sorted({outcome.candidate.exit_block for outcome in outcomes} | {depth})
        is_windowed = all(outcome.candidate.token_reduction == "none" for outcome in outcomes)
        return cls(outcomes, dense, Space(config.space, depth, exits, has_windows=is_windowed))

    def nearest(self, candidate: Candidate) -> Candidate:
        """The recorded candidate with the least squared distance; of equals the first.

        Another choice, or a parameter that has an effect in one alone, is as far as a whole range.
        """
        row = self._row(candidate)
        apart = np.where(self._is_choice, self._rows != row, np.abs(self._rows - row))
        apart[np.isnan(self._rows) != np.isnan(row)] = 1.0
        apart[np.isnan(self._rows) & np.isnan(row)] = 0.0
        return self._candidates[int((apart**2).sum(axis=1).argmin())]

    def answer(self, candidate: Candidate, trial_id: str) -> list[Outcome]:
        """What came of a recorded candidate.

        Raises:
            KeyError: it was not recorded.
        """
        first, *earlier = self._trials[candidate]
        return [replace(first, id=trial_id), *(replace(e, id=f"{trial_id}.{e.id.split('.')[1]}") for e in earlier)]

    def _row(self, candidate: Candidate) -> NDArray[np.float64]:
        """A number's place in its range, the number of a choice; NaN for what has no effect."""
        values, row = candidate.to_params(), []
        for name, parameter in self.space.parameters().items():
            if name not in values:
                row.append(np.nan)
            elif isinstance(parameter, Numbers):
                row.append(parameter.share(float(values[name])))
            else:
                row.append(float(parameter.values.index(values[name])))
        return np.array(row)


def replay(
    recorded: Recorded, searcher: StudySearcher, num_trials: int, num_workers: int,
    scheduler: NonDominatedHalving | None = None,
) -> Iterator[list[Outcome]]:  # fmt: skip
    """What the trials of a search give, in the order in which they end; `ended_s` is by the simulated clock.

    Args:
        scheduler: says at every recorded rung who goes on; without one there are no rungs. What the recorded sweep
            stopped ends there anyway.
    """
    running: list[tuple[float, int, int]] = []
    """When something comes of a trial, its number, and at which rung; there is one more at the end."""
    trials: dict[int, tuple[float, list[Outcome]]] = {}
    """By number, when it started and what comes of it."""
    now, num_started = 0.0, 0
    while True:
        while num_started < num_trials and len(running) < num_workers:
            asked = searcher.suggest(str(num_started))
            if not isinstance(asked, dict):  # nothing new is left to try
                num_trials = num_started
                break
            first, *earlier = recorded.answer(Candidate.from_json(asked["candidate"]), asked["id"])
            if scheduler is None or not asked["has_rungs"]:
                first = _without_rungs(first)
            trials[num_started] = now, [first, *earlier]
            heapq.heappush(running, (now + _times(first)[0], num_started, 0))
            num_started += 1
        if not running:
            return
        now, number, rung = heapq.heappop(running)
        start, outcomes = trials[number]
        first, times = outcomes[0], _times(outcomes[0])
        if rung + 1 < len(times):
            assert scheduler is not None
            if scheduler.promotes(rung, first.rungs[rung]):
                heapq.heappush(running, (start + times[rung + 1], number, rung + 1))
                continue
            outcomes = [_stopped_at(first, rung)]
        searcher.on_trial_complete(str(number), {"outcomes": json.dumps([each.to_json() for each in outcomes])})
        yield [replace(each, ended_s=now, waited_s=0.0) for each in outcomes]


def _times(outcome: Outcome) -> list[float]:
    """When it was at each of its rungs and at its end, in seconds since it began."""
    at_rungs = [end for _, end in outcome.rung_spans]
    return at_rungs if outcome.state is State.STOPPED and at_rungs else [*at_rungs, outcome.seconds]


def _without_rungs(outcome: Outcome) -> Outcome:
    measuring = sum(end - began for began, end in outcome.rung_spans)
    return replace(outcome, rungs=(), rung_spans=(), seconds=outcome.seconds - measuring)


def _stopped_at(outcome: Outcome, rung: int) -> Outcome:
    return replace(
        outcome, state=State.STOPPED, reason=f"not good enough at rung {rung + 1}", plan=None, measurement=None,
        rungs=outcome.rungs[: rung + 1], rung_spans=outcome.rung_spans[: rung + 1], history=(), has_weights=False,
        seconds=outcome.rung_spans[rung][1],
    )  # fmt: skip


def replay_sweep(config: Config, runs: Path, recorded: Recorded, num_workers: int = 2) -> Front:
    """Searches a recorded sweep, and leaves what a sweep leaves, but for models and MLflow: ledger and front.

    Raises:
        SweepError: the folder is there already, or the recipe wants rungs and none were recorded.
    """
    folder = Folder(runs, config.name)
    if folder.path.exists():
        raise SweepError(f"{folder.path} exists; take another --name")
    factor = config.search.reduction_factor
    if factor > 1 and not any(outcome.rung_spans for outcome in recorded.outcomes):
        raise SweepError("search.reduction_factor: the recorded trials passed no rungs, so none can be stopped there")
    goal = Goal.of(recorded.dense, config.search.accuracy, config.search.limits)
    searcher = StudySearcher(
        recorded.space, known=(), sampler=config.search.sampler, seed=config.search.seed,
        num_trials=config.search.trials, has_rungs=factor > 1, goal=goal,
        nearest_allowed=recorded.nearest,
    )  # fmt: skip
    with Ledger(folder.ledger) as book:
        write_atomically(folder.config, config.to_yaml())
        found: list[Outcome] = []
        scheduler = NonDominatedHalving(factor) if factor > 1 else None
        for outcomes in replay(recorded, searcher, config.search.trials, num_workers, scheduler):
            book.append(*outcomes)
            found += outcomes
    searcher.finish()
    front = Front.of(config.name, found, goal, trials=num_trials(found))
    folder.write_front(front)
    return front
