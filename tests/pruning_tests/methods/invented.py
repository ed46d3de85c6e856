"""Profiles of random curves over anatomies of few widths, and what a plan costs by them, the slow way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pruning.measure.cost import count_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.allocation import PricedPlans
from pruning.methods.profile import REMOVED_SHARES, Profile
from pruning.model.anatomy import Anatomy
from pruning.model.surgery import keep_all_block, keep_all_plan
from pruning.plan import Plan, TokenReduction
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
DENSE_MACS = count_macs(MIDDLE, keep_all_plan(MIDDLE))


def multiples_of(anatomy: Anatomy, round_to: int) -> list[AllowedWidths]:
    return [multiples(block, round_to) for block in anatomy.blocks]


def rising(count: int, generator: torch.Generator, height: float) -> Tensor:
    """From 0, never falling, steeper and steeper."""
    steps = torch.rand(count, generator=generator, dtype=torch.float64) * torch.linspace(0, 1, count) ** 2
    return torch.cat([torch.zeros(1, dtype=torch.float64), height * steps.cumsum(0)])


def profile_of(anatomy: Anatomy, *, seed: int = 0, kind: TokenReduction = "lfe") -> Profile:
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
        power = 1.5 + torch.rand((), generator=generator)
        jitter = 1 + 0.2 * torch.rand(len(REMOVED_SHARES), generator=generator)
        tokens.append(tuple((4 * worth * torch.tensor(REMOVED_SHARES) ** power * jitter).cummax(0).values.tolist()))
    return Profile(
        channels=tuple(channels), channel_scale=1.7, token_scale=1.3, tokens=tuple(tokens), token_reduction=kind,
        cutoff_token=0.6, forward_passes=0.0,
    )  # fmt: skip


def slow_token_cost(costs: tuple[float, ...], share: float) -> float:
    """On the line through the two nearest measured points, both axes logarithmic; the outer lines go on."""
    values = [max(cost, 1e-7) for cost in costs]
    place = max([i for i in range(len(REMOVED_SHARES) - 1) if REMOVED_SHARES[i] < share], default=0)
    low, high = REMOVED_SHARES[place], REMOVED_SHARES[place + 1]
    slope = math.log(values[place + 1] / values[place]) / math.log(high / low)
    return values[place] * (share / low) ** slope


def slow_cost(profile: Profile, anatomy: Anatomy, plan: Plan, token_share: float) -> float:
    """The cost that `allocate` makes small, summed unit by unit."""
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


def random_plan(plans: PricedPlans, generator: torch.Generator) -> Plan:
    """A plan of widths and token counts that `plans` chooses from; tokens never grow."""

    def one_of(grid: Sequence[T]) -> T:
        return grid[int(torch.randint(len(grid), (), generator=generator))]

    blocks, entering = [], plans.anatomy.blocks[0].num_patches
    for dense, allowed in zip(plans.anatomy.blocks, plans.allowed_widths, strict=True):
        qk, v = one_of(allowed.attention)
        stays = float(torch.rand((), generator=generator)) < 0.4
        entering = entering if stays else one_of([count for count in plans.counts if count <= entering])
        blocks.append(
            replace(
                keep_all_block(dense, entering),
                keep_qk=(tuple(range(qk)),) * dense.num_heads,
                keep_v=(tuple(range(v)),) * dense.num_heads,
                keep_hidden=tuple(range(one_of(allowed.hidden))),
            )
        )
    return Plan(blocks=tuple(blocks), token_reduction=plans.profile.token_reduction)
