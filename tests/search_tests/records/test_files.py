"""Files written wholly or not at all, and the lock of a folder."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from search.errors import SweepError
from search.records.files import alone_in, sync_folder, write_atomically, write_by
from tests.search_tests.disk import largest_file


def test_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    write_atomically(path, "old")
    write_atomically(path, "new \N{SNOWMAN}\n")
    assert path.read_bytes() == "new \N{SNOWMAN}\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_keeps_to_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "front.json", "text")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "front.json").stat().st_mode) == 0o640


def test_atomic_write_that_fails_keeps_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    write_atomically(path, "old")
    with largest_file(100), pytest.raises(SweepError, match=r"cannot write .*front\.json: File too large"):
        write_atomically(path, "x" * 1000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_into_a_missing_folder_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"cannot write .*missing/front\.json: No such file"):
        write_atomically(tmp_path / "missing" / "front.json", "text")


def test_alone_in_keeps_others_out_until_it_ends(tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        with alone_in(tmp_path), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(other)


def test_draft_that_a_function_writes_takes_the_place_of_the_file(tmp_path: Path) -> None:
    path, drafts = tmp_path / "weights.pt", list[Path]()
    path.write_text("old")

    def write(draft: Path) -> None:
        assert path.read_text() == "old"
        draft.write_text("new")
        drafts.append(draft)

    write_by(path, write)
    assert path.read_text() == "new"
    assert drafts[0].parent == tmp_path
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("file write failed\nat inline_container.cc:603"), "file write failed"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_write_that_fails_half_way_keeps_the_old_file_and_says_why_in_one_line(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    path = tmp_path / "weights.pt"
    path.write_text("old")

    def write(draft: Path) -> None:
        draft.write_text("ne")
        raise error

    with pytest.raises(SweepError, match=rf"^cannot write .*weights\.pt: {reason}$"):
        write_by(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_error_of_ones_own_is_not_taken_for_the_disks(tmp_path: Path) -> None:
    def write(draft: Path) -> None:
        raise KeyError("mistake")

    with pytest.raises(KeyError, match="mistake"):
        write_by(tmp_path / "file", write)


def test_missing_folder_cannot_be_made_durable(tmp_path: Path) -> None:
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")
