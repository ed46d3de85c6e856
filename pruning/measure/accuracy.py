"""Logits of a model, top-1 accuracy and its interval.

B images, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.precision import Precision, autocast


@torch.inference_mode()
def predict(model: nn.Module, images: Images, *, batch_size: int = 64, precision: Precision = "float32") -> Tensor:
    """Returns the logits of all images, (B, K) float32, on the model's device; puts the model in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    with autocast(device, precision):
        return torch.cat([model(batch).float() for batch, _ in images.batches(batch_size, device)])


def top1(logits: Tensor, labels: Tensor) -> float:
    """Returns the share of images whose largest logit is their label, in [0, 1]; a NaN among the logits is wrong.

    Args:
        logits: (B, K).
        labels: (B,), class indices.
    """
    return right_answers(logits, labels).cpu().double().mean().item()


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Tells for each image whether its largest logit is its label; a NaN among the logits is wrong. (B,), bool.

    Args:
        logits: (B, K).
        labels: (B,), class indices.
    """
    return (logits.argmax(dim=1) == labels.to(logits.device)) & ~logits.isnan().any(dim=1)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share seen in `count` draws (Wilson 1927), within [0, 1]."""
    z = 1.959964
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
