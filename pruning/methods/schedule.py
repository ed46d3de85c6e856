"""Schedules of tokens: plans that take tokens by a fixed rule, and nothing else (ToMe, Bolya et al. 2023)."""

from __future__ import annotations

import math
from typing import Literal

from pruning.errors import TargetError
from pruning.measure.cost import count_macs
from pruning.methods.bisection import bisect
from pruning.model.anatomy import Anatomy
from pruning.model.surgery import keep_all_block
from pruning.plan import Plan, TokenReduction

Schedule = Literal["constant", "decreasing"]

RESOLUTION = 1e-3
"""Tokens a block to which the least schedule is found."""


def token_counts(kind: Schedule, num_patches: int, depth: int, removed: float) -> list[int]:
    """Patches that leave each block under a schedule, by ToMe's rules; at least one stays.

    Args:
        kind: `constant` takes `removed` from each block, `decreasing` twice that from the first down to none from the
            last.
        removed: patches that go from a block on average, at least 0.
    """
    counts, left = [], float(num_patches)
    for block in range(depth):
        left -= removed if kind == "constant" else 2 * removed * (1 - block / max(1, depth - 1))
        counts.append(max(1, math.floor(left + 0.5)))
    return counts


def scheduled_plan(
    anatomy: Anatomy, target_macs: int, kind: Schedule, token_reduction: TokenReduction, cutoff_token: float = 0.85
) -> Plan:
    """The plan that takes the fewest tokens by a schedule, and nothing else, and has at most so many multiply-adds.

    Raises:
        TargetError: no plan of the schedule is that small.
    """
    num_patches = anatomy.blocks[0].num_patches

    def plan(removed: float) -> Plan:
        counts = token_counts(kind, num_patches, anatomy.depth, removed)
        blocks = tuple(keep_all_block(block, count) for block, count in zip(anatomy.blocks, counts, strict=True))
        return Plan(blocks=blocks, cutoff_token=cutoff_token, token_reduction=token_reduction)

    def fits(removed: float) -> bool:
        return count_macs(anatomy, plan(removed)) <= target_macs

    if fits(0.0):
        return plan(0.0)
    most = float(num_patches)
    if not fits(most):
        least = count_macs(anatomy, plan(most))
        raise TargetError(f"no {kind} schedule has {target_macs} multiply-adds or fewer; the smallest has {least}")
    _, removed = bisect(fits, 0.0, most, math.ceil(math.log2(most / RESOLUTION)))
    return plan(removed)
