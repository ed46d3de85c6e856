"""The driver's part at every epoch and at the end of every trial and job, without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from pruning.errors import ModelError
from search.cluster.tune import Bookkeeper
from search.errors import SweepError
from search.outcome import Outcome, State
from search.records.checkpoints import Checkpoint
from search.trial.jobs import NeedFailedError
from tests.search_tests import builders
from tests.search_tests.cluster.stores import DictStore

CANDIDATE = builders.candidate()
WITH_WEIGHTS = replace(builders.outcome("t000", 0.9, 1.5), has_weights=True)


class FakeDriver:
    """Keeps all it is told, until it is told to break."""

    def __init__(self, breaks: bool = False) -> None:
        self.checkpoints: list[Checkpoint] = []
        self.progress: list[Any] = []
        self.ends: list[tuple[Sequence[Outcome], Any]] = []
        self.products: list[tuple[str, Any]] = []
        self.num_given_up = 0
        self._breaks = breaks

    def epoch(self, checkpoint: Checkpoint, progress: Any) -> None:
        self.checkpoints.append(checkpoint)
        self.progress.append(progress)

    def trial_ended(self, outcomes: Sequence[Outcome], weights: Any) -> None:
        if self._breaks:
            raise SweepError("the disk is full")
        self.ends.append((outcomes, weights))

    def job_ended(self, job_id: str, product: Any) -> None:
        if self._breaks:
            raise SweepError("the disk is full")
        self.products.append((job_id, product))

    def give_up(self) -> None:
        self.num_given_up += 1


class Keeper:
    """A bookkeeper with its fakes."""

    def __init__(self, breaks: bool = False) -> None:
        self.driver = FakeDriver(breaks)
        self.products, self.states, self.weights, self.finetunes = (DictStore() for _ in range(4))
        self.keeper = Bookkeeper(
            self.driver,  # type: ignore[arg-type]
            products=self.products, states=self.states, weights=self.weights, finetunes=self.finetunes,
        )  # fmt: skip

    def complete(self, *outcomes: Outcome, **result: Any) -> None:
        text = json.dumps([outcome.to_json() for outcome in outcomes])
        self.keeper.on_trial_complete(1, [], trial(last_result={"outcomes": text} | result))

    def complete_job(self, product: Any, job_id: str = "profile-lfe", **result: Any) -> None:
        self.products[job_id] = product
        self.keeper.on_trial_complete(1, [], job(job_id, last_result={"done": True} | result))


def job(job_id: str = "profile-lfe", **fields: Any) -> Any:
    """A job as Tune hands it on."""
    return SimpleNamespace(config={"id": job_id, "is_job": True}, **fields)


def trial(**fields: Any) -> Any:
    """A trial as Tune hands it on."""
    return SimpleNamespace(config={"id": "t000", "candidate": asdict(CANDIDATE)}, **fields)


def test_an_epoch_is_recorded_with_the_state_that_its_worker_left() -> None:
    keeper = Keeper()
    keeper.states["t000"] = {"epoch": 4}
    for _ in range(2):  # the second finds nothing: the first has taken what the worker left for both
        keeper.keeper.on_trial_result(1, [], trial(), {"progress": {"epoch": 4}})
    assert keeper.driver.checkpoints == [Checkpoint(id="t000", candidate=CANDIDATE, state={"epoch": 4})]
    assert keeper.driver.progress == [{"epoch": 4}]
    assert keeper.states == {}


def test_a_result_with_outcomes_is_no_epoch() -> None:
    keeper = Keeper()
    keeper.states["t000"] = {"epoch": 4}
    keeper.keeper.on_trial_result(1, [], trial(), {"outcomes": "[]", "rungs": [(0.5, 1.5)]})
    assert keeper.driver.checkpoints == []
    assert keeper.states == {"t000": {"epoch": 4}}


def test_a_trial_that_ended_is_recorded_with_its_weights_and_then_shared() -> None:
    keeper = Keeper()
    keeper.weights["t000"] = {"t000": {"bias": 1}}
    keeper.complete(WITH_WEIGHTS, finetunes=["key"])
    assert keeper.driver.ends == [([WITH_WEIGHTS], {"t000": {"bias": 1}})]
    assert keeper.weights == {}
    assert keeper.finetunes == {"key": WITH_WEIGHTS}
    assert keeper.driver.num_given_up == 0


@pytest.mark.parametrize(
    "outcome",
    [builders.outcome("t000", 0.9, 1.5), replace(WITH_WEIGHTS, same_as="t007"), builders.failed("t000", State.STOPPED)],
    ids=["of its plan", "of another trial", "stopped"],
)
def test_weights_are_not_asked_for_where_there_are_none_of_its_own(outcome: Outcome) -> None:
    keeper = Keeper()
    keeper.weights["t000"] = "left alone"
    keeper.complete(outcome)
    assert keeper.driver.ends == [([outcome], {})]
    assert keeper.weights == {"t000": "left alone"}


def test_a_worker_that_died_leaves_a_failed_outcome_with_the_last_line_of_its_error(tmp_path: Path) -> None:
    keeper, file = Keeper(), tmp_path / "error.txt"
    for text in ("Traceback\n  line\nMemoryError: no room\n\n", None):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        keeper.keeper.on_trial_error(1, [], trial(error_file=str(file)))
    reasons = [outcomes[0].reason for outcomes, _ in keeper.driver.ends]
    assert reasons == ["the worker broke: MemoryError: no room", "the worker broke: no reason was left behind"]
    for (outcome,), weights in keeper.driver.ends:
        assert (outcome.id, outcome.state, outcome.candidate, weights) == ("t000", State.FAILED, CANDIDATE, {})


def test_after_an_error_of_the_driver_no_trial_starts_and_none_is_recorded() -> None:
    keeper = Keeper(breaks=True)
    keeper.complete(WITH_WEIGHTS)
    assert str(keeper.keeper.error) == "the disk is full"
    assert keeper.driver.num_given_up == 1
    keeper.states["t000"] = {"epoch": 4}
    keeper.keeper.on_trial_result(1, [], trial(), {"progress": {"epoch": 4}})
    assert keeper.driver.checkpoints == []


# Jobs


def test_the_product_of_a_job_is_handed_on_and_stays_for_other_workers() -> None:
    keeper = Keeper()
    keeper.complete_job("a profile")
    assert keeper.driver.products == [("profile-lfe", "a profile")]
    assert keeper.driver.ends == []
    assert keeper.products == {"profile-lfe": "a profile"}


def test_a_result_of_a_job_is_no_epoch() -> None:
    keeper = Keeper()
    keeper.states["profile-lfe"] = {"epoch": 4}
    keeper.keeper.on_trial_result(1, [], job(), {"done": True, "busy_s": 1.0})
    assert keeper.driver.checkpoints == []


def test_a_job_that_found_something_wrong_ends_the_sweep() -> None:
    keeper, error = Keeper(), ModelError("the logits are not finite")
    keeper.complete_job(error)
    assert keeper.keeper.error is error
    assert (keeper.driver.num_given_up, keeper.driver.products) == (1, [])


def test_the_first_error_is_the_one_that_is_told() -> None:
    keeper, error = Keeper(), ModelError("the logits are not finite")
    keeper.complete_job(error, "look")
    keeper.complete_job(NeedFailedError("the logits are not finite"), "sensitivity-3")
    assert keeper.keeper.error is error


def test_a_worker_that_died_in_a_job_ends_the_sweep_and_who_waits_for_the_product_is_told(tmp_path: Path) -> None:
    keeper, file = Keeper(), tmp_path / "error.txt"
    file.write_text("Traceback\n  line\nMemoryError: no room\n")
    keeper.keeper.on_trial_error(1, [], job("look", error_file=str(file)))
    assert str(keeper.keeper.error) == "look: the worker broke: MemoryError: no room"
    assert isinstance(keeper.keeper.error, SweepError)
    assert keeper.products == dict.fromkeys(["look", "dense"], keeper.keeper.error)  # the look publishes both
    assert (keeper.driver.num_given_up, keeper.driver.ends, keeper.driver.products) == (1, [], [])


def test_after_an_error_on_a_product_nothing_is_recorded() -> None:
    keeper = Keeper(breaks=True)
    keeper.complete_job("a profile")
    assert str(keeper.keeper.error) == "the disk is full"
    assert keeper.driver.num_given_up == 1
    keeper.driver._breaks = False
    keeper.complete(WITH_WEIGHTS)
    keeper.complete_job("another", "profile-merge")
    assert (keeper.driver.ends, keeper.driver.products) == ([], [])


def test_the_seconds_in_which_slots_worked_are_added_up() -> None:
    keeper = Keeper()
    keeper.complete(WITH_WEIGHTS, busy_s=2.0)
    keeper.complete_job("a profile", busy_s=0.5)
    keeper.complete_job("another", "profile-merge")
    assert keeper.keeper.busy_s == 2.5


def test_tune_may_pickle_it() -> None:
    """Tune saves its callbacks to resume by."""
    keeper = Keeper()
    keeper.keeper.error = ModelError("wrong")
    assert isinstance(cloudpickle.loads(cloudpickle.dumps(keeper.keeper)), Bookkeeper)
