"""Small trees of images on disk, and how tests load them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pruning.data import Images, InputSpec
from pruning.dataset.splits import LoadedSplit, load_split, open_dataset

SPEC = InputSpec(size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop_pct=1.0)
GREY = InputSpec(size=(8, 8), mean=(0.5,), std=(0.25,), crop_pct=1.0)


def write(root: Path, split: str = "val", mode: str = "RGB", **counts: int) -> dict[str, np.ndarray[Any, Any]]:
    """Writes so many 8 x 8 images a class; returns name -> pixels (height, width[, channel])."""
    generator = np.random.default_rng(0)
    pixels = {}
    for label, count in counts.items():
        folder = root / split / label
        folder.mkdir(parents=True)
        for index in range(count):
            shape = (8, 8, 3) if mode == "RGB" else (8, 8)
            values = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(values).save(folder / f"{index}.png")
            pixels[f"{label}/{index}.png"] = values
    return pixels


def touch(folder: Path, paths: Iterable[str]) -> Path:
    """Makes files without content below a folder, for tests in which no image is opened; returns the folder."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def load(root: Path, spec: InputSpec = SPEC, **settings: Any) -> LoadedSplit:
    """Loads split `val` of a data set of folders, whose classes are those of `val` where nothing else is said."""
    names = [entry.name for entry in (root / "val").iterdir() if entry.is_dir()] if (root / "val").is_dir() else []
    drawing = {key: settings.pop(key) for key in ("limit", "seed") if key in settings}
    kind = settings.pop("dataset", "folder")
    settings = {"num_classes": len(names), "root": root, "train": "val"} | settings
    return load_split(open_dataset(kind, **settings), "val", spec, **drawing)


def images(root: Path, spec: InputSpec = SPEC, **settings: Any) -> Images:
    """Loads the images of `load`."""
    return load(root, spec, **settings).images
