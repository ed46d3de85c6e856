"""Lottery tickets: is it the mask that lets a sparse model learn, or the weights it started from?

In every round the model is trained and pruned by magnitude; the weights that survive go back to their start and are
trained again under the mask (Frankle and Carbin 2019). At the last mask the ticket is compared with weights drawn anew:
as they come, and scaled to the inputs that each output has left (Evci et al. 2022), without which signal and gradient
start too small. `pruning.methods.sparsity` says which weights are masked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.errors import SettingError
from pruning.measure.accuracy import predict, top1
from pruning.methods.sparsity import Masks, apply_masks, magnitude_masks, scale_to_fan_in, sparse_layers, sparsity_of
from pruning.precision import Precision
from pruning.training import TrainSettings, train

Arm = Literal["dense", "ticket", "random", "sparse-aware"]
"""The weights that a training starts from: those given, without a mask; rewound; drawn anew; drawn anew and scaled to
the fan-in."""


@dataclass(frozen=True, kw_only=True)
class LotterySettings:
    """One lottery: a training for the dense model, one for each round, and two for the weights drawn anew."""

    training: TrainSettings
    """Settings of the training of every arm: as many steps, the images in the same order."""
    sparsity: float = 0.8
    """Share of the blocks' weights that are gone in the last round, in (0, 1)."""
    rounds: int = 3
    """Number of rounds in which the weights go; each takes the same share of those that are left."""
    rewind_step: int = 0
    """Step of the dense training whose weights the survivors, and all that is not masked, go back to: 0 is the start.
    The ticket is then trained as long as the other arms, so these steps come on top."""

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise SettingError(f"sparsity {self.sparsity} is out of range; give more than 0 and less than 1")
        if self.rounds < 1:
            raise SettingError(f"{self.rounds} rounds prune nothing; give 1 at least")

    def sparsity_after(self, rounds: int) -> float:
        """Share of the weights that are gone after so many rounds: 1 - (1 - sparsity)^(rounds / all rounds)."""
        return 1 - (1 - self.sparsity) ** (rounds / self.rounds)

    def num_steps(self, num_images: int) -> int:
        """The number of steps of each training.

        Raises:
            SettingError: the rewind step is none of them.
        """
        steps = self.training.num_steps(num_images)
        if not 0 <= self.rewind_step <= steps:
            raise SettingError(f"rewind step {self.rewind_step} is not in the training; give 0 to {steps}")
        return steps


@dataclass(frozen=True, kw_only=True)
class LotteryRow:
    """The outcome of one training."""

    arm: Arm
    round: int
    """Number of prunings before; 0 for the dense model."""
    sparsity: float
    """Share of the blocks' weights that are 0, counted after training."""
    seed: int
    """Seed of the training."""
    top1: float
    """Accuracy on the val images, in [0, 1]."""
    gradient_norms: tuple[float, ...]
    """`surviving_gradient_norm` at each step, before it is taken."""


@dataclass(frozen=True, kw_only=True)
class LotteryResult:
    """The outcomes of all trainings of one lottery."""

    rows: tuple[LotteryRow, ...]
    """The dense model, then the ticket of each round, then the two arms that were drawn anew."""
    masks: Masks
    """The masks of the last round."""


def run_lottery(
    model: nn.Module,
    images: Images,
    val: Images,
    settings: LotterySettings,
    *,
    fresh: Callable[[int], nn.Module],
    precision: Precision = "float32",
    on_stage: Callable[[Arm, int, nn.Module], None] | None = None,
) -> LotteryResult:
    """Runs the lottery of one seed, that of `settings.training`.

    Args:
        model: the weights that every ticket starts from; left as it was.
        images: to train on.
        val: images to measure accuracy on; nothing is chosen by it.
        fresh: returns the untrained model, drawn from a seed.
        on_stage: called before each training with its arm, its round and the model that will be trained.

    Raises:
        SettingError: the rewind step is not in the training.
        VitfrontError: a training diverged.
    """
    settings.num_steps(len(images))
    device, seed = next(model.parameters()).device, settings.training.seed

    def train_arm(
        arm: Arm, number: int, start: nn.Module, masks: Masks, after_step: Callable[[int], None] | None = None
    ) -> LotteryRow:
        """Trains a model in place under masks."""
        apply_masks(start, masks)
        if on_stage is not None:
            on_stage(arm, number, start)
        norms = train_masked(start, masks, images, settings.training, precision=precision, after_step=after_step)
        accuracy = top1(predict(start, val, precision=precision), val.labels)
        return LotteryRow(
            arm=arm, round=number, sparsity=sparsity_of(start), seed=seed, top1=accuracy, gradient_norms=norms
        )

    ticket, early = copy.deepcopy(model), _copied(model)

    def keep_early(step: int) -> None:
        if step + 1 == settings.rewind_step:
            early.update(_copied(ticket))

    masks = magnitude_masks(ticket, 0.0)
    rows = [train_arm("dense", 0, ticket, masks, keep_early)]
    for number in range(1, settings.rounds + 1):
        masks = magnitude_masks(ticket, settings.sparsity_after(number))  # masked weights are 0: they go first again
        ticket.load_state_dict(early)
        rows.append(train_arm("ticket", number, ticket, masks))
    # One draw for both, so that they differ by the scale alone; ~seed is never the seed that `model` was made from.
    rows.append(train_arm("random", settings.rounds, fresh(~seed).to(device), masks))
    scaled = fresh(~seed).to(device)
    scale_to_fan_in(scaled, masks)
    rows.append(train_arm("sparse-aware", settings.rounds, scaled, masks))
    return LotteryResult(rows=tuple(rows), masks=masks)


def train_masked(
    model: nn.Module,
    masks: Masks,
    images: Images,
    settings: TrainSettings,
    *,
    precision: Precision = "float32",
    after_step: Callable[[int], None] | None = None,
) -> tuple[float, ...]:
    """Trains a model in place, as `train` does; the masked weights are 0 before and after every step.

    Args:
        after_step: called when the masked weights are 0 again.

    Returns:
        `surviving_gradient_norm` at each step, before it is taken.
    """
    norms: list[float] = []

    def after(step: int) -> None:
        norms.append(surviving_gradient_norm(model, masks))
        apply_masks(model, masks)
        if after_step is not None:
            after_step(step)

    # Tried and lost: no gradient for masked weights. Their share of it is missing in Muon's step then, which turns the
    # gradient of a whole matrix: at 55 % on digits, 12 epochs end at a training loss of 1.57 instead of 0.92.
    apply_masks(model, masks)
    train(model, images, settings, precision=precision, after_step=after)
    return tuple(norms)


def surviving_gradient_norm(model: nn.Module, masks: Masks) -> float:
    """The L2 norm of the gradients of all blocks' weights that stay, as the last backward pass left them."""
    squares = []
    for name, layer in sparse_layers(model):
        assert layer.weight.grad is not None
        squares.append((layer.weight.grad * masks[name]).square().sum())
    return float(torch.stack(squares).sum().sqrt())


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
