"""Ray's `Searcher` over an Optuna study that is ours: the only file that knows Optuna.

The study lives in memory and is rebuilt from the ledger when a sweep goes on: the ledger is the only truth.
Ray's own OptunaSearch leaves failed and NaN trials running for ever.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import optuna
from optuna.trial import Trial, TrialState
from ray.tune.search import Searcher

from search.outcome import Candidate, Outcome, State
from search.space import Space


class StudySearcher(Searcher):
    """Asks the study for a candidate when Ray has room for a trial, and tells it what came of it."""

    def __init__(
        self, space: Space, *, known: Sequence[Outcome], sampler: Literal["tpe", "random"], seed: int,
        unfinished: Sequence[tuple[str, Candidate]] = (), accuracy: str = "top1", deadline: float | None = None,
        on_suggest: Callable[[str, Candidate], None] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            known: outcomes of an earlier run of the sweep; their candidates are not suggested again.
            unfinished: ids and candidates of trials that an earlier run did not end; they come first, as they were.
            accuracy: the field of `Measurement` that is told, beside the speed-up.
            deadline: on the monotonic clock; no trial is suggested later.
            on_suggest: called with the id and candidate of every trial that is about to start.
        """
        super().__init__()
        self._space = space
        self._accuracy = accuracy
        self._study = _create_study(sampler, seed + len(known))
        self._asked: dict[str, Trial] = {}
        self._unfinished = list(unfinished)
        taken = [outcome.trial for outcome in known] + [trial_id for trial_id, _ in unfinished]
        self._next_number = 1 + max((int(trial_id[1:]) for trial_id in taken), default=-1)
        self._deadline = deadline
        self._on_suggest = on_suggest
        for outcome in known:
            if outcome.id == outcome.trial:  # what a trial found at earlier exits has the same candidate
                self._tell(self._ask(outcome.candidate), outcome)
        tried = {outcome.candidate for outcome in known} | {candidate for _, candidate in unfinished}
        for candidate in space.first_candidates():
            if candidate not in tried:
                self._study.enqueue_trial(_params(candidate))

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Ray's FINISHED is a str
        """Ray's config of the next trial: its id, its candidate, and whether it goes on where an earlier run stopped;
        `FINISHED` once the time is up."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            finished: str = Searcher.FINISHED
            return finished
        is_resumed = bool(self._unfinished)
        if is_resumed:
            name, candidate = self._unfinished.pop(0)
            trial = self._ask(candidate)
        else:
            name, trial = f"t{self._next_number:03d}", self._study.ask()
            candidate = self._space.choose(trial)
            self._next_number += 1
        self._asked[trial_id] = trial
        if self._on_suggest is not None:
            self._on_suggest(name, candidate)
        return {"id": name, "candidate": asdict(candidate), "is_resumed": is_resumed}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._asked.pop(trial_id)
        text = (result or {}).get("outcomes")
        self._tell(trial, None if error or text is None else Outcome.from_json(json.loads(text)[0]))

    def finish(self) -> None:
        """From now on no trial is suggested."""
        self._deadline = -math.inf

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its searcher to resume by; we resume by the ledger

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds it all."""

    def _ask(self, candidate: Candidate) -> Trial:
        """The study's trial of a candidate that is given."""
        self._study.enqueue_trial(_params(self._space.clip(candidate)))
        trial = self._study.ask()
        self._space.choose(trial)
        return trial

    def _tell(self, trial: Trial, outcome: Outcome | None) -> None:
        """A measured outcome is told with its values; everything else as failed, so that nothing stays running."""
        if outcome is not None and outcome.state is State.MEASURED and outcome.measurement is not None:
            values = [getattr(outcome.measurement, name) for name in (self._accuracy, "speedup")]
            if all(value is not None and math.isfinite(value) for value in values):
                self._study.tell(trial, values)
                return
        self._study.tell(trial, state=TrialState.FAIL)


def _params(candidate: Candidate) -> dict[str, Any]:
    """All that Optuna may ask for: what is missing it would choose itself."""
    return candidate.to_params() | {"recovery": candidate.recovery}


def _create_study(sampler: Literal["tpe", "random"], seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        chosen: optuna.samplers.BaseSampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if sampler == "random"
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, constant_liar=True)
        )
    return optuna.create_study(directions=["maximize", "maximize"], sampler=chosen)
