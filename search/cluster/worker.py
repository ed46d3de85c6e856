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
from pruning.errors import VitfrontError
from pruning.measure.stopwatch import keep_freed_memory
from search.cluster.stores import SharedStore, Store
from search.config import Config
from search.outcome import Candidate, Measurement, Outcome, State
from search.trial.context import TrialContext
from search.trial.inputs import Inputs
from search.trial.jobs import Job, NeedFailedError, Workplace, run_job
from search.trial.progress import Epoch, Event, Rung
from search.trial.reuse import WorkerCache
from search.trial.rivals import Rival
from search.trial.trial import Ended, start_trial

MAX_START_S = 60.0
"""Time after which workers that are not ready, for want of nodes, are no longer waited for."""

TUNE_S = 0.1
"""Time that Ray Tune takes for a trial, about, beside the trial's own."""

POLL_S = 0.1
"""Time between two looks at whether all workers are ready."""

StartTrial = Callable[[TrialContext, Candidate, str, Mapping[str, Any] | None, WorkerCache], Iterator[Event | Ended]]
"""The type of `search.trial.trial.start_trial`, and of a fake in its place."""

DoJob = Callable[[Job, Workplace], Any]
"""`search.trial.jobs.run_job`, or a fake in its place."""

SetUp = Callable[..., Workplace]
"""`Workplace`, or a fake in its place."""


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
        a start: Tune gives the trial that waits for one the worker that got free, and takes the start back. At the end
        of a job it does not: beside the first look there may be no work for others, so that nothing starts them.

        Args:
            first_trial_s: time that the first trial took.
        """
        alone_s = self._num_trials * (first_trial_s + TUNE_S)
        limit = self._clock() + min(MAX_START_S, alone_s)
        while self._clock() < limit and self._count_ready() < self._num_workers:
            self._sleep(POLL_S)


class Runner:
    """Runs trials and jobs one after the other; a trial in steps: an epoch, a rung, or the end.

    The result of a step is a dict of what JSON knows, as Ray Tune wants it. Products of jobs, states of trainings and
    weights, which are too large for that, go to stores, from which the driver takes them: nodes need no shared disk.
    """

    def __init__(
        self,
        workplace: Workplace,
        jobs: Store[Job],
        states: Store[Mapping[str, Any]],
        weights: Store[Mapping[str, Weights]],
        cache: WorkerCache,
        crew: Crew,
        start: StartTrial = start_trial,
        do: DoJob = run_job,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            workplace: on this worker's device; products of jobs go to its store.
            jobs: jobs by id; one that is begun is taken from here.
            states: states of trainings by trial; that of a resumed trial is taken from here.
            weights: trained weights by trial.
            start: starts a trial.
            do: does a job.
        """
        self._workplace, self._jobs, self._states, self._weights = workplace, jobs, states, weights
        self._cache, self._crew, self._start, self._do, self._clock = cache, crew, start, do, clock
        self._sleep = sleep
        self._is_first = True
        self._free_since = clock()

    def begin(self, config: Mapping[str, Any]) -> None:
        """Begins with a trial or a job; nothing is run yet.

        Args:
            config: a `search.suggest.ask.Suggestion` as a dict with the products that it `needs`; or the `id` of a job
                with `is_job`; or the order to wait, with `wait_s`.
        """
        self._config, self._id = config, config["id"]
        self._events: Iterator[Event | Ended] | None = None
        self._waited_s = self._busy_s = 0.0

    def step(self) -> dict[str, Any]:
        """Does the job, or runs the trial up to its next epoch, rung or end.

        Returns:
            `done`; `busy_s`, the time that it took so far without what it waited for; of a trial also `progress` of an
            epoch; or `rungs`, all values so far, with the `outcomes` in case that the trial is stopped here; or the
            final `outcomes` with `finetunes`, the keys by which other trials may reuse the first of them.
        """
        if "wait_s" in self._config:
            self._sleep(self._config["wait_s"])
            result: dict[str, Any] = {"done": True}
        elif self._config.get("is_job"):
            result = self._do_job()
        else:
            result = self._step_trial()
            if self._is_first and "progress" not in result:  # the trial may end here
                self._crew.await_all(self._busy_s)
                self._is_first = False
        self._free_since = self._clock()
        return result | {"busy_s": self._busy_s}

    def _do_job(self) -> dict[str, Any]:
        job = self._jobs.take(self._id)
        if job is None:  # another worker was faster
            return {"done": True}
        product: Any
        try:
            if job.needs:
                self._workplace.context(job.needs)  # it waits, while others may use the device
            began = self._clock()
            with self._workplace.lease.shared():
                product = self._do(job, self._workplace)
            self._busy_s = self._clock() - began
        except VitfrontError as error:
            product = error
        self._workplace.products[job.id] = product
        return {"done": True}

    def _step_trial(self) -> dict[str, Any]:
        if self._events is None:
            self._events = self._begin_trial()
        began = self._clock()
        with self._workplace.lease.shared():  # between two steps a worker may have nothing to do
            event = next(self._events)
        self._busy_s += self._clock() - began
        return self._result(event)

    def _begin_trial(self) -> Iterator[Event | Ended]:
        config = self._config
        candidate = Candidate.from_json(config["candidate"])
        self._candidate, needs = candidate, config["needs"]
        try:
            context = self._workplace.context(needs)
        except NeedFailedError as error:
            return iter([_failed(self._id, candidate, str(error))])
        state = self._states.take(self._id) if config["is_resumed"] else None
        self._context = context if config["has_rungs"] else context.without_rungs()
        self._waited_s = self._clock() - self._free_since
        return self._start(self._context, candidate, self._id, state, self._cache)

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
        own = replace(own, waited_s=self._waited_s)
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


def _failed(trial_id: str, candidate: Candidate, reason: str) -> Ended:
    """Returns the end of a trial that could not begin."""
    return Ended(outcomes=[Outcome(id=trial_id, state=State.FAILED, candidate=candidate, reason=reason)], models={})


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings that every worker of a sweep is started with."""

    config: Config
    inputs_ref: Any
    """Ray's reference to the inputs, which lie in the object store once."""
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
    set_up: SetUp = Workplace
    """Sets up a worker's workplace."""


class TrialActor(tune.Trainable):
    """A worker as Ray Tune's actor, which is reused from trial to trial."""

    def setup(self, config: dict[str, Any], settings: WorkerSettings) -> None:  # type: ignore[override]
        """Fetches the inputs, tells the others that this worker is ready, and begins with a trial or a job."""
        torch.set_num_threads(settings.cpus)
        keep_freed_memory()
        exchange = settings.exchange
        cache = WorkerCache(
            measured_cache=SharedStore[Measurement](exchange, "measurements"),
            rivals=SharedStore[Rival](exchange, "rivals"),
            finetune_cache=SharedStore[Outcome](exchange, "finetunes"),
        )
        crew = Crew(settings.num_workers, settings.num_trials, lambda: ray.get(exchange.num_ready_workers.remote()))
        inputs: Inputs = ray.get(settings.inputs_ref)
        workplace = settings.set_up(
            config=settings.config,
            inputs=replace(inputs, model=inputs.model.to(worker_device())),
            products=SharedStore[Any](exchange, "products"),
            jobs=SharedStore[Job](exchange, "jobs"),
            measured_cache=cache.measured_cache,
        )
        self.runner = Runner(
            workplace, SharedStore(exchange, "jobs"), SharedStore(exchange, "states"), SharedStore(exchange, "weights"),
            cache, crew, settings.start,
        )  # fmt: skip
        exchange.worker_ready.remote()
        self.runner.begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begins with another trial or job."""
        self.runner.begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Does a step of the trial, or the job; see `Runner.step`."""
        return self.runner.step()


def worker_device() -> torch.device:
    """Returns the device that Ray gave this worker."""
    return torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
