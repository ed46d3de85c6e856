"""Training a dense model from scratch, for data sets small enough to do it in a minute.

B images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pruning.data import Images
from pruning.errors import VitfrontError
from pruning.precision import Precision, autocast


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Muon (AdamW for vectors) with warm-up and a cosine schedule.

    A ViT learns slowly from a thousand images: on digits, 30 epochs of AdamW end at 70 %, of Muon at 93 %.
    """

    epochs: int = 70
    batch_size: int = 128
    learning_rate: float = 2e-2
    weight_decay: float = 0.1
    warmup_epochs: int = 3
    max_shift: float = 1.0
    """Images are moved by up to so many pixels each way, anew in every epoch; 0 for not at all."""
    max_turn: float = 0.15
    """They are turned by up to so many radians, and scaled by up to this share, each way."""
    seed: int = 0


def train(
    model: nn.Module,
    images: Images,
    settings: TrainSettings,
    *,
    precision: Precision = "float32",
    on_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Trains the model in place and leaves it in eval mode.

    Args:
        on_epoch: called with the epochs done and their mean loss.

    Raises:
        VitfrontError: the loss is not finite (names the epoch and learning rate).
    """
    device = next(model.parameters()).device
    model.train().requires_grad_(True)
    optimizer = create_optimizer_v2(model, opt="muon", lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps_an_epoch = -(-len(images) // settings.batch_size)
    warmup, total = settings.warmup_epochs * steps_an_epoch, settings.epochs * steps_an_epoch

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        loss_sum = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(settings.batch_size):
            pixels = jittered(images.normalized(chosen, device), settings.max_shift, settings.max_turn, generator)
            with autocast(device, precision):
                logits = model(pixels)
            labels = images.labels[chosen].to(device)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(chosen)
        if not math.isfinite(loss_sum):
            raise VitfrontError(
                f"training diverged in epoch {epoch + 1}: the loss is {loss_sum}; "
                f"lower the learning rate ({settings.learning_rate})"
            )
        if on_epoch is not None:
            on_epoch(epoch + 1, loss_sum / len(images))
    model.eval().requires_grad_(False)


def jittered(pixels: Tensor, max_shift: float, max_turn: float, generator: torch.Generator) -> Tensor:
    """Every image moved, turned and scaled a little, each in its own way; bilinear, edges repeated.

    Args:
        pixels: (B, channels, height, width).
        max_shift: in pixels, each way.
        max_turn: in radians, each way; the scale varies by the same share.

    Returns:
        The same shape.
    """
    if max_shift == max_turn == 0:
        return pixels
    count, _, height, width = pixels.shape
    draws = (torch.rand(4, count, generator=generator) * 2 - 1).to(pixels.device)
    angle, scale = draws[0] * max_turn, 1 + draws[1] * max_turn
    right, down = draws[2] * max_shift * 2 / width, draws[3] * max_shift * 2 / height  # an image is 2 wide and high
    rows = [
        torch.stack([angle.cos() * scale, -angle.sin() * scale * height / width, right], dim=1),
        torch.stack([angle.sin() * scale * width / height, angle.cos() * scale, down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
