"""Loads images as tensors in memory: timm's data sets and transforms, or scikit-learn's digits.

Images are kept as uint8, as they leave the transforms, and normalised batch by batch: a split of 50,000 at
224 x 224 takes 7.5 GB that way instead of 30. Only images that will be used are decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruning.device_sharing import yielding_between
from pruning.errors import DataError, first_line_of


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images with their labels: one split of a data set, or a part of it."""

    pixels: Tensor
    """(B, channels, height, width), uint8."""
    labels: Tensor
    """(B,), int64, class indices."""
    mean: tuple[float, ...]
    """Mean of each channel, in [0, 1]; subtracted when the images are normalised."""
    std: tuple[float, ...]
    """Standard deviation of each channel, which the images are divided by."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | slice) -> Images:
        """Some of the images, in this order: a view of the pixels for a slice, a copy for indices."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """Yields normalised images (b, channels, height, width) float32 and labels (b,), in order, on the device."""
        for start in yielding_between(range(0, len(self), size)):
            yield self.normalized(slice(start, start + size), device), self.labels[start : start + size].to(device)

    def normalized(self, indices: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        """Some of the images as the model takes them: (x / 255 - mean) / std."""
        mean = torch.tensor(self.mean, device=device)[:, None, None] * 255
        std = torch.tensor(self.std, device=device)[:, None, None] * 255
        return (self.pixels[indices].to(device).float() - mean) / std


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The images of a sweep; the training images are stored once, calibration and probe are views of them."""

    training: Images
    """All training images: first those for calibration, then those to probe."""
    num_calibration: int
    """Training images for calibration, at least 1; the others, at least 1, are to probe."""
    every: int = 1
    """Calibration and probe hold one image in so many; all of them where there are fewer."""
    val: Images
    """Images whose accuracy the search sees."""
    test: Images | None
    """Images that are touched once, for the final front."""
    confirm: Images | None = None
    """More of the val split, to confirm the final front on."""

    def __post_init__(self) -> None:
        assert 0 < self.num_calibration < len(self.training)

    @property
    def calibration(self) -> Images:
        """The training images that scores and moments are taken on; no pixel is copied."""
        return _thinned(self.training.take(slice(0, self.num_calibration)), self.every)

    @property
    def probe(self) -> Images:
        """The training images on which a pruning step's cost is measured; no pixel is copied."""
        return _thinned(self.training.take(slice(self.num_calibration, None)), self.every)

    def thinned(self, every: int) -> Splits:
        """The splits with one in `every` images of calibration, probe and val; `training` keeps all."""
        return replace(self, every=every, val=_thinned(self.val, every))


def _thinned(images: Images, every: int) -> Images:
    return images.take(slice(None, None, every)) if len(images) >= every else images


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The model's input format: size, normalisation and resizing."""

    size: tuple[int, int]
    """Height and width, in pixels."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    """The centre crop's share of the resized image, in (0, 1]."""

    @property
    def mode(self) -> str:
        return "L" if len(self.mean) == 1 else "RGB"


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
    source = _open(dataset, split, root, class_map, spec.mode, download)
    labels = _labels(source)
    highest = int(labels.max())
    if highest >= num_classes:
        raise DataError(
            f"{_location(dataset, root, split)} has class index {highest}, but the model has {num_classes} classes; "
            "give the class map the model was trained with (data.class_map) or the right number of classes"
        )
    chosen = torch.arange(len(labels)) if limit is None else balanced_subset(labels, limit, seed)
    return Images(pixels=_decode(source, chosen.tolist(), spec), labels=labels[chosen], mean=spec.mean, std=spec.std)


def balanced_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draws `count` images (or all, if fewer), shuffled, every class as often as possible. Labels (B,) -> (count,)."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    place_in_class = torch.zeros(len(labels), dtype=torch.long)
    for label in labels.unique():
        members = (labels[shuffled] == label).nonzero().flatten()
        place_in_class[members] = torch.arange(len(members))
    # Every class's first image, then every class's second, ...: a stable sort keeps each round shuffled.
    return shuffled[place_in_class.sort(stable=True).indices][:count]


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


def folder_classes(root: str | Path, split: str) -> dict[str, int]:
    """Numbers the class folders of a split in timm's order, where there is no class map: class name -> index."""
    from timm.data.readers.reader_image_folder import find_images_and_targets

    folder = _split_folder(root, split)
    classes: dict[str, int] = find_images_and_targets(str(folder))[1]
    if not classes or "" in classes:  # timm takes images that lie outside any class folder as a class
        problem = "images lie outside a class folder" if classes else "no image"
        raise DataError(f"{problem} in {folder}; it must hold one folder of images a class")
    return classes


def _split_folder(root: str | Path | None, split: str) -> Path:
    if root is None:
        raise DataError("data set 'folder' needs data.root, the folder that holds the splits")
    folder = Path(root) / split
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; data.root must hold a folder {split!r} with one folder a class")
    return folder


def _open(
    dataset: str,
    split: str,
    root: str | Path | None,
    class_map: str | Path | dict[str, int] | None,
    mode: str,
    download: bool,
) -> Any:
    """Opens timm's data set after a check of its folders: timm skips class folders it does not know in silence."""
    from timm.data import create_dataset

    place = _location(dataset, root, split)
    name, folder = dataset, root
    if dataset == "folder":
        folder = _split_folder(root, split)
        name = ""
        if class_map is not None:
            class_map = _checked_class_map(class_map, folder)
    elif "/" not in dataset:
        raise DataError(f"no data set {dataset!r}; give folder, digits, torch/<name>, hfds/<name>, ...")
    try:
        return create_dataset(
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


def _checked_class_map(class_map: str | Path | dict[str, int], folder: Path) -> dict[str, int]:
    from timm.data.readers.class_map import load_class_map

    if not isinstance(class_map, dict) and not Path(class_map).is_file():
        raise DataError(f"no class map {class_map}; give a text file with one class a line")
    try:
        classes: dict[str, int] = class_map if isinstance(class_map, dict) else load_class_map(str(class_map))
    except Exception as error:  # not UTF-8, another extension than .txt, ...
        raise DataError(f"cannot read class map {class_map}: {first_line_of(error)}") from error
    names = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    unknown = [name for name in names if name not in classes]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise DataError(f"{len(unknown)} of {len(names)} folders in {folder} are no class of the class map: {shown}")
    return classes


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


def _decode(source: Any, indices: Sequence[int], spec: InputSpec) -> Tensor:
    from PIL import Image
    from timm.data import create_transform

    transform = create_transform(
        spec.size, is_training=False, normalize=False, interpolation=spec.interpolation, crop_pct=spec.crop_pct
    )
    reader = getattr(source, "reader", None)

    def decode(index: int) -> Tensor:
        # Past timm's own __getitem__, which replaces an image that it cannot read by its neighbour.
        try:
            image = source[index][0] if reader is None else reader[index][0]
            if isinstance(image, Image.Image):
                return transform(image.convert(spec.mode))
            with image, Image.open(image) as opened:  # a file
                return transform(opened.convert(spec.mode))
        except (OSError, ValueError, SyntaxError) as error:
            name = f"image {index}" if reader is None else reader.filename(index, absolute=True)
            raise DataError(f"cannot read {name}: {first_line_of(error)}") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.stack(list(pool.map(decode, indices)))


def _location(dataset: str, root: str | Path | None, split: str) -> str:
    return f"{dataset} {Path(root) / split if root is not None else split}"
