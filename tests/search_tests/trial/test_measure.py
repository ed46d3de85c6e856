"""The measurement of a model: accuracy, retrieval, speed and cost; in a trial, and once more for the front."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pruning.errors import VitfrontError
from pruning.measure.cost import count_macs, count_params
from pruning.measure.stopwatch import time_against_dense
from pruning.model.anatomy import examine
from pruning.model.surgery import keep_all_block
from pruning.plan import Plan
from search.config import Accuracy
from search.outcome import Candidate, Measurement
from search.trial.context import TrialContext
from search.trial.measure import build, confirm, measure, time_shapes
from search.trial.reuse import plan_key, shape_key
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


def test_dense_model_and_front_of_a_retrieval_sweep_are_measured_by_it(context: TrialContext) -> None:
    confirmation = confirm(by_retrieval(context), [context.dense_plan])
    expected = retrieval(context.model, context)
    for measurement in (confirmation.dense, *confirmation.measured):
        assert (measurement.recall_at_1, measurement.mean_average_precision) == pytest.approx(expected)


def test_training_images_whose_features_are_no_numbers_fail(context: TrialContext) -> None:
    broken = replace(context.splits.training, mean=(float("nan"),) * 3)
    spoilt = by_retrieval(replace(context, splits=replace(context.splits, training=broken)))
    with pytest.raises(VitfrontError, match="the model's features are not finite"):
        measure(spoilt, context.model, context.dense_plan)


# The front, once more


def test_front_is_confirmed_in_its_order_and_on_test(context: TrialContext) -> None:
    candidates = (new_candidate(exit_block=2), new_candidate(drop_budget=(50.0, 50.0, 50.0), target_ratio=0.5))
    plans = [plan for candidate in candidates if (plan := run(context, candidate).plan) is not None]
    confirmation = confirm(context, plans)
    test = context.splits.test
    assert test is not None
    assert confirmation.dense.top1_test == pytest.approx(accuracy(context.model, test))
    for plan, measurement, model in zip(plans, confirmation.measured, confirmation.models, strict=True):
        assert measurement.macs == count_macs(examine(context.model), plan)
        assert measurement.top1 == pytest.approx(accuracy(model, context.splits.val))
        assert measurement.top1_test == pytest.approx(accuracy(model, test))
        assert measurement.throughput_img_s == pytest.approx(confirmation.dense.throughput_img_s * measurement.speedup)


def test_front_is_confirmed_on_the_images_for_it_and_in_more_rounds(context: TrialContext) -> None:
    rounds: list[int] = []

    def timer(*arguments: Any, num_rounds: int, **options: Any) -> Any:
        rounds.append(num_rounds)
        return tiny.timer(*arguments, num_rounds=num_rounds, **options)

    splits = replace(context.splits, confirm=tiny.images(32, seed=9))
    confirmation = confirm(replace(context, splits=splits, timer=timer), [])
    assert confirmation.dense.top1 == pytest.approx(accuracy(context.model, tiny.images(32, seed=9)))
    assert rounds == [3 * context.config.measure.num_rounds]


def test_plans_of_equal_shape_are_timed_once(context: TrialContext) -> None:
    dense_plan = context.dense_plan
    first, *later = dense_plan.blocks
    one, other = (
        replace(dense_plan, blocks=(replace(first, keep_hidden=kept), *later))
        for kept in (first.keep_hidden[:-1], first.keep_hidden[1:])
    )
    cut = replace(dense_plan, blocks=dense_plan.blocks[:2])
    timed: list[nn.Module] = []

    def timer(dense: nn.Module, models: list[nn.Module], *_: Any, **__: Any) -> Any:
        timed.extend(models)
        return None, [count_params(model) for model in models]

    plans: list[Plan] = [one, cut, other]
    timings: list[Any] = time_shapes(replace(context, timer=timer), plans)
    assert timings == [count_params(build(context, plan)) for plan in plans]
    assert len(timed) == 2


def test_conditions_of_the_final_figures_are_told(context: TrialContext) -> None:
    conditions = confirm(context, []).conditions
    assert conditions.pop("device")
    threads = torch.get_num_threads()
    assert conditions == {"precision": "float32", "threads": threads, "batch_size": 8, "torch": torch.__version__}


def test_front_is_confirmed_without_a_test_split_and_without_points(context: TrialContext) -> None:
    confirmation = confirm(replace(context, splits=tiny.splits(test=False)), [])
    assert (confirmation.dense.top1_test, confirmation.measured, confirmation.models) == (None, [], [])
