"""Outcomes to JSON and back, and what an outcome must have."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest

from pruning.model.tokens import REDUCERS
from pruning.plan import TOKEN_REDUCTIONS, TokenReduction
from pruning.scores.criteria import CRITERIA
from search.outcome import FILTERED, Candidate, Outcome, RoundTo, State, idle_share
from tests.search_tests import builders

GLOBAL: dict[str, Any] = {"method": "global", "drop_budget": (0.0,) * 3, "token_reduction": "merge", "round_to": 8}
OUTCOMES = [
    builders.outcome("t000", 0.9, 1.5),
    builders.outcome("t001", 0.9, 1.5, top1_test=0.88),
    builders.failed("t002", reason="RuntimeError: \N{SNOWMAN}"),
    builders.failed("t003", State.INFEASIBLE),
    builders.failed("t004", State.STOPPED),
    replace(builders.outcome("t005", 0.9, 1.5), candidate=builders.candidate(**GLOBAL)),
    replace(builders.outcome("t006", 0.9, 1.5), candidate=builders.candidate(round_to="auto", token_reduction="none")),
    replace(builders.outcome("t007", 0.9, 1.5), ended_s=7.5, waited_s=0.25),
    replace(
        builders.outcome("t008", 0.9, 1.5), notes=("block 0 proj: only the bias is repaired", "block 1 \N{SNOWMAN}")
    ),
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


def test_notes_are_written_as_they_are_and_an_outcome_may_have_none() -> None:
    assert json.loads(json.dumps(OUTCOMES[-1].to_json()))["notes"] == [
        "block 0 proj: only the bias is repaired",
        "block 1 \N{SNOWMAN}",
    ]
    assert OUTCOMES[0].notes == ()
    assert json.loads(json.dumps(OUTCOMES[0].to_json()))["notes"] == []


def test_outcome_of_a_ledger_from_before_the_waits_has_waited_no_time() -> None:
    record = OUTCOMES[0].to_json()
    assert record.pop("waited_s") == 0.0
    assert Outcome.from_json(record) == OUTCOMES[0]


def test_idle_share_is_waits_over_all_time_of_the_workers() -> None:
    outcomes = [replace(OUTCOMES[0], seconds=4.0, waited_s=0.5), replace(OUTCOMES[2], seconds=0.0, waited_s=0.5)]
    assert idle_share(outcomes) == 0.2
    assert idle_share(outcomes[1:]) == 1.0
    assert idle_share([replace(OUTCOMES[0], seconds=0.0)]) == idle_share([]) == 0.0


@pytest.mark.parametrize(
    "candidate", [builders.candidate(), builders.candidate(criterion="obs"), builders.candidate(**GLOBAL)]
)
def test_candidate_survives_json(candidate: Candidate) -> None:
    read = Candidate.from_json(json.loads(json.dumps(asdict(candidate))))
    assert read == candidate


def test_candidate_of_a_ledger_from_before_the_choices_is_the_cascade_that_it_was() -> None:
    record = asdict(builders.candidate())
    for name in ("method", "criterion", "token_reduction", "round_to"):
        del record[name]
    read = Candidate.from_json(json.loads(json.dumps(record)))
    assert (read.method, read.criterion, read.token_reduction, read.round_to) == ("cascade", "lfs", "lfe", 1)
    assert read == builders.candidate()


def test_params_are_named_as_in_the_search_space_and_leave_out_what_has_no_effect() -> None:
    assert builders.candidate(exit_block=2).to_params() == {
        "cutoff_channel": 0.1,
        "cutoff_token": 0.8,
        "token_share": 0.5,
        "target_ratio": 0.6,
        "exit_block": 2,
        "drop_budget.0": 1.5,
        "drop_budget.1": 0.5,
        "method": "cascade",
        "criterion": "lfs",
        "token_reduction": "lfe",
        "round_to": 1,
    }
    assert builders.candidate(exit_block=3).to_params()["drop_budget.2"] == 0.25


def test_params_of_a_global_candidate_have_no_budgets_and_no_criterion() -> None:
    assert builders.candidate(**GLOBAL).to_params() == {
        "token_share": 0.5,
        "target_ratio": 0.6,
        "exit_block": 2,
        "method": "global",
        "token_reduction": "merge",
        "round_to": 8,
    }
    assert builders.candidate(**GLOBAL | {"token_reduction": "lfe-merge"}).to_params()["cutoff_token"] == 0.8


@pytest.mark.parametrize("criterion", CRITERIA)
def test_cutoff_of_the_images_is_a_parameter_of_the_lfs_score_alone(criterion: str) -> None:
    params = builders.candidate(criterion=criterion).to_params()
    assert params["criterion"] == criterion
    assert ("cutoff_channel" in params) == (criterion == "lfs")


@pytest.mark.parametrize("method", ["cascade", "global"])
@pytest.mark.parametrize("reduction", TOKEN_REDUCTIONS)
def test_cutoff_of_the_tokens_is_a_parameter_where_the_reduction_has_a_filter(
    method: str, reduction: TokenReduction
) -> None:
    params = builders.candidate(method=method, token_reduction=reduction).to_params()
    assert params["token_reduction"] == reduction
    assert ("cutoff_token" in params) == REDUCERS[reduction].has_filter
    assert "token_share" in params


@pytest.mark.parametrize("method", ["cascade", "global"])
def test_without_a_token_reduction_nothing_about_tokens_is_a_parameter(method: str) -> None:
    some, none = (builders.candidate(method=method, token_reduction=kind).to_params() for kind in ("lfe", "none"))
    assert some.keys() - none.keys() == {"token_share", "cutoff_token"}
    assert none.keys() <= some.keys()
    assert none["token_reduction"] == "none"


@pytest.mark.parametrize("round_to", [1, 8, "auto"])
def test_rounding_is_a_parameter_as_it_was_asked_for(round_to: RoundTo) -> None:
    assert builders.candidate(round_to=round_to).to_params()["round_to"] == round_to


def test_reductions_with_a_filter_are_those_that_build_one() -> None:
    assert {kind for kind, reducer in REDUCERS.items() if reducer.has_filter} == FILTERED


def test_records_are_read_without_torch() -> None:
    """A look at a ledger is to take no seconds."""
    look = "import sys, search.outcome; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0


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
