"""Logits, accuracy by counting, and Wilson's interval by its definition."""

from __future__ import annotations

import math

import pytest
import torch

from pruning.measure.accuracy import predict, top1, wilson_interval
from tests.pruning_tests import builders


@pytest.mark.parametrize("batch_size", [1, 5, 12, 64])
def test_logits_are_the_models_whatever_the_batches(batch_size: int) -> None:
    model, images = builders.model(), builders.images(12)
    pixels = (images.pixels.float() / 255 - 0.5) / 0.25
    logits = predict(model, images, batch_size=batch_size)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(pixels), atol=1e-5, rtol=1e-4)


def test_half_precision_gives_nearly_the_same_logits_in_float32() -> None:
    model, images = builders.model(), builders.images(4)
    half, full = predict(model, images, precision="bfloat16"), predict(model, images)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, atol=0.1, rtol=0.1)


def test_prediction_runs_in_eval_mode_and_without_gradients() -> None:
    model = builders.model(drop_rate=0.5).train()
    logits = predict(model, builders.images(6))
    assert torch.equal(logits, predict(model, builders.images(6)))
    assert not logits.requires_grad


def test_accuracy_is_counted_one_by_one() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    labels = builders.images(50).labels
    right = sum(max(range(7), key=lambda k: row[k]) == label for row, label in zip(logits, labels, strict=True))
    assert top1(logits, labels) == pytest.approx(right / 50)


def test_accuracy_is_one_or_zero_or_by_the_first_of_equals() -> None:
    labels = torch.tensor([0, 1, 2])
    assert top1(torch.eye(3), labels) == 1
    assert top1(torch.eye(3), labels.flip(0) * 0 + torch.tensor([1, 2, 0])) == 0
    assert top1(torch.zeros(3, 3), labels) == pytest.approx(1 / 3)


def test_an_image_without_a_finite_answer_is_wrong() -> None:
    logits = torch.eye(3)
    logits[0] = torch.nan
    assert top1(logits, torch.tensor([0, 1, 2])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("share", "count"), [(0.5, 10), (0.9, 360), (0.02, 50), (1 / 3, 3)])
def test_both_ends_of_the_interval_are_as_far_from_the_share_as_chance_goes(share: float, count: int) -> None:
    low, high = wilson_interval(share, count)
    assert 0 < low < share < high < 1
    for end in (low, high):  # |share - p| = z sqrt(p (1 - p) / n), which defines it
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count))


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_the_interval_of_nothing_and_of_everything_stays_within_zero_and_one(count: int) -> None:
    bound = 1.959964**2 / (count + 1.959964**2)
    assert wilson_interval(0.0, count) == pytest.approx((0.0, bound))
    assert wilson_interval(1.0, count) == pytest.approx((1 - bound, 1.0))
