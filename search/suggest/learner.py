"""A sampler with the Optuna study that it learns from: outcomes go in, draws come out.

The study lives in memory and is rebuilt from the ledger when a sweep goes on: the ledger is the only truth.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from optuna.trial import Trial, TrialState, create_trial

from search.goal import Goal
from search.outcome import Candidate, Outcome, State
from search.space import Space
from search.suggest.samplers import RUNGS, SamplerSettings, create_study, distributions_of
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
        self.study = create_study(settings.chosen, settings.seed, space, self._surrogate)
        """The study, whose trials hold all that the sampler was told."""
        self._ready = deque[Future[Trial]]()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")

    def draw(self) -> Trial:
        """Returns the sampler's next draw, and has the thread begin with the ones to be made ready after it."""
        while len(self._ready) <= self._settings.num_ahead:
            self._ready.append(self._thread.submit(self.study.ask, self._distributions))
        return self._ready.popleft().result()

    def sample_uniform(self) -> Candidate:
        """Returns a candidate from all of the space, each as likely."""
        return self._thread.submit(self._surrogate.sample_uniform).result()  # that thread has the surrogate draw too

    def tell(self, draw: Trial | Candidate, outcome: Outcome | None) -> None:
        """Tells the study what came of a draw, or of a candidate that was not drawn.

        A measured outcome is told with its values; everything else as failed, so that nothing stays running. An outcome
        that was stopped at a rung is told to `LIMIT_KEEPERS` as beyond a limit: they learn that it was no good, but
        do not take its values for final ones. To the others it has failed; gp knows what it had at its rungs.

        Args:
            outcome: None if the trial ended without one.
        """
        values = None if outcome is None else self._values(outcome)
        excesses = {} if outcome is None or values is None else self._excesses(outcome)
        keeps_limits = self._settings.chosen in LIMIT_KEEPERS
        if self._settings.has_rungs and values is not None and keeps_limits:
            excesses |= {STOPPED: 0.0}
        rungs = outcome.rungs if outcome is not None and outcome.state is State.STOPPED else ()
        if rungs and keeps_limits:
            values, excesses = list(rungs[-1]), {STOPPED: 1.0}
        attributes = {} if outcome is None else {RUNGS: outcome.rungs}
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
