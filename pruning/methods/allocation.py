"""Allocates what to prune by one price of a multiply-add for all units of all blocks (`method: global`).

A plan of least cost for its multiply-adds pays the same price for the last one everywhere. The price is found by
bisection, and for a given price the numbers of tokens by dynamic programming from the last block to the first. What
channels and tokens cost tells a profile (`pruning.methods.profile`).

D head width, h hidden units, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from pruning.errors import TargetError
from pruning.measure.cost import channel_macs, count_macs, reduction_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.bisection import bisect
from pruning.methods.profile import Profile, block_costs, scaled, token_costs_at
from pruning.model.anatomy import Anatomy
from pruning.model.surgery import keep_all_plan
from pruning.plan import BlockPlan, BlockShape, Indices, Plan

NUM_COUNTS = 99
"""Numbers of tokens that the dynamic programming tells apart, evenly from 1 to all."""

REDUCTION_WEIGHTS = (1.0, 0.5, 0.25, 0.0)
"""Factors on the time of a token reduction, tried one after the other until a plan comes close to its target: where
reductions are slow there may be none between many of them and hardly any."""

CLOSE_ENOUGH = 0.05
"""Share of the dense multiply-adds by which a plan may be smaller than asked before the next weight is tried."""

LOWEST_PRICE, HIGHEST_PRICE = 1e-16, 1e3
"""Prices in nats a multiply-add; at the highest, also a tiny model's least plan is the cheapest."""

PRICE_STEPS = 40
"""Bisections of the price."""


def allocate(
    profile: Profile,
    anatomy: Anatomy,
    target_macs: int,
    token_share: float = 0.5,
    allowed_widths: Sequence[AllowedWidths] | None = None,
) -> Plan:
    """A plan of little predicted cost with at most so many multiply-adds.

    No plan on the lower convex hull of costs and multiply-adds that is as small undercuts it; one off the hull may.

    Args:
        token_share: in [0, 1]: 0.5 weighs channels and tokens as the profile does; the cost of channels is
            multiplied by token_share / (1 - token_share). So 0 prunes channels alone, and 1 tokens alone. Without a
            token reduction it has no effect.
        allowed_widths: of each block, and what the time of a token reduction is counted as; by default any width.

    Raises:
        TargetError: no plan is that small.
    """
    dense = replace(keep_all_plan(anatomy), cutoff_token=profile.cutoff_token, token_reduction=profile.token_reduction)
    dense_macs = count_macs(anatomy, dense)
    if dense_macs <= target_macs:
        return dense
    if allowed_widths is None:
        allowed_widths = [multiples(block, 1) for block in anatomy.blocks]
    best: Plan | None = None
    smallest_macs = dense_macs
    for weight in REDUCTION_WEIGHTS:
        weighted = [replace(allowed, reduction=weight * allowed.reduction) for allowed in allowed_widths]
        plans = PricedPlans(profile, anatomy, token_share, weighted)
        smallest_macs = count_macs(anatomy, plans.plan(HIGHEST_PRICE))
        if smallest_macs > target_macs:
            continue
        best = _cheapest_within(plans, target_macs)
        if count_macs(anatomy, best) >= target_macs - CLOSE_ENOUGH * dense_macs:
            break
    if best is None:
        raise TargetError(
            f"no plan has {target_macs} multiply-adds or fewer; the smallest that may be made has {smallest_macs}"
        )
    return best


def _cheapest_within(plans: PricedPlans, target_macs: int) -> Plan:
    """The plan of least cost found with at most so many multiply-adds; at the highest price there is one.

    Two prices next to each other give a plan within the target and one above it. Where these lie far apart, a plan
    whose first blocks are the larger one's comes closer.
    """

    def fits(plan: Plan) -> bool:
        return count_macs(plans.anatomy, plan) <= target_macs

    low, high = bisect(lambda price: fits(plans.plan(price)), LOWEST_PRICE, HIGHEST_PRICE, PRICE_STEPS, geometric=True)
    larger, within = plans.plan(low), plans.plan(high)
    mixed = [within]
    for index in range(1, plans.anatomy.depth + 1):
        blocks = larger.blocks[:index] + within.blocks[index:]
        counts = [block.num_tokens for block in blocks]
        if counts == sorted(counts, reverse=True):
            mixed.append(replace(within, blocks=blocks))
    return min(filter(fits, mixed), key=plans.cost)


@dataclass(frozen=True)
class _Cheapest:
    """The widths of least cost at a price, by the number of tokens."""

    costs: np.ndarray
    """(counts,) cost + price * multiply-adds, in nats."""
    widths: np.ndarray
    """(counts, n): query/key and value width, or hidden units."""


class PricedPlans:
    """The plans of least cost at any price of a multiply-add."""

    def __init__(
        self, profile: Profile, anatomy: Anatomy, token_share: float, allowed_widths: Sequence[AllowedWidths]
    ) -> None:
        """Takes the arguments of `allocate`."""
        self.profile, self.anatomy = profile, anatomy
        num_patches = anatomy.blocks[0].num_patches
        self.has_tokens = profile.token_reduction != "none" and token_share > 0
        self.counts = sorted({round(1 + (num_patches - 1) * i / (NUM_COUNTS - 1)) for i in range(NUM_COUNTS)})
        """Numbers of patch tokens to choose from, ascending."""
        if not self.has_tokens:
            self.counts = [num_patches]
        if self.has_tokens and token_share >= 1:
            allowed_widths = [
                replace(multiples(block, max(block.head_dim, block.num_hidden)), reduction=allowed.reduction)
                for block, allowed in zip(anatomy.blocks, allowed_widths, strict=True)
            ]
        self.allowed_widths = allowed_widths
        is_weighed = self.has_tokens and token_share < 1
        self.channel_scale = profile.channel_scale * (token_share / (1 - token_share) if is_weighed else 1.0)
        self._reduction_macs = self._all_reduction_macs()
        self._reduces = np.array(self.counts)[None] < np.array(self.counts)[:, None]
        """(counts in, counts out)"""
        self._removal_costs = [self._all_removal_costs(index) for index in range(anatomy.depth)]
        self._plans: dict[float, Plan] = {}

    def plan(self, price: float) -> Plan:
        """The plan that no other undercuts by cost + price * multiply-adds.

        Args:
            price: nats a multiply-add, at least 0.
        """
        if price not in self._plans:
            self._plans[price] = self._cheapest_plan(price)
        return self._plans[price]

    def _cheapest_plan(self, price: float) -> Plan:
        depth = self.anatomy.depth
        attention = [self._cheapest_attention(index, price) for index in range(depth)]
        mlp = [self._cheapest_mlp(index, price) for index in range(depth)]
        cost_to_go, choices = np.zeros(len(self.counts)), []  # of a block and all later ones, by tokens that enter it
        for index in reversed(range(depth)):
            total = attention[index].costs[:, None] + mlp[index].costs[None] + cost_to_go[None]
            reduction = self._reduction_macs + self.allowed_widths[index].reduction * self._reduces
            total = total + self._removal_costs[index] + price * reduction
            choices.append(total.argmin(axis=1))
            cost_to_go = total.min(axis=1)
        blocks, entering = [], len(self.counts) - 1
        for index, choice in enumerate(reversed(choices)):
            leaving = int(choice[entering])
            qk, v = attention[index].widths[entering].tolist()
            (hidden,) = mlp[index].widths[leaving].tolist()
            blocks.append(self._block(index, qk, v, hidden, self.counts[leaving]))
            entering = leaving
        return Plan(
            blocks=tuple(blocks), cutoff_token=self.profile.cutoff_token, token_reduction=self.profile.token_reduction
        )

    def cost(self, plan: Plan) -> float:
        """The predicted cost of a plan, channels weighed by the token share, in nats an image."""
        costs = block_costs(replace(self.profile, channel_scale=self.channel_scale), self.anatomy, plan)
        return sum(map(sum, costs))

    def _num_tokens(self, index: int) -> list[int]:
        """The counts, with the prefix tokens, at a block."""
        block = self.anatomy.blocks[index]
        return [block.num_prefix_tokens + min(count, block.num_patches) for count in self.counts]

    def _cheapest_attention(self, index: int, price: float) -> _Cheapest:
        """The widths of a block's attention, by the number of tokens that enter."""
        block, curves = self.anatomy.blocks[index], self.profile.channels[index]
        channel = np.array([block.num_heads * channel_macs(block, tokens) for tokens in self._num_tokens(index)])
        qk, v = np.array(self.allowed_widths[index].attention).T
        cost = scaled(self.channel_scale, curves.qk.numpy()[block.head_dim - qk] + curves.v.numpy()[block.head_dim - v])
        total = cost[None] + price * channel[:, None] * (qk + v)[None]
        return _Cheapest(total.min(axis=1), np.stack([qk, v], axis=1)[total.argmin(axis=1)])

    def _cheapest_mlp(self, index: int, price: float) -> _Cheapest:
        """The hidden units of a block, by the number of tokens that leave its attention."""
        block, tokens = self.anatomy.blocks[index], np.array(self._num_tokens(index))
        widths = np.array(self.allowed_widths[index].hidden)
        cost = scaled(self.channel_scale, self.profile.channels[index].hidden.numpy()[block.num_hidden - widths])
        total = cost[None] + price * (2 * tokens * block.width)[:, None] * widths[None]
        return _Cheapest(total.min(axis=1), widths[total.argmin(axis=1), None])

    def _all_removal_costs(self, index: int) -> np.ndarray:
        """(counts in, counts out): nats that the removal of tokens costs; infinite where they would grow."""
        if not self.has_tokens:
            return np.zeros((1, 1))
        counts = np.array(self.counts)
        shares = 1 - counts[None] / counts[:, None]
        costs = token_costs_at(self.profile.tokens[index], np.clip(shares, 1e-9, None))
        return np.where(shares > 0, scaled(self.profile.token_scale, costs), np.where(shares < 0, np.inf, 0.0))

    def _all_reduction_macs(self) -> np.ndarray:
        """(counts in, counts out): multiply-adds of the reduction itself."""
        block, macs = self.anatomy.blocks[0], np.zeros((len(self.counts), len(self.counts)))
        for row, entering in enumerate(self.counts):
            for column, leaving in enumerate(self.counts[:row]):
                shape = BlockShape(
                    num_heads=block.num_heads, qk_width=block.head_dim, v_width=block.head_dim,
                    num_hidden=block.num_hidden, num_tokens=leaving,
                )  # fmt: skip
                macs[row, column] = reduction_macs(block, shape, entering, self.profile.token_reduction)
        return macs

    def _block(self, index: int, qk: int, v: int, hidden: int, num_tokens: int) -> BlockPlan:
        curves, block = self.profile.channels[index], self.anatomy.blocks[index]
        return BlockPlan(
            keep_heads=tuple(range(block.num_heads)),
            keep_qk=kept_channels(curves.qk_order, qk),
            keep_v=kept_channels(curves.v_order, v),
            keep_hidden=kept_units(curves.hidden_order, hidden),
            num_tokens=min(num_tokens, block.num_patches),
        )


def kept_units(order: Tensor, count: int) -> Indices:
    """Takes the `count` last of all units, ascending. (h,), in the order in which they go."""
    return tuple(order[len(order) - count :].sort().values.tolist())


def kept_channels(order: Tensor, count: int) -> tuple[Indices, ...]:
    """Takes the `count` last channels of every head, ascending. (H, D), in the order in which they go."""
    return tuple(kept_units(row, count) for row in order)
