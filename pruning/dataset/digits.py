"""scikit-learn's 1,797 digits of 8 x 8 pixels, as a data set of three splits."""

from __future__ import annotations

import torch

from pruning.data import Images, InputSpec
from pruning.errors import DataError

SPLITS = ("train", "val", "test")
CLASS_NAMES = tuple("0123456789")


def check_digits_split(split: str) -> None:
    """Checks the name of a split.

    Raises:
        DataError: there is no such split; the message lists those that there are.
    """
    if split not in SPLITS:
        raise DataError(f"digits has no split {split!r}; it has {', '.join(SPLITS)}")


def load_digits_split(split: str, spec: InputSpec, num_classes: int) -> Images:
    """Loads 60 % of the digits as train, 20 % as val or 20 % as test, classes in equal shares.

    Raises:
        DataError: there is no such split, or the model takes other images or has other classes.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_digits_split(split)
    if num_classes != len(CLASS_NAMES):
        raise DataError(f"digits has 10 classes, but the model has {num_classes} classes; mend model.args.num_classes")
    if spec.size != (8, 8) or len(spec.mean) != 1:
        raise DataError(f"digits are 8 x 8 with 1 channel; the model takes {spec.size} with {len(spec.mean)}")
    data = load_digits()
    rest, test = train_test_split(range(len(data.target)), test_size=0.2, random_state=0, stratify=data.target)
    train, val = train_test_split(rest, test_size=0.25, random_state=0, stratify=data.target[rest])
    part = dict(zip(SPLITS, (train, val, test), strict=True))[split]
    pixels = torch.from_numpy(data.images[part] * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(data.target[part]).long()
    return Images(pixels=pixels[:, None], labels=labels, mean=spec.mean, std=spec.std)
