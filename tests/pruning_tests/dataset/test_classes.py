"""The order of the classes, and the label of each image, against timm and torchvision."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm.utils
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from pruning.dataset.splits import Dataset, open_dataset, open_split
from pruning.errors import DataError
from tests.pruning_tests.dataset.trees import touch

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
PLAIN = ("ant", "bee", "cat", "dog", "emu", "fox", "gnu", "hen")
NAMES = (
    *PLAIN, "1", "2", "10", "007", "7", "01", "a2", "a10", "Cat", "CAT", "Dog", "Zebra", "sea lion", "sea_lion",
    "sea-lion", "C#", "+1", "[x]", "100%", "5²", "日本", NFC, NFD, f"{NFC}clair", f"{NFD}clair", "Über", "a.b", "x.jpg",
)  # fmt: skip
HIDDEN = (".cache", ".ipynb_checkpoints", ".git")
IMAGES = (".jpg", ".PNG", ".webp", ".tif")
OTHERS = (".txt", ".npy", "")


def labels_of(dataset: Dataset, split: str, root: Path) -> dict[str, int]:
    source = open_split(dataset, split)
    names = [Path(source.name_of(index)).relative_to(root / split).as_posix() for index in range(len(source.labels))]
    labels: list[int] = source.labels.tolist()
    assert len(set(names)) == len(labels)
    return dict(zip(names, labels, strict=True))


def is_image(path: str) -> bool:
    return Path(path).suffix.lower() in {extension.lower() for extension in IMAGES}


class Reference(ImageFolder):
    """torchvision's folders with the classes in a given order; hidden files and folders skipped."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.names = [*names]
        self.place = folder

        def is_valid(path: str) -> bool:
            parts = Path(path).relative_to(folder).parts
            return is_image(path) and not any(part.startswith(".") for part in parts)

        super().__init__(str(folder), is_valid_file=is_valid, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Gives each folder the index of its name, in whichever Unicode form."""
        index = {unicodedata.normalize("NFC", name): place for place, name in enumerate(self.names)}
        there = [entry.name for entry in Path(directory).iterdir() if unicodedata.normalize("NFC", entry.name) in index]
        return self.names, {name: index[unicodedata.normalize("NFC", name)] for name in there}

    def labels(self) -> dict[str, int]:
        return {Path(path).relative_to(self.place).as_posix(): label for path, label in self.samples}


@dataclass
class Tree:
    """A random data set: the visible images of each split, and the settings to read it with."""

    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def random_tree(draw: random.Random, root: Path) -> Tree:
    """Makes a tree of empty files; one in four is of plain names, flat and whole."""
    plain = draw.random() < 0.25
    names = draw.sample(PLAIN if plain else NAMES, draw.randint(1, 6))
    tree = Tree(folders=names)
    for split in ("train", "val"):
        files = []
        for name in names:
            count = draw.randint(1, 3) if plain or draw.random() < 0.95 else 0
            (root / split / name).mkdir(parents=True, exist_ok=True)
            inner = draw.choice(NAMES) + "/" if not plain and draw.random() < 0.07 else ""
            files += [f"{name}/{inner}{draw.randrange(100)}{index}{draw.choice(IMAGES)}" for index in range(count)]
            if split == "val" and draw.random() < 0.2:
                files = [file for file in files if not file.startswith(f"{name}/")]
        setattr(tree, split, files)
        extra = [f"{draw.choice(names)}/other{draw.choice(OTHERS)}" for _ in range(draw.randrange(3))]
        extra += [f"{draw.choice([*HIDDEN, *names])}/.hidden/1.jpg" for _ in range(draw.randrange(2))]
        extra += [f"{draw.choice(names)}/._{index}.jpg" for index in range(draw.randrange(2))]
        extra += [f"{draw.choice(HIDDEN)}/1.jpg" for _ in range(draw.randrange(2))]
        touch(root / split, [*files, *extra])
    if draw.random() < 0.1:
        tree.val.append(f"stranger/1{draw.choice(IMAGES)}")
        touch(root / "val", tree.val[-1:])
    number = len(names) if draw.random() < 0.8 else draw.randint(1, 8)
    tree.settings = {"root": root, "num_classes": number}
    kind = draw.choice(["map", "timm", "torchvision", None])
    if kind == "map":
        mapped = [unicodedata.normalize(draw.choice(["NFC", "NFD"]), name) for name in names]
        mapped += [f"absent{index}" for index in range(draw.randrange(3))]
        draw.shuffle(mapped)
        bom, line_end = draw.choice(["", "\ufeff"]), draw.choice(["\n", "\r\n"])
        (root / "map").write_bytes((bom + line_end.join(mapped)).encode())
        tree.settings |= {"class_map": root / "map", "num_classes": len(mapped) if draw.random() < 0.8 else number}
        tree.folders = mapped
    else:
        tree.settings["class_order"] = kind
    return tree


def expected(tree: Tree, split: str, root: Path) -> list[dict[str, int]]:
    """Gives the labels by each order that the settings leave open; timm may have none for some."""
    if "class_map" in tree.settings:
        return [Reference(root / split, tree.folders).labels()]
    orders = [tree.settings["class_order"]] if tree.settings["class_order"] else ["timm", "torchvision"]
    labels = []
    for order in orders:
        if order == "torchvision":
            labels.append(Reference(root / split, sorted(tree.folders)).labels())
        else:  # not by torchvision, which knows no innermost folders
            names = sorted({path.split("/")[-2] for path in tree.train}, key=natural_key)
            inner = {path: path.split("/")[-2] for path in getattr(tree, split)}
            labels.append({path: names.index(name) for path, name in inner.items() if name in names})
    return labels


def natural_key(name: str) -> Any:
    return timm.utils.natural_key(name.replace("²", "b"))  # timm's fails on it; `b` stands for it at the same place


def is_clear(tree: Tree) -> bool:
    """Tells whether a data set leaves no doubt, so that it must not be refused."""
    names = [unicodedata.normalize("NFC", name) for name in tree.folders]
    known = {path.split("/")[0] for path in tree.val} <= {*tree.folders}
    flat = all(path.count("/") == 1 for path in (*tree.train, *tree.val))
    if (
        len({*names}) < len(names)
        or len(names) != tree.settings["num_classes"]
        or not known
        or not flat
        or not tree.val
    ):
        return False
    if "class_map" in tree.settings:
        return bool(tree.train)
    keys = [str(natural_key(name)) for name in tree.folders]
    by_timm, by_text = sorted(tree.folders, key=natural_key), sorted(tree.folders)
    whole = {path.split("/")[0] for path in tree.train} == {*tree.folders}
    order = tree.settings["class_order"]
    return whole and (order == "torchvision" or len({*keys}) == len(keys)) and (order is not None or by_timm == by_text)


@pytest.mark.parametrize("part", range(4))
def test_labels_of_random_folders_are_those_of_torchvision_and_timm_or_refused(part: int, tmp_path: Path) -> None:
    draw = random.Random(part)
    read = {"map": 0, "timm": 0, "torchvision": 0, None: 0}
    for number in range(100):
        root = tmp_path / str(number)
        tree = random_tree(draw, root)
        try:
            dataset = open_dataset("folder", **tree.settings)
            given = {split: labels_of(dataset, split, root) for split in ("train", "val")}
        except DataError:
            assert not is_clear(tree), (number, tree)
            continue
        for split, labels in given.items():
            assert {*labels} == {*getattr(tree, split)}
            for reference in expected(tree, split, root):
                assert reference.items() <= labels.items(), (number, split, tree)
        read["map" if "class_map" in tree.settings else tree.settings["class_order"]] += 1
    assert all(count >= 5 for count in read.values()), read


@pytest.mark.parametrize("seed", range(20))
def test_timms_order_gives_the_labels_of_timms_own_reader(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    names = draw.sample(
        [name for name in NAMES if name not in ("5²", "7", "01", "Cat", "CAT", "Dog", NFD, f"{NFD}clair")], 6
    )
    nested = draw.choice(["", "", f"{draw.choice(PLAIN)}/"])
    files = [f"{name}/{draw.choice(['', nested])}{index}.jpg" for name in names for index in range(4)]
    touch(tmp_path / "train", files)
    reader = create_dataset("", root=str(tmp_path / "train"), search_split=False).reader
    classes = len({path.split("/")[-2] for path in files})
    dataset = open_dataset("folder", root=tmp_path, num_classes=classes, class_order="timm")
    names_of = [reader.filename(index) for index in range(len(reader))]
    labels = labels_of(dataset, "train", tmp_path)
    assert labels == {name: label for name, (_, label) in zip(names_of, reader.samples, strict=True)}
    assert [*labels] == names_of  # in the same order, so the same images are drawn


def opened(root: Path, files: Sequence[str], num_classes: int = 3, **settings: Any) -> Dataset:
    touch(root / "train", files)
    return open_dataset("folder", root=root, num_classes=num_classes, **settings)


def refusal(root: Path, files: Sequence[str], num_classes: int = 3, **settings: Any) -> str:
    with pytest.raises(DataError) as error:
        opened(root, files, num_classes, **settings)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(root / "train"), "TRAIN")


def test_orders_that_differ_are_asked_for_and_shown(tmp_path: Path) -> None:
    files = [f"{name}/1.jpg" for name in ("1", "2", "10")]
    assert refusal(tmp_path, files) == (
        "from class 1 on, timm sorts the folders in TRAIN as 2, 10, torchvision as 10, 2; say which one the model was "
        "trained with, data.class_order=timm or data.class_order=torchvision, or give data.class_map"
    )
    for order, names in (("timm", ("1", "2", "10")), ("torchvision", ("1", "10", "2"))):
        dataset = opened(tmp_path, files, class_order=order)
        assert dataset.classes is not None and dataset.classes.names == names
        assert open_split(dataset, "train").class_names == names


def test_folders_in_class_folders_are_asked_for(tmp_path: Path) -> None:
    files = ["cat/persian/1.jpg", "cat/siam/1.jpg", "dog/1.jpg"]
    says = refusal(tmp_path, files)
    assert "cat/persian/1.jpg is of class 'persian' to timm (of 3), 'cat' to torchvision (of 2); say which" in says
    assert labels_of(opened(tmp_path, files, class_order="timm"), "train", tmp_path) == dict(
        zip(files, (1, 2, 0), strict=True)
    )
    assert labels_of(opened(tmp_path, files, 2, class_order="torchvision"), "train", tmp_path) == dict(
        zip(files, (0, 0, 1), strict=True)
    )


@pytest.mark.parametrize("pair", [("Cat", "cat"), ("1", "01"), ("A1", "a01")])
def test_names_that_are_equal_to_timm_have_no_order_of_timms(pair: tuple[str, str], tmp_path: Path) -> None:
    files = [f"{name}/1.jpg" for name in (*pair, "zoo")]
    for settings in ({}, {"class_order": "timm"}):
        says = refusal(tmp_path, files, **settings)
        assert "timm's order leaves folders" in says and "data.class_map" in says
    dataset = opened(tmp_path, files, class_order="torchvision")
    assert dataset.classes is not None and dataset.classes.names == tuple(sorted((*pair, "zoo")))


def test_another_number_of_folders_than_classes_is_refused_with_both(tmp_path: Path) -> None:
    files = ["a/1.jpg", "b/1.jpg", "c/.ipynb_checkpoints/1.jpg", ".cache/1.jpg", "c/1.jpg"]
    assert (
        "TRAIN has 3 class folders (hidden ones left out: .cache), but the model has 4 classes; give data."
        in refusal(tmp_path, files, 4)
    )
    for order in ("timm", "torchvision"):
        assert "has 3 class folders" in refusal(tmp_path, files, 2, class_order=order)
    assert "the class map has 2 classes, but the model has 3 classes" in refusal(
        tmp_path, files, class_map={"a": 0, "b": 1}
    )


def test_a_class_folder_without_images_is_refused_unless_there_is_a_class_map(tmp_path: Path) -> None:
    files = ["a/1.jpg", "b/1.npy", "b/2.npy", "b/x.txt", "c/.hidden.jpg"]
    for order in (None, "timm", "torchvision"):
        says = refusal(tmp_path, files, class_order=order)
        assert "class folders without an image in TRAIN: b, c (they hold 2 .npy, 1 .txt); add images" in says
    mapped = opened(tmp_path, files, class_map={"c": 0, "b": 1, "a": 2})
    assert open_split(mapped, "train").labels.tolist() == [2]


def test_names_match_in_either_unicode_form_and_two_forms_of_one_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "val", [f"{NFC}/1.jpg"])
    dataset = opened(tmp_path, [f"{NFD}/1.jpg", "a/1.jpg"], 2)
    assert labels_of(dataset, "val", tmp_path) == {f"{NFC}/1.jpg": 1}
    mapped = open_dataset("folder", root=tmp_path, num_classes=2, class_map={NFC: 0, "a": 1})
    assert labels_of(mapped, "train", tmp_path) == {f"{NFD}/1.jpg": 0, "a/1.jpg": 1}
    touch(tmp_path / "train", [f"{NFC}/2.jpg"])
    with pytest.raises(DataError, match=r"two class folders in .* have the same name 'é'"):
        open_split(mapped, "train")
    assert "have the same name 'é'" in refusal(tmp_path, [], class_order="torchvision")


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    says = refusal(tmp_path, ["caf\udce9/1.jpg", "a/1.jpg"], 2)
    assert says == r"the name of class folder 'caf\udce9' in TRAIN is not UTF-8; rename it"


def test_a_class_map_takes_the_outermost_folder_and_says_where_the_innermost_is_meant(tmp_path: Path) -> None:
    files = ["cat/images/1.jpg", "dog/images/1.jpg"]
    mapped = opened(tmp_path, files, 2, class_map={"dog": 0, "cat": 1})
    assert labels_of(mapped, "train", tmp_path) == {"cat/images/1.jpg": 1, "dog/images/1.jpg": 0}
    inner = touch(tmp_path / "inner", ["a/cat/1.jpg", "b/dog/1.jpg"]).name
    with pytest.raises(DataError, match=r"2 of 2 folders .*: a, b; data\.class_order=timm takes the innermost folder"):
        open_split(mapped, inner)
    by_timm = open_dataset("folder", root=tmp_path, num_classes=2, class_map={"dog": 0, "cat": 1}, class_order="timm")
    assert labels_of(by_timm, inner, tmp_path) == {"a/cat/1.jpg": 1, "b/dog/1.jpg": 0}
    both = touch(tmp_path / "both", ["cat/dog/1.jpg"]).name
    with pytest.raises(DataError, match=r"may be of class 'dog', as timm takes it, or 'cat', as torchvision does"):
        open_split(mapped, both)


def test_folders_of_no_class_name_where_the_classes_come_from(tmp_path: Path) -> None:
    touch(tmp_path / "val", ["a/1.jpg", "cow/1.jpg", "ewe/1.jpg"])
    dataset = opened(tmp_path, ["a/1.jpg", "b/1.jpg"], 2)
    with pytest.raises(
        DataError, match=r"2 of 3 folders in .*val are no class of .*train: cow, ewe; the classes are a, b$"
    ):
        open_split(dataset, "val")
    with pytest.raises(
        DataError, match=r"2 of 3 folders in .*val are no class of the class map: cow, ewe; the classes are a, b$"
    ):
        open_split(open_dataset("folder", root=tmp_path, num_classes=2, class_map={"a": 0, "b": 1}), "val")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("bee /1.jpg", r"no class of .*: 'bee '; 'bee ' is not 'bee': write both alike"),
        ("Bee/1.jpg", r"no class of .*: Bee; 'Bee' is not 'bee': write both alike"),
        ("other/notes.txt", r"no class of .*: other; no image is in them, so remove them"),
    ],
    ids=["blank at its end", "another case", "no image"],
)
def test_a_folder_of_no_class_says_what_to_do(file: str, says: str, tmp_path: Path) -> None:
    touch(tmp_path / "val", ["ant/1.jpg", file])
    dataset = opened(tmp_path, ["ant/1.jpg", "bee/1.jpg"], 2)
    with pytest.raises(DataError, match=rf"1 of 2 folders in .*{says}$"):
        open_split(dataset, "val")


def test_of_many_unknown_class_folders_the_first_five_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "val", [f"n{index}/1.jpg" for index in range(7)])
    with pytest.raises(DataError, match=r"7 of 7 .* n0, n1, n2, n3, n4, \.\.\.; the classes are cat$"):
        open_split(open_dataset("folder", root=tmp_path, num_classes=1, class_map={"cat": 0}), "val")


def test_images_outside_a_class_folder_are_no_classes(tmp_path: Path) -> None:
    says = refusal(tmp_path, ["a/1.jpg", "stray.png", "b/1.jpg", "c/1.jpg", "notes.txt"])
    assert "1 images lie outside a class folder in TRAIN: stray.png; it must hold one folder of images a class" in says


def test_a_split_without_images_says_what_it_holds(tmp_path: Path) -> None:
    assert "no image in TRAIN, it holds 1 .npy; it must" in refusal(tmp_path, ["a/1.npy"])
    touch(tmp_path / "val", ["a/.1.jpg"])
    with pytest.raises(DataError, match=r"no image in .*val, it holds no file; it must hold one folder"):
        open_split(opened(tmp_path, ["a/1.jpg"], 1), "val")
