"""Files of processes that may be killed or meet: written wholly or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pruning.errors import first_line_of
from search.errors import SweepError


def write_atomically(path: Path, text: str) -> None:
    """Writes a text to a file, durably: a reader sees the old file or the new one, even after a power cut.

    Raises:
        SweepError: the file cannot be written; the old one is untouched.
    """

    def write(draft: Path) -> None:
        with draft.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    write_by(path, write)
    sync_folder(path.parent)


def write_by(path: Path, write: Callable[[Path], None]) -> None:
    """Lets a function write a draft, which then takes the place of a file.

    Args:
        write: writes the draft at the path that it is given, beside the file.

    Raises:
        SweepError: the file cannot be written; the old one is untouched.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch's own for a full disk
        draft.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or first_line_of(error)
        raise SweepError(f"cannot write {path}: {reason}") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: fsync of a file does not cover its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder: waits until no other process holds it, and keeps the others waiting meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
