"""Surgery: `apply_plan` makes a physically smaller model by a plan; the input model is left as it was.

H heads, D dense head width, K and V kept widths, C model width. Rows of qkv: queries, keys, values; head by head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pruning.errors import PlanError
from pruning.model.anatomy import Anatomy, BlockAnatomy, BlockParts, blocks_of, examine, parts_of, with_blocks
from pruning.model.layers import SlimAttention, SlimBlock, SlimMlp, WindowedAttention
from pruning.model.tokens import REDUCERS, Reducer, merges
from pruning.model.windows import Windows
from pruning.plan import BlockPlan, Plan, TokenReduction

WINDOWS_NEED_ALL = "attention in windows needs every token of the grid"


def keep_all_block(anatomy: BlockAnatomy, num_tokens: int | None = None) -> BlockPlan:
    """Makes the plan that keeps all units of a block, which `num_tokens` patch tokens (default: all) leave."""
    channels = tuple(range(anatomy.head_dim))
    return BlockPlan(
        keep_heads=tuple(range(anatomy.num_heads)),
        keep_qk=(channels,) * anatomy.num_heads,
        keep_v=(channels,) * anatomy.num_heads,
        keep_hidden=tuple(range(anatomy.num_hidden)),
        num_tokens=anatomy.num_patches if num_tokens is None else num_tokens,
    )


def keep_all_plan(anatomy: Anatomy) -> Plan:
    """Makes the plan that keeps the whole dense model."""
    return Plan(blocks=tuple(map(keep_all_block, anatomy.blocks)))


def keep_all_from(anatomy: Anatomy, index: int, num_tokens: int) -> list[BlockPlan]:
    """Makes plans that keep all units of the blocks from `index` on, which `num_tokens` patch tokens enter."""
    return [keep_all_block(block, min(num_tokens, block.num_patches)) for block in anatomy.blocks[index:]]


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Makes the smaller model. A block that keeps everything is copied as it is, so its output stays bit-equal.

    Args:
        model: a dense model of `plan.exit_block` blocks (`pruning.model.exits.truncate` cuts a deeper one).

    Raises:
        PlanError: the plan is for another depth, or keeps a unit that the model does not have.
    """
    anatomy = examine(model)
    check_plan(plan, anatomy)
    built: list[nn.Module] = []
    num_tokens = anatomy.blocks[0].num_patches
    for block, block_anatomy, block_plan in zip(blocks_of(model), anatomy.blocks, plan.blocks, strict=True):
        built.append(
            slim_block(
                block, block_plan, block_anatomy, num_tokens_in=min(num_tokens, block_anatomy.num_patches),
                token_reduction=plan.token_reduction, cutoff_token=plan.cutoff_token,
                is_last=len(built) == anatomy.depth - 1,
            )
        )  # fmt: skip
        num_tokens = block_plan.num_tokens
    return with_blocks(model, built)


def check_plan(plan: Plan, anatomy: Anatomy) -> None:
    """Raises PlanError if the plan does not fit the model."""
    if plan.exit_block != anatomy.depth:
        raise PlanError(f"the plan has {plan.exit_block} blocks, the model {anatomy.depth}; truncate the model first")
    for index, (block, dense) in enumerate(zip(plan.blocks, anatomy.blocks, strict=True)):
        most = {
            "head": (block.keep_heads[-1], dense.num_heads),
            "qk channel": (max(kept[-1] for kept in block.keep_qk), dense.head_dim),
            "v channel": (max(kept[-1] for kept in block.keep_v), dense.head_dim),
            "hidden unit": (block.keep_hidden[-1], dense.num_hidden),
            "patch token": (block.num_tokens - 1, dense.num_patches),
        }
        for name, (last, count) in most.items():
            if last >= count:
                raise PlanError(f"block {index} keeps {name} {last}, but the model has {count} (counted from 0)")
        if dense.has_qk_norm and block.shape.qk_width != dense.head_dim:
            raise PlanError(f"block {index} drops qk channels, which a model with qk-norm needs; keep all")
        if block.num_tokens != dense.num_patches and (dense.window_area is not None or plan.token_reduction == "none"):
            why = "the plan's token reduction is none" if dense.window_area is None else WINDOWS_NEED_ALL
            raise PlanError(f"block {index} keeps {block.num_tokens} of {dense.num_patches} tokens, but {why}")


def slim_block(
    block: nn.Module,
    plan: BlockPlan,
    anatomy: BlockAnatomy,
    *,
    num_tokens_in: int,
    token_reduction: TokenReduction,
    cutoff_token: float,
    is_last: bool,
) -> nn.Module:
    """Makes a block of only the planned units, in new memory; where all of it stays, a plain copy.

    Args:
        block: a dense block.
        num_tokens_in: patch tokens that enter it.
        cutoff_token: cut-off frequency of the token filter, in (0, 1].
        is_last: no block comes after it.

    Raises:
        PlanError: more patch tokens leave the block than enter it.
    """
    if plan.num_tokens > num_tokens_in:
        raise PlanError(f"{plan.num_tokens} patch tokens leave a block that {num_tokens_in} enter; keep fewer")
    if plan == keep_all_block(anatomy, num_tokens_in):
        block = copy.deepcopy(block)
        has_sizes = merges(token_reduction) and num_tokens_in < anatomy.num_patches
        return as_slim(block, anatomy, is_last=is_last) if has_sizes else block
    parts = parts_of(block)
    reducer: Reducer | None = None
    if plan.num_tokens < num_tokens_in:
        reducer = REDUCERS[token_reduction](
            num_patches=num_tokens_in,
            num_keep=plan.num_tokens,
            num_prefix_tokens=anatomy.num_prefix_tokens,
            has_class_token=anatomy.has_class_token,
            cutoff=cutoff_token,
        ).to(parts.qkv.weight.device)
    slim = SlimBlock(
        downsample=copy.deepcopy(parts.downsample),
        norm1=copy.deepcopy(parts.norm1),
        attn=_slim_attention(parts, plan, anatomy),
        ls1=copy.deepcopy(parts.ls1),
        reducer=reducer,
        norm2=copy.deepcopy(parts.norm2),
        mlp=SlimMlp(
            _linear(parts.fc1, rows=_index(plan.keep_hidden)),
            copy.deepcopy(parts.act),
            _linear(parts.fc2, columns=_index(plan.keep_hidden)),
        ),
        ls2=copy.deepcopy(parts.ls2),
        is_last=is_last,
    )
    return slim.train(block.training)


def as_slim(block: nn.Module, anatomy: BlockAnatomy, *, is_last: bool) -> SlimBlock:
    """Makes a slim block of a dense one, which takes merged tokens with their sizes; it shares the block's memory."""
    parts = parts_of(block)
    attention = _attention(
        parts.qkv, parts.proj, parts.windows, num_heads=anatomy.num_heads, qk_width=anatomy.head_dim,
        v_width=anatomy.head_dim, scale=anatomy.head_dim**-0.5, q_norm=parts.q_norm, k_norm=parts.k_norm,
    )  # fmt: skip
    slim = SlimBlock(
        downsample=parts.downsample, norm1=parts.norm1, attn=attention, ls1=parts.ls1, reducer=None, norm2=parts.norm2,
        mlp=SlimMlp(parts.fc1, parts.act, parts.fc2), ls2=parts.ls2, is_last=is_last,
    )  # fmt: skip
    for container in (slim, slim.attn, slim.mlp):  # of these alone: the parts keep their modes
        container.training = block.training
    return slim


def value_channels(plan: BlockPlan, anatomy: BlockAnatomy) -> Tensor:
    """Returns the kept inputs of the attention's output projection, as indices into H*D, ascending: (H' * V,)."""
    return _head_channels(plan.keep_heads, plan.keep_v, anatomy.head_dim)


def _slim_attention(parts: BlockParts, plan: BlockPlan, anatomy: BlockAnatomy) -> SlimAttention:
    qk = _head_channels(plan.keep_heads, plan.keep_qk, anatomy.head_dim)
    v = value_channels(plan, anatomy)
    inner = anatomy.num_heads * anatomy.head_dim
    return _attention(
        _linear(parts.qkv, rows=torch.cat([qk, inner + qk, 2 * inner + v])),
        _linear(parts.proj, columns=v),
        None if parts.windows is None else parts.windows.of_heads(_index(plan.keep_heads)),
        num_heads=plan.shape.num_heads,
        qk_width=plan.shape.qk_width,
        v_width=plan.shape.v_width,
        scale=anatomy.head_dim**-0.5,
        q_norm=copy.deepcopy(parts.q_norm),
        k_norm=copy.deepcopy(parts.k_norm),
    )


def _attention(qkv: nn.Linear, proj: nn.Linear, windows: Windows | None, **widths: Any) -> SlimAttention:
    if windows is None:
        return SlimAttention(qkv, proj, **widths)
    return WindowedAttention(qkv, proj, windows=windows, **widths)


def _head_channels(heads: tuple[int, ...], channels: tuple[tuple[int, ...], ...], head_dim: int) -> Tensor:
    return torch.cat([head * head_dim + _index(kept) for head, kept in zip(heads, channels, strict=True)])


def _index(kept: tuple[int, ...]) -> Tensor:
    return torch.tensor(kept, dtype=torch.long)


def _linear(layer: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """Makes a linear layer of some rows (outputs) or columns (inputs) of another, in new memory."""
    weight: Tensor = layer.weight.detach()
    bias: Tensor | None = None if layer.bias is None else layer.bias.detach()
    if rows is not None:
        rows = rows.to(weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    slim = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    slim.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        slim.bias = nn.Parameter(bias.clone(), requires_grad=layer.weight.requires_grad)
    return slim
