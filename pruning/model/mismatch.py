"""The reason why a checkpoint's weights do not fit a model, and what would."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pruning.model.candidates import Candidate
from pruning.model.loading import few, misfits, summary

HEADS = ("head.weight", "head.fc.weight")
"""Names of the classifier's weights, of a ViT and of a Swin."""

FOREIGN = {
    r"(^|\.)_packed_params\b|\.(SCB|qweight|weight_scale|quant_state)\b": "it is quantised: save the "
    "weights before that",
    r"(^|\.|_)lora_(A|B|up|down)\b": "it has LoRA layers: merge them into the weights first (peft: merge_and_unload)",
    r"(^|\.)embeddings\.(cls_token|patch_embeddings|position_embeddings)\b": "its names are those of Hugging Face's "
    "transformers: copy the weights into timm's model first",
    r"(^|\.)(encoder_layer_\d+|conv_proj)\.": "its names are those of torchvision: copy the weights into timm's model "
    "first",
}
"""Names in files of weights that are not for timm's models, as regular expressions -> what to do."""


def explain_mismatch(
    model: Any, path: Path, tried: Sequence[Candidate], mappings: Sequence[Candidate], names: Iterable[str]
) -> str:
    """Says why no weights of the file fit, by those that come nearest.

    Args:
        names: all names in the file.
    """
    state = model.state_dict()
    foreign = next(
        (f"; {hint}" for pattern, hint in FOREIGN.items() if any(map(re.compile(pattern).search, names))), ""
    )
    known = [candidate for candidate in tried if any(name in state for name in candidate.weights)]
    if not known:
        largest = max(mappings, key=lambda mapping: len(mapping.weights))
        return (
            f"{path} does not fit {type(model).__name__}: it has none of timm's names, as {few(list(state))}, but "
            f"{few([largest.prefix + name for name in largest.weights])}{foreign}"
        )
    nearest = min(known, key=lambda candidate: len(misfits(state, candidate.weights)))
    where = f" ({nearest.prefix.rstrip('.')})" if nearest.prefix else ""
    wrong = summary(misfits(state, nearest.weights))
    return f"{path}{where} does not fit {type(model).__name__}: {wrong}{foreign or _hint(model, nearest.weights)}"


def _hint(model: Any, weights: Mapping[str, Any]) -> str:
    """Names the arguments of the model with which the weights would fit, as far as they show."""
    hints = []
    state = model.state_dict()
    for name in HEADS:
        own, given = state.get(name), weights.get(name)
        if own is not None and isinstance(given, Tensor) and given.ndim == own.ndim and len(given) != len(own):
            hints.append(f"num_classes={len(given)}")
    if hints == [] and not any(name in weights for name in HEADS):
        return "; it has no classifier: give weights that were fine-tuned to tell classes apart"
    blocks = {int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))}
    if blocks and hasattr(model, "blocks") and max(blocks) + 1 != len(model.blocks):
        hints.append(f"depth={max(blocks) + 1}")
    hints += _sizes(model, weights)
    if "fc_norm.weight" in {*weights} ^ {*state} and "norm.weight" in {*weights} ^ {*state}:
        hints.append("global_pool=avg" if "fc_norm.weight" in weights else "global_pool=token")
    return f"; try {', '.join(hints)} in model.args" if hints else ""


def _sizes(model: Any, weights: Mapping[str, Any]) -> list[str]:
    """Lists the sizes of another first layer, where timm cannot convert it, as arguments of the model."""
    own, given = model.state_dict()["patch_embed.proj.weight"], weights.get("patch_embed.proj.weight")
    if not isinstance(given, Tensor) or given.ndim != own.ndim or given.shape[:2] == own.shape[:2]:
        return []
    (width, channels, *_), (own_width, own_channels, *_) = given.shape, own.shape
    hints = [f"in_chans={channels}"] if channels != own_channels else []
    if width != own_width:
        hints.append(f"embed_dim={width} with its num_heads")
    if given.shape[2:] != own.shape[2:]:
        hints.append(f"patch_size={given.shape[2]}")
    position = weights.get("pos_embed")
    if isinstance(position, Tensor) and position.ndim == 3 and position.shape[1] != model.pos_embed.shape[1]:
        side = math.isqrt(max(0, position.shape[1] - model.num_prefix_tokens))
        hints.append(f"img_size={side * given.shape[2]}")
    return hints
