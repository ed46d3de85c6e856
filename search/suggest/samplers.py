"""The samplers that a search may draw from, as Optuna studies of its space."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from search.method import Method
from search.outcome import Candidate
from search.parameter import Choice, Parameter
from search.space import Space
from search.suggest.duration import UNKNOWN
from search.suggest.surrogate import Observation, Surrogate

Sampler = Literal["auto", "gp", "tpe", "nsga2", "random", "grid"]
"""Names of samplers. auto: gp. grid: as fine as the trials allow, in random order."""

RUNGS = "rungs"
"""Name of a trial's attribute that holds the values it had at its rungs."""

DISCARDED = "discarded"
"""Name of the attribute of a trial that was drawn, but not tried."""

DURATION = "duration"
"""Name of a trial's attribute that holds the `Duration` that it had."""

NUM_RANDOM = 8
"""Number of trials that must be known before a sampler learns from them; until then it draws at random."""


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Choice of a sampler, and how a search uses it."""

    sampler: Sampler
    """The sampler that candidates come from."""
    seed: int
    """Seed of the sampler, and of the order of a grid."""
    num_trials: int = 0
    """Number of trials of the whole sweep, for the fineness of a grid."""
    has_rungs: bool = False
    """True if trials may be stopped at rungs."""
    num_ahead: int = 0
    """Number of suggestions that are made ready, in a thread, while trials run."""

    @property
    def chosen(self) -> Sampler:
        """The sampler; `auto` is replaced by the one that it stands for."""
        return "gp" if self.sampler == "auto" else self.sampler


def distributions_of(space: Space) -> dict[str, BaseDistribution]:
    """Returns the Optuna distribution of each parameter that a candidate may have."""
    return {name: _distribution(parameter) for name, parameter in space.parameters().items()}


def _distribution(parameter: Parameter) -> BaseDistribution:
    if isinstance(parameter, Choice):
        return CategoricalDistribution(parameter.values)
    if parameter.is_whole:
        return IntDistribution(int(parameter.low), int(parameter.high))
    return FloatDistribution(parameter.low, parameter.high, log=parameter.is_log)


def create_sampler(sampler: Sampler, seed: int, space: Space, surrogate: Surrogate) -> BaseSampler:
    """Creates a sampler as Optuna wants one.

    Args:
        sampler: not `auto`; that of a `grid` is never asked for anything.
        surrogate: makes the suggestions of `gp`.
    """
    if sampler == "gp":
        return GaussianSampler(space, surrogate)
    if sampler == "nsga2":
        return NSGAIISampler(seed=seed)
    if sampler == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(seed=seed, n_startup_trials=NUM_RANDOM, constant_liar=True)
    return RandomSampler(seed=seed)


def create_study(sampler: BaseSampler) -> optuna.Study:
    """Creates a study of two objectives that are maximised."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)


class GaussianSampler(BaseSampler):
    """Tells our `Surrogate` what the study knows, and draws what it suggests.

    We differ from Optuna's own GPSampler, which learns nothing from trials that failed or were stopped, measures
    hypervolume from the worst outcome, and takes 3 to 4 seconds a suggestion, which the trials on that core lose.
    """

    def __init__(self, space: Space, surrogate: Surrogate) -> None:
        self._space, self._surrogate = space, surrogate
        self.methods: Collection[Method] | None = None
        """Methods of the space that the next candidate may be of; by default all."""
        self._candidates: dict[int, Candidate] = {}
        """Number of a trial -> its candidate."""
        self._is_exhausted = not distributions_of(space)
        """True once nothing new is left; anything will do then, since the search sees that it was tried."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return distributions_of(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        observations, running = list[Observation](), list[Candidate]()
        for other in study.get_trials(deepcopy=False):
            if other.number == trial.number or DISCARDED in other.user_attrs:
                continue
            if other.state == TrialState.RUNNING:
                running.append(self._candidate_of(other))
            else:
                observations.append(self._observation_of(other))
        suggested = None
        is_early = all(one.values is None for one in observations)
        is_early |= sum(one.values is not None or len(one.rungs) > 0 for one in observations) < NUM_RANDOM
        if not self._is_exhausted and not is_early:
            suggested = self._surrogate.suggest(observations, running, self.methods)
            self._is_exhausted = suggested is None and self.methods is None
        return self._space.values_of(suggested or self._surrogate.sample_uniform(self.methods))

    def _candidate_of(self, trial: FrozenTrial) -> Candidate:
        if trial.number not in self._candidates:
            self._candidates[trial.number] = self._space.of_values(trial.params)
        return self._candidates[trial.number]

    def _observation_of(self, trial: FrozenTrial) -> Observation:
        return Observation(
            candidate=self._candidate_of(trial),
            values=(trial.values[0], trial.values[1]) if trial.state == TrialState.COMPLETE else None,
            excesses=trial.constraints,
            rungs=trial.user_attrs.get(RUNGS, ()),
            duration=trial.user_attrs.get(DURATION, UNKNOWN),
        )

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is no parameter of the space")
