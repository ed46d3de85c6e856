"""Ray's `Searcher` over an Optuna study that is ours.

The study lives in memory and is rebuilt from the ledger when a sweep goes on: the ledger is the only truth.
Ray's own OptunaSearch leaves failed and NaN trials running for ever.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from optuna.trial import Trial, TrialState, create_trial
from ray.tune.search import Searcher

from search.goal import Goal
from search.outcome import Candidate, Outcome, State
from search.space import Space
from search.suggest.samplers import MOST_GP_TRIALS, RUNGS, Sampler, create_study, distributions_of
from search.suggest.surrogate import Surrogate

LIMIT_KEEPERS = ("tpe", "nsga2")
"""Samplers that learn from a trial that is beyond a limit, but not from its values."""

STOPPED = "stopped at a rung"
"""The limit that a stopped trial is beyond."""

MOST_REPEATS = 50
"""After so many suggestions in a row that were tried before, candidates are drawn at random; after as many of these the
space is exhausted."""


class StudySearcher(Searcher):
    """Asks the study for a candidate when Ray has room for a trial, and tells it what came of it."""

    def __init__(
        self, space: Space, *, known: Sequence[Outcome], sampler: Sampler, seed: int, num_trials: int = 0,
        first: Sequence[Candidate] | None = None, learned: Sequence[Outcome] = (), has_rungs: bool = False,
        ahead: int = 0, unfinished: Sequence[tuple[str, Candidate]] = (), goal: Goal | None = None,
        deadline: float | None = None,
        nearest_allowed: Callable[[Candidate], Candidate] = lambda candidate: candidate,
        on_suggest: Callable[[str, Candidate], None] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            known: outcomes of an earlier run of the sweep; their candidates are not suggested again.
            num_trials: how many the sweep has in all, for the choice of the sampler and the fineness of a grid.
            first: candidates to begin with; by default the space's own.
            learned: outcomes of other sweeps, which the sampler learns from.
            has_rungs: trials may be stopped.
            ahead: so many suggestions are made ready, in a thread, while trials run.
            unfinished: ids and candidates of trials that an earlier run did not end; they come first, as they were.
            goal: objectives and limits; by default top-1 and speed-up without limits.
            deadline: on the monotonic clock; no trial is suggested later.
            nearest_allowed: gives what is tried in the place of a candidate, where not all can be.
            on_suggest: called with the id and candidate of every trial that is about to start.
        """
        super().__init__()
        self._space, self._nearest_allowed = space, nearest_allowed
        self._goal, self._objectives = goal, goal.objectives if goal else ("top1", "speedup")
        self._distributions = distributions_of(space)
        if sampler == "auto":
            sampler = "gp" if num_trials <= MOST_GP_TRIALS else "tpe"
        self._has_rungs, self._sampler = has_rungs, sampler
        self._surrogate = Surrogate(
            space, self._candidate_of, None if goal is None else goal.reference, seed + len(known)
        )
        self._study = create_study(sampler, seed + len(known), space, self._surrogate)
        self._asked: dict[str, Trial | Candidate] = {}
        self._answers: dict[Candidate, Outcome | None] = {}
        """What came of each candidate; None while it runs."""
        self._unfinished = list(unfinished)
        taken = [outcome.trial for outcome in known] + [trial_id for trial_id, _ in unfinished]
        self._next_number = 1 + max((int(trial_id[1:]) for trial_id in taken), default=-1)
        self._ahead, self._ready = ahead, deque[Future[Trial]]()
        self._sampling = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")
        self._deadline = deadline
        self._on_suggest = on_suggest
        for outcome in learned:
            self._tell(outcome.candidate, outcome)
        for outcome in known:
            if outcome.id == outcome.trial:  # what a trial found at earlier exits has the same candidate
                self._tell(outcome.candidate, outcome)
                self._answers[outcome.candidate] = outcome
        self._answers |= {candidate: None for _, candidate in unfinished}
        self._given = list(space.first_candidates() if first is None else first)
        if sampler == "grid":
            self._given += space.full_grid(num_trials, seed)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Ray's FINISHED is a str
        """Ray's config of the next trial: its id, its candidate, whether it goes on where an earlier run stopped, and
        whether it passes rungs; `FINISHED` once the time is up, or nothing new is found.

        What was stopped at a rung before passes none: it runs to its end.
        """
        is_resumed = bool(self._unfinished)
        found: tuple[Trial | Candidate, Candidate] | None
        if self._deadline is not None and time.monotonic() >= self._deadline:
            found = None
        elif is_resumed:
            name, candidate = self._unfinished.pop(0)
            found = candidate, candidate
        else:
            name, found = f"t{self._next_number:03d}", self._next()
            self._next_number += 1
        if found is None:
            finished: str = Searcher.FINISHED
            return finished
        self._asked[trial_id], candidate = found
        has_rungs = self._has_rungs and not self._was_stopped(candidate)
        self._answers[candidate] = None
        if self._on_suggest is not None:
            self._on_suggest(name, candidate)
        return {"id": name, "candidate": asdict(candidate), "is_resumed": is_resumed, "has_rungs": has_rungs}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._asked.pop(trial_id)
        text = (result or {}).get("outcomes")
        outcome = None if error or text is None else Outcome.from_json(json.loads(text)[0])
        self._tell(trial, outcome)
        if outcome is not None:
            self._answers[outcome.candidate] = outcome

    def _next(self) -> tuple[Trial | Candidate, Candidate] | None:
        """What to try next, that was not tried before or was stopped: for the study, and as a candidate."""
        while self._given:
            candidate = self._nearest_allowed(self._given.pop(0))
            if candidate not in self._answers:
                return candidate, candidate
        for _ in range(0 if self._sampler == "grid" else MOST_REPEATS):
            trial = self._sampled()
            candidate = self._candidate_of(trial.params)
            # Others than gp do not know of how much use it is to try again what was stopped.
            if candidate not in self._answers or (self._sampler == "gp" and self._was_stopped(candidate)):
                return trial, candidate
            self._tell(trial, self._answers[candidate])
        for _ in range(0 if self._sampler == "grid" else MOST_REPEATS):  # the sampler is stuck
            candidate = self._sampling.submit(self._surrogate.sample_uniform).result()  # that thread draws from it too
            if candidate not in self._answers:
                return candidate, candidate
        return None

    def _was_stopped(self, candidate: Candidate) -> bool:
        """At a rung, when it was tried last."""
        before = self._answers.get(candidate)
        return before is not None and before.state is State.STOPPED

    def _candidate_of(self, values: Mapping[str, Any]) -> Candidate:
        """What is tried when these values are suggested."""
        return self._nearest_allowed(self._space.of_values(self._space.snap(values)))

    def _sampled(self) -> Trial:
        """The next that the sampler suggests; the one after it is begun."""
        while len(self._ready) <= self._ahead:
            self._ready.append(self._sampling.submit(self._study.ask, self._distributions))
        return self._ready.popleft().result()

    def stop(self) -> None:
        """From now on no trial is suggested; a signal handler may call it."""
        self._deadline = -math.inf

    def finish(self) -> None:
        """From now on no trial is suggested, nor made ready."""
        self.stop()
        self._sampling.shutdown(wait=False, cancel_futures=True)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its searcher to resume by; we resume by the ledger

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds it all."""

    def _tell(self, trial: Trial | Candidate, outcome: Outcome | None) -> None:
        """A measured outcome is told with its values; everything else as failed, so that nothing stays running.

        What was stopped at a rung is told to `LIMIT_KEEPERS` as beyond a limit: they learn that it was no good, but
        do not take its values for final ones. For others it has failed; gp knows what it had at its rungs.

        trial: what the study was asked for, or a candidate that was given to it.
        """
        values = None if outcome is None else self._values(outcome)
        excesses = {} if outcome is None or values is None else self._excesses(outcome)
        if self._has_rungs and values is not None and self._sampler in LIMIT_KEEPERS:
            excesses |= {STOPPED: 0.0}
        rungs = outcome.rungs if outcome is not None and outcome.state is State.STOPPED else ()
        if rungs and self._sampler in LIMIT_KEEPERS:
            values, excesses = list(rungs[-1]), {STOPPED: 1.0}
        attributes = {} if outcome is None else {RUNGS: outcome.rungs}
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        if isinstance(trial, Trial):
            for text, excess in excesses.items():
                trial.set_constraint(text, excess)
            for name, value in attributes.items():
                trial.set_user_attr(name, value)
            self._study.tell(trial, values, state)
        else:
            made = create_trial(
                state=state, values=values, params=self._space.values_of(trial), distributions=self._distributions,
                constraints=excesses, user_attrs=attributes,
            )  # fmt: skip
            self._study.add_trial(made)

    def _values(self, outcome: Outcome) -> list[float] | None:
        """Of the objectives; None if the outcome has not all of them."""
        if outcome.state is not State.MEASURED or outcome.measurement is None:
            return None
        values = [getattr(outcome.measurement, name) for name in self._objectives]
        return values if all(value is not None and math.isfinite(value) for value in values) else None

    def _excesses(self, outcome: Outcome) -> dict[str, float]:
        """How far it is beyond each limit, as Optuna wants constraints: 0 or less is within."""
        if outcome.measurement is None or self._goal is None:
            return {}
        return self._goal.excesses(outcome.measurement)
