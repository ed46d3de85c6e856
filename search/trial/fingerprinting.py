"""The fingerprints of a sweep's inputs: what it was made from, told from what is there now."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch import nn

from pruning.data import Images, InputSpec, Splits
from pruning.fingerprints import (
    fingerprint_of_images,
    fingerprint_of_record,
    fingerprint_of_text,
    fingerprint_of_weights,
    image_hashes,
)
from search.config import Config, Fingerprints
from search.errors import SweepError


def fingerprints_of(
    config: Config, model: nn.Module, spec: InputSpec, splits: Splits, hashes: Mapping[str, list[bytes]],
    class_names: Sequence[str] = (),
) -> Fingerprints:  # fmt: skip
    """Hashes the inputs of a sweep.

    Args:
        model: with its final weights, or with those that its training starts from if the recipe has one.
        splits: the images, without noise.
        hashes: split -> hash of each of its images.
        class_names: by index, as far as the data set has names.
    """
    weights = fingerprint_of_weights(model.state_dict())
    has_training = config.model.training is not None
    return Fingerprints(
        weights=None if has_training else weights,
        first_weights=weights if has_training else None,
        classes=fingerprint_of_text("\n".join(class_names)) if class_names else None,
        preprocessing=fingerprint_of_record(spec),
        **{name: fingerprint_of_images(hashes[name], images.labels) for name, images in by_name(splits).items()},
    )


def hash_splits(splits: Splits) -> dict[str, list[bytes]]:
    """Hashes each image of the splits that there are, by the splits' names in `Fingerprints`."""
    return {name: image_hashes(images.pixels) for name, images in by_name(splits).items()}


def by_name(splits: Splits) -> dict[str, Images]:
    """Gives the splits that there are by their names in `Fingerprints`."""
    of_name = {"train": splits.training, "val": splits.val, "confirm": splits.confirm, "test": splits.test}
    return {name: images for name, images in of_name.items() if images is not None}


def with_weights(fingerprints: Fingerprints, model: nn.Module) -> Fingerprints:
    """Adds the hash of the dense model's weights, once they are final."""
    return fingerprints.model_copy(update={"weights": fingerprint_of_weights(model.state_dict())})


def check_unchanged(before: Fingerprints, now: Fingerprints, what: str, way_out: str) -> None:
    """Compares the inputs of an earlier run with those of now.

    Args:
        what: beginning of the message.
        way_out: end of the message: what to do where the change is meant.

    Raises:
        SweepError: they differ; the message says in what.
    """
    changes = before.changes(now)
    if changes:
        raise SweepError(f"{what}: {', '.join(changes)} changed meanwhile; put back what was there, or {way_out}")


def training_hash(config: Config, fingerprints: Fingerprints) -> str:
    """Hashes all that the trained weights depend on."""
    model = config.model.model_dump(mode="json", include={"name", "args", "training"})
    inputs = fingerprints.model_dump(include={"first_weights", "preprocessing", "train"})
    return fingerprint_of_text(json.dumps([model, inputs], sort_keys=True))[:16]
