"""Loads a split of a data set as tensors: folders of images, torchvision's and Hugging Face's data sets, or
scikit-learn's digits.

Only images that will be used are decoded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pruning.data import Images, InputSpec, balanced_subset
from pruning.dataset.classes import Classes, ClassOrder, folder_classes, mapped_classes
from pruning.dataset.digits import CLASS_NAMES, check_digits_split, load_digits_split
from pruning.dataset.files import list_images
from pruning.dataset.folders import open_folder, split_folder
from pruning.dataset.libraries import open_hugging_face, open_torchvision, torchvision_split
from pruning.dataset.pixels import decode
from pruning.dataset.sources import Source
from pruning.errors import DataError

KINDS = "folder, digits, torch/<name>, hfds/<name>"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set whose name, keys and classes are checked, and of which no image is read yet."""

    kind: str
    """`folder`, `digits`, `torch` or `hfds`."""
    name: str
    """Name of the data set as the user gave it, for messages."""
    short_name: str
    """Name in its library: `cifar10` of `torch/cifar10`; empty for `folder` and `digits`."""
    root: Path | None
    """Folder that holds its splits, or where its library keeps it."""
    classes: Classes | None
    """The classes of the class map or of the folders; None where the data set's own order is the model's."""
    num_classes: int
    """Number of the model's classes."""
    download: bool
    """True if the library may fetch a data set that is missing."""


@dataclass(frozen=True, kw_only=True)
class LoadedSplit:
    """The images of a split, and what is to be said of them."""

    images: Images
    class_names: tuple[str, ...]
    """Name of each class, in the order of the indices; empty where the data set has no names."""
    notes: tuple[str, ...]
    """Remarks for the user, one line each: which files were skipped."""


def open_dataset(
    name: str,
    *,
    num_classes: int,
    root: str | Path | None = None,
    class_map: str | Path | Mapping[str, int] | None = None,
    class_order: ClassOrder | None = None,
    train: str = "train",
    download: bool = False,
) -> Dataset:
    """Opens a data set: checks its keys, and makes the order of its classes.

    Args:
        name: `folder` (one folder a class below `root`/split), `digits`, `torch/<name>` or `hfds/<name>`.
        num_classes: number of the model's classes.
        root: folder of the splits; where the library keeps it for `torch/...` and `hfds/...`.
        class_map: text file with one class name a line, in the order of the indices, or a mapping from name to index.
        class_order: library whose order the class folders have; needed where timm's and torchvision's differ.
        train: split whose folders are the classes, where there is no class map.
        download: let the library fetch a data set that is missing.

    Raises:
        DataError: no such data set, a key that it does not use, or classes that are not the model's.
    """
    kind, short_name = _parse_name(name)
    if kind == "torch" and short_name in ("image_folder", "folder"):
        kind = "folder"
        if class_order == "timm":
            raise DataError(f"data set {name!r} has torchvision's class order; take data.dataset=folder for timm's")
        class_order = "torchvision"
    given = {"root": root is not None, "class_map": class_map is not None, "download": download}
    _check_keys(kind, name, given | {"class_order": class_order is not None})
    root = None if root is None else Path(root)
    classes = None if class_map is None else mapped_classes(class_map, class_order, num_classes)
    if kind == "folder" and classes is None:
        classes = folder_classes(list_images(split_folder(root, train)), class_order, num_classes)
    return Dataset(
        kind=kind, name=name, short_name=short_name, root=root, classes=classes, num_classes=num_classes,
        download=download,
    )  # fmt: skip


def _parse_name(name: str) -> tuple[str, str]:
    """Parts a data set's name: `torch/CIFAR10` -> `torch`, `cifar10`; the second is empty for folder and digits.

    Raises:
        DataError: no such kind of data set.
    """
    kind, slash, short_name = name.partition("/")
    kind = kind.lower() if slash else name  # as timm takes it
    if kind in ("hfids", "tfds", "wds"):
        raise DataError(f"data set {name!r} is a stream, no image of which can be drawn; give {KINDS}")
    of_library = kind in ("torch", "hfds")
    if not (of_library or kind in ("folder", "digits")) or of_library != bool(short_name) or bool(slash) != of_library:
        raise DataError(f"no data set {name!r}; give {KINDS}")
    return kind, short_name.lower() if kind == "torch" else short_name


def _check_keys(kind: str, name: str, given: Mapping[str, bool]) -> None:
    """Checks that a data set uses all keys that it is given.

    Raises:
        DataError: it would ignore one.
    """
    no_download = kind in ("folder", "digits") or name.lower() == "torch/imagenet"
    unused = {
        "root": kind == "digits",
        "class_map": kind == "digits",
        "class_order": kind != "folder",
        "download": no_download,
    }
    for key, is_unused in unused.items():
        if is_unused and given[key]:
            raise DataError(f"data set {name!r} does not use data.{key}; leave it out")


def check_splits_differ(dataset: Dataset, splits: Mapping[str, str]) -> None:
    """Checks that splits are there, and that no two of them are the same one under two names.

    Args:
        splits: key of the recipe -> name of the split, such as `data.val` -> `validation`.

    Raises:
        DataError: there is no such split, or two are the same.
    """
    seen: dict[str, str] = {}
    for key, split in splits.items():
        place = _place_of(dataset, split)
        other = seen.setdefault(place, key)
        if other == key:
            continue
        way_out = "leave data.test out" if key == "data.test" else f"name another split as {key}"
        two = f"{dataset.name} has only train and test; " if place == "test" and split != splits[other] else ""
        raise DataError(f"{two}{other}={splits[other]} and {key}={split} are the same images; {way_out}")


def _place_of(dataset: Dataset, split: str) -> str:
    """Gives a split's own name, which is the same however it is spelt.

    Raises:
        DataError: there is no such split.
    """
    if dataset.kind == "folder":
        return os.path.realpath(split_folder(dataset.root, split))
    if dataset.kind == "torch":
        return torchvision_split(dataset.short_name, split)
    if dataset.kind == "digits":
        check_digits_split(split)
    return split


def open_split(dataset: Dataset, split: str) -> Source:
    """Opens a split of a data set other than the digits; no image is decoded.

    Raises:
        DataError: there is no such split, no image in it, or a class that is not the model's.
    """
    if dataset.kind == "folder":
        assert dataset.classes is not None
        return open_folder(dataset.root, split, dataset.classes)
    reader = {"torch": open_torchvision, "hfds": open_hugging_face}[dataset.kind]
    return reader(dataset.short_name, split, dataset.root, dataset.classes, dataset.num_classes, dataset.download)


def load_split(
    dataset: Dataset, split: str, spec: InputSpec, *, limit: int | None = None, seed: int = 0
) -> LoadedSplit:
    """Loads one split of a data set.

    Args:
        split: the split's name; for folders the folder below the data set's root.
        limit: at most so many images, drawn with `seed`, as many of each class as possible.

    Raises:
        DataError: there is no such split, no image in it, a class that is not the model's, or an image that cannot be
            decoded; the message names it.
    """
    if dataset.kind == "digits":
        images = load_digits_split(split, spec, dataset.num_classes)
        drawn = images if limit is None else images.take(balanced_subset(images.labels, limit, seed))
        return LoadedSplit(images=drawn, class_names=CLASS_NAMES, notes=())
    source = open_split(dataset, split)
    labels = source.labels
    chosen = torch.arange(len(labels)) if limit is None else balanced_subset(labels, limit, seed)
    decoded = decode(source, chosen.tolist(), spec)
    return LoadedSplit(
        images=Images(pixels=decoded.pixels, labels=labels[chosen], mean=spec.mean, std=spec.std),
        class_names=source.class_names,
        notes=(*source.notes, *(f"{split}: {note}" for note in decoded.notes)),
    )
