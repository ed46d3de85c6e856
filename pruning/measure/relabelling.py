"""Relabelling: how well a model's answers fit the labels if the classes are numbered otherwise.

A model that is right, on images whose labels are wrong, answers with the wrong class, but with the same one for all
images of a class. A broken model does not: no renumbering makes its answers right.

B images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.stats import binom
from torch import Tensor

UNSEEN = -1
"""Stands in a mapping for the class of a label that no image had."""

NOTHING = -2
"""Stands in a mapping for the class of a label whose images all get answers that fit other labels better."""

FALSE_ALARM = 0.01
"""The largest chance that `moved_classes` finds any class where each is answered right as often as it is moved."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's answers to labelled images."""

    predicted: Tensor
    """(B,), int64, the class of the largest logit."""
    labels: Tensor
    """(B,), int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | slice) -> Answers:
        """Gives the answers to some of the images."""
        return Answers(predicted=self.predicted[indices], labels=self.labels[indices])

    @property
    def top1(self) -> float:
        """The share of right answers, in [0, 1]."""
        return float((self.predicted == self.labels).double().mean())

    @property
    def chance(self) -> float:
        """The share of answers that would be right if they had nothing to do with the images (Cohen 1960).

        It is the sum over the classes of (share of the labels) x (share of the answers): 1 / K for even labels, and at
        most the share of the most frequent label, where that is the only answer.
        """
        size = int(max(self.predicted.max(), self.labels.max())) + 1
        counts = (torch.bincount(classes, minlength=size).double() for classes in (self.predicted, self.labels))
        predicted, labels = (count / len(self) for count in counts)
        return float(predicted @ labels)

    def relabelled(self, mapping: Tensor) -> tuple[float, int]:
        """Gives the share of right answers if label i means class `mapping[i]`, and the number of images.

        Images with a label that is `UNSEEN` are left out; without any image the share is 0. Those whose label means
        `NOTHING` have wrong answers.

        Args:
            mapping: (K,), int64.
        """
        meant = mapping[self.labels]
        count = int((meant != UNSEEN).sum())
        return int((self.predicted == meant).sum()) / max(1, count), count


def best_relabelling(answers: Answers, num_classes: int) -> Tensor:
    """Finds the one-to-one mapping from labels to classes with the most right answers (the assignment problem).

    Among equally good mappings it takes one that moves few classes. Time and memory grow with the number of different
    pairs of label and answer, not with K x K.

    Returns:
        (K,), int64: the class that each label means, or `UNSEEN`, or `NOTHING`.
    """
    mapping = torch.full((num_classes,), UNSEEN)
    pairs, counts = torch.unique(answers.labels * num_classes + answers.predicted, return_counts=True)
    rows, columns = pairs // num_classes, pairs % num_classes
    labels, row_of = torch.unique(rows, return_inverse=True)
    # Each label has a column of its own besides, worth less than any answer, so that a full matching exists.
    own = torch.arange(len(labels))
    worth = 4 * (len(labels) + 1) * counts + 2 * (rows == columns)
    values = torch.cat([worth, torch.ones_like(own)]).double().numpy()
    indices = torch.cat([row_of, own]).numpy(), torch.cat([columns, num_classes + own]).numpy()
    weights = csr_array((values, indices), shape=(len(labels), num_classes + len(labels)))
    matched_rows, matched_columns = min_weight_full_bipartite_matching(weights, maximize=True)
    matched = torch.as_tensor(matched_columns, dtype=torch.int64)
    mapping[labels[matched_rows]] = torch.where(matched < num_classes, matched, NOTHING)
    return mapping


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Labels that are all off by one, from a first class to a last one."""

    step: int
    """1 if label i means class i + 1, as where a class is missing; -1 if it means i - 1, as where there is one more."""
    first: int
    """The first label that is off."""
    last: int
    """The last label that is off."""

    def mapping(self, num_classes: int) -> Tensor:
        """Gives the class that each label means, (K,), int64."""
        mapping = torch.arange(num_classes)
        mapping[self.first : self.last + 1] += self.step
        mapping[(mapping < 0) | (mapping >= num_classes)] = NOTHING
        return mapping


def best_shift(answers: Answers, num_classes: int) -> Shift | None:
    """Finds the shift by one of a range of labels with the most right answers; None if no shift is better than none."""
    labels = answers.labels
    right = torch.bincount(labels[answers.predicted == labels], minlength=num_classes)
    best: tuple[int, Shift | None] = (0, None)
    for step in (1, -1):
        shifted = torch.bincount(labels[answers.predicted == labels + step], minlength=num_classes)
        # The range with the largest sum of gains lies between a low and a later high of their running sum.
        total = np.concatenate([[0], (shifted - right).cumsum(0).numpy()])
        rise = total - np.minimum.accumulate(total)
        end = len(rise) - 1 - int(rise[::-1].argmax())
        start = end - int((total[: end + 1][::-1]).argmin())
        if rise[end] > best[0]:
            best = int(rise[end]), Shift(step=step, first=start, last=min(end - 1, int(labels.max())))
    return best[1]


@dataclass(frozen=True, kw_only=True)
class MovedClass:
    """A class whose images are answered as another class."""

    label: int
    meant: int
    """The class that is answered."""
    num_moved: int
    """Number of its images that are answered as that class."""
    num_images: int


def moved_classes(answers: Answers, num_classes: int) -> list[MovedClass]:
    """Finds the classes most of whose images are answered as one other class, which is nobody else's.

    A class that a model merely takes for a similar one is not among them, as that one keeps its own answers
    (`best_relabelling`). Nor is one that has too few images to tell: a sign test for each class keeps `FALSE_ALARM` for
    all together, so that it takes 8 images of which all are moved with 2 classes, 10 with 10, and 17 with 1,000.

    Returns:
        Those with the most moved images first.
    """
    mapping = best_relabelling(answers, num_classes)
    meant = mapping[answers.labels]
    num_images = torch.bincount(answers.labels, minlength=num_classes)
    num_right = torch.bincount(answers.labels[answers.predicted == answers.labels], minlength=num_classes)
    num_moved = torch.bincount(answers.labels[answers.predicted == meant], minlength=num_classes)
    is_moved = (mapping >= 0) & (mapping != torch.arange(num_classes)) & (2 * num_moved > num_images)
    level = FALSE_ALARM / max(1, int((num_images > 0).sum()))
    found = [
        MovedClass(
            label=label, meant=int(mapping[label]), num_moved=int(num_moved[label]), num_images=int(num_images[label])
        )
        for label in is_moved.nonzero().flatten().tolist()
        if binom.sf(int(num_moved[label]) - 1, int(num_moved[label] + num_right[label]), 0.5) <= level
    ]
    return sorted(found, key=lambda moved: -moved.num_moved)
