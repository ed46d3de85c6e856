"""Profiles on the disk: a dense model is profiled once for all sweeps with the same images and settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pruning.data import Splits
from pruning.fingerprints import fingerprint_of_text
from pruning.methods.profile import Profile
from pruning.plan import TokenReduction
from pruning.scores.curves import RemovalCurves
from search.config import Config, Fingerprints
from search.errors import SweepError
from search.records.files import write_by

FORMAT = 3
"""The format of the files, a part of their names: a file of another format is not found, and measured anew."""


class ProfileCache:
    """The profiles of one dense model with certain images and settings."""

    def __init__(self, folder: Path, config: Config, fingerprints: Fingerprints, splits: Splits) -> None:
        """
        Args:
            folder: of the files; made when one is written.
            fingerprints: of the weights, once they are trained, and of the images.
            splits: the images, for how they are dealt to calibration and probe.
        """
        inputs = fingerprints.model_dump(include={"weights", "preprocessing", "train"})
        dealt = [splits.num_calibration, splits.every, config.data.noise, config.data.seed]
        settings = [config.model.name, config.model.args, config.cascade.batch_size, config.measure.precision]
        self._folder = folder
        self._key = fingerprint_of_text(json.dumps([inputs, dealt, settings], sort_keys=True))[:16]

    def read(self, kinds: Collection[TokenReduction]) -> dict[TokenReduction, Profile]:
        """Reads the profiles of these token reductions, as far as they were written before.

        Raises:
            SweepError: a file cannot be read.
        """
        profiles: dict[TokenReduction, Profile] = {}
        for kind in kinds:
            path = self._path(kind)
            if not path.is_file():
                continue
            try:
                profiles[kind] = _from_plain(torch.load(path, weights_only=True))
            except Exception as error:  # unpickling has errors of its own, of many lines
                raise SweepError(f"{path} holds no profile; remove it, and it is made again") from error
        return profiles

    def write(self, profiles: Mapping[TokenReduction, Profile]) -> None:
        """Writes the profiles that are not there yet.

        Raises:
            SweepError: the disk refuses.
        """
        for kind, profile in profiles.items():
            if not self._path(kind).is_file():
                write_by(self._path(kind), partial(_save, profile))

    def _path(self, kind: TokenReduction) -> Path:
        return self._folder / f"profile{FORMAT}-{self._key}-{kind}.pt"


def _save(profile: Profile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(asdict(profile), path)


def _from_plain(record: dict[str, Any]) -> Profile:
    """Makes a profile of nested dicts and tensors, as `asdict` gives them."""
    channels = tuple(RemovalCurves(**curves) for curves in record["channels"])
    return Profile(**record | {"channels": channels, "tokens": tuple(map(tuple, record["tokens"]))})
