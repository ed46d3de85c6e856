"""Loss curves against brute-force least squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.model.anatomy import blocks_of, parts_of
from pruning.model.surgery import keep_all_block
from pruning.plan import TokenReduction
from pruning.repair.compensation import BlockRepair
from pruning.repair.flow import CalibrationStream
from pruning.repair.moments import Moments
from pruning.scores.curves import (
    PAIR_IMAGES,
    RIDGE,
    RemovalCurves,
    _value_curve,
    interpolated,
    measure_curves,
    obs_removal_curve,
)
from tests.pruning_tests import builders


def problem(count: int, *, seed: int = 0, targets: int = 4) -> tuple[Tensor, Tensor]:
    """A covariance of full rank and a layer."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(count, count, generator=generator, dtype=torch.float64)
    root = root * torch.logspace(-1, 1, count, dtype=torch.float64)[:, None]
    outer = torch.randn(targets, count, generator=generator, dtype=torch.float64)
    return root.T @ root / count, outer


def least_loss(covariance: Tensor, outer: Tensor, gone: list[int]) -> float:
    """1/2 of the squared error of the whole layer's output, by least squares on what stays; the ridge is noise."""
    count = len(covariance)
    covariance = covariance + RIDGE * covariance.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    root = torch.linalg.cholesky(covariance).T  # rows as samples: root^T root is the covariance
    stays = [unit for unit in range(count) if unit not in gone]
    wanted = root @ outer.T
    if stays:
        wanted = wanted - root[:, stays] @ torch.linalg.lstsq(root[:, stays], wanted).solution
    return float(wanted.square().sum()) / 2


@pytest.mark.parametrize("seed", range(6))
def test_every_unit_that_goes_is_the_one_of_least_true_loss(seed: int) -> None:
    covariance, outer = problem(9, seed=seed)
    losses, order = obs_removal_curve(covariance, outer, num_steps=9)
    assert losses.shape == (10,) and losses.dtype == torch.float64 and losses[0] == 0
    gone: list[int] = []
    for unit in order.tolist():
        tried = {j: least_loss(covariance, outer, [*gone, j]) for j in range(9) if j not in gone}
        assert unit == min(tried, key=lambda j: tried[j])
        gone.append(unit)
        assert float(losses[len(gone)]) == pytest.approx(tried[unit], rel=1e-8)
    assert sorted(gone) == list(range(9))
    assert (losses.diff() >= 0).all()


@pytest.mark.parametrize("num_steps", [1, 3, 5, 100])
def test_where_several_go_at_once_the_loss_after_each_step_is_the_true_one(num_steps: int) -> None:
    covariance, outer = problem(17, seed=3)
    losses, order = obs_removal_curve(covariance, outer, num_steps=num_steps)
    assert losses.shape == (18,) and sorted(order.tolist()) == list(range(17))
    assert (losses.diff() >= 0).all() and losses[0] == 0
    chunk = max(1, 17 // num_steps)
    for count in {*range(0, 17, chunk), 17}:
        expected = least_loss(covariance, outer, order[:count].tolist())
        assert float(losses[count]) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_copies_and_dead_units_go_first_and_for_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    x = torch.cat([x, x[:, :2], torch.zeros(400, 2, dtype=torch.float64)], dim=1)
    outer = torch.randn(5, 10, generator=generator, dtype=torch.float64)
    losses, order = obs_removal_curve(x.T @ x / 400, outer, num_steps=10)
    first = set(order[:4].tolist())
    assert {8, 9} <= first and len(first & {0, 6}) == len(first & {1, 7}) == 1
    assert losses[4] < 0.1 * losses[5]  # what the ridge adds


def test_a_layer_that_is_never_used_loses_nothing_at_any_width() -> None:
    for covariance, outer in ((torch.zeros(5, 5).double(), problem(5)[1]), (problem(5)[0], torch.zeros(3, 5).double())):
        losses, order = obs_removal_curve(covariance, outer)
        assert losses.max() < 1e-9 and losses.isfinite().all()
        assert sorted(order.tolist()) == list(range(5))


def test_a_covariance_of_fewer_samples_than_units_in_bfloat16_has_a_curve_that_ends_at_the_spread_of_the_outputs() -> (
    None
):
    """Its products are taken in float32 whatever the autocast: negative eigenvalues let the losses grow to infinity."""
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) ** 3
    moments = Moments()
    with torch.autocast("cpu", torch.bfloat16):
        moments.add(x, torch.full((40,), 0.025), torch.zeros(40, dtype=torch.bool))
    centred = (x - x.mean(dim=0)).double()
    torch.testing.assert_close(moments.covariance(), centred.T @ centred / 40, rtol=1e-5, atol=1e-5)
    outer = torch.randn(12, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses, _ = obs_removal_curve(moments.covariance(), outer)
    spread = float((centred @ outer.T).square().sum()) / 40 / 2
    assert spread <= float(losses[-1]) <= 1.05 * spread


# Values


@pytest.mark.parametrize("targets", [3, 12])
def test_the_value_curve_of_one_head_is_the_error_of_best_rank(targets: int) -> None:
    """Samples go through the layer; what a matrix of rank r cannot give of its outputs (Eckart and Young 1936)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double()
    outer = torch.randn(targets, 8, generator=generator).double()
    losses, order = _value_curve(x.T @ x / 300, outer, 1)
    left, strength, right = torch.linalg.svd(x @ outer.T, full_matrices=False)
    for removed in range(9):
        rank = 8 - removed
        best = (left[:, :rank] * strength[:rank]) @ right[:rank]
        error = float((x @ outer.T - best).square().sum()) / 300 / 2
        assert float(losses[removed]) == pytest.approx(error, rel=1e-6, abs=1e-6 * float(losses[-1]))
    alone = [float((x[:, [channel]] @ outer.T[[channel]]).square().sum()) for channel in range(8)]
    assert order.tolist() == [sorted(range(8), key=lambda channel: alone[channel])]


def test_the_value_curves_of_heads_add_up() -> None:
    covariance, outer = problem(12, targets=12)
    together, order = _value_curve(covariance, outer, 3)
    heads = [slice(4 * head, 4 * head + 4) for head in range(3)]
    alone = [_value_curve(covariance[of_head, of_head], outer[:, of_head], 1) for of_head in heads]
    torch.testing.assert_close(together, sum((losses for losses, _ in alone), torch.zeros(5, dtype=torch.float64)))
    assert torch.equal(order, torch.cat([rows for _, rows in alone]))


# Interpolation


@pytest.mark.parametrize(
    ("places", "losses"),
    [
        ([0, 1, 2, 3], [0.0, 1.0, 2.0, 5.0]),
        ([0, 8, 16, 64], [0.0, 1e-6, 1e-3, 0.7]),
        ([0, 3, 6, 8], [0.0, 0.0, 0.0, 2.0]),
        ([0, 2, 8], [0.0, 0.0, 0.0]),
        ([0, 5], [0.0, 4.0]),
    ],
)
def test_interpolation_goes_through_its_points_and_never_falls(places: list[int], losses: list[float]) -> None:
    curve = interpolated(places, losses)
    assert curve.shape == (places[-1] + 1,) and curve.dtype == torch.float64
    assert curve[places].tolist() == pytest.approx(losses)
    assert (curve.diff() >= 0).all()


def test_between_two_points_lies_a_power_law_which_gives_a_power_law_back() -> None:
    places = [0, 4, 8, 32]
    for exponent in (2.0, 3.5):
        curve = interpolated(places, [place**exponent for place in places])
        expected = torch.arange(33, dtype=torch.float64) ** exponent
        torch.testing.assert_close(curve[4:], expected[4:])
    assert curve[:5].tolist() == pytest.approx([4**3.5 * (n / 4) ** 2 for n in range(5)])


# A whole block


def stream_of(
    family: str, count: int = 24, kind: TokenReduction = "merge", index: int = 1, batch_size: int = 64
) -> CalibrationStream:
    model, images = builders.toy_model(family), builders.toy_images(count, seed=2)
    return builders.calibration_stream(model, images, index, kind, batch_size=batch_size)


def check(curves: RemovalCurves, *, has_qk: bool = True) -> None:
    for curve, count in ((curves.qk, 8), (curves.v, 8), (curves.hidden, 96)):
        assert curve.shape == (count + 1,) and curve.isfinite().all()
        assert curve[0] == 0 and (curve.diff() >= 0).all()
        assert (curve[-1] > 0) == (has_qk or curve is not curves.qk)
    for order in (*curves.qk_order, *curves.v_order):
        assert sorted(order.tolist()) == list(range(8))
    assert sorted(curves.hidden_order.tolist()) == list(range(96))


@pytest.mark.parametrize("family", ["vit", "average_pooling", "layer_scale", "qk_norm"])
def test_curves_rise_from_nothing_and_orders_are_permutations(family: str) -> None:
    stream = builders.calibration_stream(builders.model(family), builders.images(24), 1, "merge")
    before = [builders.state(block) for block in stream.blocks]
    check(measure_curves(BlockRepair(stream)), has_qk=family != "qk_norm")
    assert all(builders.same_state(block, state) for block, state in zip(stream.blocks, before, strict=True))


@torch.no_grad()
def test_without_a_channel_left_the_loss_is_that_of_the_block_s_own_spread_or_of_even_attention() -> None:
    """All hidden units gone, all values gone, and all pairs gone, by hand from the dense stream."""
    stream = stream_of("vit", batch_size=24)
    curves, place, x = measure_curves(BlockRepair(stream)), stream.sensitivity[1], stream.x
    block: Any = stream.blocks[1]
    mid, out = (at.token_weights(17, 1).double() for at in (place.mid, place.out))

    def loss(errors: Tensor, weights: Tensor, metric: Tensor, *, around_mean: bool) -> float:
        errors = errors.double()
        if around_mean:  # the bias makes up for the mean
            errors = errors - torch.einsum("bnc,n->c", errors, weights) / len(errors)
        return float(torch.einsum("bnc,cd,bnd,n->", errors, metric, errors, weights)) / len(errors) / 2

    after = x + block.attn(block.norm1(x))
    expected = loss(block.mlp(block.norm2(after)), out, place.out.metric, around_mean=True)
    assert expected <= float(curves.hidden[-1]) <= 1.15 * expected  # the ridge adds a little

    values = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 8))[:, :, 2].transpose(1, 2)
    even = block.attn.proj(values.mean(dim=2, keepdim=True).expand_as(values).transpose(1, 2).flatten(2))
    missing = (even - block.attn(block.norm1(x)))[:PAIR_IMAGES]
    missed = loss(missing, mid, place.mid.metric, around_mean=False)
    assert float(curves.qk[-1]) == pytest.approx(missed, rel=1e-3)

    mixed = attention_inputs(block, x).unflatten(-1, (3, 8))
    parts = block.attn.proj.weight.unflatten(1, (3, 8))
    heads = sum(
        loss(mixed[:, :, head] @ parts[:, head].T, mid, place.mid.metric, around_mean=True) for head in range(3)
    )
    assert heads <= float(curves.v[-1]) <= 1.15 * heads


def attention_inputs(block: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = block.attn.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.attn(block.norm1(x))
    hook.remove()
    return seen[0]


def test_the_loss_of_fewer_pairs_is_measured_at_eighths_of_the_width() -> None:
    """A block whose keys have rank 3 loses nothing until 3 pairs are left."""
    model, images = builders.toy_model(), builders.toy_images(24, seed=2)
    qkv = parts_of(blocks_of(model)[0]).qkv
    with torch.no_grad():
        for head in range(3):
            for channel in range(3, 8):
                qkv.weight[24 + 8 * head + channel] = qkv.weight[24 + 8 * head + channel % 3]
                qkv.bias[24 + 8 * head + channel] = 1.0  # for nothing: added to all keys
    stream = builders.calibration_stream(model, images, 0)
    curve = measure_curves(BlockRepair(stream)).qk
    assert curve[5] < 1e-4 * curve[6]
    assert 0 < curve[6] < curve[7] < curve[8]


@pytest.mark.parametrize("kind", ["merge", "attention", "lfe"])
def test_curves_of_a_block_whose_tokens_are_reduced_count_what_is_left(kind: TokenReduction) -> None:
    stream = stream_of("vit", kind=kind)
    block = stream.slim(keep_all_block(stream.anatomy, 6))
    curves, unreduced = measure_curves(BlockRepair(stream), block), measure_curves(BlockRepair(stream))
    check(curves)
    torch.testing.assert_close(curves.v, unreduced.v)  # before the reduction
    torch.testing.assert_close(curves.qk, unreduced.qk, rtol=1e-3, atol=1e-9)
    assert not torch.allclose(curves.hidden, unreduced.hidden, rtol=1e-3)
    stream.advance(block)
    check(measure_curves(BlockRepair(stream)))  # now with sizes, where tokens were merged


def test_one_image_gives_finite_curves() -> None:
    check(measure_curves(BlockRepair(stream_of("vit", count=1))))


def test_curves_are_nats_of_the_metric_and_grow_with_the_square_of_the_layer() -> None:
    """Twice the output of both layers that add to the stream, same metric: four times the loss."""
    stream = stream_of("vit", index=0)
    once = measure_curves(BlockRepair(stream))
    block: Any = stream.blocks[0]
    with torch.no_grad():
        block.attn.proj.weight *= 2
    twice = measure_curves(BlockRepair(stream))
    torch.testing.assert_close(twice.v, 4 * once.v, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(twice.qk, 4 * once.qk, rtol=1e-3, atol=1e-9)
