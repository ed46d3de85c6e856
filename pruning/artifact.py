"""A pruned model on disk: plan.json (its description) and model.safetensors (its weights). No pickle.

plan.json: {"format": 3, "model": {"name", "args"}, "input": {"size", "mean", "std", ...}, "plan": {...},
"weights": the fingerprint of model.safetensors}. Weights that were overwritten since are refused.
Format 2 has no `crop_mode` and no `exif` in "input": they were `center` and `ignore`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pruning.data import InputSpec
from pruning.errors import ArtifactError, PlanError, SettingError, VitfrontError, first_line_of
from pruning.fingerprints import fingerprint_of_weights
from pruning.model.exits import truncate
from pruning.model.loading import create_model, load_weights
from pruning.model.surgery import apply_plan
from pruning.plan import Plan

FORMAT = 3
KNOWN_FORMATS = (2, FORMAT)

Weights = Mapping[str, Tensor]
"""A model's tensors by their names in it."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The description of a saved model: everything but its weights."""

    name: str
    """The name of the dense model in timm."""
    args: Mapping[str, Any]
    """The further arguments of `timm.create_model` for the dense model."""
    input: InputSpec
    """The images that the model takes."""
    plan: Plan
    """The plan by which the dense model was pruned."""
    weights: str | None = field(default=None, compare=False)
    """The fingerprint of the weights, which `save` adds; None for a model that an older version saved."""

    def to_json(self) -> dict[str, Any]:
        """Returns the record that plan.json holds."""
        return {
            "format": FORMAT,
            "model": {"name": self.name, "args": dict(self.args)},
            "input": asdict(self.input),
            "plan": self.plan.to_json(),
            "weights": self.weights,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Description:
        """Reads the description that `to_json` wrote.

        Raises:
            ArtifactError: another format, or anything else that `to_json` does not write.
        """
        try:
            if record.get("format") not in KNOWN_FORMATS:
                known = " or ".join(map(str, KNOWN_FORMATS))
                raise ArtifactError(f"its format is {record.get('format')}, not {known}, the ones known here")
            spec: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in record["input"].items()
            }
            model = record["model"]
            plan = Plan.from_json(record["plan"])
            return cls(
                name=model["name"], args=dict(model["args"]), input=InputSpec(**spec), plan=plan,
                weights=record.get("weights"),
            )  # fmt: skip
        except (AttributeError, KeyError, TypeError, PlanError, SettingError) as error:
            raise ArtifactError(f"not what is saved with a model: {type(error).__name__} {error}") from None


def save(model: nn.Module, description: Description, folder: str | Path) -> None:
    """Saves a model in a folder, completely or not at all; an existing folder is replaced.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
            fresh = Path(staging) / "fresh"
            fresh.mkdir()
            weights = _contiguous(model.state_dict())
            save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
            described = replace(description, weights=fingerprint_of_weights(weights))
            (fresh / "plan.json").write_text(json.dumps(described.to_json()) + "\n", encoding="utf-8")
            if folder.exists():
                os.replace(folder, Path(staging) / "old")
            os.replace(fresh, folder)
    except Exception as error:  # safetensors has an error type of its own for a full disk
        raise ArtifactError(f"cannot write {folder}: {error}") from error


def load(folder: str | Path) -> tuple[nn.Module, Description]:
    """Loads a saved model, in eval mode on the CPU, and its description.

    Raises:
        ArtifactError: a file is missing or is not what `save` wrote.
    """
    folder = Path(folder)
    description, weights = read_description(folder), _read_weights(folder)
    try:
        model = skeleton(description)
        load_weights(model, weights, "its model.safetensors")
    except VitfrontError as error:
        raise ArtifactError(f"cannot load {folder}: {error}") from error
    _check_weights(folder, weights, description)
    return model.eval(), description


def read_description(folder: Path) -> Description:
    """Reads the description of a saved model from its plan.json.

    Raises:
        ArtifactError: it is missing or is not what `save` wrote.
    """
    path = folder / "plan.json"
    try:
        return Description.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # not UTF-8, not JSON, not a description
        raise ArtifactError(f"cannot read {path}: {error}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    try:
        return load_file(path)
    except Exception as error:  # safetensors has error types of its own
        raise ArtifactError(f"cannot read {path}: {first_line_of(error)}") from error


def _check_weights(folder: Path, weights: Weights, description: Description) -> None:
    """Raises ArtifactError if weights are not those that were saved with plan.json."""
    if description.weights is not None and fingerprint_of_weights(weights) != description.weights:
        raise ArtifactError(
            f"{folder / 'model.safetensors'} is not what was saved with its plan.json: its weights changed since"
        )


def skeleton(description: Description) -> nn.Module:
    """Creates the model with random weights: timm's dense model, cut and pruned by the plan."""
    dense = create_model(description.name, args=description.args)
    return apply_plan(truncate(dense, description.plan.exit_block), description.plan)


def save_weights(weights: Weights, path: Path) -> None:
    """Saves a model's weights alone, completely or not at all; `pruning.model.loading.read_weights` reads them.

    Raises:
        ArtifactError: the file cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = _contiguous(weights)
        save_file(whole, draft, metadata={"fingerprint": fingerprint_of_weights(whole)})
        os.replace(draft, path)
    except Exception as error:  # safetensors has an error type of its own for a full disk
        with contextlib.suppress(OSError):  # where its folder could not be made, there is no draft
            draft.unlink()
        raise ArtifactError(f"cannot write {path}: {error}") from error


def _contiguous(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def copy_to(folder: str | Path, target: str | Path) -> None:
    """Copies a saved model into a folder that is not there yet.

    Raises:
        ArtifactError: the model is missing or not what `save` wrote, or the target is there already or cannot be
            written.
    """
    folder, target = Path(folder), Path(target)
    if target.exists():
        raise ArtifactError(f"{target} exists; give a folder that does not")
    _check_weights(folder, _read_weights(folder), read_description(folder))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as staging:
            os.replace(shutil.copytree(folder, Path(staging) / "fresh"), target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error}") from error
