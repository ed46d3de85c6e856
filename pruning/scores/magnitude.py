"""Magnitude: a unit with small weights counts little.

H heads, D head width, C model width.
"""

from __future__ import annotations

from pruning.model.anatomy import parts_of
from pruning.scores.channel import ChannelScores, ScoringInput


def score(inputs: ScoringInput) -> ChannelScores:
    """Scores a unit by its mean squared incoming weight: its row of qkv or fc1, both rows of a query/key pair."""
    parts = parts_of(inputs.blocks[0])
    heads = 3, inputs.anatomy.num_heads, inputs.anatomy.head_dim
    q, k, v = parts.qkv.weight.detach().square().mean(dim=1).reshape(heads)
    hidden = parts.fc1.weight.detach().square().mean(dim=1)
    return ChannelScores(qk=(q + k) / 2, v=v, hidden=hidden).checked(inputs.index)
