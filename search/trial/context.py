"""What all trials of a sweep share: the dense model, its exits and the images; and what a model is measured with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pruning.artifact import Weights
from pruning.data import Images, Splits
from pruning.errors import VitfrontError
from pruning.measure.accuracy import predict, top1, wilson_interval
from pruning.measure.cost import count_macs, count_params
from pruning.measure.retrieval import features, mean_average_precision, recall_at_1
from pruning.measure.stopwatch import (
    MIN_ROUNDS,
    Timing,
    device_id,
    device_name,
    fastest_precision,
    keep_freed_memory,
    time_against_dense,
)
from pruning.measure.widths import AllowedWidths, measure_allowed_widths
from pruning.methods.profile import Profile
from pruning.methods.profiling import measure_profile
from pruning.methods.sparsity import sparsity_of
from pruning.model.anatomy import Anatomy, examine
from pruning.model.exits import ExitHead, fit_exits, truncate
from pruning.model.surgery import apply_plan, keep_all_plan
from pruning.plan import Plan, TokenReduction
from pruning.precision import Precision, synchronize
from pruning.repair.compensation import RepairedModel, repaired_model
from pruning.repair.sensitivity import BlockSensitivity, measure_sensitivity
from pruning.training import train
from search.config import Config
from search.outcome import TOKENLESS, Measurement, Outcome
from search.space import Space
from search.trial.lease import Lease, lease_of

Found = TypeVar("Found")

SUBSAMPLE = 4
"""A first look at a candidate takes one image in so many."""


class Known(Protocol[Found]):
    """What was found before, by `keys_of` the plans that it was found for: a dict, or what several workers share."""

    def get(self, key: str, /) -> Found | None: ...

    def __setitem__(self, key: str, found: Found, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrialContext:
    """What all trials of a sweep share, ready to prune and measure."""

    config: Config
    model: nn.Module
    """Dense, in eval mode."""
    exit_heads: dict[int, ExitHead]
    """The classifier of every exit."""
    splits: Splits
    precision: Precision
    profiles: dict[TokenReduction, Profile]
    """Of the whole dense model, for `method: global` and for proposals; by token reduction."""
    allowed_widths: dict[TokenReduction, tuple[AllowedWidths, ...]]
    """Of every block of the dense model on this device, for `round_to: auto`; likewise."""

    sensitivities: dict[int, list[BlockSensitivity]]
    """Of the dense model cut at every exit, for the methods that repair in closed form. Two float64 matrices a block:
    at 12 blocks 7 MB for a ViT-Tiny, 113 MB for a ViT-Base."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def lease(self) -> Lease:
        """Of the device that the context is on now."""
        return lease_on(self.device)

    @property
    def anatomy(self) -> Anatomy:
        """Of the dense model."""
        return examine(self.model)

    @property
    def dense_macs(self) -> int:
        return count_macs(examine(self.model), keep_all_plan(examine(self.model)))

    def to(self, device: torch.device | str) -> TrialContext:
        exit_heads = {
            block: {name: t.to(device) for name, t in head.items()} for block, head in self.exit_heads.items()
        }
        sensitivities = {block: [each.to(device) for each in some] for block, some in self.sensitivities.items()}
        return replace(self, model=self.model.to(device), exit_heads=exit_heads, sensitivities=sensitivities)

    def subsampled(self) -> TrialContext:
        """The same with a part of the images, and short timings: what a first look at a candidate costs little on."""
        splits = self.splits.thinned(SUBSAMPLE)
        timing = self.config.measure.model_copy(update={"num_rounds": MIN_ROUNDS})
        return replace(self, splits=splits, config=self.config.model_copy(update={"measure": timing}))

    def without_rungs(self) -> TrialContext:
        """The same, for trials that nobody stops."""
        search = self.config.search.model_copy(update={"reduction_factor": 1.0})
        return replace(self, config=self.config.model_copy(update={"search": search}))

    def timing_batch(self) -> Tensor:
        """The images that models are timed on: (batch size, ...); the val images over and over if there are few."""
        size = self.config.measure.batch_size
        return self.splits.val.normalized(torch.arange(size) % len(self.splits.val), self.device)


def lease_on(device: torch.device) -> Lease:
    """This process's lease of a device."""
    return lease_of(device_id(device), partial(synchronize, device))


def prepare(
    config: Config, model: nn.Module, splits: Splits, exit_blocks: Sequence[int], *, trained: bool,
    profiles: Mapping[TokenReduction, Profile] | None = None,
) -> tuple[TrialContext, Measurement]:  # fmt: skip
    """Trains the dense model if the recipe says so, fits the exits and measures the dense model: once a sweep.

    Args:
        model: on the device to work on.
        trained: its weights are final; else the recipe's training is done here, in place.
        profiles: known ones; if given, all of `profiled` are there in the end, else those that a trial needs.

    Returns:
        The context, and what the dense model does.

    Raises:
        VitfrontError: the training diverged, or the dense model's logits are not finite.
    """
    keep_freed_memory()
    device = next(model.parameters()).device
    batch = splits.val.normalized(slice(0, config.measure.batch_size), device)
    if config.model.training is not None and not trained:
        train(model, splits.training, config.model.training.settings())
    model.eval().requires_grad_(False)
    precision = config.measure.precision
    if precision == "auto":
        with lease_on(device).exclusive():
            precision = fastest_precision(model, batch)
    exit_heads = fit_exits(
        model, splits.training, exit_blocks,
        epochs=config.exits.epochs, learning_rate=config.exits.learning_rate,
        distillation=config.exits.distillation, precision=precision, seed=config.data.seed,
    )  # fmt: skip
    anatomy = examine(model)
    space = Space(config.space, anatomy.depth, anatomy.exits, has_windows=anatomy.has_windows)
    context = TrialContext(
        config=config, model=model, exit_heads=exit_heads, splits=splits, precision=precision, profiles={},
        allowed_widths={}, sensitivities={},
    )  # fmt: skip
    timing, _ = _time_against_dense(context, [], config.measure.num_rounds)
    dense = _measurement(context, model, _dense_plan(context), timing)
    common: dict[str, Any] = {"batch_size": config.cascade.batch_size, "precision": precision}
    sensitivities = {
        block: measure_sensitivity(truncate(model, block, exit_heads[block]), splits.calibration, **common)
        for block in (exit_blocks if set(space.method) - TOKENLESS else ())
    }
    known, shown = dict(profiles or {}), profile_images(space, splits)
    for kind in profiled(space) if profiles is not None or "global" in space.method else ():
        if kind not in known:
            known[kind] = measure_profile(
                model, shown.calibration, shown.probe, token_reduction=kind,
                sensitivity=sensitivities.get(anatomy.depth), **common,
            )  # fmt: skip
    with lease_on(device).exclusive():
        allowed_widths = {
            kind: measure_allowed_widths(model, config.measure.batch_size, token_reduction=kind, precision=precision)
            for kind in (_reductions(space) if "auto" in space.round_to else ())
        }
    return replace(context, profiles=known, allowed_widths=allowed_widths, sensitivities=sensitivities), dense


def profile_images(space: Space, splits: Splits) -> Splits:
    """What the profiles are taken on: all where `method: global` allocates by them, a part where they only propose."""
    return splits if "global" in space.method else splits.thinned(SUBSAMPLE)


def profiled(space: Space) -> tuple[TokenReduction, ...]:
    """The token reductions for which the dense model has a profile: all of method `global`, which allocates by it; one
    where the cascade alone begins with what it says."""
    if "global" in space.method:
        return space.token_reduction
    return space.token_reduction[:1] if "cascade" in space.method else ()


def _reductions(space: Space) -> tuple[TokenReduction, ...]:
    """All that a candidate may have."""
    tokenless: tuple[TokenReduction, ...] = ("none",) if TOKENLESS & set(space.method) else ()
    return tuple(dict.fromkeys(space.token_reduction + tokenless))


def measure(
    context: TrialContext,
    model: nn.Module,
    plan: Plan,
    known: Known[Measurement] | None = None,
    *,
    has_weights: bool = False,
) -> Measurement:
    """Accuracy on val, throughput against dense, and cost of one model.

    Args:
        known: what was measured before; the new measurement is added. What runs equally fast is not timed again, and
            the same model is not measured again.
        has_weights: those of the model do not follow from its plan.
    """
    known = {} if known is None else known
    shape, whole = keys_of(context.anatomy, plan)
    same = None if has_weights else known.get(whole)
    if same is not None:
        return same
    timing: Timing | Measurement | None = known.get(shape)
    if timing is None:
        _, (timing,) = _time_against_dense(context, [model], context.config.measure.num_rounds)
    found = _measurement(context, model, plan, timing)
    known[shape] = found
    if not has_weights:
        known[whole] = found
    return found


def known_from(anatomy: Anatomy, dense: Measurement, outcomes: Sequence[Outcome]) -> dict[str, Measurement]:
    """What `measure` needs not measure again, of the dense model and of an earlier run's outcomes."""
    shape, whole = keys_of(anatomy, keep_all_plan(anatomy))
    known = {shape: dense, whole: dense}
    for outcome in outcomes:
        if outcome.plan is not None and outcome.measurement is not None:
            shape, whole = keys_of(anatomy, outcome.plan)
            known.setdefault(shape, outcome.measurement)
            if not outcome.has_weights:
                known.setdefault(whole, outcome.measurement)
    return known


def trained_from(anatomy: Anatomy, outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    """The outcomes that a fine-tune of the same pruned model need not be run again for, by `trained_key`.

    Args:
        anatomy: of the whole dense model.
        outcomes: of an earlier run.
    """
    return {
        trained_key(anatomy, outcome.plan): outcome
        for outcome in outcomes
        if outcome.plan is not None and outcome.candidate.recovery == "distill"
        and outcome.candidate.method not in TOKENLESS and outcome.same_as is None
    }  # fmt: skip


def trained_key(anatomy: Anatomy, plan: Plan) -> str:
    """Of what a fine-tune makes of the model that follows from a plan."""
    _, whole = keys_of(anatomy, plan)
    return f"trained {whole}"


def keys_of(anatomy: Anatomy, plan: Plan) -> tuple[str, str]:
    """Of the shape that a plan's models have, on which their speed depends, and of the plan itself.

    Args:
        anatomy: of the whole dense model.
    """
    counts = [block.num_tokens for block in plan.blocks]
    if counts == [block.num_patches for block in anatomy.blocks[: plan.exit_block]]:
        plan = replace(plan, token_reduction="none", cutoff_token=1.0)  # reduces nothing, whatever it is called
    text = json.dumps(plan.to_json(), sort_keys=True)
    return plan.shape_hash, hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The models that may be on the front, measured once more."""

    dense: Measurement
    measured: list[Measurement]
    """In the order of the plans; with accuracy on `test`, where there is one."""
    models: list[nn.Module]
    conditions: dict[str, str | int]
    """What the figures hold for: device, precision, threads, batch size, torch."""


def time_shapes(context: TrialContext, plans: Sequence[Plan]) -> list[Timing]:
    """The speed of what each plan leaves, without its repair: equal shapes run equally fast, and are timed once."""
    by_shape = {plan.shape_hash: plan for plan in plans}
    models = [
        apply_plan(truncate(context.model, plan.exit_block, context.exit_heads[plan.exit_block]), plan)
        for plan in by_shape.values()
    ]
    _, timings = _time_against_dense(context, models, context.config.measure.num_rounds)
    found = dict(zip(by_shape, timings, strict=True))
    return [found[plan.shape_hash] for plan in plans]


CONFIRMING = 3
"""The front is timed for so many times the rounds of a trial."""


def confirm(context: TrialContext, plans: Sequence[Plan], weights: Sequence[Weights | None] = ()) -> Confirmation:
    """Builds the models of several plans and measures them and the dense one again, in one longer run, on the images
    to confirm with if the recipe has any, and on `test`.

    Args:
        weights: of each model whose weights do not follow from its plan; by default of none.
    """
    if context.splits.confirm is not None:
        context = replace(context, splits=replace(context.splits, val=context.splits.confirm))
    known = weights or [None] * len(plans)
    models = [build(context, plan, each) for plan, each in zip(plans, known, strict=True)]
    dense_timing, timings = _time_against_dense(context, models, CONFIRMING * context.config.measure.num_rounds)
    measured = [_measurement(context, context.model, _dense_plan(context), dense_timing)]
    measured += [_measurement(context, *each) for each in zip(models, plans, timings, strict=True)]
    if context.splits.test is not None:
        tested = [_top1(context, model, context.splits.test) for model in (context.model, *models)]
        measured = [replace(old, top1_test=share) for old, share in zip(measured, tested, strict=True)]
    conditions: dict[str, str | int] = {
        "device": device_name(context.device),
        "precision": context.precision,
        "threads": torch.get_num_threads(),
        "batch_size": context.config.measure.batch_size,
        "torch": torch.__version__,
    }
    return Confirmation(dense=measured[0], measured=measured[1:], models=models, conditions=conditions)


def build(context: TrialContext, plan: Plan, weights: Weights | None = None) -> nn.Module:
    """The model of a plan, as its trial made it: cut, pruned, and repaired or with the weights that it had."""
    shorter = truncate(context.model, plan.exit_block, context.exit_heads[plan.exit_block])
    if weights is None:
        return repaired(context, shorter, plan).model
    model = apply_plan(shorter, plan)
    model.load_state_dict(dict(weights))
    return model


def repaired(context: TrialContext, shorter: nn.Module, plan: Plan) -> RepairedModel:
    """The dense model, cut at the plan's exit, pruned and repaired on the calibration images."""
    return repaired_model(
        shorter, plan, context.splits.calibration, context.sensitivities[plan.exit_block],
        batch_size=context.config.cascade.batch_size, precision=context.precision,
    )  # fmt: skip


def _dense_plan(context: TrialContext) -> Plan:
    return keep_all_plan(examine(context.model))


def _time_against_dense(
    context: TrialContext, models: Sequence[nn.Module], num_rounds: int
) -> tuple[Timing, list[Timing]]:
    batch = context.timing_batch()
    with context.lease.exclusive():
        return time_against_dense(context.model, models, batch, num_rounds=num_rounds, precision=context.precision)


def _measurement(context: TrialContext, model: nn.Module, plan: Plan, timing: Timing | Measurement) -> Measurement:
    accuracy = _top1(context, model, context.splits.val)
    low, high = wilson_interval(accuracy, len(context.splits.val))
    return Measurement(
        top1=accuracy,
        top1_low=low,
        top1_high=high,
        **speed_of(timing),
        macs=count_macs(examine(context.model), plan),
        params=count_params(model),
        sparsity=sparsity_of(model),
        **_retrieval(context, model),
    )


def speed_of(timing: Timing | Measurement) -> dict[str, Any]:
    """What a measurement says of how fast a model is."""
    names = ("throughput_img_s", "speedup", "speedup_low", "speedup_high", "latency_ms_p50")
    return {name: getattr(timing, name) for name in names}


def accuracy(context: TrialContext, model: nn.Module) -> float:
    """On val, by the metric that the recipe searches by."""
    if context.config.search.accuracy == "top1":
        return _top1(context, model, context.splits.val)
    return _retrieval(context, model)[context.config.search.accuracy]


def _retrieval(context: TrialContext, model: nn.Module) -> dict[str, float]:
    """How well the val images find training images of their class, if the recipe searches by that; else nothing."""
    if context.config.search.accuracy == "top1":
        return {}
    shown = (context.splits.val, context.splits.calibration, context.splits.probe)
    queries, *gallery = (_features(context, model, images) for images in shown)
    labels = torch.cat([context.splits.calibration.labels, context.splits.probe.labels])
    both = queries, context.splits.val.labels, torch.cat(gallery), labels
    return {"recall_at_1": recall_at_1(*both), "mean_average_precision": mean_average_precision(*both)}


def _features(context: TrialContext, model: nn.Module, images: Images) -> Tensor:
    found = features(model, images, batch_size=context.config.cascade.batch_size, precision=context.precision)
    if not found.isfinite().all():
        raise VitfrontError("the model's features are not finite")
    return found


def _top1(context: TrialContext, model: nn.Module, images: Images) -> float:
    logits = predict(model, images, batch_size=context.config.cascade.batch_size, precision=context.precision)
    if not logits.isfinite().all():
        raise VitfrontError("the model's logits are not finite")
    return top1(logits, images.labels)
