"""A Ray of our own, for tests of whole sweeps in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def one_node() -> Iterator[None]:
    """Ray for all sweeps of a file, so that they share its workers; one core, so that trials follow each other."""
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
