"""A sampler with the Optuna study that it learns from: outcomes go in, draws come out.

The study lives in memory and is rebuilt from the ledger when a sweep goes on: the ledger is the only truth.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import mean
from typing import Any

from optuna.trial import Trial, TrialState, create_trial

from search.goal import Goal
from search.method import Method
from search.outcome import Candidate, Outcome, State
from search.space import Space
from search.suggest.duration import Duration
from search.suggest.samplers import (
    DISCARDED,
    DURATION,
    RUNGS,
    GaussianSampler,
    SamplerSettings,
    create_sampler,
    create_study,
    distributions_of,
)
from search.suggest.surrogate import Surrogate

LIMIT_KEEPERS = ("tpe", "nsga2")
"""Samplers that learn from a trial that is beyond a limit, but not from its values."""

STOPPED = "stopped at a rung"
"""The limit that a stopped trial is beyond."""


class Learner:
    """Draws values for a candidate, and learns from what came of each draw and of other candidates."""

    def __init__(
        self,
        space: Space,
        candidate_of: Callable[[Mapping[str, Any]], Candidate],
        settings: SamplerSettings,
        goal: Goal | None = None,
    ) -> None:
        """
        Args:
            candidate_of: values of the space's parameters -> the candidate that is tried for them.
            goal: objectives and limits; by default top-1 and speed-up without limits.
        """
        self._space, self._settings, self._goal = space, settings, goal
        self._objectives = goal.objectives if goal else ("top1", "speedup")
        self._distributions = distributions_of(space)
        self._surrogate = Surrogate(space, candidate_of, None if goal is None else goal.reference, settings.seed)
        self._sampler = create_sampler(settings.chosen, settings.seed, space, self._surrogate)
        self.study = create_study(self._sampler)
        """The study, whose trials hold all that the sampler was told."""
        self._seconds: dict[Method, list[float]] = {}
        """Method -> seconds of its trials of this sweep that ran to their end."""
        self._random = random.Random(settings.seed)
        self._ready = deque[Future[Trial]]()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")

    def draw(self, methods: Collection[Method] | None = None) -> Trial:
        """Returns the sampler's next draw, and has the thread begin with the ones to be made ready after it.

        A draw that was made ready may be of any method that could run then.

        Args:
            methods: methods of the space that can run; by default all.
        """
        while len(self._ready) <= self._settings.num_ahead:
            self._ready.append(self._thread.submit(self._ask, methods))
        return self._ready.popleft().result()

    def _ask(self, methods: Collection[Method] | None) -> Trial:
        if isinstance(self._sampler, GaussianSampler):
            self._sampler.methods = methods
        elif methods is not None and "method" in self._distributions:  # the sampler chooses all but the method
            self.study.enqueue_trial(
                {"method": self._random.choice([one for one in self._space.method if one in methods])}
            )
        return self.study.ask(self._distributions)

    def sample_uniform(self, methods: Collection[Method] | None = None) -> Candidate:
        """Returns a candidate from all of the space, each as likely.

        Args:
            methods: methods of the space that it may be of; by default all.
        """
        return self._thread.submit(self._surrogate.sample_uniform, methods).result()  # where the surrogate draws too

    def predicted_seconds(self, candidate: Candidate) -> float | None:
        """Predicts the seconds of a trial on this machine, as many more as less; None while nobody knows.

        They are the mean of the trials of its method until the processes of `gp` are fitted to some.
        """
        predicted = self._surrogate.predicted_seconds(candidate)
        if predicted is not None:
            return predicted
        return mean(self._seconds[candidate.method]) if candidate.method in self._seconds else None

    def tell(self, draw: Trial | Candidate, outcome: Outcome | None, *, is_elsewhere: bool = False) -> None:
        """Tells the study what came of a draw, or of a candidate that was not drawn.

        A measured outcome is told with its values; everything else as failed, so that nothing stays running. An outcome
        that was stopped at a rung is told to `LIMIT_KEEPERS` as beyond a limit: they learn that it was no good, but
        do not take its values for final ones. To the others it has failed; gp knows what it had at its rungs.

        Args:
            outcome: None if the trial ended without one.
            is_elsewhere: the trial is of another sweep.
        """
        values = None if outcome is None else self._values(outcome)
        excesses = {} if outcome is None or values is None else self._excesses(outcome)
        keeps_limits = self._settings.chosen in LIMIT_KEEPERS
        if self._settings.has_rungs and values is not None and keeps_limits:
            excesses |= {STOPPED: 0.0}
        rungs = outcome.rungs if outcome is not None and outcome.state is State.STOPPED else ()
        if rungs and keeps_limits:
            values, excesses = list(rungs[-1]), {STOPPED: 1.0}
        attributes: dict[str, Any] = {}
        if outcome is not None:
            duration = Duration.of(outcome, is_elsewhere=is_elsewhere)
            attributes = {RUNGS: outcome.rungs, DURATION: duration}
            if duration.seconds > 0 and not duration.is_least and not is_elsewhere:
                self._seconds.setdefault(outcome.candidate.method, []).append(duration.seconds)
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        if isinstance(draw, Trial):
            for text, excess in excesses.items():
                draw.set_constraint(text, excess)
            for name, value in attributes.items():
                draw.set_user_attr(name, value)
            self.study.tell(draw, values, state)
        else:
            given = create_trial(
                state=state, values=values, params=self._space.values_of(draw), distributions=self._distributions,
                constraints=excesses, user_attrs=attributes,
            )  # fmt: skip
            self.study.add_trial(given)

    def discard(self, draw: Trial) -> None:
        """Tells the study that a draw is not tried."""
        draw.set_user_attr(DISCARDED, True)
        self.study.tell(draw, state=TrialState.FAIL)

    def close(self) -> None:
        """Ends the thread; draws that were not begun are given up."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _values(self, outcome: Outcome) -> list[float] | None:
        """Returns the values of the objectives; None if the outcome has not all of them as finite numbers."""
        if outcome.state is not State.MEASURED or outcome.measurement is None:
            return None
        values = [getattr(outcome.measurement, name) for name in self._objectives]
        return values if all(value is not None and math.isfinite(value) for value in values) else None

    def _excesses(self, outcome: Outcome) -> dict[str, float]:
        """Returns how far the outcome is beyond each limit, as Optuna wants constraints: 0 or less is within."""
        if outcome.measurement is None or self._goal is None:
            return {}
        return self._goal.excesses(outcome.measurement)
