"""Multiply-adds and parameters, counted from the widths alone.

Counted: patch embedding, qkv, attention logits, attention times values, projection, the token filter
where tokens are dropped, both MLP layers, the classifiers. One multiply-add counts as one. Not counted: norms,
activations, softmax, biases, additions, the choice of tokens: a few thousandths of a ViT.
Hooks and profilers miss fused attention; this does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pruning.anatomy import Anatomy
from pruning.plan import BlockShape, Plan


def count_macs(anatomy: Anatomy, plan: Plan) -> int:
    """Multiply-adds an image of the pruned model."""
    total = anatomy.num_patches * anatomy.width * anatomy.patch_inputs
    patches = anatomy.num_patches
    for block in plan.blocks:
        total += block_macs(anatomy, block.shape, patches).total
        patches = block.num_tokens
    return total + anatomy.num_head_inputs * anatomy.width * anatomy.num_classes


@dataclass(frozen=True, kw_only=True)
class BlockMacs:
    """Multiply-adds of one block, by part."""

    attention: int
    token_filter: int
    mlp: int

    @property
    def total(self) -> int:
        return self.attention + self.token_filter + self.mlp


def block_macs(anatomy: Anatomy, shape: BlockShape, patches_in: int) -> BlockMacs:
    """Of one block that `patches_in` patch tokens enter.

    With N tokens in and N' out, M patches in, width C, H heads of K query/key and V value channels, h hidden units:
    attention N*C*H*(2K + 2V) + N^2*H*(K + V), filter M^2*C if tokens are dropped, MLP 2*N'*C*h.
    """
    tokens_in = anatomy.num_prefix_tokens + patches_in
    tokens_out = anatomy.num_prefix_tokens + shape.num_tokens
    widths = shape.num_heads * (shape.qk_width + shape.v_width)
    return BlockMacs(
        attention=2 * tokens_in * anatomy.width * widths + tokens_in**2 * widths,
        token_filter=patches_in**2 * anatomy.width if shape.num_tokens < patches_in else 0,
        mlp=2 * tokens_out * anatomy.width * shape.num_hidden,
    )


def count_params(model: nn.Module) -> int:
    """Numbers in the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
