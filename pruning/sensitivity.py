"""How much the loss minds an error in the stream of tokens, block by block: the metric of everything closed-form.

An error D_t in token t costs 1/2 E[sum_t (g_t . D_t)^2] (Fisher information: g is the gradient of the log-likelihood
of a label that the model itself draws). Averaged over tokens that is 1/2 tr(G E[D D^T]), with one G a place and one
weight for the prefix tokens and one for the patches: late in a network the class token is nearly all that counts.

B images, N tokens, P prefix tokens, C model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.anatomy import Anatomy, blocks_of, examine, parts_of
from pruning.data import Images
from pruning.precision import Precision, autocast

PATCH_FLOOR = 0.05
"""Share of the weight that is spread evenly over all tokens: with less, a few hundred class tokens are all that a
late layer is fitted on (tried 0, 0.05, 0.3, 1 on ViT-Tiny: 0.05 lost least)."""


@dataclass(frozen=True, kw_only=True)
class StreamSensitivity:
    """At one place of the stream of tokens."""

    metric: Tensor
    """(C, C), float64: G = E[sum_t g_t g_t^T]."""
    prefix_share: float
    """Share of the gradients' energy that lies on the prefix tokens, in [0, 1]."""

    def token_weights(self, num_tokens: int, num_prefix: int) -> Tensor:
        """(N,), float32, sum 1: what an error in each token counts."""
        share = self.prefix_share if num_prefix else 0.0
        weights = torch.full((num_tokens,), (1 - share) / max(1, num_tokens - num_prefix))
        weights[:num_prefix] = share / max(1, num_prefix)
        return ((1 - PATCH_FLOOR) * weights / weights.sum() + PATCH_FLOOR / num_tokens).to(self.metric.device)


@dataclass(frozen=True, kw_only=True)
class BlockSensitivity:
    """At the two places where a block adds to the stream."""

    mid: StreamSensitivity
    """After attention."""
    out: StreamSensitivity
    """After the MLP."""


@torch.enable_grad()
def measure_sensitivity(
    model: nn.Module, images: Images, *, batch_size: int = 64, precision: Precision = "float32", seed: int = 0
) -> list[BlockSensitivity]:
    """Of every block of a dense model, by one forward and one backward pass; the model is left as it was.

    Args:
        images: labels are not looked at.
        seed: of the labels that the model draws.
    """
    anatomy = examine(model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    sums = [[_Sum(anatomy), _Sum(anatomy)] for _ in range(anatomy.depth)]
    places: list[Tensor] = []

    def want_gradient(_: nn.Module, args: Any) -> tuple[Tensor]:
        return (args[0].detach().requires_grad_(True),)

    blocks = blocks_of(model)
    hooks = [blocks[0].register_forward_pre_hook(want_gradient)]
    for block in blocks:
        hooks.append(parts_of(block).norm2.register_forward_pre_hook(lambda _, args: places.append(args[0])))
        hooks.append(block.register_forward_hook(lambda _, __, output: places.append(output)))
    try:
        for batch, _ in images.batches(batch_size, device):
            places.clear()
            with autocast(device, precision):
                logits = model(batch).float()
            drawn = torch.multinomial(logits.detach().softmax(dim=1).cpu(), 1, generator=generator)[:, 0].to(device)
            gradients = torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), places)
            for index, gradient in enumerate(gradients):  # mid, out, mid, out, ...
                sums[index // 2][index % 2].add(gradient)
    finally:
        for hook in hooks:
            hook.remove()
    return [BlockSensitivity(mid=mid.done(len(images)), out=out.done(len(images))) for mid, out in sums]


class _Sum:
    """Sums over images of g g^T, and of the gradients' energy on prefix tokens and patches."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._prefix = anatomy.num_prefix_tokens
        self._metric: Tensor | float = 0.0
        self._energy = [0.0, 0.0]

    def add(self, gradient: Tensor) -> None:
        """(B, N, C)."""
        flat = gradient.float().flatten(0, 1)
        self._metric = self._metric + (flat.T @ flat).double()
        self._energy[0] += gradient[:, : self._prefix].float().square().sum().item()
        self._energy[1] += gradient[:, self._prefix :].float().square().sum().item()

    def done(self, num_images: int) -> StreamSensitivity:
        assert isinstance(self._metric, Tensor)
        prefix, patches = self._energy
        return StreamSensitivity(metric=self._metric / num_images, prefix_share=prefix / max(prefix + patches, 1e-30))
