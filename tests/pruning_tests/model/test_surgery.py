"""A pruned model against the dense one with the dropped units zeroed, and against the slow definition."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pruning.errors import PlanError
from pruning.model.anatomy import Anatomy, blocks_of, examine
from pruning.model.layers import SlimBlock
from pruning.model.surgery import apply_plan, keep_all_block, keep_all_plan, slim_block, value_channels
from pruning.plan import BlockPlan, Plan, TokenReduction
from tests.pruning_tests import builders, reference

NO_QK_NORM = [family for family in builders.FAMILIES if family != "qk_norm"]


def double(family: str) -> nn.Module:
    return builders.model(family).double()


@torch.no_grad()
def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """The dense model with every unit that the plan drops set to zero where it is made (weight row and bias)."""
    anatomy = examine(model)
    copied = copy.deepcopy(model)
    for block, dense, kept in zip(blocks_of(copied), anatomy.blocks, plan.blocks, strict=True):
        width, inner = dense.head_dim, dense.num_heads * dense.head_dim
        stays = torch.zeros(3, inner, dtype=torch.bool)
        for head, qk, v in zip(kept.keep_heads, kept.keep_qk, kept.keep_v, strict=True):
            stays[:2, [head * width + channel for channel in qk]] = True
            stays[2, [head * width + channel for channel in v]] = True
        hidden = torch.zeros(dense.num_hidden, dtype=torch.bool)
        hidden[list(kept.keep_hidden)] = True
        parts: Any = block
        for layer, rows in ((parts.attn.qkv, stays.flatten()), (parts.mlp.fc1, hidden)):
            layer.weight[~rows] = 0
            if layer.bias is not None:
                layer.bias[~rows] = 0
    return copied


def only(kind: str, full: BlockPlan, block: BlockPlan) -> BlockPlan:
    """The part of a random block's plan that drops one kind of unit."""
    heads = block.keep_heads
    all_channels = (full.keep_qk[0],) * len(heads)
    if kind == "heads":
        return replace(full, keep_heads=heads, keep_qk=all_channels, keep_v=all_channels)
    if kind == "hidden":
        return replace(full, keep_hidden=block.keep_hidden)
    if kind == "everything":
        return block
    cycled = tuple(getattr(block, f"keep_{kind}")[index % len(heads)] for index in range(len(full.keep_heads)))
    change: dict[str, Any] = {f"keep_{kind}": cycled}
    return replace(full, **change)


def drop_only(kind: str, anatomy: Anatomy, seed: int = 0) -> Plan:
    full = keep_all_block(anatomy.blocks[0])
    return Plan(blocks=tuple(only(kind, full, block) for block in builders.plan(anatomy, seed=seed).blocks))


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_keep_all_plan_leaves_logits_bit_equal(family: str) -> None:
    model, x = builders.model(family), builders.batch()
    assert torch.equal(apply_plan(model, keep_all_plan(examine(model)))(x), model(x))


@pytest.mark.parametrize(
    ("family", "kind"), builders.in_rotation(NO_QK_NORM, ["heads", "qk", "v", "hidden", "everything"], 3)
)
def test_dropped_units_are_as_if_zeroed_in_the_dense_model(family: str, kind: str) -> None:
    model, x = double(family), builders.batch(2).double()
    plan = drop_only(kind, examine(model))
    pruned = apply_plan(model, plan)(x)
    torch.testing.assert_close(pruned, zeroed(model, plan)(x), atol=1e-10, rtol=1e-10)
    assert (pruned - model(x)).abs().max() > 1e-3  # or nothing was dropped


@pytest.mark.parametrize("kind", ["heads", "v", "hidden"])
def test_dropped_units_are_as_if_zeroed_where_queries_and_keys_are_normalised(kind: str) -> None:
    model, x = double("qk_norm"), builders.batch().double()
    plan = drop_only(kind, examine(model))
    torch.testing.assert_close(apply_plan(model, plan)(x), zeroed(model, plan)(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_a_plan_that_drops_units_and_tokens_equals_the_slow_definition(family: str) -> None:
    model, x = double(family), builders.batch(3).double()
    plan = replace(builders.plan(examine(model), seed=3, num_tokens=(16, 9, 4)), cutoff_token=0.4)
    with torch.no_grad():
        torch.testing.assert_close(apply_plan(model, plan)(x), reference.logits(model, plan, x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["vit", "distilled", "average_pooling"])
def test_dropped_tokens_alone_equal_the_slow_definition(family: str) -> None:
    model, x = double(family), builders.batch(3).double()
    full = keep_all_block(examine(model).blocks[0])
    plan = Plan(blocks=tuple(replace(full, num_tokens=count) for count in (10, 10, 1)), cutoff_token=0.85)
    pruned = apply_plan(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), reference.logits(model, plan, x), atol=1e-6, rtol=1e-6)
    # The block in the middle is whole, for the tokens that it is given: nothing there is rebuilt.
    assert [type(block) for block in blocks_of(pruned)] == [SlimBlock, Block, SlimBlock]


def test_a_whole_block_is_rebuilt_only_where_tokens_come_with_sizes() -> None:
    model = builders.model(depth=4)
    full = keep_all_block(examine(model).blocks[0])
    plan = Plan(blocks=tuple(replace(full, num_tokens=count) for count in (16, 9, 9, 9)), token_reduction="merge")
    assert [type(block) for block in blocks_of(apply_plan(model, plan))] == [Block, SlimBlock, SlimBlock, SlimBlock]


def test_one_unit_of_each_kind_is_enough() -> None:
    model, x = double("vit"), builders.batch(2).double()
    least = BlockPlan(keep_heads=(1,), keep_qk=((5,),), keep_v=((2,),), keep_hidden=(33,), num_tokens=1)
    plan = Plan(blocks=(least,) * 3)
    with torch.no_grad():
        torch.testing.assert_close(apply_plan(model, plan)(x), reference.logits(model, plan, x), atol=1e-6, rtol=1e-6)


def test_a_pruned_model_has_the_parameters_of_its_widths_and_no_more() -> None:
    model = builders.model()
    plan = builders.plan(examine(model), seed=1)
    expected = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("blocks."))
    for shape in (block.shape for block in plan.blocks):
        rows = shape.num_heads * (2 * shape.qk_width + shape.v_width)
        expected += (24 + 1) * rows + (shape.num_heads * shape.v_width + 1) * 24
        expected += (24 + 1) * shape.num_hidden + (shape.num_hidden + 1) * 24 + 4 * 24
    assert sum(p.numel() for p in apply_plan(model, plan).parameters()) == expected


def merging(anatomy: Anatomy) -> Plan:
    """A plan that keeps all units of every block; the last block takes tokens with sizes."""
    return Plan(blocks=tuple(keep_all_block(anatomy.blocks[0], count) for count in (16, 9, 9)), token_reduction="merge")


@pytest.mark.parametrize("make", [keep_all_plan, builders.plan, merging])
def test_the_model_is_left_as_it_was_and_shares_no_memory(make: Callable[[Anatomy], Plan]) -> None:
    model = builders.model()
    before = builders.state(model)
    pruned = apply_plan(model, make(examine(model)))
    assert builders.same_state(model, before)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(7)
    assert builders.same_state(model, before)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("token_reduction", ["lfe", "merge"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_pruned_model_trains_or_not_as_its_model_does(
    flag: bool, token_reduction: TokenReduction, is_whole: bool
) -> None:
    model = builders.model().train(flag).requires_grad_(flag)
    anatomy = examine(model)
    tokens_alone = Plan(blocks=tuple(keep_all_block(anatomy.blocks[0], count) for count in (16, 9, 9)))
    plan = tokens_alone if is_whole else builders.plan(anatomy, num_tokens=(16, 9, 9))
    pruned = apply_plan(model, replace(plan, token_reduction=token_reduction))
    assert all(module.training == flag for module in pruned.modules())
    assert all(parameter.requires_grad == flag for parameter in pruned.parameters())


def test_value_channels_count_within_the_whole_block() -> None:
    anatomy = builders.anatomy()
    block = BlockPlan(keep_heads=(0, 2), keep_qk=((0,), (1,)), keep_v=((1, 3), (0, 7)), keep_hidden=(0,), num_tokens=16)
    assert value_channels(block, anatomy.blocks[0]).tolist() == [1, 3, 16, 23]


def changed(**change: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, blocks=(plan.blocks[0], replace(plan.blocks[1], **change), plan.blocks[2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(keep_heads=(0, 1, 3)), "block 1 keeps head 3, but the model has 3"),
        (changed(keep_qk=((0,), (1,), (8,))), "block 1 keeps qk channel 8, but the model has 8"),
        (changed(keep_v=((0,), (9,), (1,))), "block 1 keeps v channel 9, but the model has 8"),
        (changed(keep_hidden=(0, 96)), "block 1 keeps hidden unit 96, but the model has 96"),
        (lambda plan: replace(plan, blocks=plan.blocks[:2]), "the plan has 2 blocks, the model 3"),
        (lambda plan: replace(plan, blocks=plan.blocks * 2), "the plan has 6 blocks, the model 3"),
    ],
)
def test_a_plan_for_another_model_is_refused(change: Callable[[Plan], Plan], message: str) -> None:
    model = builders.model()
    with pytest.raises(PlanError, match=message):
        apply_plan(model, change(keep_all_plan(examine(model))))


def test_more_tokens_than_the_model_has_are_refused() -> None:
    model = builders.model()
    anatomy = examine(model).blocks[0]
    with pytest.raises(PlanError, match="patch token 16, but the model has 16"):
        apply_plan(model, Plan(blocks=(keep_all_block(anatomy, 17),) * 3))
    with pytest.raises(PlanError, match="9 patch tokens leave a block that 8 enter"):
        slim_block(
            blocks_of(model)[0], keep_all_block(anatomy, 9), anatomy,
            num_tokens_in=8, token_reduction="lfe", cutoff_token=0.5, is_last=False,
        )  # fmt: skip


def test_a_plan_without_a_token_reduction_keeps_all_tokens() -> None:
    model, x = builders.model(), builders.batch()
    anatomy = examine(model)
    plan = replace(builders.plan(anatomy), token_reduction="none")
    assert torch.equal(apply_plan(model, plan)(x), apply_plan(model, replace(plan, token_reduction="lfe"))(x))
    fewer = replace(plan, blocks=tuple(replace(block, num_tokens=15) for block in plan.blocks))
    with pytest.raises(PlanError, match="block 0 keeps 15 of 16 tokens, but the plan's token reduction is none"):
        apply_plan(model, fewer)


def test_a_normalised_query_keeps_all_its_channels() -> None:
    model = builders.model("qk_norm")
    plan = changed(keep_qk=((0,), (1,), (2,)))(keep_all_plan(examine(model)))
    with pytest.raises(PlanError, match="block 1 drops qk channels"):
        apply_plan(model, plan)


def test_a_batch_gives_what_its_images_give_alone() -> None:
    model, x = double("vit"), builders.batch(3).double()
    pruned = apply_plan(model, builders.plan(examine(model), seed=2, num_tokens=(9, 5, 5)))
    alone: Tensor = torch.cat([pruned(image[None]) for image in x])
    torch.testing.assert_close(pruned(x), alone, atol=1e-10, rtol=1e-10)
