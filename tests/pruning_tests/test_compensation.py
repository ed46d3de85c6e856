"""Moments and the repair against numpy, scikit-learn and cases in which nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from pruning.anatomy import blocks_of, embed, examine, parts_of
from pruning.compensation import BlockMoments, Moments, block_moments, prune_and_repair, repair_block
from pruning.errors import PlanError
from pruning.plan import Plan
from pruning.surgery import apply_plan, keep_all_block, keep_all_plan, slim_block
from tests.pruning_tests import made


def samples(count: int = 200, width: int = 9, *, seed: int = 0) -> Tensor:
    """Correlated, of unequal spread, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed * torch.logspace(-1, 1, width) + 5 * torch.randn(width, generator=generator)


def moments_of(*batches: Tensor) -> Moments:
    moments = Moments()
    for batch in batches:
        moments.add(batch)
    return moments


@pytest.mark.parametrize("sizes", [(200,), (1, 199), (50, 150), (64, 64, 64, 8)])
def test_moments_equal_those_of_all_samples_whatever_the_batches(sizes: tuple[int, ...]) -> None:
    x = samples()
    moments = moments_of(*x.split(sizes))
    everything = x.double().numpy()
    assert moments.count == 200
    np.testing.assert_allclose(moments.mean.numpy(), everything.mean(axis=0), rtol=1e-5)
    expected = np.cov(everything, rowvar=False, bias=True)
    np.testing.assert_allclose(moments.covariance.numpy(), expected, atol=1e-4 * expected.max())


def test_moments_of_tokens_are_those_of_their_rows() -> None:
    x = samples()
    flat, shaped = moments_of(x), moments_of(x.reshape(4, 50, 9))
    assert shaped.count == 200
    torch.testing.assert_close(shaped.covariance, flat.covariance)


def test_a_mean_far_above_the_spread_costs_no_digits() -> None:
    x = samples().clamp(-3, 3) + 1e4
    expected = np.cov(x.double().numpy(), rowvar=False, bias=True)
    np.testing.assert_allclose(moments_of(*x.split(20)).covariance.numpy(), expected, atol=1e-3 * expected.max())


KEPT, DROPPED = torch.tensor([0, 2, 3, 7, 8]), torch.tensor([1, 4, 5, 6])


@pytest.mark.parametrize("ridge", [1e-9, 1e-3, 0.5])
@pytest.mark.parametrize("intercept", [True, False])
def test_regression_is_scikit_learns_ridge(ridge: float, intercept: bool) -> None:
    x = samples()
    slope, constant = moments_of(x[:90], x[90:]).regress(KEPT, DROPPED, ridge=ridge, intercept=intercept)
    data = x.double().numpy()
    second = data.var(axis=0) if intercept else (data**2).mean(axis=0)
    # scikit-learn's alpha is against the sum over samples, ours against their mean.
    model = Ridge(alpha=ridge * second.mean() * len(data), fit_intercept=intercept, solver="svd")
    model.fit(data[:, KEPT], data[:, DROPPED])
    np.testing.assert_allclose(slope.numpy(), model.coef_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(constant.numpy(), model.intercept_ * np.ones(4), rtol=1e-3, atol=1e-2)


def test_regression_without_ridge_is_least_squares() -> None:
    x = samples()
    slope, constant = moments_of(x).regress(KEPT, DROPPED, ridge=0.0, intercept=True)
    design = np.column_stack([x[:, KEPT].double().numpy(), np.ones(len(x))])
    expected = np.linalg.lstsq(design, x[:, DROPPED].double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(slope.numpy(), expected[:, :-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(constant.numpy(), expected[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("intercept", [True, False])
def test_inputs_that_never_vary_are_harmless(intercept: bool) -> None:
    x = samples()
    x[:, 0], x[:, 1], x[:, 2], x[:, 4] = 0.0, 0.0, 3.0, -2.0  # two kept, two dropped
    slope, constant = moments_of(x).regress(KEPT, DROPPED, ridge=1e-6, intercept=intercept)
    assert slope.isfinite().all() and constant.isfinite().all()
    guess = x[:, KEPT].double() @ slope.T + constant
    torch.testing.assert_close(guess[:, :2], x[:, DROPPED[:2]].double(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_layer_whose_inputs_are_all_constant_is_repaired_by_its_bias(value: float) -> None:
    slope, constant = moments_of(torch.full((20, 9), value)).regress(KEPT, DROPPED, ridge=1e-3, intercept=True)
    torch.testing.assert_close(slope @ torch.full((5,), value).double() + constant, torch.full((4,), value).double())


class Case:
    """The middle block of a model, what enters it, and its moments."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model, self.anatomy = model, examine(model)
        self.dense = blocks_of(model)[1]
        self.plan = made.plan(self.anatomy, seed=seed).blocks[1]
        with torch.no_grad():
            self.x = blocks_of(model)[0](embed(model, made.batch(24)))
        self.moments = block_moments(self.dense, self.x, batch_size=7)

    def slim(self) -> nn.Module:
        return slim_block(self.dense, self.plan, self.anatomy, self.anatomy.num_patches, 0.85)

    def repaired(self, ridge: float) -> nn.Module:
        slim = self.slim()
        repair_block(slim, self.dense, self.plan, self.anatomy, self.moments, ridge)
        return slim


def inputs_of(layer: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        block(x)
    hook.remove()
    return seen[0]


def test_the_moments_of_a_block_are_those_of_what_enters_its_output_layers() -> None:
    case = Case(made.model())
    parts = parts_of(case.dense)
    for moments, layer in ((case.moments.values, parts.proj), (case.moments.hidden, parts.fc2)):
        seen = inputs_of(layer, case.dense, case.x).flatten(0, 1).double()
        torch.testing.assert_close(moments.mean, seen.mean(dim=0), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(moments.covariance, seen.T.cov(correction=0), atol=1e-5, rtol=1e-3)
    assert not parts.proj._forward_pre_hooks and not parts.fc2._forward_pre_hooks


@pytest.mark.parametrize("family", ["vit", "distilled", "layer_scale"])
@pytest.mark.parametrize("layer", ["proj", "fc2"])
def test_a_repaired_layer_is_the_least_squares_fit_of_the_dense_one(family: str, layer: str) -> None:
    case = Case(made.model(family))
    dense = getattr(parts_of(case.dense), layer)
    kept = list(case.plan.keep_hidden)
    if layer == "proj":
        kept = [8 * head + v for head, of in zip(case.plan.keep_heads, case.plan.keep_v, strict=True) for v in of]
    seen = inputs_of(dense, case.dense, case.x).flatten(0, 1)
    with torch.no_grad():
        wanted = dense(seen).double().numpy()
        got, plain = (
            getattr(parts_of(block), layer)(seen[:, kept]).double().numpy()
            for block in (case.repaired(ridge=1e-9), case.slim())
        )
    design = np.column_stack([seen[:, kept].double().numpy(), np.ones(len(seen))])
    fitted = design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
    least = ((fitted - wanted) ** 2).mean()
    assert ((got - wanted) ** 2).mean() == pytest.approx(least, rel=1e-2, abs=1e-9)
    assert ((plain - wanted) ** 2).mean() > 1.2 * least


@torch.no_grad()
def test_dropped_inputs_that_follow_from_kept_ones_are_fully_restored() -> None:
    model = made.model()
    block: Any = blocks_of(model)[1]
    # Hidden unit 1 copies unit 0, value channel 3 of head 0 is a sum of two others and a constant.
    block.mlp.fc1.weight[1], block.mlp.fc1.bias[1] = block.mlp.fc1.weight[0], block.mlp.fc1.bias[0]
    values = block.attn.qkv.weight[48:], block.attn.qkv.bias[48:]
    for tensor, constant in zip(values, (0.0, 0.5), strict=True):
        tensor[3] = 2 * tensor[1] - tensor[5] + constant
    case = Case(model)
    full = keep_all_block(case.anatomy)
    whole = tuple(range(8))
    fewer = tuple(channel for channel in whole if channel != 3)
    six = tuple(channel for channel in whole if channel != 7)
    case.plan = replace(full, keep_v=(fewer, whole[:7], six), keep_hidden=(0, *range(2, 96)))
    block.attn.qkv.weight[48 + 15], block.attn.qkv.bias[48 + 15] = 0, 0.25  # heads 1, 2 lose constants
    block.attn.qkv.weight[48 + 23], block.attn.qkv.bias[48 + 23] = 0, -1.0
    case = Case(model)
    case.plan = replace(full, keep_v=(fewer, whole[:7], six), keep_hidden=(0, *range(2, 96)))
    torch.testing.assert_close(case.repaired(1e-9)(case.x), case.dense(case.x), atol=1e-4, rtol=1e-4)
    assert (case.slim()(case.x) - case.dense(case.x)).abs().max() > 0.1


@pytest.mark.parametrize("layer", ["proj", "fc2"])
def test_a_layer_without_bias_is_repaired_through_the_origin(layer: str) -> None:
    case = Case(made.model(proj_bias=layer != "proj"))
    if layer == "fc2":
        parts_of(case.dense).fc2.bias = None
        case = Case(case.model)
    repaired = getattr(parts_of(case.repaired(1e-9)), layer)
    assert repaired.bias is None
    dense = getattr(parts_of(case.dense), layer)
    kept = list(case.plan.keep_hidden)
    if layer == "proj":
        kept = [8 * head + v for head, of in zip(case.plan.keep_heads, case.plan.keep_v, strict=True) for v in of]
    seen = inputs_of(dense, case.dense, case.x).flatten(0, 1)
    expected = np.linalg.lstsq(seen[:, kept].double().numpy(), dense(seen).detach().double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(repaired.weight.detach().numpy(), expected, atol=2e-3)


def test_a_dead_and_a_constant_unit_do_not_blow_up() -> None:
    model = made.model()
    block: Any = blocks_of(model)[1]
    with torch.no_grad():
        block.mlp.fc1.weight[:4] = 0
        block.mlp.fc1.bias[:4] = torch.tensor([0.0, -50.0, 1.5, 0.3])
    case = Case(model)
    case.plan = replace(keep_all_block(case.anatomy), keep_hidden=(0, 2, *range(4, 96)))
    with torch.no_grad():
        torch.testing.assert_close(case.repaired(1e-6)(case.x), case.dense(case.x), atol=1e-4, rtol=1e-4)


def test_a_whole_block_is_not_touched() -> None:
    case = Case(made.model())
    case.plan = keep_all_block(case.anatomy)
    assert made.same_state(case.repaired(0.5), made.state(case.dense))


@pytest.mark.parametrize("family", ["vit", "distilled", "registers", "average_pooling", "layer_scale", "qk_norm"])
def test_a_repaired_model_is_nearer_to_the_dense_one_than_one_that_is_only_cut(family: str) -> None:
    model, images = made.model(family), made.images(32)
    before = made.state(model)
    plan = made.plan(examine(model), seed=4, num_tokens=(16, 14, 14))
    (pixels, _), *_ = images.batches(32)
    with torch.no_grad():
        dense = model(pixels)
        repaired = prune_and_repair(model, plan, images)(pixels)
        cut = apply_plan(model, plan)(pixels)
    assert (repaired - dense).square().mean() < 0.7 * (cut - dense).square().mean()
    assert made.same_state(model, before)


def test_the_repaired_model_has_the_shapes_of_the_cut_one_and_only_other_output_layers() -> None:
    model, images = made.model(), made.images(8)
    plan = made.plan(examine(model), num_tokens=(16, 9, 9))
    repaired, cut = prune_and_repair(model, plan, images).state_dict(), apply_plan(model, plan).state_dict()
    assert repaired.keys() == cut.keys()
    other = {name for name in cut if not torch.equal(repaired[name], cut[name])}
    expected = {
        f"blocks.{i}.{layer}.{kind}"
        for i in range(3)
        for layer in ("attn.proj", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    assert other == expected


@torch.no_grad()
def test_blocks_are_repaired_one_after_the_other_each_on_what_the_one_before_gives() -> None:
    model, images = made.model(), made.images(12)
    anatomy = examine(model)
    plan = made.plan(anatomy, seed=5, num_tokens=(16, 9, 9))
    (pixels, _), *_ = images.batches(12)
    x, repaired = embed(model, pixels), prune_and_repair(model, plan, images, ridge=0.01)
    tokens_in = 16
    for dense, kept, got in zip(blocks_of(model), plan.blocks, blocks_of(repaired), strict=True):
        wide = slim_block(dense, replace(keep_all_block(anatomy), num_tokens=kept.num_tokens), anatomy, tokens_in, 0.85)
        seen = BlockMoments(
            moments_of(inputs_of(parts_of(wide).proj, wide, x)), moments_of(inputs_of(parts_of(wide).fc2, wide, x))
        )
        slim = slim_block(dense, kept, anatomy, tokens_in, 0.85)
        repair_block(slim, dense, kept, anatomy, seen, 0.01)
        for name, tensor in slim.state_dict().items():
            torch.testing.assert_close(got.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)
        x, tokens_in = slim(x), kept.num_tokens


@pytest.mark.parametrize("family", made.FAMILIES)
def test_nothing_dropped_leaves_logits_bit_equal(family: str) -> None:
    model, x = made.model(family), made.batch()
    assert torch.equal(prune_and_repair(model, keep_all_plan(examine(model)), made.images(4))(x), model(x))


def test_dropped_tokens_alone_need_no_repair() -> None:
    model, x = made.model(), made.batch()
    full = keep_all_block(examine(model))
    plan = Plan(blocks=tuple(replace(full, num_tokens=count) for count in (12, 12, 7)))
    assert torch.equal(prune_and_repair(model, plan, made.images(4))(x), apply_plan(model, plan)(x))


def test_a_plan_for_another_model_is_refused() -> None:
    model = made.model()
    plan = keep_all_plan(examine(model))
    with pytest.raises(PlanError, match="the plan has 2 blocks"):
        prune_and_repair(model, replace(plan, blocks=plan.blocks[:2]), made.images(4))
