"""Whole sweeps that end early: by themselves, by Ctrl-C, and by trials that are stopped at a rung."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from search.commands.run import run_sweep
from search.config import Config
from search.errors import SweepError
from search.front import front_of
from search.outcome import State
from search.records import ledger
from search.records.folder import Folder
from tests.integration import sweeps
from tests.integration.sweeps import Watcher

pytestmark = pytest.mark.usefixtures("one_node")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the sweep `tiny` of four trials."""
    runs = tmp_path_factory.mktemp("runs")
    run_sweep(sweeps.config(None), runs, Watcher())
    return runs


def config(name: str, **sections: dict[str, Any]) -> Config:
    return sweeps.config(None, **sections).model_copy(update={"name": name})


def started(config: Config, runs: Path) -> subprocess.Popen[str]:
    recipe = runs / f"{config.name}.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "search.cli", "run", str(recipe), "--name", config.name, "--runs", str(runs)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_a_trial(folder: Folder, process: subprocess.Popen[str]) -> None:
    while not ledger.read(folder.ledger):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.fixture
def long_sweep(runs: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], Folder]]:
    name = f"long-{request.node.name[5:15]}"
    process, folder = started(config(name, search={"trials": 500}), runs), Folder(runs, name)
    wait_for_a_trial(folder, process)
    yield process, folder
    process.kill()
    process.wait()


def test_ctrl_c_finishes_what_runs_and_writes_the_front(
    long_sweep: tuple[subprocess.Popen[str], Folder],
) -> None:
    process, folder = long_sweep
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    outcomes = ledger.read(folder.ledger)
    assert 1 <= len(outcomes) < 500
    assert all(outcome.state is State.MEASURED for outcome in outcomes)
    record = folder.read_front()
    assert (record["ended_by"], record["trials"]) == ("interrupt", len(outcomes))
    assert "it was interrupted" in out


def test_second_ctrl_c_leaves_at_once_and_loses_nothing(long_sweep: tuple[subprocess.Popen[str], Folder]) -> None:
    process, folder = long_sweep
    before = folder.ledger.read_bytes()
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "waiting for those that run" not in process.stderr.readline():
        assert process.poll() is None
    while process.poll() is None:  # Python loses an interrupt that comes while it cleans up an object
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
    assert process.returncode != 0
    assert folder.ledger.read_bytes().startswith(before)
    assert not folder.front.is_file()


def test_search_that_finds_no_more_ends_and_is_finished(runs: Path) -> None:
    wanted = config("saturated", search={"trials": 50, "patience": 2, "min_gain": 1.0})
    record = run_sweep(wanted, runs, Watcher())
    assert record["ended_by"] == "saturation"
    assert 3 <= record["trials"] < 10
    again = Watcher()
    assert run_sweep(wanted, runs, again) == json.loads(json.dumps(record))
    assert again.started_ids == []
    longer = config("saturated", search={"trials": record["trials"] + 1, "patience": 0})
    assert run_sweep(longer, runs, Watcher())["ended_by"] == "trials"


def test_sweep_begins_with_the_front_of_an_earlier_one(runs: Path) -> None:
    earlier = ledger.read(Folder(runs, "tiny").ledger)
    run_sweep(config("second", search={"trials": 3, "earlier": ["tiny"]}), runs, Watcher())
    tried = [outcome.candidate for outcome in ledger.read(Folder(runs, "second").ledger)]
    wanted = [outcome.candidate for outcome in front_of(earlier)][:3]
    assert set(wanted) <= set(tried)


def test_other_images_teach_nothing(runs: Path) -> None:
    other = config("third", search={"earlier": ["tiny"]}, data={"val_images": 32}, space={"target_ratio": 0.5})
    with pytest.raises(SweepError, match=r"^sweep 'tiny' teaches nothing here: .*\(data.val_images\)$"):
        run_sweep(other, runs, Watcher())
    assert not (runs / "third").exists()


def test_trials_stopped_at_a_rung_are_told_so_and_are_not_on_the_front(runs: Path) -> None:
    search = {"trials": 10, "reduction_factor": 3, "sampler": "random"}
    distill = {"epochs": 3, "batch_size": 64, "max_shift": 0}
    record = run_sweep(config("rungs", search=search, space={"recovery": "distill"}, distill=distill), runs, Watcher())
    folder = Folder(runs, "rungs")
    outcomes = ledger.read(folder.ledger)
    assert len(outcomes) == record["trials"] == 10
    stopped = [outcome for outcome in outcomes if outcome.state is State.STOPPED]
    measured = [outcome for outcome in outcomes if outcome.state is State.MEASURED]
    assert len(stopped) + len(measured) == 10
    assert len(stopped) >= 3
    assert all(outcome.reason and outcome.reason.startswith("not good enough at rung") for outcome in stopped)
    assert {len(each.rungs) for each in measured if each.same_as is None} == {3}  # at first, before and in its training
    assert {point["id"] for point in record["points"]} <= {outcome.id for outcome in measured}
    assert not any(folder.checkpoints.glob("*.pt"))
