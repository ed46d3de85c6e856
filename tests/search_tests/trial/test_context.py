"""The context of trials: parts of it, other settings of it, and the images that models are timed on."""

from __future__ import annotations

from dataclasses import replace

import torch

from pruning.model.anatomy import examine
from pruning.model.surgery import keep_all_plan
from search.trial.context import TrialContext
from tests.search_tests import tiny
from tests.search_tests.trial import trials


def test_a_first_look_takes_a_quarter_of_the_images(context: TrialContext) -> None:
    long = replace(context, config=trials.config(measure__num_rounds=15))
    subsampled, splits = long.subsampled(), context.splits
    assert (len(subsampled.splits.calibration), len(subsampled.splits.probe), len(subsampled.splits.val)) == (4, 10, 6)
    assert torch.equal(subsampled.splits.val.labels, splits.val.labels[::4])
    assert subsampled.config.measure.num_rounds == 6
    assert subsampled.model is context.model


def test_images_that_are_too_few_for_a_part_are_all_taken(context: TrialContext) -> None:
    few = replace(context, splits=replace(context.splits, val=tiny.images(3)))
    assert len(few.subsampled().splits.val) == 3


def test_context_without_rungs_differs_in_nothing_else(context: TrialContext) -> None:
    halving = trials.with_search(context, reduction_factor=2.0)
    assert halving.without_rungs().config == trials.with_search(context, reduction_factor=1.0).config
    assert halving.config.search.reduction_factor == 2.0


def test_context_on_another_device_has_all_of_the_trials_there(context: TrialContext) -> None:
    copied = replace(context, model=tiny.model()).to("meta")  # a model moves in place
    assert copied.device.type == "meta"
    assert all(tensor.device.type == "meta" for head in copied.exit_heads.values() for tensor in head.values())
    assert all(block.mid.metric.device.type == "meta" for blocks in copied.sensitivities.values() for block in blocks)
    assert context.device.type == "cpu"


def test_dense_plan_keeps_all(context: TrialContext) -> None:
    assert context.dense_plan == keep_all_plan(examine(context.model))


def test_few_images_are_repeated_to_fill_the_timing_batch(context: TrialContext) -> None:
    config = tiny.config(measure__batch_size=50)
    batch = replace(context, config=config).timing_batch()
    assert batch.shape == (50, 3, 16, 16)
    assert torch.equal(batch[24:48], batch[:24])
