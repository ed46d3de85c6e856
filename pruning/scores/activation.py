"""Activation: a unit that hardly varies, or whose output hardly counts, can be replaced by its mean.

B images, N tokens, C model width, H heads, D head width, h hidden units, n channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.device_sharing import yielding_between
from pruning.model.anatomy import parts_of
from pruning.precision import autocast
from pruning.scores.channel import ChannelScores, ScoringInput


@torch.no_grad()
def score(inputs: ScoringInput) -> ChannelScores:
    """Scores a unit by its standard deviation over all calibration tokens, times the norm of its outgoing weights.

        v_c: std(v_c) |proj_c|      hidden_c: std(act(fc1 x)_c) |fc2_c|      qk_c: scale std(q_c) std(k_c) |values|

    proj_c and fc2_c are columns. A query/key pair moves the logits of its head, and a logit moves the output as far
    as the head's values spread: |values| is the root of the sum of squares of the head's v scores. So all scores are
    in units of the residual stream.
    """
    parts, anatomy = parts_of(inputs.blocks[0]), inputs.anatomy
    qkv, hidden = (_Spread(n, inputs.x.device) for n in (parts.qkv.out_features, parts.fc2.in_features))
    hooks = [
        parts.qkv.register_forward_hook(lambda _, args, output: qkv.add(output)),
        parts.fc2.register_forward_pre_hook(lambda _, args: hidden.add(args[0])),
    ]
    try:
        with autocast(inputs.x.device, inputs.precision):
            for batch in yielding_between(inputs.x.split(inputs.batch_size)):
                inputs.blocks[0](batch)
    finally:
        for hook in hooks:
            hook.remove()
    heads = anatomy.num_heads, anatomy.head_dim
    q, k, v_spread = qkv.std.reshape(3, *heads)
    v = v_spread * torch.linalg.vector_norm(parts.proj.weight, dim=0).reshape(heads)
    values = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    outgoing = torch.linalg.vector_norm(parts.fc2.weight, dim=0)
    return ChannelScores(
        qk=anatomy.head_dim**-0.5 * q * k * values, v=v, hidden=hidden.std * outgoing
    ).checked(inputs.index)  # fmt: skip


class _Spread:
    """The standard deviation of channels whose samples come in batches, summed in float64."""

    def __init__(self, num_channels: int, device: torch.device) -> None:
        self.count = 0
        self.sums = torch.zeros(2, num_channels, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Adds samples. x: (..., n)."""
        x = x.flatten(0, -2).double()
        self.count += len(x)
        self.sums += torch.stack([x.sum(dim=0), x.square().sum(dim=0)])

    @property
    def std(self) -> Tensor:
        """The standard deviation, divided by `count` (not count - 1): (n,), float32."""
        mean, mean_square = self.sums / self.count
        return (mean_square - mean.square()).clamp_min(0).sqrt().float()
