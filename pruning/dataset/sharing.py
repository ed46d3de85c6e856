"""Finds images that are there twice, by their pixels: in two splits, or in one of them under two labels.

What is tested on must not have been seen before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from pruning.errors import DataError

OVERLAPS = (("val", "test"), ("train", "test"), ("train", "val"))
"""Pairs of splits that should share no image; only the last may."""


def check_shared(hashes: Mapping[str, Collection[bytes]], shared: Literal["refuse", "allow"] = "refuse") -> list[str]:
    """Compares the images of the splits, whatever their labels.

    Args:
        hashes: split -> hash of each image; a split that is not there shares nothing.
        shared: `refuse` images that test shares with another split, or `allow` them.

    Returns:
        A remark, one line, for every pair of splits that shares images and may.

    Raises:
        DataError: test shares images with val or train.
    """
    remarks = []
    for first, second in OVERLAPS:
        of_first, of_second = set(hashes.get(first, ())), hashes.get(second, ())
        num_shared = sum(image in of_first for image in of_second)
        if not num_shared:
            continue
        text = f"{num_shared} of the {len(of_second)} {second} images are in {first} too"
        if second == "test" and shared == "refuse":
            raise DataError(
                f"{text}, so accuracy on test says nothing; give other images (data.root, data.{first}, data.test), "
                "or data.shared_images=allow"
            )
        remarks.append(f"{text}: accuracy on {second} is too high")
    return remarks


def contradictory_labels(name: str, hashes: Sequence[bytes], labels: Sequence[int]) -> list[str]:
    """Finds images of a split that are there under two labels or more, one of which must be wrong.

    Args:
        name: the split's name, for the remark.
        hashes: of each image.
        labels: its class index.

    Returns:
        A remark, one line, if there are such images.
    """
    labels_of: dict[bytes, set[int]] = {}
    for image, label in zip(hashes, labels, strict=True):
        labels_of.setdefault(image, set()).add(label)
    count = sum(len(labels_of[image]) > 1 for image in hashes)
    return [f"{count} of the {len(hashes)} {name} images are there under two labels, as copies"] if count else []
