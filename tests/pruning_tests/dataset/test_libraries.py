"""Data sets of torchvision and Hugging Face: their splits, labels and class names."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from pruning.data import InputSpec
from pruning.dataset.classes import Classes
from pruning.dataset.libraries import SPLITS, read_hugging_face, torchvision_split
from pruning.dataset.splits import load_split, open_dataset, open_split
from pruning.errors import DataError

LABELS = [7, 0, 9, 3, 3]
DIGITS = ("0 - zero", "1 - one", "2 - two", "3 - three", "4 - four", "5 - five", "6 - six", "7 - seven", "8 - eight",
          "9 - nine")  # fmt: skip


def write_mnist(root: Path) -> np.ndarray[Any, Any]:
    """Five images a split in the IDX format: a magic number, the sizes, the values."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, 5, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + values.tobytes())
        header = b"".join(number.to_bytes(4, "big") for number in (0x801, 5))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(LABELS))
    return values


def test_a_torchvision_data_set_is_read_by_its_targets(tmp_path: Path) -> None:
    values = write_mnist(tmp_path)
    spec = InputSpec(size=(28, 28), mean=(0.5,), std=(0.25,), crop_pct=1.0)
    dataset = open_dataset("torch/MNIST", root=tmp_path, num_classes=10)
    loaded = load_split(dataset, "val", spec)
    assert loaded.images.labels.tolist() == LABELS and loaded.class_names == DIGITS
    np.testing.assert_array_equal(loaded.images.pixels[:, 0].numpy(), values)
    assert load_split(dataset, "val", spec, limit=4).images.labels.unique().numel() == 4


def test_a_class_map_orders_the_names_of_a_torchvision_data_set(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    names = ["other", *DIGITS[::-1]]
    (tmp_path / "map.txt").write_text("\n".join(names))
    settings: dict[str, Any] = {"root": tmp_path, "class_map": tmp_path / "map.txt"}
    source = open_split(open_dataset("torch/mnist", num_classes=11, **settings), "train")
    assert [names[label] for label in source.labels.tolist()] == [DIGITS[label] for label in LABELS]
    assert source.class_names == tuple(names)
    with pytest.raises(DataError, match=r"the class map .* has 11 classes, but the model has 10 classes"):
        open_dataset("torch/mnist", num_classes=10, **settings)
    (tmp_path / "map.txt").write_text("\n".join(["0", *DIGITS[1:]]))
    with pytest.raises(
        DataError, match=r"1 of 10 classes of torch/mnist train are no class of the class map .*: 0 - z"
    ):
        open_split(open_dataset("torch/mnist", num_classes=10, **settings), "train")


@pytest.mark.parametrize("num_classes", [9, 1000])
def test_a_torchvision_data_set_of_another_number_of_classes_is_refused(num_classes: int, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with pytest.raises(DataError, match=f"torch/mnist test has 10 classes, but the model has {num_classes} classes"):
        open_split(open_dataset("torch/mnist", num_classes=num_classes, root=tmp_path), "val")


def write_qmnist(root: Path) -> None:
    """Three images of test, with eight numbers a label: the class, then who wrote it, ..."""
    raw = root / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    header = b"".join(number.to_bytes(4, "big") for number in (0x803, 3, 28, 28))
    (raw / "qmnist-test-images-idx3-ubyte").write_bytes(header + bytes(3 * 28 * 28))
    header = b"".join(number.to_bytes(4, "big") for number in (0xC02, 3, 8))
    rows = np.array([[4, 1, 2500, 3, 4, 5, 6, 7], [2, 9, 9, 9, 9, 9, 9, 9], [9, 0, 0, 0, 0, 0, 0, 0]], dtype=">i4")
    (raw / "qmnist-test-labels-idx2-int").write_bytes(header + rows.tobytes())


def test_labels_of_qmnist_are_its_classes_alone(tmp_path: Path) -> None:
    write_qmnist(tmp_path)
    source = open_split(open_dataset("torch/qmnist", num_classes=10, root=tmp_path), "test")
    assert source.labels.tolist() == [4, 2, 9]
    opened = create_dataset("torch/qmnist", root=str(tmp_path), split="test")
    assert [opened[index][1] for index in range(3)] == [4, 2, 9]


def write_inaturalist(root: Path) -> None:
    for number, (order, genus, species) in enumerate([("O1", "G1", "s1"), ("O1", "G2", "s2"), ("O2", "G3", "s3")]):
        folder = root / "2021_valid" / f"{number:05}_Animalia_P_C_{order}_F_{genus}_{species}"
        folder.mkdir(parents=True)
        for name in "ab"[: 1 + number % 2]:
            Image.new("RGB", (8, 8)).save(folder / f"{name}.png")


@pytest.mark.parametrize("split", ["val", "2021_valid", "order/val", "genus/2021_valid"])
def test_labels_of_inaturalist_are_known_before_an_image_is_read(split: str, tmp_path: Path) -> None:
    write_inaturalist(tmp_path)
    opened = create_dataset("torch/inaturalist", root=str(tmp_path), split=split)
    expected = []
    for image, label in map(opened.__getitem__, range(4)):
        image.close()
        expected.append(label)
    for image in tmp_path.rglob("*.png"):
        image.write_bytes(b"broken")
    source = open_split(open_dataset("torch/inat", num_classes=3, root=tmp_path), split)
    assert source.labels.tolist() == expected


def test_several_labels_an_image_are_refused(tmp_path: Path) -> None:
    write_inaturalist(tmp_path)
    with pytest.raises(DataError, match=r"has the label .* vitfront needs one class index for each image"):
        open_split(open_dataset("torch/inat", num_classes=3, root=tmp_path), "order_genus/val")


@pytest.mark.parametrize("name", [*SPLITS])
def test_every_torchvision_data_set_of_ours_is_one_of_timms(name: str, tmp_path: Path) -> None:
    with pytest.raises(Exception) as error:  # noqa: PT011  # whatever torchvision says where nothing is
        create_dataset(f"torch/{name}", root=str(tmp_path), split=torchvision_split(name, "train"))
    assert not isinstance(error.value, AssertionError)  # timm's answer to a name that it does not know


@pytest.mark.parametrize(
    ("name", "split", "own"),
    [
        ("cifar10", "training", "train"),
        ("cifar10", "validation", "test"),
        ("mnist", "eval", "test"),
        ("imagenet", "valid", "val"),
        ("imagenet", "training", "train"),
        ("places365", "train", "train-standard"),
        ("places365", "train-challenge", "train-challenge"),
        ("inat", "val", "2021_valid"),
        ("inaturalist", "2019", "2019"),
        ("inaturalist", "kingdom/train", "kingdom/2021_train"),
    ],
)
def test_names_of_splits_that_are_in_use_are_understood(name: str, split: str, own: str) -> None:
    assert torchvision_split(name, split) == own


@pytest.mark.parametrize(
    ("name", "split", "there"),
    [
        ("cifar10", "nosuch", "train, test"),
        ("cifar10", "Train", "train, test"),
        ("cifar10", "train/val", "train, test"),
        ("imagenet", "test", "train, val"),
        ("places365", "test", "train-standard, train-challenge, val"),
        ("inat", "2020", "2021_train, 2021_valid, 2017, 2018, 2019, 2021_train_mini"),
    ],
)
def test_a_split_that_is_not_there_lists_those_that_are(name: str, split: str, there: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"torch/{name} has no split '{split}'; it has {there}$"):
        open_split(open_dataset(f"torch/{name}", num_classes=10, root=tmp_path), split)


def test_a_data_set_that_timm_does_not_know_lists_those_that_it_does(tmp_path: Path) -> None:
    dataset = open_dataset("torch/svhn", num_classes=10, root=tmp_path)
    with pytest.raises(
        DataError, match="timm has no data set 'torch/svhn'; it has torch/image_folder, torch/cifar10, "
    ):
        open_split(dataset, "train")


def test_a_data_set_that_is_not_there_says_how_to_fetch_it(tmp_path: Path) -> None:
    dataset = open_dataset("torch/cifar10", num_classes=10, root=tmp_path)
    with pytest.raises(
        DataError, match=r"cannot open torch/cifar10 test in .*: Dataset not found .*; data\.download=true fetches it$"
    ):
        open_split(dataset, "val")
    with pytest.raises(DataError, match=r"cannot open torch/imagenet val in .*: [^;]*$"):
        open_split(open_dataset("torch/imagenet", num_classes=1000, root=tmp_path), "val")
    with pytest.raises(DataError, match=r"'torch/cifar10' needs data\.root"):
        open_split(open_dataset("torch/cifar10", num_classes=10), "val")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the library datasets is installed")
def test_hugging_faces_library_is_asked_for_where_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data set 'hfds/beans' needs the library datasets; .*: pip install datasets$"):
        open_split(open_dataset("hfds/beans", num_classes=3), "train")


class Reader:
    """Stands for timm's reader of a Hugging Face data set."""

    def __init__(self, labels: list[Any], names: tuple[str, ...] = ()) -> None:
        self.labels = labels
        self.class_to_idx = {name: index for index, name in enumerate(names)}

    def iter_targets(self) -> Iterator[Any]:
        return iter(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[BinaryIO, Any]:
        return io.BytesIO(b"image %d" % index), self.labels[index]


def test_a_hugging_face_data_set_gives_its_labels_and_names() -> None:
    source = read_hugging_face(Reader([2, 0, 1], ("cat", "dog", "emu")), "hfds/x train", None, 3)
    assert source.labels.tolist() == [2, 0, 1] and source.class_names == ("cat", "dog", "emu")
    image = source.open(1)
    assert not isinstance(image, Image.Image) and image.read() == b"image 1"
    assert source.name_of(1) == "image 1 of hfds/x train"


def test_a_class_map_orders_the_names_of_a_hugging_face_data_set() -> None:
    reader = Reader([2, 0, 1], ("cat", "dog", "emu"))
    mapped = Classes(names=("emu", "cat", "bee", "dog"), origin="the class map")
    source = read_hugging_face(reader, "hfds/x train", mapped, 4)
    assert source.labels.tolist() == [0, 1, 3] and source.class_names == mapped.names
    with pytest.raises(DataError, match="2 of 3 classes of hfds/x train are no class of the class map: dog, emu"):
        read_hugging_face(reader, "hfds/x train", Classes(names=("cat", "bee"), origin="the class map"), 2)
    with pytest.raises(DataError, match=r"has no class names that a class map could order; leave data\.class_map out"):
        read_hugging_face(Reader([0, 1]), "hfds/x train", mapped, 4)


@pytest.mark.parametrize(
    ("labels", "names", "says"),
    [
        ([0, 1], ("cat", "dog"), "hfds/x val has 2 classes, but the model has 3 classes"),
        ([0, 3], (), "hfds/x val has class index 3, but the model has 3 classes"),
        ([0, -1], ("a", "b", "c"), "hfds/x val has the label -1, as splits without labels have"),
        ([0, [1, 2]], ("a", "b", "c"), r"hfds/x val has the label \[1, 2\]; vitfront needs one class index"),
        ([0, 1.5], (), r"hfds/x val has the label 1\.5; vitfront needs"),
        ([None], (), "hfds/x val has the label None"),
        (["cat"], (), "hfds/x val has the label cat"),
        ([np.array([1, 0])], (), "hfds/x val has the label"),
        ([], ("a", "b", "c"), "hfds/x val has no image"),
    ],
)
def test_labels_that_are_no_class_of_the_model_are_refused(
    labels: list[Any], names: tuple[str, ...], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        read_hugging_face(Reader(labels, names), "hfds/x val", None, 3)


def test_labels_may_be_whole_numbers_of_any_library() -> None:
    labels: list[Any] = [np.int64(2), True, np.uint8(0)]
    assert read_hugging_face(Reader(labels), "hfds/x val", None, 3).labels.tolist() == [2, 1, 0]
