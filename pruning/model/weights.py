"""Weights for a dense model: from a user's checkpoint or from timm's hub, and a note of what was taken."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv, deit, swin_transformer, vision_transformer
from torch import Tensor, nn

from pruning.errors import CheckpointError, ModelError, first_line_of
from pruning.model.candidates import (
    Candidate,
    are_equal,
    distinct,
    find_candidates,
    keys_of,
    outer_part,
    whole_mappings,
    with_key,
)
from pruning.model.checkpoint import Checkpoint, read_checkpoint
from pruning.model.loading import few, load_weights, misfits, summary
from pruning.model.mismatch import explain_mismatch

Filter = Callable[[dict[str, Any], nn.Module], dict[str, Any]]

_filter_vit = partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True)  # as timm's deit3_* have it
FILTERS: dict[type[nn.Module], Filter] = {
    vision_transformer.VisionTransformer: _filter_vit,
    deit.VisionTransformerDistilled: _filter_vit,
    swin_transformer.SwinTransformer: swin_transformer.checkpoint_filter_fn,
}
"""timm's own conversions: other image and patch sizes, and the names of the models' first authors."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


SOURCES = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of `timm.create_model` that say where timm's own weights come from."""


def load_checkpoint(model: nn.Module, path: str | Path, key: str | None = None) -> str:
    """Loads a user's weights into the model, all of them, in the model's precision, and says what was taken.

    Args:
        path: a .safetensors file or one of torch.save; no code in it is run.
        key: the set of weights to take where the file holds several: `state_dict`, `teacher`, `state_dict.model_ema`.
            By default the only one, or the one whose name has the word `ema`.

    Returns:
        One line.

    Raises:
        CheckpointError: the file cannot be read, or the weights do not fit (names the tensors).
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    state = model.state_dict()
    near = find_candidates(checkpoint, state)
    pool = near if key is None else with_key(near, key)
    fitting = [candidate for candidate in pool if not misfits(state, candidate.weights)]
    if not fitting:
        mappings = whole_mappings(checkpoint)
        others = mappings if key is None else with_key(mappings, key)
        if key is not None and not pool + others:
            keys = keys_of(near or mappings, near or mappings)
            raise CheckpointError(f"{path} has no weights {key!r} (model.checkpoint_key); it has {keys}")
        converted = [new for old in distinct(pool + others) if (new := _converted(model, old)) is not None]
        fitting = [candidate for candidate in converted if not misfits(state, candidate.weights)]
        if not fitting:
            raise CheckpointError(explain_mismatch(model, path, pool + converted, others, checkpoint.values))
    chosen = _choose(path, fitting, near)
    _check_values(chosen.weights, str(path))
    load_weights(model, chosen.weights, str(path))
    return _note(path, checkpoint, chosen, near)


def load_pretrained(model: nn.Module, name: str, args: Mapping[str, Any], *, new_classifier: bool = False) -> str:
    """Loads timm's own weights into the model, and says what was taken and what had to be changed.

    Args:
        name, args: as for `pruning.model.loading.create_model`, which made the model.
        new_classifier: leave the classifier as it is where timm's is for another number of classes.

    Returns:
        One line.

    Raises:
        ModelError: timm has no weights of that name, or they cannot be had.
        CheckpointError: they do not fit the model (names the tensors).
    """
    sources = {key: args[key] for key in SOURCES if key in args}
    if not sources and not timm.is_model_pretrained(name):
        raise ModelError(f"timm {timm.__version__} has no weights for {name}; give your own (model.checkpoint)")
    try:
        donor = timm.create_model(name, pretrained=True, **sources)
    except Exception as error:  # a hub out of reach is any of a dozen errors
        raise ModelError(
            f"cannot get timm's weights for {name}; give a file of them (model.checkpoint): {first_line_of(error)}"
        ) from error
    settings: Any = donor.pretrained_cfg
    source = ".".join(filter(None, [settings.get("architecture") or name, settings.get("tag")]))
    weights, changes = _adapted(model, donor.state_dict(), settings, new_classifier, f"timm's weights {source}")
    candidate: Candidate | None = Candidate("", "", weights)
    state = model.state_dict()
    if wrong := misfits(state, weights):
        candidate = _converted(model, Candidate("", "", weights))
        wrong = misfits(state, candidate.weights) if candidate else wrong
        if wrong or candidate is None:
            raise CheckpointError(f"timm's weights {source} do not fit: {summary(wrong)}")
    assert candidate is not None
    load_weights(model, candidate.weights, source)
    return "; ".join([f"weights: timm's {source}", *changes, *candidate.changes])


def _adapted(
    model: Any, weights: dict[str, Any], settings: Mapping[str, Any], new_classifier: bool, source: str
) -> tuple[dict[str, Any], list[str]]:
    """Gives timm's weights for the model's classes and input channels, and remarks."""
    changes = []
    names = settings.get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(classifiers)}
    rows = next((len(weights[name]) for name in own if name in weights), 0)
    if rows != model.num_classes:
        theirs = f"are for {rows} classes" if rows else "have no classifier"
        if not new_classifier:
            raise CheckpointError(
                f"{source} {theirs}, the model is for {model.num_classes}: its classifier would be random; train it "
                "(model.training), give your own weights (model.checkpoint), or leave out num_classes"
            )
        weights = {name: weights[name] for name in weights if not name.startswith(classifiers)} | own
        changes.append(f"the classifier is random, as they {theirs}")
    stem = f"{settings.get('first_conv')}.weight"
    if stem in weights and (channels := weights[stem].shape[1]) != model.patch_embed.proj.in_channels:
        inputs = model.patch_embed.proj.in_channels
        weights = weights | {stem: adapt_input_conv(inputs, weights[stem])}
        changes.append(f"{stem} changed from {channels} input channels to {inputs}")
    return weights, changes


def _converted(model: nn.Module, candidate: Candidate) -> Candidate | None:
    """Gives the weights by timm's conversion for the model; None where it does not know them."""
    tensors = {name: value for name, value in candidate.weights.items() if isinstance(value, Tensor)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm's own use of torch
        try:
            new = FILTERS[type(model)](dict(tensors), model)  # a copy, as it takes tensors out
        except Exception:  # whatever it meets in tensors that it was not written for
            return None
    return replace(candidate, weights=new, changes=_changes(tensors, new))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """Says in a few words what a conversion did."""
    taken = {value.data_ptr() for value in new.values()}
    source = {value.data_ptr() for value in old.values()}
    resized = [
        f"{name} resampled from {list(old[name].shape)} to {list(new[name].shape)}"
        for name in new
        if name in old and old[name].shape != new[name].shape
    ]
    kept = [name for name in new if name in old and old[name].shape == new[name].shape]
    remade = [f"{name} computed anew" for name in kept if old[name].data_ptr() != new[name].data_ptr()]
    renamed = [name for name in new if name not in old and new[name].data_ptr() in source]
    made = [f"{name} made up" for name in new if name not in old and new[name].data_ptr() not in source]
    dropped = [name for name in old if name not in new and old[name].data_ptr() not in taken]
    parts = [few(resized)] if resized else []
    parts += [few(remade + made)] if remade or made else []
    parts += [f"{len(renamed)} names changed to timm's"] if renamed else []
    parts += [f"left out: {few(dropped)}"] if dropped else []
    return tuple(parts)


def _is_ema(candidate: Candidate) -> bool:
    return re.search(r"(?<![a-z])ema(?![a-z])", candidate.prefix.lower()) is not None


def _choose(path: Path, fitting: Sequence[Candidate], near: Sequence[Candidate]) -> Candidate:
    """Chooses among sets of weights that fit: the moving average where there is one, as timm does; equal ones are one.

    Raises:
        CheckpointError: they differ, and nothing tells which is meant.
    """
    pool = [candidate for candidate in fitting if _is_ema(candidate)] or list(fitting)
    if not all(are_equal(pool[0], other) for other in pool[1:]):
        raise CheckpointError(
            f"{path} holds several weights for this model: {keys_of(pool, near)}; choose by model.checkpoint_key"
        )
    return pool[0]


def _check_values(weights: Mapping[str, Tensor], source: str) -> None:
    faults = [f"{name} {fault}" for name, tensor in weights.items() if (fault := _fault(tensor)) is not None]
    if faults:
        raise CheckpointError(
            f"{source} has tensors that are no weights: {summary(faults)}; save them dense, finite and in floating "
            "point (float32, float16, bfloat16), before any quantisation"
        )


def _fault(tensor: Tensor) -> str | None:
    """Says why a tensor is no weight; None where it is one."""
    if tensor.is_quantized or tensor.dtype not in FLOATS:
        return f"is {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.layout != torch.strided:
        return "is sparse"
    if tensor.is_meta:
        return "has no values (device meta)"
    if not (finite := tensor.float().isfinite()).all():
        return f"has {int((~finite).sum())} values of {tensor.numel()} that are NaN or infinite"
    return None


def _note(path: Path, checkpoint: Checkpoint, chosen: Candidate, near: Sequence[Candidate]) -> str:
    """Says in one line what was taken, what else could be, and what was left out."""
    outer = outer_part(chosen, near)
    inner = chosen.prefix[len(outer) :]
    note = f"weights: {outer.rstrip('.')}{' of ' if outer else ''}{path.name}"
    parts = [note + (f", without the prefix {inner}" if inner else ""), *chosen.changes]
    same = next((other for other in near if other.prefix == chosen.prefix), chosen)
    different = [other for other in near if other.prefix != chosen.prefix and not are_equal(same, other)]
    if different:
        parts.append(
            f"{keys_of(different, near)} {'are' if len(different) > 1 else 'is'} there too (model.checkpoint_key)"
        )
    taken = chosen.sources.union(*(other.sources for other in near))
    if left := [name for name, value in checkpoint.values.items() if isinstance(value, Tensor) and name not in taken]:
        parts.append(f"left out: {few(left)}")
    return "; ".join(parts)
