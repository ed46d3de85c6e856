"""A worker of a cluster: keeps the context on its device and runs trial after trial.

It knows Ray, but nothing that the driver alone needs (Optuna, MLflow): imports are most of a worker's start.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray import tune

from pruning.artifact import Weights
from pruning.measure.stopwatch import keep_freed_memory
from search.cluster.stores import SharedStore, Store
from search.cluster.tasks import worker_device
from search.outcome import Candidate, Measurement, Outcome, State
from search.trial.context import TrialContext
from search.trial.progress import Epoch, Event, Rung
from search.trial.reuse import WorkerCache
from search.trial.trial import Ended, start_trial

MAX_START_S = 60.0
"""Time after which workers that are not ready, for want of nodes, are no longer waited for."""

TUNE_S = 0.1
"""Time that Ray Tune takes for a trial, about, beside the trial's own."""

POLL_S = 0.1
"""Time between two looks at whether all workers are ready."""

StartTrial = Callable[[TrialContext, Candidate, str, Mapping[str, Any] | None, WorkerCache], Iterator[Event | Ended]]
"""The type of `search.trial.trial.start_trial`, and of a fake in its place."""


class Crew:
    """All workers of a sweep, as one of them sees them."""

    def __init__(
        self,
        num_workers: int,
        num_trials: int,
        count_ready: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            num_workers: number of workers that are expected.
            num_trials: number of trials that they share.
            count_ready: returns the number of workers that are ready.
        """
        self._num_workers, self._num_trials, self._count_ready = num_workers, num_trials, count_ready
        self._clock, self._sleep = clock, sleep

    def await_all(self, first_trial_s: float) -> None:
        """Waits until all workers are ready, or for as long as this one would take for all trials alone, or a minute.

        A worker does so at the end of its first trial. Else the others would not come up where trials are shorter than
        a start: Tune gives the trial that waits for one the worker that got free, and takes the start back.

        Args:
            first_trial_s: time that the first trial took.
        """
        alone_s = self._num_trials * (first_trial_s + TUNE_S)
        limit = self._clock() + min(MAX_START_S, alone_s)
        while self._clock() < limit and self._count_ready() < self._num_workers:
            self._sleep(POLL_S)


class TrialRunner:
    """Runs trials one after the other, each in steps: an epoch, a rung, or the end.

    The result of a step is a dict of what JSON knows, as Ray Tune wants it. The states of trainings and the weights,
    which are too large for that, go to stores, from which the driver takes them: nodes need no shared disk.
    """

    def __init__(
        self,
        context: TrialContext,
        states: Store[Mapping[str, Any]],
        weights: Store[Mapping[str, Weights]],
        cache: WorkerCache,
        crew: Crew,
        start: StartTrial = start_trial,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            context: on this worker's device.
            states: states of trainings by trial; that of a resumed trial is taken from here.
            weights: trained weights by trial.
            start: starts a trial.
        """
        self._context, self._states, self._weights = context, states, weights
        self._cache, self._crew, self._start, self._clock = cache, crew, start, clock
        self._is_first = True
        self._free_since = clock()

    def begin(self, config: Mapping[str, Any]) -> None:
        """Begins with a trial.

        Args:
            config: a `search.suggest.ask.Suggestion` as a dict.
        """
        self._id, self._candidate = config["id"], Candidate.from_json(config["candidate"])
        state = self._states.take(self._id) if config["is_resumed"] else None
        context = self._context if config["has_rungs"] else self._context.without_rungs()
        self._events = self._start(context, self._candidate, self._id, state, self._cache)
        self._waited_s: float | None = None
        self._began = self._clock()

    def step(self) -> dict[str, Any]:
        """Runs the trial up to its next epoch, rung or end.

        Returns:
            `done`; and `progress` of an epoch; or `rungs`, all values so far, with the `outcomes` in case that the
            trial is stopped here; or the final `outcomes` with `finetunes`, the keys by which other trials may reuse
            the first of them.
        """
        if self._waited_s is None:
            self._waited_s = self._clock() - self._free_since
        with self._context.lease.shared():  # between two steps a worker may have nothing to do
            event = next(self._events)
        if self._is_first and not isinstance(event, Epoch):  # the trial may end here
            self._crew.await_all(self._clock() - self._began)
            self._is_first = False
        result = self._result(event)
        self._free_since = self._clock()
        return result

    def _result(self, event: Event | Ended) -> dict[str, Any]:
        if isinstance(event, Epoch):
            self._states[self._id] = event.state()
            return {"progress": event.progress, "done": False}
        if isinstance(event, Rung):
            return {"rungs": event.values, "outcomes": self._to_text([self._stopped(event)]), "done": False}
        if event.weights:
            self._weights[self._id] = event.weights
        return {"outcomes": self._to_text(event.outcomes), "finetunes": list(event.finetunes), "done": True}

    def _to_text(self, outcomes: Sequence[Outcome]) -> str:
        """Returns outcomes as JSON; the trial's own, the first, with the time that the worker waited for the trial."""
        own, *at_exits = outcomes
        own = replace(own, waited_s=self._waited_s or 0.0)
        return json.dumps([outcome.to_json() for outcome in (own, *at_exits)])

    def _stopped(self, rung: Rung) -> Outcome:
        """Returns the outcome of the trial if it is stopped at this rung."""
        accuracy, speedup = rung.values[-1]
        return Outcome(
            id=self._id,
            state=State.STOPPED,
            candidate=self._candidate,
            reason=f"not good enough at rung {len(rung.values)}: {accuracy:.3f}, {speedup:.2f} x as fast as dense",
            rungs=rung.values,
            rung_spans=rung.spans,
            seconds=rung.spans[-1][1],
        )


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings that every worker of a sweep is started with."""

    context_ref: Any
    """Ray's reference to the context, which lies in the object store once."""
    exchange: Any
    """Ray's handle of the sweep's `Exchange`."""
    cpus: int
    """Number of torch threads."""
    num_workers: int
    """Number of workers that are expected."""
    num_trials: int
    """Number of trials that they share."""
    start: StartTrial = start_trial
    """Starts a trial."""


class TrialActor(tune.Trainable):
    """A worker as Ray Tune's actor, which is reused from trial to trial."""

    def setup(self, config: dict[str, Any], settings: WorkerSettings) -> None:  # type: ignore[override]
        """Fetches the context, tells the others that this worker is ready, and begins with a trial."""
        torch.set_num_threads(settings.cpus)
        keep_freed_memory()
        exchange = settings.exchange
        cache = WorkerCache(
            measured_cache=SharedStore[Measurement](exchange, "measurements"),
            finetune_cache=SharedStore[Outcome](exchange, "finetunes"),
        )
        crew = Crew(settings.num_workers, settings.num_trials, lambda: ray.get(exchange.num_ready_workers.remote()))
        context: TrialContext = ray.get(settings.context_ref).to(worker_device())
        self.runner = TrialRunner(
            context, SharedStore(exchange, "states"), SharedStore(exchange, "weights"), cache, crew, settings.start
        )
        exchange.worker_ready.remote()
        self.runner.begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begins with another trial."""
        self.runner.begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Runs the trial up to its next epoch, rung or end; see `TrialRunner.step`."""
        return self.runner.step()
