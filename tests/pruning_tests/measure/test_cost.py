"""Multiply-adds against arithmetic by hand and against torch's own counter of matrix products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pruning.measure.cost import block_macs, count_macs, count_params
from pruning.model.anatomy import blocks_of, examine
from pruning.model.surgery import apply_plan, keep_all_plan
from pruning.model.tokens import REDUCERS, AttentionState
from pruning.plan import TOKEN_REDUCTIONS, BlockPlan, BlockShape, Plan, TokenReduction
from tests.pruning_tests import builders


def test_different_widths_and_a_token_drop_count_as_by_hand() -> None:
    anatomy = builders.anatomy(depth=2)  # 16 patches of 3 x 8 x 8 and a class token, width 24, 3 heads of 8, 7 classes
    first = BlockPlan(
        keep_heads=(0, 2), keep_qk=((0, 1, 2),) * 2, keep_v=((0, 1, 2, 3, 4),) * 2, keep_hidden=tuple(range(40)),
        num_tokens=10,
    )  # fmt: skip
    second = BlockPlan(
        keep_heads=(0, 1, 2), keep_qk=(tuple(range(8)),) * 3, keep_v=((0, 7),) * 3, keep_hidden=tuple(range(7)),
        num_tokens=10,
    )  # fmt: skip
    expected = (
        16 * 24 * 192  # patch embedding
        + 17 * 24 * (2 * 3 + 2 * 3 + 2 * 5)  # block 0, 17 tokens: queries, keys, values of 2 heads
        + 2 * 17 * 17 * 3  # logits
        + 2 * 17 * 17 * 5  # attention times values
        + 17 * (2 * 5) * 24  # projection
        + 16 * 16 * 24  # token filter, on patches alone
        + 11 * 24 * 40 + 11 * 40 * 24  # MLP, on the 11 tokens that are left
        + 11 * 24 * (3 * 8 + 3 * 8 + 3 * 2)  # block 1, 11 tokens, 3 heads
        + 3 * 11 * 11 * 8
        + 3 * 11 * 11 * 2
        + 11 * (3 * 2) * 24
        + 11 * 24 * 7 + 11 * 7 * 24
        + 24 * 7  # classifier
    )  # fmt: skip
    assert count_macs(anatomy, Plan(blocks=(first, second))) == expected
    macs = block_macs(anatomy.blocks[0], first.shape, 16)
    assert macs.attention == 17 * 24 * 22 + 2 * 17 * 17 * 8 + 17 * 10 * 24
    assert (macs.reduction, macs.mlp) == (16 * 16 * 24, 2 * 11 * 24 * 40)
    assert macs.total == macs.attention + macs.reduction + macs.mlp
    assert block_macs(anatomy.blocks[0], second.shape, 10).reduction == 0


FILTER = 16 * 16 * 24
MATCHING = 3 * (8 * 8 + 4 * 4 + 2 * 2)  # keys 3 wide; 16 patches become 8, then 4, then 3

SHIFTING = 3 * 15 * 16  # all patches but the most attended against all


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [
        ("lfe", FILTER), ("attention", 0), ("merge", MATCHING), ("lfe-merge", FILTER + MATCHING),
        ("attention-merge", MATCHING), ("quickshift", SHIFTING),
    ],
)  # fmt: skip
def test_every_reduction_counts_as_by_hand(kind: TokenReduction, reduction: int) -> None:
    anatomy = builders.anatomy(depth=2)  # as above
    first = BlockPlan(
        keep_heads=(0, 2), keep_qk=((0, 1, 2),) * 2, keep_v=((0, 1, 2, 3, 4),) * 2, keep_hidden=tuple(range(40)),
        num_tokens=3,
    )  # fmt: skip
    expected = (
        16 * 24 * 192
        + 17 * 24 * 22 + 2 * 17 * 17 * 8 + 17 * 10 * 24  # block 0: 17 tokens in its attention, 4 in its MLP
        + reduction
        + 2 * 4 * 24 * 40
        + 4 * 24 * 22 + 2 * 4 * 4 * 8 + 4 * 10 * 24  # block 1: 4 tokens, and none to reduce
        + 2 * 4 * 24 * 40
        + 24 * 7
    )  # fmt: skip
    plan = Plan(blocks=(first, first), token_reduction=kind)
    assert count_macs(anatomy, plan) == expected
    assert block_macs(anatomy.blocks[0], first.shape, 16, kind).reduction == reduction
    assert block_macs(anatomy.blocks[0], first.shape, 3, kind).reduction == 0


@pytest.mark.parametrize(("patches", "left", "pairs"), [(15, 8, 7 * 8), (15, 7, 7 * 8 + 4 * 4), (2, 1, 1), (3, 1, 3)])
def test_an_odd_number_of_patches_is_matched_floor_by_ceiling(patches: int, left: int, pairs: int) -> None:
    # 15 patches: 8 even places, 7 odd; 7 pairs at most, so 8 stay. 3 patches: 2 x 1 pairs, then 1 x 1.
    shape = BlockShape(num_heads=3, qk_width=5, v_width=2, num_hidden=9, num_tokens=left)
    assert block_macs(builders.anatomy().blocks[0], shape, patches, "merge").reduction == 5 * pairs


@pytest.mark.parametrize(
    ("kind", "counts"),
    builders.in_rotation(TOKEN_REDUCTIONS, [(16, 15), (16, 8), (16, 7), (15, 7), (16, 1), (2, 1)], 4),
)
def test_a_reduction_counts_as_by_torch(kind: TokenReduction, counts: tuple[int, int]) -> None:
    patches, left = counts
    reducer = REDUCERS[kind](
        num_patches=patches, num_keep=left, num_prefix_tokens=1, has_class_token=True, cutoff=0.5
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 3, patches + 1, 5, generator=generator)
    attention = (q @ k.transpose(2, 3)).softmax(dim=-1)
    state = AttentionState(q=q, k=k, scale=1.0, size=None, attention=attention)
    x = torch.randn(1, patches + 1, 24, generator=generator)
    with FlopCounterMode(display=False) as counter:
        reducer.choose(x, state)
    asks_class = "attention" in kind or kind == "quickshift"  # for the class token's logits again: part of the choice
    row = 3 * (patches + 1) * 5 if asks_class else 0
    shape = BlockShape(num_heads=3, qk_width=5, v_width=2, num_hidden=9, num_tokens=left)
    assert counter.get_total_flops() == 2 * (
        block_macs(builders.anatomy().blocks[0], shape, patches, kind).reduction + row
    )


def test_a_dense_vit_tiny_needs_its_well_known_number() -> None:
    with torch.device("meta"):
        anatomy = examine(VisionTransformer(embed_dim=192, depth=12, num_heads=3))
    tokens, width = 197, 192
    block = 12 * tokens * width**2 + 2 * tokens**2 * width  # 4 d^2 attention, 8 d^2 MLP, logits and mixing
    expected = 196 * width * 768 + 12 * block + width * 1000
    assert expected == 1_253_683_200  # timm and the DeiT paper round it to 1.3 G
    assert count_macs(anatomy, keep_all_plan(anatomy)) == expected


def test_a_distilled_model_has_two_classifiers() -> None:
    plain, distilled = builders.anatomy("registers", reg_tokens=1), builders.anatomy("distilled")
    difference = count_macs(distilled, keep_all_plan(distilled)) - count_macs(plain, keep_all_plan(plain))
    assert difference == 24 * 7


def counted(model: nn.Module) -> int:
    """Half the operations that torch counts: those of convolutions and matrix products, which is all we count too."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(builders.batch(1))
    total = counter.get_total_flops()
    assert total % 2 == 0
    return total // 2


@pytest.mark.parametrize("family", ["vit", "distilled", "registers", "average_pooling", "qk_norm"])
def test_a_dense_model_counts_as_by_torch_where_attention_is_not_fused(family: str) -> None:
    model = builders.model(family)
    anatomy = examine(model)
    block: Any
    for block in blocks_of(model):
        block.attn.fused_attn = False
    assert count_macs(anatomy, keep_all_plan(anatomy)) == counted(model)


@pytest.mark.parametrize("family", ["vit", "distilled", "registers", "average_pooling"])
@pytest.mark.parametrize("seed", range(3))
def test_a_pruned_model_counts_as_by_torch_where_every_block_drops_tokens(family: str, seed: int) -> None:
    # A block that drops tokens needs its attention map, so nothing is fused; fused CPU kernels get padded heads.
    model = builders.model(family)
    anatomy = examine(model)
    plan = builders.plan(anatomy, seed=seed, num_tokens=(13, 8, 2))
    assert count_macs(anatomy, plan) == counted(apply_plan(model, plan))


def test_an_earlier_exit_costs_its_blocks_less() -> None:
    anatomy = builders.anatomy()
    full = keep_all_plan(anatomy)
    earlier = replace(full, blocks=full.blocks[:1])
    assert (
        count_macs(anatomy, full) - count_macs(anatomy, earlier)
        == 2 * block_macs(anatomy.blocks[0], full.blocks[0].shape, 16).total
    )


def test_parameters_are_counted_one_by_one() -> None:
    assert count_params(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))) == 12 + 4 + 8 + 8
