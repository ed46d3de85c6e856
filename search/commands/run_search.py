"""The search of a sweep: runs the trials that it lacks, until there are enough, time is up, or Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from search.cluster.scheduler import RungScheduler
from search.cluster.searcher import RaySearcher
from search.cluster.session import TrialResources, cluster_resources
from search.cluster.tune import TrialWork, run_trials
from search.cluster.worker import StartTrial
from search.config import Config, SearchConfig
from search.front import front_of
from search.goal import Goal
from search.observer import Observer
from search.outcome import Candidate, Measurement, Outcome, num_trials
from search.records.checkpoints import Checkpoint
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.records.recorder import Recorder
from search.records.tracking import Tracker
from search.space import Space
from search.suggest.ask import CandidateSearch, History
from search.suggest.rungs import Rungs
from search.suggest.samplers import SamplerSettings
from search.trial.trial import start_trial
from search.trial.warm_start import first_candidates


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep that is running: its recipe, its records, and who watches it."""

    config: Config
    space: Space
    folder: Folder
    ledger: Ledger
    """The ledger in `folder`, opened for writing."""
    tracker: Tracker
    observer: Observer


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Knowledge of a sweep before its trials start."""

    context_ref: Any
    """Ray's reference to the `TrialContext`."""
    goal: Goal
    """Objectives and limits, with the dense model as it was measured."""
    proposed: Sequence[Candidate] = ()
    """Candidates to begin with, from the profile of the dense model."""
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    """Measurements that need not be repeated, by the keys of `search.trial.reuse.measured_before`."""
    finetunes: Mapping[str, Outcome] = field(default_factory=dict)
    """Outcomes of fine-tunes that need not be repeated, by the keys of `search.trial.reuse.finetuned_before`."""


@dataclass(frozen=True, kw_only=True)
class Searched:
    """The end of a search."""

    outcomes: Sequence[Outcome]
    """All outcomes of the sweep, those of earlier runs first."""
    ended_by: str
    """Reason why it ended: `trials`, `time`, `saturation` of the hypervolume, `interrupt`, or `exhaustion` of the
    candidates."""


def run_search(
    sweep: Sweep, prepared: Prepared, prior_outcomes: Sequence[Outcome] = (), start: StartTrial = start_trial
) -> Searched:
    """Runs the trials that a sweep lacks.

    Args:
        prior_outcomes: outcomes of other sweeps; the search begins with their front.
        start: starts a trial on a worker.
    """
    settings = sweep.config.search
    recorder = Recorder(settings, prepared.goal, sweep.folder, sweep.ledger, sweep.tracker, sweep.observer)
    num_done = num_trials(recorder.outcomes)
    if num_done >= settings.trials or recorder.is_saturated():
        recorder.close()
        return Searched(outcomes=recorder.outcomes, ended_by="trials" if num_done >= settings.trials else "saturation")
    deadline = None if settings.time_budget_s is None else time.monotonic() + settings.time_budget_s
    unfinished = recorder.checkpoints.read(done={outcome.trial for outcome in recorder.outcomes})
    sweep.observer.start_trials(num_done, settings.trials, deadline)
    search = _candidate_search(sweep, prepared, recorder.outcomes, prior_outcomes, unfinished)
    searcher = RaySearcher(search, deadline, on_suggest=sweep.observer.started)
    scheduler = RungScheduler(Rungs(settings.reduction_factor, recorder.outcomes).promotes)
    work = TrialWork(
        context_ref=prepared.context_ref, states={checkpoint.id: checkpoint.state for checkpoint in unfinished},
        measurements=prepared.measurements, finetunes=prepared.finetunes, start=start,
    )  # fmt: skip
    interrupted = threading.Event()

    def interrupt() -> None:
        interrupted.set()
        searcher.stop()
        sweep.observer.interrupted()

    torch.set_num_threads(1)  # of the sampler, here in the driver: the cores have trials to do
    resources = TrialResources.of(sweep.config, cluster_resources())
    try:
        with calling_on_interrupt(interrupt):
            run_trials(work, searcher, scheduler, recorder, resources, settings.trials - num_done)
    finally:
        searcher.close()
        recorder.close()
    return Searched(outcomes=recorder.outcomes, ended_by=_why_it_ended(recorder, settings, deadline, interrupted))


def _candidate_search(
    sweep: Sweep, prepared: Prepared, outcomes: Sequence[Outcome], prior_outcomes: Sequence[Outcome],
    unfinished: Sequence[Checkpoint],
) -> CandidateSearch:  # fmt: skip
    """Returns the search, with all that earlier runs and other sweeps know."""
    settings = sweep.config.search
    prior_front = [outcome.candidate for outcome in front_of(prior_outcomes, prepared.goal)]
    return CandidateSearch(
        sweep.space,
        SamplerSettings(
            sampler=settings.sampler, seed=settings.seed, num_trials=settings.trials,
            has_rungs=settings.reduction_factor > 1, num_ahead=1,
        ),
        History(
            outcomes=list(outcomes),
            unfinished=[(checkpoint.id, checkpoint.candidate) for checkpoint in unfinished],
            prior_outcomes=prior_outcomes,
            first_candidates=prior_front + first_candidates(sweep.space, prepared.proposed),
        ),
        prepared.goal,
    )  # fmt: skip


def _why_it_ended(
    recorder: Recorder, settings: SearchConfig, deadline: float | None, interrupted: threading.Event
) -> str:
    """Returns the reason why a search ended, a word of `Searched.ended_by`."""
    if interrupted.is_set():
        return "interrupt"
    if num_trials(recorder.outcomes) >= settings.trials:
        return "trials"
    if recorder.is_saturated():
        return "saturation"
    return "exhaustion" if deadline is None or time.monotonic() < deadline else "time"


@contextmanager
def calling_on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """Calls a function at the first Ctrl-C within this block; the second one raises KeyboardInterrupt.

    In another than the main thread, which alone may handle signals, Ctrl-C is left as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not as before: a job in the background ignores it
        call()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
