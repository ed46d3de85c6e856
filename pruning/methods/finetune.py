"""Fine-tuning after pruning: trains the smaller model on the labels and on the dense model's answers.

The dense model is the teacher (`pruning.losses`: soft or hard); it sees the very images that the student sees, mixed
ones too.

B images, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pruning.data import Images
from pruning.errors import SettingError
from pruning.losses import distillation_loss, label_loss
from pruning.methods.sparsity import Masks, MaskSchedule, apply_masks
from pruning.precision import Precision, autocast
from pruning.training import Loop, LoopSettings

Distillation = Literal["none", "soft", "hard"]


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(LoopSettings):
    """Settings of the fine-tuning of a pruned model."""

    optimizer: str = "adamw"
    """Name of the optimizer: any that timm's `create_optimizer_v2` knows."""
    distillation: Distillation = "soft"
    weight: float = 0.5
    """Weight of the teacher's answers against the labels, in [0, 1]."""
    temperature: float = 1.0
    """Number that all logits are divided by in soft distillation; above 0."""
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes, in [0, 1)."""
    mixup: float = 0.0
    """Parameter a of mixup: images and labels are mixed in pairs, a share of each from Beta(a, a); 0 for not at all."""
    cutmix: float = 0.0
    """Parameter a of cutmix: a box of one image, whose share Beta(a, a) draws, is put into another; 0 for not at all.
    With mixup above 0 too, each batch gets one or the other."""

    def __post_init__(self) -> None:
        if self.distillation not in get_args(Distillation):
            raise SettingError(f"no distillation {self.distillation!r}; there are {', '.join(get_args(Distillation))}")
        ranges = {
            "weight": (0 <= self.weight <= 1, "0 to 1"),
            "temperature": (self.temperature > 0, "more than 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "0 at least, and less than 1"),
            "mixup": (self.mixup >= 0, "0 at least"),
            "cutmix": (self.cutmix >= 0, "0 at least"),
        }
        for name, (is_within, allowed) in ranges.items():
            if not is_within:
                raise SettingError(f"{name} {getattr(self, name)} is out of range; give {allowed}")


class Finetuning:
    """A fine-tuning, epoch by epoch; its state can be saved and loaded in between."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, images: Images, settings: FinetuneSettings, *,
        masks: Masks | MaskSchedule | None = None, precision: Precision = "float32",
    ) -> None:  # fmt: skip
        """
        Args:
            student: pruned or not, in eval mode, on the device to work on; it is left as it was.
            teacher: the dense model, in eval mode, on the same device; needed unless the distillation is none.
            masks: the weights that stay are trained, the others are 0 from the start and after every step; or a
                schedule that chooses the masks as the training goes on.

        Raises:
            SettingError: there is no teacher to learn from, its classes are not the student's, or timm cannot make
                the optimizer.
        """
        if settings.distillation != "none":
            if teacher is None:
                raise SettingError(f"{settings.distillation} distillation needs a teacher; give one, or set it to none")
            if _num_classes(teacher) != _num_classes(student):
                raise SettingError(
                    f"the teacher has {_num_classes(teacher)} classes and the student {_num_classes(student)}; "
                    "give one with the same, or set the distillation to none"
                )
        self.settings, self.precision, self.teacher = settings, precision, teacher
        # The mode stays eval: a distilled DeiT in train mode may give a tuple, one answer a token, where their mean
        # counts, as deployed. A ViT for pruning has no batch norm, and dropout is no help after pruning.
        self.trained = copy.deepcopy(student).eval().requires_grad_(True)
        self.schedule = masks if callable(masks) else None
        self.masks: Masks | None = None
        """The masks in force; None for no mask."""
        if masks is not None and not callable(masks):
            self._mask(masks)
        self.device = next(student.parameters()).device
        self.mix = _Mix(settings, _num_classes(student))
        self.loop = Loop(images, _optimizer(self.trained, settings), settings, self.device)

    @property
    def is_done(self) -> bool:
        """True once all epochs are trained."""
        return self.loop.is_done

    def run_epoch(self) -> dict[str, float]:
        """Trains one epoch; returns its mean loss.

        Raises:
            VitfrontError: the loss is not finite (names step and learning rate).
        """
        return {"loss": self.loop.run_epoch(self._loss, before_step=self._choose_masks, after_step=self._keep_masks)}

    def _choose_masks(self, step: int) -> None:
        if self.schedule is not None:
            masks = self.schedule(self.trained, step, self.loop.total_steps)
            if masks is not None:
                self._mask(masks)

    def _mask(self, masks: Masks) -> None:
        self.masks = masks
        apply_masks(self.trained, masks)

    def _keep_masks(self, step: int) -> None:
        if self.masks is not None:
            apply_masks(self.trained, self.masks)

    def _loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        settings = self.settings
        pixels, targets = self.mix(pixels, labels, self.loop.generator)
        with autocast(self.device, self.precision):
            logits = self.trained(pixels)
        if self.teacher is None or settings.distillation == "none":
            return label_loss(logits.float(), targets, settings.label_smoothing)
        with torch.no_grad(), autocast(self.device, self.precision):
            teacher_logits = self.teacher(pixels)
        return distillation_loss(
            logits.float(), targets, teacher_logits.float(), teacher_weight=settings.weight,
            smoothing=settings.label_smoothing, distillation=settings.distillation, temperature=settings.temperature,
        )  # fmt: skip

    def finish(self) -> nn.Module:
        """The trained model, in eval mode; after the last epoch."""
        assert self.is_done, "the training is not at its end"
        self.trained.zero_grad()
        return self.trained.requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """All that a training in another process needs to go on: tensors, numbers and strings in dicts and lists."""
        return {"loop": self.loop.state(), "weights": self.trained.state_dict(), "masks": self.masks}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of a training with the same models, images and settings."""
        self.trained.load_state_dict(state["weights"])
        self.loop.load(state["loop"])
        masks = state["masks"]
        self.masks = None if masks is None else {name: mask.to(self.device) for name, mask in masks.items()}


class _Mix:
    """timm's mixup and cutmix, drawn from a torch generator."""

    def __init__(self, settings: FinetuneSettings, num_classes: int) -> None:
        self.mixup: Mixup | None = None
        if settings.mixup > 0 or settings.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=settings.mixup, cutmix_alpha=settings.cutmix, label_smoothing=settings.label_smoothing,
                num_classes=num_classes,
            )  # fmt: skip

    def __call__(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mixes images; returns them and their shares of every class (B, K). Without mixing both are as they were."""
        if self.mixup is None:
            return pixels, labels
        even = len(labels) // 2 * 2  # timm mixes pairs: of an odd batch the last image is mixed with itself
        with numpy_seeded(int(torch.randint(2**32, (), generator=generator))):
            mixed, shares = self.mixup(pixels[:even].clone(), labels[:even])
            if even == len(labels):
                return mixed, shares
            last, last_shares = self.mixup(pixels[even:].repeat(2, 1, 1, 1), labels[even:].repeat(2))
        return torch.cat([mixed, last[:1]]), torch.cat([shares, last_shares[:1]])


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Seeds numpy's global random state, from which timm draws; afterwards it is as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _optimizer(model: nn.Module, settings: FinetuneSettings) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(
            model, opt=settings.optimizer, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    except (ValueError, ImportError, AssertionError) as error:  # unknown, or from a package that is not here
        why = str(error) or "its package is not installed"
        raise SettingError(f"no optimizer {settings.optimizer!r} ({why}); give a name of timm's, as adamw") from None


def _num_classes(model: Any) -> int:
    return int(model.num_classes)
