"""A split of a data set before any image is decoded: which images there are, and their labels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import PIL.Image
import torch
from torch import Tensor

from pruning.dataset.class_map import composed
from pruning.dataset.classes import MAP_NEEDED, Classes
from pruning.dataset.files import shown
from pruning.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split of a data set of which no image is decoded yet."""

    labels: Tensor
    """(B,), int64: the class index of each image."""
    class_names: tuple[str, ...] = ()
    """Name of each class, in the order of the indices; empty where the data set has no names."""
    open: Callable[[int], BinaryIO | PIL.Image.Image]
    """Opens an image by its place: a file that holds it, or the image itself."""
    name_of: Callable[[int], str]
    """Gives the name of an image by its place, for messages."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, one line each: what was left out, what was assumed."""


def checked_labels(values: Iterable[object], num_classes: int, place: str) -> Tensor:
    """Checks that labels are class indices of the model.

    Args:
        values: one a image.
        place: which split of which data set, for messages.

    Returns:
        (B,), int64.

    Raises:
        DataError: there is none, or one is no whole number from 0 to `num_classes` - 1.
    """
    labels = []
    for value in values:
        index = _whole_number(value)
        if index is None:
            raise DataError(f"{place} has the label {str(value)[:40]}; vitfront needs one class index for each image")
        labels.append(index)
    if not labels:
        raise DataError(f"{place} has no image")
    if min(labels) < 0:
        raise DataError(f"{place} has the label {min(labels)}, as splits without labels have; take one with labels")
    if max(labels) >= num_classes:
        raise DataError(
            f"{place} has class index {max(labels)}, but the model has {num_classes} classes; "
            "give the class map the model was trained with (data.class_map) or the right number of classes"
        )
    return torch.tensor(labels, dtype=torch.long)


def _whole_number(value: object) -> int | None:
    """Gives a whole number of any library as an int; None for anything else: a fraction, a list, a word."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def model_labels(
    values: Sequence[object], names: Sequence[str], classes: Classes | None, num_classes: int, place: str
) -> tuple[Tensor, tuple[str, ...]]:
    """Turns the labels of a data set with an order of its own into the model's.

    Args:
        values: (B,), the data set's labels.
        names: names of the data set's classes, in its order; empty if it has none.
        classes: the class map, if there is one; else the data set's order is the model's.
        place: which split of which data set, for messages.

    Returns:
        (B,), int64, and the names of the model's classes.

    Raises:
        DataError: labels are no class indices, the number of classes is not the model's, or the class map does not go
            with the names.
    """
    names = tuple(map(composed, names))
    if classes is None:
        if names and len(names) != num_classes:
            raise DataError(f"{place} has {len(names)} classes, but the model has {num_classes} classes; {MAP_NEEDED}")
        return checked_labels(values, num_classes, place), names
    if not names:
        raise DataError(f"{place} has no class names that a class map could order; leave data.class_map out")
    unknown = [name for name in names if name not in classes.names]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(names)} classes of {place} are no class of {classes.origin}: {shown(unknown)}"
        )
    index = torch.tensor([classes.names.index(name) for name in names])
    return index[checked_labels(values, len(names), place)], classes.names
