"""Learned width: targets, multipliers, resuming."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pruning.errors import SettingError, VitfrontError
from pruning.measure.cost import count_macs, count_params
from pruning.measure.widths import multiples
from pruning.methods.model_size import BudgetUnit
from pruning.methods.width import (
    Lagrangian,
    LearnedModel,
    WidthSettings,
    WidthTraining,
)
from pruning.model.anatomy import examine
from pruning.model.exits import fit_exits
from pruning.model.surgery import keep_all_plan
from pruning.training import Jitter
from tests.pruning_tests import builders

SETTINGS = WidthSettings(target_ratio=0.6, epochs=2, batch_size=16, jitter=Jitter(max_shift=0))
IMAGES = builders.toy_images(48, seed=3)


def trained(settings: WidthSettings = SETTINGS, **more: Any) -> tuple[nn.Module, list[LearnedModel]]:
    model = builders.toy_model()
    training = WidthTraining(model, IMAGES, settings, **more)
    for _ in range(settings.epochs):
        training.run_epoch()
    return model, training.finish()


def test_thresholds_move_ever_less_once_the_target_is_reached() -> None:
    settings = replace(SETTINGS, target_ratio=0.7, epochs=8, search_share=0.9)
    training = WidthTraining(builders.toy_model(), IMAGES, settings)
    rates, reached = [], []
    while training.plans is None:
        training.run_epoch()
        rates.append(training.loop.optimizer.param_groups[-1]["lr"])
        reached.append(training.reached_step is not None)
    first = reached.index(True)
    assert 0 < first < len(rates) - 1
    assert len(set(rates[:first])) == 1
    assert all(after < before for before, after in itertools.pairwise(rates[first:-1]))
    assert rates[-1] < rates[0] / 4


def test_multipliers_rise_above_the_target_and_rest_below_it() -> None:
    lagrangian = Lagrangian(0.5, rate=2.0)
    for share, linear, square in [(0.75, 0.5, 0.125), (0.75, 1.0, 0.25), (0.4, 1.0, 0.25), (0.5, 1.0, 0.25)]:
        lagrangian.penalty(torch.tensor(share))
        assert (lagrangian.linear, lagrangian.square) == (linear, square)
    share = torch.tensor(0.75, requires_grad=True)
    value = lagrangian.penalty(share)
    value.backward()
    assert value.item() == pytest.approx(1.0 * 0.25 + 0.25 * 0.25**2)
    assert share.grad is not None and share.grad.item() == pytest.approx(1.0 + 2 * 0.25 * 0.25)
    below = torch.tensor(0.3, requires_grad=True)
    lagrangian.penalty(below).backward()
    assert below.grad is not None and below.grad.item() == 0


@pytest.mark.parametrize(("unit", "target"), [("macs", 0.4), ("params", 0.4), ("macs", 0.8), ("params", 0.6)])
def test_target_is_hit_from_below_within_a_hundredth(unit: BudgetUnit, target: float) -> None:
    model, (learned,) = trained(replace(SETTINGS, target_ratio=target, budget_unit=unit))
    anatomy = examine(model)
    if unit == "macs":
        share = count_macs(anatomy, learned.plan) / count_macs(anatomy, keep_all_plan(anatomy))
    else:
        share = count_params(learned.model) / count_params(model)
    assert target - 0.01 <= share <= target


def test_the_end_is_at_the_target_wherever_the_thresholds_stand() -> None:
    training = WidthTraining(builders.toy_model(), IMAGES, SETTINGS)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        for gates in training.gates:
            for threshold in gates.thresholds.values():
                threshold.data.fill_(torch.randn((), generator=generator) * [3.0, 60.0][seed % 2])
        share = training.size.of(training._plans_at_target()) / training.size.dense
        assert SETTINGS.target_ratio - 0.01 <= share <= SETTINGS.target_ratio


def test_the_share_of_open_thresholds_is_1_and_has_a_gradient() -> None:
    training = WidthTraining(builders.toy_model(), IMAGES, SETTINGS)
    share = training.share()
    assert share.item() == pytest.approx(1, abs=1e-3)
    share.backward()
    for gates in training.gates:
        assert all(threshold.grad is not None and threshold.grad > 0 for threshold in gates.thresholds.values())


def test_exits_are_trained_along_and_give_a_model_each() -> None:
    model = builders.toy_model()
    depth = examine(model).depth
    exit_heads = fit_exits(model, IMAGES, [1, depth], epochs=2)
    training = WidthTraining(model, IMAGES, SETTINGS, exit_heads=exit_heads)
    before = {block: builders.state(tail) for block, tail in training.tails.items()}
    for _ in range(SETTINGS.epochs):
        training.run_epoch()
    learned = training.finish()
    assert [exit_model.plan.exit_block for exit_model in learned] == [1, depth]
    assert learned[0].plan.blocks == learned[1].plan.blocks[:1]
    assert not builders.same_state(training.tails[1], before[1])
    for exit_model in learned:
        logits = exit_model.model(IMAGES.normalized(slice(0, 4), torch.device("cpu")))
        assert logits.shape == (4, examine(model).num_classes) and logits.isfinite().all()
        assert not any(parameter.requires_grad for parameter in exit_model.model.parameters())


def test_the_dense_model_is_left_as_it_was() -> None:
    model = builders.toy_model()
    before = builders.state(model)
    trained()
    assert builders.same_state(model, before)


def test_widths_are_those_that_are_allowed() -> None:
    anatomy = examine(builders.toy_model())
    allowed_widths = [multiples(block, 4) for block in anatomy.blocks]
    _, (learned,) = trained(replace(SETTINGS, target_ratio=0.5), allowed_widths=allowed_widths)
    for block, allowed in zip(learned.plan.blocks, allowed_widths, strict=True):
        assert (block.shape.qk_width, block.shape.v_width) in allowed.attention
        assert block.shape.num_hidden in allowed.hidden


def test_a_training_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    settings = replace(SETTINGS, epochs=3)  # the widths are fixed in the second
    model = builders.toy_model()
    unbroken = WidthTraining(model, IMAGES, settings)
    losses = [unbroken.run_epoch() for _ in range(3)]
    expected = unbroken.finish()[0]
    for stop_after in (1, 2):
        stopped, resumed = (WidthTraining(model, IMAGES, settings) for _ in range(2))
        for _ in range(stop_after):
            stopped.run_epoch()
        resumed.load(stopped.state())
        assert [resumed.run_epoch() for _ in range(3 - stop_after)] == losses[stop_after:]
        (learned,) = resumed.finish()
        assert learned.plan == expected.plan
        assert builders.same_state(learned.model, builders.state(expected.model))


def test_a_target_out_of_reach_says_what_is_within() -> None:
    with pytest.raises(
        SettingError, match=r"target 0.0001 of the macs cannot be reached; give 0\.\d+ at least"
    ) as refused:
        WidthTraining(builders.toy_model(), IMAGES, replace(SETTINGS, target_ratio=1e-4))
    least = float(str(refused.value).split("give ")[1].split(" ")[0])
    WidthTraining(builders.toy_model(), IMAGES, replace(SETTINGS, target_ratio=least))
    with pytest.raises(SettingError, match="1 at most"):
        WidthTraining(builders.toy_model(), IMAGES, replace(SETTINGS, target_ratio=1.001))


def test_a_loss_that_is_not_finite_names_step_and_learning_rate() -> None:
    training = WidthTraining(builders.toy_model(), IMAGES, replace(SETTINGS, learning_rate=1e30))
    with pytest.raises(
        VitfrontError, match=r"diverged in step \d+: the loss is .*; lower the learning rate \(1e\+30\)"
    ):
        training.run_epoch()
    assert math.isfinite(training.lagrangian.linear)
