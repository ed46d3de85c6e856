"""Fine-tuning: the loss of an epoch, masks held at every step, mixed images by their definition, resuming, refusals."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning.errors import SettingError, VitfrontError
from pruning.losses import teacher_loss
from pruning.measure.accuracy import predict, top1
from pruning.methods.finetune import FinetuneSettings, Finetuning, numpy_seeded
from pruning.methods.sparsity import (
    GradualMagnitude,
    Masks,
    Pattern,
    magnitude_masks,
    pattern_masks,
    sparse_layers,
    sparsity_of,
)
from pruning.model.anatomy import examine
from pruning.model.surgery import apply_plan
from pruning.plan import TOKEN_REDUCTIONS, TokenReduction
from pruning.training import Jitter
from tests.pruning_tests import builders
from tests.pruning_tests.model.test_families import model_of, plan_of

STILL = Jitter(max_shift=0)
SETTINGS = FinetuneSettings(epochs=2, batch_size=16, jitter=STILL)
IMAGES = builders.toy_images(48, seed=3)
MIXING = replace(SETTINGS, epochs=3, mixup=0.8, cutmix=1.0, label_smoothing=0.1, jitter=Jitter(flip=True))


def pruned_toy() -> tuple[nn.Module, nn.Module]:
    """A pruned model, and the dense one that it is made of."""
    dense = builders.toy_model()
    return apply_plan(dense, plan_of(examine(dense))), dense


def run(training: Finetuning) -> list[float]:
    """The loss of every epoch that is left."""
    losses = []
    while not training.is_done:
        losses.append(training.run_epoch()["loss"])
    return losses


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Losses


@pytest.mark.parametrize("distillation", ["none", "soft", "hard"])
def test_the_loss_of_an_epoch_weighs_labels_and_teacher(distillation: Any) -> None:
    student, teacher = pruned_toy()
    settings = replace(
        SETTINGS, learning_rate=0.0, weight_decay=0.0, distillation=distillation, weight=0.3, temperature=2.0,
        label_smoothing=0.1,
    )  # fmt: skip
    training = Finetuning(student, None if distillation == "none" else teacher, IMAGES, settings)
    logits, taught = predict(student, IMAGES), predict(teacher, IMAGES)
    expected = F.cross_entropy(logits, IMAGES.labels, label_smoothing=0.1)
    if distillation != "none":
        expected = 0.7 * expected + 0.3 * teacher_loss(logits, taught, distillation, 2.0)
    assert run(training) == pytest.approx([expected.item()] * 2, rel=1e-4)


# Training


@pytest.mark.parametrize("distillation", ["none", "soft", "hard"])
def test_a_pruned_model_recovers(distillation: Any) -> None:
    student, teacher = pruned_toy()
    images, unseen = builders.toy_images(128, seed=1), builders.toy_images(200, seed=2)
    settings = FinetuneSettings(epochs=6, batch_size=32, learning_rate=2e-3, distillation=distillation, jitter=STILL)
    training = Finetuning(student, teacher, images, settings)
    losses, before = run(training), top1(predict(student, unseen), unseen.labels)
    assert losses[-1] < 0.5 * losses[0]
    assert top1(predict(training.finish(), unseen), unseen.labels) > before + 0.1


def test_student_and_teacher_are_left_as_they_were_and_the_model_is_ready_to_use() -> None:
    student, teacher = pruned_toy()
    before = builders.state(student), builders.state(teacher)
    training = Finetuning(student, teacher, IMAGES, SETTINGS)
    run(training)
    model = training.finish()
    assert builders.same_state(student, before[0]) and builders.same_state(teacher, before[1])
    assert all(parameter.grad is None for model in (student, teacher) for parameter in model.parameters())
    assert not builders.same_state(model, before[0])
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_a_training_that_is_not_at_its_end_gives_no_model() -> None:
    student, teacher = pruned_toy()
    training = Finetuning(student, teacher, IMAGES, SETTINGS)
    training.run_epoch()
    assert not training.is_done
    with pytest.raises(AssertionError, match="not at its end"):
        training.finish()


@pytest.mark.parametrize("reduction", ["none", *TOKEN_REDUCTIONS])
def test_a_model_that_reduces_tokens_is_trained_in_all_its_parts(reduction: TokenReduction) -> None:
    dense = builders.toy_model()
    counts = (16,) * 3 if reduction == "none" else (12, 8, 6)
    plan = replace(builders.plan(examine(dense), num_tokens=counts), token_reduction=reduction)
    training = Finetuning(apply_plan(dense, plan), dense, IMAGES, replace(SETTINGS, epochs=1))
    before = builders.state(training.trained)
    run(training)
    changed = {name for name, value in training.trained.state_dict().items() if not torch.equal(value, before[name])}
    assert changed >= {name for name, _ in training.trained.named_parameters()}


@pytest.mark.parametrize("family", ["distilled", "swin"])
def test_other_families_are_trained_too_and_in_eval_mode(family: str) -> None:
    images = IMAGES.take(slice(0, 32))
    dense: Any = model_of(family)
    student: Any = apply_plan(dense, plan_of(examine(dense))).train()
    if family == "distilled":
        student.set_distilled_training(True)
        assert isinstance(student(builders.batch()), tuple)
    training = Finetuning(student, dense, images, replace(SETTINGS, epochs=3))
    losses = run(training)
    assert losses[-1] < losses[0]
    assert student.training and not training.finish().training


def test_bfloat16_trains_too_and_weights_stay_in_float32() -> None:
    student, teacher = pruned_toy()
    exact = Finetuning(student, teacher, IMAGES, SETTINGS, precision="float32")
    rough = Finetuning(student, teacher, IMAGES, SETTINGS, precision="bfloat16")
    losses = run(exact), run(rough)
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    assert all(parameter.dtype == torch.float32 for parameter in rough.finish().parameters())


# Masks


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_masked_weights_are_zero_at_every_step(optimizer: str) -> None:
    student, teacher = pruned_toy()
    masks, seen = magnitude_masks(student, 0.7), list[float]()

    def watch(model: nn.Module, step: int, total_steps: int) -> Masks | None:
        assert total_steps == 6
        if step > 0:
            for name, layer in sparse_layers(model):
                assert torch.equal(layer.weight != 0, masks[name])
            seen.append(float(dict(sparse_layers(model))["0.fc1"].weight.detach().abs().sum()))
        return masks if step == 0 else None

    settings = replace(SETTINGS, optimizer=optimizer)
    watched = Finetuning(student, teacher, IMAGES, settings, masks=watch)
    fixed = Finetuning(student, teacher, IMAGES, settings, masks=masks)
    assert sparsity_of(fixed.trained) == pytest.approx(0.7, abs=1e-3)  # before the first step
    assert run(watched) == run(fixed)
    assert len(set(seen)) == 5  # what stays moves
    assert builders.same_state(watched.finish(), builders.state(fixed.finish()))
    for name, layer in sparse_layers(fixed.trained):
        assert torch.equal(layer.weight != 0, masks[name])
    assert sparsity_of(student) == 0


def test_a_pattern_is_kept() -> None:
    dense = builders.toy_model()
    training = Finetuning(dense, dense, IMAGES, SETTINGS, masks=pattern_masks(dense, Pattern(2, 4)))
    run(training)
    model = training.finish()
    assert sparsity_of(model) == 0.5
    for _, layer in sparse_layers(model):
        assert (layer.weight.unflatten(1, (-1, 4)) != 0).sum(dim=-1).eq(2).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_a_gradual_schedule_ends_at_exactly_its_sparsity(sparsity: float) -> None:
    student, teacher = pruned_toy()
    training = Finetuning(
        student, teacher, IMAGES, replace(SETTINGS, epochs=4), masks=GradualMagnitude(sparsity=sparsity, every=2)
    )
    so_far = []
    while not training.is_done:
        training.run_epoch()
        so_far.append(sparsity_of(training.trained))
    count = sum(layer.weight.numel() for _, layer in sparse_layers(student))
    assert so_far == sorted(so_far) and (sparsity == 0 or 0 < so_far[0] < so_far[-1])
    assert so_far[-1] == so_far[-2] == round(sparsity * count) / count


# Mixing


def test_mixed_images_and_labels_have_the_same_shares() -> None:
    student, teacher = pruned_toy()
    training = Finetuning(student, teacher, IMAGES, replace(SETTINGS, mixup=1.0))
    pixels, labels = builders.batch(5), torch.tensor([0, 1, 2, 3, 0])
    before, generator = pixels.clone(), torch.Generator().manual_seed(1)
    mixed, target = training.mix(pixels, labels, generator)
    assert not torch.equal(training.mix(pixels, labels, generator)[1], target)  # anew for every batch
    assert torch.equal(pixels, before)
    share = target[0, 0]
    assert 0.01 < share < 0.99
    torch.testing.assert_close(mixed[:4], share * pixels[:4] + (1 - share) * pixels[:4].flip(0))
    one_hot = F.one_hot(labels, 4).float()
    torch.testing.assert_close(target[:4], share * one_hot[:4] + (1 - share) * one_hot[:4].flip(0))
    # Five do not pair up: the last stays by itself.
    torch.testing.assert_close(mixed[4], pixels[4])
    torch.testing.assert_close(target[4], one_hot[4])


def test_cutmix_takes_a_box_of_the_other_image_and_as_much_of_its_label() -> None:
    student, teacher = pruned_toy()
    training = Finetuning(student, teacher, IMAGES, replace(SETTINGS, cutmix=1.0, label_smoothing=0.2))
    pixels, labels = builders.batch(2), torch.tensor([3, 1])
    mixed, target = training.mix(pixels, labels, torch.Generator().manual_seed(4))
    is_other = (mixed[0] != pixels[0]).all(dim=0)
    assert torch.equal(torch.where(is_other, pixels[1], pixels[0]), mixed[0])
    share = is_other.float().mean().item()
    assert 0.01 < share < 0.99
    expected = [0.05, 0.05 + 0.8 * share, 0.05, 0.05 + 0.8 * (1 - share)]
    assert target[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_nothing_is_mixed_unless_it_is_asked_for() -> None:
    student, teacher = pruned_toy()
    training = Finetuning(student, teacher, IMAGES, SETTINGS)
    pixels, labels = builders.batch(2), torch.tensor([3, 1])
    same = training.mix(pixels, labels, torch.Generator())
    assert same[0] is pixels and same[1] is labels


def test_mixing_comes_from_the_seed_alone_and_leaves_numpys_state_as_it_was() -> None:
    student, teacher = pruned_toy()
    images = builders.toy_images(33, seed=3)  # the last batch has one image
    losses = []
    for numpy_seed, seed in [(1, 0), (2, 0), (2, 1)]:
        with numpy_seeded(numpy_seed):  # so that no other test is disturbed by this one
            before = repr(np.random.get_state())
            losses.append(run(Finetuning(student, teacher, images, replace(MIXING, epochs=1, seed=seed))))
            assert repr(np.random.get_state()) == before
    assert losses[0] == losses[1] != losses[2]


def test_numpys_state_comes_back_after_an_error_too() -> None:
    before = repr(np.random.get_state())
    with pytest.raises(KeyError), numpy_seeded(3):
        np.random.rand()
        raise KeyError
    assert repr(np.random.get_state()) == before


# Going on


@pytest.mark.parametrize(("optimizer", "stop_after"), [("adamw", 1), ("muon", 2), ("lamb", 2), ("sgd", 1)])
def test_a_training_goes_on_from_its_saved_state_as_if_it_had_not_stopped(optimizer: str, stop_after: int) -> None:
    student, teacher = pruned_toy()
    settings = replace(MIXING, optimizer=optimizer)

    def begun() -> Finetuning:
        images = IMAGES.take(slice(0, 31))
        return Finetuning(student, teacher, images, settings, masks=GradualMagnitude(sparsity=0.6, every=2))

    unbroken, stopped, resumed = begun(), begun(), begun()
    losses = run(unbroken)
    for _ in range(stop_after):
        stopped.run_epoch()
    resumed.load(saved_and_loaded(stopped.state()))
    assert run(resumed) == losses[stop_after:]
    assert builders.same_state(resumed.finish(), builders.state(unbroken.finish()))


# Refusals


def test_a_teacher_of_other_classes_is_refused_and_both_numbers_are_named() -> None:
    student = builders.model(num_classes=4)
    for distillation in ("soft", "hard"):
        settings = FinetuneSettings(distillation=distillation)
        with pytest.raises(SettingError, match=r"^the teacher has 7 classes and the student 4; .*$"):
            Finetuning(student, builders.model(), IMAGES, settings)
    Finetuning(student, builders.model(), IMAGES, FinetuneSettings(distillation="none"))


def test_only_without_distillation_there_may_be_no_teacher() -> None:
    with pytest.raises(SettingError, match="soft distillation needs a teacher"):
        Finetuning(builders.model(), None, IMAGES, SETTINGS)
    Finetuning(builders.model(), None, IMAGES, FinetuneSettings(distillation="none"))


@pytest.mark.parametrize("name", ["adamv", "fusedadam"])
def test_an_optimizer_that_cannot_be_made_is_refused_by_name(name: str) -> None:
    with pytest.raises(SettingError, match=f"no optimizer '{name}' .*give a name of timm's"):
        Finetuning(builders.model(), builders.model(), IMAGES, replace(SETTINGS, optimizer=name))


@pytest.mark.parametrize(
    "wrong",
    [
        {"distillation": "warm"},
        {"weight": 1.1},
        {"weight": math.nan},
        {"temperature": 0.0},
        {"label_smoothing": 1.0},
        {"mixup": -0.1},
        {"cutmix": -1.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"{next(iter(wrong))}.*{next(iter(wrong.values()))}"):
        replace(SETTINGS, **wrong)


def test_a_loss_that_is_not_finite_names_step_and_learning_rate() -> None:
    student, teacher = pruned_toy()
    training = Finetuning(student, teacher, IMAGES, replace(SETTINGS, learning_rate=1e30))
    with pytest.raises(
        VitfrontError, match=r"diverged in step \d+: the loss is .*; lower the learning rate \(1e\+30\)"
    ):
        run(training)
