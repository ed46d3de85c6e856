"""The measurement of a context's models: accuracy, throughput against the dense model, and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruning.artifact import Weights
from pruning.data import Images
from pruning.errors import VitfrontError
from pruning.measure.accuracy import predict, top1, wilson_interval
from pruning.measure.cost import count_macs, count_params
from pruning.measure.retrieval import features, mean_average_precision, recall_at_1
from pruning.measure.stopwatch import Timing, device_name
from pruning.methods.sparsity import sparsity_of
from pruning.model.exits import truncate
from pruning.model.surgery import apply_plan
from pruning.plan import Plan
from pruning.precision import Precision
from pruning.repair.compensation import RepairedModel, repaired_model
from search.config import Config
from search.outcome import Measurement
from search.trial.context import TrialContext
from search.trial.reuse import Cache, plan_key, shape_key

CONFIRMING = 3
"""The final front is timed for so many times the rounds of a trial."""


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The models that may be on the front, measured once more."""

    dense: Measurement
    measured: list[Measurement]
    """One measurement a plan, in their order; with accuracy on `test`, where there is one."""
    models: list[nn.Module]
    """One model a plan, in their order."""
    conditions: dict[str, str | int]
    """The conditions that the figures hold for: device, precision, threads, batch size, torch."""


def measure(
    context: TrialContext,
    model: nn.Module,
    plan: Plan,
    measured_cache: Cache[Measurement] | None = None,
    *,
    has_weights: bool = False,
) -> Measurement:
    """Measures accuracy on val, throughput against the dense model, and cost of one model.

    Args:
        measured_cache: earlier measurements; the new one is added. A shape that was timed is not timed again, and a
            model that was measured is not measured again.
        has_weights: the weights do not follow from the plan, so nobody else has this model.
    """
    cache: Cache[Measurement] = {} if measured_cache is None else measured_cache
    by_shape, by_plan = shape_key(context.anatomy, plan), plan_key(context.anatomy, plan)
    earlier = None if has_weights else cache.get(by_plan)
    if earlier is not None:
        return earlier
    timing: Timing | Measurement | None = cache.get(by_shape)
    if timing is None:
        _, (timing,) = time_models(context, [model], context.config.measure.num_rounds)
    measurement = measurement_of(context, model, plan, timing)
    cache[by_shape] = measurement
    if not has_weights:
        cache[by_plan] = measurement
    return measurement


def measurement_of(
    context: TrialContext, model: nn.Module, plan: Plan, timing: Timing | Measurement, *,
    known_top1: float | None = None,
) -> Measurement:  # fmt: skip
    """Measures all of a model but its speed, which is given.

    Args:
        known_top1: its top-1 accuracy on val, if that was measured before.

    Raises:
        VitfrontError: the model's answers are not finite.
    """
    images = context.splits.val
    accuracy = _top1(context, model, images) if known_top1 is None else known_top1
    low, high = wilson_interval(accuracy, len(images))
    return Measurement(
        top1=accuracy,
        top1_low=low,
        top1_high=high,
        **speed_of(timing),
        macs=count_macs(context.anatomy, plan),
        params=count_params(model),
        sparsity=sparsity_of(model),
        **_retrieval(context, model),
    )


def time_models(context: TrialContext, models: Sequence[nn.Module], num_rounds: int) -> tuple[Timing, list[Timing]]:
    """Times models in turn with the dense one, while nobody else uses the device."""
    batch = context.timing_batch()
    with context.lease.exclusive():
        return context.timer(context.model, models, batch, num_rounds=num_rounds, precision=context.precision)


def time_shapes(context: TrialContext, plans: Sequence[Plan]) -> list[Timing]:
    """Times the shape that each plan leaves, without its repair; shapes that several plans share are timed once."""
    by_shape = {plan.shape_hash: plan for plan in plans}
    models = [apply_plan(_truncated(context, plan), plan) for plan in by_shape.values()]
    _, timings = time_models(context, models, context.config.measure.num_rounds)
    timing_of = dict(zip(by_shape, timings, strict=True))
    return [timing_of[plan.shape_hash] for plan in plans]


def confirm(context: TrialContext, plans: Sequence[Plan], weights: Sequence[Weights | None] = ()) -> Confirmation:
    """Builds the models of several plans and measures them and the dense one again, in one longer run.

    It measures on the images to confirm with if the recipe has any, and on `test`.

    Args:
        weights: of each model whose weights do not follow from its plan; by default of none.
    """
    if context.splits.confirm is not None:
        context = replace(context, splits=replace(context.splits, val=context.splits.confirm))
    models = [build(context, *pair) for pair in zip(plans, weights or [None] * len(plans), strict=True)]
    num_rounds = CONFIRMING * context.config.measure.num_rounds
    dense_timing, timings = time_models(context, models, num_rounds)
    dense = measurement_of(context, context.model, context.dense_plan, dense_timing)
    measured = [measurement_of(context, *triple) for triple in zip(models, plans, timings, strict=True)]
    if context.splits.test is not None:
        dense, *measured = (
            replace(measurement, top1_test=_top1(context, model, context.splits.test))
            for measurement, model in zip([dense, *measured], [context.model, *models], strict=True)
        )
    conditions: dict[str, str | int] = {
        "device": device_name(context.device),
        "precision": context.precision,
        "threads": torch.get_num_threads(),
        "batch_size": context.config.measure.batch_size,
        "torch": torch.__version__,
    }
    return Confirmation(dense=dense, measured=measured, models=models, conditions=conditions)


def build(context: TrialContext, plan: Plan, weights: Weights | None = None) -> nn.Module:
    """Builds a plan's model as its trial made it: cut, pruned, and repaired or with the weights that it had."""
    truncated = _truncated(context, plan)
    if weights is None:
        return repaired(context, truncated, plan).model
    model = apply_plan(truncated, plan)
    model.load_state_dict(dict(weights))
    return model


def repaired(context: TrialContext, truncated: nn.Module, plan: Plan) -> RepairedModel:
    """Prunes the dense model, cut at the plan's exit, and repairs it on the calibration images."""
    return repaired_model(
        truncated, plan, context.splits.calibration, context.sensitivities[plan.exit_block],
        batch_size=context.config.cascade.batch_size, precision=context.precision,
    )  # fmt: skip


def _truncated(context: TrialContext, plan: Plan) -> nn.Module:
    return truncate(context.model, plan.exit_block, context.exit_heads[plan.exit_block])


def speed_of(timing: Timing | Measurement) -> dict[str, Any]:
    """Gives the fields of a measurement that say how fast a model is."""
    names = ("throughput_img_s", "speedup", "speedup_low", "speedup_high", "latency_ms_p50")
    return {name: getattr(timing, name) for name in names}


def accuracy(context: TrialContext, model: nn.Module) -> float:
    """Measures the accuracy on val, by the metric that the recipe searches by."""
    if context.config.search.accuracy == "top1":
        return _top1(context, model, context.splits.val)
    return _retrieval(context, model)[context.config.search.accuracy]


def _retrieval(context: TrialContext, model: nn.Module) -> dict[str, float]:
    """Measures how well val images find training images of their class; {} if the recipe does not search by that."""
    if context.config.search.accuracy == "top1":
        return {}
    splits = context.splits
    queries, *gallery = (_features(context, model, images) for images in (splits.val, splits.calibration, splits.probe))
    gallery_labels = torch.cat([splits.calibration.labels, splits.probe.labels])
    ranked = queries, splits.val.labels, torch.cat(gallery), gallery_labels
    return {"recall_at_1": recall_at_1(*ranked), "mean_average_precision": mean_average_precision(*ranked)}


def _features(context: TrialContext, model: nn.Module, images: Images) -> Tensor:
    rows = features(model, images, batch_size=context.config.cascade.batch_size, precision=context.precision)
    if not rows.isfinite().all():
        raise VitfrontError("the model's features are not finite")
    return rows


def finite_logits(config: Config, model: nn.Module, images: Images, precision: Precision) -> Tensor:
    """Gives a model's answers, (B, K).

    Raises:
        VitfrontError: they are not finite.
    """
    logits = predict(model, images, batch_size=config.cascade.batch_size, precision=precision)
    num_broken = int((~logits.isfinite()).any(dim=1).sum())
    if num_broken:
        hint = "" if precision == "float32" else ", or set measure.precision=float32"
        raise VitfrontError(
            f"the model's logits are not finite for {num_broken} of {len(images)} images in {precision}; "
            f"check its weights{hint}"
        )
    return logits


def _top1(context: TrialContext, model: nn.Module, images: Images) -> float:
    return top1(finite_logits(context.config, model, images, context.precision), images.labels)
