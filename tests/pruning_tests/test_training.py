"""Training from scratch: it learns, it is seeded, it says when it diverges; jitter against a loop over pixels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.errors import VitfrontError
from pruning.measure.accuracy import predict, top1
from pruning.training import Jitter, TrainSettings, jittered, train
from tests.pruning_tests import builders

QUICK = TrainSettings(epochs=6, batch_size=64, learning_rate=1e-2, warmup_epochs=1)
IMAGES = builders.toy_images(128, seed=1)


def trained(**other: Any) -> tuple[Any, list[float]]:
    """A model and its loss, epoch by epoch."""
    model, losses = builders.model(num_classes=4, depth=2), []
    settings = replace(QUICK, **other)

    def note(epoch: int, loss: float) -> None:
        losses.append(loss)
        assert epoch == len(losses)

    train(model, IMAGES, settings, on_epoch=note)
    return model, losses


def test_a_tiny_model_learns_a_toy_task() -> None:
    model, losses = trained(epochs=12)
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    unseen = builders.toy_images(200, seed=2)
    assert top1(predict(model, unseen), unseen.labels) > 0.6  # 0.25 by chance


def test_training_ends_in_eval_mode_without_gradients() -> None:
    model, _ = trained(epochs=1)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_same_seed_gives_the_same_model_and_another_another() -> None:
    (first, losses), (again, same), (other, _) = (trained(epochs=2, seed=seed) for seed in (3, 3, 4))
    assert builders.same_state(again, builders.state(first)) and losses == same
    assert not builders.same_state(other, builders.state(first))


@pytest.mark.parametrize("batch_size", [50, 1000])
def test_the_loss_of_an_epoch_is_the_mean_over_its_images(batch_size: int) -> None:
    # Nothing is learnt at a learning rate of zero, so every batch sees the model as it was.
    model, losses = trained(
        epochs=2, learning_rate=0.0, weight_decay=0.0, jitter=Jitter(max_shift=0), batch_size=batch_size
    )
    expected = torch.nn.functional.cross_entropy(predict(model, IMAGES), IMAGES.labels).item()
    assert losses == pytest.approx([expected] * 2, rel=1e-4)


def test_a_loss_that_is_not_finite_names_the_step_and_the_learning_rate() -> None:
    with pytest.raises(
        VitfrontError, match=r"diverged in step \d+: the loss is nan; lower the learning rate \(1e\+30\)"
    ):
        trained(learning_rate=1e30, warmup_epochs=0)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 5])
def test_any_warm_up_trains(warmup_epochs: int) -> None:
    _, losses = trained(epochs=2, warmup_epochs=warmup_epochs)
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


def slowly_jittered(pixels: Tensor, draws: Tensor, max_shift: float, max_turn: float) -> Tensor:
    """By the definition: every pixel looks up its place in the image, turned and scaled about the centre, moved."""
    count, _, height, width = pixels.shape
    out = torch.empty_like(pixels)
    for image in range(count):
        angle, scale = draws[0, image].item() * max_turn, 1 + draws[1, image].item() * max_turn
        right, down = (draws[2:, image] * max_shift).tolist()
        for row in range(height):
            for column in range(width):
                x, y = column - (width - 1) / 2, row - (height - 1) / 2
                there_x = scale * (math.cos(angle) * x - math.sin(angle) * y) + right + (width - 1) / 2
                there_y = scale * (math.sin(angle) * x + math.cos(angle) * y) + down + (height - 1) / 2
                there_x, there_y = min(max(there_x, 0), width - 1), min(max(there_y, 0), height - 1)
                left, top = min(int(there_x), width - 2), min(int(there_y), height - 2)
                beside, below = there_x - left, there_y - top
                square = pixels[image, :, top : top + 2, left : left + 2]
                across = square[:, :, 0] * (1 - beside) + square[:, :, 1] * beside
                out[image, :, row, column] = across[:, 0] * (1 - below) + across[:, 1] * below
    return out


@pytest.mark.parametrize(
    ("size", "max_shift", "max_turn"),
    [((8, 8), 1.0, 0.0), ((6, 11), 0.0, 0.15), ((6, 11), 2.5, 0.3), ((8, 8), 2.5, 0.3)],
)
def test_jitter_equals_a_loop_over_pixels(size: tuple[int, int], max_shift: float, max_turn: float) -> None:
    pixels = builders.batch(3, size=size)
    draws = torch.rand(4, 3, generator=torch.Generator().manual_seed(6)) * 2 - 1
    fast = jittered(pixels, max_shift, max_turn, torch.Generator().manual_seed(6))
    torch.testing.assert_close(fast, slowly_jittered(pixels, draws, max_shift, max_turn), atol=1e-4, rtol=1e-4)


def test_no_jitter_returns_the_images_themselves_and_a_flat_image_stays_flat() -> None:
    pixels, generator = builders.batch(3), torch.Generator().manual_seed(0)
    assert jittered(pixels, 0, 0, generator) is pixels
    flat = torch.full((2, 3, 8, 8), 0.7)
    torch.testing.assert_close(jittered(flat, 3.0, 0.5, generator), flat)


def test_images_are_jittered_each_in_its_own_way_and_anew() -> None:
    same = builders.batch(1, size=(8, 8)).expand(4, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    first, second = (jittered(same, 1.0, 0.1, generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
