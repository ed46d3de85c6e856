"""Promises of every channel criterion, then each against its closed form."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.errors import VitfrontError
from pruning.measure.widths import multiples
from pruning.methods.ranking import Ranking
from pruning.model.anatomy import blocks_of, embed, examine, summary_token
from pruning.model.surgery import as_slim
from pruning.repair.compensation import BlockRepair
from pruning.scores.channel import ChannelScores, ScoringInput
from pruning.scores.criteria import CRITERIA
from pruning.spectrum import low_pass
from tests.pruning_tests import builders

H, D, HIDDEN, WIDTH, TOKENS = 3, 8, 96, 24, 17
KINDS = ("qk", "v", "hidden")
LOOKING = sorted(CRITERIA.keys() - {"random"})
every_criterion = pytest.mark.parametrize("name", sorted(CRITERIA))
every_criterion_that_looks = pytest.mark.parametrize("name", LOOKING)


@functools.cache
def scoring_input(family: str = "vit", index: int = 1) -> ScoringInput:
    """One for all tests that change nothing of it."""
    return fresh_scoring_input(family, index)


def fresh_scoring_input(family: str = "vit", index: int = 1, *, num_images: int = 6) -> ScoringInput:
    """A tiny model, and what enters one of its blocks."""
    model, images = builders.model(family), builders.images(num_images)
    anatomy = examine(model).blocks[index]
    (pixels, _), *_ = images.batches(num_images)
    with torch.no_grad():
        x, x_low = embed(model, pixels), embed(model, low_pass(pixels, 0.1))
        for block in blocks_of(model)[:index]:
            x, x_low = block(x), block(x_low)
        targets = summary_token(anatomy, blocks_of(model)[index](x))
    return ScoringInput(
        model=model, anatomy=anatomy, index=index, blocks=list(blocks_of(model)[index:]), x=x, x_low=x_low,
        targets=targets, labels=images.labels, alpha=0.1, batch_size=4, precision="float32", seed=0,
        repair=BlockRepair(builders.calibration_stream(model, images, index, batch_size=4)),
    )  # fmt: skip


def equal(one: ChannelScores, other: ChannelScores) -> bool:
    return all(torch.equal(getattr(one, kind), getattr(other, kind)) for kind in KINDS)


@every_criterion
@pytest.mark.parametrize("family", list(builders.FAMILIES))
def test_scores_have_the_shape_of_the_block_and_are_finite_and_not_negative(name: str, family: str) -> None:
    scores = CRITERIA[name](scoring_input(family))
    assert (scores.qk.shape, scores.v.shape, scores.hidden.shape) == ((H, D), (H, D), (HIDDEN,))
    for kind in KINDS:
        score: Tensor = getattr(scores, kind)
        assert score.isfinite().all() and (score >= 0).all()
        if (name, family, kind) != ("obs", "qk_norm", "qk"):  # pairs that stay whole cost nothing to count
            assert score.unique().numel() > 1
        assert score.dtype == torch.float32 and not score.requires_grad


@every_criterion
def test_scores_in_bfloat16_are_float32_and_near_the_others(name: str) -> None:
    exact = scoring_input()
    scores, rough = CRITERIA[name](exact), CRITERIA[name](replace(exact, precision="bfloat16"))
    for kind in KINDS:
        wanted, got = getattr(scores, kind), getattr(rough, kind)
        assert got.dtype == torch.float32
        assert torch.linalg.vector_norm(got - wanted) < 0.2 * torch.linalg.vector_norm(wanted)


@every_criterion
def test_the_same_input_gives_the_same_scores(name: str) -> None:
    assert equal(CRITERIA[name](fresh_scoring_input()), CRITERIA[name](fresh_scoring_input()))


@every_criterion
def test_only_chance_looks_at_the_seed(name: str) -> None:
    inputs = scoring_input()
    assert equal(CRITERIA[name](inputs), CRITERIA[name](replace(inputs, seed=1))) == (name != "random")


def test_chance_is_another_for_every_seed_and_block() -> None:
    inputs = scoring_input()
    drawn = [CRITERIA["random"](replace(inputs, seed=seed, index=index)) for seed in range(3) for index in range(3)]
    assert len({scores.hidden[0].item() for scores in drawn}) == 9


@every_criterion
@pytest.mark.parametrize("flag", [True, False])
def test_the_model_is_left_as_it_was(name: str, flag: bool) -> None:
    inputs = fresh_scoring_input()
    inputs.model.requires_grad_(flag)
    before, x = builders.state(inputs.model), inputs.x.clone()
    CRITERIA[name](inputs)
    assert builders.same_state(inputs.model, before) and torch.equal(inputs.x, x)
    assert all(parameter.requires_grad == flag and parameter.grad is None for parameter in inputs.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in inputs.model.modules())


@every_criterion_that_looks
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error_that_names_block_and_layer(name: str, wrong: float) -> None:
    inputs = fresh_scoring_input(index=2)
    block: Any = inputs.blocks[0]
    with torch.no_grad():
        block.attn.qkv.weight[5, 3] = wrong
    with pytest.raises(VitfrontError, match="block 2: the qk scores are not finite"):
        CRITERIA[name](inputs)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_are_not_finite_are_refused_and_named(kind: str, wrong: float) -> None:
    scores = {"qk": torch.ones(2, 3), "v": torch.ones(2, 3), "hidden": torch.ones(4)}
    assert ChannelScores(**scores).checked(3).v is scores["v"]
    scores[kind].flatten()[-1] = wrong
    with pytest.raises(VitfrontError, match=f"block 3: the {kind} scores are not finite"):
        ChannelScores(**scores).checked(3)


@every_criterion_that_looks
def test_of_units_that_all_do_nothing_the_first_stay(name: str) -> None:
    inputs = fresh_scoring_input()
    block: Any = inputs.blocks[0]
    with torch.no_grad():
        block.mlp.fc1.weight.zero_()
        block.mlp.fc1.bias.zero_()
    scores = CRITERIA[name](inputs)
    assert (scores.hidden == 0).all()
    plan = Ranking(scores, inputs.anatomy, TOKENS, TOKENS, multiples(inputs.anatomy, 1)).plan(60, 16)
    assert plan.keep_hidden == tuple(range(HIDDEN - 60))


@every_criterion
@pytest.mark.parametrize("index", [0, 2])
def test_one_image_is_enough(name: str, index: int) -> None:
    scores = CRITERIA[name](fresh_scoring_input(index=index, num_images=1))
    assert all((getattr(scores, kind) >= 0).all() for kind in KINDS)


@every_criterion
@pytest.mark.parametrize("batch_size", [1, 6, 100])
def test_the_batch_size_changes_nothing(name: str, batch_size: int) -> None:
    inputs = scoring_input()
    wanted, got = CRITERIA[name](inputs), CRITERIA[name](replace(inputs, batch_size=batch_size))
    for kind in KINDS:
        torch.testing.assert_close(getattr(got, kind), getattr(wanted, kind), rtol=1e-3, atol=1e-8)


@every_criterion
@pytest.mark.parametrize("family", ["vit", "registers_average"])
@pytest.mark.parametrize("index", [0, 2])
def test_tokens_that_carry_a_size_of_one_change_nothing(name: str, family: str, index: int) -> None:
    inputs = scoring_input(family, index)
    blocks = [as_slim(block, inputs.anatomy, is_last=block is inputs.blocks[-1]) for block in inputs.blocks]
    x, x_low = (torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) for x in (inputs.x, inputs.x_low))
    wanted, got = CRITERIA[name](inputs), CRITERIA[name](replace(inputs, blocks=blocks, x=x, x_low=x_low))
    for kind in KINDS:
        torch.testing.assert_close(getattr(got, kind), getattr(wanted, kind), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("family", ["vit", "registers_average"])
def test_taylor_is_lfs_of_the_cross_entropy_alone_on_images_as_they_are(family: str) -> None:
    inputs = scoring_input(family)
    plain = replace(inputs, alpha=1.0, x_low=inputs.x)
    assert equal(CRITERIA["taylor"](inputs), CRITERIA["lfs"](plain))
    assert not equal(CRITERIA["taylor"](inputs), CRITERIA["lfs"](replace(inputs, alpha=1.0)))
    assert not equal(CRITERIA["taylor"](inputs), CRITERIA["lfs"](replace(inputs, x_low=inputs.x)))


def test_magnitude_is_the_mean_square_of_the_incoming_weights() -> None:
    inputs = scoring_input()
    block: Any = inputs.blocks[0]
    rows, hidden = block.attn.qkv.weight.tolist(), block.mlp.fc1.weight.tolist()
    scores = CRITERIA["magnitude"](inputs)
    for head in range(H):
        for channel in range(D):
            row = head * D + channel
            pair = rows[row] + rows[H * D + row]
            assert scores.qk[head, channel].item() == pytest.approx(sum(w * w for w in pair) / (2 * WIDTH))
            value = sum(w * w for w in rows[2 * H * D + row]) / WIDTH
            assert scores.v[head, channel].item() == pytest.approx(value)
    assert scores.hidden.tolist() == pytest.approx([sum(w * w for w in row) / WIDTH for row in hidden])


def test_activation_is_the_spread_of_a_unit_times_the_norm_of_its_outgoing_weights() -> None:
    inputs = scoring_input()
    block: Any = inputs.blocks[0]
    with torch.no_grad():
        qkv = block.attn.qkv(block.norm1(inputs.x)).flatten(0, 1)
        after = inputs.x + block.attn(block.norm1(inputs.x))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(after))).flatten(0, 1)
    q, k, v = qkv.std(dim=0, correction=0).reshape(3, H, D)
    v = v * block.attn.proj.weight.detach().norm(dim=0).reshape(H, D)
    scores = CRITERIA["activation"](inputs)
    torch.testing.assert_close(scores.v, v)
    torch.testing.assert_close(scores.qk, q * k / D**0.5 * v.square().sum(dim=1, keepdim=True).sqrt())
    of_hidden = hidden.std(dim=0, correction=0) * block.mlp.fc2.weight.detach().norm(dim=0)
    torch.testing.assert_close(scores.hidden, of_hidden)


def test_a_unit_that_never_varies_or_that_nothing_listens_to_scores_nothing_by_activation() -> None:
    inputs = fresh_scoring_input()
    block: Any = inputs.blocks[0]
    with torch.no_grad():
        block.mlp.fc1.weight[7] = 0  # its bias stays: a constant
        block.mlp.fc2.weight[:, 9] = 0
        block.attn.proj.weight[:, D + 2] = 0
    scores = CRITERIA["activation"](inputs)
    assert scores.hidden[7] < 1e-6 * scores.hidden.max()
    assert scores.hidden[9] == scores.v[1, 2] == 0
    assert (scores.hidden > 1e-3 * scores.hidden.max()).sum() == HIDDEN - 2
