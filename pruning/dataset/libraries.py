"""Opens splits of other libraries' data sets by timm: `torch/<name>` of torchvision, `hfds/<name>` of Hugging Face."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import INaturalist

from pruning.dataset.classes import Classes
from pruning.dataset.sources import Source, model_labels
from pruning.errors import DataError, first_line_of

TRAIN = ("train", "training")
EVAL = ("val", "valid", "validation", "eval", "evaluation")

_TWO = dict.fromkeys(TRAIN, "train") | dict.fromkeys((*EVAL, "test"), "test")
_YEARS = {name: name for name in ("2017", "2018", "2019", "2021_train", "2021_train_mini", "2021_valid")}
_INATURALIST = dict.fromkeys(TRAIN, "2021_train") | dict.fromkeys(EVAL, "2021_valid") | _YEARS

SPLITS: dict[str, dict[str, str]] = {
    "cifar10": _TWO,
    "cifar100": _TWO,
    "mnist": _TWO,
    "kmnist": _TWO,
    "fashion_mnist": _TWO,
    "qmnist": _TWO,
    "imagenet": dict.fromkeys(TRAIN, "train") | dict.fromkeys(EVAL, "val"),
    "places365": dict.fromkeys((*TRAIN, "train-standard"), "train-standard")
    | {"train-challenge": "train-challenge"}
    | dict.fromkeys(EVAL, "val"),
    "inaturalist": _INATURALIST,
    "inat": _INATURALIST,
}
"""Splits of torchvision's data sets as timm opens them: any name of a split -> its own name.

timm takes every name that it does not know for the test split. Its own table is private."""


def torchvision_split(name: str, split: str) -> str:
    """Gives the own name of a split of `torch/<name>`: what timm takes `split` for.

    Raises:
        DataError: no such data set, or no such split; the message lists those that there are.
    """
    splits = SPLITS.get(name)
    if splits is None:
        known = ", ".join(f"torch/{other}" for other in ("image_folder", *SPLITS))
        raise DataError(f"timm has no data set 'torch/{name}'; it has {known}")
    target, slash, word = split.rpartition("/") if splits is _INATURALIST else ("", "", split)  # e.g. genus/2021_train
    if word not in splits:
        there = ", ".join(dict.fromkeys(splits.values()))
        raise DataError(f"torch/{name} has no split {split!r}; it has {there}")
    return target + slash + splits[word]


def open_torchvision(
    name: str, split: str, root: Path | None, classes: Classes | None, num_classes: int, download: bool
) -> Source:
    """Opens a split of a torchvision data set, `torch/<name>`.

    Raises:
        DataError: it cannot be opened, or its classes are not the model's.
    """
    own_split = torchvision_split(name, split)
    if root is None:
        raise DataError(f"data set 'torch/{name}' needs data.root, the folder that it lies in or is downloaded to")
    place = f"torch/{name} {own_split}"
    opened = _create(f"torch/{name}", own_split, root, place, download)
    labels, names = model_labels(_torchvision_labels(opened), _torchvision_names(opened), classes, num_classes, place)
    return Source(
        labels=labels,
        class_names=names,
        open=lambda index: opened[index][0],
        name_of=lambda index: f"image {index} of {place}",
    )


def _create(dataset: str, split: str, root: Path | None, place: str, download: bool) -> Any:
    """Calls timm's `create_dataset`; its readers raise whatever their libraries raise."""
    from timm.data import create_dataset

    try:
        return create_dataset(dataset, root=None if root is None else str(root), split=split, download=download)
    except Exception as error:
        where = "" if root is None else f" in {root}"
        fetched = dataset.startswith("torch/") and dataset != "torch/imagenet" and "download" in str(error)
        way_out = "; data.download=true fetches it" if fetched and not download else ""
        raise DataError(f"cannot open {place}{where}: {first_line_of(error)}{way_out}") from error


def _torchvision_labels(opened: Any) -> Sequence[object]:
    """Gives all labels of a data set, without decoding an image where its kind allows that."""
    targets = getattr(opened, "targets", None)
    if isinstance(targets, torch.Tensor):
        targets = targets[:, 0] if targets.ndim == 2 else targets  # QMNIST: the class, then who wrote it, ...
        return list(targets.tolist())
    if targets is not None:
        return list(targets)
    if isinstance(opened, INaturalist):
        of_category = opened.categories_map
        levels = [
            [category if level == "full" else of_category[category][level] for level in opened.target_type]
            for category, _ in opened.index
        ]
        return [labels[0] if len(labels) == 1 else labels for labels in levels]
    return [opened[index][1] for index in range(len(opened))]


def _torchvision_names(opened: Any) -> tuple[str, ...]:
    """Gives the names of a data set's classes: ImageNet's are those of its folders, its words are not unique."""
    names = getattr(opened, "wnids", None) or getattr(opened, "classes", None) or ()
    return tuple(names)


def open_hugging_face(
    name: str, split: str, root: Path | None, classes: Classes | None, num_classes: int, download: bool
) -> Source:
    """Opens a split of a Hugging Face data set, `hfds/<name>`; `datasets` fetches what its cache in `root` lacks.

    Raises:
        DataError: it cannot be opened, or its classes are not the model's.
    """
    place = f"hfds/{name} {split}"
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"data set 'hfds/{name}' needs the library datasets; install it with: pip install datasets")
    opened = _create(f"hfds/{name}", split, root, place, download)
    return read_hugging_face(opened.reader, place, classes, num_classes)


def read_hugging_face(reader: Any, place: str, classes: Classes | None, num_classes: int) -> Source:
    """Gives the images and labels of timm's reader of a Hugging Face data set.

    Args:
        reader: timm's `ReaderHfds`, opened without a class map.
        place: which split of which data set, for messages.

    Raises:
        DataError: its labels are no class indices, or its classes are not the model's.
    """
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    if hasattr(reader, "iter_targets"):
        targets = list(reader.iter_targets())
    else:  # an older timm
        targets = [reader[index][1] for index in range(len(reader))]
    labels, names_of_model = model_labels(targets, names, classes, num_classes, place)
    return Source(
        labels=labels,
        class_names=names_of_model,
        open=lambda index: reader[index][0],
        name_of=lambda index: f"image {index} of {place}",
    )
