"""Images in memory with their labels, the splits of a sweep, and the input that a model takes.

Images are kept as uint8, as they leave the transforms, and normalised batch by batch: a split of 50,000 at
224 x 224 takes 7.5 GB that way instead of 30.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from pruning.device_sharing import yielding_between
from pruning.errors import SettingError

Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
CropMode = Literal["center", "squash", "border"]
Exif = Literal["ignore", "apply"]


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
        """Some of the images as the model takes them: (x / 255 - mean) / std, bit-equal to timm's transform."""
        brightest = torch.tensor(255.0, device=device)  # divided by a number, CUDA would multiply by its reciprocal
        mean = torch.tensor(self.mean, device=device)[:, None, None]
        std = torch.tensor(self.std, device=device)[:, None, None]
        pixels = self.pixels[indices].to(device).float()
        return pixels.div_(brightest).sub_(mean).div_(std)


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
    """The model's input format: size, resizing and scale, as in timm's data configuration.

    Raises:
        SettingError: a value out of its range, or an unknown one.
    """

    size: tuple[int, int]
    """Height and width, in pixels."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, in [0, 1]; one channel is grey, three are RGB."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, in (0, 1]."""
    interpolation: Interpolation = "bicubic"
    """Filter of the resizing, by its name in PIL."""
    crop_pct: float = 0.875
    """Share of the resized image that the centre crop keeps, above 0; above 1 the image is framed in black."""
    crop_mode: CropMode = "center"
    """Way to the model's size: cut (`center`), stretched (`squash`) or padded with the mean (`border`)."""
    exif: Exif = "ignore"
    """Orientation in an image's EXIF data: `ignore` it as timm does, or `apply` it."""

    def __post_init__(self) -> None:
        for name, known in (("interpolation", Interpolation), ("crop_mode", CropMode), ("exif", Exif)):
            if (value := getattr(self, name)) not in get_args(known):
                raise SettingError(f"data.{name} is {value!r}; give one of {', '.join(get_args(known))}")
        if not (self.crop_pct > 0 and math.isfinite(self.crop_pct)):
            raise SettingError(f"data.crop_pct is {self.crop_pct}; give a share of the image, in (0, 1]")
        if not all(0 <= value <= 1 for value in self.mean):
            raise SettingError(f"data.mean is {_numbers(self.mean)}, not in [0, 1]{_unit_hint(self.mean)}")
        if not all(0 < value <= 1 for value in self.std):
            raise SettingError(f"data.std is {_numbers(self.std)}, not in (0, 1]{_unit_hint(self.std)}")

    @property
    def mode(self) -> str:
        """PIL's mode of the images: L or RGB."""
        return "L" if len(self.mean) == 1 else "RGB"

    def summary(self) -> str:
        """Tells all settings in one line: `224x224, bicubic, crop 0.9 center, mean (0.5), std (0.5)`."""
        height, width = self.size
        size = f"{height}x{width}" + ("" if height == width else " (height x width)")
        crop = f"crop {self.crop_pct:g} {self.crop_mode}"
        scale = f"mean {_numbers(self.mean)}, std {_numbers(self.std)}"
        return ", ".join([size, self.interpolation, crop, scale, *(["EXIF applied"] if self.exif == "apply" else [])])


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _unit_hint(values: tuple[float, ...]) -> str:
    return "; it looks like units of 0 to 255: divide it by 255" if any(value > 2 for value in values) else ""


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
