"""Multiply-adds and parameters, counted from the widths alone.

Counted: patch embedding, patch merging, qkv, attention logits, attention times values, projection, the token filter
and the matching of tokens where a reduction uses them, both MLP layers, the classifiers. One multiply-add counts as
one. Not counted: norms, activations, softmax, biases, additions, the choice of tokens: a few thousandths of a ViT.
Hooks and profilers miss fused attention; this does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pruning.model.anatomy import Anatomy, BlockAnatomy
from pruning.model.tokens import REDUCERS
from pruning.plan import BlockShape, Plan, TokenReduction


def count_macs(anatomy: Anatomy, plan: Plan) -> int:
    """Counts the multiply-adds of the pruned model for one image."""
    first, last = anatomy.blocks[0], anatomy.blocks[plan.exit_block - 1]
    total = first.num_patches * first.width * anatomy.patch_inputs
    patches = first.num_patches
    for block, block_plan in zip(anatomy.blocks, plan.blocks, strict=False):  # the exit may lie before the last block
        total += block_macs(block, block_plan.shape, min(patches, block.num_patches), plan.token_reduction).total
        patches = block_plan.num_tokens
    return total + anatomy.num_head_inputs * last.width * anatomy.num_classes


@dataclass(frozen=True, kw_only=True)
class BlockMacs:
    """The multiply-adds of one block for one image, by part."""

    entry: int
    """The multiply-adds of the patch merging before the block."""
    attention: int
    """The multiply-adds of qkv, logits, mixing of values, and projection."""
    reduction: int
    """The multiply-adds of the token reduction: the low-pass filter, the matching of pairs."""
    mlp: int
    """The multiply-adds of both MLP layers."""

    @property
    def total(self) -> int:
        return self.entry + self.attention + self.reduction + self.mlp


def block_macs(
    anatomy: BlockAnatomy, shape: BlockShape, patches_in: int, token_reduction: TokenReduction = "lfe"
) -> BlockMacs:
    """Counts the multiply-adds of one block that `patches_in` patch tokens enter.

    With N tokens in and N' out, width C, H heads of K query/key and V value channels, h hidden units, each token
    attending to T (all N, or those of its window): attention N*H*(K + V)*(2*C + T), MLP 2*N'*C*h, reduction as
    `reduction_macs` says.
    """
    tokens_in = anatomy.num_prefix_tokens + patches_in
    tokens_out = anatomy.num_prefix_tokens + shape.num_tokens
    widths = shape.num_heads * (shape.qk_width + shape.v_width)
    return BlockMacs(
        entry=anatomy.entry_macs,
        attention=widths * channel_macs(anatomy, tokens_in),
        reduction=reduction_macs(anatomy, shape, patches_in, token_reduction),
        mlp=2 * tokens_out * anatomy.width * shape.num_hidden,
    )


def channel_macs(anatomy: BlockAnatomy, num_tokens: int) -> int:
    """Counts the multiply-adds of one query/key pair, or one value channel, of one head.

    Counted are its projections and its part of the attention, where `num_tokens` tokens enter the block.
    """
    return num_tokens * (2 * anatomy.width + (anatomy.window_area or num_tokens))


def reduction_macs(anatomy: BlockAnatomy, shape: BlockShape, patches_in: int, token_reduction: TokenReduction) -> int:
    """Counts the multiply-adds of reducing M patches to M': the filter M^2*C, and the matching.

    Matching takes M/2 * M/2 * K a round for pairs of places, (M-1) * M * K for a quick shift.
    """
    if shape.num_tokens == patches_in:
        return 0
    reducer = REDUCERS[token_reduction]
    filtering = patches_in**2 * anatomy.width if reducer.has_filter else 0
    return filtering + reducer.matching_macs(patches_in, shape.num_tokens, shape.qk_width)


def count_params(model: nn.Module) -> int:
    """Counts the numbers in the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
