"""Gates that learn which units stay (WDPruning, Yu et al., AAAI 2022): a score a unit, a threshold a layer.

A layer's keep ratio is its threshold's sigmoid, and its units of largest score stay. Within a step the ranking hardly
moves, so the gradient of a unit's gate goes to its score as it is (straight through).

Where we differ: a ratio gets the gradient of the gates at its edge, the next to close and the next to open, which is
what one unit more or less does to the loss. The paper sums it over all open gates, which is what it does to the loss to
scale the whole layer; the weights are at rest with respect to that, so little but noise is left
(`ratio_gradient="open"`).

C model width, H heads, D head width, h hidden units, n units of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pruning.measure.widths import AllowedWidths
from pruning.methods.ranking import top_indices
from pruning.model.anatomy import BlockAnatomy
from pruning.model.gates import BlockGates, Gates
from pruning.plan import BlockPlan

OPEN = 10.0
"""The thresholds' first value, whose sigmoid keeps everything (the paper's beta = 10)."""

EDGE = 1 / 16
"""Share of a layer's units on either side of the edge whose gradients are averaged; one unit at least."""

KINDS = ("heads", "qk", "v", "hidden")

RatioGradient = Literal["edge", "open"]
"""The gates whose gradients make that of a keep ratio: those at the edge, or all that are open."""


class TopShare(torch.autograd.Function):
    """A mask, 1 for the ceil(ratio * n) largest scores of each row, else 0, with straight-through gradients.

    With g the gradient of the gates (..., n), the scores get g as it is. The ratio gets, summed over the rows, n times
    the mean of g at the edge (n * ratio gates are open), or the sum of g over the open gates.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, ratio: Tensor, ratio_gradient: RatioGradient) -> Tensor:
        """Returns the mask (..., n) of scores (..., n) at a ratio (), in (0, 1]."""
        count = _count(float(ratio.detach()), scores.shape[-1])
        order = scores.argsort(dim=-1, descending=True, stable=True)
        reach = max(1, round(EDGE * scores.shape[-1]))
        ctx.deciding = order[..., max(0, count - reach) : count + reach]
        ctx.weight = scores.shape[-1] / ctx.deciding.shape[-1]
        if ratio_gradient == "open":
            ctx.deciding, ctx.weight = order[..., :count], 1.0
        return torch.zeros_like(scores).scatter(-1, order[..., :count], 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.weight * gradient.gather(-1, ctx.deciding).sum(), None


class LearnedGates(Gates):
    """The scores of one block's units, and a threshold for each kind."""

    def __init__(self, block: Any, anatomy: BlockAnatomy, ratio_gradient: RatioGradient = "edge") -> None:
        """Starts the scores from the size of the block's weights, as multiples of their spread.

        Args:
            block: dense and slim.
        """
        super().__init__()
        self.ratio_gradient = ratio_gradient
        channels = anatomy.num_heads, anatomy.head_dim
        rows = torch.linalg.vector_norm(block.attn.qkv.weight, dim=1).reshape(3, *channels)
        v = rows[2] * torch.linalg.vector_norm(block.attn.proj.weight, dim=0).reshape(channels)
        hidden = torch.linalg.vector_norm(block.mlp.fc1.weight, dim=1) * torch.linalg.vector_norm(
            block.mlp.fc2.weight, dim=0
        )
        scores = {"heads": torch.linalg.vector_norm(v, dim=1), "qk": rows[0] * rows[1], "v": v, "hidden": hidden}
        self.scores = nn.ParameterDict({kind: nn.Parameter(_standardized(score)) for kind, score in scores.items()})
        fixed = {"qk"} if anatomy.has_qk_norm else set()
        device = v.device
        self.thresholds = nn.ParameterDict(
            {kind: nn.Parameter(torch.tensor(OPEN, device=device)) for kind in KINDS if kind not in fixed}
        )

    def ratios(self, shift: float = 0.0) -> dict[str, Tensor]:
        """Keep ratios by kind, in (0, 1), if all thresholds were higher by `shift`."""
        one = torch.ones((), device=self.scores["v"].device)
        return {kind: (self.thresholds[kind] + shift).sigmoid() if kind in self.thresholds else one for kind in KINDS}

    def forward(self) -> BlockGates:
        masks = {
            kind: TopShare.apply(self.scores[kind], ratio, self.ratio_gradient) for kind, ratio in self.ratios().items()
        }
        return BlockGates(qk=masks["qk"], v=masks["v"] * masks["heads"][:, None], hidden=masks["hidden"])

    def plan(self, anatomy: BlockAnatomy, allowed: AllowedWidths, shifts: Mapping[str, float]) -> BlockPlan:
        """The units that would stay if the thresholds were higher by `shifts`; widths are rounded up to allowed ones.

        Args:
            shifts: by kind.
        """
        ratios = {
            kind: float((self.thresholds[kind].detach() + shifts[kind]).sigmoid()) if kind in self.thresholds else 1.0
            for kind in KINDS
        }
        heads = top_indices(self.scores["heads"].detach(), _count(ratios["heads"], anatomy.num_heads))
        qk_width, v_width = allowed.least_attention(*(_count(ratios[kind], anatomy.head_dim) for kind in ("qk", "v")))
        num_hidden = allowed.least_hidden(_count(ratios["hidden"], anatomy.num_hidden))
        return BlockPlan(
            keep_heads=heads,
            keep_qk=tuple(top_indices(self.scores["qk"][head].detach(), qk_width) for head in heads),
            keep_v=tuple(top_indices(self.scores["v"][head].detach(), v_width) for head in heads),
            keep_hidden=top_indices(self.scores["hidden"].detach(), num_hidden),
            num_tokens=anatomy.num_patches,
        )


def _count(ratio: float, total: int) -> int:
    return min(total, max(1, math.ceil(ratio * total)))


def _standardized(scores: Tensor) -> Tensor:
    """The scores with mean 0 and spread 1."""
    scores = scores.detach().float()
    return (scores - scores.mean()) / scores.std().clamp_min(torch.finfo(torch.float32).eps)
