"""Which files below a folder are images, and what is said of the others."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import timm.utils
from PIL import Image

from pruning.dataset.files import image_extensions, list_images, natural_key, skipped_note
from pruning.errors import DataError
from tests.pruning_tests.dataset.trees import touch


def test_images_at_any_depth_are_listed_with_numbers_in_order_of_their_value(tmp_path: Path) -> None:
    listing = list_images(touch(tmp_path, ["b/10.jpg", "b/9.jpg", "a/x/1.png", "B/1.JPG", "c/notes.txt"]))
    assert listing.images == ("a/x/1.png", "B/1.JPG", "b/9.jpg", "b/10.jpg")
    assert listing.others == ("c/notes.txt",)
    assert listing.folders == ("B", "a", "b", "c")


def test_hidden_files_and_folders_are_left_out_at_every_level(tmp_path: Path) -> None:
    hidden = [".cache/1.jpg", "a/.ipynb_checkpoints/1.jpg", "a/._1.jpg", "a/.DS_Store", ".x.jpg", "a/b/.c/d/1.jpg"]
    listing = list_images(touch(tmp_path, ["a/1.jpg", *hidden]))
    assert (listing.images, listing.others, listing.folders, listing.hidden) == (("a/1.jpg",), (), ("a",), (".cache",))


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"])
def test_folders_of_the_system_are_left_out_at_every_level(name: str, tmp_path: Path) -> None:
    listing = list_images(
        touch(tmp_path, ["a/1.jpg", f"{name}/a/._1.jpg", f"{name}/x.jpg", f"a/{name}/1.jpg/thumb.jpg"])
    )
    assert (listing.images, listing.folders, listing.hidden) == (("a/1.jpg",), ("a",), (name,))


def test_every_format_that_pil_writes_and_reads_is_an_image(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    left_out = set()
    for extension, name in Image.registered_extensions().items():
        if name not in Image.SAVE or name in (
            "ICNS",
            "IM",
            "PALM",
            "PDF",
        ):  # sizes of its own, to be dropped, and two never read
            continue
        mode = {"MSP": "1", "XBM": "1", "BLP": "P", "QOI": "RGB", "WEBP": "RGB", "AVIF": "RGB"}.get(name, "L")
        path = tmp_path / f"image{extension.upper()}"
        try:
            picture.convert(mode).save(path, format=name)
        except (OSError, NotImplementedError):  # a stub of PIL
            left_out.add(extension)
            continue
        if extension in image_extensions():
            with Image.open(path) as read:
                assert read.convert("L").size == (8, 8)
        else:
            left_out.add(extension)
    assert left_out == {".bufr", ".grib", ".h5", ".hdf", ".wmf", ".emf", ".eps", ".ps"}
    common = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm"}
    assert common <= image_extensions()
    assert not {".pdf", ".txt", ".npy", ".mpg", ".fits", ""} & image_extensions()


def test_sort_key_is_timms_wherever_that_has_one() -> None:
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices("aB1029 -_./éÉ日٣", k=draw.randrange(12)))
        assert natural_key(text) == timm.utils.natural_key(text)
    with pytest.raises(ValueError, match="invalid literal"):
        timm.utils.natural_key("5²")
    assert natural_key("5²") == ["", 5, "²"]


def test_skipped_files_are_counted_and_named(tmp_path: Path) -> None:
    files = ["a/1.jpg", "a/1.txt", "a/2.TXT", "b/c.npy", "README"]
    (note,) = skipped_note(list_images(touch(tmp_path, files)), "train")
    counts = "2 .txt, 1 without an extension, 1 .npy"
    assert note == f"skipped 4 files of train, no images to PIL: {counts} (README, a/1.txt, a/2.TXT, ...)"
    (tmp_path / "one").mkdir()
    (note,) = skipped_note(list_images(touch(tmp_path / "one", ["x.heic"])), "val")
    assert note == "skipped 1 file of val, no images to PIL: 1 .heic (x.heic)"
    assert skipped_note(list_images(touch(tmp_path / "two", ["a/1.jpg"])), "val") == ()


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, ["store/1.jpg", "split/a/2.jpg"])
    (tmp_path / "split" / "b").symlink_to(tmp_path / "store")
    (tmp_path / "split" / "a" / "3.jpg").symlink_to(tmp_path / "store" / "1.jpg")
    listing = list_images(tmp_path / "split")
    assert listing.images == ("a/2.jpg", "a/3.jpg", "b/1.jpg") and listing.folders == ("a", "b")


@pytest.mark.parametrize("name", ["a/2.jpg", "b"])
def test_links_that_lead_nowhere_are_named(name: str, tmp_path: Path) -> None:
    touch(tmp_path, ["a/1.jpg"])
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=rf"links lead nowhere in .*: {name}; fetch the files"):
        list_images(tmp_path)


def test_a_folder_that_links_to_itself_is_named(tmp_path: Path) -> None:
    touch(tmp_path, ["a/b/1.jpg"])
    (tmp_path / "a" / "b" / "again").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match=r"a/b/again is a link to a folder that it lies in; remove the link"):
        list_images(tmp_path)


def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    touch(tmp_path, ["a/1.jpg"])
    os.mkfifo(tmp_path / "a" / "2.jpg")
    listing = list_images(tmp_path)
    assert (listing.images, listing.others) == (("a/1.jpg",), ("a/2.jpg",))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    touch(tmp_path, ["a/1.jpg"])
    (tmp_path / "a").chmod(0)
    with pytest.raises(DataError, match=r"cannot list .*a: Permission denied"):
        list_images(tmp_path)
    (tmp_path / "a").chmod(0o700)


def test_a_link_to_itself_is_named(tmp_path: Path) -> None:
    touch(tmp_path, ["a/1.jpg"])
    (tmp_path / "a" / "b").symlink_to(tmp_path / "a" / "b")
    with pytest.raises(DataError, match=r"a/b: Too many levels of symbolic links"):
        list_images(tmp_path)
