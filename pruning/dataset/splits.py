"""Loads a split of a data set as tensors: timm's data sets and transforms, or scikit-learn's digits.

Only images that will be used are decoded.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pruning.data import Images, InputSpec, balanced_subset
from pruning.dataset.pixels import decode
from pruning.dataset.sources import location, open_source
from pruning.errors import DataError


def load_split(
    dataset: str,
    split: str,
    spec: InputSpec,
    *,
    num_classes: int,
    root: str | Path | None = None,
    class_map: str | Path | dict[str, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    download: bool = False,
) -> Images:
    """Loads one split of a data set.

    Args:
        dataset: `folder` (one folder a class below `root`/`split`), `digits`, or any name of timm's
            `create_dataset`: `torch/cifar10`, `hfds/<name>`, ...
        split: the split's name; for folders the folder below `root`.
        num_classes: classes of the model; labels must be below.
        class_map: for folders: a text file with one class a line, in the order of the indices, or a mapping.
        limit: at most so many images, drawn with `seed`, as many of each class as possible.

    Raises:
        DataError: no such folder, no image in it, a class that is not in the class map or beyond `num_classes`, or
            an image that cannot be decoded; the message names it.
    """
    if dataset == "digits":
        images = _digits(split, spec)
        return images if limit is None else images.take(balanced_subset(images.labels, limit, seed))
    source = open_source(dataset, split, root, class_map, spec.mode, download)
    labels = source.labels
    highest = int(labels.max())
    if highest >= num_classes:
        raise DataError(
            f"{location(dataset, root, split)} has class index {highest}, but the model has {num_classes} classes; "
            "give the class map the model was trained with (data.class_map) or the right number of classes"
        )
    chosen = torch.arange(len(labels)) if limit is None else balanced_subset(labels, limit, seed)
    decoded = decode(source, chosen.tolist(), spec)
    return Images(pixels=decoded.pixels, labels=labels[chosen], mean=spec.mean, std=spec.std)


def _digits(split: str, spec: InputSpec) -> Images:
    """scikit-learn's 1,797 images of 8 x 8: 60 % train, 20 % val, 20 % test, classes in equal shares."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rest, test = train_test_split(range(len(data.target)), test_size=0.2, random_state=0, stratify=data.target)
    train, val = train_test_split(rest, test_size=0.25, random_state=0, stratify=data.target[rest])
    parts = {"train": train, "val": val, "test": test}
    if split not in parts:
        raise DataError(f"digits has no split {split!r}; it has {', '.join(parts)}")
    if spec.size != (8, 8) or len(spec.mean) != 1:
        raise DataError(f"digits are 8 x 8 with 1 channel; the model takes {spec.size} with {len(spec.mean)}")
    pixels = torch.from_numpy(data.images[parts[split]] * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(data.target[parts[split]]).long()
    return Images(pixels=pixels[:, None], labels=labels, mean=spec.mean, std=spec.std)
