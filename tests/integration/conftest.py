"""Fixtures that whole sweeps share: Ray, a model that dies when it is told to, and one finished sweep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from search.commands.run import run_sweep
from tests.integration import sweeps
from tests.integration.sweeps import NUM_TRIALS, Sweep, Watcher


@pytest.fixture(scope="session", autouse=True)
def no_ray_is_left() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def one_node() -> None:
    """Ray that runs on from file to file."""
    sweeps.start_ray()


@pytest.fixture(scope="session")
def flag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that kills a worker."""
    return tmp_path_factory.mktemp("flag") / "die"


@pytest.fixture(scope="session")
def first(flag: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep in which a worker is killed as soon as all is prepared. Who would change it takes a copy."""
    sweeps.start_ray()
    runs = tmp_path_factory.mktemp("first") / "runs"
    watcher = Watcher(on_prepared=flag.touch)
    config = sweeps.config(flag, search={"trials": NUM_TRIALS})
    return Sweep(runs, config, watcher, run_sweep(config, runs, watcher))
