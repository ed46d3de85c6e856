"""The allocation against every plan there is, on a small grid, and against random ones on a larger."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from pruning.errors import SettingError
from pruning.measure.cost import count_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.allocation import PricedPlans, allocate
from pruning.model.anatomy import Anatomy, BlockAnatomy
from pruning.model.surgery import check_plan, keep_all_block, keep_all_plan
from pruning.plan import BlockPlan, Plan, TokenReduction
from tests.pruning_tests.methods.invented import (
    DENSE_MACS,
    MIDDLE,
    TINY,
    UNEVEN,
    multiples_of,
    profile_of,
    random_plan,
    slow_cost,
)


@functools.cache
def every_plan(anatomy: Anatomy, kind: TokenReduction, allowed: AllowedWidths) -> list[tuple[Plan, int]]:
    """All plans of two blocks, with their multiply-adds."""

    def block(dense: BlockAnatomy, pair: tuple[int, int], units: int, tokens: int) -> BlockPlan:
        return BlockPlan(
            keep_heads=tuple(range(dense.num_heads)),
            keep_qk=(tuple(range(pair[0])),) * dense.num_heads,
            keep_v=(tuple(range(pair[1])),) * dense.num_heads,
            keep_hidden=tuple(range(units)),
            num_tokens=tokens,
        )

    least = {dense: dense.num_patches if kind == "none" else 1 for dense in anatomy.blocks}
    blocks = [
        [
            block(dense, *widths)
            for widths in product(allowed.attention, allowed.hidden, range(least[dense], dense.num_patches + 1))
        ]
        for dense in anatomy.blocks
    ]
    plans = [
        Plan(blocks=pair, token_reduction=kind, cutoff_token=0.6)
        for pair in product(*blocks)
        if pair[0].num_tokens >= pair[1].num_tokens
    ]
    return [(plan, count_macs(anatomy, plan)) for plan in plans]


# Against every plan

EVEN = multiples(TINY.blocks[0], 2)


@pytest.mark.parametrize(
    ("token_share", "kind", "seed", "allowed"),
    [  # each pair of values in one case at least
        pytest.param(0.3, "lfe", 0, EVEN, id="channels first"),
        pytest.param(0.3, "attention", 1, UNEVEN, id="channels first, uneven widths"),
        pytest.param(0.5, "lfe", 1, UNEVEN, id="uneven widths"),
        pytest.param(0.5, "attention", 0, UNEVEN, id="uneven widths, attention"),
        pytest.param(0.5, "attention", 1, EVEN, id="attention"),
    ],
)
def test_at_a_price_no_plan_undercuts_cost_plus_price_times_macs(
    token_share: float, kind: TokenReduction, seed: int, allowed: AllowedWidths
) -> None:
    profile = profile_of(TINY, seed=seed, kind=kind)
    every = every_plan(TINY, kind, allowed)
    costs = torch.tensor([slow_cost(profile, TINY, plan, token_share) for plan, _ in every], dtype=torch.float64)
    macs = torch.tensor([size for _, size in every], dtype=torch.float64)
    plans, shapes = PricedPlans(profile, TINY, token_share, [allowed] * 2), set()
    for price in (0.0, 1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 1e-2):
        plan = plans.plan(price)
        total = slow_cost(profile, TINY, plan, token_share) + price * count_macs(TINY, plan)
        assert total == pytest.approx(float((costs + price * macs).min()), rel=1e-9, abs=1e-12)
        shapes.add(plan.shape_hash)
    assert len(shapes) >= 5

    # So no plan of any price that is within a target is better than what `allocate` gives for it.
    for target in torch.linspace(float(macs.min()) + 1, float(macs.max()), 7).int().tolist():
        plan = allocate(profile, TINY, target, token_share, [allowed] * 2)
        cost, size = slow_cost(profile, TINY, plan, token_share), count_macs(TINY, plan)
        assert size <= target
        assert cost <= min(hull_cost for hull_size, hull_cost in hull_points(macs, costs) if hull_size <= target) + 1e-9
        # A better one may hide above the convex hull, but not below the line of the next price.
        better = costs[macs <= target].min()
        assert lower_hull(macs, costs, target) - 1e-9 <= float(better) <= cost + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_unlike_widths_and_windows_are_each_priced_by_their_own(seed: int) -> None:
    first = replace(TINY.blocks[0], num_prefix_tokens=0, has_class_token=False, num_patches=16, window_area=4)
    second = replace(first, width=16, num_heads=4, num_patches=4, entry_macs=77)
    anatomy = replace(TINY, blocks=(first, second), exits=(1, 2))
    profile = replace(profile_of(anatomy, seed=seed, kind="none"), tokens=((), ()))
    plans, shapes = PricedPlans(profile, anatomy, 0.5, [UNEVEN] * 2), set()
    every = [(slow_cost(profile, anatomy, plan, 0.0), macs) for plan, macs in every_plan(anatomy, "none", UNEVEN)]
    for price in torch.logspace(-7, -3, 17).tolist():
        plan = plans.plan(price)
        check_plan(plan, anatomy)
        total = slow_cost(profile, anatomy, plan, 0.0) + price * count_macs(anatomy, plan)
        assert total == pytest.approx(min(cost + price * macs for cost, macs in every), rel=1e-9, abs=1e-12)
        shapes.add(plan.shape_hash)
    assert len(shapes) >= 5


def test_the_time_that_a_reduction_takes_is_paid_for_at_the_same_price() -> None:
    profile = profile_of(TINY)
    by_time = {
        time: PricedPlans(profile, TINY, 0.5, [replace(UNEVEN, reduction=time)] * 2) for time in (0.0, 100.0, 1000.0)
    }
    reductions = dict.fromkeys(by_time, 0)

    def num_reductions(plan: Plan) -> int:
        return sum(before > after for before, after in pairwise([4, *(block.num_tokens for block in plan.blocks)]))

    every = [
        (slow_cost(profile, TINY, plan, 0.5), macs, num_reductions(plan))
        for plan, macs in every_plan(TINY, "lfe", UNEVEN)
    ]
    for price in torch.logspace(-6, -2, 17).tolist():
        for time, plans in by_time.items():
            plan = plans.plan(price)
            total = slow_cost(profile, TINY, plan, 0.5) + price * (count_macs(TINY, plan) + num_reductions(plan) * time)
            least = min(cost + price * (macs + count * time) for cost, macs, count in every)
            assert total == pytest.approx(least, rel=1e-9, abs=1e-12)
            reductions[time] += num_reductions(plan)
    assert reductions[0.0] > reductions[100.0] > reductions[1000.0] == 0


def hull_points(macs: Tensor, costs: Tensor) -> list[tuple[float, float]]:
    """The lower convex hull of all plans, from the smallest on."""
    points: list[tuple[float, float]] = []
    for x, y in sorted(zip(macs.tolist(), costs.tolist(), strict=True)):
        while len(points) >= 2:
            (x0, y0), (x1, y1) = points[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            points.pop()
        points.append((x, y))
    return points


def lower_hull(macs: Tensor, costs: Tensor, target: float) -> float:
    points = hull_points(macs, costs)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= target <= x1:
            return y0 + (y1 - y0) * (target - x0) / (x1 - x0)
    return points[-1][1]


@pytest.mark.parametrize(("kind", "token_share"), [("lfe", 0.0), ("lfe-merge", 0.3), ("lfe", 0.5), ("merge", 1.0)])
def test_no_random_plan_of_the_same_size_costs_less(kind: TokenReduction, token_share: float) -> None:
    profile, generator = profile_of(MIDDLE, seed=3, kind=kind), torch.Generator().manual_seed(0)
    allocated = [
        allocate(profile, MIDDLE, int(share * DENSE_MACS), token_share, multiples_of(MIDDLE, 8))
        for share in torch.linspace(0.35, 0.98, 10).tolist()
        if token_share > 0 or share > 0.55
    ]
    rivals = [(count_macs(MIDDLE, plan), slow_cost(profile, MIDDLE, plan, token_share)) for plan in allocated]
    plans, compared = PricedPlans(profile, MIDDLE, token_share, multiples_of(MIDDLE, 8)), 0
    for _ in range(200):
        plan = random_plan(plans, generator)
        macs, cost = count_macs(MIDDLE, plan), slow_cost(profile, MIDDLE, plan, token_share)
        smaller_costs = [rival_cost for rival_macs, rival_cost in rivals if rival_macs >= macs]
        compared += bool(smaller_costs)
        # The matching of tokens is priced as if heads were whole: a thousandth at most.
        assert all(rival_cost <= cost * 1.001 + 1e-12 for rival_cost in smaller_costs)
    assert compared > 50


# Targets and settings


@pytest.mark.parametrize(("kind", "token_share"), [("lfe", 0.0), ("merge", 0.3), ("lfe", 0.5), ("merge", 1.0)])
def test_targets_are_met_closely_and_more_multiply_adds_never_cost_more(
    kind: TokenReduction, token_share: float
) -> None:
    profile = profile_of(MIDDLE, seed=1, kind=kind)
    costs, gaps = [], []
    for share in torch.linspace(0.6, 1.0, 9).tolist():
        plan = allocate(profile, MIDDLE, int(share * DENSE_MACS), token_share)
        check_plan(plan, MIDDLE)
        assert plan.token_reduction == kind and plan.cutoff_token == 0.6
        gaps.append(share - count_macs(MIDDLE, plan) / DENSE_MACS)
        costs.append(slow_cost(profile, MIDDLE, plan, token_share))
    assert min(gaps) > -1e-9 and sum(gaps) / len(gaps) < 0.03
    assert costs[-1] == 0 and costs[0] > costs[4] > 0
    assert all(a >= b - 1e-9 for a, b in pairwise(costs))


@pytest.mark.parametrize("target", [1.0, 1.5])
def test_where_all_fits_all_stays(target: float) -> None:
    plan = allocate(profile_of(MIDDLE), MIDDLE, int(target * DENSE_MACS), 0.5, multiples_of(MIDDLE, 8))
    assert plan.blocks == keep_all_plan(MIDDLE).blocks


def test_token_share_0_keeps_all_tokens_and_1_all_channels_and_between_tokens_go_instead_of_channels() -> None:
    profile, target = profile_of(MIDDLE, seed=2), int(0.7 * DENSE_MACS)
    tokens, hidden = [], []
    for token_share in (0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 1.0):
        blocks = allocate(profile, MIDDLE, target, token_share).blocks
        tokens.append(sum(block.num_tokens for block in blocks))
        hidden.append(sum(len(block.keep_hidden) for block in blocks))
        if token_share == 1:
            assert all(replace(block, num_tokens=49) == keep_all_block(MIDDLE.blocks[0]) for block in blocks)
    assert tokens[0] == 4 * 49 and hidden[-1] == 4 * 48
    assert hidden[0] < 4 * 48 and tokens[-1] < 4 * 49
    assert tokens[1] > tokens[3] > tokens[5] and hidden[1] < hidden[3] < hidden[5]


@pytest.mark.parametrize("round_to", [1, 4, 8, 10, 12])
def test_widths_are_multiples_of_round_to_or_dense(round_to: int) -> None:
    seen = set()
    for share in (0.4, 0.5, 0.7, 0.9):
        plan = allocate(profile_of(MIDDLE), MIDDLE, int(share * DENSE_MACS), 0.4, multiples_of(MIDDLE, round_to))
        for block in plan.blocks:
            shape = block.shape
            for width, most in ((shape.qk_width, 16), (shape.v_width, 16), (shape.num_hidden, 48)):
                assert width == most or width % round_to == 0
                seen.add((width, most))
    assert len(seen) > 3  # both narrowed and dense ones


def test_channels_that_stay_are_the_last_of_the_orders() -> None:
    profile = profile_of(MIDDLE)
    plan = allocate(profile, MIDDLE, int(0.5 * DENSE_MACS), 0.5, multiples_of(MIDDLE, 4))
    narrowed = 0
    for curves, block in zip(profile.channels, plan.blocks, strict=True):
        shape = block.shape
        for order, kept in ((curves.qk_order, block.keep_qk), (curves.v_order, block.keep_v)):
            for row, channels in zip(order.tolist(), kept, strict=True):
                assert set(channels) == set(row[16 - len(channels) :])
        assert set(block.keep_hidden) == set(curves.hidden_order.tolist()[48 - shape.num_hidden :])
        narrowed += shape.qk_width < 16 or shape.v_width < 16 or shape.num_hidden < 48
    assert narrowed


def test_a_model_with_qk_norm_keeps_its_query_key_channels() -> None:
    anatomy = replace(MIDDLE, blocks=(replace(MIDDLE.blocks[0], has_qk_norm=True),) * 4)
    plan = allocate(profile_of(anatomy), anatomy, int(0.7 * DENSE_MACS), 0.0)
    assert {block.shape.qk_width for block in plan.blocks} == {16}
    assert min(block.shape.v_width for block in plan.blocks) < 16


@pytest.mark.parametrize("token_share", [0.0, 0.5, 1.0])
def test_a_target_that_no_plan_reaches_is_refused_and_the_least_one_named(token_share: float) -> None:
    profile, by_eight = profile_of(MIDDLE), multiples_of(MIDDLE, 8)
    with pytest.raises(SettingError, match="no plan has 1000 multiply-adds or fewer") as refused:
        allocate(profile, MIDDLE, 1000, token_share, by_eight)
    least = int(str(refused.value).split()[-1])
    widths = [(8,), (8,)] if token_share < 1 else [(16,), (48,)]
    tokens = 49 if token_share == 0 else 1
    smallest = replace(
        keep_all_block(MIDDLE.blocks[0], tokens),
        keep_qk=(tuple(range(widths[0][0])),) * 3,
        keep_v=(tuple(range(widths[0][0])),) * 3,
        keep_hidden=tuple(range(widths[1][0])),
    )
    assert least == count_macs(MIDDLE, Plan(blocks=(smallest,) * 4))
    assert count_macs(MIDDLE, allocate(profile, MIDDLE, least, token_share, by_eight)) == least
    with pytest.raises(SettingError):
        allocate(profile, MIDDLE, least - 1, token_share, by_eight)


@pytest.mark.parametrize("height", [1e12, 1e299, float("inf")])
@pytest.mark.parametrize("token_share", [0.0, 0.5, 1.0])
def test_costs_beyond_all_bounds_neither_overflow_nor_keep_a_target_from_being_met(
    height: float, token_share: float
) -> None:
    profile = profile_of(MIDDLE, seed=4)
    huge = [replace(curves, hidden=curves.hidden * height, v=curves.v * height) for curves in profile.channels]
    huge = [replace(curves, hidden=curves.hidden.nan_to_num(0), v=curves.v.nan_to_num(0)) for curves in huge]
    worst = replace(
        profile, channels=(*huge[:2], *profile.channels[2:]), channel_scale=1e9, token_scale=1e9,
        tokens=((1e250, 1e251, 1e299, 1e300, 1e301), *profile.tokens[1:]),
    )  # fmt: skip
    for share in (0.6, 0.8):
        plan = allocate(worst, MIDDLE, int(share * DENSE_MACS), token_share, multiples_of(MIDDLE, 8))
        check_plan(plan, MIDDLE)
        assert count_macs(MIDDLE, plan) <= share * DENSE_MACS
        assert token_share > 0 or count_macs(MIDDLE, plan) > (share - 0.1) * DENSE_MACS
    with pytest.raises(SettingError, match="no plan has 1000 multiply-adds or fewer") as refused:
        allocate(worst, MIDDLE, 1000, token_share, multiples_of(MIDDLE, 8))
    least = int(str(refused.value).split()[-1])
    assert allocate(worst, MIDDLE, least, token_share, multiples_of(MIDDLE, 8)) == allocate(
        profile, MIDDLE, least, token_share, multiples_of(MIDDLE, 8)
    )
