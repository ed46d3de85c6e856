"""Multiply-adds and parameters, counted from the widths alone.

Counted: patch embedding, qkv, attention logits, attention times values, projection, the token filter and the
matching of tokens where a reduction uses them, both MLP layers, the classifiers. One multiply-add counts as one. Not
counted: norms, activations, softmax, biases, additions, the choice of tokens: a few thousandths of a ViT.
Hooks and profilers miss fused attention; this does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pruning.anatomy import Anatomy
from pruning.plan import BlockShape, Plan, TokenReduction
from pruning.tokens import REDUCERS, merges


def count_macs(anatomy: Anatomy, plan: Plan) -> int:
    """Multiply-adds an image of the pruned model."""
    total = anatomy.num_patches * anatomy.width * anatomy.patch_inputs
    patches = anatomy.num_patches
    for block in plan.blocks:
        total += block_macs(anatomy, block.shape, patches, plan.token_reduction).total
        patches = block.num_tokens
    return total + anatomy.num_head_inputs * anatomy.width * anatomy.num_classes


@dataclass(frozen=True, kw_only=True)
class BlockMacs:
    """Multiply-adds of one block, by part."""

    attention: int
    reduction: int
    """Of the tokens: the low-pass filter, the matching of pairs."""
    mlp: int

    @property
    def total(self) -> int:
        return self.attention + self.reduction + self.mlp


def block_macs(
    anatomy: Anatomy, shape: BlockShape, patches_in: int, token_reduction: TokenReduction = "lfe"
) -> BlockMacs:
    """Of one block that `patches_in` patch tokens enter.

    With N tokens in and N' out, width C, H heads of K query/key and V value channels, h hidden units:
    attention N*C*H*(2K + 2V) + N^2*H*(K + V), MLP 2*N'*C*h, reduction as `reduction_macs` says.
    """
    tokens_in = anatomy.num_prefix_tokens + patches_in
    tokens_out = anatomy.num_prefix_tokens + shape.num_tokens
    widths = shape.num_heads * (shape.qk_width + shape.v_width)
    return BlockMacs(
        attention=2 * tokens_in * anatomy.width * widths + tokens_in**2 * widths,
        reduction=reduction_macs(anatomy, shape, patches_in, token_reduction),
        mlp=2 * tokens_out * anatomy.width * shape.num_hidden,
    )


def reduction_macs(anatomy: Anatomy, shape: BlockShape, patches_in: int, token_reduction: TokenReduction) -> int:
    """Where M patches become M': the filter M^2*C, and for merging M/2 * M/2 * K in every round of matching."""
    if shape.num_tokens == patches_in:
        return 0
    total = patches_in**2 * anatomy.width if REDUCERS[token_reduction].has_filter else 0
    left = patches_in
    while merges(token_reduction) and left > shape.num_tokens:
        total += (left // 2) * (left - left // 2) * shape.qk_width
        left = max(shape.num_tokens, left - left // 2)
    return total


def count_params(model: nn.Module) -> int:
    """Numbers in the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
