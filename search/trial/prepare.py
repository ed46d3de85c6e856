"""The preparation of a sweep: from a recipe's inputs to the context that all its trials share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pruning.artifact import save_weights
from pruning.data import Splits
from pruning.measure.stopwatch import keep_freed_memory, time_against_dense
from pruning.measure.widths import AllowedWidths, measure_allowed_widths
from pruning.methods.profile import Profile
from pruning.methods.profiling import measure_profile
from pruning.model.exits import fit_exits, truncate
from pruning.plan import TokenReduction
from pruning.repair.sensitivity import BlockSensitivity, measure_sensitivity
from search.config import Config
from search.method import METHODS
from search.outcome import Measurement
from search.space import Space
from search.trial.context import SUBSAMPLE, ModelTimer, TrialContext
from search.trial.fingerprinting import with_weights
from search.trial.first_look import FirstLook, local_device, look, tell
from search.trial.inputs import Inputs, check_pinned
from search.trial.measure import measurement_of, time_models

WidthTimer = Callable[..., tuple[AllowedWidths, ...]]
"""`pruning.measure.widths.measure_allowed_widths`, or a test's fake."""


def prepare(
    config: Config, inputs: Inputs, first: FirstLook, *, device: torch.device | None = None,
    exit_blocks: Sequence[int] | None = None, profiles: Mapping[TokenReduction, Profile] | None = None,
    timer: ModelTimer = time_against_dense, time_widths: WidthTimer = measure_allowed_widths,
) -> tuple[TrialContext, Measurement]:  # fmt: skip
    """Fits the exits and measures the dense model: once a sweep.

    Args:
        inputs: its model is trained, and moved in place.
        first: the first look at this model; its top-1 is not measured again.
        device: the device to work on; by default this machine's first GPU, or else the CPU.
        exit_blocks: the exits to fit; by default those of the inputs' space.
        profiles: known ones; if given, all of `profiled_reductions` are there in the end, else those a trial needs.
        timer: times models against the dense one, here and in all trials.
        time_widths: measures the allowed widths for `round_to: auto`.

    Returns:
        The context, and the dense model's measurement.

    Raises:
        VitfrontError: the dense model's features are not finite.
    """
    keep_freed_memory()
    model = inputs.model.to(device or local_device()).eval().requires_grad_(False)
    exit_blocks = inputs.space.exit_blocks if exit_blocks is None else exit_blocks
    exit_heads = fit_exits(
        model, inputs.splits.training, exit_blocks,
        epochs=config.exits.epochs, learning_rate=config.exits.learning_rate,
        distillation=config.exits.distillation, precision=first.precision, seed=config.data.seed,
    )  # fmt: skip
    context = TrialContext(
        config=config, model=model, exit_heads=exit_heads, splits=inputs.splits, precision=first.precision, profiles={},
        allowed_widths={}, sensitivities={}, timer=timer,
    )  # fmt: skip
    timing, _ = time_models(context, [], config.measure.num_rounds)
    dense = measurement_of(context, model, context.dense_plan, timing, known_top1=first.top1)
    anatomy = context.anatomy
    space = Space(config.space, anatomy.depth, anatomy.exits, has_windows=anatomy.has_windows)
    context = replace(context, sensitivities=_sensitivities(context, space))
    wanted = profiled_reductions(space) if profiles is not None or allocates_by_profile(space) else ()
    context = replace(context, profiles=_profiles(context, space, wanted, profiles or {}))
    return replace(context, allowed_widths=_allowed_widths(context, space, time_widths)), dense


def prepare_locally(
    config: Config, inputs: Inputs, say: Callable[[str], None], *, exit_blocks: Sequence[int] | None = None,
    timer: ModelTimer = time_against_dense, time_widths: WidthTimer = measure_allowed_widths,
) -> tuple[TrialContext, Measurement]:  # fmt: skip
    """Looks at the dense model and prepares a context in this process, on this machine's device.

    Weights that are trained are kept in the cache. The other arguments and what it returns are those of `prepare`.

    Args:
        say: called with each line on the dense model, before anything but its accuracy is measured.

    Raises:
        VitfrontError: what `look` and `prepare` raise, or the dense model is not to be pruned.
    """
    first = look(config, inputs)
    if not inputs.trained:
        keep_trained(inputs, inputs.model)
        check_pinned(config, with_weights(inputs.fingerprints, inputs.model))
    tell(first, inputs.notes, say)
    return prepare(config, inputs, first, exit_blocks=exit_blocks, timer=timer, time_widths=time_widths)


def keep_trained(inputs: Inputs, model: nn.Module) -> None:
    """Writes the weights of the dense model, which are trained now, into the cache."""
    save_weights(model.state_dict(), inputs.cache)


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
