"""Loads a recipe's dense model and images, and checks them before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruning.data import Images, InputSpec, Splits
from pruning.dataset.sharing import check_shared, contradictory_labels
from pruning.dataset.splits import LoadedSplit, check_splits_differ, load_split, open_dataset
from pruning.errors import CheckpointError, DataError
from pruning.model.anatomy import examine
from pruning.model.loading import default_input, load_weights, read_weights
from search.config import Config, Fingerprints
from search.errors import ConfigError
from search.space import Space
from search.trial.dense import load_dense
from search.trial.fingerprinting import (
    by_name,
    check_unchanged,
    fingerprints_of,
    hash_splits,
    training_hash,
    with_weights,
)


@dataclass(frozen=True, kw_only=True)
class LoadedSplits:
    """The images of a sweep, and what is to be said of them."""

    splits: Splits
    class_names: tuple[str, ...]
    """Name of each class, in the order of the indices; empty where the data set has no names."""
    notes: tuple[str, ...]
    """Remarks for the user, one line each: which files were skipped."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The model and the images of a sweep, loaded and checked."""

    model: nn.Module
    trained: bool
    """True if the weights are final: the recipe has no training, or it was done before."""
    spec: InputSpec
    """The size and scale of the model's input."""
    splits: Splits
    space: Space
    fingerprints: Fingerprints
    """The hashes of all of these; that of the weights is missing as long as they are to be trained."""
    cache: Path
    """The file for the weights once they are trained."""
    classes: tuple[str, ...] | None = None
    """The names of the classes, by index, if they are known."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, one line each: what was taken, what was left out."""


def load_inputs(config: Config, runs: Path) -> Inputs:
    """Loads the model and its images, and makes its search space.

    Raises:
        VitfrontError: something is wrong with them, told in one line.
        SweepError: the recipe has fingerprints, and these inputs have others.
    """
    training = config.model.training
    torch.manual_seed(0 if training is None else training.seed)  # of the weights that no file gives
    model, notes = load_dense(config.model)
    anatomy = examine(model)
    space = Space(config.space, anatomy.depth, anatomy.exits, has_windows=anatomy.has_windows)
    spec = input_spec(config, default_input(model), anatomy.image_size, anatomy.in_channels)
    loaded = load_splits(config, spec, anatomy.num_classes)
    splits = loaded.splits
    hashes = hash_splits(splits)
    of_val = [*hashes["val"], *hashes.get("confirm", [])]
    remarks = check_shared({**hashes, "val": of_val}, config.data.shared_images)
    for name, images in by_name(splits).items():
        remarks += contradictory_labels(name, hashes[name], images.labels.tolist())
    fingerprints = fingerprints_of(config, model, spec, splits, hashes, loaded.class_names)
    cache = runs / ".cache" / f"{training_hash(config, fingerprints)}.safetensors"
    trained = config.model.training is None
    if not trained and cache.is_file():
        load_weights(model, _read_cached(cache), str(cache))
        trained = True
        fingerprints = with_weights(fingerprints, model)
    check_pinned(config, fingerprints)
    if config.data.noise and not trained:  # it would learn from the noisy images
        raise ConfigError("data.noise needs a dense model that is trained; run the recipe once without noise")
    noisy = _noisy(splits.training, splits.num_calibration, config.data.noise, config.data.seed)
    return Inputs(
        model=model, trained=trained, spec=spec, splits=replace(splits, training=noisy), space=space,
        fingerprints=fingerprints, cache=cache, classes=loaded.class_names or None,
        notes=(*notes, *_pixel_note(config, spec), *loaded.notes, *remarks),
    )  # fmt: skip


def _pixel_note(config: Config, spec: InputSpec) -> tuple[str, ...]:
    """Gives the remark on how images are made the model's input; none for the digits, which are taken as they are."""
    return () if config.data.dataset == "digits" else (f"pixels: {spec.summary()}",)


def check_pinned(config: Config, fingerprints: Fingerprints) -> None:
    """Compares inputs with the recipe's fingerprints, if it has any.

    Raises:
        SweepError: they differ; the message says in what.
    """
    if config.fingerprints is not None:
        check_unchanged(
            config.fingerprints, fingerprints, "the recipe's fingerprints are of other inputs",
            "take these with --set fingerprints=null",
        )  # fmt: skip


def _read_cached(path: Path) -> dict[str, torch.Tensor]:
    try:
        return read_weights(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remove it, and the model is trained again") from error


def input_spec(
    config: Config, model_default: dict[str, Any], image_size: tuple[int, int], num_channels: int
) -> InputSpec:
    """Gives the model's input: the recipe's values where it has any, else timm's.

    Raises:
        DataError: a model of another number of channels than images or than mean and std have.
        SettingError: a value out of its range.
    """
    if num_channels not in (1, 3):
        raise DataError(f"the model takes {num_channels} channels, but images are read with 1 (grey) or 3 (RGB)")
    names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    given = {name: value for name in names if (value := getattr(config.data, name)) is not None}
    settings = {name: model_default[name] for name in names} | given
    for name in ("mean", "std"):
        values = tuple(settings[name])
        if num_channels == 1 and name not in given and len(set(values)) == 1:
            values = values[:1]  # timm tells three equal ones for a model of one channel too
        settings[name] = values
    mean, std = settings["mean"], settings["std"]
    if len(mean) != num_channels or len(std) != num_channels:
        raise DataError(
            f"data.mean and data.std have {len(mean)} and {len(std)} channels, the model {num_channels}; "
            "give both as the model was trained with"
        )
    return InputSpec(size=image_size, exif=config.data.exif or "ignore", **settings)


def load_splits(config: Config, spec: InputSpec, num_classes: int) -> LoadedSplits:
    """Loads all images of a sweep; the training images are drawn by class and dealt to calibration and probe.

    Raises:
        DataError: classes that are not the model's, a split that is not there or is given twice, or too few images.
    """
    data = config.data
    dataset = open_dataset(
        data.dataset, num_classes=num_classes, root=data.root, class_map=data.class_map, class_order=data.class_order,
        train=data.train, download=data.download,
    )  # fmt: skip
    names = {f"data.{key}": getattr(data, key) for key in ("train", "val", "test") if getattr(data, key) is not None}
    check_splits_differ(dataset, names)

    def load(split: str, limit: int | None) -> LoadedSplit:
        return load_split(dataset, split, spec, limit=limit, seed=data.seed)

    wanted = data.calibration_images + data.probe_images
    train = load(data.train, wanted)
    count = len(train.images)
    num_calibration = round(count * data.calibration_images / wanted)
    if min(num_calibration, count - num_calibration) < 1:
        raise DataError(
            f"{count} training images are too few: data.calibration_images={data.calibration_images} and "
            f"data.probe_images={data.probe_images} would get {num_calibration} and {count - num_calibration} of them; "
            "give numbers that leave some to both"
        )
    val = load(data.val, data.val_images)
    confirm = None if data.confirm_images is None else load(data.val, data.confirm_images)
    test = None if data.test is None else load(data.test, data.test_images)
    splits = Splits(
        training=train.images,
        num_calibration=num_calibration,
        val=val.images,
        confirm=None if confirm is None else confirm.images,
        test=None if test is None else test.images,
    )
    notes = [note for part in (train, val, confirm, test) if part is not None for note in part.notes]
    if count < wanted:
        notes.append(
            f"{count} training images are fewer than data.calibration_images + data.probe_images: "
            f"{num_calibration} are for calibration, {count - num_calibration} to probe"
        )
    return LoadedSplits(splits=splits, class_names=train.class_names, notes=tuple(dict.fromkeys(notes)))


def _noisy(images: Images, count: int, std: float, seed: int) -> Images:
    """Adds Gaussian noise to the first `count` images; pixels stay whole numbers within their range.

    Args:
        std: in units of the pixels' range; 0 gives the images as they are, not copied.
    """
    if not std:
        return images
    first, later = images.pixels[:count], images.pixels[count:]
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed))
    noisy = (first + 255 * std * noise).round().clamp(0, 255).to(torch.uint8)
    return replace(images, pixels=torch.cat([noisy, later]))
