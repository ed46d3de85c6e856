"""A pytest plugin of `mutate.py`: runs the tests that a file lists, in its order, and notes the first that fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(Path(os.environ["CHOSEN_TESTS"]).read_text().splitlines())}
    items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    note = Path(os.environ["FAILED_TEST"])
    if report.failed and not note.exists():
        note.write_text(report.nodeid)
