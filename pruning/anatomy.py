"""What a timm vision transformer is made of: the only file that knows timm's attribute names.

B images, N tokens (prefix tokens first, then patches), C model width, H heads, D head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from timm.layers import Attention, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pruning.errors import ModelError

SUPPORTED = "timm's VisionTransformer: vit_* and deit_* (class token, distilled, register tokens, average pooling)"

TAIL_PREFIXES = ("norm.", "fc_norm.", "attn_pool.", "head.", "head_dist.")
"""Parameters of everything after the blocks: what a depth exit replaces."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The dense widths of a model; they are the same in every block."""

    depth: int
    width: int
    num_heads: int
    head_dim: int
    num_hidden: int
    num_patches: int
    num_prefix_tokens: int
    """Class, distillation and register tokens: they come first and are never dropped."""
    has_class_token: bool
    has_qk_norm: bool
    """Queries and keys are normalised over the head width, which therefore has to stay whole."""
    num_classes: int
    num_head_inputs: int
    """Tokens that a classifier of their own reads: 1, or 2 for a distilled DeiT."""
    patch_inputs: int
    """Values in one patch: channels * height * width."""
    image_size: tuple[int, int]
    in_channels: int


@dataclass(frozen=True)
class BlockParts:
    """The modules of one block, by what they do: `x += ls1(proj(attention(qkv(norm1(x)))))`, then the MLP."""

    norm1: nn.Module
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    proj: nn.Linear
    ls1: nn.Module
    norm2: nn.Module
    fc1: nn.Linear
    act: nn.Module
    fc2: nn.Linear
    ls2: nn.Module


def examine(model: nn.Module) -> Anatomy:
    """The anatomy of a dense model.

    Raises:
        ModelError: the model is of no supported family, or a part of it is one that pruning does not know.
    """
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise ModelError(f"{type(model).__name__} is not a model that can be pruned; supported is {SUPPORTED}")
    assert isinstance(model, VisionTransformer)
    if model.global_pool in ("map", "prr"):
        raise ModelError(
            f"a model with attention pooling ({model.global_pool}) cannot be pruned; supported is {SUPPORTED}"
        )
    if not len(model.blocks):
        raise ModelError("the model has no block; give a depth of 1 at least")
    for index, block in enumerate(model.blocks):
        _check_block(index, block)
    first: Any = model.blocks[0]
    patch = model.patch_embed
    return Anatomy(
        depth=len(model.blocks),
        width=model.embed_dim,
        num_heads=first.attn.num_heads,
        head_dim=first.attn.head_dim,
        num_hidden=first.mlp.fc1.out_features,
        num_patches=patch.num_patches,
        num_prefix_tokens=model.num_prefix_tokens,
        has_class_token=model.cls_token is not None,
        has_qk_norm=not isinstance(first.attn.q_norm, nn.Identity),
        num_classes=model.num_classes,
        num_head_inputs=2 if isinstance(model, VisionTransformerDistilled) else 1,
        patch_inputs=patch.proj.weight[0].numel(),
        image_size=tuple(patch.img_size),
        in_channels=patch.proj.in_channels,
    )


def _check_block(index: int, block: Any) -> None:
    """Refuses what would be pruned wrongly: gates, norms on the attention output, gated MLPs, parallel blocks."""
    unknown = None
    if type(block) is not Block:
        unknown = type(block).__name__
    elif type(block.attn) is not Attention:
        unknown = f"attention {type(block.attn).__name__}"
    elif getattr(block.attn, "gate", None) is not None or not isinstance(block.attn.norm, nn.Identity):
        unknown = "attention with a gate or an output norm"
    elif type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
        unknown = f"MLP {type(block.mlp).__name__} or a norm in it"
    if unknown:
        raise ModelError(f"block {index} has a part that cannot be pruned ({unknown}); supported is {SUPPORTED}")


def blocks_of(model: nn.Module) -> nn.Sequential:
    """The transformer blocks, first to last."""
    blocks = model.blocks
    assert isinstance(blocks, nn.Sequential)
    return blocks


def parts_of(block: Any) -> BlockParts:
    """The parts of a timm block, or of our own slim one, which carries the same names."""
    attn, mlp = block.attn, block.mlp
    return BlockParts(
        norm1=block.norm1,
        qkv=attn.qkv,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        proj=attn.proj,
        ls1=block.ls1,
        norm2=block.norm2,
        fc1=mlp.fc1,
        act=mlp.act,
        fc2=mlp.fc2,
        ls2=block.ls2,
    )


def embed(model: Any, images: Tensor) -> Tensor:
    """What enters the first block. images: (B, channels, height, width) -> (B, N, C)."""
    x = model.patch_embed(images)
    return model.norm_pre(model.patch_drop(model._pos_embed(x)))


def classify(model: Any, x: Tensor) -> Tensor:
    """Logits from what leaves the last block. x: (B, N, C) -> (B, classes)."""
    return model.forward_head(model.norm(x))


def tail_tokens(model: Any, x: Tensor) -> Tensor:
    """The tokens that `classify` reads: the prefix alone where the class token answers, else all of them."""
    return x[:, : model.num_prefix_tokens] if model.global_pool == "token" else x


def summary_token(anatomy: Anatomy, x: Tensor) -> Tensor:
    """One vector an image: the class token, or the mean of the patches where there is none. (B, N, C) -> (B, C)."""
    return x[:, 0] if anatomy.has_class_token else x[:, anatomy.num_prefix_tokens :].mean(dim=1)


def with_blocks(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """A copy of the model around other blocks. They are taken as they are; all else is copied."""
    around = nn.Sequential(*blocks)
    around.training = model.training  # of the container alone: the blocks keep their modes
    return copy.deepcopy(model, {id(model.blocks): around})
