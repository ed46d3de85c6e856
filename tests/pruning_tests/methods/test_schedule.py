"""Schedules of tokens by their definition, and plans of a schedule against every finer one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pruning.errors import SettingError
from pruning.measure.cost import count_macs
from pruning.methods.schedule import Schedule, scheduled_plan, token_counts
from pruning.model.surgery import keep_all_block, keep_all_plan
from pruning.plan import Plan
from tests.pruning_tests.methods.invented import DENSE_MACS, MIDDLE


@pytest.mark.parametrize(
    ("patches", "depth", "removed", "counts"),
    [
        (196, 12, 8, [188, 180, 172, 164, 156, 148, 140, 132, 124, 116, 108, 100]),
        (196, 12, 16, [180, 164, 148, 132, 116, 100, 84, 68, 52, 36, 20, 4]),
        (16, 4, 0, [16, 16, 16, 16]),
        (16, 4, 6, [10, 4, 1, 1]),
        (16, 3, 16, [1, 1, 1]),
        (1, 2, 1, [1, 1]),
    ],
)
def test_the_constant_schedule_takes_as_many_from_every_block(
    patches: int, depth: int, removed: int, counts: list[int]
) -> None:
    assert token_counts("constant", patches, depth, removed) == counts


@pytest.mark.parametrize(
    ("patches", "depth", "removed", "counts"),
    [
        (100, 5, 4, [92, 86, 82, 80, 80]),  # 8, 6, 4, 2, 0
        (100, 4, 3, [94, 90, 88, 88]),  # 6, 4, 2, 0
        (100, 4, 4, [92, 87, 84, 84]),  # 8, 5 1/3, 2 2/3, 0: from 92, 86 2/3, 84, 84
        (16, 3, 8, [1, 1, 1]),  # 16, 8, 0
        (16, 3, 0, [16, 16, 16]),
        (16, 2, 4, [8, 8]),
    ],
)
def test_the_decreasing_schedule_takes_twice_as_many_at_first_and_none_at_last(
    patches: int, depth: int, removed: int, counts: list[int]
) -> None:
    assert token_counts("decreasing", patches, depth, removed) == counts


@pytest.mark.parametrize("removed", range(0, 17, 2))
def test_both_schedules_take_equally_many_in_all_and_never_give_any_back(removed: int) -> None:
    constant, decreasing = (token_counts(kind, 196, 12, removed) for kind in ("constant", "decreasing"))
    assert constant[-1] == decreasing[-1] == 196 - 12 * removed
    assert decreasing == sorted(decreasing, reverse=True)
    assert all(fewer <= more for fewer, more in zip(decreasing, constant, strict=True))


@pytest.mark.parametrize("kind", ["constant", "decreasing"])
def test_a_plan_takes_the_fewest_tokens_that_reach_the_target(kind: Schedule) -> None:
    block = MIDDLE.blocks[0]
    # In steps of 1/500 token a block; neighbours are mostly alike.
    finely = [
        tuple(token_counts(kind, block.num_patches, MIDDLE.depth, n / 500)) for n in range(500 * block.num_patches)
    ]
    plans = {
        counts: Plan(blocks=tuple(keep_all_block(block, count) for count in counts), token_reduction="merge")
        for counts in dict.fromkeys(finely)
    }
    macs = {counts: count_macs(MIDDLE, plan) for counts, plan in plans.items()}
    for share in (0.3, 0.5, 0.8, 0.99):
        plan = scheduled_plan(MIDDLE, int(share * DENSE_MACS), kind, "merge", 0.3)
        assert (plan.token_reduction, plan.cutoff_token) == ("merge", 0.3)
        assert all(replace(kept, num_tokens=block.num_patches) == keep_all_block(block) for kept in plan.blocks)
        assert count_macs(MIDDLE, plan) <= share * DENSE_MACS
        first = next(counts for counts in macs if macs[counts] <= share * DENSE_MACS)
        assert tuple(kept.num_tokens for kept in plan.blocks) == first


def test_a_schedule_that_cannot_reach_its_target_says_what_it_can_reach() -> None:
    with pytest.raises(SettingError, match="no constant schedule has 1000 multiply-adds or fewer; the smallest has"):
        scheduled_plan(MIDDLE, 1000, "constant", "merge")


def test_a_target_that_the_dense_model_meets_takes_no_token() -> None:
    assert scheduled_plan(MIDDLE, DENSE_MACS, "decreasing", "lfe").blocks == keep_all_plan(MIDDLE).blocks
