"""runs/NAME: where everything of a sweep lies, and what is read from it once the sweep has a front."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pruning.artifact import copy_to
from pruning.plan import Plan
from search.config import Config
from search.errors import SweepError
from search.front import accuracy_of, pick, within
from search.outcome import Candidate, Measurement, Outcome, State


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

    def read_front(self) -> dict[str, Any]:
        """What `front.json` holds."""
        try:
            record: dict[str, Any] = json.loads(self.front.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.read_config()
            raise SweepError(f"sweep {self.path.name!r} has no front yet; `vitfront run` goes on with it") from None
        except (OSError, ValueError) as error:
            raise SweepError(f"cannot read {self.front}: {error}") from error
        return record

    def _others(self) -> str:
        names = sorted(path.parent.name for path in self.path.parent.glob("*/config.yaml"))
        return f"; there are {', '.join(names)}" if names else "; `vitfront run` makes one"


def select(
    record: Mapping[str, Any], how: str | None, at_least: Mapping[str, float], at_most: Mapping[str, float]
) -> dict[str, Any]:
    """The front's record with only the points within the bounds, or only the one that is picked.

    Raises:
        SweepError: see `search.front.pick`.
    """
    front = [
        Outcome(
            id=point["id"],
            state=State.MEASURED,
            candidate=Candidate.from_json(point["candidate"]),
            plan=Plan.from_json(point["plan"]),
            measurement=Measurement(
                **{name: point[name] for name in Measurement.__dataclass_fields__ if name in point}
            ),
        )
        for point in record["points"]
    ]
    if how is None:
        left = within(front, at_least, at_most)
    else:
        left = (pick(front, how, at_least, at_most, accuracy_of(record)),)
    kept = {outcome.id for outcome in left}
    return {**record, "points": [point for point in record["points"] if point["id"] in kept]}


def export(runs: Path, name: str, how: str, target: Path) -> dict[str, Any]:
    """Copies the model of a point of the front to a new folder; gives the point.

    Raises:
        SweepError: no such sweep or point.
        ArtifactError: the folder is there already, or cannot be written.
    """
    folder = Folder(runs, name)
    point: dict[str, Any] = select(folder.read_front(), how, {}, {})["points"][0]
    copy_to(folder.models / point["id"], target)
    return point
