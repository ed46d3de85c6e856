"""The measurement of a model: accuracy, retrieval, speed and cost; in a trial, and once more for the front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pruning.data import Images
from pruning.errors import VitfrontError
from pruning.measure.cost import count_macs, count_params
from pruning.measure.stopwatch import time_against_dense
from pruning.model.exits import truncate
from pruning.model.surgery import keep_all_block
from pruning.plan import Plan
from search.config import Accuracy
from search.outcome import Candidate, Measurement
from search.trial.context import TrialContext
from search.trial.inputs import load_inputs
from search.trial.measure import build, measure, rebuild, repaired, time_shapes
from search.trial.reuse import plan_key, shape_key
from tests.integration import sweeps
from tests.pruning_tests.measure.test_retrieval import slow
from tests.search_tests import tiny
from tests.search_tests.trial.trials import accuracy, measured, new_candidate, run, with_search


@pytest.mark.parametrize(
    "candidate",
    [
        new_candidate(drop_budget=(10.0, 10.0, 10.0), target_ratio=0.5),
        new_candidate(exit_block=2, drop_budget=(9.0, 9.0, 0.0)),
    ],
    ids=["pruned", "cut"],
)
def test_model_built_again_from_the_plan_reaches_the_recorded_accuracy(
    context: TrialContext, candidate: Candidate
) -> None:
    outcome = run(context, candidate)
    assert outcome.plan is not None
    model = build(context, outcome.plan)
    assert accuracy(model, context.splits.val) == pytest.approx(measured(outcome).top1)
    assert measure(context, model, outcome.plan).top1 == measured(outcome).top1


@pytest.mark.alone
def test_model_is_timed_by_the_clock(context: TrialContext) -> None:
    by_clock = replace(context, timer=time_against_dense)
    measurement = measure(by_clock, context.model, context.dense_plan)
    assert 0.6 < measurement.speedup < 1.7
    assert measurement.speedup_low <= measurement.speedup <= measurement.speedup_high


FAST: Any = {"speedup": 9.5, "speedup_low": 9.25, "speedup_high": 9.75, "latency_ms_p50": 0.5, "throughput_img_s": 7.0}


def test_equal_shapes_are_not_timed_again_nor_equal_models_measured_again(
    context: TrialContext, dense: Measurement
) -> None:
    anatomy = context.anatomy
    block = replace(keep_all_block(anatomy.blocks[0]), keep_hidden=tuple(range(9)))
    plan = replace(context.dense_plan, blocks=(block,) * tiny.DEPTH)
    other = replace(plan, blocks=(replace(block, keep_hidden=tuple(range(7, 16))), block, block))  # another, as fast
    cache = {shape_key(anatomy, plan): replace(dense, **FAST), plan_key(anatomy, plan): replace(dense, top1=0.125)}
    assert measure(context, build(context, plan), plan, cache).top1 == 0.125
    for has_weights in (True, False):  # its weights are its own; then they follow from another plan
        model = build(context, other)
        measurement = measure(context, model, plan if has_weights else other, cache, has_weights=has_weights)
        assert {name: getattr(measurement, name) for name in FAST} == FAST
        assert measurement.top1 == accuracy(model, context.splits.val)
        assert (measurement.macs, measurement.params) == (count_macs(anatomy, other), count_params(model))
    assert cache[plan_key(anatomy, other)] == measurement
    assert cache[plan_key(anatomy, plan)].top1 == 0.125


# Retrieval


def by_retrieval(context: TrialContext, accuracy: Accuracy = "recall_at_1") -> TrialContext:
    """Gives the context of the same sweep, searched by retrieval."""
    return with_search(context, accuracy=accuracy)


def retrieval(model: nn.Module, context: TrialContext) -> tuple[float, float]:
    """Recall at 1 and mean average precision of val among the training images, by their definitions."""
    splits = [context.splits.val, context.splits.calibration, context.splits.probe]
    with torch.no_grad():
        features = [
            model.forward_head(model.forward_features(images.normalized(slice(None))), pre_logits=True)  # type: ignore[operator]
            for images in splits
        ]
    queries, *gallery = [(rows / rows.norm(dim=1, keepdim=True)).tolist() for rows in features]
    labels, *gallery_labels = [images.labels.tolist() for images in splits]
    return slow(queries, labels, gallery[0] + gallery[1], gallery_labels[0] + gallery_labels[1])


def test_retrieval_ranks_the_training_images_by_the_pruned_models_own_features(context: TrialContext) -> None:
    blocks = context.dense_plan.blocks
    few = replace(blocks[0], keep_hidden=blocks[0].keep_hidden[::8], num_tokens=5)
    plan = replace(context.dense_plan, blocks=(few, replace(blocks[1], num_tokens=5)))
    pruned = build(context, plan)
    expected = retrieval(pruned, context)
    assert expected != pytest.approx(retrieval(context.model, context))
    metrics: tuple[Accuracy, ...] = ("recall_at_1", "mean_average_precision")
    for metric in metrics:
        measurement = measure(by_retrieval(context, metric), pruned, plan)
        assert (measurement.recall_at_1, measurement.mean_average_precision) == pytest.approx(expected)


def test_training_images_whose_features_are_no_numbers_fail(context: TrialContext) -> None:
    broken = replace(context.splits.training, mean=(float("nan"),) * 3)
    spoilt = by_retrieval(replace(context, splits=replace(context.splits, training=broken)))
    with pytest.raises(VitfrontError, match="the model's features are not finite"):
        measure(spoilt, context.model, context.dense_plan)


# The front, once more


def pruned_plan(context: TrialContext, num_hidden: int = 24) -> Plan:
    """A plan that keeps the first hidden units of every block."""
    blocks = [replace(block, keep_hidden=block.keep_hidden[:num_hidden]) for block in context.dense_plan.blocks]
    return replace(context.dense_plan, blocks=tuple(blocks))


@pytest.mark.parametrize("on_all_images", [True, False])
def test_rebuilt_model_is_measured_on_val_and_on_test_and_keeps_its_speed(
    context: TrialContext, dense: Measurement, on_all_images: bool
) -> None:
    plan, test = pruned_plan(context), context.splits.test
    assert test is not None
    of_trial = replace(measure(context, build(context, plan), plan), **FAST)
    measurement, model = rebuild(context, plan, of_trial, on_all_images=on_all_images)
    assert measurement.top1 == pytest.approx(accuracy(model, context.splits.val))
    assert measurement.top1_test == pytest.approx(accuracy(model, test))
    assert {name: getattr(measurement, name) for name in FAST} == FAST
    assert (measurement.macs, measurement.params) == (count_macs(context.anatomy, plan), count_params(model))


def test_accuracy_of_a_model_that_is_as_its_trial_made_it_is_not_measured_again(context: TrialContext) -> None:
    plan = pruned_plan(context)
    of_trial = replace(measure(context, build(context, plan), plan), top1=0.125)
    assert rebuild(context, plan, of_trial, on_all_images=False)[0].top1 == 0.125
    other, model = rebuild(context, plan, of_trial, on_all_images=True)
    assert other.top1 == accuracy(model, context.splits.val) != 0.125
    weights = build(context, plan).state_dict()
    assert rebuild(context, plan, of_trial, weights, on_all_images=True)[0].top1 == 0.125


def test_rebuilt_model_has_the_weights_that_it_is_given(context: TrialContext, dense: Measurement) -> None:
    plan = pruned_plan(context)
    weights = {name: tensor * 1.5 for name, tensor in build(context, plan).state_dict().items()}
    _, model = rebuild(context, plan, dense, weights, on_all_images=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_rebuilt_model_is_measured_on_the_images_to_confirm_with(context: TrialContext, dense: Measurement) -> None:
    confirm = tiny.images(32, seed=9)
    seen = replace(context, splits=replace(context.splits, confirm=confirm))
    for weights in (None, context.model.state_dict()):  # never the accuracy of its trial, which saw val
        measurement, model = rebuild(
            seen, context.dense_plan, replace(dense, top1=0.125), weights, on_all_images=False
        )  # fmt: skip
        assert measurement.top1 == pytest.approx(accuracy(model, confirm))
        assert measurement.top1_low < measurement.top1 < measurement.top1_high
        assert measurement.top1_test == pytest.approx(accuracy(model, tiny.images(20, seed=4)))


def test_rebuilt_model_has_no_test_accuracy_without_a_test_split(context: TrialContext, dense: Measurement) -> None:
    untested = replace(context, splits=tiny.splits(test=False))
    measurement, _ = rebuild(untested, context.dense_plan, dense, on_all_images=False)
    assert measurement == dense


def test_front_of_a_retrieval_sweep_is_measured_by_it(context: TrialContext, dense: Measurement) -> None:
    measurement, _ = rebuild(by_retrieval(context), context.dense_plan, dense, on_all_images=True)
    assert (measurement.recall_at_1, measurement.mean_average_precision) == pytest.approx(
        retrieval(context.model, context)
    )


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_repair_on_all_images_is_the_repair_on_the_training_images(context: TrialContext, dense: Measurement) -> None:
    plan, splits = pruned_plan(context), context.splits
    _, on_calibration = rebuild(context, plan, dense, on_all_images=False)
    assert same_weights(on_calibration, build(context, plan))
    _, on_all = rebuild(context, plan, dense, on_all_images=True)
    assert same_weights(on_all, build(context, plan, images=splits.training))
    assert not same_weights(on_all, on_calibration)


def test_repair_takes_no_more_images_than_fit_in_memory_but_all_for_calibration(
    context: TrialContext,
) -> None:
    plan, splits = pruned_plan(context), context.splits
    block = context.anatomy.blocks[0]
    image_bytes = 3 * 4 * (block.num_patches + block.num_prefix_tokens) * block.width
    for fit, taken in ((30, 30), (1, len(splits.calibration)), (10_000, len(splits.training))):
        limited = build(context, plan, images=splits.training.take(slice(0, taken)))
        model = repaired(
            context, truncate(context.model, tiny.DEPTH), plan, splits.training, max_bytes=fit * image_bytes
        ).model  # fmt: skip
        assert same_weights(model, limited)


def divergence(model: nn.Module, dense: nn.Module, images: Images) -> float:
    """Kullback-Leibler divergence of a model's answers from the dense model's, by the definition."""
    with torch.no_grad():
        of_dense, of_model = (one(images.normalized(slice(None))).softmax(dim=1).double() for one in (dense, model))
    return float((of_dense * (of_dense / of_model).log()).sum(dim=1).mean())


def test_repair_on_all_images_is_nearer_to_the_dense_model_on_others(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "data": {"calibration_images": 32, "probe_images": 368}, "space": {"exit_block": 3, "round_to": 1}
    }  # fmt: skip
    config = sweeps.config(None, **sections)  # digits: noise has nothing that holds for other images too
    context, dense = tiny.prepared(config, load_inputs(config, tmp_path), timer=tiny.timer)
    for num_hidden in (16, 32, 64):
        plan = pruned_plan(context, num_hidden)
        models = [rebuild(context, plan, dense, on_all_images=on_all)[1] for on_all in (False, True)]
        on_calibration, on_all = (divergence(model, context.model, context.splits.val) for model in models)
        assert on_all < on_calibration


# The speed of shapes


def test_plans_of_equal_shape_are_timed_once(context: TrialContext) -> None:
    dense_plan = context.dense_plan
    first, *later = dense_plan.blocks
    one, other = (
        replace(dense_plan, blocks=(replace(first, keep_hidden=kept), *later))
        for kept in (first.keep_hidden[:-1], first.keep_hidden[1:])
    )
    cut = replace(dense_plan, blocks=dense_plan.blocks[:2])
    timed: list[nn.Module] = []
    rounds: list[int] = []

    def timer(dense: nn.Module, models: list[nn.Module], *_: Any, num_rounds: int, **__: Any) -> Any:
        timed.extend(models)
        rounds.append(num_rounds)
        return "dense", [count_params(model) for model in models]

    plans: list[Plan] = [one, cut, other]
    of_dense, timings = time_shapes(replace(context, timer=timer), plans, 27)
    assert of_dense == "dense"
    assert timings == [count_params(build(context, plan)) for plan in plans]
    assert len(timed) == 2
    assert rounds == [27]


def test_without_plans_the_dense_model_alone_is_timed(context: TrialContext) -> None:
    dense, timings = time_shapes(context, [], 6)
    assert (dense.speedup, timings) == (1.0, [])
