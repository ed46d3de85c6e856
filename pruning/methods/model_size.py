"""Sizes of pruned models, in multiply-adds or parameters, as sums over the units that their blocks keep.

A size is a whole number for plans, and has a gradient for keep ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pruning.measure.cost import channel_macs, count_macs, count_params
from pruning.model.anatomy import Anatomy, BlockAnatomy, blocks_of, parts_of
from pruning.model.surgery import keep_all_block, keep_all_plan
from pruning.plan import BlockPlan

BudgetUnit = Literal["macs", "params"]
"""The unit in which a model's size is counted: multiply-adds, or parameters."""


class ModelSize:
    """Sizes of pruned models in one unit of the budget, as sums over the units of their blocks."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, unit: BudgetUnit) -> None:
        """Measures the dense model."""
        self.anatomies = anatomy.blocks
        self.units = [
            UnitSizes.measure(block, block_anatomy, unit)
            for block, block_anatomy in zip(blocks_of(model), anatomy.blocks, strict=True)
        ]
        self.dense = count_macs(anatomy, keep_all_plan(anatomy)) if unit == "macs" else count_params(model)
        """Size of the dense model."""
        self.fixed = self.dense - sum(
            units.total(keep_all_block(block)) for units, block in zip(self.units, anatomy.blocks, strict=True)
        )
        """Size of what no width changes."""

    def of(self, plans: Sequence[BlockPlan]) -> int:
        """The size of the model under plans of all blocks."""
        return self.fixed + sum(units.total(plan) for units, plan in zip(self.units, plans, strict=True))

    def share(self, ratios: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The size of the model under keep ratios of each block, by kind, as a share of the dense size; ().

        Ratios need not be whole numbers of units, and the share has their gradient.
        """
        total = torch.full((), float(self.fixed), device=ratios[0]["v"].device)
        for ratio, units, block in zip(ratios, self.units, self.anatomies, strict=True):
            head = block.head_dim * (ratio["qk"] * units.qk + ratio["v"] * units.v) + units.head
            total = total + block.num_heads * ratio["heads"] * head + block.num_hidden * ratio["hidden"] * units.hidden
        return total / self.dense


@dataclass(frozen=True, kw_only=True)
class UnitSizes:
    """Sizes of one unit of a block, in multiply-adds or parameters."""

    head: int
    """A head without its channels."""
    qk: int
    """A query/key pair."""
    v: int
    """A value channel."""
    hidden: int
    """A hidden unit."""

    @classmethod
    def measure(cls, block: nn.Module, anatomy: BlockAnatomy, unit: BudgetUnit) -> UnitSizes:
        """Counts the units of a dense block."""
        if unit == "macs":
            tokens = anatomy.num_prefix_tokens + anatomy.num_patches
            channel = channel_macs(anatomy, tokens)
            return cls(head=0, qk=channel, v=channel, hidden=2 * tokens * anatomy.width)
        parts, width = parts_of(block), anatomy.width
        row = width + (parts.qkv.bias is not None)
        return cls(
            head=0 if parts.windows is None else len(parts.windows.bias_table),
            qk=2 * row,
            v=row + width,
            hidden=2 * width + (parts.fc1.bias is not None),
        )

    def total(self, plan: BlockPlan) -> int:
        """The size of all units that a plan keeps."""
        shape = plan.shape
        heads = shape.num_heads * (self.head + shape.qk_width * self.qk + shape.v_width * self.v)
        return heads + shape.num_hidden * self.hidden
