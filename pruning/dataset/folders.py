"""Opens a split of data set `folder`: one folder of images a class."""

from __future__ import annotations

import os
from pathlib import Path

from pruning.dataset.classes import Classes, label_images
from pruning.dataset.files import image_extensions, is_hidden, list_images, shown, skipped_note
from pruning.dataset.sources import Source, checked_labels
from pruning.errors import DataError


def split_folder(root: Path | None, split: str) -> Path:
    """Gives the folder of a split.

    Raises:
        DataError: there is none; the message lists those that there are.
    """
    if root is None:
        raise DataError("data set 'folder' needs data.root, the folder that holds the splits")
    folder = root / split
    if os.path.isdir(folder):  # unlike Path.is_dir False, no error, where it may not be looked at
        return folder
    if not os.path.isdir(root):
        problem = "is a file; unpack it into a folder" if os.path.isfile(root) else "is no folder"
        raise DataError(f"no folder {folder}: data.root={root} {problem}")
    inside = [name for name in sorted(_names_in(root)) if os.path.isdir(root / name) and not is_hidden(name)]
    deeper = [place for place in _two_levels_below(root, inside) if os.path.isdir(place / split)]
    if deeper:
        way_out = f"it lies deeper: give data.root={deeper[0]}"
    elif any(_holds_images(root / name) for name in inside[:5]):
        way_out = f"data.root holds class folders itself ({shown(inside)}); name the folder above it as data.root"
        if os.path.isdir(root.parent / split):
            way_out += f", data.root={root.parent}"
        else:
            way_out += " and its folders as data.train and data.val"
    elif inside:
        way_out = (
            f"data.root holds {shown(inside, 10)}; name the splits by these with data.train, data.val and data.test"
        )
    else:
        way_out = f"data.root must hold a folder {split!r} with one folder a class"
    raise DataError(f"no folder {folder}; {way_out}")


def _two_levels_below(root: Path, names: list[str]) -> list[Path]:
    """Lists the first few folders of a folder, and those in them: unpacking often puts one around a data set."""
    below = [root / name for name in names[:5]]
    return below + [place / name for place in below for name in sorted(_names_in(place))[:5] if not is_hidden(name)]


def _holds_images(folder: Path) -> bool:
    extensions = image_extensions()
    names = _names_in(folder)
    return any(os.path.splitext(name)[1].lower() in extensions and not is_hidden(name) for name in names)


def _names_in(folder: Path) -> list[str]:
    """Gives the names of all entries of a folder; none where it cannot be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def open_folder(root: Path | None, split: str, classes: Classes) -> Source:
    """Opens the images of a split's folder.

    Raises:
        DataError: there is no such folder, no image in it, or a folder that is of no class.
    """
    folder = split_folder(root, split)
    listing = list_images(folder)
    return Source(
        labels=checked_labels(label_images(listing, classes), len(classes.names), str(folder)),
        class_names=classes.names,
        open=lambda index: (folder / listing.images[index]).open("rb"),
        name_of=lambda index: str(folder / listing.images[index]),
        notes=skipped_note(listing, split),
    )
