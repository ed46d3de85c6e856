"""Ranks the units of a block by their scores: drops the n least, then gives every head equal widths.

H heads, D head width, h hidden units, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.measure.cost import channel_macs
from pruning.measure.widths import AllowedWidths
from pruning.model.anatomy import BlockAnatomy
from pruning.plan import BlockPlan, Indices
from pruning.scores.channel import ChannelScores


class Ranking:
    """The units of one block, ranked together by score per multiply-add: query/key pairs, value channels, hidden units.

    With N' tokens out, a pair or a value channel saves `pruning.measure.cost.channel_macs`, a hidden unit 2*N'*C
    multiply-adds.
    """

    def __init__(
        self,
        scores: ChannelScores,
        anatomy: BlockAnatomy,
        num_tokens_in: int,
        num_tokens_out: int,
        allowed: AllowedWidths,
    ) -> None:
        """
        Args:
            num_tokens_in, num_tokens_out: with the prefix tokens.
            allowed: widths are rounded up to these.
        """
        self.scores = ChannelScores(qk=scores.qk.cpu(), v=scores.v.cpu(), hidden=scores.hidden.cpu())
        self.allowed = allowed
        # With qk-norm all pairs stay: they are ranked above everything.
        qk = torch.full_like(self.scores.qk, float("inf")) if anatomy.has_qk_norm else self.scores.qk
        self._num_qk, self._num_v = qk.numel(), self.scores.v.numel()
        self._channel_macs = channel_macs(anatomy, num_tokens_in)
        hidden_macs = 2 * num_tokens_out * anatomy.width
        channels = torch.cat([qk.flatten(), self.scores.v.flatten()])
        self._worth = torch.cat([channels / self._channel_macs, self.scores.hidden / hidden_macs])
        self._order = self._worth.argsort(stable=True)
        self._min_qk = anatomy.num_heads * anatomy.head_dim if anatomy.has_qk_norm else 1

    @property
    def max_removed(self) -> int:
        """The number of units that can go: all but one pair, one value channel and one hidden unit."""
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
        # A channel has to be worth as much as the last unit that goes.
        price = self._worth[removed[-1:]].sum().item() * self._channel_macs
        heads, qk_width, v_width = fit_heads(
            self.scores.qk, self.scores.v, max(num_qk, self._min_qk), max(num_v, 1), self.allowed, price
        )
        return BlockPlan(
            keep_heads=heads,
            keep_qk=tuple(top_indices(self.scores.qk[head], qk_width) for head in heads),
            keep_v=tuple(top_indices(self.scores.v[head], v_width) for head in heads),
            keep_hidden=top_indices(self.scores.hidden, self.allowed.least_hidden(max(num_hidden, 1))),
            num_tokens=num_tokens,
        )


def fit_heads(
    qk: Tensor, v: Tensor, num_qk: int, num_v: int, allowed: AllowedWidths, price: float = 0.0
) -> tuple[Indices, int, int]:
    """Chooses heads and equal widths for so many channels: of all head counts that fit, that of the least lost score.

    Args:
        qk, v: (H, D) scores.
        num_qk, num_v: channels to keep in all heads together, at least 1 each.
        allowed: both widths are rounded up to a pair of it.
        price: taken off for each channel that this rounding adds. At a price of 0, the most heads always win where
            one step of rounding is as wide as a head, and nothing is ever pruned.

    Returns:
        The kept heads, ascending, and their query/key and value width.
    """
    num_heads, head_dim = qk.shape
    best: tuple[float, Indices, int, int] | None = None
    for count in range(-(-max(num_qk, num_v) // head_dim), num_heads + 1):
        exact_widths = -(-num_qk // count), -(-num_v // count)
        qk_width, v_width = allowed.least_attention(*exact_widths)
        kept = qk.topk(qk_width, dim=1).values.sum(dim=1) + v.topk(v_width, dim=1).values.sum(dim=1)
        heads = top_indices(kept, count)
        score = kept[list(heads)].sum().item() - price * count * (qk_width + v_width - sum(exact_widths))
        if best is None or score > best[0]:
            best = score, heads, qk_width, v_width
    assert best is not None
    return best[1:]


def top_indices(scores: Tensor, count: int) -> Indices:
    """The indices of the `count` largest scores, ascending; of equal scores the first stay. (n,)."""
    return tuple(scores.argsort(descending=True, stable=True)[:count].sort().values.tolist())
