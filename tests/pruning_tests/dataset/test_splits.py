"""The splits of a data set: which there are, how images are drawn from them, and keys that a data set does not use."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pruning.data import balanced_subset
from pruning.dataset.splits import check_splits_differ, load_split, open_dataset, open_split
from pruning.errors import DataError
from tests.pruning_tests.dataset.trees import GREY, SPEC, images, load, touch, write


def test_folders_give_their_pixels_and_the_labels_of_the_class_map(tmp_path: Path) -> None:
    written = write(tmp_path, cat=2, dog=3)
    loaded = load(tmp_path, class_map={"dog": 0, "bird": 1, "cat": 2}, num_classes=3)
    assert loaded.class_names == ("dog", "bird", "cat") and loaded.notes == ()
    assert loaded.images.pixels.dtype == torch.uint8 and loaded.images.pixels.shape == (5, 3, 8, 8)
    assert loaded.images.labels.tolist() == [2, 2, 0, 0, 0]
    for pixels, expected in zip(loaded.images.pixels, written.values(), strict=True):
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_a_class_map_can_be_a_text_file_and_is_alphabetic_without_one(tmp_path: Path) -> None:
    write(tmp_path, cat=2, dog=3)
    (tmp_path / "classes.txt").write_text("bird\ndog\ncat\n")
    assert images(tmp_path, class_map=tmp_path / "classes.txt", num_classes=3).labels.tolist() == [2, 2, 1, 1, 1]
    assert images(tmp_path).labels.tolist() == [0, 0, 1, 1, 1]


def test_a_class_may_be_named_like_the_split(tmp_path: Path) -> None:
    write(tmp_path, train=1, val=2)
    loaded = load(tmp_path)
    assert loaded.images.labels.tolist() == [0, 1, 1] and loaded.class_names == ("train", "val")


def test_skipped_files_are_told(tmp_path: Path) -> None:
    write(tmp_path, cat=1)
    touch(tmp_path / "val", ["cat/notes.txt", "README.md"])
    (note,) = load(tmp_path).notes
    assert note == "skipped 2 files of val, no images to PIL: 1 .md, 1 .txt (README.md, cat/notes.txt)"


def test_only_images_that_are_drawn_are_decoded(tmp_path: Path) -> None:
    write(tmp_path, cat=4, dog=4)
    drawn = balanced_subset(torch.tensor([0] * 4 + [1] * 4), 4, seed=7).tolist()
    for index in set(range(8)) - set(drawn):
        (tmp_path / "val" / ("cat", "dog")[index // 4] / f"{index % 4}.png").write_bytes(b"broken")
    assert images(tmp_path, limit=4, seed=7).labels.tolist() == [index // 4 for index in drawn]


def test_a_limit_draws_the_same_images_for_the_same_seed(tmp_path: Path) -> None:
    write(tmp_path, cat=6, dog=6, ewe=6)
    first, again, other = (images(tmp_path, limit=9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.pixels, other.pixels)
    assert Counter(first.labels.tolist()) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize("dataset", ["torch/image_folder", "torch/folder", "Torch/Image_Folder"])
def test_torchvisions_own_folders_are_folders_in_torchvisions_order(dataset: str, tmp_path: Path) -> None:
    write(tmp_path, **{"1": 1, "2": 2, "10": 3})
    assert images(tmp_path, dataset=dataset).labels.tolist() == [0, 2, 2, 1, 1, 1]
    mapped = images(tmp_path, dataset=dataset, class_map={"10": 0, "2": 1, "1": 2})
    assert mapped.labels.tolist() == [2, 1, 1, 0, 0, 0]
    write(tmp_path, "train", **{"0": 1, "1": 1, "10": 1, "2": 1})
    from_train = images(tmp_path, GREY, dataset=dataset, train="train", num_classes=4)
    assert from_train.labels.tolist() == [1, 3, 3, 2, 2, 2]
    with pytest.raises(DataError, match=r"has torchvision's class order; take data\.dataset=folder for timm's"):
        images(tmp_path, dataset=dataset, class_order="timm")


def no_split(root: Path, split: str) -> str:
    with pytest.raises(DataError) as error:
        open_dataset("folder", root=root, num_classes=2, train=split)
    return str(error.value).replace(str(root), "ROOT").replace(str(root.parent), "ABOVE")


def test_a_folder_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", ["train/cat/1.jpg", "validation/cat/1.jpg", ".git/x"])
    assert no_split(root, "val") == (
        "no folder ROOT/val; data.root holds train, validation; name the splits by these with data.train, data.val and "
        "data.test"
    )


@pytest.mark.parametrize("around", ["birds", "birds/birds"])
def test_a_folder_around_the_splits_is_told(around: str, tmp_path: Path) -> None:
    root = touch(tmp_path / "root", [f"{around}/{split}/cat/1.jpg" for split in ("train", "val")] + ["__MACOSX/x"])
    assert no_split(root, "train") == f"no folder ROOT/train; it lies deeper: give data.root=ROOT/{around}"


def test_a_root_that_holds_class_folders_is_told(tmp_path: Path) -> None:
    root = touch(tmp_path / "all", ["cat/1.jpg", "dog/1.jpg"])
    assert no_split(root, "train").endswith(
        "data.root holds class folders itself (cat, dog); name the folder above it as data.root and its folders as "
        "data.train and data.val"
    )
    touch(tmp_path / "train", ["cat/1.jpg"])
    assert no_split(root, "train").endswith("name the folder above it as data.root, data.root=ABOVE")


def test_a_root_that_is_empty_missing_or_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    assert "data.root must hold a folder 'val' with one folder a class" in no_split(tmp_path / "root", "val")
    assert no_split(tmp_path / "gone", "val") == "no folder ROOT/val: data.root=ROOT is no folder"
    touch(tmp_path, ["images.tar"])
    assert "images.tar is a file; unpack it into a folder" in no_split(tmp_path / "images.tar", "val").replace(
        "ROOT", "images.tar"
    )
    assert "is no folder" in no_split(tmp_path / ("long" * 100), "val")
    assert "no folder" in no_split(tmp_path / "root", "long" * 100)
    with pytest.raises(DataError, match=r"needs data\.root, the folder that holds the splits"):
        open_dataset("folder", num_classes=3)


def same(dataset: Any, **splits: str) -> str | None:
    try:
        check_splits_differ(dataset, {f"data.{key}": split for key, split in splits.items()})
    except DataError as error:
        return str(error)
    return None


def test_two_names_of_one_folder_are_refused_as_the_same_images(tmp_path: Path) -> None:
    touch(tmp_path, ["train/a/1.jpg", "val/a/1.jpg", "test/a/1.jpg"])
    (tmp_path / "link").symlink_to(tmp_path / "val")
    folders = open_dataset("folder", root=tmp_path, num_classes=1)
    assert same(folders, train="train", val="val", test="test") is None
    assert same(folders, train="train", val="val", test="val") == (
        "data.val=val and data.test=val are the same images; leave data.test out"
    )
    for other in ("./val", "val/", "../" + tmp_path.name + "/val", "link", str(tmp_path / "val")):
        assert "are the same images" in (same(folders, train="train", val="val", test=other) or "")
    assert same(folders, train="train", val="train") == (
        "data.train=train and data.val=train are the same images; name another split as data.val"
    )
    assert "data.train=train and data.test=train" in (same(folders, train="train", val="val", test="train") or "")
    assert "no folder" in (same(folders, train="train", val="val", test="exam") or "")


@pytest.mark.parametrize("name", ["cifar10", "mnist", "qmnist"])
def test_val_and_test_of_a_data_set_of_two_splits_are_the_same_images(name: str, tmp_path: Path) -> None:
    dataset = open_dataset(f"torch/{name}", root=tmp_path, num_classes=10)
    assert same(dataset, train="train", val="test") is None
    assert same(dataset, train="train", val="val", test="test") == (
        f"torch/{name} has only train and test; data.val=val and data.test=test are the same images; "
        "leave data.test out"
    )
    assert "are the same images" in (same(dataset, train="train", val="training") or "")
    assert same(dataset, train="train", val="val", test="nosuch") == (
        f"torch/{name} has no split 'nosuch'; it has train, test"
    )


def test_splits_of_the_digits_and_of_hugging_face_are_told_apart_by_their_names() -> None:
    digits = open_dataset("digits", num_classes=10)
    assert same(digits, train="train", val="val", test="test") is None
    assert "are the same images" in (same(digits, train="train", val="val", test="val") or "")
    assert same(digits, train="train", val="validation") == (
        "digits has no split 'validation'; it has train, val, test"
    )
    hugging_face = open_dataset("hfds/beans", num_classes=3)
    assert same(hugging_face, train="train", val="validation", test="test") is None
    assert "are the same images" in (same(hugging_face, train="train", val="test", test="test") or "")


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("digits", {"root": "x"}, "data.root"),
        ("digits", {"class_map": {"0": 0}}, "data.class_map"),
        ("digits", {"class_order": "timm"}, "data.class_order"),
        ("digits", {"download": True}, "data.download"),
        ("folder", {"download": True}, "data.download"),
        ("torch/image_folder", {"download": True}, "data.download"),
        ("torch/cifar10", {"class_order": "torchvision"}, "data.class_order"),
        ("torch/imagenet", {"download": True}, "data.download"),
        ("hfds/beans", {"class_order": "timm"}, "data.class_order"),
    ],
)
def test_a_key_that_a_data_set_does_not_use_is_refused(name: str, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(DataError, match=f"data set '{name}' does not use {key}; leave it out"):
        open_dataset(name, num_classes=1, **settings)


@pytest.mark.parametrize("name", ["imagenet", "", "folders", "tochr/cifar10", "torch/", "hfds/", "/", "folder/x"])
def test_a_data_set_of_no_known_kind_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no data set '{name}'; give folder, digits, torch/<name>, hfds/<name>"):
        open_dataset(name, num_classes=3, root=tmp_path)


@pytest.mark.parametrize("name", ["hfids/x", "tfds/mnist", "wds/x", "TFDS/mnist"])
def test_streams_are_refused_with_what_works(name: str) -> None:
    with pytest.raises(DataError, match=f"data set '{name}' is a stream, no image of which can be drawn; give folder"):
        open_dataset(name, num_classes=3)


def test_a_split_that_is_gone_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    touch(tmp_path, ["train/a/1.jpg"])
    dataset = open_dataset("folder", root=tmp_path, num_classes=1)
    with pytest.raises(DataError, match=r"no folder .*exam; data.root holds train"):
        open_split(dataset, "exam")
    with pytest.raises(DataError, match=r"no folder .*exam"):
        load_split(dataset, "exam", SPEC)
