"""Checkpoints of trials that train: written each epoch, read by the next run, removed when their trial has ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from search.errors import SweepError
from search.records.checkpoints import Checkpoint, Checkpoints
from tests.search_tests import builders
from tests.search_tests.disk import largest_file


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def checkpoint(id: str, epoch: int = 1, size: int = 3) -> Checkpoint:
    state = {"epoch": epoch, "model": {"weight": torch.arange(size, dtype=torch.float32)}, "losses": [0.5, 0.25]}
    return Checkpoint(id=id, candidate=builders.candidate(exit_block=3), state=state)


def test_checkpoint_comes_back_as_it_was_written(checkpoints: Checkpoints) -> None:
    checkpoints.write(checkpoint("t003"))
    (read,) = checkpoints.read(done=())
    assert (read.id, read.candidate) == ("t003", builders.candidate(exit_block=3))
    assert (read.state["epoch"], read.state["losses"]) == (1, [0.5, 0.25])
    assert torch.equal(read.state["model"]["weight"], torch.arange(3, dtype=torch.float32))


def test_later_epoch_takes_the_place_of_an_earlier_one(checkpoints: Checkpoints) -> None:
    checkpoints.write(checkpoint("t003", epoch=1))
    checkpoints.write(checkpoint("t003", epoch=2))
    assert [read.state["epoch"] for read in checkpoints.read(done=())] == [2]
    assert [path.name for path in checkpoints.folder.iterdir()] == ["t003.pt"]


def test_checkpoints_are_read_by_trial_and_those_of_ended_trials_are_removed(checkpoints: Checkpoints) -> None:
    for id in ("t010", "t002", "t007"):
        checkpoints.write(checkpoint(id))
    assert [read.id for read in checkpoints.read(done={"t007", "t099"})] == ["t002", "t010"]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["t002.pt", "t010.pt"]


def test_removed_checkpoint_is_gone_and_a_trial_without_one_may_be_removed(checkpoints: Checkpoints) -> None:
    checkpoints.write(checkpoint("t003"))
    checkpoints.remove("t003")
    checkpoints.remove("t004")
    assert checkpoints.read(done=()) == []


def test_sweep_that_trained_nothing_has_no_checkpoints_and_no_folder_for_them(checkpoints: Checkpoints) -> None:
    assert checkpoints.read(done=()) == []
    assert not checkpoints.folder.exists()


def test_full_disk_keeps_the_checkpoint_of_the_epoch_before(checkpoints: Checkpoints) -> None:
    checkpoints.write(checkpoint("t003", epoch=1))
    with largest_file(4000), pytest.raises(SweepError, match=r"cannot write .*t003\.pt: "):
        checkpoints.write(checkpoint("t003", epoch=2, size=10_000))
    assert [read.state["epoch"] for read in checkpoints.read(done=())] == [1]
    assert [path.name for path in checkpoints.folder.iterdir()] == ["t003.pt"]


class NotPlain:
    """An object that only unpickling could bring back."""


@pytest.mark.parametrize("content", ["bytes", "no state", "class"])
def test_file_that_is_no_checkpoint_is_named_in_one_line(checkpoints: Checkpoints, content: str) -> None:
    checkpoints.write(checkpoint("t003"))
    path = checkpoints.folder / "t003.pt"
    if content == "bytes":
        path.write_bytes(b"PK not really")
    else:
        record = torch.load(path, weights_only=True)
        torch.save({"candidate": record["candidate"]} if content == "no state" else record | {"x": NotPlain()}, path)
    with pytest.raises(SweepError, match=r"cannot read .*t003\.pt .*; remove it to run its trial anew") as raised:
        checkpoints.read(done=())
    assert "\n" not in str(raised.value)
