"""Dense models by timm name and checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pruning.errors import CheckpointError, ModelError, first_line_of
from pruning.model.anatomy import SUPPORTED, examine


def create_model(
    name: str, *, args: Mapping[str, Any] | None = None, checkpoint: str | Path | None = None, pretrained: bool = False
) -> nn.Module:
    """Creates a dense model, in eval mode, float32, on the CPU.

    Args:
        name: timm's name.
        args: further arguments of `timm.create_model` (num_classes, img_size, depth, ...).
        checkpoint: weights to load, .safetensors or PyTorch; never unpickled beyond plain tensors.
        pretrained: load timm's own weights, from its hub.

    Raises:
        ModelError: an unknown name or argument, or a model of no supported family.
        CheckpointError: a missing file, or weights that do not fit (names the tensors).
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"supported is {SUPPORTED}"
        raise ModelError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **dict(args or {}))
    except Exception as error:  # unknown arguments are TypeErrors, a hub out of reach is any of a dozen errors
        raise ModelError(f"cannot create {name} with {dict(args or {})}: {first_line_of(error)}") from error
    examine(model)
    if checkpoint is not None:
        load_weights(model, read_weights(checkpoint), str(checkpoint))
    return model.eval()


def default_input(model: nn.Module) -> dict[str, Any]:
    """Returns timm's data configuration for the model: mean, std, interpolation, crop_pct, crop_mode, ..."""
    from timm.data import resolve_model_data_config

    settings: dict[str, Any] = resolve_model_data_config(model)
    return settings


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads tensors by name from a .safetensors or PyTorch file (unwraps `state_dict`, `model`, ...).

    Raises:
        CheckpointError: the file is missing or cannot be read.
    """
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        weights: dict[str, Tensor] = load_state_dict(str(path))
    except Exception as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {first_line_of(error)}") from error
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into the model, all of them, in the model's precision.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; nothing was loaded then.
    """
    model_state = model.state_dict()
    wrong = [
        f"{name} is {list(weights[name].shape)}, not {list(model_state[name].shape)}"
        for name in model_state
        if name in weights and weights[name].shape != model_state[name].shape
    ]
    wrong += [f"{name} is missing" for name in model_state if name not in weights]
    wrong += [f"{name} is unknown to the model" for name in weights if name not in model_state]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {'; '.join(wrong[:4])}{more}")
    with torch.no_grad():
        for name, tensor in model_state.items():
            tensor.copy_(weights[name])
