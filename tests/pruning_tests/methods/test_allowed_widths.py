"""Plans of the allocation and of the cascade have the widths that their blocks may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from pruning.measure.cost import count_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.allocation import allocate
from pruning.methods.cascade import CascadeSettings, cascade
from pruning.model.anatomy import examine
from pruning.model.surgery import keep_all_plan
from pruning.plan import Plan
from tests.pruning_tests import builders
from tests.pruning_tests.methods.invented import profile_of

MIDDLE = builders.anatomy(depth=4, embed_dim=48, img_size=56)  # heads of 16, 192 hidden units, 49 patches


def check_widths(plan: Plan, allowed_widths: Sequence[AllowedWidths]) -> None:
    for block, allowed in zip(plan.blocks, allowed_widths, strict=True):
        assert (block.shape.qk_width, block.shape.v_width) in allowed.attention
        assert block.shape.num_hidden in allowed.hidden


def num_reductions(plan: Plan, num_patches: int) -> int:
    return sum(a > b for a, b in pairwise([num_patches, *(block.num_tokens for block in plan.blocks)]))


@pytest.mark.parametrize(("token_share", "seed"), [(0.0, 0), (0.3, 1), (0.5, 2), (0.5, 0)])
def test_a_plan_of_all_blocks_has_the_widths_that_its_block_may_have(token_share: float, seed: int) -> None:
    profile, dense_macs = profile_of(MIDDLE, seed=seed, kind="attention"), count_macs(MIDDLE, keep_all_plan(MIDDLE))
    allowed_widths = [builders.allowed_widths(10 * seed + index, head_dim=16, num_hidden=192) for index in range(4)]
    narrowed = 0
    for share in (0.75, 0.85, 0.95, 1.0) if token_share == 0 else (0.3, 0.5, 0.7, 1.0):
        plan = allocate(profile, MIDDLE, int(share * dense_macs), token_share, allowed_widths)
        check_widths(plan, allowed_widths)
        assert count_macs(MIDDLE, plan) <= share * dense_macs
        narrowed += sum((block.shape.qk_width, block.shape.num_hidden) != (16, 192) for block in plan.blocks)
    assert narrowed


def test_the_longer_a_reduction_takes_the_fewer_blocks_reduce_tokens() -> None:
    profile, by_eight = profile_of(MIDDLE, kind="attention"), [multiples(block, 8) for block in MIDDLE.blocks]
    dense_macs = count_macs(MIDDLE, keep_all_plan(MIDDLE))
    a_block = dense_macs // 4
    counts = {}
    for time in (0.0, 0.02, 0.1, 0.5, 2.0, 100.0):
        allowed_widths = [replace(allowed, reduction=time * a_block) for allowed in by_eight]
        plan = allocate(profile, MIDDLE, int(0.6 * dense_macs), 0.5, allowed_widths)
        assert count_macs(MIDDLE, plan) <= 0.6 * dense_macs  # of which the time of the reduction is no part
        counts[time] = num_reductions(plan, 49)
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert counts[0.0] >= 2
    assert counts[100.0] == 0


def test_multiply_adds_of_a_plan_are_those_of_its_widths_whatever_its_reductions_take() -> None:
    """A target that is reached with all the tokens is reached with the same plan, however long a reduction takes."""
    profile, dense_macs = profile_of(MIDDLE, kind="attention"), count_macs(MIDDLE, keep_all_plan(MIDDLE))
    allowed_widths = [replace(multiples(block, 8), reduction=1e9) for block in MIDDLE.blocks]
    never = [replace(allowed, reduction=0.0) for allowed in allowed_widths]
    none = replace(profile, token_reduction="none")
    for share in (0.6, 0.8, 1.0):
        slow = allocate(profile, MIDDLE, int(share * dense_macs), 0.5, allowed_widths)
        without = allocate(none, MIDDLE, int(share * dense_macs), 0.5, never)
        assert slow.blocks == without.blocks


@pytest.mark.parametrize(
    ("criterion", "budgets"),
    [("magnitude", (100.0, 100.0, 100.0)), ("magnitude", (10.0, 0.0, 20.0)), ("obs", (10.0, 0.0, 20.0))],
)
def test_a_cascade_has_the_widths_that_its_block_may_have(criterion: str, budgets: tuple[float, ...]) -> None:
    model, probe, calibration = builders.toy_model(), builders.toy_images(60, seed=11), builders.toy_images(32, seed=12)
    allowed_widths = tuple(builders.allowed_widths(index) for index in range(3))
    settings = CascadeSettings(
        drop_budget=budgets, target_macs=0, criterion=criterion, token_reduction="attention",
        allowed_widths=allowed_widths, num_levels=7, batch_size=32,
    )  # fmt: skip
    result = cascade(model, probe, calibration, settings)
    check_widths(result.plan, allowed_widths)
    assert all(drop <= budget + 1e-9 for drop, budget in zip(result.block_drops, budgets, strict=True))
    if min(budgets) == 100:  # as far as it goes
        least = [(min(allowed.attention, key=sum), allowed.hidden[0]) for allowed in allowed_widths]
        shapes = [block.shape for block in result.plan.blocks]
        assert [((shape.qk_width, shape.v_width), shape.num_hidden) for shape in shapes] == least


def test_a_cascade_that_is_offered_the_dense_widths_alone_prunes_heads_and_tokens_alone() -> None:
    model, images = builders.toy_model(), builders.toy_images(40, seed=3)
    allowed_widths = tuple(multiples(block, 96) for block in examine(model).blocks)
    result = cascade(
        model, images, images,
        CascadeSettings(drop_budget=(100.0,) * 3, target_macs=0, criterion="magnitude", allowed_widths=allowed_widths,
                        num_levels=4),
    )  # fmt: skip
    for block in result.plan.blocks:
        assert (block.shape.qk_width, block.shape.v_width, block.shape.num_hidden) == (8, 8, 96)
        assert block.shape.num_heads < 3


@pytest.mark.parametrize(("weight", "token_share"), [(0.5, 0.5), (1.0, 1.0), (5.0, 0.5)])
def test_slow_reductions_keep_no_target_from_being_met_closely(weight: float, token_share: float) -> None:
    profile, dense_macs = profile_of(MIDDLE, kind="attention"), count_macs(MIDDLE, keep_all_plan(MIDDLE))
    free = [multiples(block, 8) for block in MIDDLE.blocks]
    slow = [replace(allowed, reduction=weight * dense_macs / 4) for allowed in free]
    for share in (0.2, 0.4, 0.6, 0.8):
        target = int(share * dense_macs)
        got, without = (
            count_macs(MIDDLE, allocate(profile, MIDDLE, target, token_share, allowed)) for allowed in (slow, free)
        )
        assert min(without, target - 0.05 * dense_macs) <= got <= target
