"""The search itself, without whoever runs its trials: asks for the next candidate, is told what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.trial import Trial

from search.goal import Goal
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
        if settings.chosen == "grid":
            self._first += space.full_grid(settings.num_trials, settings.seed)
        ids = [outcome.trial for outcome in history.outcomes] + [trial_id for trial_id, _ in history.unfinished]
        self._next_number = 1 + max((int(trial_id[1:]) for trial_id in ids), default=-1)
        self._learn(history)

    def ask(self) -> Suggestion | None:
        """Returns the next trial to run, an unfinished one of an earlier run first; None if nothing new is left."""
        is_resumed = bool(self._unfinished)
        if is_resumed:
            trial_id, candidate = self._unfinished.pop(0)
            draw: Trial | Candidate = candidate
        else:
            pair = self._next_new()
            if pair is None:
                return None
            draw, candidate = pair
            trial_id = f"t{self._next_number:03d}"
            self._next_number += 1
        has_rungs = self._settings.has_rungs and not self._was_stopped(candidate)
        self._running[trial_id] = draw
        self._outcomes[candidate] = None
        return Suggestion(id=trial_id, candidate=candidate, is_resumed=is_resumed, has_rungs=has_rungs)

    def add_first(self, candidates: Sequence[Candidate]) -> None:
        """Adds candidates to those that are suggested before the sampler's."""
        self._first += candidates

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
            self.learner.tell(outcome.candidate, outcome)
        for outcome in history.outcomes:
            if outcome.id == outcome.trial:  # the outcomes of a trial's earlier exits have the same candidate
                self.learner.tell(outcome.candidate, outcome)
                self._outcomes[outcome.candidate] = outcome
        self._outcomes |= {candidate: None for _, candidate in history.unfinished}

    def _next_new(self) -> tuple[Trial | Candidate, Candidate] | None:
        """Returns a candidate that was not tried before, or was stopped, with the draw that it came of."""
        while self._first:
            candidate = self._nearest_allowed(self._first.pop(0))
            if candidate not in self._outcomes:
                return candidate, candidate
        if self._settings.chosen == "grid":
            return None
        for _ in range(MAX_REPEATS):
            draw = self.learner.draw()
            candidate = self._candidate_of(draw.params)
            # Samplers other than gp do not know of how much use it is to try again a candidate that was stopped.
            if candidate not in self._outcomes or (self._settings.chosen == "gp" and self._was_stopped(candidate)):
                return draw, candidate
            self.learner.tell(draw, self._outcomes[candidate])
        for _ in range(MAX_REPEATS):  # the sampler is stuck
            candidate = self.learner.sample_uniform()
            if candidate not in self._outcomes:
                return candidate, candidate
        return None

    def _was_stopped(self, candidate: Candidate) -> bool:
        """Tells whether the candidate was stopped at a rung when it was tried last."""
        outcome = self._outcomes.get(candidate)
        return outcome is not None and outcome.state is State.STOPPED

    def _candidate_of(self, values: Mapping[str, Any]) -> Candidate:
        """Returns the candidate that is tried when these values are drawn."""
        return self._nearest_allowed(self._space.of_values(self._space.snap(values)))
