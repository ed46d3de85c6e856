"""Relabelling: the best numbering by brute force, shifts and swaps that are found, and noise that is not."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from pruning.measure.relabelling import NOTHING, UNSEEN, Answers, Shift, best_relabelling, best_shift, moved_classes


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def guesses(count: int, num_classes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, num_classes, (count,), generator=generator(seed))


def answers(count: int, num_classes: int, top1: float, seed: int = 0) -> Answers:
    """Answers of a model that knows a share `top1` of the images and guesses the others; labels as even as can be."""
    labels = torch.arange(count) % num_classes
    knows = torch.rand(count, generator=generator(seed + 1)) < top1
    return Answers(predicted=torch.where(knows, labels, guesses(count, num_classes, seed)), labels=labels)


def renumbered(answers: Answers, numbers: list[int]) -> Answers:
    """The answers if a folder's images have the label `numbers[class]`."""
    return Answers(predicted=answers.predicted, labels=torch.tensor(numbers)[answers.labels])


def num_right(answers: Answers, mapping: Tensor) -> int:
    return int((answers.predicted == mapping[answers.labels]).sum())


def test_top1_and_chance_are_counted_one_by_one() -> None:
    some = Answers(predicted=torch.tensor([0, 0, 0, 1, 2]), labels=torch.tensor([0, 1, 0, 1, 1]))
    assert some.top1 == pytest.approx(3 / 5)
    pairs = [(predicted, label) for predicted in some.predicted for label in some.labels]
    assert some.chance == pytest.approx(sum(bool(predicted == label) for predicted, label in pairs) / 25)


def test_chance_is_at_most_the_share_of_the_most_frequent_class() -> None:
    labels = torch.tensor([0] * 9 + [1])
    assert Answers(predicted=torch.zeros(10, dtype=torch.int64), labels=labels).chance == pytest.approx(0.9)
    assert Answers(predicted=torch.arange(10) % 2, labels=labels).chance == pytest.approx(0.5)
    assert answers(300, 10, 0.0).chance == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(8))
def test_no_permutation_of_the_classes_gives_more_right_answers(num_classes: int, seed: int) -> None:
    some = Answers(predicted=guesses(30, num_classes, seed), labels=guesses(30, num_classes, seed + 100))
    best = max(num_right(some, torch.tensor(order)) for order in permutations(range(num_classes)))
    mapping = best_relabelling(some, num_classes)
    assert num_right(some, mapping) == best
    known = mapping[mapping >= 0].tolist()
    assert len(set(known)) == len(known)


def test_permuted_labels_are_found_out() -> None:
    order = torch.randperm(20, generator=generator(3)).tolist()
    mapping = best_relabelling(renumbered(answers(400, 20, 0.7), order), 20)
    assert mapping[torch.tensor(order)].tolist() == list(range(20))


def test_of_equal_numberings_the_one_that_moves_nothing_is_taken() -> None:
    some = Answers(predicted=torch.tensor([0, 1, 0, 1]), labels=torch.tensor([0, 0, 1, 1]))
    assert best_relabelling(some, 2).tolist() == [0, 1]


def test_labels_without_an_answer_of_their_own_mean_nothing() -> None:
    constant = Answers(predicted=torch.full((6,), 2), labels=torch.tensor([0, 0, 0, 1, 1, 2]))
    assert best_relabelling(constant, 4).tolist() == [2, NOTHING, NOTHING, UNSEEN]


def test_accuracy_of_a_numbering_is_that_of_the_images_whose_label_it_has_seen() -> None:
    some = Answers(predicted=torch.tensor([1, 1, 2, 0]), labels=torch.tensor([0, 0, 1, 2]))
    assert some.relabelled(torch.tensor([1, 0, UNSEEN])) == (pytest.approx(2 / 3), 3)
    assert some.relabelled(torch.tensor([1, NOTHING, 0])) == (pytest.approx(3 / 4), 4)
    assert some.relabelled(torch.full((3,), UNSEEN)) == (0.0, 0)


def test_a_numbering_made_for_some_guesses_does_not_fit_others() -> None:
    fit, check = answers(500, 200, 0.0, seed=1), answers(500, 200, 0.0, seed=2)
    mapping = best_relabelling(fit, 200)
    assert fit.relabelled(mapping)[0] > 0.25
    assert check.relabelled(mapping)[0] < 0.03


@pytest.mark.parametrize("missing", [0, 3, 8])
def test_missing_class_shifts_all_later_labels(missing: int) -> None:
    whole = answers(300, 10, 0.7)
    kept = whole.take(whole.labels != missing)
    shift = best_shift(renumbered(kept, [*range(missing), -1, *range(missing, 9)]), 10)
    assert shift == Shift(step=1, first=missing, last=8)
    assert shift.mapping(10)[:9].tolist() == [*range(missing), *range(missing + 1, 10)]


def test_one_class_too_many_shifts_labels_the_other_way_up_to_the_one_that_is_missing() -> None:
    whole = answers(300, 10, 0.7)
    kept = whole.take(whole.labels != 6)
    shift = best_shift(renumbered(kept, [1, 2, 3, 4, 5, 6, -1, 7, 8, 9]), 10)
    assert shift == Shift(step=-1, first=1, last=6)
    assert shift.mapping(10).tolist() == [0, 0, 1, 2, 3, 4, 5, 7, 8, 9]


def test_no_shift_is_found_where_labels_are_right() -> None:
    assert best_shift(answers(300, 10, 0.7), 10) is None


@pytest.mark.parametrize("num_classes", [10, 100])
def test_swapped_classes_are_found_and_named_with_their_counts(num_classes: int) -> None:
    order = list(range(num_classes))
    order[3], order[7] = 7, 3
    swapped = renumbered(answers(30 * num_classes, num_classes, 0.7), order)
    found = moved_classes(swapped, num_classes)
    assert {(moved.label, moved.meant) for moved in found} == {(3, 7), (7, 3)}
    for moved in found:
        of_class = swapped.predicted[swapped.labels == moved.label]
        assert (moved.num_moved, moved.num_images) == (int((of_class == moved.meant).sum()), 30)


@pytest.mark.parametrize("top1", [0.0, 0.2, 0.8])
@pytest.mark.parametrize(("count", "num_classes"), [(16, 2), (300, 10), (650, 1000), (2000, 1000), (5000, 100)])
def test_no_class_is_moved_by_noise(top1: float, count: int, num_classes: int) -> None:
    assert all(moved_classes(answers(count, num_classes, top1, seed), num_classes) == [] for seed in range(20))


def test_twins_that_a_model_cannot_tell_apart_are_not_moved() -> None:
    """Half of each of 50 pairs of classes is answered as the other one: some are, by noise, answered so mostly."""
    labels = torch.arange(3000) % 100
    for seed in range(20):
        is_other = torch.rand(3000, generator=generator(seed)) < 0.5
        predicted = torch.where(is_other, labels ^ 1, labels)
        assert moved_classes(Answers(predicted=predicted, labels=labels), 100) == []


def test_a_class_that_is_mostly_taken_for_a_similar_one_is_not_moved() -> None:
    labels = torch.arange(100) % 2
    taken = Answers(predicted=torch.where(torch.arange(100) < 80, 1, labels), labels=labels)
    assert moved_classes(taken, 2) == []


@pytest.mark.parametrize(("num_classes", "enough"), [(2, 8), (10, 10), (1000, 17)])
def test_a_class_is_not_told_to_be_moved_by_too_few_images(num_classes: int, enough: int) -> None:
    for count, is_told in ((enough - 1, False), (enough, True)):
        labels = torch.arange(num_classes * count) % num_classes
        swapped = torch.where(labels < 2, 1 - labels, labels)
        assert bool(moved_classes(Answers(predicted=swapped, labels=labels), num_classes)) is is_told


def test_many_classes_need_no_matrix_of_them_all() -> None:
    num_classes = 20_000  # squared, in float64: 3 GB
    order = torch.randperm(num_classes, generator=generator(0))
    shuffled = Answers(predicted=torch.arange(num_classes), labels=order)
    assert torch.equal(best_relabelling(shuffled, num_classes)[order], torch.arange(num_classes))
