"""Opens a split of a data set: which images there are, and their labels; no image is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image
import torch
from torch import Tensor

from pruning.dataset.classes import checked_class_map, split_folder
from pruning.errors import DataError, first_line_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split of a data set of which no image is decoded yet."""

    labels: Tensor
    """(B,), int64: the class index of each image."""
    open: Callable[[int], BinaryIO | PIL.Image.Image]
    """Opens an image by its place: a file that holds it, or the image itself."""
    name_of: Callable[[int], str]
    """Gives the name of an image by its place, for messages."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, one line each: what was left out, what was assumed."""


def open_source(
    dataset: str,
    split: str,
    root: str | Path | None,
    class_map: str | Path | dict[str, int] | None,
    mode: str,
    download: bool,
) -> Source:
    """Opens timm's data set after a check of its folders: timm skips class folders it does not know in silence.

    Raises:
        DataError: no such folder or data set, no image in it, or a class that is not in the class map.
    """
    from timm.data import create_dataset

    place = location(dataset, root, split)
    name, folder = dataset, root
    if dataset == "folder":
        folder = split_folder(root, split)
        name = ""
        if class_map is not None:
            class_map = checked_class_map(class_map, folder)
    elif "/" not in dataset:
        raise DataError(f"no data set {dataset!r}; give folder, digits, torch/<name>, hfds/<name>, ...")
    try:
        dataset_of_timm = create_dataset(
            name,
            root=None if folder is None else str(folder),
            split=split,
            search_split=dataset != "folder",
            class_map=class_map,  # type: ignore[arg-type]  # a path or None serve as well
            input_img_mode=mode,
            download=download,
        )
    except Exception as error:  # readers raise whatever their libraries raise
        raise DataError(f"cannot open {place}: {first_line_of(error)}") from error
    # Past timm's own __getitem__, which replaces an image that it cannot read by its neighbour.
    reader = getattr(dataset_of_timm, "reader", None)
    if reader is None:
        return Source(
            labels=_labels(dataset_of_timm), open=lambda index: dataset_of_timm[index][0], name_of="image {}".format
        )
    return Source(
        labels=_labels(dataset_of_timm),
        open=lambda index: reader[index][0],
        name_of=lambda index: reader.filename(index, absolute=True),
    )


def _labels(source: Any) -> Tensor:
    """Reads all labels of a data set, without decoding an image where its kind allows that."""
    samples = getattr(getattr(source, "reader", None), "samples", None) or getattr(source, "samples", None)
    if samples is not None:
        return torch.tensor([label for _, label in samples], dtype=torch.long)
    targets = getattr(source, "targets", None)
    if targets is not None:
        return torch.as_tensor(targets, dtype=torch.long)
    pairs = getattr(source, "reader", source)
    return torch.tensor([int(pairs[index][1]) for index in range(len(source))], dtype=torch.long)


def location(dataset: str, root: str | Path | None, split: str) -> str:
    """Tells which split of which data set, for messages."""
    return f"{dataset} {Path(root) / split if root is not None else split}"
