"""The ledger of a sweep: one JSON line an outcome, only ever appended. A sweep resumes from its ledger.

A line counts once its newline is on the disk. Bytes after the last newline are the torn line of a killed driver:
readers ignore them, the next writer cuts them off.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from search.errors import SweepError
from search.outcome import Outcome
from search.records.files import sync_folder


def read(path: Path) -> tuple[Outcome, ...]:
    """Reads the outcomes so far, also while a sweep is writing; there are none if there is no file.

    Raises:
        SweepError: the file cannot be read, or one of its lines is not an outcome.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise _unusable(path, error) from error
    return tuple(_parse(path, number, line) for number, line in enumerate(data.split(b"\n")[:-1], start=1))


class Ledger:
    """A ledger opened for writing, by one process at a time.

    with Ledger(runs / "digits" / "outcomes.jsonl") as ledger:
        done = ledger.found
        ledger.append(outcome)
    """

    def __init__(self, path: Path) -> None:
        """Creates the file and its folder if need be, and locks it until `close` or the end of the process.

        Raises:
            SweepError: another process writes it, a line is broken, or the disk refuses.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            self._lock()
            self.found: tuple[Outcome, ...] = read(path)
            """Outcomes that the ledger held when it was opened."""
            self._end = self._cut_torn_line()
            sync_folder(path.parent)
        except OSError as error:
            self.close()
            raise _unusable(path, error) from error
        except SweepError:
            self.close()
            raise

    def append(self, *outcomes: Outcome) -> None:
        """Adds outcomes; when this returns, they are on the disk.

        Raises:
            SweepError: the disk refuses (full, gone, over quota); the ledger is as it was before.
        """
        lines = b"".join(json.dumps(outcome.to_json()).encode() + b"\n" for outcome in outcomes)
        try:
            written = 0
            while written < len(lines):  # unbuffered: after a failure no half line waits to be flushed later
                written += os.write(self._handle, lines[written:])
            os.fsync(self._handle)
        except OSError as error:
            with suppress(OSError):  # on a dying disk the half line stays, and counts as torn
                os.ftruncate(self._handle, self._end)
            raise _unusable(self.path, error) from error
        self._end += len(lines)

    def close(self) -> None:
        """Closes the file and gives its lock back."""
        os.close(self._handle)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        # flock, not lockf: a lockf lock is lost as soon as this process closes any handle of the file, as `read` does.
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SweepError(
                f"the sweep of {self.path} is being run by another process; wait for it, or take another --name"
            ) from None

    def _cut_torn_line(self) -> int:
        end = self.path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._handle, end)
        return end


def _parse(path: Path, number: int, line: bytes) -> Outcome:
    try:
        return Outcome.from_json(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        reason = f"{type(error).__name__} {error}"
        raise SweepError(f"{path}, line {number} is not an outcome ({reason}); repair or remove the line") from error


def _unusable(path: Path, error: OSError) -> SweepError:
    return SweepError(f"cannot use the ledger {path}: {error.strerror}")
