"""The parts of a timm vision transformer: the only file that knows timm's attribute names.

Blocks pass on a sequence of tokens, whatever the family; a Swin's tokens are its grid, row by row.

B images, N tokens (prefix tokens first, then patches), C model width, H heads, D head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pruning.errors import ModelError
from pruning.model.features import SwinOfBlocks, with_features
from pruning.model.windows import Downsample, GridBlock, Windows

SUPPORTED = (
    "timm's VisionTransformer (vit_*, deit_*, deit3_*: class token, distilled, register tokens, average pooling) "
    "and SwinTransformer (swin_*)"
)

TAIL_PREFIXES = ("norm.", "fc_norm.", "attn_pool.", "head.", "head_dist.")
"""Name prefixes of all parameters after the blocks: those that a depth exit replaces."""


@dataclass(frozen=True, kw_only=True)
class BlockAnatomy:
    """The dense widths of one block."""

    width: int
    num_heads: int
    head_dim: int
    num_hidden: int
    num_patches: int
    """The number of patch tokens that the block's attention sees in the dense model."""
    num_prefix_tokens: int
    """The number of class, distillation and register tokens: they come first and are never dropped."""
    has_class_token: bool
    has_qk_norm: bool
    """True where queries and keys are normalised over the head width, all channels of which therefore have to stay."""
    window_area: int | None = None
    """The number of tokens in one attention window; None where every token attends to all. Windows need every token of
    the grid, so a block with windows cannot reduce them."""
    entry_macs: int = 0
    """The multiply-adds of the patch merging before the block; 0 without one."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The dense sizes of a model: of its blocks, and of what is around them."""

    blocks: tuple[BlockAnatomy, ...]
    exits: tuple[int, ...]
    """The numbers of blocks after which the model may answer: any for a ViT, the ends of stages for a Swin."""
    num_classes: int
    num_head_inputs: int
    """The number of tokens that have a classifier each: 1, or 2 for a distilled DeiT."""
    patch_inputs: int
    """The number of values in one patch: channels * height * width."""
    image_size: tuple[int, int]
    in_channels: int

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def has_windows(self) -> bool:
        """True where attention is within windows, so that tokens cannot be reduced."""
        return any(block.window_area is not None for block in self.blocks)


@dataclass(frozen=True)
class BlockParts:
    """The modules of one block, which computes `x += ls1(proj(attention(qkv(norm1(x)))))`, then the MLP."""

    downsample: Downsample | None
    """The patch merging before the block; None without one."""
    norm1: nn.Module
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    windows: Windows | None
    """The windows within which tokens attend; None where every token attends to all."""
    proj: nn.Linear
    ls1: nn.Module
    norm2: nn.Module
    fc1: nn.Linear
    act: nn.Module
    fc2: nn.Linear
    ls2: nn.Module


def examine(model: nn.Module) -> Anatomy:
    """Returns the anatomy of a dense model.

    Raises:
        ModelError: the model is of no supported family, or has a part that pruning does not know.
    """
    if type(model) in (SwinTransformer, SwinOfBlocks):  # the latter where it is cut after a stage
        return _examine_swin(model)
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise ModelError(f"{type(model).__name__} is not a model that can be pruned; supported is {SUPPORTED}")
    assert isinstance(model, VisionTransformer)
    if model.global_pool in ("map", "prr"):
        raise ModelError(
            f"a model with attention pooling ({model.global_pool}) cannot be pruned; supported is {SUPPORTED}"
        )
    if model.global_pool == "":
        raise ModelError("a model with global_pool='' gives an answer for each token; give 'token' or 'avg'")
    if not len(model.blocks):
        raise ModelError("the model has no block; give a depth of 1 at least")
    _check_patches(model.patch_embed)
    for index, block in enumerate(model.blocks):
        _check_block(index, block)
    first: Any = model.blocks[0]
    patch = model.patch_embed
    block_anatomy = BlockAnatomy(
        width=model.embed_dim,
        num_heads=first.attn.num_heads,
        head_dim=first.attn.head_dim,
        num_hidden=first.mlp.fc1.out_features,
        num_patches=patch.num_patches,
        num_prefix_tokens=model.num_prefix_tokens,
        has_class_token=model.cls_token is not None,
        has_qk_norm=not isinstance(first.attn.q_norm, nn.Identity),
    )
    return Anatomy(
        blocks=(block_anatomy,) * len(model.blocks),
        exits=tuple(range(1, len(model.blocks) + 1)),
        num_classes=model.num_classes,
        num_head_inputs=2 if isinstance(model, VisionTransformerDistilled) else 1,
        patch_inputs=patch.proj.weight[0].numel(),
        image_size=tuple(patch.img_size),
        in_channels=patch.proj.in_channels,
    )


def _check_patches(patch: Any) -> None:
    """Refuses images that are not made of whole patches (timm leaves out what is over), and other stems."""
    if type(patch) is not PatchEmbed:
        raise ModelError(f"a model with {type(patch).__name__} cannot be pruned; supported is {SUPPORTED}")
    if patch.img_size is None:
        raise ModelError("the model has no img_size; give the size of its images")
    for size, length in zip(patch.img_size, patch.patch_size, strict=True):
        if size % length:
            nearest = max(round(size / length), 1) * length
            raise ModelError(f"img_size {size} is no multiple of the patch size {length}; give e.g. {nearest}")


def _check_block(index: int, block: Any) -> None:
    """Refuses parts that would be pruned wrongly: gates, norms on the attention output, gated MLPs, parallel blocks."""
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


def _examine_swin(model: Any) -> Anatomy:
    blocks = blocks_of(model)
    if model.global_pool != "avg":
        raise ModelError(f"a Swin with global_pool={model.global_pool!r} cannot be pruned; give 'avg'")
    _check_patches(model.patch_embed)
    for index, block in enumerate(blocks):
        _check_grid_block(index, block)
    patch = model.patch_embed
    return Anatomy(
        blocks=tuple(_grid_block_anatomy(block) for block in blocks),
        exits=(*(index for index in range(1, len(blocks)) if blocks[index].downsample is not None), len(blocks)),
        num_classes=model.num_classes,
        num_head_inputs=1,
        patch_inputs=patch.proj.weight[0].numel(),
        image_size=tuple(patch.img_size),
        in_channels=patch.proj.in_channels,
    )


def _check_grid_block(index: int, block: Any) -> None:
    inner: Any = block.block if isinstance(block, GridBlock) else block
    unknown = None
    if type(inner) is not SwinTransformerBlock:
        unknown = type(inner).__name__
    elif type(inner.attn) is not WindowAttention or inner.dynamic_mask:
        unknown = "attention with a mask made anew for every batch"
    elif type(inner.mlp) is not Mlp or not isinstance(inner.mlp.norm, nn.Identity):
        unknown = f"MLP {type(inner.mlp).__name__} or a norm in it"
    if unknown:
        raise ModelError(f"block {index} has a part that cannot be pruned ({unknown}); supported is {SUPPORTED}")
    (height, width), (window_height, window_width) = inner.input_resolution, inner.window_size
    if height % window_height or width % window_width:
        raise ModelError(
            f"block {index} pads its grid of {height} x {width} tokens to windows of {window_height} x {window_width}; "
            "give an img_size or a window_size that fits"
        )


def _grid_block_anatomy(block: Any) -> BlockAnatomy:
    inner, downsample = block.block, block.downsample
    num_patches = inner.input_resolution[0] * inner.input_resolution[1]
    return BlockAnatomy(
        width=inner.dim,
        num_heads=inner.attn.num_heads,
        head_dim=inner.attn.proj.in_features // inner.attn.num_heads,
        num_hidden=inner.mlp.fc1.out_features,
        num_patches=num_patches,
        num_prefix_tokens=0,
        has_class_token=False,
        has_qk_norm=False,
        window_area=inner.window_area,
        entry_macs=0 if downsample is None else num_patches * downsample.merging.reduction.weight.numel(),
    )


def blocks_of(model: nn.Module) -> nn.Sequential:
    """Returns the transformer blocks, first to last; each takes tokens (B, N, C) and gives tokens."""
    if not isinstance(model, SwinTransformer):
        blocks = model.blocks
        assert isinstance(blocks, nn.Sequential)
        return blocks
    if not isinstance(model.layers[0], SwinTransformerStage):
        return model.layers[1:-1]  # between the layers that flatten the grid and make it again
    grid_blocks = []
    stages: Any = model.layers
    for stage in stages:
        for index, block in enumerate(stage.blocks):
            downsample = None
            if index == 0 and not isinstance(stage.downsample, nn.Identity):
                downsample = Downsample(stage.downsample, stage.input_resolution)
            grid_blocks.append(GridBlock(downsample, block))
    return nn.Sequential(*grid_blocks)


def parts_of(block: Any) -> BlockParts:
    """Returns the parts of a timm block, or of our own slim one, whose parts have the same names."""
    if isinstance(block, GridBlock):
        return _grid_parts(block)
    attn, mlp = block.attn, block.mlp
    return BlockParts(
        downsample=getattr(block, "downsample", None),
        norm1=block.norm1,
        qkv=attn.qkv,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        windows=getattr(attn, "windows", None),
        proj=attn.proj,
        ls1=block.ls1,
        norm2=block.norm2,
        fc1=mlp.fc1,
        act=mlp.act,
        fc2=mlp.fc2,
        ls2=block.ls2,
    )


def _grid_parts(block: GridBlock) -> BlockParts:
    inner: Any = block.block
    windows = Windows(
        grid=inner.input_resolution, window=inner.window_size, shift=inner.shift_size, mask=inner.attn_mask,
        bias_table=inner.attn.relative_position_bias_table, bias_index=inner.attn.relative_position_index,
    )  # fmt: skip
    identity = nn.Identity()
    return BlockParts(
        downsample=block.downsample, norm1=inner.norm1, qkv=inner.attn.qkv, q_norm=identity, k_norm=identity,
        windows=windows, proj=inner.attn.proj, ls1=identity, norm2=inner.norm2, fc1=inner.mlp.fc1, act=inner.mlp.act,
        fc2=inner.mlp.fc2, ls2=identity,
    )  # fmt: skip


def embed(model: Any, images: Tensor) -> Tensor:
    """Turns images (B, channels, height, width) into the input of the first block (B, N, C)."""
    x: Tensor = model.patch_embed(images)
    if isinstance(model, SwinTransformer):
        return x.flatten(1, 2)
    return model.norm_pre(model.patch_drop(model._pos_embed(x)))


def classify(model: Any, x: Tensor) -> Tensor:
    """Turns the output of the last block (B, N, C) into logits (B, classes)."""
    if isinstance(model, SwinTransformer):
        x = x[:, None]  # pooled over a grid of one row
    logits: Tensor = model.forward_head(model.norm(x))
    return logits


def tail_tokens(model: Any, x: Tensor) -> Tensor:
    """Picks the tokens that `classify` reads: the prefix alone where the class token answers, else all of them."""
    return x[:, : model.num_prefix_tokens] if model.global_pool == "token" else x


def summary_token(anatomy: BlockAnatomy, x: Tensor) -> Tensor:
    """Returns a vector for each image (B, C): the class token of x (B, N, C), or the mean patch where there is none."""
    return x[:, 0] if anatomy.has_class_token else x[:, anatomy.num_prefix_tokens :].mean(dim=1)


def with_blocks(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """Copies the model with these blocks in place of its first ones, and without the others; they are not copied.

    Where they end at another width than the model's (the exit of a Swin's stage), norm and classifier are new ones
    of that width, whose logits are all 0.
    """
    if not isinstance(model, SwinTransformer):
        assert isinstance(model.blocks, nn.Module)
        return with_features(_copied(model, model.blocks, nn.Sequential(*blocks)), len(blocks))
    last: Any = blocks_of(model)[len(blocks) - 1]
    grid: Any = last.block.input_resolution
    copied: Any = _copied(model, model.layers, nn.Sequential(nn.Flatten(1, 2), *blocks, nn.Unflatten(1, grid)))
    width = last.block.dim
    if width != copied.num_features:
        norm, fc = copied.norm, copied.head.fc
        copied.num_features = copied.head_hidden_size = copied.head.in_features = copied.head.num_features = width
        copied.norm = type(norm)(width, eps=norm.eps).to(norm.weight).requires_grad_(norm.weight.requires_grad)
        copied.head.fc = nn.Linear(width, fc.out_features).to(fc.weight).requires_grad_(fc.weight.requires_grad)
        nn.init.zeros_(copied.head.fc.weight)
        nn.init.zeros_(copied.head.fc.bias)
    return with_features(copied, len(blocks))


def _copied(model: nn.Module, blocks: nn.Module, around: nn.Sequential) -> nn.Module:
    around.training = model.training  # of the container alone: the blocks keep their modes
    return copy.deepcopy(model, {id(blocks): around})
