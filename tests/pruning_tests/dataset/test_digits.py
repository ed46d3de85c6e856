"""The digits of scikit-learn: their splits, pixels and labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pruning.data import Images, InputSpec
from pruning.dataset.splits import load_split, open_dataset
from pruning.errors import DataError
from tests.pruning_tests.dataset.trees import GREY, SPEC


def digits(split: str, **other: Any) -> Images:
    return load_split(open_dataset("digits", num_classes=10), split, GREY, **other).images


def test_digit_splits_are_disjoint_and_hold_everything_in_equal_shares() -> None:
    splits = {split: digits(split) for split in ("train", "val", "test")}
    assert [len(images) for images in splits.values()] == [1077, 360, 360]
    pictures = [bytes(image.flatten().tolist()) for images in splits.values() for image in images.pixels]
    expected = (torch.from_numpy(load_digits().images) * 255 / 16).round().to(torch.uint8)
    assert sorted(pictures) == sorted(bytes(image.flatten().tolist()) for image in expected)
    for images in splits.values():
        shares = torch.bincount(images.labels, minlength=10) / len(images)
        assert shares.min() > 0.09 and shares.max() < 0.11


def test_digits_are_grey_eights_of_full_contrast() -> None:
    images = digits("val")
    assert images.pixels.shape == (360, 1, 8, 8) and images.pixels.dtype == torch.uint8
    assert images.pixels.min() == 0 and images.pixels.max() == 255
    assert torch.equal(digits("val", limit=20).labels.bincount(), torch.full((10,), 2))


def test_digits_go_with_their_own_labels() -> None:
    data = load_digits()
    label_of = {
        bytes((picture * 255 / 16).round().astype(np.uint8).flatten().tolist()): int(label)
        for picture, label in zip(data.images, data.target, strict=True)
    }
    images = digits("train")
    for image, label in zip(images.pixels, images.labels.tolist(), strict=True):
        assert label_of[bytes(image.flatten().tolist())] == label


def test_digits_of_another_size_or_split_are_refused() -> None:
    with pytest.raises(DataError, match="digits has no split 'validation'; it has train, val, test"):
        digits("validation")
    for spec in (SPEC, InputSpec(size=(16, 16), mean=(0.5,), std=(0.5,))):
        with pytest.raises(DataError, match="digits are 8 x 8 with 1 channel"):
            load_split(open_dataset("digits", num_classes=10), "val", spec)
    with pytest.raises(DataError, match="digits has 10 classes, but the model has 12 classes"):
        load_split(open_dataset("digits", num_classes=12), "val", GREY)
