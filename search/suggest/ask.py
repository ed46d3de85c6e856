"""The search itself, without whoever runs its trials: asks for the next candidate, is told what came of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.trial import Trial

from search.goal import Goal
from search.method import Method
from search.outcome import Candidate, Outcome, State
from search.space import Space
from search.suggest.learner import Learner
from search.suggest.samplers import SamplerSettings

MAX_REPEATS = 50
"""Number of suggestions in a row that were tried before, after which candidates are drawn uniformly; after as many
repeats among these the space counts as exhausted."""


@dataclass(frozen=True, kw_only=True)
class History:
    """Knowledge of a search before its first suggestion."""

    outcomes: Sequence[Outcome] = ()
    """Outcomes of an earlier run of the sweep; their candidates are not suggested again, unless stopped at a rung."""
    unfinished: Sequence[tuple[str, Candidate]] = ()
    """Ids and candidates of trials that an earlier run did not end; they come first, as they were."""
    prior_outcomes: Sequence[Outcome] = ()
    """Outcomes of other sweeps, which the sampler learns from; their candidates may be suggested."""
    first_candidates: Sequence[Candidate] = ()
    """Candidates that are suggested before the sampler's."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A trial that is to run."""

    id: str
    """Id of the trial: `t000`, `t001`, ... in the order of the suggestions."""
    candidate: Candidate
    """The candidate that is to be tried."""
    is_resumed: bool
    """True if an earlier run of the sweep began the trial, so that it goes on where it stopped."""
    has_rungs: bool
    """True if the trial passes rungs, where it may be stopped; a candidate that was stopped before passes none."""


class CandidateSearch:
    """Suggests candidates one by one, none twice, and learns from their outcomes in any order.

    search = CandidateSearch(space, SamplerSettings(sampler="gp", num_trials=40), History(), goal)
    while suggestion := search.ask():
        search.tell(suggestion.id, run(suggestion.candidate))
    search.close()

    While not all methods can run, `ask(methods)` suggests what can; `is_waiting` tells whether a None is the end.

    A candidate that was stopped at a rung may be suggested again by the sampler `gp`, which then asks for a run to the
    end: it alone knows of how much use that is.
    """

    def __init__(
        self,
        space: Space,
        settings: SamplerSettings,
        history: History,
        goal: Goal | None = None,
        nearest_allowed: Callable[[Candidate], Candidate] = lambda candidate: candidate,
    ) -> None:
        """
        Args:
            goal: objectives and limits; by default top-1 and speed-up without limits.
            nearest_allowed: candidate -> the one that is tried in its place, where not all can be.
        """
        self._space, self._nearest_allowed = space, nearest_allowed
        self._settings = settings
        self.learner = Learner(
            space, self._candidate_of, replace(settings, seed=settings.seed + len(history.outcomes)), goal
        )
        """The sampler, with what it was told."""
        self._running: dict[str, Trial | Candidate] = {}
        """Id of a trial -> the sampler's draw that it came of, or its candidate."""
        self._outcomes: dict[Candidate, Outcome | None] = {}
        """Every candidate that was suggested -> its last outcome; None while it runs, or if it left none."""
        self._unfinished = list(history.unfinished)
        self._first = list(history.first_candidates)
        self._grid = space.full_grid(settings.num_trials, settings.seed) if settings.chosen == "grid" else []
        self._is_waiting = False
        ids = [outcome.trial for outcome in history.outcomes] + [trial_id for trial_id, _ in history.unfinished]
        self._next_number = 1 + max((int(trial_id[1:]) for trial_id in ids), default=-1)
        self._learn(history)

    @property
    def is_waiting(self) -> bool:
        """True if the last `ask` gave None only because nothing was left of the methods that can run."""
        return self._is_waiting

    def ask(self, methods: Collection[Method] | None = None) -> Suggestion | None:
        """Returns the next trial to run, an unfinished one of an earlier run first; None if nothing new is left.

        Args:
            methods: methods that can run now, by default all; candidates of others stay where they are in the order.
        """
        if methods is not None and set(self._space.method) <= set(methods):
            methods = None  # the sampler is as free as ever
        self._is_waiting = False
        unfinished = (row for row, (_, one) in enumerate(self._unfinished) if _can_run(one, methods))
        row = next(unfinished, None)
        if row is not None:
            trial_id, candidate = self._unfinished.pop(row)
            draw: Trial | Candidate = candidate
        else:
            pair = self._next_new(methods)
            self._is_waiting = pair is None and self._has_others(methods)
            if pair is None:
                return None
            draw, candidate = pair
            trial_id = f"t{self._next_number:03d}"
            self._next_number += 1
        has_rungs = self._settings.has_rungs and not self._was_stopped(candidate)
        self._running[trial_id] = draw
        self._outcomes[candidate] = None
        return Suggestion(id=trial_id, candidate=candidate, is_resumed=row is not None, has_rungs=has_rungs)

    def add_first(self, candidates: Iterable[Candidate]) -> None:
        """Adds candidates that are suggested after the first ones that there are, and before the sampler's."""
        self._first += candidates

    def predicted_seconds(self, candidate: Candidate) -> float | None:
        """Predicts how long a trial of a candidate takes on this machine; None while nobody knows.

        It is the mean of the trials of the same method until `gp` has fitted its processes to some; from then on, as
        many take longer as take less.
        """
        return self.learner.predicted_seconds(candidate)

    def tell(self, trial_id: str, outcome: Outcome | None) -> None:
        """Takes what came of a suggested trial; None if it broke without an outcome."""
        self.learner.tell(self._running.pop(trial_id), outcome)
        if outcome is not None:
            self._outcomes[outcome.candidate] = outcome

    def close(self) -> None:
        """Ends the thread that makes suggestions ready; nothing may be asked for any more, but trials may be told."""
        self.learner.close()

    def _learn(self, history: History) -> None:
        """Tells the sampler what is known from before."""
        for outcome in history.prior_outcomes:
            self.learner.tell(outcome.candidate, outcome, is_elsewhere=True)
        for outcome in history.outcomes:
            if outcome.id == outcome.trial:  # the outcomes of a trial's earlier exits have the same candidate
                self.learner.tell(outcome.candidate, outcome)
                self._outcomes[outcome.candidate] = outcome
        self._outcomes |= {candidate: None for _, candidate in history.unfinished}

    def _next_new(self, methods: Collection[Method] | None) -> tuple[Trial | Candidate, Candidate] | None:
        """Returns a candidate that was not tried before, or was stopped, with the draw that it came of."""
        for queue in (self._first, self._grid):
            queue[:] = [one for one in map(self._nearest_allowed, queue) if one not in self._outcomes]
            row = next((row for row, one in enumerate(queue) if _can_run(one, methods)), None)
            if row is not None:
                candidate = queue.pop(row)
                return candidate, candidate
        if self._settings.chosen == "grid" or not any(
            methods is None or name in methods for name in self._space.method
        ):
            return None
        for _ in range(MAX_REPEATS):
            draw = self.learner.draw(methods)
            candidate = self._candidate_of(draw.params)
            if not _can_run(candidate, methods):  # it was made ready when others could, or is the nearest allowed
                self.learner.discard(draw)
                continue
            # Samplers other than gp do not know of how much use it is to try again a candidate that was stopped.
            if candidate not in self._outcomes or (self._settings.chosen == "gp" and self._was_stopped(candidate)):
                return draw, candidate
            self.learner.tell(draw, self._outcomes[candidate])
        for _ in range(MAX_REPEATS):  # the sampler is stuck
            candidate = self.learner.sample_uniform(methods)
            if candidate not in self._outcomes and _can_run(candidate, methods):
                return candidate, candidate
        return None

    def _has_others(self, methods: Collection[Method] | None) -> bool:
        """Tells whether there may be candidates of methods that cannot run now."""
        if methods is None:
            return False
        if self._unfinished or self._first or self._grid:
            return True
        return self._settings.chosen != "grid" and not set(self._space.method) <= set(methods)

    def _was_stopped(self, candidate: Candidate) -> bool:
        """Tells whether the candidate was stopped at a rung when it was tried last."""
        outcome = self._outcomes.get(candidate)
        return outcome is not None and outcome.state is State.STOPPED

    def _candidate_of(self, values: Mapping[str, Any]) -> Candidate:
        """Returns the candidate that is tried when these values are drawn."""
        return self._nearest_allowed(self._space.of_values(self._space.snap(values)))


def _can_run(candidate: Candidate, methods: Collection[Method] | None) -> bool:
    """Tells whether a candidate is of one of the methods; None stands for all."""
    return methods is None or candidate.method in methods
