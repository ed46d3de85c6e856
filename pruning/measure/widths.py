"""What this device makes of widths: which of them are faster than all larger ones.

A kernel works in tiles, so a few units less often take as long as before, or longer; and queries, keys and values of
unequal width are padded to one. `round_to: auto` therefore measures a block at many widths and offers only those that
buy time, and counts the time that choosing tokens takes.

B images, N tokens, C model width, H heads, D head width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pruning.measure.cost import block_macs, reduction_macs
from pruning.model.anatomy import BlockAnatomy, blocks_of, examine
from pruning.model.layers import SlimBlock
from pruning.model.surgery import as_slim, keep_all_block, slim_block
from pruning.plan import BlockPlan, BlockShape, TokenReduction
from pruning.precision import Precision, autocast, synchronize

MIN_GAIN = 0.01
"""A width is offered if its half of the block takes less time than with any larger one that is, by this share."""

NUM_HIDDEN, NUM_HEAD_WIDTHS = 32, 8
"""Widths that are timed, at most: evenly spread multiples of `GRAIN`."""

GRAIN = 8

TOKENS_LEFT = 0.75
"""Share of the patches that stay where a token reduction is timed."""


@dataclass(frozen=True, kw_only=True)
class AllowedWidths:
    """The widths that one block may be given."""

    attention: tuple[tuple[int, int], ...]
    """Query/key and value width a head; the dense pair among them."""
    hidden: tuple[int, ...]
    """Ascending, the dense width last."""
    reduction: float = 0.0
    """Multiply-adds that take as long as a reduction of tokens does, beyond those that are counted for it."""

    def least_attention(self, qk_width: int, v_width: int) -> tuple[int, int]:
        """The smallest pair that has at least these widths."""
        return min((pair for pair in self.attention if pair[0] >= qk_width and pair[1] >= v_width), key=sum)

    def least_hidden(self, width: int) -> int:
        """The smallest width that is at least this."""
        return next(each for each in self.hidden if each >= width)


def multiples(anatomy: BlockAnatomy, round_to: int) -> AllowedWidths:
    """All multiples of a number, and the dense widths: for any device, nothing measured."""
    head = _multiples(anatomy.head_dim, round_to)
    pairs = tuple((qk, v) for qk in (head[-1:] if anatomy.has_qk_norm else head) for v in head)
    return AllowedWidths(attention=pairs, hidden=_multiples(anatomy.num_hidden, round_to))


def _multiples(most: int, step: int) -> tuple[int, ...]:
    return (*range(step, most, step), most)


@torch.inference_mode()
def measure_allowed_widths(
    model: nn.Module, batch_size: int, *, token_reduction: TokenReduction, precision: Precision = "float32",
    repeats: int = 5,
) -> tuple[AllowedWidths, ...]:  # fmt: skip
    """The allowed widths of every block of a dense model, on its device; blocks of equal anatomy are timed once.

    Args:
        batch_size: of the deployment.
        repeats: the least time of so many counts.
    """
    anatomy, device = examine(model), next(model.parameters()).device
    known: dict[BlockAnatomy, AllowedWidths] = {}
    kinds = [replace(each, entry_macs=0) for each in anatomy.blocks]  # the patch merging before it is not timed
    for block, kind in zip(blocks_of(model), kinds, strict=True):
        if kind not in known:
            with autocast(device, precision):
                known[kind] = _measure(block, kind, batch_size, token_reduction, repeats)
    return tuple(known[kind] for kind in kinds)


def _measure(
    block: nn.Module, anatomy: BlockAnatomy, batch_size: int, token_reduction: TokenReduction, repeats: int
) -> AllowedWidths:
    patches, dense = anatomy.num_patches, keep_all_block(anatomy).shape
    x = torch.randn(
        batch_size, anatomy.num_prefix_tokens + patches, anatomy.width, device=next(block.parameters()).device
    )

    def attend(qk: int, v: int, num_tokens: int = patches) -> Callable[[], Tensor]:
        made = _built(block, anatomy, replace(dense, qk_width=qk, v_width=v, num_tokens=num_tokens), token_reduction)

        def run() -> Tensor:
            mixed, clues = made.attend(x, None)
            return made.reduce(x + made.ls1(made.attn.proj(mixed)), clues)[0]

        return run

    def feed(hidden: int) -> Callable[[], Tensor]:
        made = _built(block, anatomy, replace(dense, num_hidden=hidden), token_reduction)
        return lambda: x + made.ls2(made.mlp(made.norm2(x)))

    heads = _timed_widths(anatomy.head_dim, NUM_HEAD_WIDTHS)
    pairs = [(qk, v) for qk in (heads[-1:] if anatomy.has_qk_norm else heads) for v in heads]
    hidden = _timed_widths(anatomy.num_hidden, NUM_HIDDEN)
    pair_times = _least_times([attend(*pair) for pair in pairs], x.device, repeats)
    hidden_times = _least_times([feed(each) for each in hidden], x.device, repeats)
    reduction = 0.0
    if token_reduction != "none":
        left = max(1, int(TOKENS_LEFT * patches))
        whole_time, time_with_it = _least_times(
            [attend(*pairs[-1]), attend(*pairs[-1], left)], x.device, repeats
        )  # in one turn, so that what disturbs one disturbs both
        macs = block_macs(anatomy, dense, patches).total
        counted = reduction_macs(anatomy, replace(dense, num_tokens=left), patches, token_reduction)
        reduction = max(0.0, (time_with_it - whole_time) * macs / (pair_times[-1] + hidden_times[-1]) - counted)
    return AllowedWidths(
        attention=tuple(pairs[n] for n in faster_than_larger(pairs, pair_times)),
        hidden=tuple(hidden[n] for n in faster_than_larger([(each,) for each in hidden], hidden_times)),
        reduction=reduction,
    )


def _built(block: nn.Module, anatomy: BlockAnatomy, shape: BlockShape, token_reduction: TokenReduction) -> SlimBlock:
    """The block with the first units of each kind."""
    heads = shape.num_heads
    plan = BlockPlan(
        keep_heads=tuple(range(heads)), keep_qk=(tuple(range(shape.qk_width)),) * heads,
        keep_v=(tuple(range(shape.v_width)),) * heads, keep_hidden=tuple(range(shape.num_hidden)),
        num_tokens=shape.num_tokens,
    )  # fmt: skip
    made = slim_block(
        block, plan, anatomy, num_tokens_in=anatomy.num_patches, token_reduction=token_reduction, cutoff_token=0.85,
        is_last=True,
    )  # fmt: skip
    return made if isinstance(made, SlimBlock) else as_slim(made, anatomy, is_last=True)


def _timed_widths(most: int, count: int) -> list[int]:
    """At most `count` widths, evenly spread multiples of `GRAIN`, ascending; the dense one is the last."""
    evenly = {round(most * step / count / GRAIN) * GRAIN for step in range(1, count)}
    return [*sorted(width for width in evenly if 0 < width < most), most]


def faster_than_larger(widths: Sequence[tuple[int, ...]], times: Sequence[float]) -> list[int]:
    """Which widths to offer: from the largest down, those that take less time than all offered ones that are at least
    as large in every part, by `MIN_GAIN` at least. Steps too small to tell add up to one that is not.

    Returns:
        Indices, ascending; that of the largest width is among them.
    """
    offered: list[int] = []
    for index in sorted(range(len(widths)), key=lambda n: -sum(widths[n])):
        larger = [n for n in offered if all(a >= b for a, b in zip(widths[n], widths[index], strict=True))]
        if all(times[index] < (1 - MIN_GAIN) * times[n] for n in larger):
            offered.append(index)
    return sorted(offered)


def _least_times(calls: Sequence[Callable[[], Tensor]], device: torch.device, repeats: int) -> list[float]:
    """Seconds of every call: the least of several turns, after one to warm up."""
    least = [float("inf")] * len(calls)
    for repeat in range(repeats + 1):
        for index, call in enumerate(calls):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if repeat > 0:
                least[index] = min(least[index], time.perf_counter() - start)
    return least
