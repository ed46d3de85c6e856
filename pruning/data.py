"""Images in memory with their labels, the splits of a sweep, and the input that a model takes.

Images are kept as uint8, as they leave the transforms, and normalised batch by batch: a split of 50,000 at
224 x 224 takes 7.5 GB that way instead of 30.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pruning.device_sharing import yielding_between


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
