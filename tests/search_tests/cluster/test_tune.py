"""The driver's part at every epoch and at the end of every trial, without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search.cluster.tune import Bookkeeper
from search.errors import SweepError
from search.outcome import Outcome, State
from search.records.checkpoints import Checkpoint
from tests.search_tests import builders
from tests.search_tests.cluster.stores import DictStore

CANDIDATE = builders.candidate()
WITH_WEIGHTS = replace(builders.outcome("t000", 0.9, 1.5), has_weights=True)


class FakeRecorder:
    """Keeps all it is told, until it is told to break."""

    def __init__(self, breaks: bool = False, saturated: bool = False) -> None:
        self.checkpoints: list[Checkpoint] = []
        self.progress: list[Any] = []
        self.ends: list[tuple[Sequence[Outcome], Any]] = []
        self._breaks, self._saturated = breaks, saturated

    def is_saturated(self) -> bool:
        return self._saturated

    def epoch(self, checkpoint: Checkpoint, progress: Any) -> None:
        self.checkpoints.append(checkpoint)
        self.progress.append(progress)

    def ended(self, outcomes: Sequence[Outcome], weights: Any) -> None:
        if self._breaks:
            raise SweepError("the disk is full")
        self.ends.append((outcomes, weights))


class Driver:
    """A bookkeeper with its fakes."""

    def __init__(self, **recorder: bool) -> None:
        self.recorder, self.num_given_up = FakeRecorder(**recorder), 0
        self.states, self.weights, self.finetunes = DictStore(), DictStore(), DictStore()
        self.keeper = Bookkeeper(
            self.recorder,  # type: ignore[arg-type]
            states=self.states, weights=self.weights, finetunes=self.finetunes, give_up=self.give_up,
        )  # fmt: skip

    def give_up(self) -> None:
        self.num_given_up += 1

    def complete(self, *outcomes: Outcome, **result: Any) -> None:
        text = json.dumps([outcome.to_json() for outcome in outcomes])
        self.keeper.on_trial_complete(1, [], trial(last_result={"outcomes": text} | result))


def trial(**fields: Any) -> Any:
    """A trial as Tune hands it on."""
    return SimpleNamespace(config={"id": "t000", "candidate": asdict(CANDIDATE)}, **fields)


def test_an_epoch_is_recorded_with_the_state_that_its_worker_left() -> None:
    driver = Driver()
    driver.states["t000"] = {"epoch": 4}
    for _ in range(2):  # the second finds nothing: the first has taken what the worker left for both
        driver.keeper.on_trial_result(1, [], trial(), {"progress": {"epoch": 4}})
    assert driver.recorder.checkpoints == [Checkpoint(id="t000", candidate=CANDIDATE, state={"epoch": 4})]
    assert driver.recorder.progress == [{"epoch": 4}]
    assert driver.states == {}


def test_a_result_with_outcomes_is_no_epoch() -> None:
    driver = Driver()
    driver.states["t000"] = {"epoch": 4}
    driver.keeper.on_trial_result(1, [], trial(), {"outcomes": "[]", "rungs": [(0.5, 1.5)]})
    assert driver.recorder.checkpoints == []
    assert driver.states == {"t000": {"epoch": 4}}


def test_a_trial_that_ended_is_recorded_with_its_weights_and_then_shared() -> None:
    driver = Driver()
    driver.weights["t000"] = {"t000": {"bias": 1}}
    driver.complete(WITH_WEIGHTS, finetunes=["key"])
    assert driver.recorder.ends == [([WITH_WEIGHTS], {"t000": {"bias": 1}})]
    assert driver.weights == {}
    assert driver.finetunes == {"key": WITH_WEIGHTS}
    assert driver.num_given_up == 0


@pytest.mark.parametrize(
    "outcome",
    [builders.outcome("t000", 0.9, 1.5), replace(WITH_WEIGHTS, same_as="t007"), builders.failed("t000", State.STOPPED)],
    ids=["of its plan", "of another trial", "stopped"],
)
def test_weights_are_not_asked_for_where_there_are_none_of_its_own(outcome: Outcome) -> None:
    driver = Driver()
    driver.weights["t000"] = "left alone"
    driver.complete(outcome)
    assert driver.recorder.ends == [([outcome], {})]
    assert driver.weights == {"t000": "left alone"}


def test_a_worker_that_died_leaves_a_failed_outcome_with_the_last_line_of_its_error(tmp_path: Path) -> None:
    driver, file = Driver(), tmp_path / "error.txt"
    for text in ("Traceback\n  line\nMemoryError: no room\n\n", None):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        driver.keeper.on_trial_error(1, [], trial(error_file=str(file)))
    reasons = [outcomes[0].reason for outcomes, _ in driver.recorder.ends]
    assert reasons == ["the worker broke: MemoryError: no room", "the worker broke: no reason was left behind"]
    for (outcome,), weights in driver.recorder.ends:
        assert (outcome.id, outcome.state, outcome.candidate, weights) == ("t000", State.FAILED, CANDIDATE, {})


def test_after_an_error_of_the_recorder_no_trial_starts_and_none_is_recorded() -> None:
    driver = Driver(breaks=True)
    driver.complete(WITH_WEIGHTS)
    assert str(driver.keeper.error) == "the disk is full"
    assert driver.num_given_up == 1
    driver.states["t000"] = {"epoch": 4}
    driver.keeper.on_trial_result(1, [], trial(), {"progress": {"epoch": 4}})
    assert driver.recorder.checkpoints == []


def test_once_the_search_is_saturated_no_trial_starts() -> None:
    driver = Driver(saturated=True)
    driver.complete(WITH_WEIGHTS)
    assert driver.num_given_up == 1
    assert driver.keeper.error is None
    assert len(driver.recorder.ends) == 1
