"""A plan is pure data: JSON both ways, a hash of its widths, and refusals that say what would do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pruning.errors import PlanError
from pruning.model.tokens import REDUCERS
from pruning.plan import TOKEN_REDUCTIONS, BlockPlan, BlockShape, Plan, TokenReduction
from tests.pruning_tests import builders

BLOCK = BlockPlan(keep_heads=(0, 2), keep_qk=((0, 3), (1, 2)), keep_v=((4,), (5,)), keep_hidden=(1, 4, 9), num_tokens=5)


def test_the_shape_of_a_block_is_its_widths() -> None:
    assert BLOCK.shape == BlockShape(num_heads=2, qk_width=2, v_width=1, num_hidden=3, num_tokens=5)


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_comes_back_from_json_text(seed: int) -> None:
    plan = replace(builders.plan(builders.anatomy(), seed=seed, num_tokens=(16, 9, 9)), cutoff_token=0.3)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("kind", ["none", *TOKEN_REDUCTIONS])
def test_the_token_reduction_comes_back_from_json_text(kind: TokenReduction) -> None:
    plan = Plan(blocks=(BLOCK,), token_reduction=kind)
    record = json.loads(json.dumps(plan.to_json()))
    assert record["token_reduction"] == kind
    assert Plan.from_json(record).token_reduction == kind


def test_a_token_reduction_that_there_is_not_is_refused_with_those_there_are() -> None:
    wrong: Any
    for wrong in ("drop", "", "LFE", None, ["lfe"], 1):
        with pytest.raises(PlanError, match=r"no token reduction .*; there are none, lfe, attention, merge, lfe-merge"):
            Plan(blocks=(BLOCK,), token_reduction=wrong)
        with pytest.raises(PlanError, match="no token reduction"):
            Plan.from_json(Plan(blocks=(BLOCK,)).to_json() | {"token_reduction": wrong})


def test_every_token_reduction_of_a_plan_is_made_and_no_other() -> None:
    assert list(REDUCERS) == list(TOKEN_REDUCTIONS)


def test_another_token_reduction_gives_another_hash_and_another_cutoff_does_not() -> None:
    plan = Plan(blocks=(BLOCK, replace(BLOCK, num_tokens=2)))
    hashes = {replace(plan, token_reduction=kind).shape_hash for kind in TOKEN_REDUCTIONS}
    assert len(hashes) == len(TOKEN_REDUCTIONS)
    assert replace(plan, cutoff_token=0.1).shape_hash == plan.shape_hash


def test_plans_of_equal_widths_and_other_units_share_their_hash() -> None:
    other = replace(BLOCK, keep_heads=(1, 2), keep_qk=((5, 6), (1, 2)), keep_v=((0,), (0,)), keep_hidden=(0, 1, 2))
    assert Plan(blocks=(BLOCK, other)).shape_hash == Plan(blocks=(other, BLOCK)).shape_hash


@pytest.mark.parametrize(
    "change",
    [
        {"keep_heads": (0,), "keep_qk": ((0, 1),), "keep_v": ((0,),)},
        {"keep_qk": ((0,), (1,))},
        {"keep_v": ((0, 1), (0, 1))},
        {"keep_hidden": (1, 4)},
        {"num_tokens": 4},
    ],
)
def test_any_other_width_gives_another_hash(change: dict[str, Any]) -> None:
    plans = Plan(blocks=(BLOCK,)), Plan(blocks=(replace(BLOCK, **change),)), Plan(blocks=(BLOCK, BLOCK))
    assert len({plan.shape_hash for plan in plans}) == 3


def test_the_exit_is_after_the_last_block() -> None:
    assert Plan(blocks=(BLOCK,) * 3).exit_block == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_heads": (), "keep_qk": (), "keep_v": ()}, "keeps no head"),
        ({"keep_hidden": ()}, "keeps no hidden unit"),
        ({"keep_qk": ((), ())}, "keeps no qk channel"),
        ({"keep_v": ((), ())}, "keeps no v channel"),
        ({"keep_qk": ((0, 1),)}, "1 lists of qk channels for 2 kept heads"),
        ({"keep_v": ((0,), (1,), (2,))}, "3 lists of v channels for 2 kept heads"),
        ({"keep_qk": ((0, 1), (2,))}, "different numbers of qk channels"),
        ({"keep_v": ((0, 1), (2,))}, "different numbers of v channels"),
        ({"keep_heads": (2, 0)}, "do not ascend"),
        ({"keep_heads": (2, 2)}, "do not ascend"),
        ({"keep_hidden": (-1, 3)}, "do not ascend from 0"),
        ({"keep_qk": ((0, 1), (3, 2))}, "do not ascend"),
        ({"keep_v": ((-1,), (0,))}, "do not ascend"),
        ({"num_tokens": 0}, "keep 1 at least"),
    ],
)
def test_a_block_that_is_no_plan_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(BLOCK, **change)


def test_a_plan_without_blocks_is_refused() -> None:
    with pytest.raises(PlanError, match="keeps no block"):
        Plan(blocks=())


def test_a_plan_whose_tokens_grow_is_refused_and_equal_counts_are_not() -> None:
    fewer = replace(BLOCK, num_tokens=4)
    assert Plan(blocks=(BLOCK, BLOCK, fewer)).exit_block == 3
    with pytest.raises(PlanError, match=r"\[4, 5\] grow"):
        Plan(blocks=(fewer, BLOCK))


def test_json_with_a_key_missing_or_unknown_or_of_another_kind_is_refused() -> None:
    record = Plan(blocks=(BLOCK,)).to_json()
    block = record["blocks"][0]
    wrong: list[Any] = [
        {},
        [],
        None,
        {"blocks": record["blocks"]},
        {key: record[key] for key in record if key != "token_reduction"},
        {key: record[key] for key in record if key != "cutoff_token"},
        record | {"more": 1},
        record | {"blocks": None},
        record | {"blocks": [3]},
        record | {"blocks": [{key: block[key] for key in block if key != "keep_qk"}]},
        record | {"blocks": [block | {"more": 1}]},
        record | {"blocks": [block | {"keep_heads": 1}]},
        record | {"blocks": [block | {"keep_heads": ["0", "2"]}]},
        record | {"blocks": [block | {"num_tokens": None}]},
    ]
    for one in wrong:
        with pytest.raises(PlanError):
            Plan.from_json(one)
