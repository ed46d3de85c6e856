"""Losses of labels and of a teacher, by hand."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from pruning.losses import distillation_loss, divergence, label_loss, teacher_loss


def shares(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_distillation_is_the_divergence_at_the_temperature_by_hand(temperature: float) -> None:
    ours, theirs = [[1.0, -0.5, 2.0], [0.0, 0.3, -1.0]], [[0.5, 0.5, 1.0], [2.0, -2.0, 0.0]]
    expected = 0.0
    for our, their in zip(ours, theirs, strict=True):
        q, p = shares(our, temperature), shares(their, temperature)
        expected += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2
    loss = teacher_loss(torch.tensor(ours), torch.tensor(theirs), "soft", temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert teacher_loss(torch.tensor(ours), torch.tensor(ours), "soft", temperature).item() == pytest.approx(
        0, abs=1e-6
    )


def test_hard_distillation_takes_the_teachers_first_choice_for_the_label() -> None:
    ours, theirs = [[1.0, -0.5, 2.0], [0.0, 0.3, -1.0]], [[0.5, 0.7, -1.0], [2.0, -2.0, 0.0]]
    expected = -(math.log(shares(ours[0], 1)[1]) + math.log(shares(ours[1], 1)[0])) / 2
    loss = teacher_loss(torch.tensor(ours), torch.tensor(theirs), "hard", 3.0)  # the temperature is of no account
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_labels_is_smoothed_once_however_they_are_given(smoothing: float) -> None:
    logits = [1.0, -0.5, 2.0]
    target = [smoothing / 3 + (1 - smoothing) * (index == 1) for index in range(3)]
    expected = -sum(a * math.log(b) for a, b in zip(target, shares(logits, 1), strict=True))
    of_label = label_loss(torch.tensor([logits]), torch.tensor([1]), smoothing)
    of_shares = label_loss(torch.tensor([logits]), torch.tensor([target]), smoothing)
    assert of_label.item() == pytest.approx(expected, rel=1e-5)
    assert of_shares.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distillation", ["soft", "hard"])
def test_labels_and_teacher_are_weighed_against_each_other(distillation: Literal["soft", "hard"]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = torch.randn(2, 5, 4, generator=generator)
    labels = torch.tensor([0, 3, 1, 2, 2])
    of_labels = label_loss(logits, labels, 0.1)
    of_teacher = teacher_loss(logits, teacher_logits, distillation, 2.0)
    for weight in (0.0, 0.3, 1.0):
        loss = distillation_loss(
            logits, labels, teacher_logits, teacher_weight=weight, smoothing=0.1, distillation=distillation,
            temperature=2.0,
        )  # fmt: skip
        assert loss.item() == pytest.approx((1 - weight) * of_labels.item() + weight * of_teacher.item(), rel=1e-6)


def test_the_divergence_is_the_mean_of_p_log_p_over_q() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, pruned = 3 * torch.randn(2, 5, 4, generator=generator)
    total = 0.0
    for a, b in zip(dense.tolist(), pruned.tolist(), strict=True):
        p, q = shares(a, 1), shares(b, 1)
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert divergence(dense, pruned).item() == pytest.approx(total / 5, rel=1e-5)
    assert divergence(dense, dense + 7).item() == pytest.approx(0, abs=1e-6)
    one, other = divergence(dense[:1], pruned[:1]).item(), divergence(pruned[:1], dense[:1]).item()
    assert one != pytest.approx(other, rel=1e-2)
