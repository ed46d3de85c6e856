"""Losses of labels and of a teacher, for every training here.

A student learns from its teacher softly, by the divergence of their answers at a temperature (Hinton et al. 2015), or
hard, by the cross-entropy with the teacher's first choice as label (DeiT, Touvron et al. 2021).

B images, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """The mean over images of KL(softmax(reference) || softmax(logits)), in nats; (), with a gradient.

    Args:
        reference, logits: (B, K).
    """
    return F.kl_div(logits.log_softmax(dim=1), reference.log_softmax(dim=1), log_target=True, reduction="batchmean")


def label_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy with the labels.

    Args:
        logits: (B, K).
        targets: labels (B,), which are smoothed here; or shares of every class (B, K), smoothed before.
        smoothing: share of a label that is spread over all classes, in [0, 1).
    """
    if targets.ndim == 2:
        return SoftTargetCrossEntropy()(logits, targets)
    return LabelSmoothingCrossEntropy(smoothing)(logits, targets) if smoothing else F.cross_entropy(logits, targets)


def teacher_loss(
    logits: Tensor, teacher_logits: Tensor, distillation: Literal["soft", "hard"] = "soft", temperature: float = 1.0
) -> Tensor:
    """The mean over images of what sets the student apart from its teacher.

    soft: T^2 * KL(softmax(teacher / T) || softmax(student / T)); with T^2 its gradient is of one size at any T.
    hard: the cross-entropy with the teacher's first choice; the temperature is of no account.

    Args:
        logits, teacher_logits: (B, K), the student's and the teacher's.
    """
    if distillation == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(dim=1))
    return temperature**2 * divergence(teacher_logits / temperature, logits / temperature)


def distillation_loss(
    logits: Tensor, targets: Tensor, teacher_logits: Tensor, *, teacher_weight: float, smoothing: float = 0.0,
    distillation: Literal["soft", "hard"] = "soft", temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """(1 - teacher_weight) * `label_loss` + teacher_weight * `teacher_loss`.

    Args:
        teacher_weight: in [0, 1].
    """
    of_teacher = teacher_loss(logits, teacher_logits, distillation, temperature)
    return (1 - teacher_weight) * label_loss(logits, targets, smoothing) + teacher_weight * of_teacher
