"""The folder of a sweep, runs/NAME: its paths, its settings and front read back, and the export of a model."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from pruning.artifact import copy_to, read_description
from pruning.fingerprints import fingerprint_of_record
from search.config import Config
from search.errors import ConfigError, SweepError
from search.front import Front
from search.outcome import Outcome
from search.records.files import write_atomically


class Folder:
    """The paths of a sweep's files."""

    def __init__(self, runs: Path, name: str) -> None:
        self.path = runs / name
        self.config = self.path / "config.yaml"
        self.ledger = self.path / "outcomes.jsonl"
        self.front = self.path / "front.json"
        self.table = self.path / "front.csv"
        self.models = self.path / "models"
        self.weights = self.path / "weights"
        """Folder for weights of trained models, as long as these may be on the front."""
        self.checkpoints = self.path / "checkpoints"
        """Folder for checkpoints of the trials that are training."""

    def weights_of(self, outcome_id: str) -> Path:
        """Returns the path of a trained model's weights."""
        return self.weights / f"{outcome_id}.safetensors"

    def read_config(self) -> Config:
        """Reads the settings that the sweep was started with.

        Raises:
            SweepError: there is no such sweep, or its settings cannot be read.
        """
        try:
            record = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise SweepError(f"cannot read {self.config}: it is not a recipe")
            return Config.from_dict(record)
        except FileNotFoundError:
            raise SweepError(f"no sweep {self.path.name!r} in {self.path.parent}{self._names_there()}") from None
        except ConfigError as error:  # of another version, or edited
            raise SweepError(f"cannot use {self.config}: {error}") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SweepError(f"cannot read {self.config}: {' '.join(str(error).split())}") from error

    def read_front(self) -> Front:
        """Reads the front that `write_front` left.

        Raises:
            SweepError: there is no such sweep, it has no front yet, or its front cannot be read.
        """
        try:
            return Front.from_json(json.loads(self.front.read_text(encoding="utf-8")))
        except FileNotFoundError:
            self.read_config()
            raise SweepError(f"sweep {self.path.name!r} has no front yet; `vitfront run` goes on with it") from None
        except (OSError, ValueError) as error:
            raise SweepError(f"cannot read {self.front}: {error}") from error

    def write_front(self, front: Front) -> None:
        """Writes front.json, wholly or not at all.

        Raises:
            SweepError: the disk refuses.
        """
        write_atomically(self.front, json.dumps(front.to_json(), indent=1))

    def _names_there(self) -> str:
        names = sorted(path.parent.name for path in self.path.parent.glob("*/config.yaml"))
        return f"; there are {', '.join(names)}" if names else "; `vitfront run` makes one"


def export(runs: Path, name: str, how: str, target: Path) -> Outcome:
    """Copies the model of a point of the front to a new folder; returns the point.

    Args:
        runs: folder of all sweeps.
        name: name of the sweep.
        how: `knee`, `fastest`, `most-accurate`, or the id of a point.
        target: folder to create for the model.

    Raises:
        SweepError: no such sweep or point, or its plan.json is not what the sweep wrote.
        ArtifactError: the model is missing or was overwritten; the folder is there already, or cannot be written.
    """
    folder = Folder(runs, name)
    front = folder.read_front()
    point = front.pick(how)
    _check_description(folder, front, point)
    copy_to(folder.models / point.id, target)
    return point


def _check_description(folder: Folder, front: Front, point: Outcome) -> None:
    """Raises SweepError if a model's plan.json is not of this point and of the inputs of the sweep."""
    path, model = folder.models / point.id, folder.read_config().model
    found = read_description(path)
    preprocessing = (front.fingerprints or {}).get("preprocessing")  # older sweeps have none
    wrong = {
        "model": (found.name, found.args) != (model.name, model.args),
        "input": preprocessing not in (None, fingerprint_of_record(found.input)),
        "plan": found.plan != point.plan,
    }
    if any(wrong.values()):
        what = ", ".join(key for key, is_wrong in wrong.items() if is_wrong)
        raise SweepError(f"{path / 'plan.json'} is not what its sweep wrote: its {what} changed since")
