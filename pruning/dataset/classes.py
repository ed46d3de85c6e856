"""The order of a data set's classes: from a class map, or from the folders of the training split."""

from __future__ import annotations

from pathlib import Path

from pruning.errors import DataError, first_line_of


def folder_classes(root: str | Path, split: str) -> dict[str, int]:
    """Numbers the class folders of a split in timm's order, where there is no class map: class name -> index."""
    from timm.data.readers.reader_image_folder import find_images_and_targets

    folder = split_folder(root, split)
    classes: dict[str, int] = find_images_and_targets(str(folder))[1]
    if not classes or "" in classes:  # timm takes images that lie outside any class folder as a class
        problem = "images lie outside a class folder" if classes else "no image"
        raise DataError(f"{problem} in {folder}; it must hold one folder of images a class")
    return classes


def split_folder(root: str | Path | None, split: str) -> Path:
    """Gives the folder of a split.

    Raises:
        DataError: there is none.
    """
    if root is None:
        raise DataError("data set 'folder' needs data.root, the folder that holds the splits")
    folder = Path(root) / split
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; data.root must hold a folder {split!r} with one folder a class")
    return folder


def checked_class_map(class_map: str | Path | dict[str, int], folder: Path) -> dict[str, int]:
    """Reads a class map, and checks that it has the classes of all folders.

    Raises:
        DataError: it cannot be read, or lacks a class.
    """
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
