"""Ray's `Searcher` over an Optuna study that is ours: the only file that knows Optuna.

The study lives in memory and is rebuilt from the ledger when a sweep goes on: the ledger is the only truth.
Ray's own OptunaSearch leaves failed and NaN trials running for ever.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma_multiobjective
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from ray.tune.search import Searcher

from search.limits import Limit
from search.outcome import Candidate, Measurement, Outcome, State
from search.space import Choice, Parameter, Space

Sampler = Literal["auto", "gp", "tpe", "nsga2", "random", "grid"]
"""auto: gp where all parameters are numbers, the trials are not too many and none is stopped, else tpe. grid: as fine
as the trials allow, in random order."""

MOST_GP_TRIALS = 200
"""A suggestion of the Gaussian process takes seconds, and the more, the more it knows."""

NUM_RANDOM = 8
"""So many trials are known before a sampler uses them."""

LIMIT_KEEPERS = ("tpe", "nsga2")
"""Samplers that look at the values of trials within the limits alone; gp models the others' too."""

STOPPED = "stopped at a rung"
"""The limit that a stopped trial is beyond."""

MOST_REPEATS = 20
"""So many suggestions in a row that were tried before end a search: the space is exhausted, or so is the sampler."""


class StudySearcher(Searcher):
    """Asks the study for a candidate when Ray has room for a trial, and tells it what came of it."""

    def __init__(
        self, space: Space, *, known: Sequence[Outcome], sampler: Sampler, seed: int, num_trials: int = 0,
        first: Sequence[Candidate] | None = None, learned: Sequence[Outcome] = (), has_rungs: bool = False,
        ahead: int = 0, unfinished: Sequence[tuple[str, Candidate]] = (), accuracy: str = "top1",
        limits: Sequence[Limit] = (), dense: Measurement | None = None, deadline: float | None = None,
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
            accuracy: the field of `Measurement` that is told, beside the speed-up.
            limits: what a model must keep, against what the dense one does.
            deadline: on the monotonic clock; no trial is suggested later.
            on_suggest: called with the id and candidate of every trial that is about to start.
        """
        super().__init__()
        self._space = space
        self._accuracy, self._limits, self._dense = accuracy, limits, dense
        self._distributions = {name: _distribution(each) for name, each in space.parameters().items()}
        if sampler == "auto":
            has_choices = any(isinstance(each, CategoricalDistribution) for each in self._distributions.values())
            sampler = "gp" if num_trials <= MOST_GP_TRIALS and not has_choices and not has_rungs else "tpe"
        self._has_rungs, self._sampler = has_rungs, sampler
        self._study = _create_study(sampler, seed + len(known), self._distributions)
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
            self._given += space.grid(num_trials, seed)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Ray's FINISHED is a str
        """Ray's config of the next trial: its id, its candidate, and whether it goes on where an earlier run stopped;
        `FINISHED` once the time is up, or nothing new is found."""
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
        self._answers[candidate] = None
        if self._on_suggest is not None:
            self._on_suggest(name, candidate)
        return {"id": name, "candidate": asdict(candidate), "is_resumed": is_resumed}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._asked.pop(trial_id)
        text = (result or {}).get("outcomes")
        outcome = None if error or text is None else Outcome.from_json(json.loads(text)[0])
        self._tell(trial, outcome)
        if outcome is not None:
            self._answers[outcome.candidate] = outcome

    def _next(self) -> tuple[Trial | Candidate, Candidate] | None:
        """What to try next, that was not tried before: for the study, and as a candidate."""
        while self._given:
            candidate = self._given.pop(0)
            if candidate not in self._answers:
                return candidate, candidate
        for _ in range(0 if self._sampler == "grid" else MOST_REPEATS):
            trial = self._sampled()
            candidate = self._space.of_values(self._space.on_grid(trial.params))
            if candidate not in self._answers:
                return trial, candidate
            self._tell(trial, self._answers[candidate])
        return None

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
        do not take its values for final ones. To others it has failed.

        trial: what the study was asked for, or a candidate that was given to it.
        """
        values = None if outcome is None else self._values(outcome)
        excesses = {} if outcome is None or values is None else self._excesses(outcome)
        if self._has_rungs and values is not None:
            excesses |= {STOPPED: 0.0}
        rungs = outcome.rungs if outcome is not None and outcome.state is State.STOPPED else ()
        if rungs and self._sampler in LIMIT_KEEPERS:
            values, excesses = list(rungs[-1]), {STOPPED: 1.0}
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        if isinstance(trial, Trial):
            for text, excess in excesses.items():
                trial.set_constraint(text, excess)
            self._study.tell(trial, values, state)
        else:
            params = self._space.values_of(trial)
            self._study.add_trial(
                create_trial(
                    state=state, values=values, params=params, distributions=self._distributions, constraints=excesses
                )
            )

    def _values(self, outcome: Outcome) -> list[float] | None:
        """Of the objectives; None if the outcome has not all of them."""
        if outcome.state is not State.MEASURED or outcome.measurement is None:
            return None
        values = [getattr(outcome.measurement, name) for name in (self._accuracy, "speedup")]
        return values if all(value is not None and math.isfinite(value) for value in values) else None

    def _excesses(self, outcome: Outcome) -> dict[str, float]:
        """How far it is beyond each limit, as Optuna wants constraints: 0 or less is within."""
        if outcome.measurement is None or self._dense is None:
            return {}
        return {limit.text: limit.excess(outcome.measurement, self._dense) for limit in self._limits}


def _distribution(parameter: Parameter) -> BaseDistribution:
    if isinstance(parameter, Choice):
        return CategoricalDistribution(parameter.values)
    if parameter.is_whole:
        return IntDistribution(int(parameter.low), int(parameter.high))
    return FloatDistribution(parameter.low, parameter.high, log=parameter.is_log)


def _create_study(sampler: Sampler, seed: int, distributions: Mapping[str, BaseDistribution]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen: optuna.samplers.BaseSampler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if sampler == "gp":
            chosen = optuna.samplers.GPSampler(seed=seed, n_startup_trials=NUM_RANDOM)
        elif sampler == "tpe":
            chosen = _TPESampler(distributions, seed=seed)
        elif sampler == "nsga2":
            chosen = optuna.samplers.NSGAIISampler(seed=seed)
        else:  # of a grid nothing is ever asked
            chosen = optuna.samplers.RandomSampler(seed=seed)
    return optuna.create_study(directions=["maximize", "maximize"], sampler=chosen)


class _TPESampler(TPESampler):
    """Optuna's TPE, with the same suggestions, in a fraction of the time once there are many trials.

    Optuna parts the good trials from the others again for each parameter, and converts all their values again. One
    model of all parameters (`multivariate`) is as fast, but found less: hypervolume 0.44 against 0.48 after 100 made-up
    trials.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution], *, seed: int) -> None:
        super().__init__(seed=seed, n_startup_trials=NUM_RANDOM, constant_liar=True)
        self._all = dict(distributions)
        self._internal: dict[str, dict[int, float]] = {name: {} for name in distributions}
        """Parameter -> number of a trial -> its value as a number."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._all

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """None before there are enough trials: then Optuna asks for each parameter alone, at random."""
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = [each for each in study.get_trials(deepcopy=False, states=states) if each.number != trial.number]
        num_done = sum(each.state != TrialState.RUNNING for each in trials)
        if num_done < NUM_RANDOM:
            return {}
        good, others = _split_trials(study, trials, default_gamma_multiobjective(num_done))
        params = {}
        for name, distribution in search_space.items():
            one = {name: distribution}
            of_good = self._build_parzen_estimator(study, one, good, handle_below=True)
            of_others = self._build_parzen_estimator(study, one, others, handle_below=False)
            drawn = of_good.sample(self._rng.rng, self._n_ei_candidates)
            best = self._compare(drawn, self._compute_acquisition_func(drawn, of_good, of_others))
            params[name] = distribution.to_external_repr(best[name])
        return params

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: optuna.Study
    ) -> dict[str, NDArray[np.float64]]:
        for name, distribution in search_space.items():
            known = self._internal[name]
            for trial in trials:
                if trial.number not in known:
                    known[trial.number] = distribution.to_internal_repr(trial.params[name])
        return {name: np.array([self._internal[name][trial.number] for trial in trials]) for name in search_space}
