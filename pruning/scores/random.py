"""Random: what every other criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.scores.channel import ChannelScores, ScoringInput


def score(scene: ScoringInput) -> ChannelScores:
    """Uniform in [0, 1), from the seed and the index of the block."""
    anatomy = scene.anatomy
    generator = torch.Generator().manual_seed(10_007 * scene.seed + scene.index)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(scene.x.device)

    heads = anatomy.num_heads, anatomy.head_dim
    return ChannelScores(qk=drawn(*heads), v=drawn(*heads), hidden=drawn(anatomy.num_hidden))
