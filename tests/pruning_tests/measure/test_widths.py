"""The widths that are offered, against brute force and on devices that take their time by a formula."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise, product
from typing import Any

import pytest
import timm
import torch
from torch import nn

from pruning.measure.widths import (
    AllowedWidths,
    AttentionHalf,
    MlpHalf,
    faster_than_larger,
    measure_allowed_widths,
    multiples,
)
from pruning.model.anatomy import examine
from pruning.plan import TOKEN_REDUCTIONS, TokenReduction
from pruning.precision import Precision
from tests.pruning_tests import builders

Widths = list[tuple[int, ...]]


def squared(widths: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs."""
    return [(one, other) for one in widths for other in widths]


CHAIN: Widths = [(width,) for width in range(8, 129, 8)]
GRID: Widths = [*squared((8, 16, 24, 32))]


# Which widths are faster than all larger ones


def slow_faster(widths: Widths, times: Sequence[float]) -> list[int]:
    """The definition, recursively: a width is offered if no offered one that is larger somewhere and smaller nowhere is
    about as fast."""

    @cache
    def is_offered(index: int) -> bool:
        for other, width in enumerate(widths):
            gaps = [there - here for here, there in zip(widths[index], width, strict=True)]
            if min(gaps) >= 0 and max(gaps) > 0 and times[index] / times[other] >= 0.99 and is_offered(other):
                return False
        return True

    return [index for index in range(len(widths)) if is_offered(index)]


def drawn_times(widths: Widths, kind: str, generator: random.Random) -> list[float]:
    if kind == "ties":
        return [float(generator.randint(1, 4)) for _ in widths]
    if kind == "any":
        return [generator.uniform(1, 2) for _ in widths]
    if kind == "tiles":
        return [float(sum(-(-part // 24) for part in width)) for width in widths]
    even = [0.1 + sum(width) for width in widths]  # noise: a few percent on what would fall evenly
    return [time * generator.uniform(1, 1.06) for time in even]


@pytest.mark.parametrize("widths", [CHAIN, GRID], ids=["chain", "grid"])
@pytest.mark.parametrize("kind", ["ties", "any", "tiles", "noise"])
def test_offered_are_the_widths_that_nothing_larger_is_as_fast_as(widths: Widths, kind: str) -> None:
    for seed in range(5):
        generator = random.Random(seed)
        times = drawn_times(widths, kind, generator)
        expected = slow_faster(widths, times)
        assert faster_than_larger(widths, times) == expected
        order = generator.sample(range(len(widths)), len(widths))  # whatever order they come in
        shuffled = faster_than_larger([widths[n] for n in order], [times[n] for n in order])
        assert sorted(order[n] for n in shuffled) == expected


@pytest.mark.parametrize("widths", [CHAIN, GRID], ids=["chain", "grid"])
@pytest.mark.parametrize("kind", ["ties", "any", "tiles", "noise"])
def test_of_two_offered_widths_the_smaller_is_faster_and_the_dense_one_is_always_there(
    widths: Widths, kind: str
) -> None:
    for seed in range(5):
        times = drawn_times(widths, kind, random.Random(seed))
        kept = faster_than_larger(widths, times)
        assert kept == sorted(kept)
        assert kept[-1] == len(widths) - 1
        for one, other in product(kept, repeat=2):
            if one != other and all(a <= b for a, b in zip(widths[one], widths[other], strict=True)):
                assert times[one] < times[other]


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_of_widths_that_run_in_tiles_the_full_tiles_are_offered(tile: int) -> None:
    times = [float(-(-width // tile)) for (width,) in CHAIN]
    kept = [CHAIN[n][0] for n in faster_than_larger(CHAIN, times)]
    assert kept == list(range(tile, 129, tile))


def test_where_no_width_is_faster_the_dense_one_alone_is_offered() -> None:
    assert faster_than_larger(CHAIN, [1.0] * len(CHAIN)) == [len(CHAIN) - 1]
    assert faster_than_larger(GRID, [1.0] * len(GRID)) == [len(GRID) - 1]
    assert faster_than_larger(CHAIN, [float(-width) for (width,) in CHAIN]) == [len(CHAIN) - 1]
    assert faster_than_larger(CHAIN, [float(width) for (width,) in CHAIN]) == list(range(len(CHAIN)))


def test_a_width_that_is_slower_than_a_larger_one_hides_nothing_below_it() -> None:
    widths: Widths = [(8,), (16,), (24,), (32,)]
    assert faster_than_larger(widths, [1.0, 5.0, 2.0, 3.0]) == [0, 2, 3]


def test_a_gain_of_less_than_a_hundredth_is_none() -> None:
    widths: Widths = [(8,), (16,), (24,), (32,)]
    assert faster_than_larger(widths, [0.995, 0.996, 0.997, 1.0]) == [3]
    assert faster_than_larger(widths, [0.98, 0.985, 0.995, 1.0]) == [1, 3]
    assert faster_than_larger(widths, [0.95, 0.965, 0.98, 1.0]) == [0, 1, 2, 3]


def test_pairs_that_are_padded_to_the_wider_of_both_are_offered_only_equal() -> None:
    times = [float(max(pair)) for pair in GRID]
    assert [GRID[n] for n in faster_than_larger(GRID, times)] == [(8, 8), (16, 16), (24, 24), (32, 32)]


def test_steps_too_small_to_tell_add_up_to_widths_that_are_offered() -> None:
    widths = [(8 * n,) for n in range(1, 33)]
    times = [0.75 + 0.25 * n / 32 for n in range(1, 33)]  # a step is worth 0.8 % at most
    offered = [times[n] for n in faster_than_larger(widths, times)]
    assert len(offered) >= 14 and offered[0] <= times[1]
    assert all(0.97 < small / large < 0.99 for small, large in pairwise(offered))


# Rounding up


def test_any_width_is_a_multiple_of_one() -> None:
    anatomy = builders.anatomy().blocks[0]
    everything = multiples(anatomy, 1)
    assert set(everything.attention) == set(squared(range(1, 9)))
    assert everything.hidden == tuple(range(1, 97))
    assert everything.reduction == 0.0


@pytest.mark.parametrize("round_to", [2, 3, 5, 8, 12, 96, 97, 1000])
def test_multiples_are_all_that_divide_and_the_dense_width_however_large_the_step(round_to: int) -> None:
    block = builders.anatomy().blocks[0]
    head = {width for width in range(1, 9) if width % round_to == 0 or width == 8}
    hidden = [width for width in range(1, 97) if width % round_to == 0 or width == 96]
    allowed = multiples(block, round_to)
    assert set(allowed.attention) == set(squared(sorted(head)))
    assert len(allowed.attention) == len(head) ** 2
    assert list(allowed.hidden) == hidden
    if round_to > 96:
        assert allowed == AllowedWidths(attention=((8, 8),), hidden=(96,))


@pytest.mark.parametrize("round_to", [1, 2, 3, 8, 50])
def test_multiples_leave_normalised_queries_and_keys_whole(round_to: int) -> None:
    plain, normed = (multiples(builders.anatomy(family).blocks[0], round_to) for family in ("vit", "qk_norm"))
    assert set(normed.attention) == {pair for pair in plain.attention if pair[0] == 8}
    assert normed.hidden == plain.hidden


@pytest.mark.parametrize("seed", range(6))
def test_asked_widths_are_rounded_to_the_smallest_that_have_as_much(seed: int) -> None:
    drawn = builders.allowed_widths(seed)
    for qk, v in squared(range(1, 9)):
        got = drawn.least_attention(qk, v)
        fits = [pair for pair in drawn.attention if min(pair[0] - qk, pair[1] - v) >= 0]
        assert got in fits
        assert got[0] + got[1] == min(one + other for one, other in fits)
        assert got == drawn.least_attention(*got) or (qk, v) != got
    for width in range(1, 97):
        assert drawn.least_hidden(width) == min(hidden for hidden in drawn.hidden if hidden >= width)


# A device whose times are ours


ROUNDS = 7


class Device:
    """A timer by formulas: attention and MLP take their time by their widths, a reduction of tokens by itself."""

    def __init__(
        self, attention: Callable[[int, int], float], mlp: Callable[[int], float], reduction: float = 0.0
    ) -> None:
        self.attention, self.mlp, self.reduction = attention, mlp, reduction
        self.num_laps = 0
        self.num_tokens: set[int] = set()
        """Tokens that were there after a reduction."""

    def __call__(
        self, calls: Sequence[Callable[[], object]], device: torch.device, num_rounds: int
    ) -> list[list[float]]:
        return [[self.seconds(call) for call in calls] for _ in range(num_rounds)]

    def seconds(self, call: Any) -> float:
        self.num_laps += 1
        disturbed = 1 + self.num_laps % 7  # only every seventh lap is as fast as it can be
        if isinstance(call, MlpHalf):
            return self.mlp(call.block.mlp.fc1.out_features) * disturbed
        assert isinstance(call, AttentionHalf)
        seconds = self.attention(call.block.attn.qk_width, call.block.attn.v_width) * disturbed
        if call.block.reducer is None:
            return seconds
        self.num_tokens.add(call().shape[1])
        return seconds + self.reduction


def measured(
    model: nn.Module, device: Device, *, batch_size: int = 2, kind: TokenReduction = "none"
) -> tuple[AllowedWidths, ...]:
    return measure_allowed_widths(model, batch_size, token_reduction=kind, repeats=ROUNDS, timer=device)


def wide_model(**args: Any) -> nn.Module:
    """Two heads of 32 and 256 hidden units; 16 patches and a class token."""
    return builders.model(embed_dim=64, num_heads=2, **args)


def tiles(width: int, tile: int) -> int:
    return -(-width // tile)


def padded(qk: int, v: int) -> float:
    return float(tiles(max(qk, v), 16))


def in_tiles_of_64(hidden: int) -> float:
    return float(tiles(hidden, 64))


def test_a_device_that_pads_heads_and_runs_in_tiles_is_offered_equal_pairs_and_full_tiles() -> None:
    allowed = measured(wide_model(), Device(padded, in_tiles_of_64))
    assert allowed == (AllowedWidths(attention=((16, 16), (32, 32)), hidden=(64, 128, 192, 256)),) * 3


def test_a_device_to_which_each_width_counts_is_offered_all_that_are_timed() -> None:
    (allowed, *_) = measured(wide_model(), Device(lambda qk, v: float(2 * qk + v), float))
    assert set(allowed.attention) == set(squared((8, 16, 24, 32)))
    assert allowed.hidden == tuple(range(16, 257, 16))


def test_a_device_to_which_no_width_counts_is_offered_the_dense_ones() -> None:
    allowed = measured(wide_model(), Device(lambda qk, v: 1.0, lambda hidden: 1.0))
    assert allowed == (AllowedWidths(attention=((32, 32),), hidden=(256,)),) * 3


def test_normalised_queries_and_keys_are_timed_whole() -> None:
    (allowed, *_) = measured(wide_model(qk_norm=True), Device(lambda qk, v: float(qk + v), float))
    assert set(allowed.attention) == {(32, v) for v in (8, 16, 24, 32)}


@pytest.mark.parametrize(("heads", "hidden_ratio", "most"), [(1, 1.0, 64), (4, 0.125, 8), (8, 4.0, 256), (2, 1.6, 102)])
def test_widths_that_are_few_or_no_multiples_of_eight_have_the_dense_one_at_the_end(
    heads: int, hidden_ratio: float, most: int
) -> None:
    model = builders.model(embed_dim=64, num_heads=heads, mlp_ratio=hidden_ratio)
    (allowed, *_) = measured(model, Device(lambda qk, v: float(qk + v), float), batch_size=1)
    head = 64 // heads
    grain = max(8, round(most / 16 / 8) * 8)
    assert allowed.hidden == (*range(grain, most, grain), most)
    equal = {(width, width) for width in (*range(8, head, 8), head)}
    assert set(allowed.attention) == equal | set(squared((*range(grain_of(head), head, grain_of(head)), head)))


def grain_of(head: int) -> int:
    """The step of the widths in all pairs: at most four widths."""
    return max(8, round(head / 4 / 8) * 8)


def matched_pairs(patches: int, left: int, width: int) -> int:
    """Multiply-adds of matching tokens until so many are left: even places against odd ones, half go at most."""
    total = 0
    while patches > left:
        total += (patches // 2) * (patches - patches // 2) * width
        patches = max(left, patches - patches // 2)
    return total


@pytest.mark.parametrize("kind", TOKEN_REDUCTIONS)
def test_the_time_of_a_reduction_is_told_in_multiply_adds_beyond_those_that_are_counted(kind: TokenReduction) -> None:
    device = Device(padded, in_tiles_of_64, reduction=0.75)
    (allowed, *_) = measured(wide_model(), device, kind=kind)
    tokens, width = 17, 64
    block = 2 * (32 + 32) * tokens * (2 * width + tokens) + 2 * tokens * width * 256
    a_second = block / (2.0 + 4.0)  # two tiles of a head, four of hidden units
    counted = (16 * 16 * width if kind.startswith("lfe") else 0) + (matched_pairs(16, 12, 32) if "merge" in kind else 0)
    counted += 15 * 16 * 32 if kind == "quickshift" else 0
    assert device.num_tokens == {1 + 12}  # three quarters of the patches
    assert allowed.reduction == pytest.approx(0.75 * a_second - counted, rel=1e-9)
    assert allowed.reduction > 0


@pytest.mark.parametrize("kind", ["lfe", "merge"])
def test_a_reduction_that_takes_no_longer_than_is_counted_costs_nothing_more(kind: TokenReduction) -> None:
    allowed = measured(wide_model(), Device(padded, in_tiles_of_64, reduction=1e-4), kind=kind)
    assert {allowed.reduction for allowed in allowed} == {0.0}


def test_equal_blocks_are_timed_once() -> None:
    device = Device(padded, in_tiles_of_64)
    for number, depth in enumerate((1, 3), start=1):
        allowed = measured(wide_model(depth=depth), device, batch_size=1)
        assert allowed == (allowed[0],) * depth
        # Four widths of queries and of values, 16 of hidden units.
        assert device.num_laps == number * ROUNDS * (4 * 4 + 16)


def test_of_wide_heads_equal_pairs_are_timed_in_small_steps_and_all_pairs_in_large_ones() -> None:
    model = builders.model(embed_dim=64, num_heads=1)
    (allowed, *_) = measured(model, Device(lambda qk, v: float(2 * qk + v), float))
    equal = {(width, width) for width in range(8, 65, 8)}
    assert set(allowed.attention) == equal | set(squared((16, 32, 48, 64)))
    (normed, *_) = measured(builders.model("qk_norm", embed_dim=64, num_heads=1), Device(lambda qk, v: float(v), float))
    assert set(normed.attention) == {(64, v) for v in range(8, 65, 8)}


def swin(**args: Any) -> nn.Module:
    """Two stages of two blocks: widths 32 and 64, heads of 16, hidden 128 and 256."""
    small: dict[str, Any] = {"img_size": 16, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
    named = timm.create_model("swin_tiny_patch4_window7_224", **small, window_size=4, num_classes=7, **args)
    return builders.randomised(named)


def test_the_blocks_of_a_stage_share_their_widths_and_another_stage_another() -> None:
    allowed = measured(swin(), Device(lambda qk, v: float(qk + v), in_tiles_of_64))
    pairs = tuple(squared((8, 16)))
    assert allowed[:2] == (AllowedWidths(attention=pairs, hidden=(64, 128)),) * 2
    assert allowed[2:] == (AllowedWidths(attention=pairs, hidden=(64, 128, 192, 256)),) * 2


@pytest.mark.parametrize(
    ("family", "precision", "learns"),
    builders.every_pair(["vit", "distilled", "qk_norm", "layer_scale", "swin"], ["float32", "bfloat16"], [True, False]),
)
def test_a_model_is_left_as_it_was(family: str, precision: Precision, learns: bool) -> None:
    model = (swin() if family == "swin" else builders.model(family)).requires_grad_(learns).train(learns)
    before, modes = builders.state(model), [module.training for module in model.modules()]
    kind: TokenReduction = "none" if family == "swin" else "attention-merge"
    allowed = measure_allowed_widths(model, 2, token_reduction=kind, precision=precision, repeats=1)
    assert len(allowed) == examine(model).depth
    assert builders.same_state(model, before)
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.requires_grad == learns and parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("family", "kind"),
    builders.in_rotation(
        ["vit", "average_pooling", "registers", "distilled", "qk_norm", "no_qkv_bias"], ["none", *TOKEN_REDUCTIONS], 2
    ),
)
def test_what_this_machine_is_faster_with_has_the_form_of_allowed_widths(family: str, kind: TokenReduction) -> None:
    model = builders.model(family, embed_dim=48)  # heads of 16, 192 hidden units
    dense = examine(model).blocks[0]
    allowed = measure_allowed_widths(model, 2, token_reduction=kind, repeats=2)
    assert allowed == (allowed[0],) * 3
    (pairs, hidden, reduction) = allowed[0].attention, allowed[0].hidden, allowed[0].reduction
    assert (dense.head_dim, dense.head_dim) in pairs and len(set(pairs)) == len(pairs)
    assert set(pairs) <= set(product((16,) if family == "qk_norm" else (8, 16), (8, 16)))
    assert hidden[-1] == dense.num_hidden == 192
    assert all(a < b for a, b in pairwise(hidden)) and all(width % 8 == 0 for width in hidden)
    assert reduction >= 0 and (kind != "none" or reduction == 0)
