"""Exclusive use of a device while a model is timed: other work on it waits between two batches.

Readers and a writer: work (pruning, training) holds a shared lease, timing an exclusive one. A lease is an flock on two
files of this machine, so it counts between all processes that use them, whatever sweep they belong to, and the kernel
frees it at once when its holder dies. A device of another node is another device: nodes share no file.

Two files, so that a writer is not starved by readers that come and go (a turnstile): a writer locks the gate, then the
body, and holds both. A reader passes the gate and holds the body. While a writer waits for the readers that are in,
nobody passes the gate, and those that are in find it locked, and leave, at their next `yield_device`.

The files lie in the temporary folder, one folder a user. Processes that do not see each other's (containers) share a
device without knowing; VITFRONT_LEASES names a folder for all of them.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pruning.device_sharing import calling_on_yield


class Lease:
    """The right to use one device, with others or alone, for one thread of this process.

    with lease.shared():
        ...  # loops over batches pause for whoever wants the device alone
        with lease.exclusive():
            ...  # nobody else uses it

    Within an exclusive lease nothing waits. Where files cannot be locked, work goes on without a lease, and a
    warning says so, once.
    """

    def __init__(self, folder: Path, name: str, synchronize: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            folder: for the files; made when needed.
            name: of the device; the files' names begin with it.
            synchronize: waits until the device has done all that this process asked of it.
        """
        self._folder, self._name, self._synchronize = folder, name, synchronize
        self._kind = fcntl.LOCK_UN
        self._files = ExitStack()
        self._gate: int | None = None
        """None while no file is locked."""
        self._is_refused = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Holds the device with others, for work; `pruning.device_sharing.yield_device` is then this lease's."""
        with self._held(fcntl.LOCK_SH), calling_on_yield(self.yield_device):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the device alone, for timing.

        A shared lease around it is released first: two processes that wait for each other's would wait for ever.
        """
        with self._held(fcntl.LOCK_EX):
            yield

    def yield_device(self) -> None:
        """Releases the device if another process waits to have it alone; blocks until it is held again.

        Costs some microseconds if nobody waits.
        """
        if self._kind != fcntl.LOCK_SH or self._gate is None:  # a writer's own gate is locked by itself
            return
        try:
            fcntl.flock(self._gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        except BlockingIOError:
            self._change(fcntl.LOCK_SH)

    @contextmanager
    def _held(self, kind: int) -> Iterator[None]:
        before = self._kind
        if before in (kind, fcntl.LOCK_EX):
            yield
            return
        self._change(kind)
        try:
            yield
        finally:
            self._change(before)

    def _change(self, kind: int) -> None:
        """Releases the locks that are held, then takes those of a kind."""
        try:
            if self._gate is not None:
                self._synchronize()  # what was queued within the lease must not run after it
        finally:
            self._kind, self._gate = fcntl.LOCK_UN, None
            self._files.close()
        if kind == fcntl.LOCK_UN:
            return
        if not self._is_refused:
            try:
                self._take(kind)
            except OSError as error:
                self._is_refused = True
                warnings.warn(
                    f"models are timed while others may use the device: {error}; "
                    "let VITFRONT_LEASES name a folder of yours whose files can be locked",
                    RuntimeWarning, stacklevel=2,
                )  # fmt: skip
        self._kind = kind

    def _take(self, kind: int) -> None:
        """Waits for the locks of a kind.

        The files are opened anew, for somebody may have cleared the temporary folder.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder.lstat().st_uid not in (os.getuid(), 0):
            raise PermissionError(f"{self._folder} belongs to another user")
        with ExitStack() as files:  # closes the body before the gate
            gate, body = (
                files.enter_context(open(self._folder / f"{self._name}.{part}", "ab")).fileno()
                for part in ("gate", "body")
            )
            fcntl.flock(gate, kind)
            fcntl.flock(body, kind)
            if kind == fcntl.LOCK_SH:
                fcntl.flock(gate, fcntl.LOCK_UN)
            self._files, self._gate = files.pop_all(), gate


_leases: dict[tuple[Path, str], Lease] = {}


def lease_of(name: str, synchronize: Callable[[], None]) -> Lease:
    """Gives the lease of a device: one object in a process, so that the process never waits for itself.

    Args:
        name: tells the device from all others of this machine.
        synchronize: as `Lease` takes it.
    """
    named = os.environ.get("VITFRONT_LEASES")
    folder = Path(named or Path(tempfile.gettempdir(), f"vitfront-leases-{os.getuid()}"))
    return _leases.setdefault((folder, name), Lease(folder, name, synchronize))
