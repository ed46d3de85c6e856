"""Sensitivity of the loss to an error in the stream of tokens, block by block: the metric of everything closed-form.

An error D_t in token t costs 1/2 E[sum_t (g_t . D_t)^2], Fisher information: g is the gradient of a random sum of the
logits whose covariance is that of the gradients of the log-likelihood, diag(p) - p p^T. Averaged over tokens that is
1/2 tr(G E[D D^T]), with one G for each place, and one weight for the prefix tokens and one for the patches: late in a
network the class token is nearly all that counts.

B images, N tokens, P prefix tokens, C model width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.model.anatomy import BlockAnatomy, blocks_of, classify, embed, examine
from pruning.model.surgery import as_slim
from pruning.precision import Precision, autocast

PATCH_FLOOR = 0.05
"""The share of the weight that is spread evenly over all tokens: with less, a few hundred class tokens are all that a
late layer is fitted on (tried 0, 0.05, 0.3, 1 on ViT-Tiny: 0.05 lost least)."""

SHRINKAGE = 0.2
"""The share of a metric that is spread evenly over all directions, its trace kept.

A hundred images have a hundred gradients of a late class token: directions that they leave out of 192 would count as
free, and everything would be fitted into them (ViT-Tiny, 128 images, channels only: a fifth of the divergence)."""


@dataclass(frozen=True, kw_only=True)
class StreamSensitivity:
    """The sensitivity of the loss to an error at one place of the stream of tokens."""

    metric: Tensor
    """(C, C), float64: G = E[sum_t g_t g_t^T], shrunk towards a multiple of the identity."""
    prefix_share: float
    """The share of the gradients' energy that lies on the prefix tokens, in [0, 1]."""

    def to(self, device: torch.device | str) -> StreamSensitivity:
        return replace(self, metric=self.metric.to(device))

    def token_weights(self, num_tokens: int, num_prefix: int) -> Tensor:
        """Returns how much an error in each token counts: (N,), float32, sum 1."""
        share = self.prefix_share if num_prefix else 0.0
        weights = torch.full((num_tokens,), (1 - share) / max(1, num_tokens - num_prefix))
        weights[:num_prefix] = share / max(1, num_prefix)
        return ((1 - PATCH_FLOOR) * weights / weights.sum() + PATCH_FLOOR / num_tokens).to(self.metric.device)


@dataclass(frozen=True, kw_only=True)
class BlockSensitivity:
    """The sensitivity at the two places where a block adds to the stream."""

    mid: StreamSensitivity
    """The place after attention."""
    out: StreamSensitivity
    """The place after the MLP."""

    def to(self, device: torch.device | str) -> BlockSensitivity:
        return BlockSensitivity(mid=self.mid.to(device), out=self.out.to(device))


@torch.enable_grad()
def measure_sensitivity(
    model: nn.Module, images: Images, *, batch_size: int = 64, precision: Precision = "float32", seed: int = 0
) -> list[BlockSensitivity]:
    """Measures the sensitivity of a dense model's blocks, by one forward and one backward pass.

    The model is left as it was.

    Args:
        images: their labels are not looked at.
        seed: of the random sums of logits.
    """
    anatomy = examine(model)
    device = next(model.parameters()).device
    generator, signs = torch.Generator().manual_seed(seed), torch.empty(0)
    blocks = [
        as_slim(block, block_anatomy, is_last=False)
        for block, block_anatomy in zip(blocks_of(model), anatomy.blocks, strict=True)
    ]
    sums = [(_GradientSum(block_anatomy), _GradientSum(block_anatomy)) for block_anatomy in anatomy.blocks]
    start = 0
    for batch, _ in images.batches(batch_size, device):
        places: list[Tensor] = []
        with autocast(device, precision):
            x = embed(model, batch).detach().requires_grad_(True)
            for block in blocks:
                mid, x = block.halves(x)
                places += [mid, x]
            logits = classify(model, x).float()
        if not len(signs):  # all at once: the same whatever the batches
            signs = torch.randint(2, (len(images), logits.shape[1]), generator=generator, dtype=torch.int8) * 2 - 1
        drawn = fisher_noise(logits.detach(), signs[start : start + len(batch)].to(device))
        start += len(batch)
        gradients = torch.autograd.grad(logits, places, drawn)
        for (mid_sum, out_sum), mid, out in zip(sums, gradients[::2], gradients[1::2], strict=True):
            mid_sum.add(mid)
            out_sum.add(out)
    return [BlockSensitivity(mid=mid.mean(len(images)), out=out.mean(len(images))) for mid, out in sums]


def fisher_noise(logits: Tensor, signs: Tensor) -> Tensor:
    """Gives weights of the logits with the covariance of a gradient of the log-likelihood: diag(p) - p p^T.

    A label that the model draws has it too; but where the model is sure, it is the same label nearly always, and what
    an image is about to be taken for instead is seen in few of them. With random signs it is seen in all.

    Args:
        logits: (B, K); p is their softmax.
        signs: (B, K), -1 or 1.

    Returns:
        (B, K), float32.
    """
    shares = logits.float().softmax(dim=1)
    noise = shares.sqrt() * signs
    return noise - shares * noise.sum(dim=1, keepdim=True)


class _GradientSum:
    """Sums over images of g g^T, and of the gradients' energy on prefix tokens and on patches."""

    def __init__(self, anatomy: BlockAnatomy) -> None:
        self._prefix = anatomy.num_prefix_tokens
        self._metric: Tensor | float = 0.0
        self._energy = [0.0, 0.0]

    def add(self, gradient: Tensor) -> None:
        """Adds the gradients of a batch. (B, N, C)."""
        flat = gradient.float().flatten(0, 1)
        self._metric = self._metric + (flat.T @ flat).double()
        self._energy[0] += gradient[:, : self._prefix].float().square().sum().item()
        self._energy[1] += gradient[:, self._prefix :].float().square().sum().item()

    def mean(self, num_images: int) -> StreamSensitivity:
        assert isinstance(self._metric, Tensor)
        prefix, patches = self._energy
        metric = self._metric / num_images
        even = metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
        metric = torch.lerp(metric, even, SHRINKAGE)
        return StreamSensitivity(metric=metric, prefix_share=prefix / max(prefix + patches, 1e-30))
