"""Lottery tickets: what each training starts from, that masks stay in force, and norms against autograd and by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.errors import SettingError
from pruning.measure.accuracy import predict, top1
from pruning.methods.lottery import (
    Arm,
    LotteryResult,
    LotterySettings,
    run_lottery,
    surviving_gradient_norm,
    train_masked,
)
from pruning.methods.sparsity import Masks, apply_masks, magnitude_masks, sparse_layers
from pruning.training import Jitter, TrainSettings, train
from tests.pruning_tests import builders

TRAINING = TrainSettings(epochs=2, batch_size=32, learning_rate=1e-2, warmup_epochs=1, seed=5)
SETTINGS = LotterySettings(training=TRAINING, sparsity=0.75, rounds=2)
STEPS = 4
IMAGES, VAL = builders.toy_images(64, seed=1), builders.toy_images(40, seed=2)

State = dict[str, Tensor]


def fresh(seed: int) -> nn.Module:
    return builders.model(num_classes=4, depth=1, seed=seed)


class Lottery:
    """A lottery that was run, and what each of its trainings started from."""

    def __init__(self, settings: LotterySettings) -> None:
        self.model = fresh(settings.training.seed)
        self.origin = builders.state(self.model)
        self.starts: list[tuple[Arm, int, State]] = []
        self.result: LotteryResult = run_lottery(self.model, IMAGES, VAL, settings, fresh=fresh, on_stage=self._note)

    def _note(self, arm: Arm, number: int, model: nn.Module) -> None:
        self.starts.append((arm, number, builders.state(model)))

    def start(self, arm: Arm, number: int = 2) -> State:
        return next(state for name, at, state in self.starts if (name, at) == (arm, number))


@pytest.fixture(scope="module")
def lottery() -> Lottery:
    return Lottery(SETTINGS)


def weight_names(model: nn.Module) -> dict[str, str]:
    """Layer -> name of its weight among the model's tensors."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {layer: names[id(module.weight)] for layer, module in sparse_layers(model)}


def under(masks: Masks, state: State) -> State:
    """The state with the masked weights at 0."""
    names = {name: layer for layer, name in weight_names(fresh(0)).items()}
    return {
        name: torch.where(masks[names[name]], tensor, 0.0) if name in names else tensor
        for name, tensor in state.items()
    }


def check_equal(state: State, expected: State) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def zeros(state: State) -> dict[str, Tensor]:
    return {layer: state[name] == 0 for layer, name in weight_names(fresh(0)).items()}


def test_the_arms_are_dense_then_a_ticket_a_round_then_those_drawn_anew(lottery: Lottery) -> None:
    expected = [("dense", 0), ("ticket", 1), ("ticket", 2), ("random", 2), ("sparse-aware", 2)]
    assert [(row.arm, row.round) for row in lottery.result.rows] == expected
    assert [(arm, number) for arm, number, _ in lottery.starts] == expected
    assert {row.seed for row in lottery.result.rows} == {5}


def test_each_round_takes_the_same_share_of_what_is_left_and_the_last_reaches_the_sparsity(lottery: Lottery) -> None:
    assert [row.sparsity for row in lottery.result.rows] == [0, 0.5, 0.75, 0.75, 0.75]  # a half, and a half of that
    cubic = LotterySettings(training=TRAINING, sparsity=0.875, rounds=3)
    assert [cubic.sparsity_after(number) for number in range(4)] == pytest.approx([0, 0.5, 0.75, 0.875])


def test_weights_that_went_in_a_round_stay_gone(lottery: Lottery) -> None:
    first, last = zeros(lottery.start("ticket", 1)), zeros(lottery.start("ticket", 2))
    assert all((last[name] | ~first[name]).all() for name in first)
    assert all(torch.equal(last[name], ~mask) for name, mask in lottery.result.masks.items())


def test_the_first_mask_keeps_the_largest_weights_of_the_trained_dense_model(lottery: Lottery) -> None:
    model = fresh(5)
    train(model, IMAGES, TRAINING)
    expected = magnitude_masks(model, 0.5)
    assert all(torch.equal(gone, ~expected[name]) for name, gone in zeros(lottery.start("ticket", 1)).items())
    assert lottery.result.rows[0].top1 == top1(predict(model, VAL), VAL.labels)


def test_a_ticket_starts_from_the_first_weights_and_nothing_else(lottery: Lottery) -> None:
    check_equal(lottery.start("dense", 0), lottery.origin)
    for number in (1, 2):
        start = lottery.start("ticket", number)
        masks = {name: ~gone for name, gone in zeros(start).items()}
        check_equal(start, under(masks, lottery.origin))


@pytest.mark.parametrize("rewind_step", [1, 3, STEPS])
def test_a_ticket_may_start_from_where_training_was_after_some_steps(rewind_step: int) -> None:
    model, early = fresh(5), {}

    def note(step: int) -> None:
        if step + 1 == rewind_step:
            early.update(builders.state(model))

    train(model, IMAGES, TRAINING, after_step=note)
    lottery = Lottery(replace(SETTINGS, rewind_step=rewind_step, rounds=1))
    check_equal(lottery.start("ticket", 1), under(lottery.result.masks, early))
    assert not torch.equal(early["head.weight"], lottery.origin["head.weight"])


def test_the_arms_drawn_anew_have_the_tickets_mask_and_weights_of_their_own(lottery: Lottery) -> None:
    ticket, random, scaled = (lottery.start(arm) for arm in ("ticket", "random", "sparse-aware"))
    check_equal(random, under(lottery.result.masks, builders.state(fresh(~5))))
    for layer, name in weight_names(lottery.model).items():
        kept = lottery.result.masks[layer]
        assert torch.equal(random[name] != 0, kept) and torch.equal(scaled[name] != 0, kept)
        assert not (random[name] == ticket[name])[kept].any()


def test_sparse_aware_weights_are_scaled_by_the_inputs_that_each_output_has_left(lottery: Lottery) -> None:
    random, scaled = lottery.start("random"), lottery.start("sparse-aware")
    layers = weight_names(lottery.model)
    for layer, name in layers.items():
        for row, (before, after) in enumerate(zip(random[name], scaled[name], strict=True)):
            left = sum(lottery.result.masks[layer][row].tolist())
            factor = math.sqrt(len(before) / left) if left else 1.0
            torch.testing.assert_close(after, before * factor)
    unmasked = random.keys() - set(layers.values())
    check_equal({name: scaled[name] for name in unmasked}, {name: random[name] for name in unmasked})


def test_all_arms_take_the_same_steps(lottery: Lottery) -> None:
    assert SETTINGS.num_steps(len(IMAGES)) == STEPS
    assert [len(row.gradient_norms) for row in lottery.result.rows] == [STEPS] * 5
    assert all(math.isfinite(norm) and norm > 0 for row in lottery.result.rows for norm in row.gradient_norms)


def test_the_given_model_is_left_as_it_was(lottery: Lottery) -> None:
    assert builders.same_state(lottery.model, lottery.origin)


def test_the_same_seed_gives_the_same_lottery_and_another_another(lottery: Lottery) -> None:
    assert Lottery(SETTINGS).result.rows == lottery.result.rows
    other = Lottery(replace(SETTINGS, training=replace(TRAINING, seed=6), rounds=1)).start("random", 1)
    assert not torch.equal(other["head.weight"], lottery.start("random")["head.weight"])


def half(model: nn.Module) -> Masks:
    """Half of the weights, drawn."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(layer.weight.shape, generator=generator) < 0.5 for name, layer in sparse_layers(model)}


def test_masked_weights_are_zero_after_every_step_while_the_others_learn() -> None:
    model = fresh(0)
    masks, before, seen = half(model), builders.state(model), []

    def check(step: int) -> None:
        for name, layer in sparse_layers(model):
            assert (layer.weight[~masks[name]] == 0).all()
        seen.append(step)

    train_masked(model, masks, IMAGES, TRAINING, after_step=check)
    assert seen == list(range(STEPS))
    for layer, name in weight_names(model).items():
        now = model.state_dict()[name]
        assert (now[~masks[layer]] == 0).all()
        assert (now != before[name])[masks[layer]].float().mean() > 0.99
    assert not any(module.training for module in model.modules())


def test_masked_weights_keep_their_gradient_since_muon_turns_that_of_a_whole_matrix() -> None:
    model = fresh(0)
    masks = half(model)
    train_masked(model, masks, IMAGES, TRAINING)
    assert all((layer.weight.grad[~masks[name]] != 0).any() for name, layer in sparse_layers(model))


def test_what_masked_weights_were_before_changes_nothing() -> None:
    model = fresh(0)
    masks, other = half(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in sparse_layers(other):
            layer.weight[~masks[name]] = 100.0
    assert train_masked(model, masks, IMAGES, TRAINING) == train_masked(other, masks, IMAGES, TRAINING)
    assert builders.same_state(other, builders.state(model))


def test_training_without_a_mask_is_plain_training() -> None:
    plain, masked = fresh(0), fresh(0)
    train(plain, IMAGES, TRAINING)
    train_masked(masked, magnitude_masks(masked, 0.0), IMAGES, TRAINING)
    assert builders.same_state(masked, builders.state(plain))


def test_the_gradient_norm_is_that_of_the_surviving_weights_alone() -> None:
    model = fresh(0).requires_grad_(True)
    masks, kept = half(model), 0
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1000.0)
    for name, layer in sparse_layers(model):
        layer.weight.grad = torch.where(masks[name], 3.0, 1000.0)
        kept += sum(masks[name].flatten().tolist())
    assert surviving_gradient_norm(model, masks) == pytest.approx(3 * math.sqrt(kept))


def test_the_first_norm_is_that_of_the_weights_a_training_starts_from() -> None:
    whole_batch: dict[str, Any] = {"batch_size": 1000, "jitter": Jitter(max_shift=0)}
    model = fresh(0)
    masks, other = half(model), copy.deepcopy(model).requires_grad_(True)
    first, *_ = train_masked(model, masks, IMAGES, replace(TRAINING, **whole_batch))
    apply_masks(other, masks)
    loss = F.cross_entropy(other(IMAGES.normalized(slice(None))), IMAGES.labels)
    weights = [layer.weight for _, layer in sparse_layers(other)]
    gradients = torch.autograd.grad(loss, weights)
    left = [gradient[mask] for gradient, mask in zip(gradients, masks.values(), strict=True)]
    assert first == pytest.approx(float(torch.cat(left).norm()), rel=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, math.nan])
def test_a_sparsity_that_prunes_nothing_or_everything_is_refused(sparsity: float) -> None:
    with pytest.raises(SettingError, match="is out of range; give more than 0 and less than 1"):
        LotterySettings(training=TRAINING, sparsity=sparsity)


def test_no_rounds_are_refused() -> None:
    with pytest.raises(SettingError, match="0 rounds prune nothing"):
        LotterySettings(training=TRAINING, rounds=0)


@pytest.mark.parametrize("rewind_step", [-1, STEPS + 1])
def test_a_rewind_step_outside_the_training_is_refused_before_it_starts(rewind_step: int) -> None:
    with pytest.raises(SettingError, match=rf"rewind step {rewind_step} is not in the training; give 0 to {STEPS}"):
        Lottery(replace(SETTINGS, rewind_step=rewind_step))
