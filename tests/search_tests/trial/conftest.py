"""The tiny model, prepared once for all tests of trials. They leave it as it is."""

from __future__ import annotations

import pytest

from search.outcome import Measurement
from search.trial.context import TrialContext
from tests.search_tests import tiny
from tests.search_tests.trial import trials


@pytest.fixture(scope="session")
def prepared() -> tuple[TrialContext, Measurement]:
    """A model that knows its noise by heart, so that pruning costs accuracy on the probe images; and what it does."""
    config = trials.config(model__training={"epochs": 30, "max_shift": 0, "max_turn": 0, "batch_size": 8})
    inputs = tiny.inputs(config, trained=False)
    return tiny.prepared(config, inputs, timer=tiny.timer, time_widths=tiny.time_widths)


@pytest.fixture(scope="session")
def context(prepared: tuple[TrialContext, Measurement]) -> TrialContext:
    return prepared[0]


@pytest.fixture(scope="session")
def dense(prepared: tuple[TrialContext, Measurement]) -> Measurement:
    return prepared[1]
