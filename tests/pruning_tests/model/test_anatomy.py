"""The parts of timm's models, and the models that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import SwiGLU
from torch import nn

from pruning.errors import ModelError
from pruning.model.anatomy import blocks_of, classify, embed, examine, summary_token, tail_tokens, with_blocks
from tests.pruning_tests import builders


@pytest.mark.parametrize(
    ("family", "prefix", "has_class_token", "heads"),
    [
        ("vit", 1, True, 1),
        ("distilled", 2, True, 2),
        ("registers", 5, True, 1),
        ("average_pooling", 0, False, 1),
        ("registers_average", 3, True, 1),
        ("registers_alone", 2, False, 1),
    ],
)
def test_the_anatomy_of_every_family(family: str, prefix: int, has_class_token: bool, heads: int) -> None:
    anatomy = builders.anatomy(family)
    block, *others = anatomy.blocks
    assert others == [block, block] and (anatomy.depth, anatomy.exits) == (3, (1, 2, 3))
    assert (block.num_prefix_tokens, block.has_class_token, anatomy.num_head_inputs) == (prefix, has_class_token, heads)
    assert (block.width, block.num_heads, block.head_dim) == (24, 3, 8)
    assert (block.num_hidden, block.num_patches, anatomy.num_classes) == (96, 16, 7)
    assert (anatomy.patch_inputs, anatomy.image_size, anatomy.in_channels) == (3 * 8 * 8, (32, 32), 3)
    assert not block.has_qk_norm and not anatomy.has_windows and (block.window_area, block.entry_macs) == (None, 0)


def test_qk_norm_and_one_channel_are_seen() -> None:
    assert all(block.has_qk_norm for block in builders.anatomy("qk_norm").blocks)
    grey = builders.anatomy(in_chans=1, img_size=(16, 24))
    assert (grey.in_channels, grey.patch_inputs, grey.image_size, grey.blocks[0].num_patches) == (1, 64, (16, 24), 6)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_embed_blocks_classify_is_the_model(family: str) -> None:
    model, x = builders.model(family), builders.batch()
    between = blocks_of(model)(embed(model, x))
    assert torch.equal(classify(model, between), model(x))
    assert torch.equal(classify(model, tail_tokens(model, between)), model(x))


def test_the_summary_is_the_class_token_or_the_mean_of_the_patches() -> None:
    x = torch.randn(2, 18, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(summary_token(builders.anatomy("distilled").blocks[0], x), x[:, 0])
    patches, pooled, registers = x[:, :16], builders.anatomy("average_pooling"), builders.anatomy("registers_alone")
    torch.testing.assert_close(summary_token(pooled.blocks[0], patches), patches.mean(dim=1))
    torch.testing.assert_close(summary_token(registers.blocks[0], x), x[:, 2:].mean(dim=1))


def test_a_model_around_other_blocks_shares_nothing_else() -> None:
    model = builders.model()
    before = builders.state(model)
    taken = blocks_of(model)[0]
    other = with_blocks(model, [taken])
    assert blocks_of(other)[0] is taken and len(blocks_of(other)) == 1 and len(blocks_of(model)) == 3
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if not name.startswith("blocks."):
                parameter.add_(1)
    assert builders.same_state(model, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: setattr(block, "mlp", SwiGLU(24, 96)), r"block 1 .*\(MLP SwiGLU"),
        (lambda block: setattr(block.mlp, "norm", nn.LayerNorm(96)), "block 1 .* norm in it"),
        (lambda block: setattr(block, "attn", nn.Identity()), r"block 1 .*\(attention Identity"),
        (lambda block: setattr(block.attn, "norm", nn.LayerNorm(24)), "block 1 .* an output norm"),
        (lambda block: setattr(block.attn, "gate", nn.Linear(24, 24)), "block 1 .* a gate"),
    ],
)
def test_a_part_that_would_be_pruned_wrongly_is_refused_and_named(change: Callable[[Any], None], message: str) -> None:
    model = builders.model()
    change(blocks_of(model)[1])
    with pytest.raises(ModelError, match=message):
        examine(model)


def test_a_block_of_another_kind_a_model_of_another_kind_and_no_block_are_refused() -> None:
    model = builders.model()
    with pytest.raises(ModelError, match=r"block 0 .* \(Identity\)"):
        examine(with_blocks(model, [nn.Identity()]))
    with pytest.raises(ModelError, match="Linear is not a model that can be pruned; supported is timm's"):
        examine(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no block"):
        examine(with_blocks(model, []))
