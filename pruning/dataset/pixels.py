"""Decodes images by timm's transform, as uint8."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from pruning.data import InputSpec
from pruning.dataset.sources import Source
from pruning.errors import DataError, first_line_of


def decode(source: Source, indices: Sequence[int], spec: InputSpec) -> Tensor:
    """Decodes some images of a split in parallel, (B, channels, height, width) uint8.

    Raises:
        DataError: an image cannot be decoded; the message names it.
    """
    transform = create_transform(
        spec.size, is_training=False, normalize=False, interpolation=spec.interpolation, crop_pct=spec.crop_pct
    )

    def decode_one(index: int) -> Tensor:
        try:
            image = source.open(index)
            if isinstance(image, Image.Image):
                return transform(image.convert(spec.mode))
            with image, Image.open(image) as opened:
                return transform(opened.convert(spec.mode))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"cannot read {source.name_of(index)}: {first_line_of(error)}") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.stack(list(pool.map(decode_one, indices)))
