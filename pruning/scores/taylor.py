"""First-order Taylor: estimates how far the loss moves if a channel's weights go to zero (NViT, arXiv 2110.04869).

B images, N tokens, C model width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.device_sharing import yielding_between
from pruning.model.anatomy import classify, parts_of
from pruning.precision import autocast
from pruning.scores.channel import ChannelScores, ScoringInput

Loss = Callable[[Tensor, Tensor, slice], Tensor]
"""The loss of a batch, summed over its images, from the block's output (B, N, C), the logits, and the images' slice."""


def score(inputs: ScoringInput) -> ChannelScores:
    """Returns the Taylor score of the cross-entropy, on images as they are; see `taylor_scores`."""

    def loss(_after: Tensor, logits: Tensor, batch: slice) -> Tensor:
        return F.cross_entropy(logits, inputs.labels[batch], reduction="sum")

    return taylor_scores(inputs, inputs.x, loss)


def taylor_scores(inputs: ScoringInput, x: Tensor, loss: Loss) -> ChannelScores:
    """Scores a channel by the sum over its weights of (weight * mean gradient)^2; query and key of a pair add.

    The weights are the channel's row of qkv, or a hidden unit's row of fc1.

    Args:
        x: (B, N, C), the block's input.
        loss: its mean over all images is differentiated, whatever the batch size; it is given float32.

    Returns:
        The scores, float32, on x's device.
    """
    parts = parts_of(inputs.blocks[0])
    weights = [parts.qkv.weight, parts.fc1.weight]
    with _requiring_grad(weights):
        gradients = _mean_gradients(inputs, x, loss, weights)
    qkv, hidden = (
        (weight.detach() * gradient).square().sum(dim=1) for weight, gradient in zip(weights, gradients, strict=True)
    )
    q, k, v = qkv.reshape(3, inputs.anatomy.num_heads, inputs.anatomy.head_dim)
    return ChannelScores(qk=q + k, v=v, hidden=hidden).checked(inputs.index)


def _mean_gradients(inputs: ScoringInput, x: Tensor, loss: Loss, weights: Sequence[Tensor]) -> list[Tensor]:
    gradients = [torch.zeros_like(weight) for weight in weights]
    for start in yielding_between(range(0, len(x), inputs.batch_size)):
        batch = slice(start, start + inputs.batch_size)
        with autocast(x.device, inputs.precision):
            after = inputs.blocks[0](x[batch])
            last = after
            for block in inputs.blocks[1:]:
                last = block(last)
            logits = classify(inputs.model, last)
        total = loss(after.float(), logits.float(), batch)
        for gradient, batch_gradient in zip(gradients, torch.autograd.grad(total, weights), strict=True):
            gradient += batch_gradient / len(x)
    return gradients


@contextmanager
def _requiring_grad(weights: Sequence[Tensor]) -> Iterator[None]:
    """Has gradients computed for these weights within the context."""
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad_(flag)
