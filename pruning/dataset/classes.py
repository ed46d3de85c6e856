"""The order of a data set's classes, and the class of each image: from a class map, or from the folders of train.

Two libraries train on folders of images, and they differ. timm takes the innermost folder of an image for its class and
sorts numbers in names by their value, whatever the case; torchvision takes the outermost folder and sorts as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pruning.dataset.class_map import composed, names_of_mapping, read_class_map
from pruning.dataset.files import Listing, count_by_extension, natural_key, shown
from pruning.errors import DataError

ClassOrder = Literal["timm", "torchvision"]

MAP_NEEDED = (
    "give data.class_map, a text file with the names of all the model's classes in its order, or mend "
    "model.args.num_classes"
)
"""Way out where the number of classes is not the model's."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a data set, in the order of the model's indices."""

    names: tuple[str, ...]
    """Name of each class, in Unicode's composed form; its place is its index."""
    origin: str
    """Name of the class map or the folder that they come from, for messages."""
    order: ClassOrder | None = None
    """Library whose rule says which folder of an image names its class; None where both rules agreed."""


def mapped_classes(class_map: str | Path | Mapping[str, int], order: ClassOrder | None, num_classes: int) -> Classes:
    """Gives the classes of a class map: a text file, or a mapping from name to index.

    Raises:
        DataError: it cannot be read, or has another number of classes than the model.
    """
    if isinstance(class_map, Mapping):
        names, origin = names_of_mapping(class_map), "the class map"
    else:
        names, origin = read_class_map(Path(class_map)), f"the class map {class_map}"
    if len(names) != num_classes:
        raise DataError(
            f"{origin} has {len(names)} classes, but the model has {num_classes} classes; it must name all of them, in "
            "the model's order"
        )
    return Classes(names=names, origin=origin, order=order)


def folder_classes(listing: Listing, order: ClassOrder | None, num_classes: int) -> Classes:
    """Numbers the class folders of the training split, where there is no class map.

    Args:
        order: library whose order they have; None where timm's and torchvision's must be the same.

    Raises:
        DataError: a folder has no image, their number is not the model's, or their order is in doubt.
    """
    check_images_lie_in_folders(listing)
    folder = listing.folder
    empty = sorted({*listing.folders} - {_outermost(image) for image in listing.images})
    if empty:
        held = [path for path in listing.others if _outermost(path) in empty]
        raise DataError(
            f"class folders without an image in {folder}: {shown(empty)}"
            + (f" (they hold {count_by_extension(held)})" if held else "")
            + "; add images, remove them, or give data.class_map"
        )
    inner, outer = {_innermost(image) for image in listing.images}, {*listing.folders}
    _check_names(folder, {None: inner | outer, "timm": inner, "torchvision": outer}[order])
    by_timm, by_torchvision = sorted(sorted(inner), key=natural_key), sorted(outer)
    names = by_timm if order == "timm" else by_torchvision
    if len(names) != num_classes and (order is not None or len(by_timm) != num_classes):
        hidden = f" (hidden ones left out: {shown(listing.hidden)})" if listing.hidden else ""
        raise DataError(
            f"{folder} has {len(names)} class folders{hidden}, but the model has {num_classes} classes; {MAP_NEEDED}"
        )
    if order is None:
        _check_rules_agree(listing, by_timm, by_torchvision)
    elif order == "timm":
        _check_values_differ(listing, by_timm, "give data.class_map")
    return Classes(names=tuple(map(composed, names)), origin=str(folder), order=order)


def _check_rules_agree(listing: Listing, by_timm: list[str], by_torchvision: list[str]) -> None:
    """Checks that timm and torchvision would give every image the same index.

    Raises:
        DataError: they differ; the message shows where.
    """
    ways_out = (
        "say which one the model was trained with, data.class_order=timm or data.class_order=torchvision, or give "
        "data.class_map"
    )
    folder = listing.folder
    nested = next((image for image in listing.images if _innermost(image) != _outermost(image)), None)
    if nested is not None:
        raise DataError(
            f"folders lie in class folders of {folder}: {nested} is of class {_innermost(nested)!r} to timm (of "
            f"{len(by_timm)}), {_outermost(nested)!r} to torchvision (of {len(by_torchvision)}); {ways_out}"
        )
    by_text = "give data.class_map, or data.class_order=torchvision if the model was trained with torchvision"
    _check_values_differ(listing, by_timm, by_text)
    if by_timm != by_torchvision:
        pairs = enumerate(zip(by_timm, by_torchvision, strict=True))
        start = next(place for place, (one, other) in pairs if one != other)
        part = slice(start, start + 3)
        raise DataError(
            f"from class {start} on, timm sorts the folders in {folder} as {', '.join(by_timm[part])}, torchvision as "
            f"{', '.join(by_torchvision[part])}; {ways_out}"
        )


def _check_values_differ(listing: Listing, by_timm: list[str], way_out: str) -> None:
    """Checks that timm's order tells names apart, in that order: `Cat` and `cat` are equal to it, `1` and `01`.

    Raises:
        DataError: it cannot, so their order is another one in each process.
    """
    for first, second in pairwise(by_timm):
        if natural_key(first) == natural_key(second):
            raise DataError(
                f"timm's order leaves folders {first} and {second} in {listing.folder} to chance, since it takes them "
                f"for equal; {way_out}"
            )


def check_images_lie_in_folders(listing: Listing) -> None:
    """Checks that a split has images, and all of them in class folders.

    Raises:
        DataError: it has none, or some lie elsewhere; the message tells what there is.
    """
    folder = listing.folder
    if not listing.images:
        held = f"it holds {count_by_extension(listing.others)}" if listing.others else "it holds no file"
        raise DataError(f"no image in {folder}, {held}; it must hold one folder of images a class")
    outside = [image for image in listing.images if "/" not in image]
    if outside:
        raise DataError(
            f"{len(outside)} images lie outside a class folder in {folder}: {shown(outside, 3)}; it must hold one "
            "folder of images a class"
        )


def label_images(listing: Listing, classes: Classes) -> list[int]:
    """Gives the class index of each image of a split.

    Raises:
        DataError: a folder is of no class, or may be of two.
    """
    check_images_lie_in_folders(listing)
    inner = [_innermost(image) for image in listing.images]
    outer = [_outermost(image) for image in listing.images]
    index = {name: place for place, name in enumerate(classes.names)}
    by_inner, by_outer = ([index.get(composed(name)) for name in names] for names in (inner, outer))
    found = {*inner} if classes.order == "timm" else {*listing.folders}
    _check_names(listing.folder, found)
    unknown = sorted(name for name in found if composed(name) not in index)
    if unknown:
        hint = _hint_at_unknown(listing, classes, unknown, nested=classes.order is None and None not in by_inner)
        raise DataError(
            f"{len(unknown)} of {len(found)} folders in {listing.folder} are no class of {classes.origin}: "
            f"{shown(unknown)}; {hint}"
        )
    labels = by_inner if classes.order == "timm" else by_outer
    if classes.order is None:
        for image, one, other in zip(listing.images, by_inner, by_outer, strict=True):
            if one is not None and one != other:
                raise DataError(
                    f"{listing.folder / image} may be of class {_innermost(image)!r}, as timm takes it, or "
                    f"{_outermost(image)!r}, as torchvision does; say data.class_order=timm or "
                    "data.class_order=torchvision"
                )
    return [label for label in labels if label is not None]  # each one is an index: the unknown were refused


def _hint_at_unknown(listing: Listing, classes: Classes, unknown: list[str], *, nested: bool) -> str:
    """Says what to do about folders of no class.

    Args:
        unknown: at least one.
        nested: True if the innermost folder of every image is a class.
    """
    if not {*unknown} & {part for image in listing.images for part in image.split("/")[:-1]}:
        return "no image is in them, so remove them"
    if nested:
        return "data.class_order=timm takes the innermost folder of an image for its class"
    similar = {name.strip().casefold(): name for name in reversed(classes.names)}
    pairs = [(name, similar[key]) for name in unknown if (key := composed(name).strip().casefold()) in similar]
    if pairs:
        there, meant = pairs[0]
        return f"{there!r} is not {meant!r}: write both alike"
    return f"the classes are {shown(classes.names, 3)}"


def _check_names(folder: Path, names: set[str]) -> None:
    """Checks that names of class folders can be written, and differ in Unicode's composed form.

    Raises:
        DataError: one cannot, or two do not.
    """
    seen: dict[str, str] = {}
    for name in sorted(names):
        if any("\ud800" <= character <= "\udfff" for character in name):  # as Python reads bytes that are no UTF-8
            raise DataError(f"the name of class folder {name!a} in {folder} is not UTF-8; rename it")
        other = seen.setdefault(composed(name), name)
        if other != name:
            raise DataError(
                f"two class folders in {folder} have the same name {composed(name)!r}, in two Unicode forms: "
                f"{other!a} and {name!a}; put their images into one folder"
            )


def _outermost(path: str) -> str:
    return path.split("/", 1)[0]


def _innermost(path: str) -> str:
    return path.rsplit("/", 2)[-2]
