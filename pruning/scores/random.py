"""Random scores, the baseline that every other criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.scores.channel import ChannelScores, ScoringInput


def score(inputs: ScoringInput) -> ChannelScores:
    """Draws every score uniformly from [0, 1), from the seed and the index of the block."""
    anatomy = inputs.anatomy
    generator = torch.Generator().manual_seed(10_007 * inputs.seed + inputs.index)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(inputs.x.device)

    heads = anatomy.num_heads, anatomy.head_dim
    return ChannelScores(qk=drawn(*heads), v=drawn(*heads), hidden=drawn(anatomy.num_hidden))
