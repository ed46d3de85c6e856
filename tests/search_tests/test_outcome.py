"""Outcomes to JSON and back, and what an outcome must have."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from search.outcome import Candidate, Outcome, State
from tests.search_tests import made

OUTCOMES = [
    made.outcome("t000", 0.9, 1.5),
    made.outcome("t001", 0.9, 1.5, top1_test=0.88),
    made.failed("t002", reason="RuntimeError: \N{SNOWMAN}"),
    made.failed("t003", State.INFEASIBLE),
    made.failed("t004", State.STOPPED),
]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: outcome.id)
def test_outcome_survives_json(outcome: Outcome) -> None:
    read = Outcome.from_json(json.loads(json.dumps(outcome.to_json())))
    assert read == outcome
    assert hash(read.candidate) == hash(outcome.candidate)


def test_outcome_is_written_in_plain_words() -> None:
    record = OUTCOMES[2].to_json()
    assert record["state"] == "failed"
    assert record["plan"] is None
    assert record["measurement"] is None


def test_candidate_survives_json() -> None:
    candidate = made.candidate()
    read = Candidate.from_json(json.loads(json.dumps(asdict(candidate))))
    assert read == candidate


def test_params_are_named_as_in_the_search_space_and_leave_out_what_has_no_effect() -> None:
    assert made.candidate(exit_block=2).to_params() == {
        "cutoff_channel": 0.1,
        "cutoff_token": 0.8,
        "token_share": 0.5,
        "target_ratio": 0.6,
        "exit_block": 2,
        "drop_budget.0": 1.5,
        "drop_budget.1": 0.5,
    }
    assert made.candidate(exit_block=3).to_params()["drop_budget.2"] == 0.25


@pytest.mark.parametrize(
    "wrong",
    [
        {"measurement": None},
        {"plan": None},
        {"state": State.FAILED, "reason": "it has a measurement all the same"},
    ],
)
def test_measurement_and_state_must_agree(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        replace(OUTCOMES[0], **wrong)


@pytest.mark.parametrize("reason", [None, ""])
def test_outcome_without_a_measurement_must_say_why(reason: str | None) -> None:
    with pytest.raises(AssertionError, match="says why"):
        replace(OUTCOMES[2], reason=reason)


@pytest.mark.parametrize("change", [{"state": "lost"}, {"speed": 3}])
def test_record_of_something_else_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Outcome.from_json(OUTCOMES[0].to_json() | change)
