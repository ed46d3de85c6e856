"""Rules for tests beside each other: one thread, whole sweeps together and last, tests marked `alone` alone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: more only wait for each other

import pytest
import torch

SWEEPS = "tests/integration/"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves whole sweeps to the end of any order: the other worker has few tests left then that wait for them."""
    items.sort(key=lambda item: item.nodeid.startswith(SWEEPS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Sends each file to one worker of pytest-xdist, and all whole sweeps to one, which starts Ray once."""
    from xdist.scheduler import LoadScopeScheduling  # only where pytest-xdist is used

    class FilesScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SWEEPS if nodeid.startswith(SWEEPS) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # files stay in their order, whole sweeps last
    return FilesScheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Gives every test and its fixtures one thread, also after a test of a command that took more."""
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Runs a test marked `alone` while no other worker of pytest-xdist runs one, its fixtures too."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with _turn(is_alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _turn(is_alone: bool) -> Iterator[None]:
    """Holds a lock that all tests share but those marked `alone`; nobody overtakes a test that waits for it."""
    with ExitStack() as held:
        with _locked(Path(__file__).parent, fcntl.LOCK_EX):
            held.enter_context(_locked(Path(__file__), fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH))
        yield


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, kind)
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open too
        os.close(file)
