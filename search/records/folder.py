"""runs/NAME: where everything of a sweep lies, and what is read from it once the sweep has a front."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from pruning.artifact import copy_to
from search.config import Config
from search.errors import SweepError
from search.front import Front
from search.outcome import Outcome
from search.records.files import write_atomically


class Folder:
    """The paths of a sweep. Reading fails with SweepError where the sweep or its front is not there."""

    def __init__(self, runs: Path, name: str) -> None:
        self.path = runs / name
        self.config = self.path / "config.yaml"
        self.ledger = self.path / "outcomes.jsonl"
        self.front = self.path / "front.json"
        self.table = self.path / "front.csv"
        self.models = self.path / "models"
        self.weights = self.path / "weights"
        """Of the models that were trained, while they may be on the front."""
        self.checkpoints = self.path / "checkpoints"
        """Of the trials that are training."""

    def weights_of(self, outcome_id: str) -> Path:
        return self.weights / f"{outcome_id}.safetensors"

    def read_config(self) -> Config:
        """The settings that the sweep was started with."""
        try:
            return Config.from_dict(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise SweepError(f"no sweep {self.path.name!r} in {self.path.parent}{self._others()}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SweepError(f"cannot read {self.config}: {' '.join(str(error).split())}") from error

    def read_front(self) -> Front:
        """The front that `write_front` left."""
        try:
            return Front.from_json(json.loads(self.front.read_text(encoding="utf-8")))
        except FileNotFoundError:
            self.read_config()
            raise SweepError(f"sweep {self.path.name!r} has no front yet; `vitfront run` goes on with it") from None
        except (OSError, ValueError) as error:
            raise SweepError(f"cannot read {self.front}: {error}") from error

    def write_front(self, front: Front) -> None:
        """Writes front.json, whole or not at all.

        Raises:
            SweepError: the disk refuses.
        """
        write_atomically(self.front, json.dumps(front.to_json(), indent=1))

    def _others(self) -> str:
        names = sorted(path.parent.name for path in self.path.parent.glob("*/config.yaml"))
        return f"; there are {', '.join(names)}" if names else "; `vitfront run` makes one"


def export(runs: Path, name: str, how: str, target: Path) -> Outcome:
    """Copies the model of a point of the front to a new folder; gives the point.

    Args:
        how: see `Front.pick`.

    Raises:
        SweepError: no such sweep or point.
        ArtifactError: the folder is there already, or cannot be written.
    """
    folder = Folder(runs, name)
    point = folder.read_front().pick(how)
    copy_to(folder.models / point.id, target)
    return point
