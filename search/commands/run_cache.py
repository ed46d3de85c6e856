"""Steps of the preparation on the disk: a dense model is prepared once for all sweeps with the same inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pruning.data import Splits
from pruning.fingerprints import fingerprint_of_text
from pruning.measure.widths import AllowedWidths
from pruning.methods.profile import Profile
from pruning.repair.sensitivity import BlockSensitivity, StreamSensitivity
from pruning.scores.curves import RemovalCurves
from search.config import Config, Fingerprints
from search.errors import SweepError
from search.records.files import write_by
from search.trial.context import ContextPart
from search.trial.prepare import Step

FORMAT = 4
"""The format of the files and of what they mean, a part of their names: others are not found, and measured anew."""


class PartCache:
    """The products of the steps that prepare one dense model with certain images and settings."""

    def __init__(
        self, folder: Path, config: Config, fingerprints: Fingerprints, splits: Splits, exit_blocks: Sequence[int],
        device: str,
    ) -> None:  # fmt: skip
        """
        Args:
            folder: of the files; made when one is written.
            fingerprints: of the weights, once they are trained, and of the images.
            splits: the images, for how they are dealt to calibration and probe.
            exit_blocks: the exits that are fitted.
            device: name of the device that widths are timed on.
        """
        inputs = fingerprints.model_dump(include={"weights", "preprocessing", "train"})
        dealt = [splits.num_calibration, splits.every, config.data.noise, config.data.seed]
        settings = [config.model.name, config.model.args, config.cascade.batch_size, config.measure.precision]
        self._folder = folder
        self._all = [inputs, dealt, settings]
        self._exits = [config.exits.model_dump(), list(exit_blocks)]
        self._timed = [device, config.measure.batch_size, config.resources.model_dump()]

    def read(self, step: Step) -> ContextPart | None:
        """Reads what a step measured before; None if it was not run.

        Raises:
            SweepError: the file cannot be read.
        """
        path = self._path(step)
        if not path.is_file():
            return None
        try:
            return _from_plain(torch.load(path, weights_only=True))
        except Exception as error:  # unpickling has errors of its own, of many lines
            raise SweepError(f"{path} holds no {step.kind}; remove it, and it is made again") from error

    def write(self, step: Step, part: ContextPart) -> None:
        """Writes what a step measured, if it is not there yet.

        Raises:
            SweepError: the disk refuses.
        """
        if not self._path(step).is_file():
            write_by(self._path(step), partial(_save, part))

    def _path(self, step: Step) -> Path:
        depends_on: dict[str, list[Any]] = {
            "exits": self._exits, "sensitivity": self._exits, "widths": self._timed, "curves": [],
            "profile": [],
        }  # fmt: skip
        key = fingerprint_of_text(json.dumps([self._all, depends_on[step.kind]], sort_keys=True))[:16]
        return self._folder / f"{step.id}{FORMAT}-{key}.pt"


def _save(part: ContextPart, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(asdict(part), path)


def _from_plain(record: dict[str, Any]) -> ContextPart:
    """Makes a part of nested dicts, lists and tensors, as `asdict` gives them."""
    return ContextPart(
        exit_heads=record["exit_heads"],
        sensitivities={
            block: [
                BlockSensitivity(**{place: StreamSensitivity(**one) for place, one in places.items()})
                for places in blocks
            ]
            for block, blocks in record["sensitivities"].items()
        },
        channel_curves=_curves(record["channel_curves"]),
        profiles={kind: _profile(profile) for kind, profile in record["profiles"].items()},
        allowed_widths={
            kind: tuple(AllowedWidths(**widths) for widths in blocks)
            for kind, blocks in record["allowed_widths"].items()
        },
    )


def _profile(record: dict[str, Any]) -> Profile:
    return Profile(**record | {"channels": _curves(record["channels"]), "tokens": tuple(map(tuple, record["tokens"]))})


def _curves(records: Sequence[dict[str, Any]]) -> tuple[RemovalCurves, ...]:
    return tuple(RemovalCurves(**curves) for curves in records)
