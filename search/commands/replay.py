"""Replays a search on a recorded sweep in the place of the models: in seconds and on any machine.

Only the recorded candidates can be tried: a sampler's suggestion is moved to the nearest of them. Workers are
simulated: each is busy for as long as the recorded trial took, so trials end in the order in which they would, and
hypervolume can be plotted over trials and over time. Where every trial passed rungs and went on, a search that stops
some of them can be replayed, and also one without rungs: it saves the time of measuring there.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from search.config import Config
from search.errors import SweepError
from search.front import Front
from search.goal import Goal
from search.outcome import Candidate, Measurement, Outcome, State, num_trials
from search.parameter import Choice, Numbers
from search.records import ledger
from search.records.files import write_atomically
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.space import Space
from search.suggest.ask import CandidateSearch, History
from search.suggest.rungs import Promotion, Rungs
from search.suggest.samplers import SamplerSettings
from search.trial.warm_start import first_candidates


class Recorded:
    """The trials of a finished sweep, looked up by their candidates."""

    def __init__(self, outcomes: Sequence[Outcome], dense: Measurement, space: Space) -> None:
        """
        Args:
            outcomes: of the sweep, also those that were not measured.
            dense: measurement of the dense model, which the outcomes are compared with.
            space: space of the search that is replayed; distances are shares of its ranges, and candidates outside are
                left out.

        Raises:
            SweepError: no candidate lies within the space.
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
        self._is_choice = np.array([isinstance(parameter, Choice) for parameter in space.parameters().values()])
        self._rows = np.array([self._row(candidate) for candidate in self._candidates])

    @classmethod
    def read(cls, path: Path, config: Config) -> Recorded:
        """Reads the folder of a finished sweep, to be searched by the space of a recipe.

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
        """Returns the recorded candidate with the least squared distance; of equals the first.

        Another choice, or a parameter that has an effect in only one of the two, is as far as a whole range.
        """
        row = self._row(candidate)
        distances = np.where(self._is_choice, self._rows != row, np.abs(self._rows - row))
        distances[np.isnan(self._rows) != np.isnan(row)] = 1.0
        distances[np.isnan(self._rows) & np.isnan(row)] = 0.0
        return self._candidates[int((distances**2).sum(axis=1).argmin())]

    def lookup(self, candidate: Candidate, trial_id: str) -> list[Outcome]:
        """Returns the outcomes of a recorded candidate as those of a trial with another id; its own comes first.

        Raises:
            KeyError: the candidate was not recorded.
        """
        own, *at_exits = self._trials[candidate]
        renamed = [replace(outcome, id=f"{trial_id}.{outcome.id.split('.')[1]}") for outcome in at_exits]
        return [replace(own, id=trial_id), *renamed]

    def _row(self, candidate: Candidate) -> NDArray[np.float64]:
        """Returns a number for each parameter: a number's share of its range, the index of a choice, NaN for a
        parameter without effect."""
        values, row = candidate.to_params(), []
        for name, parameter in self.space.parameters().items():
            if name not in values:
                row.append(np.nan)
            elif isinstance(parameter, Numbers):
                row.append(parameter.share(float(values[name])))
            else:
                row.append(float(parameter.values.index(values[name])))
        return np.array(row)


@dataclass(frozen=True)
class _Running:
    """A trial on a simulated worker."""

    started_s: float
    """Simulated time at which it started."""
    outcomes: list[Outcome]
    """Recorded outcomes of its candidate, the trial's own first."""
    times_s: list[float]
    """Seconds from its start to each of its rungs, and to its end."""


def replay(
    recorded: Recorded, search: CandidateSearch, num_trials: int, num_workers: int, promotes: Promotion | None = None
) -> Iterator[list[Outcome]]:
    """Yields the outcomes of each trial of a search, in the order in which they end; `ended_s` is by simulated time.

    Args:
        promotes: tells at every recorded rung whether the trial goes on; without it there are no rungs. A trial that
            the recorded sweep stopped ends there anyway.
    """
    trials: list[_Running] = []
    events: list[tuple[float, int, int]] = []
    """A heap: simulated time at which a trial comes to a rung or its end, number of the trial, number of the rung."""
    now_s = 0.0
    while True:
        while len(trials) < num_trials and len(events) < num_workers:
            suggestion = search.ask()
            if suggestion is None:  # nothing new is left to try
                num_trials = len(trials)
                break
            own, *at_exits = recorded.lookup(suggestion.candidate, suggestion.id)
            if promotes is None or not suggestion.has_rungs:
                own = _without_rungs(own)
            trial = _Running(started_s=now_s, outcomes=[own, *at_exits], times_s=_times_of(own))
            heapq.heappush(events, (now_s + trial.times_s[0], len(trials), 0))
            trials.append(trial)
        if not events:
            return
        now_s, number, rung = heapq.heappop(events)
        trial, outcomes = trials[number], trials[number].outcomes
        if rung + 1 < len(trial.times_s):
            assert promotes is not None
            if promotes(rung, outcomes[0].rungs[rung]):
                heapq.heappush(events, (trial.started_s + trial.times_s[rung + 1], number, rung + 1))
                continue
            outcomes = [_stopped_at(outcomes[0], rung)]
        search.tell(outcomes[0].id, outcomes[0])
        yield [replace(outcome, ended_s=now_s, waited_s=0.0) for outcome in outcomes]


def _times_of(outcome: Outcome) -> list[float]:
    """Returns the seconds from a trial's start to each of its rungs, and to its end."""
    at_rungs = [end for _, end in outcome.rung_spans]
    return at_rungs if outcome.state is State.STOPPED and at_rungs else [*at_rungs, outcome.seconds]


def _without_rungs(outcome: Outcome) -> Outcome:
    """Returns the outcome of the same trial without rungs, which saves the time of measuring there."""
    measuring_s = sum(end - began for began, end in outcome.rung_spans)
    return replace(outcome, rungs=(), rung_spans=(), seconds=outcome.seconds - measuring_s)


def _stopped_at(outcome: Outcome, rung: int) -> Outcome:
    """Returns the outcome of the same trial if it is stopped at a rung."""
    return replace(
        outcome, state=State.STOPPED, reason=f"not good enough at rung {rung + 1}", plan=None, measurement=None,
        rungs=outcome.rungs[: rung + 1], rung_spans=outcome.rung_spans[: rung + 1], history=(), has_weights=False,
        seconds=outcome.rung_spans[rung][1],
    )  # fmt: skip


def replay_sweep(config: Config, runs: Path, recorded: Recorded, num_workers: int = 2) -> Front:
    """Searches a recorded sweep, and writes a sweep's config, ledger and front, but no models and no MLflow run.

    Raises:
        SweepError: the folder is there already, or the recipe wants rungs and none were recorded.
    """
    folder = Folder(runs, config.name)
    if folder.path.exists():
        raise SweepError(f"{folder.path} exists; take another --name")
    settings = config.search
    has_rungs = settings.reduction_factor > 1
    if has_rungs and not any(outcome.rung_spans for outcome in recorded.outcomes):
        raise SweepError("search.reduction_factor: the recorded trials passed no rungs, so none can be stopped there")
    goal = Goal.of(recorded.dense, settings.accuracy, settings.limits)
    search = CandidateSearch(
        recorded.space,
        SamplerSettings(sampler=settings.sampler, seed=settings.seed, num_trials=settings.trials, has_rungs=has_rungs),
        History(first_candidates=first_candidates(recorded.space)),
        goal,
        nearest_allowed=recorded.nearest,
    )
    promotes = Rungs(settings.reduction_factor).promotes if has_rungs else None
    all_outcomes: list[Outcome] = []
    with Ledger(folder.ledger) as book:
        write_atomically(folder.config, config.to_yaml())
        for outcomes in replay(recorded, search, settings.trials, num_workers, promotes):
            book.append(*outcomes)
            all_outcomes += outcomes
    search.close()
    front = Front.of(config.name, all_outcomes, goal, trials=num_trials(all_outcomes))
    folder.write_front(front)
    return front
