"""Dense models by timm name, and vitfront's own files of weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import model_entrypoint
from torch import Tensor, nn

from pruning.errors import CheckpointError, ModelError, first_line_of
from pruning.fingerprints import fingerprint_of_weights
from pruning.model.anatomy import SUPPORTED, examine

FAMILIES = ("timm.models.vision_transformer", "timm.models.deit", "timm.models.swin_transformer")
"""The modules of timm that have models which can be pruned."""

WHOLE_NUMBERS = {
    "img_size": 1, "patch_size": 1, "window_size": 1, "in_chans": 1, "embed_dim": 1, "depth": 1, "depths": 1,
    "num_heads": 1, "num_classes": 0, "reg_tokens": 0,
}  # fmt: skip
"""Arguments that are whole numbers, or a list of them, and the smallest that makes sense."""

OTHER_KEYS = {
    "checkpoint_path": "give the file as model.checkpoint",
    "pretrained": "give model.pretrained",
    "device": "models are made on the CPU",
    "dtype": "models are made in float32; measure.precision says in which they run",
}
"""Arguments of timm that vitfront has under another name, or decides itself."""


def create_model(name: str, *, args: Mapping[str, Any] | None = None) -> nn.Module:
    """Creates a dense model with random weights, in eval mode, float32, on the CPU.

    `pruning.model.weights` loads a checkpoint, or timm's own weights, into it.

    Args:
        name: timm's name.
        args: further arguments of `timm.create_model` (num_classes, img_size, depth, ...).

    Raises:
        ModelError: an unknown name or argument, or a model of no supported family.
    """
    args = dict(args or {})
    _check_name(name)
    _check_args(args)
    try:
        model: nn.Module = timm.create_model(name, **args)
    except Exception as error:  # unknown arguments are TypeErrors, wrong ones any of a dozen errors
        raise ModelError(f"cannot create {name} with {args}: {first_line_of(error)}") from error
    examine(model)
    return model.eval()


def _check_name(name: str) -> None:
    """Refuses unknown names, and timm's other families before their arguments are blamed."""
    if not timm.is_model(name):
        last = name.rsplit("/", 1)[-1]  # of hf-hub:timm/...
        close = [last] if timm.is_model(last) else _close_names(name)
        hint = f"did you mean {', '.join(close)}?" if close else f"supported is {SUPPORTED}"
        raise ModelError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    module = model_entrypoint(name).__module__
    if module.startswith("timm.models.") and module not in FAMILIES:  # models of others are known once they are made
        raise ModelError(f"{name} ({module}) is not a model that can be pruned; supported is {SUPPORTED}")


def _close_names(name: str) -> list[str]:
    """Gives up to three of timm's names that may be meant, of models that can be pruned."""
    names = timm.list_models(module=[family.rsplit(".", 1)[-1] for family in FAMILIES])
    longer = [each for each in names if each.startswith(name)]
    return longer[:3] or difflib.get_close_matches(name, names, n=3)


def _check_args(args: Mapping[str, Any]) -> None:
    """Refuses arguments that timm would take in silence, or refuse without their name."""
    for key, way_out in OTHER_KEYS.items():
        if key in args:
            raise ModelError(f"the model's args have {key}; {way_out}")
    for key, smallest in WHOLE_NUMBERS.items():
        value = args.get(key)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is not None and (
                isinstance(number, bool) or not isinstance(number, Integral) or int(number) < smallest
            ):
                raise ModelError(f"the model's {key} is {value!r}; give whole numbers of at least {smallest}")


def default_input(model: nn.Module) -> dict[str, Any]:
    """Returns timm's data configuration for the model: mean, std, interpolation, crop_pct, crop_mode, ..."""
    from timm.data import resolve_model_data_config

    settings: dict[str, Any] = resolve_model_data_config(model)
    return settings


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads weights that vitfront wrote itself: the file of `pruning.artifact.save_weights`.

    Raises:
        CheckpointError: the file is missing, cannot be read, or was overwritten since.
    """
    try:
        with safe_open(path, "pt") as file:
            fingerprint = (file.metadata() or {}).get("fingerprint")
        weights = load_file(path)
    except Exception as error:  # safetensors has its own error type
        raise CheckpointError(f"cannot read weights {path}: {first_line_of(error)}") from error
    if fingerprint_of_weights(weights) != fingerprint:
        raise CheckpointError(f"{path} is not what vitfront wrote there: its weights changed since")
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into the model, all of them, in the model's precision.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; nothing was loaded then.
    """
    state = model.state_dict()
    if wrong := misfits(state, weights):
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {summary(wrong)}")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(weights[name])


def misfits(state: Mapping[str, Tensor], weights: Mapping[str, Any]) -> list[str]:
    """Says of each tensor that is missing, unknown, of another shape or none at all what is wrong with it."""
    wrong = []
    for name, target in state.items():
        weight = weights.get(name)
        if name not in weights:
            wrong.append(f"{name} is missing")
        elif not isinstance(weight, Tensor) or weight.is_nested:
            wrong.append(f"{name} is {'None' if weight is None else type(weight).__name__}, not a plain tensor")
        elif weight.shape != target.shape:
            wrong.append(f"{name} is {list(weight.shape)}, not {list(target.shape)}")
    wrong.sort(key=lambda text: text.endswith("missing"))  # shapes first: they tell more
    return wrong + [f"{name} is unknown to the model" for name in weights if name not in state]


def summary(items: Sequence[str], count: int = 4, separator: str = "; ") -> str:
    """Joins the first few items, with the number of the others."""
    more = f", and {len(items) - count} more" if len(items) > count else ""
    return separator.join(items[:count]) + more


def few(names: Sequence[str]) -> str:
    """Joins the first two names, with the number of the others."""
    return summary(names, 2, ", ")
