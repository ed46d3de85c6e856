"""Widths against brute force over every head count and every set of heads; what a unit saves against `cost`."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from pruning.measure.cost import block_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.ranking import Ranking, fit_heads, top_indices
from pruning.model.anatomy import examine
from pruning.model.surgery import apply_plan
from pruning.plan import BlockPlan, BlockShape, Plan
from pruning.scores.channel import ChannelScores
from tests.pruning_tests import builders

ANATOMY = builders.anatomy().blocks[0]
H, D, HIDDEN = 3, 8, 96
TOKENS = 17  # the class token and all patches
ANY = multiples(ANATOMY, 1)


def random_scores(seed: int) -> ChannelScores:
    generator = torch.Generator().manual_seed(seed)
    return ChannelScores(
        qk=torch.rand(H, D, generator=generator) ** 3,
        v=torch.rand(H, D, generator=generator) ** 3,
        hidden=torch.rand(HIDDEN, generator=generator) ** 3,
    )


def brute_force_heads(qk: Tensor, v: Tensor, num_qk: int, num_v: int) -> tuple[tuple[int, ...], int, int]:
    num_heads, width = qk.shape
    best, answer = -1.0, None
    for count in range(1, num_heads + 1):
        if count * width < max(num_qk, num_v):
            continue
        qk_width, v_width = (num_qk + count - 1) // count, (num_v + count - 1) // count
        for heads in combinations(range(num_heads), count):
            score = sum(
                sum(sorted(scores[head].tolist(), reverse=True)[:kept])
                for head in heads
                for scores, kept in ((qk, qk_width), (v, v_width))
            )
            if score > best + 1e-9:
                best, answer = score, (heads, qk_width, v_width)
    assert answer is not None
    return answer


@pytest.mark.parametrize("seed", range(4))
def test_fit_heads_loses_the_least_score_of_all_head_sets(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(4, 1, generator=generator) ** 2  # heads of very different worth
    qk, v = (torch.rand(4, 3, generator=generator) * spread for _ in range(2))
    any_width = multiples(replace(ANATOMY, head_dim=3), 1)
    for num_qk in range(1, 13):
        for num_v in range(1, 13):
            assert fit_heads(qk, v, num_qk, num_v, any_width) == brute_force_heads(qk, v, num_qk, num_v)


def macs_saved(kind: str, tokens_in: int, tokens_out: int) -> int:
    """By two counts of a block of one head, before and after it loses one unit."""

    def macs(**fewer: int) -> int:
        widths = {"num_heads": 1, "qk_width": D, "v_width": D, "num_hidden": HIDDEN} | fewer
        shape = BlockShape(num_tokens=tokens_out - 1, **widths)
        return block_macs(ANATOMY, shape, tokens_in - 1).total

    return macs() - macs(**{"qk": {"qk_width": D - 1}, "v": {"v_width": D - 1}, "hidden": {"num_hidden": 95}}[kind])


@pytest.mark.parametrize(("tokens_in", "tokens_out"), [(17, 17), (17, 3), (9, 2), (2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_units_of_least_score_per_multiply_add_go_first(seed: int, tokens_in: int, tokens_out: int) -> None:
    scores = random_scores(seed)
    ranking = Ranking(scores, ANATOMY, tokens_in, tokens_out, ANY)
    units = sorted(
        (score / macs_saved(kind, tokens_in, tokens_out), kind)
        for kind in ("qk", "v", "hidden")
        for score in getattr(scores, kind).flatten().tolist()
    )
    for removed in (0, 1, 7, 30, 60, 100, ranking.max_removed):
        kinds = [kind for _, kind in units[removed:]]
        num_qk, num_v, num_hidden = (max(kinds.count(kind), 1) for kind in ("qk", "v", "hidden"))
        plan = ranking.plan(removed, 11)
        heads, qk_width, v_width = brute_force_heads(scores.qk, scores.v, num_qk, num_v)
        assert plan == BlockPlan(
            keep_heads=heads,
            keep_qk=tuple(best(scores.qk[head], qk_width) for head in heads),
            keep_v=tuple(best(scores.v[head], v_width) for head in heads),
            keep_hidden=best(scores.hidden, num_hidden),
            num_tokens=11,
        )


def test_hidden_units_stay_longer_once_few_tokens_reach_them() -> None:
    scores = random_scores(0)
    before, after = (Ranking(scores, ANATOMY, TOKENS, tokens_out, ANY).plan(60, 11) for tokens_out in (TOKENS, 3))
    assert len(after.keep_hidden) > len(before.keep_hidden)


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(sorted(range(len(scores)), key=lambda i: -scores[i].item())[:count]))


@pytest.mark.parametrize("seed", range(3))
def test_every_removal_gives_heads_of_equal_widths_and_a_model_that_runs(seed: int) -> None:
    ranking = Ranking(random_scores(seed), ANATOMY, TOKENS, TOKENS, ANY)
    model, x = builders.model(), builders.batch(1)
    for removed in range(0, ranking.max_removed + 1, 13):
        block = ranking.plan(removed, 16)
        assert len({len(kept) for kept in block.keep_qk}) == len({len(kept) for kept in block.keep_v}) == 1
        assert apply_plan(model, Plan(blocks=(block,) * 3))(x).isfinite().all()


def test_nothing_removed_is_the_dense_block() -> None:
    plan = Ranking(random_scores(0), ANATOMY, TOKENS, TOKENS, ANY).plan(0, 16)
    assert plan.shape.num_heads == H and plan.shape.qk_width == plan.shape.v_width == D
    assert plan.keep_hidden == tuple(range(HIDDEN))


@pytest.mark.parametrize("strong", ["qk", "v", "hidden"])
def test_the_most_that_may_go_leaves_something_of_every_kind(strong: str) -> None:
    scores = {"qk": torch.rand(H, D), "v": torch.rand(H, D), "hidden": torch.rand(HIDDEN)}
    scores[strong] = scores[strong] + 10
    ranking = Ranking(ChannelScores(**scores), ANATOMY, TOKENS, TOKENS, ANY)
    assert ranking.max_removed == 2 * H * D + HIDDEN - 3
    shape = ranking.plan(ranking.max_removed, 1).shape
    counts = {"qk": shape.num_heads * shape.qk_width, "v": shape.num_heads * shape.v_width, "hidden": shape.num_hidden}
    # The three best units are all of one kind; widths are rounded up to the same in every head.
    for kind, count in counts.items():
        least = 3 if kind == strong else 1
        assert count == least if kind == "hidden" else least <= count < least + shape.num_heads


def test_in_a_single_head_one_unit_of_each_kind_is_left() -> None:
    anatomy = builders.anatomy(num_heads=1).blocks[0]
    scores = ChannelScores(qk=torch.rand(1, 24), v=torch.rand(1, 24), hidden=torch.rand(HIDDEN))
    scores.qk[0, 3], scores.v[0, 6], scores.hidden[40] = 5.0, 5.0, 5.0
    ranking = Ranking(scores, anatomy, TOKENS, TOKENS, multiples(anatomy, 1))
    assert ranking.plan(ranking.max_removed, 1) == BlockPlan(
        keep_heads=(0,), keep_qk=((3,),), keep_v=((6,),), keep_hidden=(40,), num_tokens=1
    )


def test_ties_go_by_position_and_always_alike() -> None:
    equal = ChannelScores(qk=torch.ones(H, D), v=torch.ones(H, D), hidden=torch.ones(HIDDEN))
    plans = [Ranking(equal, ANATOMY, TOKENS, TOKENS, ANY).plan(50, 16) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]
    # The first 50 of qk (24), v (24), hidden (96) go; one qk pair and one value channel stay in the first head.
    assert plans[0] == BlockPlan(
        keep_heads=(0, 1, 2), keep_qk=((0,),) * 3, keep_v=((0,),) * 3, keep_hidden=tuple(range(94)), num_tokens=16
    )
    assert top_indices(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2) == (1, 2)


def test_a_block_whose_scores_are_all_zero_is_still_planned() -> None:
    nothing = ChannelScores(qk=torch.zeros(H, D), v=torch.zeros(H, D), hidden=torch.zeros(HIDDEN))
    assert Ranking(nothing, ANATOMY, TOKENS, TOKENS, ANY).plan(100, 16).shape.num_hidden == HIDDEN - (100 - 2 * H * D)


@pytest.mark.parametrize(("seed", "round_to"), [(0, 2), (1, 3), (2, 4), (0, 8), (1, 16)])
def test_widths_are_the_next_multiples_and_at_most_dense(seed: int, round_to: int) -> None:
    scores = random_scores(seed)
    exact, rounded = (Ranking(scores, ANATOMY, TOKENS, TOKENS, multiples(ANATOMY, step)) for step in (1, round_to))
    for removed in range(0, exact.max_removed + 1, 9):
        exact_plan, plan = exact.plan(removed, 16), rounded.plan(removed, 16)
        num_qk, num_v = channels_that_stay(scores, removed)
        heads = plan.shape.num_heads
        assert plan.shape.qk_width == min(math.ceil(num_qk / heads / round_to) * round_to, D)
        assert plan.shape.v_width == min(math.ceil(num_v / heads / round_to) * round_to, D)
        assert plan.shape.num_hidden == min(math.ceil(exact_plan.shape.num_hidden / round_to) * round_to, HIDDEN)
        assert set(exact_plan.keep_hidden) <= set(plan.keep_hidden)


def channels_that_stay(scores: ChannelScores, removed: int) -> tuple[int, int]:
    """Pairs and value channels that stay when so many units go, before anything is spread over heads."""
    units = sorted(
        (score / macs_saved(kind, TOKENS, TOKENS), kind)
        for kind in ("qk", "v", "hidden")
        for score in getattr(scores, kind).flatten().tolist()
    )
    kinds = [kind for _, kind in units[removed:]]
    return max(kinds.count("qk"), 1), max(kinds.count("v"), 1)


def test_heads_still_go_where_a_step_of_rounding_is_a_whole_head() -> None:
    ranking = Ranking(random_scores(0), ANATOMY, TOKENS, TOKENS, multiples(ANATOMY, D))
    smallest = ranking.plan(ranking.max_removed, 16).shape
    assert (smallest.num_heads, smallest.qk_width, smallest.v_width, smallest.num_hidden) == (1, D, D, D)


def test_channels_that_rounding_adds_are_paid_for() -> None:
    qk = v = torch.tensor([[4.0, 1.0], [3.0, 1.0]])
    # One head keeps a score of 10, and 2 channels more than it has to; two keep 18, and 4: better up to a price of 4.
    pairs, any_width = (multiples(replace(ANATOMY, head_dim=2), step) for step in (2, 1))
    assert fit_heads(qk, v, 1, 1, pairs) == ((0, 1), 2, 2)
    assert fit_heads(qk, v, 1, 1, pairs, price=3.5) == ((0, 1), 2, 2)
    assert fit_heads(qk, v, 1, 1, pairs, price=4.5) == ((0,), 2, 2)
    assert fit_heads(qk, v, 1, 1, any_width, price=4.5) == ((0, 1), 1, 1)


def test_widths_are_the_least_that_are_allowed_and_need_be_no_multiples() -> None:
    qk = v = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    allowed = AllowedWidths(attention=((1, 4), (3, 2), (4, 4)), hidden=(5, 7, HIDDEN))
    expected = {
        (1, 1): (1, 4),
        (2, 1): (3, 2),
        (1, 3): (1, 4),
        (2, 3): (4, 4),
        (4, 1): (4, 4),
    }  # 3 + 2 is as much as 1 + 4
    assert {pair: fit_heads(qk, v, *pair, allowed)[1:] for pair in expected} == expected
    ranking = Ranking(random_scores(0), ANATOMY, TOKENS, TOKENS, replace(allowed, attention=((D, D),)))
    assert ranking.plan(ranking.max_removed, 16).shape.num_hidden == 5


def test_top_indices_are_those_of_the_largest_scores_ascending() -> None:
    assert top_indices(torch.tensor([0.1, 0.9, 0.5, 0.7]), 3) == (1, 2, 3)
    assert top_indices(torch.tensor([0.1, 0.9]), 1) == (1,)


def test_all_pairs_of_normalised_queries_and_keys_stay() -> None:
    model = builders.model("qk_norm")
    scores = random_scores(0)
    weak = ChannelScores(qk=scores.qk * 1e-6, v=scores.v, hidden=scores.hidden)
    anatomy = examine(model).blocks[0]
    ranking = Ranking(weak, anatomy, TOKENS, TOKENS, multiples(anatomy, 1))
    assert ranking.max_removed == H * D + HIDDEN - 2
    for removed in (0, 1, 40, ranking.max_removed):
        block = ranking.plan(removed, 16)
        assert block.keep_qk == (tuple(range(D)),) * H
        apply_plan(model, Plan(blocks=(block,) * 3))
    assert block.shape.v_width == 1 and block.shape.num_hidden <= 2
