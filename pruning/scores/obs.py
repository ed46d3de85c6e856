"""Optimal Brain Surgeon: scores a channel by the loss that is left when it goes and all others are refitted."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.scores.channel import ChannelScores, ScoringInput
from pruning.scores.curves import measure_curves


def score(inputs: ScoringInput) -> ChannelScores:
    """Scores a channel by what it adds to the loss as the next one of its kind to go: the slope of its block's curve.

    Query/key pairs and values have one curve for all heads together; its loss is shared out evenly among the heads.
    """
    curves = measure_curves(inputs.repair, inputs.blocks[0])
    num_heads = inputs.anatomy.num_heads
    return ChannelScores(
        qk=_by_channel(curves.qk, curves.qk_order, num_heads).to(inputs.x.device),
        v=_by_channel(curves.v, curves.v_order, num_heads).to(inputs.x.device),
        hidden=_by_channel(curves.hidden, curves.hidden_order[None], 1)[0].to(inputs.x.device),
    ).checked(inputs.index)


def _by_channel(losses: Tensor, order: Tensor, num_heads: int) -> Tensor:
    """Turns losses by number removed (n + 1,), in the order (H, n), into a score for each channel: (H, n), float32."""
    # A channel that goes later counts no less than those that go before it.
    slopes = losses.diff().cummax(dim=0).values / num_heads
    scores = torch.zeros(order.shape, dtype=torch.float32)
    return scores.scatter(1, order, slopes.float().expand(order.shape))
