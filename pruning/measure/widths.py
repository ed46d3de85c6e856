"""The widths that a block may be given: those with which this device is faster than with all larger ones.

A kernel works in tiles, so a few units less often take as long as before, or longer; and queries, keys and values of
unequal width are padded to one. `round_to: auto` therefore measures a block at many widths and offers only those that
buy time, and counts the time that choosing tokens takes.

B images, N tokens, C model width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from pruning.measure.cost import block_macs, reduction_macs
from pruning.measure.stopwatch import Timer, time_in_turn
from pruning.model.anatomy import BlockAnatomy, blocks_of, examine
from pruning.model.layers import SlimBlock
from pruning.model.surgery import as_slim, keep_all_block, slim_block
from pruning.plan import BlockPlan, BlockShape, TokenReduction
from pruning.precision import Precision, autocast

MIN_GAIN = 0.01
"""A width is offered if its half of the block takes less time, by this share, than with any larger width offered."""

NUM_HIDDEN, NUM_HEAD_WIDTHS, NUM_UNEQUAL_WIDTHS = 16, 8, 4
"""The most widths that are timed: of hidden units; of head channels, queries as wide as values; and of head channels in
all pairs of two. They are evenly spread multiples of `GRAIN`. Twice as many hidden units and all 64 pairs, repeated 5
times, took five times as long, for plans that took 1 % longer and lost 2 to 10 % less at equal multiply-adds."""

GRAIN = 8
"""The widths that are timed are multiples of this, beside the dense one."""

TOKENS_LEFT = 0.75
"""The share of the patches that stay where a token reduction is timed."""


@dataclass(frozen=True, kw_only=True)
class AllowedWidths:
    """The widths that one block may be given."""

    attention: tuple[tuple[int, int], ...]
    """Pairs of query/key and value width of a head; the dense pair is among them."""
    hidden: tuple[int, ...]
    """Numbers of hidden units, ascending, the dense one last."""
    reduction: float = 0.0
    """The multiply-adds that take as long as a reduction of tokens, beyond those that are counted for it."""

    def least_attention(self, qk_width: int, v_width: int) -> tuple[int, int]:
        """Returns the smallest allowed pair that has at least these widths."""
        return min((pair for pair in self.attention if pair[0] >= qk_width and pair[1] >= v_width), key=sum)

    def least_hidden(self, width: int) -> int:
        """Returns the smallest allowed number of hidden units that is at least `width`."""
        return next(allowed for allowed in self.hidden if allowed >= width)


def multiples(anatomy: BlockAnatomy, round_to: int) -> AllowedWidths:
    """Allows all multiples of a number, and the dense widths: for any device, nothing is measured."""
    head = _multiples(anatomy.head_dim, round_to)
    pairs = tuple((qk, v) for qk in (head[-1:] if anatomy.has_qk_norm else head) for v in head)
    return AllowedWidths(attention=pairs, hidden=_multiples(anatomy.num_hidden, round_to))


def _multiples(most: int, step: int) -> tuple[int, ...]:
    return (*range(step, most, step), most)


@torch.inference_mode()
def measure_allowed_widths(
    model: nn.Module, batch_size: int, *, token_reduction: TokenReduction, precision: Precision = "float32",
    repeats: int = 2, timer: Timer = time_in_turn,
) -> tuple[AllowedWidths, ...]:  # fmt: skip
    """Measures the allowed widths of every block of a dense model, on its device; equal blocks are timed once.

    Args:
        batch_size: of the deployment.
        repeats: how often each width is timed; the least time counts.
        timer: given `AttentionHalf`s or `MlpHalf`s to time.
    """
    anatomy, device = examine(model), next(model.parameters()).device
    measured: dict[BlockAnatomy, AllowedWidths] = {}
    kinds = [replace(block, entry_macs=0) for block in anatomy.blocks]  # the patch merging before it is not timed
    for block, kind in zip(blocks_of(model), kinds, strict=True):
        if kind not in measured:
            x = torch.randn(batch_size, kind.num_prefix_tokens + kind.num_patches, kind.width, device=device)
            with autocast(device, precision):
                measured[kind] = _BlockMeasurement(block, kind, x, token_reduction, repeats, timer).measure()
    return tuple(measured[kind] for kind in kinds)


@dataclass(frozen=True)
class AttentionHalf:
    """The first half of a block, ready to run: attention, and the reduction of tokens where the block has one."""

    block: SlimBlock
    x: Tensor
    """(B, N, C)."""

    def __call__(self) -> Tensor:
        """Runs it once. (B, N', C)."""
        mixed, state = self.block.attend(self.x, None)
        return self.block.reduce(self.x + self.block.ls1(self.block.attn.proj(mixed)), state)[0]


@dataclass(frozen=True)
class MlpHalf:
    """The second half of a block, ready to run."""

    block: SlimBlock
    x: Tensor
    """(B, N, C)."""

    def __call__(self) -> Tensor:
        """Runs it once. (B, N, C)."""
        return self.x + self.block.ls2(self.block.mlp(self.block.norm2(self.x)))


@dataclass(frozen=True)
class _BlockMeasurement:
    """The measurement of one block's allowed widths."""

    block: nn.Module
    """Dense."""
    anatomy: BlockAnatomy
    x: Tensor
    """(B, N, C): the block's input, of the size of the deployment."""
    token_reduction: TokenReduction
    repeats: int
    timer: Timer

    def measure(self) -> AllowedWidths:
        anatomy = self.anatomy
        heads = _timed_widths(anatomy.head_dim, NUM_HEAD_WIDTHS)
        unequal = _timed_widths(anatomy.head_dim, NUM_UNEQUAL_WIDTHS)
        pairs = sorted({(width, width) for width in heads} | set(product(unequal, unequal)))
        if anatomy.has_qk_norm:
            pairs = [(heads[-1], width) for width in heads]
        hidden = _timed_widths(anatomy.num_hidden, NUM_HIDDEN)
        pair_times = self._least_times([self._attention(qk_width=qk, v_width=v) for qk, v in pairs])
        hidden_times = self._least_times([self._mlp(width) for width in hidden])
        return AllowedWidths(
            attention=tuple(pairs[n] for n in faster_than_larger(pairs, pair_times)),
            hidden=tuple(hidden[n] for n in faster_than_larger([(width,) for width in hidden], hidden_times)),
            reduction=self._reduction(pair_times[-1] + hidden_times[-1]),
        )

    def _reduction(self, dense_s: float) -> float:
        """Returns the multiply-adds that take as long as a token reduction, beyond those that are counted for it.

        Args:
            dense_s: seconds that the dense block takes.
        """
        if self.token_reduction == "none":
            return 0.0
        anatomy, dense = self.anatomy, keep_all_block(self.anatomy).shape
        num_left = max(1, int(TOKENS_LEFT * anatomy.num_patches))
        # In one turn, so that what disturbs one disturbs both.
        without_s, with_s = self._least_times([self._attention(), self._attention(num_tokens=num_left)])
        macs = block_macs(anatomy, dense, anatomy.num_patches).total
        counted = reduction_macs(
            anatomy, replace(dense, num_tokens=num_left), anatomy.num_patches, self.token_reduction
        )
        return max(0.0, (with_s - without_s) * macs / dense_s - counted)

    def _attention(self, **widths: int) -> AttentionHalf:
        """Builds the first half at these widths of a `BlockShape`; all others are dense."""
        return AttentionHalf(self._built(replace(keep_all_block(self.anatomy).shape, **widths)), self.x)

    def _mlp(self, num_hidden: int) -> MlpHalf:
        return MlpHalf(self._built(replace(keep_all_block(self.anatomy).shape, num_hidden=num_hidden)), self.x)

    def _built(self, shape: BlockShape) -> SlimBlock:
        """Builds the block with the first units of each kind."""
        anatomy, num_heads = self.anatomy, shape.num_heads
        plan = BlockPlan(
            keep_heads=tuple(range(num_heads)), keep_qk=(tuple(range(shape.qk_width)),) * num_heads,
            keep_v=(tuple(range(shape.v_width)),) * num_heads, keep_hidden=tuple(range(shape.num_hidden)),
            num_tokens=shape.num_tokens,
        )  # fmt: skip
        slim = slim_block(
            self.block, plan, anatomy, num_tokens_in=anatomy.num_patches, token_reduction=self.token_reduction,
            cutoff_token=0.85, is_last=True,
        )  # fmt: skip
        return slim if isinstance(slim, SlimBlock) else as_slim(slim, anatomy, is_last=True)

    def _least_times(self, calls: Sequence[Callable[[], Tensor]]) -> list[float]:
        return _least_times(calls, self.x.device, self.repeats, self.timer)


def _least_times(
    calls: Sequence[Callable[[], Tensor]], device: torch.device, repeats: int, timer: Timer = time_in_turn
) -> list[float]:
    """Returns the seconds of every call, the least of several rounds."""
    return [min(laps) for laps in zip(*timer(calls, device, repeats), strict=True)]


def _timed_widths(most: int, count: int) -> list[int]:
    """Returns at most `count` widths, evenly spread multiples of `GRAIN`, ascending; the dense one is the last."""
    evenly = {round(most * step / count / GRAIN) * GRAIN for step in range(1, count)}
    return [*sorted(width for width in evenly if 0 < width < most), most]


def faster_than_larger(widths: Sequence[tuple[int, ...]], times: Sequence[float]) -> list[int]:
    """Chooses the widths to offer, from the largest down.

    A width is offered if it takes less time, by `MIN_GAIN` at least, than all offered ones that are as large or larger
    in every part. Steps too small to tell add up to one that is not.

    Returns:
        Indices, ascending; that of the largest width is among them.
    """
    offered: list[int] = []
    for index in sorted(range(len(widths)), key=lambda n: -sum(widths[n])):
        larger = [n for n in offered if all(a >= b for a, b in zip(widths[n], widths[index], strict=True))]
        if all(times[index] < (1 - MIN_GAIN) * times[n] for n in larger):
            offered.append(index)
    return sorted(offered)
