"""The preparation of a sweep: from a recipe's inputs to the context that all its trials share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pruning.artifact import save_weights
from pruning.data import Splits
from pruning.measure.stopwatch import fastest_precision, keep_freed_memory, time_against_dense
from pruning.measure.widths import AllowedWidths, measure_allowed_widths
from pruning.methods.profile import Profile
from pruning.methods.profiling import measure_profile
from pruning.model.exits import fit_exits, truncate
from pruning.plan import TokenReduction
from pruning.precision import Precision
from pruning.repair.sensitivity import BlockSensitivity, measure_sensitivity
from pruning.training import train
from search.config import Config
from search.method import METHODS
from search.outcome import Measurement
from search.space import Space
from search.trial.context import SUBSAMPLE, ModelTimer, TrialContext, lease_on
from search.trial.inputs import Inputs
from search.trial.measure import measurement_of, time_models

WidthTimer = Callable[..., tuple[AllowedWidths, ...]]
"""`pruning.measure.widths.measure_allowed_widths`, or a test's fake."""


def prepare(
    config: Config, inputs: Inputs, *, device: torch.device | None = None, exit_blocks: Sequence[int] | None = None,
    profiles: Mapping[TokenReduction, Profile] | None = None, timer: ModelTimer = time_against_dense,
    time_widths: WidthTimer = measure_allowed_widths,
) -> tuple[TrialContext, Measurement]:  # fmt: skip
    """Trains the dense model if the recipe says so, fits the exits and measures the dense model: once a sweep.

    Args:
        inputs: its model is moved and trained in place.
        device: the device to work on; by default this machine's first GPU, or else the CPU.
        exit_blocks: the exits to fit; by default those of the inputs' space.
        profiles: known ones; if given, all of `profiled_reductions` are there in the end, else those a trial needs.
        timer: times models against the dense one, here and in all trials.
        time_widths: measures the allowed widths for `round_to: auto`.

    Returns:
        The context, and the dense model's measurement.

    Raises:
        VitfrontError: the training diverged, or the dense model's logits are not finite.
    """
    keep_freed_memory()
    model = _trained(config, inputs, device or local_device())
    precision = _precision(config, model, inputs.splits)
    exit_blocks = inputs.space.exit_blocks if exit_blocks is None else exit_blocks
    exit_heads = fit_exits(
        model, inputs.splits.training, exit_blocks,
        epochs=config.exits.epochs, learning_rate=config.exits.learning_rate,
        distillation=config.exits.distillation, precision=precision, seed=config.data.seed,
    )  # fmt: skip
    context = TrialContext(
        config=config, model=model, exit_heads=exit_heads, splits=inputs.splits, precision=precision, profiles={},
        allowed_widths={}, sensitivities={}, timer=timer,
    )  # fmt: skip
    timing, _ = time_models(context, [], config.measure.num_rounds)
    dense = measurement_of(context, model, context.dense_plan, timing)
    anatomy = context.anatomy
    space = Space(config.space, anatomy.depth, anatomy.exits, has_windows=anatomy.has_windows)
    context = replace(context, sensitivities=_sensitivities(context, space))
    wanted = profiled_reductions(space) if profiles is not None or allocates_by_profile(space) else ()
    context = replace(context, profiles=_profiles(context, space, wanted, profiles or {}))
    return replace(context, allowed_widths=_allowed_widths(context, space, time_widths)), dense


def prepare_locally(
    config: Config, inputs: Inputs, *, exit_blocks: Sequence[int] | None = None, timer: ModelTimer = time_against_dense,
    time_widths: WidthTimer = measure_allowed_widths,
) -> tuple[TrialContext, Measurement]:  # fmt: skip
    """Prepares a context in this process, on this machine's device, and keeps weights that it trained in the cache.

    The arguments and what it returns and raises are those of `prepare`.
    """
    context, dense = prepare(config, inputs, exit_blocks=exit_blocks, timer=timer, time_widths=time_widths)
    keep_trained(inputs, context)
    return context, dense


def keep_trained(inputs: Inputs, context: TrialContext) -> None:
    """Writes the dense model's weights into the cache, unless they were final before."""
    if not inputs.trained:
        save_weights(context.model.state_dict(), inputs.cache)


def local_device() -> torch.device:
    """Gives the device of this machine: its first GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def profiled_reductions(space: Space) -> tuple[TokenReduction, ...]:
    """Gives the token reductions for which the dense model is profiled.

    A method that allocates by profiles needs one for each. Where the cascade alone begins with what a profile proposes,
    one will do.
    """
    if allocates_by_profile(space):
        return space.token_reduction
    return space.token_reduction[:1] if any(METHODS[name].has_budgets for name in space.method) else ()


def profile_splits(space: Space, splits: Splits) -> Splits:
    """Gives the images that profiles are taken on: all if a method allocates by them, a part if they only propose."""
    return splits if allocates_by_profile(space) else splits.thinned(SUBSAMPLE)


def allocates_by_profile(space: Space) -> bool:
    """Tells whether a method of the space allocates by profiles of the dense model."""
    return any(METHODS[name].needs_profile for name in space.method)


def _trained(config: Config, inputs: Inputs, device: torch.device) -> nn.Module:
    """Gives the dense model on the device, in eval mode, without gradients."""
    model: nn.Module = inputs.model.to(device)
    if config.model.training is not None and not inputs.trained:
        train(model, inputs.splits.training, config.model.training.settings())
    return model.eval().requires_grad_(False)


def _precision(config: Config, model: nn.Module, splits: Splits) -> Precision:
    if config.measure.precision != "auto":
        return config.measure.precision
    device = next(model.parameters()).device
    batch = splits.val.normalized(slice(0, config.measure.batch_size), device)
    with lease_on(device).exclusive():
        return fastest_precision(model, batch)


def _sensitivities(context: TrialContext, space: Space) -> dict[int, list[BlockSensitivity]]:
    """Measures the sensitivity of the dense model cut at every exit, if a method repairs in closed form."""
    if not any(METHODS[name].repairs for name in space.method):
        return {}
    return {
        exit_block: measure_sensitivity(
            truncate(context.model, exit_block, head), context.splits.calibration, **_batches(context)
        )
        for exit_block, head in context.exit_heads.items()
    }


def _profiles(
    context: TrialContext, space: Space, reductions: Sequence[TokenReduction],
    known: Mapping[TokenReduction, Profile],
) -> dict[TokenReduction, Profile]:  # fmt: skip
    """Gives the known profiles, and measures those that are missing."""
    splits, depth = profile_splits(space, context.splits), context.anatomy.depth
    missing = {
        reduction: measure_profile(
            context.model, splits.calibration, splits.probe, token_reduction=reduction,
            sensitivity=context.sensitivities.get(depth), **_batches(context),
        )
        for reduction in reductions
        if reduction not in known
    }  # fmt: skip
    return {**known, **missing}


def _allowed_widths(
    context: TrialContext, space: Space, time_widths: WidthTimer
) -> dict[TokenReduction, tuple[AllowedWidths, ...]]:
    """Measures the allowed widths of every block, for each token reduction that a candidate may have."""
    if "auto" not in space.round_to:
        return {}
    tokenless: tuple[TokenReduction, ...] = ("none",)
    if all(METHODS[name].takes_tokens for name in space.method):
        tokenless = ()
    batch_size = context.config.measure.batch_size
    with context.lease.exclusive():
        return {
            reduction: time_widths(context.model, batch_size, token_reduction=reduction, precision=context.precision)
            for reduction in dict.fromkeys(space.token_reduction + tokenless)
        }


def _batches(context: TrialContext) -> dict[str, Any]:
    return {"batch_size": context.config.cascade.batch_size, "precision": context.precision}
