"""Whole sweeps that start from another one or end early: by Ctrl-C, and by trials that are stopped at a rung."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from search.commands.run import run_sweep
from search.config import Config
from search.errors import SweepError
from search.front import front_of
from search.outcome import Candidate, Outcome, State
from search.records import ledger
from search.records.folder import Folder
from search.space import Space
from search.trial.warm_start import early_candidates
from tests.integration import sweeps
from tests.integration.sweeps import Sweep, Watcher

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("one_node")]


@pytest.fixture(scope="module")
def runs(first: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the sweep `tiny` of four trials."""
    runs = tmp_path_factory.mktemp("runs") / "runs"
    first.copy(runs)
    return runs


@pytest.fixture(scope="module")
def config_of(flag: Path) -> Callable[..., Config]:
    """A sweep of the model and the images of `tiny`, under another name."""

    def config_of(name: str, **sections: dict[str, Any]) -> Config:
        return sweeps.config(flag, **sections).model_copy(update={"name": name})

    return config_of


@dataclass(frozen=True)
class Interrupted:
    """A sweep of `vitfront run` that got Ctrl-C once, when it had tried the front of `tiny`."""

    folder: Folder
    wanted: tuple[Candidate, ...]
    exit_code: int
    stdout: str
    stderr: str

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return ledger.read(self.folder.ledger)


@pytest.fixture(scope="module")
def interrupted(first: Sweep, runs: Path, config_of: Callable[..., Config]) -> Interrupted:
    wanted = tuple(outcome.candidate for outcome in front_of(first.outcomes, first.front.goal))[:3]
    folder = Folder(runs, "long")
    with sweeps.start_vitfront(config_of("long", search={"trials": 500, "earlier": ["tiny"]}), runs.parent) as process:
        while not set(wanted) <= {outcome.candidate for outcome in ledger.read(folder.ledger)}:
            assert process.poll() is None, process.communicate()
            assert len(ledger.read(folder.ledger)) < 50
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=300)
    return Interrupted(folder, wanted, process.returncode, stdout, stderr)


def test_ctrl_c_finishes_what_runs_and_writes_the_front(interrupted: Interrupted) -> None:
    assert interrupted.exit_code == 0, interrupted.stderr
    outcomes = interrupted.outcomes
    assert 1 <= len(outcomes) < 500
    assert all(outcome.state is State.MEASURED for outcome in outcomes)
    front = interrupted.folder.read_front()
    assert (front.ended_by, front.trials) == ("interrupt", len(outcomes))
    assert "it was interrupted" in interrupted.stdout
    assert front.busy_share is not None
    assert 0 < front.busy_share <= 1


def test_sweep_begins_with_the_front_of_an_earlier_one(interrupted: Interrupted) -> None:
    assert interrupted.wanted
    tried = [outcome.candidate for outcome in interrupted.outcomes]
    early = early_candidates(Space(interrupted.folder.read_config().space, sweeps.DEPTH))
    assert set(early) | set(interrupted.wanted) <= set(tried[: len(early) + len(interrupted.wanted) + 2])  # of 2 slots


def test_other_images_teach_nothing(runs: Path, config_of: Callable[..., Config]) -> None:
    other = config_of("third", search={"earlier": ["tiny"]}, data={"val_images": 32}, space={"target_ratio": 0.5})
    with pytest.raises(SweepError, match=r"^sweep 'tiny' teaches nothing here: .*\(data.val_images\)$"):
        run_sweep(other, runs, Watcher())
    assert not (runs / "third").exists()


def test_trials_stopped_at_a_rung_are_told_so_and_are_not_on_the_front(
    runs: Path, config_of: Callable[..., Config]
) -> None:
    search = {"trials": 10, "reduction_factor": 3, "sampler": "random"}
    distill = {"epochs": 3, "batch_size": 64, "max_shift": 0}
    config = config_of("rungs", search=search, space={"recovery": "distill"}, distill=distill)
    front = run_sweep(config, runs, Watcher())
    folder = Folder(runs, "rungs")
    outcomes = ledger.read(folder.ledger)
    assert len(outcomes) == front.trials == 10
    stopped = [outcome for outcome in outcomes if outcome.state is State.STOPPED]
    measured = [outcome for outcome in outcomes if outcome.state is State.MEASURED]
    assert len(stopped) + len(measured) == 10
    assert len(stopped) >= 3
    assert all(outcome.reason and outcome.reason.startswith("not good enough at rung") for outcome in stopped)
    trained = [outcome for outcome in measured if outcome.same_as is None]
    assert {len(outcome.rungs) for outcome in trained} == {3}  # at first, before and in its training
    assert {point.id for point in front.points} <= {outcome.id for outcome in measured}
    assert not any(folder.checkpoints.glob("*.pt"))
