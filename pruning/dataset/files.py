"""Lists the images below a folder: every format that PIL reads, hidden entries left out at every level."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pruning.errors import DataError

NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "FITS"}
"""Formats that PIL recognises, but that are left out: it cannot decode the first five by itself, EPS is a program that
Ghostscript runs, and FITS holds measurements of any range."""

SYSTEM_FOLDERS = {
    "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
}  # fmt: skip
"""Folders that operating systems and unpackers leave among others; the thumbnails in some are images to PIL."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files below a folder. Paths are relative to it, with `/` between their parts."""

    folder: Path
    images: tuple[str, ...]
    """Images at any depth, numbers in their paths sorted by value."""
    others: tuple[str, ...]
    """Files at any depth that are no images to PIL, sorted."""
    folders: tuple[str, ...]
    """Folders that lie directly in it, with images or without, sorted as text."""
    hidden: tuple[str, ...]
    """Hidden folders that lie directly in it, sorted; nothing in them is listed."""


def list_images(folder: Path) -> Listing:
    """Lists the images below a folder; links are followed, and nothing is opened.

    Raises:
        DataError: a folder cannot be read, a link leads nowhere, or a folder holds a link to itself.
    """
    images: list[str] = []
    others: list[str] = []
    nowhere: list[str] = []
    hidden: list[str] = []
    folders: list[str] = []
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    extensions = image_extensions()
    while pending:
        inside, above = pending.pop()
        place = folder / inside
        try:
            status = place.stat()
            with os.scandir(place) as scanned:
                entries = sorted((entry.name, entry.is_dir(), entry.is_file()) for entry in scanned)
        except OSError as error:
            raise DataError(f"cannot list {error.filename or place}: {error.strerror}") from error
        own = (status.st_dev, status.st_ino)
        if own in above:
            raise DataError(f"{place} is a link to a folder that it lies in; remove the link")
        for name, is_folder, is_file in entries:
            path = f"{inside}/{name}" if inside else name
            if is_hidden(name):
                hidden += [name] if is_folder and not inside else []
            elif is_folder:
                folders += [] if inside else [name]
                pending.append((path, above | {own}))
            elif not is_file and not os.path.exists(folder / path):
                nowhere.append(path)
            elif is_file and os.path.splitext(name)[1].lower() in extensions:
                images.append(path)
            else:
                others.append(path)
    if nowhere:
        raise DataError(
            f"links lead nowhere in {folder}: {shown(sorted(nowhere))}; fetch the files they stand for, or remove them"
        )
    images.sort(key=lambda path: (natural_key(path), path))
    return Listing(
        folder=folder, images=tuple(images), others=tuple(sorted(others)), folders=tuple(folders), hidden=tuple(hidden)
    )


def is_hidden(name: str) -> bool:
    """Tells whether a file or folder is left out for its name: one with a dot at its begin, or of `SYSTEM_FOLDERS`."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def image_extensions() -> frozenset[str]:
    """Gives the extensions of all images that PIL opens, in lower case, with their dot; plug-ins count as well."""
    formats = Image.registered_extensions()  # loads PIL's plug-ins
    readable = {*Image.OPEN, "MPO"} - NO_PICTURES  # MPO is opened by PIL's reader of JPEG
    return frozenset(extension for extension, name in formats.items() if name in readable)


def natural_key(text: str) -> list[int | str]:
    """Gives timm's sort key: lower case, numbers by their value.

    `timm.utils.natural_key` fails on digits that are no decimals (`²`), which may well be in the name of a file.
    """
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def count_by_extension(paths: Iterable[str]) -> str:
    """Counts files by their extensions, for messages: `10 .txt, 2 .npy`."""
    counts = Counter(os.path.splitext(path)[1].lower() or "without an extension" for path in paths)
    return ", ".join(f"{count} {extension}" for extension, count in counts.most_common())


def skipped_note(listing: Listing, split: str) -> tuple[str, ...]:
    """Gives the remark that names the files of a split that were skipped; none where there are none."""
    others = listing.others
    if not others:
        return ()
    files = "1 file" if len(others) == 1 else f"{len(others)} files"
    return (f"skipped {files} of {split}, no images to PIL: {count_by_extension(others)} ({shown(others, 3)})",)


def shown(names: Iterable[str], count: int = 5) -> str:
    """Gives the first few names, for messages; those with blanks at an end are quoted, as they would not show."""
    first = [name if name == name.strip() else repr(name) for name in names]
    return ", ".join(first[:count]) + (", ..." if len(first) > count else "")
