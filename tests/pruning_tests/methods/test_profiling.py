"""Profiles of trained toys against models that are built and measured from outside."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pruning.losses import divergence
from pruning.measure.accuracy import predict
from pruning.measure.cost import count_macs
from pruning.methods.allocation import allocate
from pruning.methods.profile import REMOVED_SHARES, Profile, block_costs
from pruning.methods.profiling import CHANNEL_TRIALS, SCALE_IMAGES, TOKEN_IMAGES, measure_profile
from pruning.model.anatomy import Anatomy, examine
from pruning.model.surgery import apply_plan, check_plan, keep_all_block, keep_all_plan
from pruning.plan import Plan, TokenReduction
from pruning.repair.compensation import REPAIR_PASSES, repaired_model
from pruning.repair.sensitivity import measure_sensitivity
from tests.pruning_tests import builders

CALIBRATION, PROBE = builders.toy_images(40, seed=2), builders.toy_images(45, seed=3)


@functools.cache
def profile_of(family: str, kind: TokenReduction) -> Profile:
    return measure_profile(builders.toy_model(family), CALIBRATION, PROBE, token_reduction=kind, batch_size=30)


@pytest.mark.parametrize("kind", ["lfe", "attention", "lfe-merge"])
def test_what_removing_tokens_costs_is_the_divergence_of_a_model_that_does_so_in_one_block(
    kind: TokenReduction,
) -> None:
    profile, model = profile_of("average_pooling", kind), builders.toy_model("average_pooling")
    pixels, blocks = PROBE.normalized(slice(0, TOKEN_IMAGES)), list(keep_all_plan(examine(model)).blocks)
    for index, costs in enumerate(profile.tokens):
        assert len(costs) == len(REMOVED_SHARES) and costs[-1] > 0
        assert all(fewer <= more for fewer, more in pairwise(costs))
        highest = 0.0
        for share, cost in zip(REMOVED_SHARES, costs, strict=True):
            reduced = keep_all_block(examine(model).blocks[0], max(1, round(16 * (1 - share))))
            # Sizes go on with their tokens, though no later block removes any.
            later = [replace(block, num_tokens=reduced.num_tokens) for block in blocks[index + 1 :]]
            plan = Plan(blocks=(*blocks[:index], reduced, *later), token_reduction=kind)
            with torch.no_grad():
                measured = divergence(model(pixels), apply_plan(model, plan)(pixels)).item()
            highest = max(highest, measured)
            assert cost == pytest.approx(highest, rel=2e-3, abs=2e-6)


@pytest.mark.parametrize("family", ["vit", "average_pooling"])
def test_a_curve_says_what_a_model_costs_that_lost_those_channels_in_one_block(family: str) -> None:
    profile, model = profile_of(family, "none"), builders.toy_model(family)
    pixels, dense = PROBE.normalized(slice(0, TOKEN_IMAGES)), keep_all_plan(examine(model))
    dense = replace(dense, token_reduction="none")
    for index, curves in enumerate(profile.channels):
        for kind, share in CHANNEL_TRIALS.items():
            order = getattr(curves, f"{kind}_order")
            removed = order.shape[-1] - round(order.shape[-1] * (1 - share))
            kept = order[..., removed:].sort(dim=-1).values.tolist()
            kept = tuple(map(tuple, kept)) if order.ndim == 2 else tuple(kept)
            blocks = list(dense.blocks)
            blocks[index] = replace(blocks[index], **{f"keep_{kind}": kept})
            plan = replace(dense, blocks=tuple(blocks))
            with torch.no_grad():
                pruned = repaired_model(model, plan, CALIBRATION, batch_size=30).model
                measured = divergence(model(pixels), pruned(pixels)).item()
            assert float(getattr(curves, kind)[removed]) == pytest.approx(measured, rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("family", ["vit", "qk_norm"])
def test_a_profile_has_curves_of_every_block_and_leaves_the_model_as_it_was(family: str) -> None:
    model = builders.toy_model() if family == "vit" else builders.model(family, num_classes=4)
    model.requires_grad_(True)
    model.zero_grad()
    before, modes = builders.state(model), [module.training for module in model.modules()]
    profile = measure_profile(model, CALIBRATION, PROBE, token_reduction="merge", batch_size=30)
    assert builders.same_state(model, before)
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(profile.channels) == len(profile.tokens) == 3
    assert profile.token_reduction == "merge" and profile.cutoff_token == 0.85
    if family == "vit":  # measured once more, it is the same
        again = profile_of("vit", "merge")
        assert (again.channel_scale, again.token_scale) == (profile.channel_scale, profile.token_scale)
        assert again.tokens == profile.tokens and again.forward_passes == profile.forward_passes


@pytest.mark.parametrize("family", ["average_pooling", "vit"])
def test_scales_are_measured_over_predicted_costs_of_a_model_that_loses_little(family: str) -> None:
    model, profile = builders.toy_model(family), profile_of(family, "merge")
    anatomy, unscaled = examine(model), replace(profile, channel_scale=1.0, token_scale=1.0)
    dense_macs, scales = count_macs(anatomy, keep_all_plan(anatomy)), []
    for share, token_share in ((0.9, 0.0), (0.65, 1.0)):
        plan = allocate(unscaled, anatomy, int(share * dense_macs), token_share)
        pruned = apply_plan(model, plan)
        if token_share == 0:
            pruned = repaired_model(model, plan, CALIBRATION, batch_size=30).model
        measured = divergence(predict(model, PROBE), predict(pruned, PROBE)).item()
        scales.append(max(1.0, measured / sum(map(sum, block_costs(unscaled, anatomy, plan)))))
    assert (profile.channel_scale, profile.token_scale) == pytest.approx(tuple(scales), rel=1e-3)
    assert max(scales) > 1


def test_without_a_token_reduction_there_are_no_token_costs_and_one_scale() -> None:
    profile = profile_of("vit", "none")
    assert profile.tokens == ((), (), ())
    assert profile.token_scale == profile.channel_scale >= 1


def test_scales_are_measured_on_a_few_of_many_images() -> None:
    model, kind = builders.toy_model("average_pooling"), "merge"
    calibration, probe = (builders.toy_images(SCALE_IMAGES + 30, seed=seed) for seed in (2, 3))
    channels = profile_of("average_pooling", kind).channels
    sensitivity = measure_sensitivity(model, calibration, batch_size=30)
    few, many = (
        measure_profile(
            model, calibration.take(slice(0, count)), probe.take(slice(0, count)), token_reduction=kind, batch_size=30,
            sensitivity=sensitivity, channels=channels,
        )
        for count in (SCALE_IMAGES, SCALE_IMAGES + 30)
    )  # fmt: skip
    assert few.tokens == many.tokens and few.channels is many.channels is channels
    assert (few.channel_scale, few.token_scale) == (many.channel_scale, many.token_scale)


@pytest.mark.parametrize("kind", ["none", "merge"])
def test_forward_passes_are_counted_as_by_hand(kind: TokenReduction) -> None:
    calibration, probe = (builders.toy_images(80, seed=seed) for seed in (2, 3))
    model = builders.toy_model()
    profile = measure_profile(model, calibration, probe, token_reduction=kind)
    repair = REPAIR_PASSES - 3  # its sensitivity is known
    curves = 80 * 2 + 3 * (80 * 1.5 + 24 * 2)  # and three trials of each block, with the later ones: 3, 2, and 1 of 3
    images = 80 * 3 + 24 + 64 * repair + 64 * 2  # sensitivity; the dense model; one with fewer channels
    if kind != "none":
        # Shares of 1/24, 1/6, 1/2, 3/4, 11/12 leave 15, 13, 8, 4, 1 of 16 patches.
        images += 64 * 0.65 + 24 * (15 + 13 + 8 + 4 + 1) / 16 * 2
    assert profile.forward_passes == pytest.approx((images + curves) / 80)
    known = measure_profile(
        model, calibration, probe, token_reduction=kind, channels=profile.channels,
        sensitivity=measure_sensitivity(model, calibration),
    )  # fmt: skip
    assert known.forward_passes == pytest.approx((images - 80 * 3 - (24 if kind == "none" else 0)) / 80)


def test_tokens_that_nobody_reads_any_more_go_for_nothing() -> None:
    """The class token answers, and the last block's attention is over when tokens leave it."""
    assert max(profile_of("vit", "attention").tokens[-1]) < 1e-6


def test_a_plan_for_a_trained_model_beats_an_even_one_of_as_many_multiply_adds() -> None:
    """Measured, not predicted: tokens removed where the profile says so, against as many from every block."""
    model = builders.toy_model("average_pooling")
    anatomy, fresh = examine(model), builders.toy_images(256, seed=4)
    profile = measure_profile(
        model, builders.toy_images(64, seed=2), builders.toy_images(80, seed=3), token_reduction="merge", batch_size=30
    )
    for share in (0.6, 0.8):
        plan = allocate(profile, anatomy, int(share * count_macs(anatomy, keep_all_plan(anatomy))), 1.0)
        check_plan(plan, anatomy)
        even = next(
            rival
            for removed in torch.linspace(0, 8, 200).tolist()
            if count_macs(anatomy, rival := evenly(anatomy, removed)) <= count_macs(anatomy, plan)
        )
        lost, lost_evenly = (
            divergence(predict(model, fresh), predict(apply_plan(model, either), fresh)).item()
            for either in (plan, even)
        )
        assert lost < lost_evenly


def evenly(anatomy: Anatomy, removed: float) -> Plan:
    counts = [max(1, round(16 - removed * (index + 1))) for index in range(anatomy.depth)]
    return Plan(blocks=tuple(keep_all_block(anatomy.blocks[0], count) for count in counts), token_reduction="merge")


def test_a_model_whose_blocks_are_the_least_of_it_has_a_profile_too() -> None:
    model, images = builders.model(num_classes=300_000), builders.images(8)
    profile = measure_profile(model, images, images, token_reduction="merge")
    assert (profile.channel_scale, profile.token_scale) == (1.0, 1.0)
