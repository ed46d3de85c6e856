"""Optimal Brain Surgeon: the loss that is left when a channel goes and all others are refitted."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.scores.channel import ChannelScores, ScoringInput
from pruning.scores.curves import measure_curves


def score(scene: ScoringInput) -> ChannelScores:
    """What each channel adds to the loss when it goes as the next one of its kind: the slope of its block's curve.

    The loss of query/key pairs and of values is that of all heads together, and is shared out evenly among them.
    """
    curves = measure_curves(scene.flow, scene.blocks[0])
    num_heads = scene.anatomy.num_heads
    return ChannelScores(
        qk=_by_channel(curves.qk, curves.qk_order, num_heads).to(scene.x.device),
        v=_by_channel(curves.v, curves.v_order, num_heads).to(scene.x.device),
        hidden=_by_channel(curves.hidden, curves.hidden_order[None], 1)[0].to(scene.x.device),
    ).checked(scene.index)


def _by_channel(losses: Tensor, order: Tensor, num_heads: int) -> Tensor:
    """Losses (n + 1,) by number removed, in this order (H, n) -> (H, n), float32."""
    # A channel never goes before one that goes earlier, so it counts no less.
    slopes = losses.diff().cummax(dim=0).values / num_heads
    scores = torch.zeros(order.shape, dtype=torch.float32)
    return scores.scatter(1, order, slopes.float().expand(order.shape))
