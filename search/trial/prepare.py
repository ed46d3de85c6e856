"""The preparation of a sweep, in steps: all that is measured once of the dense model, for every trial.

Each step gives a part of the context. Most steps need no other, so that the workers of a sweep share them, and trials
that need none of them go on beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pruning.artifact import save_weights
from pruning.data import Splits
from pruning.measure.stopwatch import keep_freed_memory, time_against_dense
from pruning.measure.widths import AllowedWidths, measure_allowed_widths
from pruning.methods.profiling import measure_channel_curves, measure_profile, measure_token_costs
from pruning.model.exits import exit_head_of, fit_exits, truncate
from pruning.plan import TokenReduction
from pruning.precision import Precision
from pruning.repair.sensitivity import measure_sensitivity
from pruning.scores.curves import RemovalCurves
from search.config import Config
from search.method import METHODS, Method
from search.outcome import Candidate, Measurement
from search.space import Space
from search.trial.context import SUBSAMPLE, ContextPart, ModelTimer, TrialContext
from search.trial.fingerprinting import with_weights
from search.trial.first_look import FirstLook, local_device, look, tell
from search.trial.inputs import Inputs, check_pinned
from search.trial.measure import measurement_of, time_models

WidthTimer = Callable[..., tuple[AllowedWidths, ...]]
"""`pruning.measure.widths.measure_allowed_widths`, or a test's fake."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the preparation."""

    kind: Literal["exits", "sensitivity", "widths", "curves", "profile"]
    """Thing that is measured: the classifiers of all exits, the sensitivities of the model cut at one exit, the part of
    all profiles that is about channels, or the allowed widths or the profile for one token reduction."""
    subject: Any = None
    """Exit block of a sensitivity; token reduction of widths and profile."""

    @property
    def id(self) -> str:
        """Name of the step, as `profile-attention-merge`."""
        return self.kind if self.subject is None else f"{self.kind}-{self.subject}"


def steps_of(space: Space, exit_blocks: Sequence[int] | None = None, *, proposes: bool = True) -> list[Step]:
    """Gives the steps that a search of the space needs, each after those that it needs itself.

    Args:
        exit_blocks: the exits that are fitted; by default those of the space.
        proposes: also the profile from which the first candidates of a search come, if no trial needs it.
    """
    exit_blocks = space.exit_blocks if exit_blocks is None else exit_blocks
    methods = [METHODS[name] for name in space.method]
    has_repairs = any(method.repairs for method in methods)
    steps = [Step(kind="sensitivity", subject=space.depth)] if has_repairs else []
    if set(exit_blocks) - {space.depth}:
        steps.append(Step(kind="exits"))
    if "auto" in space.round_to:
        tokenless: tuple[TokenReduction, ...] = ("none",)
        if all(method.takes_tokens for method in methods):
            tokenless = ()
        steps += [Step(kind="widths", subject=kind) for kind in dict.fromkeys(space.token_reduction + tokenless)]
    if allocates_by_profile(space) or proposes:
        profiles = [Step(kind="profile", subject=kind) for kind in profiled_reductions(space)]
        steps += [Step(kind="curves"), *profiles] if profiles else []
    if has_repairs:
        steps += [Step(kind="sensitivity", subject=block) for block in exit_blocks if block != space.depth]
    return steps


def steps_of_method(name: Method, space: Space) -> list[Step]:
    """Gives the steps that some candidate of a method needs."""
    traits = METHODS[name]
    kinds = {
        "exits": True, "sensitivity": traits.repairs, "widths": traits.takes_channels,
        "curves": traits.needs_profile, "profile": traits.needs_profile,
    }  # fmt: skip
    return [step for step in steps_of(space, proposes=False) if kinds[step.kind]]


def steps_before(step: Step, space: Space) -> list[Step]:
    """Gives the steps that a step needs before it begins.

    A profile needs the curves too, but late: they are handed out before it, and may be measured at the same time.
    """
    if step.kind == "sensitivity" and step.subject != space.depth:
        return [Step(kind="exits")]
    if step.kind in ("curves", "profile") and any(METHODS[name].repairs for name in space.method):
        return [Step(kind="sensitivity", subject=space.depth)]
    return []


def steps_for(candidate: Candidate, space: Space) -> list[Step]:
    """Gives the steps that a trial of the candidate needs."""
    method, steps = METHODS[candidate.method], list[Step]()
    if candidate.exit_block < space.depth or (method.serves_every_exit and len(space.exit_blocks) > 1):
        steps.append(Step(kind="exits"))
    if is_whole(candidate):
        return steps
    if method.repairs:
        steps.append(Step(kind="sensitivity", subject=candidate.exit_block))
    if method.takes_channels and candidate.round_to == "auto":
        steps.append(Step(kind="widths", subject=candidate.token_reduction))
    if method.needs_profile:
        steps += [Step(kind="curves"), Step(kind="profile", subject=candidate.token_reduction)]
    return steps


def is_whole(candidate: Candidate) -> bool:
    """Tells whether nothing is to be pruned but what lies past the exit."""
    return candidate.target_ratio >= 1 and METHODS[candidate.method].repairs


def run_step(
    context: TrialContext, step: Step, space: Space, exit_blocks: Sequence[int] | None = None,
    time_widths: WidthTimer = measure_allowed_widths, curves: Callable[[], tuple[RemovalCurves, ...]] | None = None,
) -> ContextPart:  # fmt: skip
    """Runs one step in a context that has what it needs.

    Args:
        exit_blocks: the exits that are fitted; by default those of the space.
        time_widths: measures the allowed widths.
        curves: gives the channel curves to a profile, once they are measured; by default those of the context.

    Returns:
        What it measured, on the CPU.

    Raises:
        VitfrontError: the dense model's features are not finite.
    """
    config = context.config
    batches: dict[str, Any] = {"batch_size": config.cascade.batch_size, "precision": context.precision}
    if step.kind == "exits":
        heads = fit_exits(
            context.model, context.splits.training, space.exit_blocks if exit_blocks is None else exit_blocks,
            epochs=config.exits.epochs, learning_rate=config.exits.learning_rate,
            distillation=config.exits.distillation, precision=context.precision, seed=config.data.seed,
        )  # fmt: skip
        return ContextPart(exit_heads=heads).to("cpu")
    if step.kind == "sensitivity":
        truncated = truncate(context.model, step.subject, context.exit_heads[step.subject])
        of_blocks = measure_sensitivity(truncated, context.splits.calibration, **batches)
        return ContextPart(sensitivities={step.subject: of_blocks}).to("cpu")
    if step.kind == "widths":
        with context.lease.exclusive():
            widths = time_widths(
                context.model, config.measure.batch_size, token_reduction=step.subject, precision=context.precision
            )
        return ContextPart(allowed_widths={step.subject: widths})
    splits, sensitivity = profile_splits(space, context.splits), context.sensitivities.get(space.depth)
    if step.kind == "curves":
        if sensitivity is None:
            sensitivity = measure_sensitivity(context.model, splits.calibration, **batches)
        measured_curves = measure_channel_curves(
            context.model, splits.calibration, splits.probe, sensitivity, **batches
        )
        return ContextPart(channel_curves=measured_curves)
    tokens = measure_token_costs(context.model, splits.probe, token_reduction=step.subject, **batches)
    profile = measure_profile(
        context.model, splits.calibration, splits.probe, token_reduction=step.subject, sensitivity=sensitivity,
        channels=context.known.channel_curves if curves is None else curves(), tokens=tokens, **batches,
    )  # fmt: skip
    return ContextPart(profiles={step.subject: profile})


def first_context(
    config: Config, model: nn.Module, splits: Splits, precision: Precision, timer: ModelTimer = time_against_dense
) -> TrialContext:
    """Gives the context of a dense model on its device, before any step of the preparation.

    Args:
        model: trained.
        timer: times models against the dense one, here and in all trials.
    """
    keep_freed_memory()
    model = model.eval().requires_grad_(False)
    context = TrialContext(
        config=config, model=model, splits=splits, precision=precision, known=ContextPart(), timer=timer
    )
    return context.extended(ContextPart(exit_heads={context.anatomy.depth: exit_head_of(model)}))


def measure_dense(context: TrialContext, first: FirstLook) -> Measurement:
    """Times the dense model; its top-1 is known from the first look."""
    timing, _ = time_models(context, [], context.config.measure.num_rounds)
    return measurement_of(context, context.model, context.dense_plan, timing, known_top1=first.top1)


def prepare(
    config: Config, inputs: Inputs, first: FirstLook, *, device: torch.device | None = None,
    exit_blocks: Sequence[int] | None = None, known: ContextPart | None = None, proposes: bool = False,
    timer: ModelTimer = time_against_dense, time_widths: WidthTimer = measure_allowed_widths,
) -> tuple[TrialContext, Measurement]:  # fmt: skip
    """Runs all steps of the preparation in this process.

    Args:
        inputs: its model is trained, and moved in place.
        first: the first look at this model; its top-1 is not measured again.
        device: the device to work on; by default this machine's first GPU, or else the CPU.
        exit_blocks: the exits to fit; by default those of the inputs' space.
        known: a part that was measured before.
        proposes: also the profile that the first candidates of a search come from, if no trial needs it.
        timer: times models against the dense one, here and in all trials.
        time_widths: measures the allowed widths for `round_to: auto`.

    Returns:
        The context, and the dense model's measurement.

    Raises:
        VitfrontError: the dense model's features are not finite.
    """
    model: nn.Module = inputs.model.to(device or local_device())
    context = first_context(config, model, inputs.splits, first.precision, timer)
    dense = measure_dense(context, first)
    anatomy = context.anatomy
    space = Space(config.space, anatomy.depth, anatomy.exits, has_windows=anatomy.has_windows)
    context = context.extended(known or ContextPart())
    for step in steps_of(space, exit_blocks, proposes=proposes):
        if not is_known(step, context.known):
            context = context.extended(run_step(context, step, space, exit_blocks, time_widths))
    return context, dense


def is_known(step: Step, known: ContextPart) -> bool:
    """Tells whether a part has all that a step measures; the classifiers of exits are always measured anew."""
    of_kind: dict[str, Mapping[Any, Any]] = {
        "sensitivity": known.sensitivities, "widths": known.allowed_widths, "profile": known.profiles
    }  # fmt: skip
    if step.kind == "curves":
        return bool(known.channel_curves)
    return step.kind != "exits" and step.subject in of_kind[step.kind]


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
