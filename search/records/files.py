"""Files among processes that may be killed, or meet: written whole or not at all, by one at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from search.errors import SweepError


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to `path`; whoever reads sees the old file or the new one, even after a power cut.

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
    """Has a function write a draft, which then takes the place of `path`.

    Raises:
        SweepError: the file cannot be written; the old one is untouched.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch's own for a full disk
        draft.unlink(missing_ok=True)
        told = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SweepError(f"cannot write {path}: {told}") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: fsync of a file does not cover its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is within this for the same folder, and keeps the others out meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
