"""The training loop that all methods share, and the training of a small dense model from scratch.

B images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pruning.data import Images
from pruning.device_sharing import yielding_between
from pruning.errors import VitfrontError
from pruning.precision import Precision, autocast


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Random small changes of training images, each image in its own way, anew in every epoch."""

    max_shift: float = 1.0
    """Largest shift each way, in pixels; 0 for none."""
    max_turn: float = 0.0
    """Largest turn each way, in radians, and largest change of scale, as a share."""
    flip: bool = False
    """Mirrors half of the images, left to right."""

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Returns changed images of the same shape (B, channels, height, width)."""
        pixels = jittered(pixels, self.max_shift, self.max_turn, generator)
        if not self.flip:
            return pixels
        is_flipped = torch.rand(len(pixels), generator=generator) < 0.5
        return torch.where(is_flipped.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """The settings that all trainings share."""

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 5e-4
    """Learning rate of the weights at the top of the schedule: a warm-up, then a cosine."""
    warmup_epochs: float | None = None
    """Epochs of the warm-up; by default a twentieth of all."""
    weight_decay: float = 0.05
    """Weight decay of matrices; vectors have none."""
    jitter: Jitter = field(default_factory=Jitter)
    seed: int = 0

    def num_steps(self, num_images: int) -> int:
        """The number of steps of all epochs."""
        return self.epochs * -(-num_images // self.batch_size)

    def groups(self, weights: Iterable[Tensor]) -> list[dict[str, Any]]:
        """The parameter groups of an optimizer: matrices, then vectors and scalars."""
        parameters = list(weights)
        return [
            {
                "params": [parameter for parameter in parameters if (parameter.ndim > 1) is is_matrix],
                "lr": self.learning_rate,
                "weight_decay": self.weight_decay if is_matrix else 0.0,
            }
            for is_matrix in (True, False)
        ]


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LoopSettings):
    """Settings of a training from scratch by Muon (AdamW for vectors).

    Measured: a ViT learns slowly from a thousand images: on digits, 30 epochs of AdamW end at 70 %, of Muon at 93 %.
    """

    epochs: int = 70
    learning_rate: float = 2e-2
    warmup_epochs: float | None = 3
    weight_decay: float = 0.1
    jitter: Jitter = field(default_factory=lambda: Jitter(max_turn=0.15))


class Loop:
    """The training loop, epoch by epoch; the loss is the caller's.

    It draws the order of the images and their jitter, schedules the learning rates (warm-up, then cosine), checks that
    the loss is finite, and has a state to go on from.
    """

    def __init__(
        self, images: Images, optimizer: torch.optim.Optimizer, settings: LoopSettings, device: torch.device
    ) -> None:
        """
        Args:
            optimizer: the rates of its groups are those at the top of the schedule; of a group with
                `"scheduled": False` the rate stays as it is.
        """
        self.images, self.optimizer, self.settings, self.device = images, optimizer, settings, device
        self.total_steps = settings.num_steps(len(images))
        warmup = settings.epochs / 20 if settings.warmup_epochs is None else settings.warmup_epochs
        self.warmup_steps = round(warmup * self.total_steps / settings.epochs)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.epoch = self.step = 0

    @property
    def is_done(self) -> bool:
        """True once all epochs are trained."""
        return self.epoch == self.settings.epochs

    def run_epoch(
        self,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        *,
        penalty: Callable[[], Tensor] | None = None,
        before_step: Callable[[int], None] | None = None,
        after_step: Callable[[int], None] | None = None,
    ) -> float:
        """Trains one epoch; returns its mean loss.

        Args:
            loss_of: the loss of normalised pixels (B, ...) and labels (B,), on the device.
            penalty: a term that is minimised with the loss, but not reported.
            before_step: called with the number of the step that comes, from 0.
            after_step: called with the number of the step that was done, while its gradients are still there.

        Raises:
            VitfrontError: the loss is not finite (names step and learning rate).
        """
        loss_sum = 0.0
        order = torch.randperm(len(self.images), generator=self.generator)
        for chosen in yielding_between(order.split(self.settings.batch_size)):
            if before_step is not None:
                before_step(self.step)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                if group.get("scheduled", True):
                    group["lr"] = rate * self._schedule()
            pixels = self.settings.jitter(self.images.normalized(chosen, self.device), self.generator)
            loss = loss_of(pixels, self.images.labels[chosen].to(self.device))
            if not math.isfinite(loss.item()):
                raise VitfrontError(
                    f"training diverged in step {self.step + 1}: the loss is {loss.item()}; "
                    f"lower the learning rate ({self.rates[0]:g})"
                )
            self.optimizer.zero_grad()
            (loss if penalty is None else loss + penalty()).backward()
            self.optimizer.step()
            if after_step is not None:
                after_step(self.step)
            self.step += 1
            loss_sum += loss.item() * len(chosen)
        self.epoch += 1
        return loss_sum / len(self.images)

    def _schedule(self) -> float:
        """The factor on the learning rates at this step, in (0, 1]."""
        if self.step < self.warmup_steps:
            return (self.step + 1) / self.warmup_steps
        left = max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * (self.step - self.warmup_steps) / left))

    def state(self) -> dict[str, Any]:
        """The state that a loop in another process needs, beside the model, to go on."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from the state of a loop over the same images with the same settings."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())


def train(
    model: nn.Module,
    images: Images,
    settings: TrainSettings,
    *,
    precision: Precision = "float32",
    on_epoch: Callable[[int, float], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Trains the model in place and leaves it in eval mode.

    Args:
        on_epoch: called with the epochs done and their mean loss.
        after_step: as in `Loop.run_epoch`.

    Raises:
        VitfrontError: the loss is not finite (names step and learning rate).
    """
    device = next(model.parameters()).device
    model.train().requires_grad_(True)
    loop = Loop(
        images,
        create_optimizer_v2(model, opt="muon", lr=settings.learning_rate, weight_decay=settings.weight_decay),
        settings,
        device,
    )

    def loss_of(pixels: Tensor, labels: Tensor) -> Tensor:
        with autocast(device, precision):
            logits = model(pixels)
        return F.cross_entropy(logits.float(), labels)

    while not loop.is_done:
        loss = loop.run_epoch(loss_of, after_step=after_step)
        if on_epoch is not None:
            on_epoch(loop.epoch, loss)
    model.eval().requires_grad_(False)


def jittered(pixels: Tensor, max_shift: float, max_turn: float, generator: torch.Generator) -> Tensor:
    """Moves, turns and scales every image a little, each in its own way; bilinear, edges repeated.

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
