"""A worker without Ray: what it leaves in the stores, what its results say, for whom and for what it waits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from pruning.errors import ModelError
from search.cluster.searcher import outcomes_of
from search.cluster.worker import MAX_START_S, POLL_S, TUNE_S, Crew, Runner
from search.outcome import Candidate, State
from search.trial.jobs import LOOK, Job, NeedFailedError
from search.trial.progress import Epoch, Event, Rung
from search.trial.reuse import WorkerCache
from search.trial.trial import Ended
from tests.search_tests import builders
from tests.search_tests.cluster.stores import DictStore

CANDIDATE = builders.candidate()
NEEDS = ("look", "profile-lfe")
OUTCOME = replace(builders.outcome("t000", 0.9, 1.5), has_weights=True)


class Clock:
    """Seconds that pass only when somebody sleeps or works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Context:
    """Stands in for a `TrialContext` and for a lease that tells whether it is held."""

    def __init__(self, has_rungs: bool = True) -> None:
        self.has_rungs = has_rungs
        self.is_held = False
        self.lease = self

    def without_rungs(self) -> Context:
        return Context(has_rungs=False)

    @contextmanager
    def shared(self) -> Iterator[None]:
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False


class FakeWorkplace:
    """Stands in for a `Workplace` in which products come after some seconds, or have failed."""

    def __init__(self, clock: Clock, context: Context) -> None:
        self.products, self.lease, self._clock, self._context = DictStore(), context, clock, context
        self.waits: list[tuple[str, ...]] = []
        self.held_while_waiting: list[bool] = []
        self.wait_s = 0.0
        self.error: NeedFailedError | None = None

    def context(self, needs: Sequence[str] = ()) -> Context:
        self.waits.append(tuple(needs))
        self.held_while_waiting.append(self.lease.is_held)
        self._clock.sleep(self.wait_s)
        if self.error is not None:
            raise self.error
        return self._context


class Worker:
    """A worker whose trials give certain events, each after a second of work."""

    def __init__(self, *events: Event | Ended, num_workers: int = 1, num_ready: int = 1) -> None:
        self.clock, self.states, self.weights = Clock(), DictStore(), DictStore()
        self.context, self.num_ready = Context(), num_ready
        self.calls: list[tuple[Any, ...]] = []
        self.held: list[bool] = []
        self.events = events
        crew = Crew(num_workers, 10, lambda: self.num_ready, self.clock, self.clock.sleep)
        self.jobs, self.workplace = DictStore(), FakeWorkplace(self.clock, self.context)
        self.done: list[Job] = []
        self.product: Any = "product"
        self.runner = Runner(
            self.workplace, self.jobs, self.states, self.weights, WorkerCache(), crew,  # type: ignore[arg-type]
            self.start, self.do, self.clock,
        )  # fmt: skip

    def do(self, job: Job, workplace: Any) -> Any:
        """Stands in for `run_job`: takes two seconds."""
        self.done.append(job)
        self.held.append(self.context.is_held)
        self.clock.sleep(2.0)
        if isinstance(self.product, Exception):
            raise self.product
        return self.product

    def run_job(self, job: Job) -> dict[str, Any]:
        self.jobs[job.id] = job
        self.runner.begin({"id": job.id, "is_job": True})
        return self.runner.step()

    def start(
        self, context: Any, candidate: Candidate, trial_id: str, state: Mapping[str, Any] | None, cache: WorkerCache
    ) -> Iterator[Event | Ended]:
        self.calls.append((context.has_rungs, candidate, trial_id, state))
        for event in self.events:
            self.held.append(self.context.is_held)
            self.clock.sleep(1.0)
            yield event

    def begin(self, trial_id: str = "t000", *, is_resumed: bool = False, has_rungs: bool = True) -> None:
        config = {
            "id": trial_id,
            "candidate": asdict(CANDIDATE),
            "is_resumed": is_resumed,
            "has_rungs": has_rungs,
            "needs": list(NEEDS),
        }
        self.runner.begin(json.loads(json.dumps(config)))

    def run(self, **config: Any) -> list[dict[str, Any]]:
        self.begin(**config)
        return [self.runner.step() for _ in self.events]


def epoch(number: int) -> Epoch:
    return Epoch(progress={"epoch": number}, state=lambda: {"stage": "distill", "number": number})


def ended(**fields: Any) -> Ended:
    return Ended(outcomes=[OUTCOME], models={"t000": torch.nn.Linear(2, 1)}, **fields)


@pytest.mark.parametrize("has_rungs", [True, False])
def test_a_trial_passes_rungs_only_if_its_suggestion_says_so(has_rungs: bool) -> None:
    worker = Worker(ended())
    worker.run(has_rungs=has_rungs)
    assert worker.calls == [(has_rungs, CANDIDATE, "t000", None)]


def test_a_resumed_trial_takes_its_state_and_no_other_does() -> None:
    worker = Worker(ended())
    worker.states |= {"t000": {"epoch": 3}, "t001": {"epoch": 5}}
    worker.run(trial_id="t001", is_resumed=True)
    worker.run(trial_id="t000")
    assert [state for *_, state in worker.calls] == [{"epoch": 5}, None]
    assert worker.states == {"t000": {"epoch": 3}}


def test_an_epoch_leaves_its_state_and_tells_its_progress() -> None:
    worker = Worker(epoch(1), epoch(2))
    assert worker.run() == [
        {"progress": {"epoch": number}, "done": False, "busy_s": float(number)} for number in (1, 2)
    ]
    assert worker.states == {"t000": {"stage": "distill", "number": 2}}


def test_a_rung_tells_its_values_and_the_outcome_if_the_trial_is_stopped_there() -> None:
    rung = Rung(values=((0.5, 1.25), (0.625, 1.5)), spans=((0.0, 1.0), (2.0, 3.5)))
    [result] = Worker(rung).run()
    assert (result["rungs"], result["done"]) == (rung.values, False)
    [outcome] = outcomes_of(result)
    assert (outcome.id, outcome.state, outcome.candidate) == ("t000", State.STOPPED, CANDIDATE)
    assert (outcome.rungs, outcome.rung_spans, outcome.seconds) == (rung.values, rung.spans, 3.5)
    assert outcome.reason == "not good enough at rung 2: 0.625, 1.50 x as fast as dense"


def test_the_end_leaves_the_weights_and_tells_the_outcomes() -> None:
    at_exit = replace(builders.outcome("t000.2", 0.8, 2.0), waited_s=0.0)
    end = replace(ended(finetunes={"key": OUTCOME}), outcomes=[OUTCOME, at_exit])
    worker = Worker(end)
    [result] = worker.run()
    assert outcomes_of(result) == [OUTCOME, at_exit]
    assert (result["finetunes"], result["done"]) == (["key"], True)
    assert worker.weights["t000"].keys() == {"t000"}
    assert worker.weights["t000"]["t000"].keys() == {"weight", "bias"}


def test_an_end_without_weights_leaves_none() -> None:
    worker = Worker(Ended(outcomes=[builders.outcome("t000", 0.9, 1.5)], models={}))
    worker.run()
    assert worker.weights == {}


def test_a_worker_holds_the_device_within_a_step_and_not_between_two() -> None:
    worker = Worker(epoch(1), ended())
    worker.begin()
    for _ in range(2):
        worker.runner.step()
        assert not worker.context.is_held
    assert worker.held == [True, True]


def test_an_outcome_tells_how_long_the_worker_waited_for_its_trial() -> None:
    worker = Worker(epoch(1), ended())
    waited = []
    for pause in (0.25, 7.0):
        worker.clock.sleep(pause)
        worker.begin()
        worker.clock.sleep(0.5)
        *_, result = [worker.runner.step() for _ in worker.events]
        waited.append(outcomes_of(result)[0].waited_s)
    assert waited == [0.75, 7.5]


def test_a_worker_waits_for_the_others_at_the_end_of_its_first_trial_alone() -> None:
    worker = Worker(epoch(1), ended(), num_workers=2)
    worker.begin()
    worker.runner.step()
    assert worker.clock.now == 101.0
    worker.runner.step()
    assert worker.clock.now == pytest.approx(102.0 + 10 * (2.0 + TUNE_S), abs=2 * POLL_S)
    before = worker.clock.now
    worker.run()
    assert worker.clock.now == before + 2.0


# What a trial needs


def test_a_trial_begins_once_all_is_there_that_it_needs_and_the_device_is_free_meanwhile() -> None:
    worker = Worker(ended())
    worker.workplace.wait_s = 5.0
    worker.begin()
    result = worker.runner.step()
    assert worker.workplace.waits == [NEEDS]
    assert worker.workplace.held_while_waiting == [False]
    assert worker.calls == [(True, CANDIDATE, "t000", None)]
    assert outcomes_of(result)[0].waited_s == 5.0
    assert result["busy_s"] == 1.0


def test_a_trial_whose_need_failed_is_a_failed_outcome_and_keeps_its_state() -> None:
    worker = Worker(ended())
    worker.states["t000"] = {"epoch": 3}
    worker.workplace.error = NeedFailedError("the features are not finite")
    worker.begin(is_resumed=True)
    result = worker.runner.step()
    [outcome] = outcomes_of(result)
    assert (outcome.id, outcome.state, outcome.candidate) == ("t000", State.FAILED, CANDIDATE)
    assert (outcome.reason, result["done"]) == ("the features are not finite", True)
    assert worker.calls == []
    assert worker.states == {"t000": {"epoch": 3}}


# Jobs


STEP = Job(id="profile-lfe", kind="step", needs=("dense", "sensitivity-3"))


def test_a_job_leaves_its_product_and_tells_its_own_seconds() -> None:
    worker = Worker()
    worker.workplace.wait_s = 7.0
    assert worker.run_job(STEP) == {"done": True, "busy_s": 2.0}
    assert worker.done == [STEP]
    assert worker.workplace.waits == [STEP.needs]
    assert worker.workplace.products == {"profile-lfe": "product"}
    assert worker.jobs == {}  # begun


def test_a_job_holds_the_device_but_not_while_it_waits() -> None:
    worker = Worker()
    worker.run_job(STEP)
    assert (worker.workplace.held_while_waiting, worker.held, worker.context.is_held) == ([False], [True], False)


def test_what_a_job_finds_wrong_is_its_product() -> None:
    worker = Worker()
    worker.product = ModelError("the logits are not finite")
    assert worker.run_job(STEP)["done"]
    assert worker.workplace.products == {"profile-lfe": worker.product}
    assert not worker.context.is_held


def test_a_job_whose_need_failed_fails_too_and_does_no_work() -> None:
    worker = Worker()
    worker.workplace.error = NeedFailedError("the logits are not finite")
    assert worker.run_job(STEP) == {"done": True, "busy_s": 0.0}
    assert worker.done == []
    assert worker.workplace.products == {"profile-lfe": worker.workplace.error}


def test_the_look_waits_for_nothing() -> None:
    """The dense model, which any context waits for, comes from it."""
    worker = Worker()
    worker.run_job(Job(id=LOOK, kind="look"))
    assert worker.workplace.waits == []


def test_a_mistake_of_ours_in_a_job_breaks_the_worker() -> None:
    worker = Worker()
    worker.product = ZeroDivisionError("division by zero")
    with pytest.raises(ZeroDivisionError):
        worker.run_job(STEP)
    assert worker.workplace.products == {}


def test_a_worker_does_trials_and_jobs_in_turn() -> None:
    worker = Worker(ended())
    busy = [worker.run_job(STEP)["busy_s"], worker.run()[0]["busy_s"], worker.run_job(STEP)["busy_s"]]
    assert busy == [2.0, 1.0, 2.0]


@pytest.mark.parametrize("job", [Job(id=LOOK, kind="look"), STEP], ids=["look", "step"])
def test_a_worker_waits_for_the_others_after_no_job(job: Job) -> None:
    """While the dense model is looked at there may be nothing for them to do, so that they do not come up."""
    worker = Worker(ended(), num_workers=2)
    worker.run_job(job)
    assert worker.clock.now == 102.0
    worker.run()
    assert worker.clock.now == pytest.approx(103.0 + 10 * (1.0 + TUNE_S), abs=2 * POLL_S)


# The others


@pytest.mark.parametrize(
    ("num_workers", "num_trials", "first_trial_s", "expected_s"),
    [(1, 50, 9.0, 0.0), (2, 5, 3.0, 5 * (3.0 + TUNE_S)), (2, 1000, 3.0, MAX_START_S)],
    ids=["all are ready", "as long as all trials take alone", "a minute"],
)
def test_a_crew_is_waited_for_no_longer_than_it_saves(
    num_workers: int, num_trials: int, first_trial_s: float, expected_s: float
) -> None:
    clock = Clock()
    Crew(num_workers, num_trials, lambda: 1, clock, clock.sleep).await_all(first_trial_s)
    assert clock.now - 100.0 == pytest.approx(expected_s, abs=POLL_S)


def test_a_crew_goes_on_as_soon_as_the_last_is_ready() -> None:
    clock = Clock()
    Crew(3, 100, lambda: 2 + (clock.now >= 105.0), clock, clock.sleep).await_all(30.0)
    assert clock.now == pytest.approx(105.0, abs=POLL_S)
