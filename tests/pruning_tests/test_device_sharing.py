"""Every loop over batches lets others have the device between two of them, and no timed lap does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pruning.data import Images
from pruning.device_sharing import calling_on_yield, yield_device, yielding_between
from pruning.measure.accuracy import predict
from pruning.measure.stopwatch import fastest_precision, time_against_dense
from pruning.measure.widths import measure_allowed_widths
from pruning.methods.cascade import CascadeSettings, cascade
from pruning.methods.finetune import FinetuneSettings, Finetuning
from pruning.methods.profiling import measure_profile
from pruning.methods.softmask import SoftMaskSettings, SoftMaskTraining
from pruning.methods.width import WidthSettings, WidthTraining
from pruning.model.anatomy import examine
from pruning.model.exits import fit_exits
from pruning.repair.compensation import repaired_model
from pruning.training import TrainSettings, train
from tests.pruning_tests import builders

BATCH, NUM_IMAGES = 2, 8
DEPTH = 2


def prune(model: nn.Module, images: Images, criterion: str) -> None:
    settings = CascadeSettings(
        drop_budget=(20.0,) * DEPTH, target_macs=1, criterion=criterion, num_levels=3, batch_size=BATCH
    )
    cascade(model, images, images, settings)


WORK: dict[str, Callable[[nn.Module, Images], object]] = {
    "predict": lambda model, images: predict(model, images, batch_size=BATCH),
    "cascade by lfs": lambda model, images: prune(model, images, "lfs"),
    "cascade by taylor": lambda model, images: prune(model, images, "taylor"),
    "cascade by activation": lambda model, images: prune(model, images, "activation"),
    "cascade by obs": lambda model, images: prune(model, images, "obs"),
    "repair": lambda model, images: repaired_model(model, builders.plan(examine(model)), images, batch_size=BATCH),
    "profile": lambda model, images: measure_profile(model, images, images, token_reduction="lfe", batch_size=BATCH),
    "exits": lambda model, images: fit_exits(
        model, images, [1, 2], epochs=2, learning_rate=1e-3, distillation=0.5, batch_size=BATCH
    ),
    "training": lambda model, images: train(model, images, TrainSettings(epochs=1, batch_size=BATCH)),
    "distillation": lambda model, images: Finetuning(
        model, model, images, FinetuneSettings(epochs=1, batch_size=BATCH)
    ).run_epoch(),
    "soft mask": lambda model, images: SoftMaskTraining(
        model, images, SoftMaskSettings(target_ratio=0.5, epochs=1, batch_size=BATCH)
    ).run_epoch(),
    "learned width": lambda model, images: WidthTraining(
        model, images, WidthSettings(target_ratio=0.5, epochs=1, batch_size=BATCH)
    ).run_epoch(),
}
WITH_TEACHER = {"distillation", "soft mask", "learned width"}


@pytest.mark.parametrize("name", WORK)
def test_work_between_two_turns_is_at_most_a_pass_of_a_batch(name: str) -> None:
    work: list[int] = [0]
    """Images times linear layers that they went through, between two calls of `yield_device`."""

    def count(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.Linear):
            work[-1] += len(args[0])

    model, images = builders.model(depth=DEPTH), builders.images(NUM_IMAGES)
    whole_pass = BATCH * (4 * DEPTH + 1)
    with calling_on_yield(lambda: work.append(0)):
        handle = register_module_forward_pre_hook(count)
        try:
            WORK[name](model, images)
        finally:
            handle.remove()
    assert sum(work) >= NUM_IMAGES / BATCH * whole_pass
    assert max(work) <= whole_pass * (2 if name in WITH_TEACHER else 1)


TIMED: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "time_against_dense": lambda model, batch: time_against_dense(model, [model], batch, num_rounds=6, min_lap_s=1e-4),
    "allowed_widths": lambda model, batch: measure_allowed_widths(
        model, len(batch), token_reduction="lfe", precision="float32", repeats=1
    ),
    "precision": lambda model, batch: fastest_precision(model, batch, repeats=1),
}


@pytest.mark.parametrize("name", TIMED)
def test_nobody_gives_way_while_something_is_timed(name: str) -> None:
    turns: list[str] = []
    with calling_on_yield(lambda: turns.append("given")):
        TIMED[name](builders.model().requires_grad_(False), builders.batch(2))
    assert turns == []


def test_batches_come_as_they_are_with_a_turn_before_each() -> None:
    seen: list[str] = []
    note = seen.append
    with calling_on_yield(lambda: note("turn")):
        for batch in yielding_between(iter("ab")):
            note(batch)
    assert seen == ["turn", "a", "turn", "b"]


def test_way_is_given_by_the_innermost_and_by_nobody_outside() -> None:
    seen: list[str] = []
    with calling_on_yield(lambda: seen.append("outer")):
        with pytest.raises(KeyError), calling_on_yield(lambda: seen.append("inner")):
            yield_device()
            raise KeyError
        yield_device()
    yield_device()
    assert seen == ["inner", "outer"]
