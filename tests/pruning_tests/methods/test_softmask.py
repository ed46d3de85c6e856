"""Soft masks: folded gates against gated blocks, the choice against brute force, targets, idle units, resuming."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruning.errors import SettingError, VitfrontError
from pruning.measure.cost import count_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.softmask import SoftMaskSettings, SoftMaskTraining, _units_above, folded, weighted_mean
from pruning.model.anatomy import examine
from pruning.model.gates import BlockGates, gates_of_plan
from pruning.model.surgery import apply_plan, keep_all_plan
from pruning.plan import BlockPlan
from pruning.training import Jitter
from tests.pruning_tests import builders
from tests.pruning_tests.model.test_families import batch_of, model_of
from tests.pruning_tests.model.test_gates import logits_with_gates

SETTINGS = SoftMaskSettings(target_ratio=0.6, epochs=2, batch_size=16, jitter=Jitter(max_shift=0))
IMAGES = builders.toy_images(48, seed=3)


def trained(model: nn.Module, settings: SoftMaskSettings = SETTINGS, **more: Any) -> SoftMaskTraining:
    training = SoftMaskTraining(model, IMAGES, settings, **more)
    while not training.is_done:
        training.run_epoch()
    return training


def random_gates(model: nn.Module, seed: int = 0) -> list[BlockGates]:
    """Some negative and some 0; those of pairs are 1 where qk-norm wants it."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.8)

    gates = []
    for block in examine(model).blocks:
        channels = block.num_heads, block.head_dim
        qk = torch.ones(channels) if block.has_qk_norm else drawn(*channels)
        gates.append(BlockGates(qk=qk, v=drawn(*channels), hidden=drawn(block.num_hidden)))
    return gates


# Gates become weights


@pytest.mark.parametrize("family", ["vit", "distilled", "registers", "deit3", "qk_norm", "swin", "swin_oblong"])
def test_folded_gates_give_the_logits_of_the_gated_model_which_is_left_alone(family: str) -> None:
    model, x = model_of(family).double(), batch_of(family).double()
    before = builders.state(model)
    gates = [
        BlockGates(qk=block.qk.double(), v=block.v.double(), hidden=block.hidden.double())
        for block in random_gates(model)
    ]
    logits = logits_with_gates(model, gates, x)
    torch.testing.assert_close(folded(model, gates)(x), logits, atol=1e-10, rtol=1e-10)
    assert (logits - model(x)).abs().max() > 1e-2
    assert builders.same_state(model, before)


def test_gates_are_folded_where_there_is_no_bias() -> None:
    model, x = builders.model("no_qkv_bias"), builders.batch()
    gates = random_gates(model)
    torch.testing.assert_close(folded(model, gates)(x), logits_with_gates(model, gates, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["vit", "distilled", "qk_norm", "swin"])
def test_the_smaller_model_does_what_the_trained_one_does_with_the_gates_that_stay(family: str) -> None:
    model, x = model_of(family), batch_of(family)
    training = trained(model, replace(SETTINGS, target_ratio=0.7))
    learned = training.finish()
    gates = []
    for soft, plan, block in zip(training.gates, learned.plan.blocks, training.anatomy.blocks, strict=True):
        kept = gates_of_plan(plan, block)
        gates.append(BlockGates(qk=soft.qk * kept.qk, v=soft.v * kept.v, hidden=soft.hidden * kept.hidden))
        assert (soft.v - 1).abs().mean() > 0.01 and (block.has_qk_norm or (soft.qk - 1).abs().mean() > 0.01)
    logits = logits_with_gates(training.trained, gates, x)
    torch.testing.assert_close(learned.model(x), logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(apply_plan(model, learned.plan)(x), logits, rtol=1e-2, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in learned.model.parameters())
    assert not any(module.training for module in learned.model.modules())


# The choice


def brute_force(
    gates: BlockGates, allowed: AllowedWidths, channel_threshold: float, hidden_threshold: float
) -> tuple[float, BlockPlan]:
    """The choice of heads, widths and channels with the largest sum of |gate| - threshold, and that sum."""
    num_heads, head_dim = gates.qk.shape
    best: tuple[float, BlockPlan] | None = None
    for count, (qk_width, v_width), num_hidden in itertools.product(
        range(1, num_heads + 1), allowed.attention, allowed.hidden
    ):
        for heads in itertools.combinations(range(num_heads), count):
            chosen = [
                [
                    max(itertools.combinations(range(head_dim), width), key=lambda kept: row[list(kept)].sum())
                    for row in kind.abs()[list(heads)]
                ]
                for kind, width in ((gates.qk, qk_width), (gates.v, v_width))
            ]
            hidden = max(
                itertools.combinations(range(len(gates.hidden)), num_hidden),
                key=lambda kept: gates.hidden.abs()[list(kept)].sum(),
            )
            worth = sum(
                (kind[head, channel].abs().item() - channel_threshold)
                for kind, kept_by_head in zip((gates.qk, gates.v), chosen, strict=True)
                for head, kept in zip(heads, kept_by_head, strict=True)
                for channel in kept
            ) + sum(gates.hidden[unit].abs().item() - hidden_threshold for unit in hidden)
            plan = BlockPlan(
                keep_heads=heads, keep_qk=tuple(chosen[0]), keep_v=tuple(chosen[1]), keep_hidden=hidden, num_tokens=16
            )
            if best is None or worth > best[0]:
                best = worth, plan
    assert best is not None
    return best


@pytest.mark.parametrize(
    ("threshold", "round_to", "seed"), [(0.0, 1, 0), (0.3, 2, 1), (0.7, 1, 1), (0.7, 2, 0), (1.1, 1, 0), (9.0, 2, 1)]
)
def test_the_choice_is_that_of_brute_force(threshold: float, round_to: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    anatomy = replace(builders.anatomy().blocks[0], num_heads=3, head_dim=3, num_hidden=5)
    gates = BlockGates(
        qk=torch.randn(3, 3, generator=generator),
        v=torch.randn(3, 3, generator=generator),
        hidden=torch.randn(5, generator=generator),
    )
    allowed = multiples(anatomy, round_to)
    _, plan = brute_force(gates, allowed, threshold, 0.5 * threshold)
    assert _units_above(gates, anatomy, allowed, threshold, 0.5 * threshold) == plan


def test_where_all_heads_keep_equally_many_the_choice_is_the_units_above_one_threshold() -> None:
    model = builders.model()
    training = SoftMaskTraining(model, IMAGES, SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for gates in training.gates:
        with torch.no_grad():
            gates.hidden.copy_(torch.randn(gates.hidden.shape, generator=generator))
            for kind in (gates.qk, gates.v):  # three of every head are below 0.5, five above it
                kind.copy_(torch.tensor([0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.5])[torch.randperm(8)].expand(3, 8))
    for gates, plan in zip(training.gates, training._plan(0.5, 0.5).blocks, strict=True):
        for kept, kind in ((plan.keep_qk, gates.qk), (plan.keep_v, gates.v)):
            assert [list(row) for row in kept] == [row.nonzero()[:, 0].tolist() for row in kind.abs() > 0.5]
        assert list(plan.keep_hidden) == (gates.hidden.abs() > 0.5).nonzero()[:, 0].tolist()


def test_room_that_a_large_step_of_the_heads_leaves_is_filled_with_hidden_units() -> None:
    training = SoftMaskTraining(builders.model(), IMAGES, replace(SETTINGS, target_ratio=0.5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gates in training.gates:  # channels stay or go all at once
            gates.qk.fill_(0.5)
            gates.v.fill_(0.5)
            gates.hidden.copy_(torch.rand(gates.hidden.shape, generator=generator))
    plan = training._plan_at_target()
    assert {block.shape.v_width * block.shape.num_heads for block in plan.blocks} == {1}
    assert 0.49 <= count_macs(training.anatomy, plan) / training.dense_macs <= 0.5
    kept = [gates.hidden[list(block.keep_hidden)] for gates, block in zip(training.gates, plan.blocks, strict=True)]
    assert 0.05 < torch.cat(kept).min() < 0.45  # below the threshold of the channels


def test_with_qk_norm_the_pairs_of_a_head_go_with_its_values() -> None:
    training = SoftMaskTraining(builders.model("qk_norm"), IMAGES, SETTINGS)
    with torch.no_grad():
        training.gates[1].v[2] = 0.1
        training.gates[2].v[:] = 0.1
    heads = [block.keep_heads for block in training._plan(0.5, 0.5).blocks]
    assert heads == [(0, 1, 2), (0, 1), (0,)]  # one at least


@pytest.mark.parametrize(("family", "target"), [("vit", 0.5), ("distilled", 0.8), ("qk_norm", 0.5), ("swin", 0.8)])
def test_target_is_hit_from_below_within_a_hundredth(family: str, target: float) -> None:
    model = model_of(family)
    anatomy, learned = examine(model), trained(model, replace(SETTINGS, target_ratio=target, epochs=1)).finish()
    share = count_macs(anatomy, learned.plan) / count_macs(anatomy, keep_all_plan(anatomy))
    assert target - 0.01 <= share <= target
    if family == "qk_norm":
        assert all(block.shape.qk_width == 8 for block in learned.plan.blocks)
    assert learned.model(batch_of(family)).isfinite().all()


def test_widths_are_those_that_are_allowed() -> None:
    model = builders.toy_model()
    allowed_widths = [multiples(block, 4) for block in examine(model).blocks]
    learned = trained(model, allowed_widths=allowed_widths).finish()
    assert count_macs(examine(model), learned.plan) <= 0.6 * count_macs(examine(model), keep_all_plan(examine(model)))
    for block, allowed in zip(learned.plan.blocks, allowed_widths, strict=True):
        assert (block.shape.qk_width, block.shape.v_width) in allowed.attention
        assert block.shape.num_hidden in allowed.hidden


# Training


def test_the_penalty_is_the_mean_gate_by_multiply_adds() -> None:
    training = SoftMaskTraining(model_of("swin"), IMAGES, SETTINGS)
    assert weighted_mean(training.gates).item() == pytest.approx(1)
    generator, top, bottom = torch.Generator().manual_seed(0), 0.0, 0.0
    for gates, block in zip(training.gates, training.anatomy.blocks, strict=True):
        channel = block.num_patches * (2 * block.width + 16)  # windows of 4 x 4
        for parameter, macs in (
            (gates.qk, channel),
            (gates.v, channel),
            (gates.hidden, block.num_patches * 2 * block.width),
        ):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            top += macs * parameter.abs().sum().item()
            bottom += macs * parameter.numel()
    mean = weighted_mean(training.gates)
    assert mean.item() == pytest.approx(top / bottom, rel=1e-5)
    mean.backward()
    first = training.gates[0].hidden
    assert first.grad is not None
    torch.testing.assert_close(first.grad, first.detach().sign() * (64 * 4 * 2 * 16 / bottom))


def test_gates_start_at_the_dense_model_and_shrink_by_the_penalty() -> None:
    model = builders.toy_model()
    frozen = replace(SETTINGS, learning_rate=0.0, gate_rate=0.0, weight_decay=0.0, distillation=1.0)
    epoch = SoftMaskTraining(model, IMAGES, frozen).run_epoch()
    assert epoch["loss"] == pytest.approx(0, abs=1e-5) and epoch["gates"] == 1
    gates = {l1: SoftMaskTraining(model, IMAGES, replace(SETTINGS, l1=l1)).run_epoch()["gates"] for l1 in (0.0, 3.0)}
    assert gates[3.0] < gates[0.0] - 0.01


def test_units_that_do_nothing_go_first() -> None:
    model: Any = builders.toy_model()
    idle = torch.arange(96) % 3 == 0
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.weight[:, idle] = 0
            block.attn.proj.weight[:, 5::8] = 0  # the sixth value channel of every head
    anatomy = examine(model)
    dense = keep_all_plan(anatomy)
    rest = [
        replace(
            block, keep_hidden=tuple((~idle).nonzero()[:, 0].tolist()), keep_v=((0, 1, 2, 3, 4, 6, 7),) * 3
        )
        for block in dense.blocks
    ]  # fmt: skip
    share = count_macs(anatomy, replace(dense, blocks=tuple(rest))) / count_macs(anatomy, dense)
    # Neither the weights nor what is idle may change; only the gates do.
    settings = replace(
        SETTINGS, target_ratio=share + 1e-6, epochs=6, learning_rate=0.0, weight_decay=0.0, l1=0.003, gate_rate=0.02
    )
    training = SoftMaskTraining(model, builders.toy_images(64, seed=1), settings)
    while not training.is_done:
        training.run_epoch()
    plan = training.finish().plan
    idle_units = {*idle.nonzero()[:, 0].tolist()}
    kept = sum(len(idle_units & {*block.keep_hidden}) for block in plan.blocks)
    assert kept <= 0.05 * len(idle_units) * anatomy.depth  # a third, if they went by chance


def test_the_dense_model_is_left_as_it_was() -> None:
    model = builders.toy_model()
    before = builders.state(model)
    trained(model).finish()
    assert builders.same_state(model, before)


def test_a_training_that_is_not_at_its_end_gives_no_model() -> None:
    training = SoftMaskTraining(builders.toy_model(), IMAGES, SETTINGS)
    training.run_epoch()
    with pytest.raises(AssertionError, match="not at its end"):
        training.finish()


def test_a_training_goes_on_from_its_saved_state_as_if_it_had_not_stopped() -> None:
    settings = replace(SETTINGS, epochs=3, jitter=Jitter(flip=True))
    model = model_of("swin")  # whose blocks are made anew around the weights
    unbroken, stopped, resumed = (SoftMaskTraining(model, IMAGES.take(slice(0, 32)), settings) for _ in range(3))
    epochs = [unbroken.run_epoch() for _ in range(3)]
    stopped.run_epoch()
    file = io.BytesIO()
    torch.save(stopped.state(), file)
    file.seek(0)
    resumed.load(torch.load(file, weights_only=True))
    assert not resumed.is_done
    assert [resumed.run_epoch() for _ in range(2)] == epochs[1:]
    one, other = unbroken.finish(), resumed.finish()
    assert one.plan == other.plan
    assert builders.same_state(one.model, builders.state(other.model))


# Refusals


@pytest.mark.parametrize("family", ["vit", "qk_norm", "swin"])
def test_a_target_out_of_reach_says_what_is_within(family: str) -> None:
    model = model_of(family)
    with pytest.raises(
        SettingError, match=r"target 0.0001 of the macs cannot be reached; give 0\.\d+ at least"
    ) as refused:
        SoftMaskTraining(model, IMAGES, replace(SETTINGS, target_ratio=1e-4))
    least = float(str(refused.value).split("give ")[1].split(" ")[0])
    plan = trained(model, replace(SETTINGS, target_ratio=least, epochs=1)).finish().plan
    for block, dense in zip(plan.blocks, examine(model).blocks, strict=True):
        assert block.shape.num_heads == block.shape.v_width == 1
        assert block.shape.qk_width == (dense.head_dim if dense.has_qk_norm else 1)
    with pytest.raises(SettingError, match="1 at most"):
        SoftMaskTraining(model, IMAGES, replace(SETTINGS, target_ratio=1.001))


def test_a_target_of_all_multiply_adds_keeps_all() -> None:
    model = builders.model()
    plan = trained(model, replace(SETTINGS, target_ratio=1.0, epochs=1)).finish().plan
    assert plan == replace(keep_all_plan(examine(model)), token_reduction="none")


def test_a_loss_that_is_not_finite_names_step_and_learning_rate() -> None:
    training = SoftMaskTraining(builders.toy_model(), IMAGES, replace(SETTINGS, learning_rate=1e30))
    with pytest.raises(
        VitfrontError, match=r"diverged in step \d+: the loss is .*; lower the learning rate \(1e\+30\)"
    ):
        training.run_epoch()


def test_a_gate_that_is_not_finite_is_refused_with_its_block() -> None:
    training = trained(builders.toy_model())
    with torch.no_grad():
        training.gates[1].v[0, 0] = math.nan
    with pytest.raises(VitfrontError, match="block 1: the v scores are not finite"):
        training.finish()
