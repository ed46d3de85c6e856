"""The recorder with a fake tracker, observer and clock: the order of its writes, resumes, weights and saturation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from search.config import SearchConfig
from search.front import running_hypervolume
from search.goal import Goal
from search.outcome import Candidate, Outcome, State
from search.records import ledger
from search.records.checkpoints import Checkpoint
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.records.recorder import Recorder, is_saturated
from tests.search_tests import builders

WEIGHTS = {"head.weight": torch.ones(2, 2)}


@dataclass
class FakeTracker:
    """Remembers what it is to write; with `error`, it cannot."""

    synced: list[tuple[list[str], list[float]]] = field(default_factory=list)
    logged: list[tuple[str, float, int]] = field(default_factory=list)
    error: Exception | None = None

    def sync(self, outcomes: Sequence[Outcome], hypervolumes: Sequence[float]) -> None:
        self.synced.append(([outcome.id for outcome in outcomes], list(hypervolumes)))

    def log(self, outcome: Outcome, hypervolume: float, number: int) -> None:
        if self.error is not None:
            raise self.error
        self.logged.append((outcome.id, hypervolume, number))


@dataclass
class FakeObserver:
    """Remembers the outcomes that it is told, and the ids that the ledger held by then."""

    ledger: Path
    finishes: list[tuple[str, float, list[str]]] = field(default_factory=list)
    epochs: list[tuple[str, Mapping[str, float]]] = field(default_factory=list)

    def stage(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None: ...

    def prepared(self, seconds: float) -> None: ...

    def started(self, trial_id: str, candidate: Candidate) -> None: ...

    def epoch(self, trial_id: str, progress: Mapping[str, float]) -> None:
        self.epochs.append((trial_id, progress))

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        self.finishes.append((outcome.id, hypervolume, [line.id for line in ledger.read(self.ledger)]))

    def interrupted(self) -> None: ...


class Sweep:
    """The folder of a sweep, with fakes around its recorder."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path, "digits")
        self.tracker, self.observer = FakeTracker(), FakeObserver(self.folder.ledger)
        self.now = 100.0

    def recorder(self, book: Ledger, goal: Goal = builders.GOAL, **search: Any) -> Recorder:
        return Recorder(
            SearchConfig(**search), goal, self.folder, book, self.tracker, self.observer, clock=lambda: self.now
        )

    def weights(self) -> list[str]:
        return sorted(path.stem for path in self.folder.weights.glob("*"))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def trained(id: str, top1: float, speedup: float) -> Outcome:
    return replace(builders.outcome(id, top1, speedup), has_weights=True)


def test_outcome_is_in_the_ledger_before_the_observer_and_the_tracker_hear_of_it(sweep: Sweep) -> None:
    outcomes = [builders.outcome("t000", 0.8, 2.0), builders.failed("t001"), builders.outcome("t002", 0.7, 3.0)]
    volumes = running_hypervolume(outcomes, builders.GOAL)
    with Ledger(sweep.folder.ledger) as book:
        recorder = sweep.recorder(book)
        for outcome in outcomes:
            recorder.ended([outcome], {})
        recorder.close()
    ids = ["t000", "t001", "t002"]
    assert sweep.observer.finishes == [(ids[n], volumes[n], ids[: n + 1]) for n in range(3)]
    assert sweep.tracker.logged == [(ids[n], volumes[n], n + 1) for n in range(3)]
    assert [outcome.id for outcome in recorder.outcomes] == ids
    assert recorder.outcomes == list(ledger.read(sweep.folder.ledger))


def test_exits_of_one_trial_are_recorded_together(sweep: Sweep) -> None:
    trial = [builders.outcome("t000", 0.8, 2.0), builders.outcome("t000.2", 0.7, 3.0)]
    with Ledger(sweep.folder.ledger) as book:
        sweep.recorder(book).ended(trial, {})
    assert [ids for _, _, ids in sweep.observer.finishes] == [["t000", "t000.2"]] * 2


def test_time_of_an_outcome_counts_from_the_start_and_stops_between_runs(sweep: Sweep) -> None:
    with Ledger(sweep.folder.ledger) as book:
        recorder = sweep.recorder(book)
        sweep.now = 107.5
        recorder.ended([builders.outcome("t000", 0.8, 2.0)], {})
    sweep.now = 5000.0
    with Ledger(sweep.folder.ledger) as book:
        recorder = sweep.recorder(book)
        sweep.now = 5002.0
        recorder.ended([builders.outcome("t001", 0.8, 2.0)], {})
    assert [outcome.ended_s for outcome in ledger.read(sweep.folder.ledger)] == [7.5, 9.5]


def test_resumed_sweep_goes_on_from_its_ledger_and_brings_the_tracker_up_to_date(sweep: Sweep) -> None:
    outcomes = [builders.outcome("t000", 0.8, 2.0), builders.outcome("t001", 0.6, 1.1)]
    with Ledger(sweep.folder.ledger) as book:
        book.append(*outcomes)
    with Ledger(sweep.folder.ledger) as book:
        recorder = sweep.recorder(book)
        recorder.ended([builders.outcome("t002", 0.7, 3.0)], {})
        recorder.close()
    volumes = running_hypervolume(recorder.outcomes, builders.GOAL)
    assert sweep.tracker.synced == [(["t000", "t001"], list(volumes[:2]))]
    assert sweep.tracker.logged == [("t002", volumes[2], 3)]


def test_tracker_that_breaks_is_heard_of_when_the_recorder_closes(sweep: Sweep) -> None:
    sweep.tracker.error = RuntimeError("no tables")
    with Ledger(sweep.folder.ledger) as book:
        recorder = sweep.recorder(book)
        recorder.ended([builders.outcome("t000", 0.8, 2.0)], {})
        with pytest.raises(RuntimeError, match="no tables"):
            recorder.close()
    assert [outcome.id for outcome in ledger.read(sweep.folder.ledger)] == ["t000"]


def test_checkpoint_of_an_epoch_is_kept_until_its_trial_ends(sweep: Sweep) -> None:
    with Ledger(sweep.folder.ledger) as book:
        recorder = sweep.recorder(book)
        for trial in ("t000", "t001"):
            recorder.epoch(Checkpoint(id=trial, candidate=builders.candidate(), state={"epoch": 1}), {"epoch": 1})
        recorder.ended([builders.failed("t000")], {})
        assert [checkpoint.id for checkpoint in recorder.checkpoints.read(done=())] == ["t001"]
    assert sweep.observer.epochs == [("t000", {"epoch": 1}), ("t001", {"epoch": 1})]


def test_weights_are_kept_while_their_model_may_be_on_the_front(sweep: Sweep) -> None:
    with Ledger(sweep.folder.ledger) as book:
        recorder = sweep.recorder(book)
        recorder.ended([trained("t000", 0.8, 2.0)], {"t000": WEIGHTS})
        worse_within_the_noise = trained("t001", 0.7, 1.98)
        recorder.ended([worse_within_the_noise], {"t001": WEIGHTS})
        assert sweep.weights() == ["t000", "t001"]
        better_than_both = trained("t002", 0.8, 3.0)
        recorder.ended([better_than_both], {"t002": WEIGHTS})
        assert sweep.weights() == ["t002"]
        beaten_when_it_ends = trained("t003", 0.5, 1.2)
        recorder.ended([beaten_when_it_ends], {"t003": WEIGHTS})
        recorder.ended([builders.failed("t004")], {})
    assert sweep.weights() == ["t002"]


def test_weights_that_a_later_outcome_shares_are_kept_with_it(sweep: Sweep) -> None:
    shared = replace(trained("t001", 0.8, 2.0), same_as="t000")
    with Ledger(sweep.folder.ledger) as book:
        recorder = sweep.recorder(book)
        recorder.ended([trained("t000", 0.8, 2.0)], {"t000": WEIGHTS})
        recorder.ended([shared], {})
    assert sweep.weights() == ["t000"]


def test_model_beyond_a_limit_keeps_no_weights_and_beats_nobody(sweep: Sweep) -> None:
    goal = Goal.of(builders.DENSE, "top1", ["top1 >= 0.6"])
    with Ledger(sweep.folder.ledger) as book:
        recorder = sweep.recorder(book, goal)
        recorder.ended([trained("t000", 0.7, 1.5)], {"t000": WEIGHTS})
        recorder.ended([trained("t001", 0.55, 9.0)], {"t001": WEIGHTS})
    assert sweep.weights() == ["t000"]
    assert sweep.observer.finishes[0][1] == sweep.observer.finishes[1][1] > 0


def test_resumed_sweep_keeps_the_weights_of_its_contenders(sweep: Sweep) -> None:
    with Ledger(sweep.folder.ledger) as book:
        sweep.recorder(book).ended([trained("t000", 0.8, 2.0)], {"t000": WEIGHTS})
    with Ledger(sweep.folder.ledger) as book:
        sweep.recorder(book).ended([trained("t001", 0.9, 1.0)], {"t001": WEIGHTS})
    assert sweep.weights() == ["t000", "t001"]


def test_search_is_saturated_by_measured_trials_alone(sweep: Sweep) -> None:
    beaten = builders.outcome("t001", 0.5, 1.1)
    with Ledger(sweep.folder.ledger) as book:
        recorder = sweep.recorder(book, patience=2, min_gain=0.01)
        recorder.ended([builders.outcome("t000", 0.8, 2.0)], {})
        recorder.ended([beaten, replace(beaten, id="t001.2"), replace(beaten, id="t001.1")], {})
        recorder.ended([builders.failed("t002")], {})
        recorder.ended([builders.failed("t003", State.STOPPED)], {})
        assert not recorder.is_saturated()
        recorder.ended([replace(beaten, id="t004")], {})
        assert recorder.is_saturated()
    with Ledger(sweep.folder.ledger) as book:
        assert sweep.recorder(book, patience=2, min_gain=0.01).is_saturated()
        assert not sweep.recorder(book, patience=3, min_gain=0.01).is_saturated()


@pytest.mark.parametrize(
    ("volumes", "patience", "expected"),
    [
        ([], 1, False),
        ([1.0], 1, False),
        ([1.0, 1.0], 1, True),
        ([1.0, 1.0], 2, False),
        ([0.5, 1.0, 1.0, 1.0], 2, True),
        ([0.5, 1.0, 1.0, 1.0], 3, False),
        ([1.0, 1.0, 1.02], 2, False),
        ([1.0, 1.0, 1.02, 1.02], 2, False),
        ([1.0, 1.0, 1.02, 1.02, 1.02], 2, True),
        ([1.0] * 10, 0, False),
        ([0.0] * 10, 3, False),  # nothing was found yet: that is not saturation
    ],
)
def test_a_search_is_saturated_when_its_last_trials_gained_too_little(
    volumes: list[float], patience: int, expected: bool
) -> None:
    assert is_saturated(volumes, patience, 0.01) is expected
