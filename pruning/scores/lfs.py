"""Low-frequency sensitivity: which channels serve the low frequencies (VTC-LFC, eq. 3-5).

B images, N tokens, C model width, H heads, D head width, h hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.anatomy import Anatomy, classify, parts_of, summary_token
from pruning.errors import VitfrontError
from pruning.precision import Precision, autocast


@dataclass(frozen=True, kw_only=True)
class ChannelScores:
    """The scores of one block's channels; larger = keep. All come from one formula and compare with each other."""

    qk: Tensor
    """(H, D): query and key channels of one index go together, so their scores add."""
    v: Tensor
    """(H, D)."""
    hidden: Tensor
    """(h,)."""

    def __post_init__(self) -> None:
        for name in ("qk", "v", "hidden"):
            if not getattr(self, name).isfinite().all():
                raise VitfrontError(
                    f"the {name} scores of a block are not finite; its weights or inputs are not either"
                )


def score_channels(
    model: nn.Module,
    anatomy: Anatomy,
    blocks: Sequence[nn.Module],
    x: Tensor,
    targets: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    batch_size: int = 32,
    precision: Precision = "float32",
) -> ChannelScores:
    """LFS of the channels of `blocks[0]`: sum over a channel's weights of (weight * mean gradient)^2.

    The gradient is of alpha * cross-entropy + (1 - alpha) * KL(softmax T || softmax T'), on low-pass filtered images:
    T the class token after the block in the dense model on the image as it is, T' that of the filtered image here.

    Args:
        model: gives the tail after the last block.
        blocks: the block that is scored, at its dense widths, and all after it.
        x: (B, N, C) what enters the block for the filtered images.
        targets: (B, C) the T's.
        labels: (B,).
        alpha: weight of the cross-entropy, in [0, 1].

    Returns:
        The scores, float32, on x's device.
    """
    parts = parts_of(blocks[0])
    weights = [parts.qkv.weight, parts.fc1.weight]
    with _requiring_grad(weights):
        gradients = [torch.zeros_like(weight) for weight in weights]
        for start in range(0, len(x), batch_size):
            batch = slice(start, start + batch_size)
            with autocast(x.device, precision):
                after = blocks[0](x[batch])
                logits = after
                for block in blocks[1:]:
                    logits = block(logits)
                logits = classify(model, logits)
            summary = summary_token(anatomy, after).float().log_softmax(dim=1)
            target = targets[batch].float().log_softmax(dim=1)
            drift = F.kl_div(summary, target, reduction="sum", log_target=True)
            loss = alpha * F.cross_entropy(logits.float(), labels[batch], reduction="sum") + (1 - alpha) * drift
            for total, gradient in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                total += gradient / len(x)
    qkv, hidden = (
        (weight.detach() * gradient).square().sum(dim=1) for weight, gradient in zip(weights, gradients, strict=True)
    )
    q, k, v = qkv.reshape(3, anatomy.num_heads, anatomy.head_dim)
    return ChannelScores(qk=q + k, v=v, hidden=hidden)


class _requiring_grad:
    """Gradients for these weights alone, for a while."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights

    def __enter__(self) -> None:
        self.before = [weight.requires_grad for weight in self.weights]
        for weight in self.weights:
            weight.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for weight, before in zip(self.weights, self.before, strict=True):
            weight.requires_grad_(before)
