"""Images are decoded bit for bit as timm does, or by a rule that is told; no file ends in a traceback.

The oracles are timm's own data set and transform, and PIL.
"""

from __future__ import annotations

import io
import random
import struct
import threading
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import ImageDataset, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg, list_models, list_pretrained, model_entrypoint

from pruning.data import CropMode, Images, InputSpec, Interpolation
from pruning.dataset.pixels import Decoded, decode
from pruning.dataset.sources import Source
from pruning.errors import DataError

RGB = InputSpec(size=(24, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop_pct=0.9)
GREY = InputSpec(size=(24, 16), mean=(0.3,), std=(0.25,), crop_pct=0.9)
AS_IT_IS = InputSpec(size=(6, 9), mean=(0.5,), std=(0.5,), crop_pct=1.0)  # of images of 9 x 6, no pixel is resized
ORIENTATION = 0x112


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


PICTURE = Image.fromarray(noise(30, 50, 3))


def written(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def source(files: Sequence[bytes | Image.Image]) -> Source:
    return Source(
        labels=torch.zeros(len(files), dtype=torch.long),
        open=lambda index: io.BytesIO(files[index]) if isinstance(files[index], bytes) else files[index],
        name_of="folder/{}.img".format,
    )


def decoded(*files: bytes | Image.Image, spec: InputSpec = RGB) -> Decoded:
    return decode(source(files), range(len(files)), spec)


def refusal(file: bytes | Image.Image, spec: InputSpec = RGB) -> str:
    """The message for a file that cannot be read, without the file's name."""
    with pytest.raises(DataError) as caught:
        decoded(file, spec=spec)
    message = str(caught.value)
    assert message.startswith("cannot read folder/0.img: ") and "\n" not in message
    return message.removeprefix("cannot read folder/0.img: ")


def settings(spec: InputSpec) -> dict[str, Any]:
    """The arguments of timm's `create_transform`."""
    names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {"input_size": (len(spec.mean), *spec.size)} | {name: getattr(spec, name) for name in names}


def by_timm(file: bytes, spec: InputSpec, folder: Path) -> torch.Tensor:
    """The pixels that timm's own data set gives, uint8. It looks at a file's name, PIL at its content."""
    (folder / "class").mkdir(parents=True, exist_ok=True)
    (folder / "class" / "0.png").write_bytes(file)
    dataset = ImageDataset(str(folder), input_img_mode=spec.mode)
    dataset.transform = create_transform(**settings(spec), normalize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = dataset[0][0]
    assert isinstance(pixels, torch.Tensor)
    return pixels


def normalized(pixels: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    labels = torch.zeros(len(pixels), dtype=torch.long)
    return Images(pixels=pixels, labels=labels, mean=spec.mean, std=spec.std).normalized(slice(None))


def kinds() -> list[dict[str, Any]]:
    """timm's data configuration of every model and of all pretrained weights, each kind once."""
    configurations = {}
    timms = [name for name in list_models() if model_entrypoint(name).__module__.startswith("timm.")]  # not our tests'
    for name in (*list_pretrained(), *timms):
        configuration = get_pretrained_cfg(name)
        assert configuration is not None
        resolved = resolve_data_config(pretrained_cfg=configuration.to_dict())
        configurations.setdefault(repr(sorted(resolved.items())), resolved)
    return list(configurations.values())


def check_against_timm(configuration: dict[str, Any], pictures: Sequence[Image.Image]) -> None:
    """Compares pixels and normalised pixels with timm's transform of this configuration, bit for bit."""
    size = configuration["input_size"][1:]
    spec = InputSpec(size=size, **{key: value for key, value in configuration.items() if key != "input_size"})
    pixels = decoded(*pictures, spec=spec).pixels
    raw, whole = create_transform(**configuration, normalize=False), create_transform(**configuration)
    converted = [picture.convert(spec.mode) for picture in pictures]
    assert torch.equal(pixels, torch.stack([raw(picture) for picture in converted])), configuration
    assert torch.equal(normalized(pixels, spec), torch.stack([whole(picture) for picture in converted])), configuration


WIDE_AND_TALL = [Image.fromarray(noise(height, width, 3)) for height, width in ((32, 64), (500, 300))]


@pytest.mark.slow
def test_pixels_are_timms_bit_for_bit_for_every_configuration_of_its_models() -> None:
    configurations = kinds()
    assert len(configurations) > 100
    for configuration in configurations:
        check_against_timm(configuration, WIDE_AND_TALL)


def test_pixels_are_timms_bit_for_bit_for_each_of_its_scales_and_crop_modes() -> None:
    smallest: dict[Any, dict[str, Any]] = {}
    for kind in sorted(kinds(), key=lambda kind: kind["input_size"][1:]):
        what = [kind[key] for key in ("mean", "std", "interpolation", "crop_mode")]
        smallest.setdefault((*what, kind["crop_pct"] > 1), kind)
    assert {kind["crop_mode"] for kind in smallest.values()} == set(get_args(CropMode))
    for configuration in smallest.values():
        check_against_timm(configuration, WIDE_AND_TALL)


@pytest.mark.parametrize("crop_mode", get_args(CropMode))
@pytest.mark.parametrize("interpolation", get_args(Interpolation))
def test_pixels_are_timms_for_one_channel_other_sizes_and_interpolations(crop_mode: str, interpolation: str) -> None:
    pictures = [Image.fromarray(noise(height, width, 3)) for height, width in ((8, 200), (60, 32), (24, 16), (1, 1))]
    for spec in (RGB, GREY, replace(GREY, size=(16, 16)), replace(RGB, crop_pct=1.2)):
        check_against_timm(settings(spec) | {"crop_mode": crop_mode, "interpolation": interpolation}, pictures)


def palette_image(transparency: int | bytes | None) -> bytes:
    image = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE)
    return written(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


FRAMES = [Image.fromarray(noise(30, 50, 3, seed=seed)) for seed in (1, 2)]
ALPHA = Image.fromarray(noise(30, 50, 4))

EIGHT_BIT = {
    "1.png": written(PICTURE.convert("1"), "PNG"),
    "L.png": written(PICTURE.convert("L"), "PNG"),
    "L transparent.png": written(PICTURE.convert("L"), "PNG", transparency=7),
    "LA.png": written(ALPHA.convert("LA"), "PNG"),
    "P.png": palette_image(None),
    "P, a colour transparent.png": palette_image(3),
    "P, many colours transparent.png": palette_image(bytes(range(200))),
    "RGB.png": written(PICTURE, "PNG"),
    "RGB transparent.png": written(PICTURE, "PNG", transparency=(1, 2, 3)),
    "RGBA.png": written(ALPHA, "PNG"),
    "CMYK.jpg": written(PICTURE.convert("CMYK"), "JPEG"),
    "CMYK.tif": written(PICTURE.convert("CMYK"), "TIFF"),
    "YCbCr.tif": written(PICTURE.convert("YCbCr"), "TIFF"),
    "LAB.tif": written(PICTURE.convert("YCbCr"), "TIFF").replace(
        struct.pack("<HHIHH", 262, 3, 1, 6, 0), struct.pack("<HHIHH", 262, 3, 1, 8, 0)
    ),
    "grey.jpg": written(PICTURE.convert("L"), "JPEG"),
    "progressive.jpg": written(PICTURE, "JPEG", progressive=True),
    "two frames.gif": written(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "two frames.tif": written(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
    "two frames.webp": written(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
    "two frames.png": written(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "RGBA.webp": written(ALPHA, "WEBP"),
    "RGB.bmp": written(PICTURE, "BMP"),
    "RGB.ppm": written(PICTURE, "PPM"),
    "RGBA.tga": written(ALPHA, "TGA"),
    "LZW.tif": written(PICTURE, "TIFF", compression="tiff_lzw"),
    "RGB.jp2": written(PICTURE, "JPEG2000"),
    "RGBA.ico": written(ALPHA, "ICO", sizes=[(16, 16), (30, 30)]),
}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_images_of_eight_bits_are_converted_as_timm_does(name: str, tmp_path: Path) -> None:
    specs = (RGB,) if name == "LAB.tif" else (RGB, GREY)  # PIL has no conversion from LAB to grey
    for spec in specs:
        result = decoded(EIGHT_BIT[name], spec=spec)
        assert torch.equal(result.pixels[0], by_timm(EIGHT_BIT[name], spec, tmp_path))
        assert result.notes == ()


def test_a_data_sets_own_images_are_converted_like_files() -> None:
    for mode in ("1", "L", "RGB", "RGBA", "P", "CMYK", "HSV"):
        image = PICTURE.convert(mode)
        expected = create_transform(**settings(RGB), normalize=False)(image.convert("RGB"))
        assert torch.equal(decoded(image).pixels[0], expected)


def test_no_image_gives_no_pixels() -> None:
    assert decoded().pixels.shape == (0, 3, 24, 16) and decoded().notes == ()


def png(
    width: int, height: int, bits: int = 8, color: int = 0, data: bytes = b"", *extra: tuple[bytes, bytes]
) -> bytes:
    """A PNG of the given rows, each with its filter byte; `extra` chunks come behind the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), *extra, (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(data: bytes, bits: int, width: int = 9, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A TIFF of six uncompressed rows, little-endian, black at 0 (photometric 1) and unsigned (sample format 1)."""
    tags = {256: width, 257: 6, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 6, 279: len(data)}
    tags[339] = sample_format
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels begin: behind the tags
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


LOW = noise(6, 9)
DEEP = LOW.astype(np.uint16) * 257  # the same grey values in 16 bits

SIXTEEN_BIT = {
    "png": png(9, 6, 16, 0, b"".join(b"\0" + row.tobytes() for row in DEEP.astype(">u2"))),
    "tif": tiff(DEEP.tobytes(), 16),
    "compressed.tif": written(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"),
    "big-endian.tif": written(Image.frombytes("I;16B", (9, 6), DEEP.astype(">u2").tobytes()), "TIFF"),
    "pgm": b"P5 9 6 65535\n" + DEEP.astype(">u2").tobytes(),
    "text.pgm": b"P2 9 6 65535\n" + " ".join(map(str, DEEP.flatten())).encode(),
    "jp2": written(Image.fromarray(DEEP), "JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_sixteen_bit_grey_gives_the_pixels_of_eight_bits_and_is_told(name: str) -> None:
    for spec in (AS_IT_IS, replace(RGB, size=(6, 9), crop_pct=1.0)):
        result = decoded(SIXTEEN_BIT[name], Image.fromarray(LOW), spec=spec)
        assert torch.equal(result.pixels[0], result.pixels[1])
        assert np.array_equal(result.pixels[0, 0].numpy(), LOW)
        (note,) = result.notes
        assert note == f"1 of 2 images are 16-bit grey: the high byte is taken, the brightest is {DEEP.max()} of 65535"


def test_sixteen_bit_grey_takes_the_high_byte_as_pil_does_for_colour() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (6, 9), dtype=np.uint16).astype(">u2")
    grey = png(9, 6, 16, 0, b"".join(b"\0" + row.tobytes() for row in values))
    threefold = np.repeat(values[:, :, None], 3, axis=2)
    color = png(9, 6, 16, 2, b"".join(b"\0" + row.tobytes() for row in threefold))
    assert Image.open(io.BytesIO(grey)).mode == "I;16" and Image.open(io.BytesIO(color)).mode == "RGB"
    spec = replace(RGB, size=(6, 9), crop_pct=1.0)
    assert torch.equal(decoded(grey, spec=spec).pixels, decoded(color, spec=spec).pixels)


def test_grey_of_a_data_sets_own_images_may_have_sixteen_bits() -> None:
    assert np.array_equal(decoded(Image.fromarray(DEEP), spec=AS_IT_IS).pixels[0, 0].numpy(), LOW)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(tiff(LOW.astype(np.uint32).tobytes(), 32), id="32-bit"),
        pytest.param(tiff(LOW.astype(np.int16).tobytes(), 16, sample_format=2), id="signed"),
        pytest.param(tiff(LOW.astype(np.float32).tobytes(), 32, sample_format=3), id="real"),
        pytest.param(tiff(DEEP.tobytes(), 16, photometric=0), id="zero is white"),
        pytest.param(tiff(noise(6, 12).tobytes(), 12, width=8), id="12-bit"),
        pytest.param(b"Pf\n9 6\n-1.0\n" + LOW.astype("<f4").tobytes(), id="pfm"),
        pytest.param(Image.fromarray(LOW.astype(np.int32)), id="whole numbers of a data set"),
        pytest.param(Image.fromarray(LOW.astype(np.float32)), id="real numbers of a data set"),
    ],
)
def test_grey_of_an_unknown_range_is_refused(file: bytes | Image.Image) -> None:
    assert "have no known range; save it with 8 bits, or as a PNG with 16 bits from 0 to 65535" in refusal(file)


def oriented(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"lossless": True} if format == "WEBP" else {}
    return written(Image.fromarray(noise(30, 50, 3)), format, exif=exif, **lossless)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_in_exif_data_is_applied_where_it_should(format: str, orientation: int, tmp_path: Path) -> None:
    file = oriented(format, orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    expected = create_transform(**settings(RGB), normalize=False)(upright.convert("RGB"))
    applied = decoded(file, spec=replace(RGB, exif="apply"))
    assert torch.equal(applied.pixels[0], expected) and applied.notes == ()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_orientation_in_exif_data_is_else_ignored_as_timm_does_and_told(format: str, tmp_path: Path) -> None:
    ignored = decoded(oriented(format, 6), oriented(format, 1), written(PICTURE, format), oriented(format, 3))
    assert torch.equal(ignored.pixels[0], by_timm(oriented(format, 6), RGB, tmp_path))
    told = (
        "2 of 4 images have an EXIF orientation, which is ignored as timm does; data.exif=apply turns them upright",
    )
    assert ignored.notes == (() if format == "TIFF" else told)  # PIL itself turns a TIFF, for timm too


def test_exif_data_behind_the_pixels_of_a_png_are_read() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    chunk = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    rows = b"".join(b"\0" + row.tobytes() for row in LOW)
    result = decoded(png(9, 6, 8, 0, rows, chunk), spec=replace(AS_IT_IS, exif="apply"))
    assert np.array_equal(result.pixels[0, 0].numpy(), LOW[::-1, ::-1])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"]
)
@pytest.mark.parametrize("rule", ["ignore", "apply"])
def test_broken_exif_data_leave_the_pixels_as_they_are(exif: bytes, rule: Any) -> None:
    plain, broken = written(PICTURE, "JPEG"), written(PICTURE, "JPEG", exif=exif)
    result = decoded(plain, broken, spec=replace(RGB, exif=rule))
    assert torch.equal(result.pixels[0], result.pixels[1]) and result.notes == ()


def test_an_image_of_more_pixels_than_pil_opens_is_refused_in_one_line() -> None:
    message = refusal(png(20_000, 10_000))
    assert "200000000 pixels" in message and message.endswith("; save it smaller, or leave it out")


def test_an_image_that_pil_only_warns_of_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL warns above, and refuses above twice as many
    assert torch.equal(decoded(written(PICTURE, "PNG")).pixels[0], by_timm(written(PICTURE, "PNG"), RGB, tmp_path))


def test_a_long_and_narrow_image_is_read_as_timm_does_unless_its_crop_fills_the_memory(tmp_path: Path) -> None:
    narrow, narrower = (Image.fromarray(noise(1, width, 3)) for width in (3000, 600_000))
    for crop_mode in get_args(CropMode)[:2]:
        check_against_timm(settings(RGB) | {"crop_mode": crop_mode}, [narrow])
    check_against_timm(settings(RGB) | {"crop_mode": "squash"}, [narrower])
    assert refusal(narrower).startswith(
        "its 600000 x 1 pixels are too long and narrow: 16000000 x 27 before the centre"
    )


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_a_pixel_is_refused(size: tuple[int, int]) -> None:
    gif = b"GIF89a" + struct.pack("<HHBBB", *size, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\x02\0;"
    for file in (png(*size), gif):
        assert refusal(file) == "it is empty, broken, or of no format that PIL reads"
    assert refusal(Image.new("RGB", size)) == f"it has no pixel: it is {size[0]} x {size[1]}"


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_told_so(content: bytes) -> None:
    assert refusal(content) == "it is empty, broken, or of no format that PIL reads"


def test_a_broken_image_among_many_is_named_and_leaves_no_thread_behind() -> None:
    files = [written(PICTURE, "PNG")] * 20
    before = threading.active_count()
    with pytest.raises(DataError, match=r"cannot read folder/13\.img: "):
        decoded(*files[:13], files[0][:100], *files[13:])
    assert threading.active_count() == before


def test_no_warning_filter_stays_behind() -> None:
    before = list(warnings.filters)
    decoded(palette_image(bytes(range(200))))
    assert warnings.filters == before


@pytest.mark.parametrize("name", [*EIGHT_BIT, *SIXTEEN_BIT])
def test_a_file_with_bytes_cut_or_changed_is_read_or_refused_in_one_line(name: str) -> None:
    whole = (EIGHT_BIT | SIXTEEN_BIT)[name]
    dice = random.Random(name)
    for _ in range(30):
        broken = bytearray(whole[: dice.randrange(len(whole))] if dice.random() < 0.4 else whole)
        for _ in range(dice.randrange(1, 6)):
            if broken:
                broken[dice.randrange(min(len(broken), dice.choice([64, 1000, 100_000])))] = dice.randrange(256)
        try:
            shape = decoded(bytes(broken)).pixels.shape
        except DataError:
            refusal(bytes(broken))
        else:
            assert shape == (1, 3, 24, 16)
