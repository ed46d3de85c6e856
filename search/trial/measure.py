"""The measurement of a context's models: accuracy, throughput against the dense model, and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pruning.artifact import Weights
from pruning.data import Images
from pruning.errors import VitfrontError
from pruning.measure.accuracy import predict, right_answers, top1, wilson_interval
from pruning.measure.cost import count_macs, count_params
from pruning.measure.retrieval import features, mean_average_precision, recall_at_1
from pruning.measure.stopwatch import Timing
from pruning.methods.sparsity import sparsity_of
from pruning.model.anatomy import examine
from pruning.model.exits import truncate
from pruning.model.surgery import apply_plan, keep_all_plan
from pruning.plan import Plan
from pruning.precision import Precision
from pruning.repair.compensation import RepairedModel, repaired_model
from search.config import Config
from search.outcome import Measurement
from search.trial.context import TrialContext
from search.trial.reuse import Cache, plan_key, shape_key
from search.trial.rivals import Judged, Rival, RivalStore, judge_answers, shuffled

NARROW_ENOUGH = 0.05
"""The timing of a trial ends early where the interval of its speed-up is that narrow, as a share: all other slots of
the device stand still meanwhile. What may be on the front is timed once more in the end."""

MAX_STREAM_BYTES = 2 * 2**30
"""The most that the streams of tokens of the images may take which a model of the front is repaired on."""


def measure(
    context: TrialContext,
    model: nn.Module,
    plan: Plan,
    measured_cache: Cache[Measurement] | None = None,
    rivals: RivalStore | None = None,
    *,
    has_weights: bool = False,
) -> Measurement:
    """Measures throughput against the dense model, accuracy on val, and cost of one model.

    Args:
        measured_cache: earlier measurements; the new one is added. A shape that was timed is not timed again, and a
            model that was measured is not measured again.
        rivals: models that were measured on all val images, by the keys of their plans; one that this one does not beat
            may end its measurement early, and this one is added if it is measured on all.
        has_weights: the weights do not follow from the plan, so nobody else has this model.
    """
    cache: Cache[Measurement] = {} if measured_cache is None else measured_cache
    by_shape, by_plan = shape_key(context.anatomy, plan), plan_key(context.anatomy, plan)
    earlier = None if has_weights else cache.get(by_plan)
    if earlier is not None:
        return earlier
    timing: Timing | Measurement | None = cache.get(by_shape)
    if timing is None:
        rounds = context.config.measure.num_rounds
        _, (timing,) = time_models(context, [model], rounds, narrow_enough=NARROW_ENOUGH)
    if rivals is None or context.config.search.accuracy != "top1":
        measurement = measurement_of(context, model, plan, timing)
    else:
        judged = _judge(context, model, timing, rivals)
        num_images = len(judged.right) if len(judged.right) < len(context.splits.val) else None
        measurement = measurement_of(context, model, plan, timing, known_top1=judged.top1, num_images=num_images)
        if num_images is None and not has_weights:
            rivals[by_plan] = Rival.of(judged.right, timing.speedup_low)
    cache[by_shape] = measurement
    if not has_weights:
        cache[by_plan] = measurement
    return measurement


def _judge(context: TrialContext, model: nn.Module, timing: Timing | Measurement, rivals: RivalStore) -> Judged:
    """Looks at the answers of a model to val until a rival has beaten it, or at all of them."""
    images = context.splits.val
    order = shuffled(len(images))

    def answer(places: slice) -> NDArray[np.bool_]:
        part = images.take(order[places])
        logits = finite_logits(context.config, model, part, context.precision)
        return np.asarray(right_answers(logits, part.labels).cpu(), dtype=np.bool_)

    return judge_answers(answer, len(images), rivals.values(), timing.speedup_high)


def measurement_of(
    context: TrialContext, model: nn.Module, plan: Plan, timing: Timing | Measurement, *,
    known_top1: float | None = None, num_images: int | None = None,
) -> Measurement:  # fmt: skip
    """Measures all of a model but its speed, which is given.

    Args:
        known_top1: its top-1 accuracy on val, if that was measured before.
        num_images: number of val images that this is known from; by default all.

    Raises:
        VitfrontError: the model's answers are not finite.
    """
    images = context.splits.val
    accuracy = _top1(context, model, images) if known_top1 is None else known_top1
    low, high = wilson_interval(accuracy, num_images or len(images))
    return Measurement(
        top1=accuracy,
        top1_low=low,
        top1_high=high,
        **speed_of(timing),
        macs=count_macs(context.anatomy, plan),
        params=count_params(model),
        sparsity=sparsity_of(model),
        num_images=num_images,
        **_retrieval(context, model),
    )


def time_models(
    context: TrialContext, models: Sequence[nn.Module], num_rounds: int, *, narrow_enough: float = 0.0
) -> tuple[Timing, list[Timing]]:
    """Times models in turn with the dense one, while nobody else uses the device.

    Args:
        narrow_enough: width of the interval of a speed-up, as a share of it, from which on no further round is run.
    """
    batch = context.timing_batch()
    with context.lease.exclusive():
        return context.timer(
            context.model, models, batch, num_rounds=num_rounds, precision=context.precision,
            narrow_enough=narrow_enough,
        )  # fmt: skip


def time_shapes(context: TrialContext, plans: Sequence[Plan], num_rounds: int) -> tuple[Timing, list[Timing]]:
    """Times the shape that each plan leaves, without its repair; shapes that several plans share are timed once.

    Returns:
        The dense model's timing, and one a plan, in their order.
    """
    by_shape = {plan.shape_hash: plan for plan in plans}
    models = [apply_plan(_truncated(context, plan), plan) for plan in by_shape.values()]
    dense, timings = time_models(context, models, num_rounds)
    timing_of = dict(zip(by_shape, timings, strict=True))
    return dense, [timing_of[plan.shape_hash] for plan in plans]


def rebuild(
    context: TrialContext, plan: Plan, measured: Measurement, weights: Weights | None = None, *, on_all_images: bool
) -> tuple[Measurement, nn.Module]:
    """Builds a model once more, and measures all of it but its speed.

    It is measured on the images to confirm with if the recipe has any, else on val, and on `test`.

    Args:
        measured: its trial's measurement, whose speed is taken over; its top-1 too where model and images are the same.
        weights: of a model whose weights do not follow from its plan.
        on_all_images: repair it on all training images, as far as they fit in memory, rather than on those for
            calibration alone.

    Returns:
        The measurement, and the model.
    """
    model = build(context, plan, weights, context.splits.training if on_all_images else None)
    is_same = context.splits.confirm is None and (weights is not None or not on_all_images)
    seen = replace(context, splits=replace(context.splits, val=context.splits.confirm or context.splits.val))
    measurement = measurement_of(seen, model, plan, measured, known_top1=measured.top1 if is_same else None)
    if context.splits.test is not None:
        measurement = replace(measurement, top1_test=_top1(context, model, context.splits.test))
    return measurement, model


def build(context: TrialContext, plan: Plan, weights: Weights | None = None, images: Images | None = None) -> nn.Module:
    """Builds a plan's model as its trial made it: cut, pruned, and repaired or with the weights that it had.

    Args:
        images: to repair it on; by default those for calibration, as its trial did.
    """
    truncated = _truncated(context, plan)
    if weights is None:
        return repaired(context, truncated, plan, images).model
    model = apply_plan(truncated, plan)
    model.load_state_dict(dict(weights))
    return model


def repaired(
    context: TrialContext, truncated: nn.Module, plan: Plan, images: Images | None = None, *,
    max_bytes: int = MAX_STREAM_BYTES,
) -> RepairedModel:  # fmt: skip
    """Prunes the dense model, cut at the plan's exit, and repairs it.

    Args:
        images: to repair it on, of which as many are taken as fit in memory; by default those for calibration.
        max_bytes: the most that the streams of tokens of the images may take.
    """
    if plan == replace(keep_all_plan(examine(truncated)), **_reduction_of(plan)):
        return RepairedModel(model=truncated, notes=())
    calibration, dense_stream = context.splits.calibration, None
    if images is None:
        images, dense_stream = calibration, context.dense_stream
    else:
        block = context.anatomy.blocks[0]
        image_bytes = 12 * (block.num_patches + block.num_prefix_tokens) * block.width  # three streams in float32
        images = images.take(slice(0, max(len(calibration), max_bytes // image_bytes)))
    return repaired_model(
        truncated, plan, images, context.sensitivities[plan.exit_block],
        batch_size=context.config.cascade.batch_size, precision=context.precision, dense=dense_stream,
    )  # fmt: skip


def _reduction_of(plan: Plan) -> dict[str, Any]:
    return {"token_reduction": plan.token_reduction, "cutoff_token": plan.cutoff_token}


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
