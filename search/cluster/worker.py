"""What runs on the workers of a cluster: trials, and the tasks before and after them. It knows Ray, but nothing of what
the driver alone needs (Optuna, MLflow): imports are most of a worker's start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic

import ray
import torch
from ray import tune
from torch import nn

from pruning.artifact import Weights
from pruning.measure.stopwatch import Timing, keep_freed_memory
from pruning.methods.allocation import Profile
from pruning.plan import Plan, TokenReduction
from search.config import Config
from search.outcome import Candidate, Measurement, Outcome, State
from search.trial.context import Confirmation, Found, TrialContext, confirm, lease_on, prepare, time_shapes
from search.trial.inputs import Inputs
from search.trial.trial import Ended, Epoch, Event, Rung, WorkerCache, start_trial
from search.trial.warm_start import propose

MOST_START_S = 60.0
"""Workers that are not there by then, for want of nodes, are not waited for."""

TUNE_S = 0.1
"""What a trial costs beside its own time, about."""

StartTrial = Callable[[TrialContext, Candidate, str, Mapping[str, Any] | None, WorkerCache], Iterator[Event | Ended]]
"""`search.trial.trial.start_trial`, or what stands in for it."""


class Shared(Generic[Found]):
    """`search.trial.context.Known` of all workers of a sweep, in its exchange."""

    def __init__(self, exchange: Any) -> None:
        self._exchange = exchange

    def get(self, key: str, /) -> Found | None:
        found: Found | None = ray.get(self._exchange.peek.remote(key))
        return found

    def __setitem__(self, key: str, found: Found, /) -> None:
        ray.get(self._exchange.put.remote(key, found))


class TrialActor(tune.Trainable):
    """A worker: keeps the context on its device and runs trial after trial, a step an epoch where they train."""

    def setup(
        self, config: dict[str, Any], context: Sequence[Any] = (), exchange: Any = None, cpus: int = 1,
        num_workers: int = 1, num_trials: int = 1, start: StartTrial = start_trial,
    ) -> None:  # fmt: skip
        torch.set_num_threads(cpus)
        keep_freed_memory()
        # Behind a list, Tune hands the reference on instead of storing the context a second time.
        self.context: TrialContext = ray.get(context[0]).to(_device())
        self.exchange, self.start_trial = exchange, start
        self.memory = WorkerCache(known=Shared(exchange), trained=Shared(exchange))
        self.free_since = time.monotonic()
        self.num_workers, self.num_trials, self.is_first = num_workers, num_trials, True
        exchange.worker_ready.remote()
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._start(new_config)
        return True

    def _start(self, config: dict[str, Any]) -> None:
        self.id, self.candidate = config["id"], Candidate.from_json(config["candidate"])
        state = ray.get(self.exchange.take.remote(self.id)) if config["is_resumed"] else None
        context = self.context if config["has_rungs"] else self.context.without_rungs()
        self.events = self.start_trial(context, self.candidate, self.id, state, self.memory)
        self.waited_s: float | None = None
        self.started = time.monotonic()

    def step(self) -> dict[str, Any]:
        if self.waited_s is None:
            self.waited_s = time.monotonic() - self.free_since
        with self.context.lease.shared():  # between two steps an actor may have nothing to do
            event = next(self.events)
        if not isinstance(event, Epoch):  # the trial may end here
            self._await_others()
        result = self._result(event)
        self.free_since = time.monotonic()
        return result

    def _await_others(self) -> None:
        """At the end of its first trial: until all workers are there, if that is sooner than to run all trials alone.

        Else the others would not come up where trials are shorter than a start: Tune gives the trial that waits for one
        the worker that got free, and takes the start back.
        """
        alone_s = self.num_trials * (time.monotonic() - self.started + TUNE_S)
        limit = time.monotonic() + min(MOST_START_S, alone_s)
        while self.is_first and time.monotonic() < limit:
            if ray.get(self.exchange.num_ready_workers.remote()) >= self.num_workers:
                break
            time.sleep(0.1)
        self.is_first = False

    def _result(self, event: Event | Ended) -> dict[str, Any]:
        if isinstance(event, Epoch):
            ray.get(self.exchange.put.remote(self.id, event.state()))
            return {"progress": event.progress, "done": False}
        if isinstance(event, Rung):  # with what came of it if it is stopped here
            return {"rungs": event.values, "outcomes": self._told([self._stopped(event)]), "done": False}
        if event.weights:
            ray.get(self.exchange.put.remote(self.id, event.weights))
        return {"outcomes": self._told(event.outcomes), "trained": list(event.trained), "done": True}

    def _told(self, outcomes: Sequence[Outcome]) -> str:
        """As JSON, the trial's own with how long it was waited for."""
        own, *others = outcomes
        return json.dumps([each.to_json() for each in (replace(own, waited_s=self.waited_s or 0.0), *others)])

    def _stopped(self, rung: Rung) -> Outcome:
        accuracy, speedup = rung.values[-1]
        return Outcome(
            id=self.id,
            state=State.STOPPED,
            candidate=self.candidate,
            reason=f"not good enough at rung {len(rung.values)}: {accuracy:.3f}, {speedup:.2f} x as fast as dense",
            rungs=rung.values,
            rung_spans=rung.spans,
            seconds=rung.spans[-1][1],
        )


def prepare_remotely(
    config: Config, inputs: Inputs, profiles: Mapping[TokenReduction, Profile]
) -> tuple[TrialContext, Measurement, list[Candidate]]:
    """`prepare` on a worker's device, and what it proposes; the context comes back on the CPU, where every worker can
    take it from."""
    model: nn.Module = inputs.model.to(_device())
    context, dense = prepare(
        config, model, inputs.splits, inputs.space.exit_blocks, trained=inputs.trained, profiles=profiles
    )
    proposed = propose(context, inputs.space)
    return context.to("cpu"), dense, proposed


def time_remotely(context: TrialContext, plans: list[Plan]) -> list[Timing]:
    """`time_shapes` on a worker's device."""
    return time_shapes(context.to(_device()), plans)


def confirm_remotely(context: TrialContext, plans: list[Plan], weights: list[Weights | None]) -> Confirmation:
    """`confirm` on a worker's device; the models come back on the CPU."""
    found = confirm(context.to(_device()), plans, weights)
    return replace(found, models=[model.cpu() for model in found.models])


def run_task(function: Callable[..., Any], cpus: int, *args: Any) -> Any:
    """A function's result, under a lease of the device and with so many torch threads."""
    torch.set_num_threads(cpus)
    with lease_on(_device()).shared():
        return function(*args)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
