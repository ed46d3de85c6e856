"""Unstructured and N:M masks against sorting by hand; initialisation of sparse layers; schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pruning.errors import SettingError
from pruning.methods.sparsity import (
    GradualMagnitude,
    Pattern,
    apply_masks,
    gradual,
    magnitude_masks,
    pattern_masks,
    scale_to_fan_in,
    sparse_layers,
    sparsity_of,
)
from tests.pruning_tests import builders
from tests.pruning_tests.model.test_families import model_of


@pytest.mark.parametrize(
    ("family", "sparsity"), [("vit", 0.0), ("vit", 0.999), ("distilled", 0.3), ("swin", 0.3), ("swin", 0.8)]
)
def test_the_smallest_weights_of_all_layers_go(family: str, sparsity: float) -> None:
    model = model_of(family)
    masks = magnitude_masks(model, sparsity)
    layers = dict(sparse_layers(model))
    assert masks.keys() == layers.keys() and all(masks[name].shape == layers[name].weight.shape for name in layers)
    sizes = {name: layer.weight.detach().abs() for name, layer in layers.items()}
    going = [size for name in layers for size in sizes[name][~masks[name]].tolist()]
    staying = [size for name in layers for size in sizes[name][masks[name]].tolist()]
    assert len(going) == round(sparsity * (len(going) + len(staying)))
    assert not going or max(going) <= min(staying)
    apply_masks(model, masks)
    assert sparsity_of(model) == pytest.approx(sparsity, abs=1e-4)


def test_weights_outside_the_blocks_linear_layers_stay_dense() -> None:
    model = builders.model()
    before = builders.state(model)
    apply_masks(model, magnitude_masks(model, 0.9))
    inside = {name for name in before if name.startswith("blocks.") and name.endswith("weight") and "norm" not in name}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == inside


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (1, 2), (3, 8)])
def test_every_group_keeps_exactly_n_of_m_and_its_largest(keep: int, group: int) -> None:
    model = builders.model()
    for name, mask in pattern_masks(model, Pattern(keep, group)).items():
        weight = dict(sparse_layers(model))[name].weight.abs()
        for sizes, kept in zip(weight.reshape(-1, group).tolist(), mask.reshape(-1, group).tolist(), strict=True):
            assert sum(kept) == keep
            best = sorted(sizes, reverse=True)[:keep]
            assert sorted((size for size, stays in zip(sizes, kept, strict=True) if stays), reverse=True) == best


def test_of_equal_weights_the_first_stay() -> None:
    model = builders.model()
    for _, layer in sparse_layers(model):
        torch.nn.init.ones_(layer.weight)
    assert all(
        mask[0, :4].tolist() == [True, True, False, False] for mask in pattern_masks(model, Pattern(2, 4)).values()
    )
    masks = list(magnitude_masks(model, 0.5).values())
    assert masks[0].all() and not masks[-1].any()


@pytest.mark.parametrize(("keep", "group"), [(0, 4), (4, 4), (5, 4)])
def test_a_pattern_that_keeps_nothing_or_everything_is_refused(keep: int, group: int) -> None:
    with pytest.raises(SettingError, match=f"pattern {keep}:{group} keeps nothing or everything"):
        Pattern(keep, group)


def test_inputs_that_are_no_whole_groups_are_refused_by_name() -> None:
    with pytest.raises(SettingError, match=r"layer 0.qkv has 24 inputs, which are no groups of 7"):
        pattern_masks(builders.model(), Pattern(2, 7))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(SettingError, match="is out of range"):
        magnitude_masks(builders.model(), sparsity)


def test_the_gradual_schedule_ends_at_its_sparsity_and_slows_down() -> None:
    values = [gradual(step, 10, 0.8) for step in range(12)]
    steps = [after - before for before, after in zip([0.0, *values], values, strict=False)]
    assert values[9:] == [0.8] * 3
    assert steps[:10] == sorted(steps[:10], reverse=True) and min(steps[:10]) > 0


def test_scaling_to_the_fan_in_gives_a_sparse_layer_the_signal_of_a_dense_one() -> None:
    model = builders.model()
    for _, layer in sparse_layers(model):
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=torch.Generator().manual_seed(5))
    masks = magnitude_masks(model, 0.9)
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(mask.shape, generator=generator) < 0.1 for name, mask in masks.items()}
    masks = {name: mask | (torch.arange(mask.shape[1]) == 0) for name, mask in masks.items()}  # none without an input
    apply_masks(model, masks)
    x = torch.randn(4000, 96, generator=generator)
    power = {}
    for stage in ("sparse", "scaled"):
        if stage == "scaled":
            scale_to_fan_in(model, masks)
        power[stage] = [
            float(F.linear(x[:, : layer.in_features], layer.weight.detach()).square().mean())
            for _, layer in sparse_layers(model)
        ]
    assert max(power["sparse"]) < 0.3
    assert all(0.7 < ratio < 1.4 for ratio in power["scaled"])


@pytest.mark.parametrize(
    ("share", "every", "chosen"), [(0.6, 10, [0, 10, 11]), (1.0, 7, [0, 7, 14, 19]), (0.01, 1, [0])]
)
def test_a_mask_schedule_chooses_every_so_often_and_at_the_end_of_its_share(
    share: float, every: int, chosen: list[int]
) -> None:
    model, schedule = builders.model(), GradualMagnitude(sparsity=0.8, share=share, every=every)
    given = {step: masks for step in range(20) if (masks := schedule(model, step, 20)) is not None}
    assert list(given) == chosen
    for step, masks in given.items():
        expected = magnitude_masks(model, gradual(step, max(1, round(share * 20)), 0.8))
        assert all(torch.equal(masks[name], expected[name]) for name in masks)


def test_weights_that_a_mask_schedule_took_do_not_come_back() -> None:
    model, schedule, gone = builders.model(), GradualMagnitude(sparsity=0.9, every=1), 0
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        masks = schedule(model, step, 20)
        assert masks is not None
        for name, layer in sparse_layers(model):
            assert not (masks[name] & (layer.weight == 0)).any()
        apply_masks(model, masks)
        before, gone = gone, sum(int((~mask).sum()) for mask in masks.values())
        assert gone > before
        with torch.no_grad():  # as training does: what is left moves
            for _, layer in sparse_layers(model):
                layer.weight.mul_(1 + 0.1 * torch.rand(layer.weight.shape, generator=generator))
    assert sparsity_of(model) == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"sparsity": 1.0}, {"sparsity": math.nan}, {"share": 0.0}, {"share": 1.5}, {"every": 0}]
)
def test_a_mask_schedule_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"{next(iter(wrong))} .* is out of range"):
        GradualMagnitude(**({"sparsity": 0.5} | wrong))
