"""A tiny model with a profile and an exit, for tests of the commands."""

from __future__ import annotations

import pytest

from search.trial.context import TrialContext
from tests.search_tests import tiny


@pytest.fixture(scope="session")
def context() -> TrialContext:
    config = tiny.config(
        space={"method": ["cascade", "global"], "exit_block": [2, 3], "token_reduction": "lfe", "round_to": 8}
    )
    return tiny.prepared(config, tiny.inputs(config), timer=tiny.timer)[0]
