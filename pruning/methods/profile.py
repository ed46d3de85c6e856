"""The profile of a dense model: costs of removing channels and tokens, block by block, and of a plan by their sum.

All costs are nats an image: the divergence of the pruned model's answers from the dense model's.

B images, D head width, h hidden units, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pruning.model.anatomy import Anatomy
from pruning.plan import Plan, TokenReduction
from pruning.scores.curves import RemovalCurves

REMOVED_SHARES = (1 / 24, 1 / 6, 1 / 2, 3 / 4, 11 / 12)
"""Shares of the tokens whose removal from one block is measured.

More between them tell hardly more: with 1/24, 1/6, 1/2 and 11/12 the logarithms of the costs differ by 0.53 from those
on other images, with seven shares by 0.50 (ViT-Tiny, 16 images, `attention-merge`).
"""

MOST_NATS = 1e4
"""The most that a part of a plan is said to cost: no answer is left long before.

A channel curve may end at any height (a covariance of too few images). So sums and products stay finite, and the
highest price of a multiply-add stays above them.
"""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The costs of removing channels (predicted) and tokens (measured) from each block of one dense model."""

    channels: tuple[RemovalCurves, ...]
    """The removal curves of every block."""
    channel_scale: float
    """Measured cost of a model with fewer channels / predicted cost; the prediction takes errors to be independent."""
    token_scale: float
    """Measured cost of a model with fewer tokens / predicted cost."""
    tokens: tuple[tuple[float, ...], ...]
    """For every block, nats at the `REMOVED_SHARES`, never falling; empty without a token reduction."""
    token_reduction: TokenReduction
    cutoff_token: float
    """Cutoff of the token filter, in (0, 1]."""
    forward_passes: float
    """Cost of the profile, in forward passes over the calibration images; a backward pass counts as two."""


def block_costs(profile: Profile, anatomy: Anatomy, plan: Plan) -> list[tuple[float, float]]:
    """Predicts the cost of each block's missing channels, and of its missing tokens, under a plan, in nats an image.

    Args:
        anatomy: of the profiled model, or of its first blocks behind an exit.
    """
    costs, num_tokens_in = [], anatomy.blocks[0].num_patches
    for block, block_plan, curves, token_costs in zip(
        anatomy.blocks, plan.blocks, profile.channels, profile.tokens, strict=False
    ):
        shape, of_tokens = block_plan.shape, np.zeros(())
        attention = curves.qk[block.head_dim - shape.qk_width] + curves.v[block.head_dim - shape.v_width]
        of_channels = scaled(profile.channel_scale, attention.numpy())
        of_channels += scaled(profile.channel_scale, curves.hidden[block.num_hidden - shape.num_hidden].numpy())
        if token_costs and shape.num_tokens < num_tokens_in:
            of_tokens = token_costs_at(token_costs, np.array(1 - shape.num_tokens / num_tokens_in))
        costs.append((float(of_channels), float(scaled(profile.token_scale, of_tokens))))
        num_tokens_in = shape.num_tokens
    return costs


def scaled(scale: float, costs: np.ndarray) -> np.ndarray:
    """Multiplies costs, in nats, by a scale above 0; those above `MOST_NATS` become that."""
    return scale * np.minimum(costs, MOST_NATS / scale)


def token_costs_at(costs: Sequence[float], shares: np.ndarray) -> np.ndarray:
    """Interpolates a block's token costs: a power law between the measured shares, and beyond the first and last.

    Args:
        costs: nats at the `REMOVED_SHARES`.
        shares: of any shape; shares of removed tokens, in (0, 1).

    Returns:
        Nats, of the shape of `shares`.
    """
    log_shares, log_costs = np.log(np.array(REMOVED_SHARES)), np.log(np.maximum(np.array(costs), 1e-7))
    places = np.clip(np.searchsorted(log_shares, np.log(shares)) - 1, 0, len(REMOVED_SHARES) - 2)
    slopes = (log_costs[1:] - log_costs[:-1]) / (log_shares[1:] - log_shares[:-1])
    return np.exp(log_costs[places] + slopes[places] * (np.log(shares) - log_shares[places]))
