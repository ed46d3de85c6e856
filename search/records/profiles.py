"""Profiles on the disk: a dense model is profiled once for all sweeps with the same images and settings."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruning.data import Splits
from pruning.methods.profile import Profile
from pruning.plan import TokenReduction
from pruning.scores.curves import RemovalCurves
from search.config import Config
from search.errors import SweepError
from search.records.files import write_by

FORMAT = 2
"""The format of the files, a part of their names: a file of another format is not found, and measured anew."""


class ProfileCache:
    """The profiles of one dense model with certain images and settings."""

    def __init__(self, folder: Path, config: Config, weights: Mapping[str, Tensor], splits: Splits) -> None:
        """
        Args:
            folder: of the files; made when one is written.
            weights: of the dense model, once it is trained.
        """
        digest = hashlib.sha256(repr([config.model.name, config.model.args, config.cascade.batch_size]).encode())
        digest.update(config.measure.precision.encode())
        images = [tensor for part in (splits.calibration, splits.probe) for tensor in (part.pixels, part.labels)]
        for tensor in (*weights.values(), *images):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self._folder, self._key = folder, digest.hexdigest()[:16]

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
