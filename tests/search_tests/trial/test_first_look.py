"""The first look: the line that is told, its errors and remarks, and what a real ViT on wrong inputs makes of them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.data import Images, Splits
from pruning.errors import DataError, ModelError, VitfrontError
from pruning.measure.accuracy import wilson_interval
from pruning.measure.relabelling import Answers
from search.config import Config
from search.trial.first_look import FirstLook, judge, look, tell
from search.trial.inputs import Inputs, load_inputs
from tests.search_tests import tiny
from tests.search_tests.trial.test_diagnosis import answers, counted
from tests.search_tests.trial.trials import accuracy

CIFAR = Path(__file__).parents[3].parent / "shared" / "data" / "cifar10-mini"

TRUSTED = tiny.config(model__untrained=False, model__expected_top1=None)
"""A recipe whose model is not untrained on purpose."""


def never() -> Answers:
    raise AssertionError("no training image is to be looked at")


def told(first: FirstLook, notes: tuple[str, ...] = ()) -> list[str]:
    lines: list[str] = []
    tell(first, notes, lines.append)
    return lines


# What is told


def test_accuracy_is_told_with_its_interval_and_then_the_notes() -> None:
    first = FirstLook(precision="float32", top1=232 / 300, num_images=300, notes=("look",))
    assert told(first, ("taken: ema",)) == [
        "dense top-1 on val 0.773 (0.723 to 0.817, 300 images)", "note: taken: ema", "note: look",
    ]  # fmt: skip


def test_fault_is_raised_when_all_is_told() -> None:
    lines: list[str] = []
    first = FirstLook(precision="float32", top1=0.1, num_images=300, fault=DataError("labels"))
    with pytest.raises(DataError, match=r"^labels$"):
        tell(first, ("a note",), lines.append)
    assert len(lines) == 2


def test_first_look_travels_between_processes() -> None:
    first = FirstLook(precision="float32", top1=0.1, num_images=300, fault=DataError("labels"))
    again = pickle.loads(pickle.dumps(first))
    assert again.line == first.line
    assert isinstance(again.fault, DataError) and str(again.fault) == "labels"


# What is wrong


def test_right_answers_need_no_word() -> None:
    assert judge(TRUSTED, answers(10, 300, 0.75), never, 10) == ([], None)


def test_guesses_are_refused_unless_the_model_is_untrained_on_purpose() -> None:
    val, training = answers(10, 300, 0.0, seed=1), answers(10, 300, 0.0, seed=2)
    _, fault = judge(TRUSTED, val, lambda: training, 10)
    assert isinstance(fault, ModelError)
    for waived in ({"model__untrained": True, "model__expected_top1": None}, {"model__expected_top1": 0.0}):
        assert judge(tiny.config(**{"model__untrained": False} | waived), val, never, 10) == ([], None)


def test_model_that_is_searched_by_retrieval_needs_no_classifier() -> None:
    config = tiny.config(model__untrained=False, model__expected_top1=None, search__accuracy="recall_at_1")
    assert judge(config, answers(10, 300, 0.0), never, 10) == ([], None)


def test_val_images_of_one_class_are_refused_as_they_tell_nothing() -> None:
    one = Answers(predicted=torch.zeros(9, dtype=torch.int64), labels=torch.zeros(9, dtype=torch.int64))
    _, fault = judge(TRUSTED, one, never, 10, ("cat", "dog"))
    assert isinstance(fault, DataError)
    assert str(fault) == "all 9 val images are of one class, 'cat'; give images of several"
    assert judge(tiny.config(), one, never, 10) == ([], None)


def test_too_few_images_to_tell_are_noted() -> None:
    notes, fault = judge(TRUSTED, counted(6, 10, 2), never, 2)
    assert fault is None
    assert notes == ["10 val images are too few to tell this model from chance (0.500)"]


@pytest.mark.parametrize(("expected", "is_refused"), [(0.7, False), (0.8, False), (0.82, True), (1.0, True)])
@pytest.mark.parametrize("untrained", [False, True])
def test_accuracy_below_what_is_expected_is_refused_if_the_interval_is(
    expected: float, is_refused: bool, untrained: bool
) -> None:
    config = tiny.config(model__untrained=untrained, model__expected_top1=expected)
    _, fault = judge(config, counted(232, 300, 10), never, 10)
    assert (fault is not None) is is_refused
    if fault is not None:
        assert isinstance(fault, ModelError)
        assert str(fault).startswith(
            f"dense top-1 on val is 0.773 (0.723 to 0.817), below model.expected_top1, {expected:g}; "
        )


# The look itself


def test_top1_is_that_of_val_in_the_recipes_precision() -> None:
    config = tiny.config()
    inputs = tiny.inputs(config)
    first = look(config, inputs)
    assert (first.precision, first.num_images) == ("float32", 24)
    assert first.top1 == pytest.approx(accuracy(inputs.model, inputs.splits.val))
    low, high = wilson_interval(first.top1, 24)
    assert first.line == f"dense top-1 on val {first.top1:.3f} ({low:.3f} to {high:.3f}, 24 images)"


def test_dense_measurement_has_the_top1_of_the_look_and_val_is_not_run_again() -> None:
    config = tiny.config(space={"method": "learned"})
    inputs = tiny.inputs(config)
    first = look(config, inputs)
    images: list[int] = []
    inputs.model.register_forward_pre_hook(lambda _, batch: images.append(len(batch[0])))
    _, dense = tiny.prepare(config, inputs, replace(first, top1=0.125), timer=tiny.timer)
    assert dense.top1 == 0.125
    assert (dense.top1_low, dense.top1_high) == wilson_interval(0.125, 24)
    assert 24 not in images


def test_look_trains_a_model_that_is_not_trained() -> None:
    config = tiny.config(model__training={"epochs": 30, "max_shift": 0, "max_turn": 0, "batch_size": 8})
    inputs = tiny.inputs(config, trained=False)
    look(config, inputs)
    assert accuracy(inputs.model, inputs.splits.training) > 0.9


def test_logits_that_are_no_numbers_are_an_error_that_says_where() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    config = tiny.config()
    with pytest.raises(
        VitfrontError, match=r"^the model's logits are not finite for 24 of 24 images in float32; check"
    ):
        look(config, tiny.inputs(config, model=model))


# A real model


@pytest.fixture(scope="module")
def cifar() -> tuple[Config, Inputs]:
    """A ViT with 300 val images of CIFAR-10, the first 30 of each class; the classes stand in the model's order."""
    if not CIFAR.is_dir():
        pytest.skip(f"{CIFAR} is not there")
    weights = CIFAR / "vit_cifar10.safetensors"
    about = json.loads(weights.with_suffix(".json").read_text())
    args = {key: about[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")}
    config = Config.from_dict({
        "name": "cifar",
        "model": {"name": about["model"], "args": args, "checkpoint": str(weights)},
        "data": {
            "root": str(CIFAR), "mean": about["mean"], "std": about["std"], "crop_pct": 1.0,
            "calibration_images": 100, "probe_images": 200,
        },
        "measure": {"precision": "float32"},
    })  # fmt: skip
    names = tuple(sorted(path.name for path in (CIFAR / "train").iterdir()))
    inputs = load_inputs(config, Path("nowhere"))
    first = torch.cat([(inputs.splits.val.labels == label).nonzero().flatten()[:30] for label in range(10)])
    splits = replace(inputs.splits, val=inputs.splits.val.take(first))
    return config, replace(inputs, splits=splits, classes=names)


def changed(inputs: Inputs, change: Callable[[Images], Images], **other: Any) -> Inputs:
    """The inputs with other training and val images."""
    splits = Splits(
        training=change(inputs.splits.training), num_calibration=100, val=change(inputs.splits.val), test=None
    )
    return replace(inputs, splits=splits, **other)


def relabelled(inputs: Inputs, numbers: list[int], classes: tuple[str, ...]) -> Inputs:
    """The inputs if a class has the label `numbers[class]`; those with label -1 are left out."""

    def change(images: Images) -> Images:
        labels = torch.tensor(numbers)[images.labels]
        return replace(images, labels=labels).take((labels >= 0).nonzero().flatten())

    return changed(inputs, change, classes=classes)


def test_right_inputs_have_their_accuracy_and_no_note(cifar: tuple[Config, Inputs]) -> None:
    config, inputs = cifar
    expected = config.model.model_copy(update={"expected_top1": 0.78})
    assert told(look(config.model_copy(update={"model": expected}), inputs)) == [
        "dense top-1 on val 0.773 (0.723 to 0.817, 300 images)"
    ]


def test_folders_that_another_library_sorts_otherwise_are_told_with_the_key(cifar: tuple[Config, Inputs]) -> None:
    config, inputs = cifar
    as_timm, as_torchvision = [str(number) for number in range(1, 11)], sorted(map(str, range(1, 11)))
    numbers = [as_timm.index(name) for name in as_torchvision]
    first = look(config, relabelled(inputs, numbers, tuple(as_timm)))
    with pytest.raises(
        DataError,
        match=r"^dense top-1 on val is 0\.\d+ \(300 images\), near chance \(0\.\d+\): with the labels "
        r"renumbered it is 0\.773, so they are wrong; your folders 10, 2, 3 \.\.\. are the model's classes "
        r"1, 2, 3 \.\.\. \(as torchvision sorts\): set data\.class_order=torchvision$",
    ):
        told(first)


def test_wrong_class_order_is_told_with_the_right_one_from_the_folders_on(
    cifar: tuple[Config, Inputs], tmp_path: Path
) -> None:
    config, _ = cifar
    classes = sorted(path.name for path in (CIFAR / "train").iterdir())
    for split, number in product(("train", "val"), range(10)):
        name = sorted(map(str, range(1, 11)))[number]
        (tmp_path / split / name).mkdir(parents=True)
        for image in sorted((CIFAR / split / classes[number]).iterdir())[:30]:
            (tmp_path / split / name / image.name).symlink_to(image)
    right, wrong = (
        config.model_copy(update={"data": config.data.model_copy(update={"root": tmp_path, "class_order": order})})
        for order in ("torchvision", "timm")
    )
    with pytest.raises(DataError, match=r"your folders 10, 2, 3 \.\.\. .*: set data\.class_order=torchvision$"):
        told(look(wrong, load_inputs(wrong, tmp_path / "runs")))
    assert told(look(right, load_inputs(right, tmp_path / "runs")))[0].startswith("dense top-1 on val 0.773 ")


def test_missing_class_folder_is_told_with_its_place(cifar: tuple[Config, Inputs]) -> None:
    config, inputs = cifar
    assert inputs.classes is not None
    classes = tuple(name for name in inputs.classes if name != "bird")
    first = look(config, relabelled(inputs, [0, 1, -1, 2, 3, 4, 5, 6, 7, 8], classes))
    with pytest.raises(
        DataError, match=r"it is 0\.\d+, so they are wrong; from 'cat' on every label is shifted by one"
    ):
        told(first)


@pytest.mark.parametrize("fault", ["dark", "scale"])
def test_broken_pixels_are_not_taken_for_wrong_labels(cifar: tuple[Config, Inputs], fault: str) -> None:
    config, inputs = cifar

    def change(images: Images) -> Images:
        if fault == "scale":
            return replace(images, mean=(125.0, 123.0, 114.0), std=(63.0, 62.0, 66.0))
        return replace(images, pixels=images.pixels // 16)

    with pytest.raises(ModelError, match=r"renumbering the labels does not help .* check .* data\.mean and data\.std"):
        told(look(config, changed(inputs, change)))


def test_two_swapped_classes_are_noted(cifar: tuple[Config, Inputs]) -> None:
    config, inputs = cifar
    assert inputs.classes is not None
    first = look(config, relabelled(inputs, [1, 0, *range(2, 10)], inputs.classes))
    assert first.fault is None
    (note,) = first.notes
    assert "val images of 'airplane' as class 1" in note and "val images of 'automobile' as class 0" in note
