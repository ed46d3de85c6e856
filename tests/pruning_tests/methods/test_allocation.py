"""The allocation against every plan there is, on a small grid; the profile on a trained toy."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from pruning.data import Images
from pruning.errors import SettingError
from pruning.measure.cost import count_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.allocation import (
    SHARES,
    Profile,
    _Search,
    allocate,
    block_costs,
    divergence,
    measure_profile,
    scheduled,
)
from pruning.model.anatomy import Anatomy, BlockAnatomy, blocks_of, classify, embed, examine
from pruning.model.surgery import apply_plan, check_plan, keep_all_block, keep_all_plan
from pruning.model.tokens import Schedule, schedule
from pruning.plan import TOKEN_REDUCTIONS, BlockPlan, Plan, TokenReduction
from pruning.scores.curves import RemovalCurves
from tests.pruning_tests import builders

T = TypeVar("T")


def of_widths(depth: int, **widths: Any) -> Anatomy:
    dense = builders.anatomy()
    return replace(dense, blocks=(replace(dense.blocks[0], **widths),) * depth, exits=tuple(range(1, depth + 1)))


TINY = of_widths(2, width=8, num_heads=2, head_dim=4, num_hidden=8, num_patches=4)
"""Two blocks of few widths: all plans can be tried."""

UNEVEN = AllowedWidths(attention=((1, 2), (4, 1), (3, 3), (4, 4)), hidden=(1, 5, 6, 8))

MIDDLE = of_widths(4, num_hidden=48, head_dim=16, num_patches=49)
WHOLE = keep_all_block(MIDDLE.blocks[0])


def allowed_widths(anatomy: Anatomy, round_to: int) -> list[AllowedWidths]:
    return [multiples(block, round_to) for block in anatomy.blocks]


def rising(count: int, generator: torch.Generator, height: float) -> Tensor:
    """From 0, never falling, steeper and steeper."""
    steps = torch.rand(count, generator=generator, dtype=torch.float64) * torch.linspace(0, 1, count) ** 2
    return torch.cat([torch.zeros(1, dtype=torch.float64), height * steps.cumsum(0)])


def invented(anatomy: Anatomy, *, seed: int = 0, kind: TokenReduction = "lfe") -> Profile:
    """A profile of random curves, blocks of very different worth."""
    generator = torch.Generator().manual_seed(seed)

    def order(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).argsort(dim=-1)

    channels, tokens = [], []
    for block in anatomy.blocks:
        worth = float(10 ** (-1 - torch.rand((), generator=generator)))
        channels.append(
            RemovalCurves(
                qk=rising(block.head_dim, generator, worth / 2),
                v=rising(block.head_dim, generator, worth),
                hidden=rising(block.num_hidden, generator, worth / 3),
                qk_order=order(block.num_heads, block.head_dim),
                v_order=order(block.num_heads, block.head_dim),
                hidden_order=order(block.num_hidden),
            )
        )
        power, jitter = (
            1.5 + torch.rand((), generator=generator),
            1 + 0.2 * torch.rand(len(SHARES), generator=generator),
        )
        tokens.append(tuple((4 * worth * torch.tensor(SHARES) ** power * jitter).cummax(0).values.tolist()))
    return Profile(
        channels=tuple(channels), channel_scale=1.7, token_scale=1.3, tokens=tuple(tokens), token_reduction=kind,
        cutoff_token=0.6, forward_passes=0.0,
    )  # fmt: skip


def slow_token_cost(costs: tuple[float, ...], share: float) -> float:
    """On the line through the two nearest measured points, both axes logarithmic; the outer lines go on."""
    values = [max(cost, 1e-7) for cost in costs]
    place = max([i for i in range(len(SHARES) - 1) if SHARES[i] < share], default=0)
    low, high = SHARES[place], SHARES[place + 1]
    slope = math.log(values[place + 1] / values[place]) / math.log(high / low)
    return values[place] * (share / low) ** slope


def slow_cost(profile: Profile, anatomy: Anatomy, plan: Plan, token_share: float) -> float:
    """What `allocate` makes small, unit by unit."""
    odds = token_share / (1 - token_share) if 0 < token_share < 1 else 1.0
    total, entering = 0.0, anatomy.blocks[0].num_patches
    for dense, curves, tokens, block in zip(anatomy.blocks, profile.channels, profile.tokens, plan.blocks, strict=True):
        shape, entering = block.shape, min(entering, dense.num_patches)
        channels = curves.qk[dense.head_dim - shape.qk_width] + curves.v[dense.head_dim - shape.v_width]
        channels += curves.hidden[dense.num_hidden - shape.num_hidden]
        total += profile.channel_scale * odds * float(channels)
        if shape.num_tokens < entering:
            total += profile.token_scale * slow_token_cost(tokens, 1 - shape.num_tokens / entering)
        entering = shape.num_tokens
    return total


def every_plan(anatomy: Anatomy, profile: Profile, allowed: AllowedWidths) -> list[Plan]:
    def block(dense: BlockAnatomy, pair: tuple[int, int], units: int, tokens: int) -> BlockPlan:
        return BlockPlan(
            keep_heads=tuple(range(dense.num_heads)),
            keep_qk=(tuple(range(pair[0])),) * dense.num_heads,
            keep_v=(tuple(range(pair[1])),) * dense.num_heads,
            keep_hidden=tuple(range(units)),
            num_tokens=tokens,
        )

    least = {dense: dense.num_patches if profile.token_reduction == "none" else 1 for dense in anatomy.blocks}
    blocks = [
        [
            block(dense, *each)
            for each in product(allowed.attention, allowed.hidden, range(least[dense], dense.num_patches + 1))
        ]
        for dense in anatomy.blocks
    ]
    return [
        Plan(blocks=pair, token_reduction=profile.token_reduction, cutoff_token=profile.cutoff_token)
        for pair in product(*blocks)
        if pair[0].num_tokens >= pair[1].num_tokens
    ]


# Against every plan


@pytest.mark.parametrize("token_share", [0.3, 0.5])
@pytest.mark.parametrize("kind", ["lfe", "attention"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("allowed", [multiples(TINY.blocks[0], 2), UNEVEN], ids=["multiples", "uneven"])
def test_at_a_price_no_plan_undercuts_cost_plus_price_times_macs(
    kind: TokenReduction, token_share: float, seed: int, allowed: AllowedWidths
) -> None:
    profile = invented(TINY, seed=seed, kind=kind)
    plans = every_plan(TINY, profile, allowed)
    costs = torch.tensor([slow_cost(profile, TINY, plan, token_share) for plan in plans], dtype=torch.float64)
    macs = torch.tensor([count_macs(TINY, plan) for plan in plans], dtype=torch.float64)
    search, shapes = _Search(profile, TINY, token_share, [allowed] * 2), set()
    for price in (0.0, 1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 1e-2):
        plan = search.plan(price)
        total = slow_cost(profile, TINY, plan, token_share) + price * count_macs(TINY, plan)
        assert total == pytest.approx(float((costs + price * macs).min()), rel=1e-9, abs=1e-12)
        shapes.add(plan.shape_hash)
    assert len(shapes) >= 5

    # So no plan of any price that is within a target is better than what `allocate` gives for it.
    for target in torch.linspace(float(macs.min()) + 1, float(macs.max()), 7).int().tolist():
        plan = allocate(profile, TINY, target, token_share, [allowed] * 2)
        own, size = slow_cost(profile, TINY, plan, token_share), count_macs(TINY, plan)
        assert size <= target
        assert own <= min(cost for hull_size, cost in hull_points(macs, costs) if hull_size <= target) + 1e-9
        # A better one may hide above the convex hull, but not below the line of the next price.
        better = costs[macs <= target].min()
        assert lower_hull(macs, costs, target) - 1e-9 <= float(better) <= own + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_unlike_widths_and_windows_are_each_priced_by_their_own(seed: int) -> None:
    first = replace(TINY.blocks[0], num_prefix_tokens=0, has_class_token=False, num_patches=16, window_area=4)
    second = replace(first, width=16, num_heads=4, num_patches=4, entry_macs=77)
    anatomy = replace(TINY, blocks=(first, second), exits=(1, 2))
    profile = replace(invented(anatomy, seed=seed, kind="none"), tokens=((), ()))
    search, shapes = _Search(profile, anatomy, 0.5, [UNEVEN] * 2), set()
    known = [
        (slow_cost(profile, anatomy, plan, 0.0), count_macs(anatomy, plan))
        for plan in every_plan(anatomy, profile, UNEVEN)
    ]
    for price in torch.logspace(-7, -3, 17).tolist():
        plan = search.plan(price)
        check_plan(plan, anatomy)
        own = slow_cost(profile, anatomy, plan, 0.0) + price * count_macs(anatomy, plan)
        assert own == pytest.approx(min(cost + price * macs for cost, macs in known), rel=1e-9, abs=1e-12)
        shapes.add(plan.shape_hash)
    assert len(shapes) >= 5


def test_the_time_that_a_reduction_takes_is_paid_for_at_the_same_price() -> None:
    profile, plans = invented(TINY), every_plan(TINY, invented(TINY), UNEVEN)
    searches = {
        time: _Search(profile, TINY, 0.5, [replace(UNEVEN, reduction=time)] * 2) for time in (0.0, 100.0, 1000.0)
    }
    reductions = dict.fromkeys(searches, 0)

    def num_reductions(plan: Plan) -> int:
        return sum(before > after for before, after in pairwise([4, *(block.num_tokens for block in plan.blocks)]))

    known = [(slow_cost(profile, TINY, plan, 0.5), count_macs(TINY, plan), num_reductions(plan)) for plan in plans]
    for price in torch.logspace(-6, -2, 17).tolist():
        for time, search in searches.items():
            plan = search.plan(price)
            own = slow_cost(profile, TINY, plan, 0.5) + price * (count_macs(TINY, plan) + num_reductions(plan) * time)
            least = min(cost + price * (macs + count * time) for cost, macs, count in known)
            assert own == pytest.approx(least, rel=1e-9, abs=1e-12)
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
    profile, generator = invented(MIDDLE, seed=3, kind=kind), torch.Generator().manual_seed(0)
    search = _Search(profile, MIDDLE, token_share, allowed_widths(MIDDLE, 8))
    found = [
        allocate(profile, MIDDLE, int(share * whole_macs(MIDDLE)), token_share, allowed_widths(MIDDLE, 8))
        for share in torch.linspace(0.35, 0.98, 25).tolist()
        if token_share > 0 or share > 0.55
    ]
    known = [(count_macs(MIDDLE, plan), slow_cost(profile, MIDDLE, plan, token_share)) for plan in found]
    compared = 0
    for _ in range(200):
        plan = drawn(search, generator)
        macs, cost = count_macs(MIDDLE, plan), slow_cost(profile, MIDDLE, plan, token_share)
        rivals = [ours for size, ours in known if size >= macs]
        compared += bool(rivals)
        # The matching of tokens is priced as if heads were whole: a thousandth at most.
        assert all(ours <= cost * 1.001 + 1e-12 for ours in rivals)
    assert compared > 50


def whole_macs(anatomy: Anatomy) -> int:
    return count_macs(anatomy, keep_all_plan(anatomy))


def drawn(search: _Search, generator: torch.Generator) -> Plan:
    """A random plan from the grids that the search has; tokens never grow."""

    def some(grid: Sequence[T]) -> T:
        return grid[int(torch.randint(len(grid), (), generator=generator))]

    blocks, entering = [], search.anatomy.blocks[0].num_patches
    for dense, allowed in zip(search.anatomy.blocks, search.allowed_widths, strict=True):
        qk, v = some(allowed.attention)
        stays = float(torch.rand((), generator=generator)) < 0.4
        entering = entering if stays else some([count for count in search.counts if count <= entering])
        blocks.append(
            replace(
                keep_all_block(dense, entering),
                keep_qk=(tuple(range(qk)),) * dense.num_heads,
                keep_v=(tuple(range(v)),) * dense.num_heads,
                keep_hidden=tuple(range(some(allowed.hidden))),
            )
        )
    return Plan(blocks=tuple(blocks), token_reduction=search.profile.token_reduction)


# Targets and settings


@pytest.mark.parametrize("token_share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["lfe", "merge"])
def test_targets_are_met_closely_and_more_multiply_adds_never_cost_more(
    kind: TokenReduction, token_share: float
) -> None:
    profile, whole = invented(MIDDLE, seed=1, kind=kind), whole_macs(MIDDLE)
    costs, gaps = [], []
    for share in torch.linspace(0.6, 1.0, 13).tolist():
        plan = allocate(profile, MIDDLE, int(share * whole), token_share)
        check_plan(plan, MIDDLE)
        assert plan.token_reduction == kind and plan.cutoff_token == 0.6
        gaps.append(share - count_macs(MIDDLE, plan) / whole)
        costs.append(slow_cost(profile, MIDDLE, plan, token_share))
    assert min(gaps) > -1e-9 and sum(gaps) / len(gaps) < 0.03
    assert costs[-1] == 0 and costs[0] > costs[6] > 0
    assert all(a >= b - 1e-9 for a, b in pairwise(costs))


@pytest.mark.parametrize("target", [1.0, 1.5])
def test_where_all_fits_all_stays(target: float) -> None:
    plan = allocate(invented(MIDDLE), MIDDLE, int(target * whole_macs(MIDDLE)), 0.5, allowed_widths(MIDDLE, 8))
    assert plan.blocks == keep_all_plan(MIDDLE).blocks


def test_token_share_0_keeps_all_tokens_and_1_all_channels_and_between_tokens_go_instead_of_channels() -> None:
    profile, target = invented(MIDDLE, seed=2), int(0.7 * whole_macs(MIDDLE))
    tokens, hidden = [], []
    for token_share in (0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 1.0):
        blocks = allocate(profile, MIDDLE, target, token_share).blocks
        tokens.append(sum(block.num_tokens for block in blocks))
        hidden.append(sum(len(block.keep_hidden) for block in blocks))
        if token_share == 1:
            assert all(replace(block, num_tokens=49) == WHOLE for block in blocks)
    assert tokens[0] == 4 * 49 and hidden[-1] == 4 * 48
    assert hidden[0] < 4 * 48 and tokens[-1] < 4 * 49
    assert tokens[1] > tokens[3] > tokens[5] and hidden[1] < hidden[3] < hidden[5]


@pytest.mark.parametrize("round_to", [1, 4, 8, 10, 12])
def test_widths_are_multiples_of_round_to_or_whole(round_to: int) -> None:
    seen = set()
    for share in (0.4, 0.5, 0.7, 0.9):
        plan = allocate(
            invented(MIDDLE), MIDDLE, int(share * whole_macs(MIDDLE)), 0.4, allowed_widths(MIDDLE, round_to)
        )
        for block in plan.blocks:
            shape = block.shape
            for width, most in ((shape.qk_width, 16), (shape.v_width, 16), (shape.num_hidden, 48)):
                assert width == most or width % round_to == 0
                seen.add((width, most))
    assert len(seen) > 3  # both narrowed and whole ones


def test_channels_that_stay_are_the_last_of_the_orders() -> None:
    profile = invented(MIDDLE)
    plan = allocate(profile, MIDDLE, int(0.5 * whole_macs(MIDDLE)), 0.5, allowed_widths(MIDDLE, 4))
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
    plan = allocate(invented(anatomy), anatomy, int(0.7 * whole_macs(anatomy)), 0.0)
    assert {block.shape.qk_width for block in plan.blocks} == {16}
    assert min(block.shape.v_width for block in plan.blocks) < 16


@pytest.mark.parametrize("token_share", [0.0, 0.5, 1.0])
def test_a_target_that_no_plan_reaches_is_refused_and_the_least_one_named(token_share: float) -> None:
    profile, by_eight = invented(MIDDLE), allowed_widths(MIDDLE, 8)
    with pytest.raises(SettingError, match="no plan has 1000 multiply-adds or fewer") as refused:
        allocate(profile, MIDDLE, 1000, token_share, by_eight)
    least = int(str(refused.value).split()[-1])
    widths = [(8,), (8,)] if token_share < 1 else [(16,), (48,)]
    tokens = 49 if token_share == 0 else 1
    smallest = replace(
        WHOLE,
        num_tokens=tokens,
        keep_qk=(tuple(range(widths[0][0])),) * 3,
        keep_v=(tuple(range(widths[0][0])),) * 3,
        keep_hidden=tuple(range(widths[1][0])),
    )
    assert least == count_macs(MIDDLE, Plan(blocks=(smallest,) * 4))
    assert count_macs(MIDDLE, allocate(profile, MIDDLE, least, token_share, by_eight)) == least
    with pytest.raises(SettingError):
        allocate(profile, MIDDLE, least - 1, token_share, by_eight)


def test_the_prediction_is_the_sum_over_units_and_removals() -> None:
    profile = invented(MIDDLE, seed=5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        plan = drawn(_Search(profile, MIDDLE, 0.5, allowed_widths(MIDDLE, 8)), generator)
        expected = slow_cost(profile, MIDDLE, plan, 0.5)
        assert sum(map(sum, block_costs(profile, MIDDLE, plan))) == pytest.approx(expected, rel=1e-9)


# The profile


@functools.cache
def profiled(family: str, kind: TokenReduction) -> Profile:
    return measure_profile(
        builders.toy_model(family), builders.toy_images(64, seed=2), probe_images(), token_reduction=kind, batch_size=30
    )


def probe_images() -> Images:
    return builders.toy_images(80, seed=3)


@pytest.mark.parametrize("kind", TOKEN_REDUCTIONS)
@torch.no_grad()
def test_what_removing_tokens_costs_is_the_divergence_of_a_model_that_does_so_in_one_block(
    kind: TokenReduction,
) -> None:
    with torch.enable_grad():
        profile, model = profiled("average_pooling", kind), builders.toy_model("average_pooling")
    pixels, blocks = probe_images().normalized(slice(None)), list(keep_all_plan(examine(model)).blocks)
    dense = model(pixels)
    for index, costs in enumerate(profile.tokens):
        assert len(costs) == len(SHARES) and costs[-1] > 0
        assert all(a <= b for a, b in pairwise(costs))
        highest = 0.0
        for share, cost in zip(SHARES, costs, strict=True):
            fewer = keep_all_block(examine(model).blocks[0], max(1, round(16 * (1 - share))))
            # Sizes go on with their tokens, though no later block removes any.
            later = [replace(block, num_tokens=fewer.num_tokens) for block in blocks[index + 1 :]]
            plan = Plan(blocks=(*blocks[:index], fewer, *later), token_reduction=kind)
            highest = max(highest, divergence(dense, apply_plan(model, plan)(pixels)))
            assert cost == pytest.approx(highest, rel=2e-3, abs=2e-6)


@pytest.mark.parametrize("family", ["vit", "qk_norm"])
def test_a_profile_has_curves_of_every_block_and_scales_of_one_at_least(family: str) -> None:
    model = builders.toy_model(family).requires_grad_(True)
    model.zero_grad()
    before, modes = builders.state(model), [module.training for module in model.modules()]
    profile = measure_profile(model, builders.toy_images(64, seed=2), probe_images(), token_reduction="merge")
    assert builders.same_state(model, before)
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(profile.channels) == len(profile.tokens) == 3
    assert min(profile.channel_scale, profile.token_scale) >= 1
    assert profile.token_reduction == "merge" and profile.cutoff_token == 0.85
    again = measure_profile(model, builders.toy_images(64, seed=2), probe_images(), token_reduction="merge")
    assert (again.channel_scale, again.token_scale, again.tokens) == (
        profile.channel_scale, profile.token_scale, profile.tokens,
    )  # fmt: skip


def test_tokens_that_nobody_reads_any_more_go_for_nothing() -> None:
    """The class token answers, and the last block's attention is over when tokens leave it."""
    assert max(profiled("vit", "attention").tokens[-1]) < 1e-6


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_a_plan_for_a_trained_model_beats_an_even_one_of_as_many_multiply_adds(share: float) -> None:
    """Measured, not predicted: tokens removed where the profile says so, against as many from every block."""
    model = builders.toy_model("average_pooling")
    anatomy, profile = examine(model), profiled("average_pooling", "merge")
    plan = allocate(profile, anatomy, int(share * whole_macs(anatomy)), 1.0)
    check_plan(plan, anatomy)
    even = next(
        rival
        for removed in torch.linspace(0, 8, 200).tolist()
        if count_macs(anatomy, rival := evenly(anatomy, removed)) <= count_macs(anatomy, plan)
    )
    fresh = builders.toy_images(256, seed=4).normalized(slice(None))
    with torch.no_grad():
        dense = classify(model, functools.reduce(lambda x, block: block(x), blocks_of(model), embed(model, fresh)))
        ours, theirs = (divergence(dense, apply_plan(model, each)(fresh)) for each in (plan, even))
    assert ours < theirs


def evenly(anatomy: Anatomy, removed: float) -> Plan:
    counts = [max(1, round(16 - removed * (index + 1))) for index in range(anatomy.depth)]
    return Plan(blocks=tuple(keep_all_block(anatomy.blocks[0], count) for count in counts), token_reduction="merge")


def test_a_model_whose_blocks_are_the_least_of_it_has_a_profile_too() -> None:
    model, images = builders.model(num_classes=20_000), builders.images(8)
    found = measure_profile(model, images, images, token_reduction="merge")
    assert (found.channel_scale, found.token_scale) == (1.0, 1.0)


@pytest.mark.parametrize("kind", ["constant", "decreasing"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.99])
def test_a_schedule_takes_the_fewest_tokens_that_reach_the_target(kind: Schedule, share: float) -> None:
    whole, block = whole_macs(MIDDLE), MIDDLE.blocks[0]
    plan = scheduled(MIDDLE, int(share * whole), kind, "merge", 0.3)
    assert (plan.token_reduction, plan.cutoff_token) == ("merge", 0.3)
    assert all(replace(kept, num_tokens=block.num_patches) == keep_all_block(block) for kept in plan.blocks)
    assert count_macs(MIDDLE, plan) <= share * whole
    counts = [kept.num_tokens for kept in plan.blocks]
    finely = [schedule(kind, block.num_patches, MIDDLE.depth, n / 500) for n in range(500 * block.num_patches)]
    fits = [
        each for each in finely
        if count_macs(MIDDLE, Plan(blocks=tuple(keep_all_block(block, n) for n in each), token_reduction="merge"))
        <= share * whole
    ]  # fmt: skip
    assert counts == fits[0]


def test_a_schedule_that_cannot_reach_its_target_says_what_it_can_reach() -> None:
    with pytest.raises(SettingError, match="no constant schedule has 1000 multiply-adds or fewer; the smallest has"):
        scheduled(MIDDLE, 1000, "constant", "merge")
    assert scheduled(MIDDLE, whole_macs(MIDDLE), "decreasing", "lfe").blocks == keep_all_plan(MIDDLE).blocks
