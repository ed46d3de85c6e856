"""The cascade's own account against models that are built and measured from outside."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import nn

from pruning.data import Images
from pruning.errors import SettingError
from pruning.measure.accuracy import predict
from pruning.measure.cost import count_macs
from pruning.measure.widths import multiples
from pruning.methods.cascade import CascadeResult, CascadeSettings, CascadeState, cascade
from pruning.methods.prefix_cache import PrefixCache, Threshold
from pruning.model.anatomy import blocks_of, embed, examine, with_blocks
from pruning.model.surgery import apply_plan, keep_all_block, keep_all_plan
from pruning.model.tokens import merges
from pruning.plan import TOKEN_REDUCTIONS, Plan, TokenReduction
from pruning.repair.compensation import repaired_model
from pruning.repair.flow import DenseStream
from pruning.repair.sensitivity import measure_sensitivity
from pruning.scores import lfs
from pruning.scores.channel import ScoringInput
from pruning.scores.criteria import CRITERIA
from pruning.spectrum import low_pass
from tests.pruning_tests import builders

PROBE, CALIBRATION = builders.toy_images(90, seed=11), builders.toy_images(40, seed=12)


def settings(*budgets: float, **other: Any) -> CascadeSettings:
    common: dict[str, Any] = {"target_macs": 0, "num_levels": 7, "batch_size": 32}
    return CascadeSettings(drop_budget=budgets, **common | other)


def num_correct(model: nn.Module, images: Images = PROBE) -> int:
    return int((predict(model, images).argmax(dim=1) == images.labels).sum())


@functools.cache
def pruned(family: str, budgets: tuple[float, ...], token_share: float = 0.5) -> CascadeResult:
    return cascade(
        builders.toy_model(family),
        PROBE,
        CALIBRATION,
        settings(*budgets, token_share=token_share, cutoff_token=0.5),
    )


@functools.cache
def plainly_pruned() -> CascadeResult:
    return cascade(builders.toy_model(), PROBE, CALIBRATION, settings(5, 3, 5))


def same(one: CascadeResult, other: CascadeResult) -> bool:
    first, second = ((result.plan, result.block_drops, result.forward_passes, result.notes) for result in (one, other))
    return first == second and builders.same_state(one.model, builders.state(other.model))


BUDGETS = [(3.0, 2.0, 4.0), (0.0, 0.0, 0.0), (20.0, 0.0, 10.0), (100.0, 100.0, 100.0)]

DROPPING: list[TokenReduction] = [kind for kind in TOKEN_REDUCTIONS if not merges(kind)]
MERGING: list[TokenReduction] = [kind for kind in TOKEN_REDUCTIONS if merges(kind)]

CASES = [
    *(("vit", budgets) for budgets in BUDGETS),
    ("distilled", BUDGETS[0]),
    ("average_pooling", BUDGETS[2]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "budgets"), CASES)
def test_every_blocks_drop_is_within_its_budget_and_is_what_partial_models_lose(
    family: str, budgets: tuple[float, ...]
) -> None:
    model, result = builders.toy_model(family), pruned(family, budgets)
    built, dense = list(blocks_of(result.model)), list(blocks_of(model))
    # At block b, b + 1 blocks are pruned; the later ones are dense and take the tokens that are left.
    counts = [num_correct(with_blocks(model, [*built[:done], *dense[done:]])) for done in range(4)]
    for before, after, drop, budget in zip(counts, counts[1:], result.block_drops, budgets, strict=False):
        assert drop == pytest.approx((before - after) / len(PROBE) * 100)
        assert drop <= budget + 1e-9
    assert num_correct(result.model) == counts[-1]


@pytest.mark.parametrize("budgets", BUDGETS[1:])
def test_a_budget_prunes_something_and_a_larger_one_prunes_more(budgets: tuple[float, ...]) -> None:
    anatomy = builders.anatomy(num_classes=4)
    macs = count_macs(anatomy, pruned("vit", budgets).plan)
    assert macs < count_macs(anatomy, keep_all_plan(anatomy))
    assert macs >= count_macs(anatomy, pruned("vit", (100.0, 100.0, 100.0)).plan)
    assert macs <= count_macs(anatomy, pruned("vit", (0.0, 0.0, 0.0)).plan)


@pytest.mark.parametrize(("family", "budgets"), CASES)
def test_tokens_never_grow_and_the_plan_is_of_the_models_shape(family: str, budgets: tuple[float, ...]) -> None:
    model, result = builders.toy_model(family), pruned(family, budgets)
    counts = [block.num_tokens for block in result.plan.blocks]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    shapes = {name: tensor.shape for name, tensor in result.model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in apply_plan(model, result.plan).state_dict().items()}
    assert result.plan.cutoff_token == 0.5


@pytest.mark.parametrize(("family", "budgets"), CASES)
def test_plan_and_calibration_images_give_the_cascades_model_again(family: str, budgets: tuple[float, ...]) -> None:
    result = pruned(family, budgets)
    again = repaired_model(builders.toy_model(family), result.plan, CALIBRATION, batch_size=32).model
    assert builders.same_state(again, builders.state(result.model))


@pytest.mark.parametrize("target_macs", [0, 10**9])
def test_the_model_is_left_as_it_was_and_shares_no_memory(target_macs: int) -> None:
    model = builders.toy_model()
    before = builders.state(model)
    result = cascade(model, PROBE, CALIBRATION, settings(10, 0, 10, target_macs=target_macs))
    assert builders.same_state(model, before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.fill_(3)
    assert builders.same_state(model, before)


def test_the_same_input_gives_the_same_result() -> None:
    assert same(plainly_pruned(), cascade(builders.toy_model(), PROBE, CALIBRATION, settings(5, 3, 5)))


def test_the_batch_size_changes_nothing() -> None:
    one, other = (
        cascade(builders.toy_model(), PROBE, CALIBRATION, settings(5, 3, 5, batch_size=size)) for size in (90, 8)
    )
    assert one.block_drops == other.block_drops and one.plan.shape_hash == other.plan.shape_hash


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_a_target_that_the_dense_model_meets_leaves_it_bit_equal_and_costs_nothing(family: str) -> None:
    model = builders.model(family)
    anatomy = examine(model)
    dense = count_macs(anatomy, keep_all_plan(anatomy))
    images = builders.images(8)
    result = cascade(model, images, images, settings(0, 0, 0, target_macs=dense, cutoff_token=0.85))
    assert result.plan == keep_all_plan(anatomy)
    assert torch.equal(result.model(builders.batch()), model(builders.batch()))
    assert (result.block_drops, result.forward_passes) == ((0.0, 0.0, 0.0), 0.0)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.45])
def test_tokens_alone_stop_at_the_first_count_that_meets_the_target(share: float) -> None:
    model = builders.model(num_classes=4)
    anatomy = examine(model)
    target = int(share * count_macs(anatomy, keep_all_plan(anatomy)))
    result = cascade(model, PROBE, CALIBRATION, settings(100, 100, 100, target_macs=target, token_share=1.0))
    fits = [
        n
        for n in range(1, 17)
        if count_macs(anatomy, Plan(blocks=(keep_all_block(anatomy.blocks[0], n),) * 3)) <= target
    ]
    assert result.plan.blocks == (keep_all_block(anatomy.blocks[0], max(fits)),) * 3
    assert count_macs(anatomy, result.plan) <= target


@pytest.mark.parametrize("share", [0.95, 0.7, 0.4, 0.2])
def test_channels_meet_a_target_and_hardly_go_beyond_it(share: float) -> None:
    model = builders.model(patch_size=32, num_classes=4)  # a single patch, which cannot go
    anatomy = examine(model)
    fixed = 24 * 3 * 32 * 32 + 24 * 4  # patch embedding and classifier: nothing there can go
    blocks = count_macs(anatomy, keep_all_plan(anatomy)) - fixed
    target = fixed + int(share * blocks)
    result = cascade(model, PROBE, CALIBRATION, settings(100, 100, 100, target_macs=target))
    assert share - 0.03 < (count_macs(anatomy, result.plan) - fixed) / blocks <= share
    # Blocks after the one that met the target are dense.
    is_pruned = [block != keep_all_block(anatomy.blocks[0]) for block in result.plan.blocks]
    assert is_pruned == sorted(is_pruned, reverse=True)


def test_a_target_out_of_reach_is_missed_without_an_error() -> None:
    result = pruned("vit", (0.0, 0.0, 0.0))
    assert count_macs(examine(builders.toy_model()), result.plan) > 0
    assert all(drop <= 0 for drop in result.block_drops)


@pytest.mark.parametrize("token_share", [0.0, 1.0])
def test_tokens_spend_at_most_their_share_of_the_budget(token_share: float) -> None:
    model, result = builders.toy_model(), pruned("vit", (10.0, 0.0, 0.0), token_share)
    first = keep_all_block(examine(model).blocks[0], result.plan.blocks[0].num_tokens)
    plan = Plan(blocks=(first,) * 3, cutoff_token=0.5)
    tokens_only = repaired_model(model, plan, CALIBRATION, batch_size=32).model
    assert num_correct(model) - num_correct(tokens_only) <= math.floor(token_share * 0.1 * len(PROBE) + 1e-9)


def test_a_larger_share_drops_more_tokens() -> None:
    some, all_of_it = (pruned("vit", (10.0, 0.0, 0.0), share).plan.blocks[0].num_tokens for share in (0.0, 1.0))
    assert all_of_it < some


def test_forward_passes_are_counted_as_by_hand() -> None:
    # One level, and any loss is within budget: one probe a block, of all images.
    model = builders.toy_model(depth=2)
    counted = settings(100, 100, num_levels=1, target_macs=1, token_reduction="none")
    result = cascade(model, PROBE, CALIBRATION, counted)
    probe, calibration = len(PROBE), len(CALIBRATION)
    blocks_run = (
        2 * 3 * calibration  # sensitivity, forward and backward
        + 2 * calibration + 2 * probe  # the dense model for its stream, and for its accuracy
        + (3 + 2) * calibration + 1.5 * calibration + 2 * probe  # block 0: gradients, repair, probe
        + 2 * calibration  # on to block 1: as pruned, and low-pass filtered; the probe has run the others
        + 3 * calibration + 1.5 * calibration + probe  # block 1, with no later one
        + 2 * calibration
    )  # fmt: skip
    assert result.forward_passes == pytest.approx(blocks_run / (2 * probe))


def test_with_what_is_known_of_the_dense_model_a_cascade_costs_less() -> None:
    model = builders.toy_model()
    alone = cascade(model, PROBE, CALIBRATION, settings(5, 3, 5))
    sensitivity = measure_sensitivity(model, CALIBRATION, batch_size=32)
    dense = DenseStream(model, CALIBRATION, batch_size=32)
    known = cascade(model, PROBE, CALIBRATION, settings(5, 3, 5), sensitivity=sensitivity, dense=dense)
    assert known.plan == alone.plan and builders.same_state(known.model, builders.state(alone.model))
    assert alone.forward_passes - known.forward_passes == pytest.approx(4 * len(CALIBRATION) / len(PROBE))


@pytest.mark.parametrize("alpha", [0.6, 0.0])
def test_each_block_drops_the_channels_of_least_score_on_filtered_images(alpha: float) -> None:
    model = builders.toy_model(patch_size=32, num_heads=1)  # one patch, one head: nothing but channels, nothing rounded
    result = cascade(model, PROBE, CALIBRATION, settings(2, 2, 1, cutoff_channel=0.3, alpha=alpha))
    (pixels, labels), *_ = CALIBRATION.batches(len(CALIBRATION))
    with torch.no_grad():
        x, low = embed(model, pixels), embed(model, low_pass(pixels, 0.3))
    for index, plan in enumerate(result.plan.blocks):
        dense = list(blocks_of(model)[index:])
        with torch.no_grad():
            x = dense[0](x)
        scoring_input = ScoringInput(
            model=model, anatomy=examine(model).blocks[index], index=index, blocks=dense, x=x, x_low=low,
            targets=x[:, 0], labels=labels, alpha=alpha, batch_size=64, precision="float32", seed=0,
            repair=None,  # type: ignore[arg-type]  # LFS does not look at it
        )  # fmt: skip
        scores = lfs.score(scoring_input)
        for kind in (scores.qk[0], scores.v[0], scores.hidden):
            kind[kind.argmax()] = torch.inf  # the best of each kind always stays
        # By what each saves: 2 tokens, width 24.
        macs = torch.tensor([2 * 2 * 24 + 2**2] * 48 + [2 * 2 * 24] * 96)
        everything = torch.cat([scores.qk[0], scores.v[0], scores.hidden]) / macs
        kept = [*plan.keep_qk[0], *(24 + v for v in plan.keep_v[0]), *(48 + unit for unit in plan.keep_hidden)]
        assert 3 < len(kept) < len(everything)
        assert sorted(kept) == sorted(everything.topk(len(kept)).indices.tolist())
        with torch.no_grad():
            low = blocks_of(result.model)[index](low)


@pytest.mark.parametrize(
    "budgets",
    [(), (1.0, 1.0), (1.0,) * 4, (1.0, -0.1, 1.0), (1.0, float("nan"), 1.0), (1.0, float("inf"), 1.0)],
)
def test_budgets_that_are_not_one_a_block_and_at_least_zero_are_refused(budgets: tuple[float, ...]) -> None:
    with pytest.raises(SettingError, match="for 3 blocks; give one of at least 0 for each"):
        cascade(builders.model(), PROBE, CALIBRATION, settings(*budgets))


@pytest.mark.parametrize(
    ("criterion", "token_reduction"),
    [  # every criterion and every reduction, each with another
        *((criterion, kind) for criterion, kind in zip(CRITERIA, cycle([*MERGING, *DROPPING]), strict=False)),
        ("obs", "lfe"),
    ],
)
def test_every_criterion_and_token_reduction_keeps_to_its_budgets(
    criterion: str, token_reduction: TokenReduction
) -> None:
    model, budgets = builders.toy_model(), (6.0, 0.0, 12.0)
    allowed_widths = tuple(multiples(block, 2) for block in examine(model).blocks)
    result = cascade(
        model, PROBE, CALIBRATION,
        settings(
            *budgets, criterion=criterion, token_reduction=token_reduction, allowed_widths=allowed_widths, num_levels=4
        ),
    )  # fmt: skip
    assert all(drop <= budget + 1e-9 for drop, budget in zip(result.block_drops, budgets, strict=True))
    assert num_correct(model) - num_correct(result.model) == round(sum(result.block_drops) * len(PROBE) / 100)
    assert result.plan.token_reduction == token_reduction
    assert all(block.shape.num_hidden % 2 == block.shape.qk_width % 2 == 0 for block in result.plan.blocks)
    again = repaired_model(builders.toy_model(), result.plan, CALIBRATION, batch_size=32).model
    assert builders.same_state(again, builders.state(result.model))


def test_a_criterion_that_is_not_known_is_refused() -> None:
    with pytest.raises(SettingError, match="no channel criterion 'best'; there are lfs, taylor"):
        cascade(builders.toy_model(), PROBE, CALIBRATION, settings(1, 1, 1, criterion="best"))


def pruned_top_down(*budgets: float, model: nn.Module | None = None, **other: Any) -> CascadeResult:
    given = settings(*budgets, order="top-down", token_reduction="none", **other)
    return cascade(builders.toy_model() if model is None else model, PROBE, CALIBRATION, given)


def test_top_down_keeps_to_its_budgets() -> None:
    budgets = (6.0, 0.0, 12.0)
    result = pruned_top_down(*budgets, criterion="taylor")
    assert all(drop <= budget + 1e-9 for drop, budget in zip(result.block_drops, budgets, strict=True))
    assert any(block != keep_all_block(examine(builders.toy_model()).blocks[0]) for block in result.plan.blocks)


def test_top_down_drops_are_what_the_last_block_alone_costs() -> None:
    # Pruned alone, the last block has dense ones before it: the final repair gives the model that was probed.
    result = pruned_top_down(0.0, 0.0, 30.0)
    anatomy = examine(builders.toy_model())
    last = Plan(blocks=(*map(keep_all_block, anatomy.blocks[:2]), result.plan.blocks[2]), token_reduction="none")
    alone = repaired_model(builders.toy_model(), last, CALIBRATION, batch_size=32).model
    assert last.blocks[2] != keep_all_block(anatomy.blocks[2])
    assert result.block_drops[2] == pytest.approx((num_correct(builders.toy_model()) - num_correct(alone)) / 0.9)


def test_top_down_leaves_the_first_blocks_dense_once_the_target_is_met() -> None:
    anatomy = examine(builders.toy_model())
    target = int(0.85 * count_macs(anatomy, keep_all_plan(anatomy)))
    result = pruned_top_down(100.0, 100.0, 100.0, target_macs=target)
    assert count_macs(anatomy, result.plan) <= target
    is_pruned = [block != keep_all_block(anatomy.blocks[0]) for block in result.plan.blocks]
    assert is_pruned == [False, False, True]


def test_both_orders_prune_a_single_block_alike() -> None:
    model = builders.model(num_classes=4, depth=1)
    bottom_up = cascade(model, PROBE, CALIBRATION, settings(100.0, token_reduction="none"))
    top_down = pruned_top_down(100.0, model=model)
    assert top_down.plan == bottom_up.plan and top_down.block_drops == bottom_up.block_drops
    assert builders.same_state(top_down.model, builders.state(bottom_up.model))


def test_top_down_ends_with_the_repair_of_its_whole_plan() -> None:
    result = pruned_top_down(10.0, 10.0, 10.0)
    again = repaired_model(builders.toy_model(), result.plan, CALIBRATION, batch_size=32).model
    assert builders.same_state(again, builders.state(result.model))


def test_top_down_with_a_token_reduction_is_refused() -> None:
    with pytest.raises(SettingError, match="top-down takes channels alone, not tokens by lfe; give none"):
        cascade(builders.toy_model(), PROBE, CALIBRATION, settings(1, 1, 1, order="top-down"))


class WatchedCache(PrefixCache[CascadeState]):
    """Tells where each cascade began: after so many blocks, or -1 for anew."""

    def __init__(self, max_bytes: int = 10**9) -> None:
        super().__init__(max_bytes)
        self.starts: list[int] = []

    def farthest(self, settings: Hashable, thresholds: Sequence[Threshold]) -> CascadeState | None:
        state = super().farthest(settings, thresholds)
        self.starts.append(-1 if state is None else len(state.built))
        return state


DENSE_MACS = count_macs(builders.anatomy(num_classes=4), keep_all_plan(builders.anatomy(num_classes=4)))

SERIES: list[tuple[tuple[float, ...], dict[str, Any], int]] = [
    ((3.0, 5.0, 2.0), {}, -1),
    ((3.0, 5.0, 2.0), {}, 3),
    ((3.0, 5.0, 10.0), {}, 2),
    ((3.0, 1.0, 10.0), {}, 1),
    ((30.0, 20.0, 10.0), {}, 0),
    ((3.0, 5.0, 2.0), {"cutoff_channel": 0.3}, -1),
    ((3.2, 5.0, 2.0), {}, 3),  # also less than 3 of 90 images
    ((3.0, 5.0, 2.0), {"target_macs": int(0.01 * DENSE_MACS)}, 3),  # out of reach as well
    ((3.0, 5.0, 2.0), {"target_macs": int(0.97 * DENSE_MACS)}, 0),  # met within the first block
    ((3.0, 5.0, 2.0), {"token_share": 1.0}, 0),
    ((3.0, 5.0, 4.0), {"token_reduction": "none", "order": "top-down"}, -1),
    ((3.0, 0.0, 4.0), {"token_reduction": "none", "order": "top-down"}, 1),
]
"""Budgets and settings, and after how many blocks of an earlier cascade this one begins."""


def test_cascades_that_go_on_from_earlier_ones_give_what_they_give_alone() -> None:
    model, prefix_cache = builders.toy_model(), WatchedCache()
    for budgets, other, _ in SERIES:
        result = cascade(model, PROBE, CALIBRATION, settings(*budgets, **other), prefix_cache=prefix_cache)
        if prefix_cache.starts[-1] >= 0:
            assert same(result, cascade(model, PROBE, CALIBRATION, settings(*budgets, **other)))
        with torch.no_grad():
            for parameter in result.model.parameters():  # nothing that is kept
                parameter.fill_(3)
    assert prefix_cache.starts == [start for *_, start in SERIES]


def test_a_model_cut_at_another_exit_begins_anew() -> None:
    prefix_cache = WatchedCache()
    for depth in (1, 2):
        model = builders.model(num_classes=4, depth=depth)
        cascade(model, PROBE, CALIBRATION, settings(*[3.0] * depth), prefix_cache=prefix_cache)
    assert prefix_cache.starts == [-1, -1]


def test_states_too_large_to_keep_change_nothing() -> None:
    prefix_cache = WatchedCache(1000)
    for _ in range(2):
        result = cascade(builders.toy_model(), PROBE, CALIBRATION, settings(5, 3, 5), prefix_cache=prefix_cache)
        assert same(result, plainly_pruned())
    assert (prefix_cache.starts, prefix_cache.num_bytes) == ([-1, -1], 0)


def test_a_sensitivity_that_is_given_is_taken() -> None:
    model = builders.toy_model()
    measured = measure_sensitivity(model, CALIBRATION, batch_size=32)
    of_another_model = measure_sensitivity(builders.model(num_classes=4), CALIBRATION)
    for sensitivity, is_same in ((measured, True), (of_another_model, False)):
        result = cascade(model, PROBE, CALIBRATION, settings(5, 3, 5), sensitivity=sensitivity)
        assert builders.same_state(result.model, builders.state(plainly_pruned().model)) is is_same
