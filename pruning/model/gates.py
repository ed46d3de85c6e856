"""Blocks whose units are multiplied by gates: a gate of 0 has the effect of pruning the unit, and has a gradient.

B images, N tokens, C model width, H heads, D head width, h hidden units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.model.anatomy import BlockAnatomy
from pruning.model.layers import SlimBlock
from pruning.plan import BlockPlan


@dataclass(frozen=True, kw_only=True)
class BlockGates:
    """The factors that the units of one block are multiplied by."""

    qk: Tensor
    """(H, D), of query/key pairs: one factor for the product of query and key."""
    v: Tensor
    """(H, D), of value channels."""
    hidden: Tensor
    """(h,), of hidden units."""


class Gates(nn.Module, ABC):
    """A module that returns the gates of one block; its parameters are learned."""

    @abstractmethod
    def forward(self) -> BlockGates: ...


class FixedGates(Gates):
    """Gates that never change."""

    qk: Tensor
    v: Tensor
    hidden: Tensor

    def __init__(self, gates: BlockGates) -> None:
        super().__init__()
        for name in ("qk", "v", "hidden"):
            self.register_buffer(name, getattr(gates, name).detach().clone())

    def forward(self) -> BlockGates:
        return BlockGates(qk=self.qk, v=self.v, hidden=self.hidden)


class GatedBlock(nn.Module):
    """A dense block with gates; it shares the block's memory."""

    def __init__(self, block: SlimBlock, gates: Gates) -> None:
        super().__init__()
        self.block, self.gates = block, gates

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block with its gates. (B, N, C) -> (B, N, C)."""
        block, gates = self.block, self.gates()
        x, size = block.enter(x)
        q, k, v = block.attn.project(block.norm1(x))
        mixed = block.attn.mix(q * gates.qk[:, None].to(q.dtype), k, v * gates.v[:, None].to(v.dtype), size)
        x = x + block.ls1(block.attn.proj(mixed))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
        return x + block.ls2(block.mlp.fc2(hidden * gates.hidden.to(hidden.dtype)))


def plan_of_gates(gates: BlockGates, anatomy: BlockAnatomy) -> BlockPlan:
    """Makes the plan that keeps the units whose gate is not 0; a head without any value channel left goes.

    Raises:
        AssertionError: the heads that stay keep different numbers of channels, or a kind of unit goes altogether.
    """
    heads = gates.v.ne(0).any(dim=1).nonzero()[:, 0].tolist()
    return BlockPlan(
        keep_heads=tuple(heads),
        keep_qk=tuple(_kept(gates.qk[head]) for head in heads),
        keep_v=tuple(_kept(gates.v[head]) for head in heads),
        keep_hidden=_kept(gates.hidden),
        num_tokens=anatomy.num_patches,
    )


def gates_of_plan(plan: BlockPlan, anatomy: BlockAnatomy, device: torch.device | str = "cpu") -> BlockGates:
    """Makes the gates that are 1 for every unit that the plan keeps, and 0 for every other."""

    def ones(count: int, kept: Sequence[int]) -> Tensor:
        return torch.zeros(count, device=device).index_fill(0, torch.tensor(kept, device=device), 1.0)

    qk = torch.zeros(anatomy.num_heads, anatomy.head_dim, device=device)
    v = torch.zeros_like(qk)
    for head, keep_qk, keep_v in zip(plan.keep_heads, plan.keep_qk, plan.keep_v, strict=True):
        qk[head], v[head] = ones(anatomy.head_dim, keep_qk), ones(anatomy.head_dim, keep_v)
    return BlockGates(qk=qk, v=v, hidden=ones(anatomy.num_hidden, plan.keep_hidden))


def _kept(gates: Tensor) -> tuple[int, ...]:
    return tuple(gates.ne(0).nonzero()[:, 0].tolist())
