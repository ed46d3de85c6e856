"""The progress of a trial by a clock of its own: epochs, rungs, and the state from which another process goes on."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from search.trial.progress import TrialProgress, on_cpu


class Clock:
    """A clock that a test sets; it begins at some time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class CountingTraining:
    """A training of three epochs whose only weight counts them."""

    def __init__(self) -> None:
        self.weight = torch.zeros(1)

    @property
    def is_done(self) -> bool:
        return int(self.weight) == 3

    def run_epoch(self) -> dict[str, float]:
        self.weight += 1
        return {"loss": 1 / float(self.weight)}

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load(self, state: Mapping[str, Any]) -> None:
        self.weight = state["weight"].clone()


def reread(state: dict[str, Any]) -> Any:
    """Gives a state as another process reads it: tensors and plain containers alone."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> TrialProgress:
    return TrialProgress(clock=clock)


def test_progress_begins_with_nothing(progress: TrialProgress, clock: Clock) -> None:
    clock.now += 2.5
    assert progress.record() == {"seconds": 2.5, "rungs": (), "rung_spans": (), "history": ()}
    assert progress.before("distill") is None


def test_rungs_add_up_and_tell_when_each_was_measured(progress: TrialProgress, clock: Clock) -> None:
    def measure() -> tuple[float, float]:
        clock.now += 2.0
        return 0.75, 1.5

    first = progress.rung(measure)
    clock.now += 10.0
    second = progress.rung(lambda: (0.5, 2.0))
    assert (first.values, first.spans) == (((0.75, 1.5),), ((0.0, 2.0),))
    assert (second.values, second.spans) == (((0.75, 1.5), (0.5, 2.0)), ((0.0, 2.0), (12.0, 12.0)))
    assert (progress.record()["rungs"], progress.record()["rung_spans"]) == (second.values, second.spans)


def test_epochs_tell_their_number_and_their_loss(progress: TrialProgress) -> None:
    epochs = [epoch.progress for epoch in progress.train("distill", CountingTraining(), {})]
    assert epochs == [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}, {"epoch": 3, "loss": 1 / 3}]
    assert progress.record()["history"] == ({"loss": 1.0}, {"loss": 0.5}, {"loss": 1 / 3})


def test_another_process_goes_on_from_an_epochs_state(progress: TrialProgress, clock: Clock) -> None:
    progress.rung(lambda: (0.75, 1.5))
    epochs = progress.train("distill", CountingTraining(), {"plan": "of before"})
    next(epochs)
    clock.now += 60.0
    state = reread(next(epochs).state())
    later = Clock()
    later.now = 9000.0
    resumed, training = TrialProgress(state, later), CountingTraining()
    assert resumed.before("distill") == {"plan": "of before"}
    assert resumed.before("learned") is None
    assert resumed.record() == {
        "seconds": 60.0, "rungs": ((0.75, 1.5),), "rung_spans": ((0.0, 0.0),),
        "history": ({"loss": 1.0}, {"loss": 0.5}),
    }  # fmt: skip
    assert [epoch.progress["epoch"] for epoch in resumed.train("distill", training, {})] == [3]
    later.now += 1.0
    assert resumed.seconds == 61.0


def test_training_of_another_stage_starts_afresh(progress: TrialProgress) -> None:
    state = next(iter(progress.train("soft-mask", CountingTraining(), {}))).state()
    resumed = TrialProgress(reread(state))
    assert len(list(resumed.train("distill", CountingTraining(), {}))) == 3
    assert len(resumed.record()["history"]) == 4


def test_state_is_that_of_the_moment(progress: TrialProgress) -> None:
    def states() -> Iterator[dict[str, Any]]:
        for epoch in progress.train("distill", CountingTraining(), {}):
            yield epoch.state()

    kept = list(states())
    assert [float(state["training"]["weight"]) for state in kept] == [1.0, 2.0, 3.0]
    assert [len(state["history"]) for state in kept] == [1, 2, 3]


def test_tensors_of_a_tree_are_copied_and_all_else_is_left() -> None:
    weight = torch.ones(2, requires_grad=True)
    copied = on_cpu({"a": [weight, 3], "b": "text"})
    assert torch.equal(copied["a"][0], weight) and copied["a"][0] is not weight
    assert not copied["a"][0].requires_grad
    assert (copied["a"][1], copied["b"]) == (3, "text")
