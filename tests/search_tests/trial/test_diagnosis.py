"""The rule of chance as a table, and what is told of wrong labels, of trainings that failed, and of broken models."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch

from pruning.errors import DataError, ModelError, VitfrontError
from pruning.measure.relabelling import Answers
from search.config import Config
from search.trial.diagnosis import diagnose, is_near_chance, reaches_chance
from tests.search_tests import tiny

NUMBERS = tuple(str(number) for number in range(1, 11))
"""Names of ten folders, as timm sorts them."""

AS_TORCHVISION = ("1", "10", "2", "3", "4", "5", "6", "7", "8", "9")

GOOD = 0.75


def answers(num_classes: int, count: int, top1: float, means: Sequence[int] | None = None, seed: int = 0) -> Answers:
    """Answers of a model that knows a share of the images and guesses the others.

    Args:
        means: the class that each label means; by default labels are right.
    """
    generator = torch.Generator().manual_seed(seed)
    means = range(num_classes) if means is None else means
    labels = torch.arange(count) % len(means)
    guesses = torch.randint(0, num_classes, (count,), generator=generator)
    knows = torch.rand(count, generator=generator) < top1
    return Answers(predicted=torch.where(knows, torch.tensor(means)[labels], guesses), labels=labels)


def counted(right: int, count: int, num_classes: int) -> Answers:
    """Answers of which so many are right; the others are another class."""
    labels = torch.arange(count) % num_classes
    return Answers(predicted=(labels + num_classes // 2 * (torch.arange(count) >= right)) % num_classes, labels=labels)


def diagnosis(
    val: Answers, training: Answers, num_classes: int = 10, names: Sequence[str] = (), config: Config | None = None
) -> VitfrontError | None:
    return diagnose(config or tiny.config(), val, lambda: training, num_classes, names)


def pair(means: Sequence[int], top1: float = GOOD, num_classes: int = 10) -> tuple[Answers, Answers]:
    """Answers on 300 val images and 500 training images, labelled alike."""
    return answers(num_classes, 300, top1, means, seed=1), answers(num_classes, 500, top1 + 0.1, means, seed=2)


def says(error: VitfrontError | None, pattern: str) -> bool:
    """Tells whether an error's one line matches a pattern."""
    text = str(error)
    return re.search(pattern, text) is not None and "\n" not in text


def never() -> Answers:
    raise AssertionError("nothing is wrong, so no training image is to be looked at")


@pytest.mark.parametrize(
    ("right", "count", "num_classes", "is_refused", "is_told"),
    [
        # broken
        (30, 300, 10, True, True), (35, 300, 10, True, True), (2, 300, 10, True, True), (0, 300, 10, True, True),
        (0, 650, 600, True, True), (1, 650, 600, True, True), (60, 50_000, 1000, True, True),
        (1000, 50_000, 1000, True, True), (150, 300, 2, True, True), (15, 300, 2, True, True), (0, 8, 4, True, True),
        (2, 8, 4, True, True), (0, 8, 1000, True, True), (1, 10, 2, True, True), (10, 20, 2, True, True),
        # good, or good as far as can be told
        (232, 300, 10, False, False), (60, 300, 10, False, False), (537, 650, 600, False, False),
        (60, 650, 600, False, False), (4000, 50_000, 1000, False, False), (180, 300, 2, False, False),
        (8, 8, 4, False, False), (6, 8, 4, False, False), (8, 8, 2, False, False), (9, 10, 2, False, False),
        # too few to tell
        (6, 10, 2, False, True), (7, 10, 2, False, True), (5, 8, 2, False, True), (13, 20, 2, False, True),
        (4, 8, 4, False, True), (2, 8, 1000, False, True),
    ],
)  # fmt: skip
def test_rule_of_chance(right: int, count: int, num_classes: int, is_refused: bool, is_told: bool) -> None:
    some = counted(right, count, num_classes)
    assert some.top1 == pytest.approx(right / count)
    assert (is_near_chance(some), reaches_chance(some)) == (is_refused, is_told)


def test_one_answer_for_all_images_is_chance_however_frequent_its_class() -> None:
    labels = (torch.arange(300) % 20 == 0).long()
    constant = Answers(predicted=torch.zeros(300, dtype=torch.int64), labels=labels)
    assert constant.top1 == pytest.approx(0.95)
    assert is_near_chance(constant)


def test_model_that_finds_a_rare_class_is_none_though_one_answer_would_be_right_as_often() -> None:
    labels = (torch.arange(300) % 10 == 0).long()
    finds = Answers(predicted=torch.where(torch.arange(300) % 7 == 0, 1 - labels, labels), labels=labels)
    assert finds.top1 < 0.9
    assert not reaches_chance(finds)


@pytest.mark.parametrize("top1", [0.2, 0.5, 0.99])
def test_right_labels_are_right_and_cost_no_look_at_training_images(top1: float) -> None:
    assert diagnose(tiny.config(), answers(10, 300, top1), never, 10, NUMBERS) is None
    assert diagnose(tiny.config(), answers(1000, 650, 0.8), never, 1000, ()) is None


@pytest.mark.parametrize(
    ("names", "library", "told"),
    [
        (NUMBERS, "torchvision", r"your folders 10, 2, 3 \.\.\. are the model's classes 1, 2, 3 \.\.\."),
        (AS_TORCHVISION, "timm", r"your folders 2, 3, 4 \.\.\. are the model's classes 1, 2, 3 \.\.\."),
    ],
)
def test_other_order_of_the_folders_is_told_with_the_key_that_sets_it(
    names: tuple[str, ...], library: str, told: str
) -> None:
    other = AS_TORCHVISION if names == NUMBERS else NUMBERS
    val, training = pair([other.index(name) for name in names])
    error = diagnosis(val, training, names=names)
    assert isinstance(error, DataError)
    assert says(
        error,
        r"^dense top-1 on val is 0\.\d+ \(300 images\), .*: with the labels renumbered it is 0\.[78]\d\d, "
        rf"so they are wrong; {told} \(as {library} sorts\): set data.class_order={library}$",
    )


def test_class_map_in_another_order_than_the_models_is_told_to_be_left_out() -> None:
    val, training = pair([AS_TORCHVISION.index(name) for name in NUMBERS])
    error = diagnosis(val, training, names=NUMBERS, config=tiny.config(data__class_map="map.txt"))
    assert says(error, r": set data.class_map=null and data.class_order=torchvision$")


@pytest.mark.parametrize("names", [(), tuple("abcdefghi")])
def test_missing_class_folder_is_told_with_the_class_that_it_stood_before(names: tuple[str, ...]) -> None:
    first = "'d'" if names else "label 3"
    val, training = pair([0, 1, 2, 4, 5, 6, 7, 8, 9])
    error = diagnosis(*(answers.take(answers.labels > 2) for answers in (val, training)), names=names)
    assert says(
        error,
        rf"it is 0\.[78]\d\d, so they are wrong; from {first} on every label is shifted by one, "
        "as if a class folder were missing before it; give data.class_map, the names of all classes in the model's "
        "order$",
    )


def test_folder_too_many_and_a_class_that_is_missing_are_told_as_a_shift_between_them() -> None:
    val, training = pair([0, 0, 1, 2, 3, 4, 5, 6, 8, 9])  # the first folder is none of the model's classes
    some = (answers.take(answers.labels > 0) for answers in (val, training))
    assert says(
        diagnosis(*some),
        "from label 1 to label 7 every label is shifted by one, as if there were a class folder too many before it",
    )


def test_any_other_order_is_told_by_the_first_classes() -> None:
    val, training = pair([4, 1, 7, 5, 3, 9, 0, 8, 6, 2])
    error = diagnosis(val, training, names=tuple("abcdefghij"))
    assert isinstance(error, DataError)
    told = (
        "'a' is the model's class 4, 'c' is the model's class 7, 'd' is the model's class 5, ...; give data.class_map"
    )
    assert says(error, told)


def test_labels_of_which_some_are_right_are_refused_if_most_are_not() -> None:
    val, training = pair([1, 2, 3, 4, 5, 0, 6, 7, 8, 9])
    assert not is_near_chance(val)
    assert says(diagnosis(val, training), "and most images have the label of others: with the labels renumbered")


def test_model_that_merely_swaps_two_classes_is_not_refused() -> None:
    val, _ = pair([1, 0, *range(2, 10)])
    assert diagnose(tiny.config(), val, never, 10, ()) is None


def test_many_classes_with_an_image_or_two_each_are_put_right_all_the_same() -> None:
    means = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    error = diagnosis(answers(1000, 650, 0.8, means, seed=1), answers(1000, 1000, 0.8, means, seed=2), 1000)
    assert isinstance(error, DataError)
    assert says(error, r"with the labels renumbered it is 0\.5\d\d, so they are wrong; label 0 is the model's class ")


@pytest.mark.parametrize(("num_classes", "count"), [(2, 300), (10, 300), (1000, 650)])
def test_broken_model_is_not_put_right_by_any_order(num_classes: int, count: int) -> None:
    for seed in range(5):
        val = answers(num_classes, count, 0.0, seed=seed)
        error = diagnosis(val, answers(num_classes, 1000, 0.0, seed=seed + 50), num_classes)
        assert isinstance(error, ModelError)
        assert says(error, "renumbering the labels does not help .*: the weights or the pixels are wrong; check ")


def test_training_that_failed_is_told_as_such() -> None:
    config = tiny.config(model__training={}, model__untrained=False)
    error = diagnosis(answers(10, 300, 0.0, seed=1), answers(10, 300, 0.0, seed=2), config=config)
    assert isinstance(error, ModelError)
    assert says(error, r"and 0\.\d+ on training images: the training failed; change model.training")


def test_val_that_is_labelled_otherwise_than_train_is_told_with_the_order_of_its_labels() -> None:
    training = answers(10, 500, 0.9)
    assert says(diagnosis(answers(10, 300, GOOD, [9, *range(9)]), training), "every label is shifted|'s class 9")
    error = diagnosis(answers(10, 300, 0.0), training)
    assert isinstance(error, DataError)
    assert says(error, r"but 0\.\d+ on training images: the labels of val are not those of train")
