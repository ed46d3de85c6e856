"""The small ViT of cifar10-mini keeps its accuracy on the same 300 images however their folders look, or is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm.utils
import torch
from PIL import Image
from torch import Tensor

from pruning.data import InputSpec, balanced_subset
from pruning.dataset.splits import open_dataset, open_split
from pruning.errors import DataError
from pruning.measure.accuracy import predict, top1
from pruning.model.loading import create_model
from pruning.model.weights import load_checkpoint
from search.trial.inputs import LoadedSplits, load_splits
from tests.search_tests import tiny

DATA = Path(__file__).parents[4] / "shared" / "data" / "cifar10-mini"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RIGHT = 243 / 300
"""Top-1 accuracy of the ViT on the 300 images of val that are drawn, not cropped."""

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: it is no part of the project")


@dataclass(frozen=True)
class Reference:
    """The ViT's answers to the 300 images of val that a sweep draws."""

    spec: InputSpec
    files: tuple[Path, ...]
    """The images of val that are drawn."""
    train: tuple[Path, ...]
    """Some images of train, two a class."""
    logits: dict[str, Tensor]
    """The model's logits of each image, by a hash of its pixels."""

    def accuracy(self, loaded: LoadedSplits) -> float:
        """Gives the top-1 accuracy of the ViT, with the labels that were read."""
        val = loaded.splits.val
        assert len(val) == len(self.files)
        return top1(torch.stack([self.logits[pixel_hash(pixels)] for pixels in val.pixels]), val.labels)


def pixel_hash(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def reference() -> Reference:
    about = json.loads((DATA / "vit_cifar10.json").read_text())
    spec = InputSpec(size=(32, 32), mean=tuple(about["mean"]), std=tuple(about["std"]), crop_pct=1.0)
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    model = create_model(about["model"], args={name: about[name] for name in names})
    load_checkpoint(model, DATA / "vit_cifar10.safetensors")
    val = load(DATA, spec).splits.val
    source = open_split(open_dataset("folder", root=DATA, num_classes=10), "val")
    drawn = balanced_subset(source.labels, 300, seed=0).tolist()
    hashes = map(pixel_hash, val.pixels)
    return Reference(
        spec=spec,
        files=tuple(Path(source.name_of(index)) for index in drawn),
        train=tuple(file for name in CLASSES for file in sorted((DATA / "train" / name).iterdir())[:2]),
        logits=dict(zip(hashes, predict(model, val), strict=True)),
    )


def load(root: Path, spec: InputSpec, **data: Any) -> LoadedSplits:
    keys = {"root": str(root), "calibration_images": 8, "probe_images": 8, "val_images": 300} | data
    return load_splits(tiny.config(data=keys), spec, 10)


def write(reference: Reference, root: Path, names: Sequence[str] = CLASSES) -> Path:
    """Writes the images as links, class for class into folders of other names."""
    for split, files in (("train", reference.train), ("val", reference.files)):
        for file in files:
            folder = root / split / names[CLASSES.index(file.parent.name)]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file.name).symlink_to(file)
    return root


def test_accuracy_is_right_on_the_folders_as_they_are(reference: Reference, tmp_path: Path) -> None:
    assert len(reference.files) == len(reference.logits) == 300
    assert reference.accuracy(load(DATA, reference.spec)) == RIGHT
    assert reference.accuracy(load(write(reference, tmp_path), reference.spec)) == RIGHT


NUMBERS = tuple(str(number) for number in range(1, 11))
CASES = ("Zoo", "ant", "Bee", "cat", "Dog", "emu", "Fox", "gnu", "Hen", "ibex")
SYMBOLS = ("a_b", "A-b", "aC", "a b", "a.b", "a+b", "a9", "a10", "b", "É")


@pytest.mark.parametrize("names", [NUMBERS, CASES, SYMBOLS], ids=["numbers", "cases", "symbols"])
@pytest.mark.parametrize("order", ["timm", "torchvision"])
def test_renamed_folders_are_right_by_order_or_class_map_and_else_refused(
    names: tuple[str, ...], order: str, reference: Reference, tmp_path: Path
) -> None:
    in_order = sorted(names, key=timm.utils.natural_key) if order == "timm" else sorted(names)
    root = write(reference, tmp_path, in_order)
    with pytest.raises(DataError, match=r"timm sorts .*, torchvision as .*data\.class_order=timm .*data\.class_map"):
        load(root, reference.spec)
    class_map = tmp_path / "map.txt"
    class_map.write_text("\n".join(in_order))
    for settings in ({"class_order": order}, {"class_map": str(class_map)}):
        loaded = load(root, reference.spec, **settings)
        assert loaded.class_names == tuple(in_order)
        assert reference.accuracy(loaded) == RIGHT


def test_torchvisions_folders_are_right_in_torchvisions_order_or_by_class_map(
    reference: Reference, tmp_path: Path
) -> None:
    root = write(reference, tmp_path, sorted(NUMBERS))
    assert reference.accuracy(load(root, reference.spec, dataset="torch/image_folder")) == RIGHT
    renamed = write(reference, tmp_path / "renamed", NUMBERS)
    (tmp_path / "map.txt").write_text("\ufeff" + "\r\n".join(NUMBERS) + "\r\n", newline="")
    settings = {"dataset": "torch/image_folder", "class_map": str(tmp_path / "map.txt")}
    assert reference.accuracy(load(renamed, reference.spec, **settings)) == RIGHT


def test_a_missing_class_is_refused_in_train_and_leaves_the_labels_of_val(reference: Reference, tmp_path: Path) -> None:
    root = write(reference, tmp_path)
    (root / "val" / "cat").rename(tmp_path / "cat")
    for dataset in ("folder", "torch/image_folder"):
        val = load(root, reference.spec, dataset=dataset).splits.val
        assert (val.labels.bincount(minlength=10) == 30).tolist() == [name != "cat" for name in CLASSES]
    (root / "train" / "bird").rename(root / "train" / ".bird")
    with pytest.raises(
        DataError, match=r"train has 9 class folders \(hidden ones left out: \.bird\), but the model has 10"
    ):
        load(root, reference.spec)
    (tmp_path / "map.txt").write_text("\n".join(CLASSES))
    (tmp_path / "cat").rename(root / "val" / "cat")
    assert reference.accuracy(load(root, reference.spec, class_map=str(tmp_path / "map.txt"))) == RIGHT


def test_hidden_folders_and_files_change_nothing(reference: Reference, tmp_path: Path) -> None:
    root = write(reference, tmp_path)
    for split in ("train", "val"):
        for place in (".cache/1.jpg", "cat/.ipynb_checkpoints/1.jpg", "cat/._1.jpg", ".1.jpg"):
            (root / split / place).parent.mkdir(exist_ok=True)
            (root / split / place).symlink_to(reference.files[0])
    loaded = load(root, reference.spec)
    assert reference.accuracy(loaded) == RIGHT and loaded.notes == ()


@pytest.mark.parametrize("extension", [".webp", ".bmp", ".TIF", ".ppm", ".png", ".gif", ".avif", ".jfif"])
def test_half_of_each_class_in_another_format_is_read_as_well(
    extension: str, reference: Reference, tmp_path: Path
) -> None:
    root = write(reference, tmp_path)
    for file in sorted((root / "val").glob("*/*"))[::2]:
        with Image.open(file) as image:
            image.save(file.with_suffix(extension), **({"lossless": True} if extension == ".webp" else {}))
        file.unlink()
    loaded = load(root, reference.spec)
    assert loaded.splits.val.labels.bincount().tolist() == [30] * 10
    if extension not in (".gif", ".avif", ".jfif"):  # which change pixels
        assert reference.accuracy(loaded) == RIGHT


def test_files_that_are_skipped_are_told_for_each_split(reference: Reference, tmp_path: Path) -> None:
    root = write(reference, tmp_path)
    for split in ("train", "val"):
        (root / split / "cat" / "1.npy").touch()
    loaded = load(root, reference.spec, val_images=20, confirm_images=40)
    assert loaded.notes == (
        "skipped 1 file of train, no images to PIL: 1 .npy (cat/1.npy)",
        "skipped 1 file of val, no images to PIL: 1 .npy (cat/1.npy)",
    )


def test_a_test_split_that_is_val_is_refused_before_an_image_is_read(reference: Reference, tmp_path: Path) -> None:
    root = write(reference, tmp_path)
    for file in root.glob("val/*/*"):
        file.unlink()
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"data\.val=val and data\.test=val are the same images; leave data\.test out"):
        load(root, reference.spec, test="val")
