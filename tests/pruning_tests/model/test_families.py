"""Surgery on every family, with random weights: by timm's own names, made small by arguments."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pruning.artifact import Description, load, save
from pruning.data import Images, InputSpec
from pruning.errors import ModelError, PlanError
from pruning.losses import divergence
from pruning.measure.accuracy import predict, top1
from pruning.measure.cost import count_macs
from pruning.methods.allocation import allocate
from pruning.methods.cascade import CascadeSettings, cascade
from pruning.methods.profiling import measure_profile
from pruning.model.anatomy import Anatomy, blocks_of, classify, embed, examine, tail_tokens
from pruning.model.exits import fit_exits, truncate
from pruning.model.layers import SlimBlock
from pruning.model.surgery import apply_plan, as_slim, keep_all_plan
from pruning.plan import Plan
from pruning.repair.compensation import repaired_model
from tests.pruning_tests import builders

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}
GRID: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_classes": 7}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL),
    "registers_pooled": ("vit_little_patch16_reg4_gap_256", SMALL),
    "deit3": ("deit3_small_patch16_224", SMALL),
    "qk_norm": ("vit_tiny_patch16_224", SMALL | {"qk_norm": True}),
    "average_pooling": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "class_token": False, "fc_norm": True}),
    "swin": ("swin_tiny_patch4_window7_224", GRID | {"img_size": 32, "patch_size": 2}),
    # Grids of 8 x 16 and 4 x 8: the second is as high as a window and shifted one way alone. Heads 5 wide, not 8.
    "swin_oblong": ("swin_small_patch4_window7_224", GRID | {"img_size": [32, 64], "head_dim": 5}),
}
SWINS = ("swin", "swin_oblong")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_swin = pytest.mark.parametrize("family", SWINS)


@functools.cache
def _model(family: str) -> nn.Module:
    name, args = FAMILIES[family]
    return builders.randomised(timm.create_model(name, **args))


def model_of(family: str) -> nn.Module:
    return copy.deepcopy(_model(family))


def size_of(family: str) -> tuple[int, int]:
    return (32, 64) if family == "swin_oblong" else (32, 32)


def batch_of(family: str, count: int = 3) -> Tensor:
    return builders.batch(count, size=size_of(family))


def plan_of(anatomy: Anatomy, *, seed: int = 1) -> Plan:
    """Some heads, channels and hidden units of every block, and all tokens."""
    return replace(builders.plan(anatomy, seed=seed), token_reduction="none")


def dense_blocks(model: Any) -> list[Any]:
    """The blocks by timm's names for them."""
    return [block for stage in model.layers for block in stage.blocks] if hasattr(model, "layers") else [*model.blocks]


# What is special about each


def test_each_family_is_what_its_name_says_and_no_part_of_it_is_idle() -> None:
    """A random model must have these, so that the tests below would see them forgotten."""
    seen: Any = {family: _model(family) for family in FAMILIES}
    prefixes = [examine(seen[family]).blocks[0].num_prefix_tokens for family in FAMILIES]
    assert prefixes == [1, 2, 5, 4, 1, 1, 0, 0, 0]
    for family in ("registers", "deit3"):
        for block in seen[family].blocks:
            assert min(block.ls1.gamma.std(), block.ls2.gamma.std()) > 0.1
    assert isinstance(seen["average_pooling"].fc_norm, nn.LayerNorm)
    shifts = {family: [block.shift_size for block in dense_blocks(seen[family])] for family in SWINS}
    assert shifts == {"swin": [(0, 0), (2, 2)] * 2, "swin_oblong": [(0, 0), (2, 2), (0, 0), (0, 2)]}
    for family in SWINS:
        anatomy = examine(seen[family])
        assert anatomy.has_windows and anatomy.exits == (2, 4) and anatomy.depth == 4
        assert [block.width for block in anatomy.blocks] == [16, 16, 32, 32]
        assert [block.head_dim for block in anatomy.blocks] == [8 if family == "swin" else 5] * 4
        for block in dense_blocks(seen[family]):
            assert block.attn.relative_position_bias_table.std() > 0.3
            assert (block.attn_mask is None) == (block.shift_size == (0, 0))


@pytest.mark.parametrize("what", ["mask", "bias", "shift"])
@every_swin
def test_masks_biases_and_shifts_change_the_logits_of_a_pruned_swin(family: str, what: str) -> None:
    pruned, x = apply_plan(model_of(family), plan_of(examine(_model(family)))), batch_of(family)
    before = pruned(x)
    block: Any
    for block in blocks_of(pruned):
        windows = block.attn.windows
        if what == "mask" and windows.mask is not None:
            windows.mask.zero_()
        elif what == "bias":
            nn.init.zeros_(windows.bias_table)
        elif what == "shift":
            windows.shift = (0, 0)
    assert (pruned(x) - before).abs().max() > 1e-3


# Surgery


@every_family
def test_a_plan_that_keeps_all_leaves_logits_bit_equal(family: str) -> None:
    model, x = model_of(family), batch_of(family)
    plan = replace(keep_all_plan(examine(model)), token_reduction="none")
    assert torch.equal(apply_plan(model, plan)(x), model(x))
    between = blocks_of(model)(embed(model, x))
    assert torch.equal(classify(model, between), model(x))
    assert torch.equal(classify(model, tail_tokens(model, between)), model(x))


@torch.no_grad()
def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """The dense model in which nothing reads a dropped unit; dropped queries and keys are 0."""
    copied = copy.deepcopy(model)
    for block, kept in zip(dense_blocks(copied), plan.blocks, strict=True):
        attn, mlp = block.attn, block.mlp
        inner = attn.proj.in_features
        width = inner // attn.num_heads
        drops_pair, drops_value = torch.ones(2, attn.num_heads, width, dtype=torch.bool)
        for head, qk, v in zip(kept.keep_heads, kept.keep_qk, kept.keep_v, strict=True):
            drops_pair[head, list(qk)] = drops_value[head, list(v)] = False
        attn.proj.weight[:, drops_value.flatten()] = 0
        for tensor in (attn.qkv.weight, attn.qkv.bias):
            tensor[: 2 * inner][drops_pair.flatten().repeat(2)] = 0
        stays = torch.zeros(mlp.fc1.out_features, dtype=torch.bool)
        stays[list(kept.keep_hidden)] = True
        mlp.fc2.weight[:, ~stays] = 0
    return copied


@pytest.mark.parametrize("seed", [1, 2])
@every_family
def test_dropped_units_are_as_if_zeroed_in_the_dense_model_which_is_left_alone(family: str, seed: int) -> None:
    model, x = model_of(family).double(), batch_of(family).double()
    before, plan = builders.state(model), plan_of(examine(model), seed=seed)
    pruned = apply_plan(model, plan)
    assert all(isinstance(block, SlimBlock) for block in blocks_of(pruned))
    torch.testing.assert_close(pruned(x), zeroed(model, plan)(x), atol=1e-10, rtol=1e-10)
    assert (pruned(x) - model(x)).abs().max() > 1e-2
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(7)
    assert builders.same_state(model, before)


@every_family
def test_a_dense_block_made_slim_gives_what_the_block_gives(family: str) -> None:
    model = model_of(family)
    anatomy, blocks = examine(model), blocks_of(model)
    x = embed(model, batch_of(family))
    for index, (block, block_anatomy) in enumerate(zip(blocks, anatomy.blocks, strict=True)):
        slim, after = as_slim(block, block_anatomy, is_last=index == len(blocks) - 1), block(x)
        torch.testing.assert_close(slim(x), after, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(slim.halves(x)[1], after, rtol=1e-4, atol=1e-4)
        x = after


# Multiply-adds


class MacsCounter(TorchFunctionMode):
    """Counts multiply-adds by the shapes that come by; the zeros that fill up unequal widths are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.unpadded: dict[int, tuple[Tensor, int]] = {}
        """Padded tensors by their ids, and the widths before; kept, so that no id is given again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.pad:
            self.unpadded[id(result)] = result, args[0].shape[-1]
        elif func is F.scaled_dot_product_attention:
            q, k, v = args
            qk_width, v_width = (self.unpadded.get(id(part), (part, part.shape[-1]))[1] for part in (k, v))
            self.total += q.shape[:-1].numel() * k.shape[-2] * (qk_width + v_width)
        elif func in (F.linear, F.conv2d):
            self.total += result.numel() * args[1][0].numel()
        return result


@torch.no_grad()
def counted(model: nn.Module, x: Tensor) -> int:
    """The multiply-adds of a run of the model."""
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True  # timm's, so that it comes by here
    with MacsCounter() as counter:
        model(x)
    return counter.total


@pytest.mark.parametrize("make", [keep_all_plan, plan_of])
@every_family
def test_multiply_adds_are_those_of_the_shapes_that_come_by(family: str, make: Callable[[Anatomy], Plan]) -> None:
    model, x = model_of(family), batch_of(family, 1)
    anatomy = examine(model)
    plan = make(anatomy)
    assert count_macs(anatomy, plan) == counted(apply_plan(model, plan), x)
    shorter, cut = truncate(model, anatomy.exits[0]), replace(plan, blocks=plan.blocks[: anatomy.exits[0]])
    assert count_macs(anatomy, cut) == counted(apply_plan(shorter, cut), x)
    assert count_macs(examine(shorter), cut) == count_macs(anatomy, cut)


# On disk, and in a graph


@every_family
def test_a_saved_model_comes_back_with_bit_equal_logits_at_every_exit(family: str, tmp_path: Path) -> None:
    model, (name, args) = model_of(family), FAMILIES[family]
    exits = examine(model).exits
    heads = fit_exits(model, builders.images(8, size=size_of(family)), exits, epochs=2)
    for exit_block in exits:
        shorter = truncate(model, exit_block, heads[exit_block])
        plan = plan_of(examine(shorter), seed=exit_block)
        pruned, x = apply_plan(shorter, plan), batch_of(family)
        description = Description(name=name, args=args, input=InputSpec(size=size_of(family)), plan=plan)
        save(pruned, description, tmp_path / "point")
        loaded, read = load(tmp_path / "point")
        assert read == description and len(blocks_of(loaded)) == exit_block
        assert torch.equal(loaded(x), pruned(x))
        assert pruned(x).std(dim=0).max() > 1e-3  # the images are message apart


# Those that are not here differ from another one by no operation, or are exported for any batch size below.
@pytest.mark.parametrize("family", ["distilled", "registers", "qk_norm", "average_pooling", "swin_oblong"])
def test_a_pruned_model_can_be_exported(family: str) -> None:
    model, x = model_of(family), batch_of(family, 2)
    model = truncate(model, examine(model).exits[0])  # tracing takes its time for every block
    pruned = apply_plan(model, plan_of(examine(model)))
    exported = torch.export.export(pruned, (x,)).module()
    torch.testing.assert_close(exported(x), pruned(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_an_exported_model_takes_batches_of_any_size(family: str) -> None:
    model = model_of(family)
    pruned = apply_plan(model, plan_of(examine(model)))
    sizes = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(pruned, (batch_of(family, 3),), dynamic_shapes=(sizes,)).module()
    for count in (2, 5):
        x = batch_of(family, count)
        torch.testing.assert_close(exported(x), pruned(x), rtol=1e-4, atol=1e-4)


# Repair, and the search for plans


@every_family
def test_the_repair_brings_the_logits_nearer_and_leaves_the_dense_model_alone(family: str) -> None:
    model, images = model_of(family), builders.images(64, size=size_of(family))
    before, plan = builders.state(model), plan_of(examine(model))
    repaired, cut = repaired_model(model, plan, images).model, apply_plan(model, plan)
    assert builders.same_state(model, before)
    dense, plain = predict(model, images), predict(cut, images)
    assert divergence(dense, predict(repaired, images)) < 0.6 * divergence(dense, plain)
    shapes = [{name: tensor.shape for name, tensor in pruned.state_dict().items()} for pruned in (repaired, cut)]
    assert shapes[0] == shapes[1]


def answered_images(model: nn.Module, family: str, count: int, *, seed: int) -> Images:
    """Images whose labels are the dense model's answers."""
    images = builders.images(count, seed=seed, size=size_of(family))
    return replace(images, labels=predict(model, images).argmax(dim=1))


@pytest.mark.parametrize("family", ["vit", "deit3", *SWINS])
def test_an_allocation_without_a_token_reduction_meets_its_target_by_channels_alone(family: str) -> None:
    model = model_of(family)
    anatomy, images = examine(model), builders.images(16, size=size_of(family))
    profile = measure_profile(model, images, builders.images(16, seed=1, size=size_of(family)), token_reduction="none")
    assert profile.tokens == ((),) * anatomy.depth and profile.channel_scale >= 1
    dense_macs = count_macs(anatomy, keep_all_plan(anatomy))
    for share in (0.85, 0.6):
        plans = [allocate(profile, anatomy, int(share * dense_macs), part) for part in (0.0, 0.5, 1.0)]
        assert plans[0] == plans[1] == plans[2]  # there is nothing to share
        assert share - 0.08 < count_macs(anatomy, plans[0]) / dense_macs <= share
        tokens = [block.num_tokens for block in plans[0].blocks]
        assert tokens == [block.num_patches for block in anatomy.blocks] and plans[0].token_reduction == "none"
        assert apply_plan(model, plans[0])(batch_of(family)).isfinite().all()


@pytest.mark.parametrize(
    ("family", "criterion", "budget"), builders.every_pair(["vit", *SWINS], ["lfs", "obs"], [2.0, 100.0])
)
def test_a_cascade_without_a_token_reduction_keeps_to_budgets_and_target(
    family: str, criterion: str, budget: float
) -> None:
    model = model_of(family)
    anatomy, probe = examine(model), answered_images(model, family, 60, seed=1)
    dense_macs = count_macs(anatomy, keep_all_plan(anatomy))
    settings = CascadeSettings(
        drop_budget=(budget,) * anatomy.depth, target_macs=int(0.7 * dense_macs), token_reduction="none",
        criterion=criterion, num_levels=7,
    )  # fmt: skip
    result = cascade(model, probe, answered_images(model, family, 24, seed=2), settings)
    assert all(drop <= budget + 1e-9 for drop in result.block_drops)
    lost = 1 - top1(predict(result.model, probe), probe.labels)
    assert sum(result.block_drops) == pytest.approx(100 * lost, abs=1e-3)
    assert [block.num_tokens for block in result.plan.blocks] == [block.num_patches for block in anatomy.blocks]
    share = count_macs(anatomy, result.plan) / dense_macs
    assert 0.62 < share <= 0.7 if budget == 100 else 0.69 < share < 1


# Swin's own rules


@every_swin
def test_a_classifier_fitted_to_an_earlier_stage_tells_separable_images_apart(family: str) -> None:
    model, labels = model_of(family), torch.arange(120) % 7
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (7, 3, 1, 1), generator=generator)
    noise = 40 * torch.randn(120, 3, *size_of(family), generator=generator)
    pixels = (colours[labels] + noise).clamp(0, 255).to(torch.uint8)
    images = Images(pixels=pixels, labels=labels, mean=(0.5,) * 3, std=(0.25,) * 3)
    before = builders.state(model)
    heads = fit_exits(model, images.take(slice(0, 80)), [2, 4], learning_rate=1e-2, distillation=0.0)
    assert builders.same_state(model, before)
    fresh = images.take(slice(80, None))
    untrained, fitted = truncate(model, 2), truncate(model, 2, heads[2])
    assert str(fitted.norm) == str(model.norm).replace("32", "16")  # its settings are the model's
    assert heads[2]["norm.weight"].shape == (16,) and heads[2]["head.fc.weight"].shape == (7, 16)
    assert predict(untrained, fresh).count_nonzero() == 0
    assert top1(predict(fitted, fresh), fresh.labels) > 0.8
    assert torch.equal(truncate(model, 4, heads[4])(batch_of(family)), model(batch_of(family)))


@every_swin
def test_a_plan_that_drops_tokens_of_windows_is_refused(family: str) -> None:
    model = model_of(family)
    plan = keep_all_plan(examine(model))
    fewer = tuple(replace(block, num_tokens=16) for block in plan.blocks)
    for reduction in ("lfe", "none"):
        changed = replace(plan, blocks=fewer, token_reduction=reduction)
        for call in (apply_plan, functools.partial(repaired_model, images=builders.images(4, size=size_of(family)))):
            with pytest.raises(PlanError, match=r"block 0 keeps 16 .* windows needs every token of the grid"):
                call(model, changed)


@pytest.mark.parametrize("exit_block", [1, 3])
@every_swin
def test_an_exit_within_a_stage_is_refused_and_the_ends_are_named(family: str, exit_block: int) -> None:
    model = model_of(family)
    message = f"exit after block {exit_block} is within a stage; give the end of one: 2, 4"
    with pytest.raises(PlanError, match=message):
        truncate(model, exit_block)
    with pytest.raises(PlanError, match=message):
        fit_exits(model, builders.images(4, size=size_of(family)), [2, exit_block])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 40, "patch_size": 4}, "block 0 pads its grid of 10 x 10 tokens to windows of 4 x 4"),
        ({"img_size": [32, 40], "patch_size": 4}, "block 0 pads its grid of 8 x 10 tokens to windows of 4 x 4"),
        ({"img_size": 48, "patch_size": 4}, "block 2 pads its grid of 6 x 6 tokens to windows of 4 x 4"),
        ({"strict_img_size": False}, "block 0 .* a mask made anew"),
        ({"global_pool": "max"}, "global_pool='max'"),
    ],
)
def test_a_swin_whose_windows_do_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    name, args = FAMILIES["swin"]
    with pytest.raises(ModelError, match=message):
        examine(timm.create_model(name, **(args | change)))


def test_a_pruned_swin_is_refused_like_any_model_that_is_not_dense() -> None:
    model = model_of("swin")
    with pytest.raises(ModelError, match="block 0 has a part that cannot be pruned"):
        examine(apply_plan(model, plan_of(examine(model))))
