"""Decodes images as timm does, to uint8: eight bits, grey or RGB, by timm's own transform.

The few rules beyond timm's: 16-bit grey is scaled to 8 bits instead of clipped to white, grey of no known range is
refused, and the orientation in an image's EXIF data can be applied.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import TiffImageFile
from timm.data import create_transform
from torch import Tensor

from pruning.data import InputSpec
from pruning.dataset.sources import Source
from pruning.errors import DataError, first_line_of

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation in EXIF data -> what turns the image upright. `ImageOps.exif_transpose` does the same, but rewrites the
EXIF data too, and fails where some other tag of them is broken."""

FULL_RANGE = ("PNG", "PPM", "JPEG2000")
"""Formats whose grey of over 8 bits PIL scales to 0 to 65535."""
BLACK_IS_ZERO = 1
"""TIFF's photometric interpretation in which 0 is black."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Images of a split as the model takes them, but for the normalisation."""

    pixels: Tensor
    """(B, channels, height, width), uint8."""
    notes: tuple[str, ...]
    """Remarks for the user, one line each: what the images carry that is not used."""


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The properties of one image that a remark may count."""

    is_turned: bool
    """True if its EXIF data carry an orientation other than upright."""
    brightest: int | None
    """The highest value of a 16-bit grey image; None for all others."""


def decode(source: Source, indices: Sequence[int], spec: InputSpec) -> Decoded:
    """Decodes some images of a split in parallel.

    Raises:
        DataError: an image cannot be decoded, or has too many pixels; the message names it.
    """
    pixels = torch.empty((len(indices), len(spec.mean), *spec.size), dtype=torch.uint8)
    transform = create_transform(
        spec.size,
        normalize=False,
        interpolation=spec.interpolation,
        mean=spec.mean,  # the frame of crop mode `border`
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
    )

    def decode_one(place: int) -> _Seen:
        index = indices[place]
        try:
            image = source.open(index)
            if isinstance(image, Image.Image):
                pixels[place], seen = _prepare(image, spec, transform)
            else:
                with image, Image.open(image) as opened:
                    pixels[place], seen = _prepare(opened, spec, transform)
        except Exception as error:  # PIL's readers raise a dozen kinds of errors for broken files
            raise DataError(f"cannot read {source.name_of(index)}: {_reason(error)}") from error
        return seen

    # For all threads at once, as filters of warnings are those of the process.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of transparency, broken metadata, many pixels
        seen = list(pool.map(decode_one, range(len(indices))))
    return Decoded(pixels=pixels, notes=_notes(seen, spec))


def _prepare(image: Image.Image, spec: InputSpec, transform: Callable[[Image.Image], Tensor]) -> tuple[Tensor, _Seen]:
    """Gives an image's pixels (channels, height, width), uint8, and what is told of it."""
    if 0 in image.size:
        raise ValueError(f"it has no pixel: it is {image.width} x {image.height}")
    image.load()  # a PNG may carry its EXIF data behind its pixels, and PIL itself turns a TIFF while it loads it
    orientation = _orientation(image)
    eight_bits, brightest = _eight_bits(image)
    eight_bits = eight_bits.convert(spec.mode)
    if spec.exif == "apply" and orientation in TURNS:
        eight_bits = eight_bits.transpose(TURNS[orientation])
    _check_resized(eight_bits, spec)
    return transform(eight_bits), _Seen(is_turned=orientation in TURNS, brightest=brightest)


def _orientation(image: Image.Image) -> int:
    """Gives the orientation in an image's EXIF data, 1 (upright) to 8; 1 where they have none or cannot be read."""
    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except Exception:  # EXIF data are full of mistakes, of which the pixels know nothing
        return 1


def _eight_bits(image: Image.Image) -> tuple[Image.Image, int | None]:
    """Gives 16-bit grey by its high byte, as PIL itself reads 16-bit colour, and its highest value.

    Images of other kinds come back as they are, with None.

    Raises:
        ValueError: grey of another range than 0 to 65535.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image, None
    if not _fills_16_bits(image):
        raise ValueError(
            f"its grey values (PIL's mode {image.mode}) have no known range; save it with 8 bits, "
            "or as a PNG with 16 bits from 0 to 65535"
        )
    values = np.asarray(image)
    return Image.fromarray((values >> 8).astype(np.uint8)), int(values.max())


def _fills_16_bits(image: Image.Image) -> bool:
    """Tells whether the grey values of an image of mode `I...` or `F` range from 0, black, to 65535, white."""
    is_16_bit = image.mode.startswith("I;16")
    if isinstance(image, TiffImageFile):
        bits, photometric = (image.tag_v2.get(tag) for tag in (Base.BitsPerSample, Base.PhotometricInterpretation))
        return is_16_bit and bits == (16,) and photometric == BLACK_IS_ZERO
    if image.format is None:  # a data set of arrays
        return is_16_bit
    return image.mode != "F" and image.format in FULL_RANGE


def _check_resized(image: Image.Image, spec: InputSpec) -> None:
    """Refuses a long and narrow image that fills the memory once its shorter side is as long as the crop needs."""
    most = Image.MAX_IMAGE_PIXELS
    if most is None or spec.crop_mode != "center":
        return
    width, height = image.size
    scale = max(spec.size[0] / height, spec.size[1] / width) / spec.crop_pct
    if width * height * scale**2 > 2 * most:  # the limit at which PIL itself gives up
        raise ValueError(
            f"its {width} x {height} pixels are too long and narrow: {width * scale:.0f} x {height * scale:.0f} before "
            "the centre crop; leave it out, or set data.crop_mode=squash"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, broken, or of no format that PIL reads"
    if isinstance(error, Image.DecompressionBombError):
        return f"{first_line_of(error).rstrip('.')}; save it smaller, or leave it out"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    return first_line_of(error)


def _notes(seen: Sequence[_Seen], spec: InputSpec) -> tuple[str, ...]:
    notes = []
    num_turned = sum(image.is_turned for image in seen)
    if num_turned and spec.exif == "ignore":
        notes.append(
            f"{num_turned} of {len(seen)} images have an EXIF orientation, which is ignored as timm does; "
            "data.exif=apply turns them upright"
        )
    deep = [image.brightest for image in seen if image.brightest is not None]
    if deep:
        notes.append(
            f"{len(deep)} of {len(seen)} images are 16-bit grey: the high byte is taken, "
            f"the brightest is {max(deep)} of 65535"
        )
    return tuple(notes)
