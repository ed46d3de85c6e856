"""From channel scores to the widths of a block: drop the n least units, then give every head equal widths.

H heads, D head width, h hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.anatomy import Anatomy
from pruning.plan import BlockPlan, Indices
from pruning.scores.lfs import ChannelScores


class Ranking:
    """The units of one block, ranked together: query/key pairs, value channels, hidden units."""

    def __init__(self, scores: ChannelScores, anatomy: Anatomy) -> None:
        self.scores = ChannelScores(qk=scores.qk.cpu(), v=scores.v.cpu(), hidden=scores.hidden.cpu())
        # With qk-norm the pairs stay whole: they are ranked above everything.
        qk = torch.full_like(self.scores.qk, float("inf")) if anatomy.has_qk_norm else self.scores.qk
        self._num_qk, self._num_v = qk.numel(), self.scores.v.numel()
        self._order = torch.cat([qk.flatten(), self.scores.v.flatten(), self.scores.hidden]).argsort(stable=True)
        self._min_qk = anatomy.num_heads * anatomy.head_dim if anatomy.has_qk_norm else 1

    @property
    def max_removed(self) -> int:
        """Units that can go: one pair, one value channel and one hidden unit are not asked for."""
        return len(self._order) - self._min_qk - 2

    def plan(self, num_removed: int, num_tokens: int) -> BlockPlan:
        """The block without its `num_removed` least units; `num_tokens` patch tokens leave it.

        Query/key and value channels are spread over as many heads as lose the least score; widths are rounded up,
        so a few more channels than asked may stay.
        """
        removed = self._order[:num_removed]
        num_qk = self._num_qk - int((removed < self._num_qk).sum())
        num_hidden = len(self.scores.hidden) - int((removed >= self._num_qk + self._num_v).sum())
        num_v = self._num_v - (num_removed - (self._num_qk - num_qk) - (len(self.scores.hidden) - num_hidden))
        heads, qk_width, v_width = fit_heads(self.scores.qk, self.scores.v, max(num_qk, self._min_qk), max(num_v, 1))
        return BlockPlan(
            keep_heads=heads,
            keep_qk=tuple(top(self.scores.qk[head], qk_width) for head in heads),
            keep_v=tuple(top(self.scores.v[head], v_width) for head in heads),
            keep_hidden=top(self.scores.hidden, max(num_hidden, 1)),
            num_tokens=num_tokens,
        )


def fit_heads(qk: Tensor, v: Tensor, num_qk: int, num_v: int) -> tuple[Indices, int, int]:
    """Heads and equal widths for so many channels: of all head counts that fit, the one that loses the least score.

    Args:
        qk, v: (H, D) scores.
        num_qk, num_v: channels to keep in the whole block, at least 1 each.

    Returns:
        The kept heads, ascending, and their query/key and value width.
    """
    num_heads, head_dim = qk.shape
    best: tuple[float, Indices, int, int] | None = None
    for count in range(-(-max(num_qk, num_v) // head_dim), num_heads + 1):
        qk_width, v_width = -(-num_qk // count), -(-num_v // count)
        kept = qk.topk(qk_width, dim=1).values.sum(dim=1) + v.topk(v_width, dim=1).values.sum(dim=1)
        heads = top(kept, count)
        score = kept[list(heads)].sum().item()
        if best is None or score > best[0]:
            best = score, heads, qk_width, v_width
    assert best is not None
    return best[1:]


def top(scores: Tensor, count: int) -> Indices:
    """The indices of the `count` largest scores, ascending; of equal scores the first stay. (n,)."""
    return tuple(scores.argsort(descending=True, stable=True)[:count].sort().values.tolist())
