"""Learned width: straight-through gradients by hand, masks against pruned models, targets, multipliers, resuming."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruning.errors import SettingError, VitfrontError
from pruning.measure.cost import count_macs, count_params
from pruning.measure.widths import multiples
from pruning.methods.width import Lagrangian, Learned, RatioGradient, TopShare, WidthSettings, WidthTraining
from pruning.model.anatomy import blocks_of, classify, embed, examine
from pruning.model.exits import fit_exits
from pruning.model.gates import BlockGates, FixedGates, GatedBlock, gates_of_plan, plan_of_gates
from pruning.model.surgery import apply_plan, as_slim, keep_all_plan
from pruning.training import Jitter
from tests.pruning_tests import builders
from tests.pruning_tests.model.test_families import batch_of, model_of, plan_of

SETTINGS = WidthSettings(target_ratio=0.6, epochs=2, batch_size=16, jitter=Jitter(max_shift=0))
IMAGES = builders.toy_images(48, seed=3)


def trained(settings: WidthSettings = SETTINGS, **more: Any) -> tuple[nn.Module, list[Learned]]:
    model = builders.toy_model()
    training = WidthTraining(model, IMAGES, settings, **more)
    for _ in range(settings.epochs):
        training.run_epoch()
    return model, training.finish()


def gated_logits(model: nn.Module, gates: list[BlockGates], x: Tensor) -> Tensor:
    stream, anatomies = embed(model, x), examine(model).blocks
    for block, each, own in zip(blocks_of(model), anatomies, gates, strict=True):
        stream = GatedBlock(as_slim(block, each, is_last=False), FixedGates(own))(stream)
    return classify(model, stream)


@pytest.mark.parametrize(
    ("ratio_gradient", "expected"),
    [
        pytest.param("edge", 4 * ((3 + 4) / 2 + (8 + 5) / 2), id="of the last open and the first closed"),
        pytest.param("open", 2 + 3 + 7 + 8, id="of all that are open"),
    ],
)
def test_gradients_go_straight_through_the_mask(ratio_gradient: RatioGradient, expected: float) -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.4, 0.2, 0.8, 0.6]], requires_grad=True)
    ratio = torch.tensor(0.5, requires_grad=True)
    mask = TopShare.apply(scores, ratio, ratio_gradient)
    assert mask.tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    (mask * weights).sum().backward()
    assert scores.grad is not None and ratio.grad is not None
    assert torch.equal(scores.grad, weights)  # as if the mask were the scores
    assert ratio.grad.item() == expected


def test_the_gradient_at_the_edge_is_what_one_unit_more_or_less_does_to_the_loss() -> None:
    scores, weights = torch.arange(64.0), torch.randn(64, generator=torch.Generator().manual_seed(0))
    ratio = torch.tensor(0.5, requires_grad=True)
    (TopShare.apply(scores, ratio, "edge") * weights).sum().backward()

    def loss(count: int) -> float:
        return float((TopShare.apply(scores, torch.tensor(count / 64), "edge") * weights).sum())

    assert ratio.grad is not None
    reach = 4  # a sixteenth of the units, each way
    assert ratio.grad.item() == pytest.approx((loss(32 + reach) - loss(32 - reach)) / (2 * reach / 64), rel=1e-5)


@pytest.mark.parametrize(("ratio", "edge"), [(1.0, [3.0]), (0.25, [1.0, 2.0])])
def test_at_the_end_of_a_row_the_edge_has_one_side(ratio: float, edge: list[float]) -> None:
    at = torch.tensor(ratio, requires_grad=True)
    gradients = torch.tensor([1.0, 2.0, 3.0, 3.0])
    (TopShare.apply(torch.tensor([4.0, 3.0, 2.0, 1.0]), at, "edge") * gradients).sum().backward()
    assert at.grad is not None and at.grad.item() == 4 * sum(edge) / len(edge)


@pytest.mark.parametrize(("ratio", "kept"), [(1e-9, 1), (0.25, 1), (0.2501, 2), (1.0, 4)])
def test_a_layer_keeps_as_many_units_as_its_ratio_rounded_up(ratio: float, kept: int) -> None:
    mask = TopShare.apply(torch.tensor([3.0, 3.0, 1.0, 2.0]), torch.tensor(ratio), "edge")
    assert mask.sum() == kept
    assert mask[0] == 1  # of equal scores the first


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


@pytest.mark.parametrize("family", ["vit", "qk_norm", "deit3", "swin"])
def test_gates_of_0_and_1_give_the_logits_of_the_pruned_model(family: str) -> None:
    model = model_of(family)
    plan, anatomy = plan_of(examine(model)), examine(model)
    gates = [gates_of_plan(each, block) for each, block in zip(plan.blocks, anatomy.blocks, strict=True)]
    assert [plan_of_gates(each, block) for each, block in zip(gates, anatomy.blocks, strict=True)] == list(plan.blocks)
    x = batch_of(family, 3)
    torch.testing.assert_close(gated_logits(model, gates, x), apply_plan(model, plan)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", ["macs", "params"])
@pytest.mark.parametrize("target", [0.4, 0.6, 0.8])
def test_target_is_hit_from_below_within_a_hundredth(count: Any, target: float) -> None:
    model, (learned,) = trained(replace(SETTINGS, target_ratio=target, count=count))
    anatomy = examine(model)
    if count == "macs":
        share = count_macs(anatomy, learned.plan) / count_macs(anatomy, keep_all_plan(anatomy))
    else:
        share = count_params(learned.model) / count_params(model)
    assert target - 0.01 <= share <= target


@pytest.mark.parametrize("seed", range(30))
def test_the_end_is_at_the_target_wherever_the_thresholds_stand(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    training = WidthTraining(builders.toy_model(), IMAGES, SETTINGS)
    for gates in training.gates:
        for threshold in gates.thresholds.values():
            threshold.data.fill_(torch.randn((), generator=generator) * [3.0, 60.0][seed % 2])
    share = training._size(training._plan_at_target()) / training.whole
    assert SETTINGS.target_ratio - 0.01 <= share <= SETTINGS.target_ratio


def test_share_of_open_thresholds_is_the_whole_and_has_a_gradient() -> None:
    training = WidthTraining(builders.toy_model(), IMAGES, SETTINGS)
    share = training.share()
    assert share.item() == pytest.approx(1, abs=1e-3)
    share.backward()
    for gates in training.gates:
        assert all(threshold.grad is not None and threshold.grad > 0 for threshold in gates.thresholds.values())


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_share_is_that_of_the_model_that_is_built(family: str) -> None:
    model = model_of(family)
    for count in ("macs", "params"):
        training = WidthTraining(model, builders.images(4), replace(SETTINGS, target_ratio=0.9, count=count))
        plan = plan_of(examine(model))
        small, anatomy = apply_plan(model, plan), examine(model)
        size = count_macs(anatomy, plan) if count == "macs" else count_params(small)
        assert training._size(plan.blocks) == size


def test_exits_are_trained_along_and_give_a_model_each() -> None:
    model = builders.toy_model()
    depth = examine(model).depth
    heads = fit_exits(model, IMAGES, [1, depth], epochs=2)
    training = WidthTraining(model, IMAGES, SETTINGS, heads=heads)
    before = {block: builders.state(tail) for block, tail in training.tails.items()}
    for _ in range(SETTINGS.epochs):
        training.run_epoch()
    learned = training.finish()
    assert [each.plan.exit_block for each in learned] == [1, depth]
    assert learned[0].plan.blocks == learned[1].plan.blocks[:1]
    assert not builders.same_state(training.tails[1], before[1])
    for each in learned:
        logits = each.model(IMAGES.normalized(slice(0, 4), torch.device("cpu")))
        assert logits.shape == (4, examine(model).num_classes) and logits.isfinite().all()
        assert not any(parameter.requires_grad for parameter in each.model.parameters())


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


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_training_goes_on_from_its_state_as_if_it_had_not_stopped(stop_after: int) -> None:
    settings = replace(SETTINGS, epochs=3)
    model = builders.toy_model()
    whole = WidthTraining(model, IMAGES, settings)
    told = [whole.run_epoch() for _ in range(3)]
    first = WidthTraining(model, IMAGES, settings)
    for _ in range(stop_after):
        first.run_epoch()
    second = WidthTraining(model, IMAGES, settings)
    second.load(first.state())
    assert [second.run_epoch() for _ in range(3 - stop_after)] == told[stop_after:]
    (one,), (other,) = whole.finish(), second.finish()
    assert one.plan == other.plan
    assert builders.same_state(one.model, builders.state(other.model))


def test_a_target_out_of_reach_says_what_is_within() -> None:
    with pytest.raises(SettingError, match=r"target 0.0001 of the macs cannot be reached; give 0\.\d+ at least"):
        WidthTraining(builders.toy_model(), IMAGES, replace(SETTINGS, target_ratio=1e-4))
    message = ""
    try:
        WidthTraining(builders.toy_model(), IMAGES, replace(SETTINGS, target_ratio=1e-4))
    except SettingError as error:
        message = str(error)
    least = float(message.split("give ")[1].split(" ")[0])
    WidthTraining(builders.toy_model(), IMAGES, replace(SETTINGS, target_ratio=least))


def test_a_loss_that_is_not_finite_names_step_and_learning_rate() -> None:
    training = WidthTraining(builders.toy_model(), IMAGES, replace(SETTINGS, learning_rate=1e30))
    with pytest.raises(
        VitfrontError, match=r"diverged in step \d+: the loss is .*; lower the learning rate \(1e\+30\)"
    ):
        training.run_epoch()
    assert math.isfinite(training.lagrangian.linear)
