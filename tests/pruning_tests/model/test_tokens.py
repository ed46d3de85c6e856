"""Promises of every token reduction, then each one against loops over its definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.model.anatomy import Anatomy, BlockAnatomy, blocks_of, examine
from pruning.model.surgery import apply_plan, keep_all_block, keep_all_plan
from pruning.model.tokens import REDUCERS, AttentionState, Reduced, Reducer, Step, class_attention, merges
from pruning.plan import TOKEN_REDUCTIONS, Plan, TokenReduction
from tests.pruning_tests import builders, reference

MERGES: list[TokenReduction] = [kind for kind in TOKEN_REDUCTIONS if merges(kind)]
every_reduction = pytest.mark.parametrize("kind", TOKEN_REDUCTIONS)
every_merge = pytest.mark.parametrize("kind", MERGES)
SCALE = 0.7


def reducer(kind: TokenReduction, count: int, keep: int, prefix: int = 1, *, has_class_token: bool = True) -> Reducer:
    return REDUCERS[kind](
        num_patches=count,
        num_keep=keep,
        num_prefix_tokens=prefix,
        has_class_token=has_class_token and prefix > 0,
        cutoff=0.5,
    )


def stream(count: int, *, images: int = 3, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(images, count, width, generator=torch.Generator().manual_seed(seed))


def state_of(q: Tensor, k: Tensor, size: Tensor | None = None) -> AttentionState:
    logits = SCALE * q @ k.transpose(-2, -1)
    logits = logits if size is None else logits + size.log().transpose(1, 2)[:, None]
    return AttentionState(q=q, k=k, scale=SCALE, size=size, attention=logits.softmax(dim=-1))


def drawn_state(
    count: int, *, images: int = 3, heads: int = 2, size: Tensor | None = None, seed: int = 1
) -> AttentionState:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, images, heads, count, 5, generator=generator)
    return state_of(q, k, size)


def sizes(count: int, *, prefix: int, images: int = 3) -> Tensor:
    drawn = torch.randint(1, 6, (images, count, 1), generator=torch.Generator().manual_seed(2)).float()
    drawn[:, :prefix] = 1
    return drawn


def matrix(reduced: Reduced, count: int, images: int = 3) -> Tensor:
    """The reduction as a matrix, (B, N', N)."""
    return reduced.apply(torch.eye(count, dtype=torch.float64).expand(images, -1, -1))


@pytest.mark.parametrize(
    ("kind", "prefix", "keep", "has_class_token"),
    builders.every_pair(TOKEN_REDUCTIONS, [0, 1, 5], [1, 2, 4, 8], [True, False]),
)
def test_prefix_tokens_come_first_and_bit_equal_before_as_many_patches_as_asked(
    kind: TokenReduction, prefix: int, keep: int, has_class_token: bool
) -> None:
    x = stream(prefix + 9)
    out = reducer(kind, 9, keep, prefix, has_class_token=has_class_token).choose(x, drawn_state(prefix + 9)).apply(x)
    assert out.shape == (3, prefix + keep, 6)
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    patches, kept = (part[:, prefix:].flatten(0, 1) for part in (x, out))
    low, high = patches.min(dim=0).values, patches.max(dim=0).values
    assert ((kept >= low - 1e-6) & (kept <= high + 1e-6)).all()  # means of patches: nothing of the prefix, no sums


@pytest.mark.parametrize(("kind", "prefix", "keep"), builders.every_pair(TOKEN_REDUCTIONS, [0, 1, 5], [1, 3, 5, 8]))
def test_every_token_that_leaves_is_a_mean_of_some_that_came(kind: TokenReduction, prefix: int, keep: int) -> None:
    count = prefix + 9
    x, size = stream(count), sizes(count, prefix=prefix) if merges(kind) else None
    weights = matrix(reducer(kind, 9, keep, prefix).choose(x, drawn_state(count, size=size)), count)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(3, prefix + keep, dtype=torch.float64))
    assert ((weights > 0).sum(dim=1) <= 1).all()  # and no token goes into two
    if kind != "lfe":
        assert ((weights > 0).sum(dim=1) == 1).all()  # dropped is none
    else:
        assert set(weights.unique().tolist()) == {0.0, 1.0}
    stay = (weights > 0).sum(dim=2) == 1
    places = weights.argmax(dim=2)
    assert all((of_image[chosen].diff() > 0).all() for of_image, chosen in zip(places, stay, strict=True))


@every_reduction
@pytest.mark.parametrize("keep", [1, 3, 7])
def test_another_stream_of_the_same_tokens_is_reduced_as_x_is(kind: TokenReduction, keep: int) -> None:
    x, other = stream(10), stream(10, width=3, seed=5)
    reduced = reducer(kind, 9, keep).choose(x, drawn_state(10))
    weights = matrix(reduced, 10).float()
    torch.testing.assert_close(reduced.apply(x), weights @ x)
    torch.testing.assert_close(reduced.apply(other), weights @ other)
    assert torch.equal(reduced.apply(torch.cat([x, other], dim=2))[..., 6:], reduced.apply(other))


@every_reduction
@pytest.mark.parametrize("keep", [1, 6])
def test_the_same_tokens_are_reduced_the_same_way_twice(kind: TokenReduction, keep: int) -> None:
    x, state = stream(10), drawn_state(10)
    one, other = reducer(kind, 9, keep), reducer(kind, 9, keep)
    first = one.choose(x, state).apply(x)
    assert torch.equal(one.choose(x.clone(), state).apply(x), first)
    assert torch.equal(other.choose(x, state).apply(x), first)


@every_reduction
@pytest.mark.parametrize("keep", [1, 5, 9])
def test_tokens_that_are_all_equal_leave_as_many_as_asked_and_as_they_were(kind: TokenReduction, keep: int) -> None:
    x, same = torch.full((2, 11, 6), 0.3), torch.ones(2, 2, 11, 5)
    reduced = reducer(kind, 10, keep).choose(x, state_of(same, same))
    torch.testing.assert_close(reduced.apply(x), torch.full((2, keep + 1, 6), 0.3))
    assert reduced.size is None or reduced.size.sum(dim=1).tolist() == [[11.0], [11.0]]


@every_reduction
def test_images_choose_for_themselves(kind: TokenReduction) -> None:
    x, state = stream(10, images=8), drawn_state(10, images=8)
    reduce, together = reducer(kind, 9, 4), reducer(kind, 9, 4).choose(x, state).apply(x)
    weights = matrix(reduce.choose(x, state), 10, images=8)
    assert len({tuple((image > 0).flatten().tolist()) for image in weights}) > 1
    for index in range(8):
        part = slice(index, index + 1)
        assert state.attention is not None
        alone = replace(state, q=state.q[part], k=state.k[part], attention=state.attention[part])
        torch.testing.assert_close(reduce.choose(x[part], alone).apply(x[part]), together[part])


@every_reduction
def test_a_reduction_has_no_weights(kind: TokenReduction) -> None:
    assert not reducer(kind, 9, 3).state_dict()
    assert not list(reducer(kind, 9, 3).parameters())


@every_reduction
def test_only_the_reduction_that_asks_for_the_map_reads_it(kind: TokenReduction) -> None:
    x, state = stream(10), drawn_state(10)
    reduce = reducer(kind, 9, 4)
    assert reduce.needs_map == (kind == "lfe")
    if not reduce.needs_map:
        blind = replace(state, attention=None)
        assert torch.equal(reduce.choose(x, blind).apply(x), reduce.choose(x, state).apply(x))


BLOCK = builders.anatomy().blocks[0]
ANATOMIES: dict[str, BlockAnatomy] = {
    "class token": BLOCK,
    "class token and registers": replace(BLOCK, num_prefix_tokens=5),
    "no prefix": replace(BLOCK, num_prefix_tokens=0, has_class_token=False),
    "registers alone": replace(BLOCK, num_prefix_tokens=2, has_class_token=False),
}


COUNTS = [(9, 1), (9, 3), (9, 5), (9, 8), (12, 6), (13, 2), (2, 1), (3, 1)]
"""Patches that enter and that stay."""


@pytest.mark.parametrize(("kind", "tokens", "counts"), builders.every_pair(TOKEN_REDUCTIONS, list(ANATOMIES), COUNTS))
def test_a_reduction_equals_the_loop_over_its_definition(
    kind: TokenReduction, tokens: str, counts: tuple[int, int]
) -> None:
    anatomy, (count, keep) = ANATOMIES[tokens], counts
    prefix = anatomy.num_prefix_tokens
    x, size = stream(prefix + count), sizes(prefix + count, prefix=prefix) if merges(kind) else None
    state = drawn_state(prefix + count, size=size)
    reduced = reducer(kind, count, keep, prefix, has_class_token=anatomy.has_class_token).choose(x, state)
    weights = matrix(reduced, prefix + count)
    for image in range(3):
        assert state.attention is not None
        given = [1.0] * (prefix + count) if size is None else size[image, :, 0].tolist()
        groups = reference.reduction(
            kind, x[image], state.q[image], state.k[image], state.attention[image], given,
            keep=keep, scale=SCALE, cutoff=0.5, anatomy=anatomy,
        )  # fmt: skip
        expected = torch.zeros(prefix + keep, prefix + count, dtype=torch.float64)
        for row, group in enumerate(groups):
            for token, weight in group.items():
                expected[row, token] = weight / sum(group.values())
        torch.testing.assert_close(weights[image], expected, rtol=1e-5, atol=1e-7)
        if reduced.size is not None:
            assert reduced.size[image, :, 0].tolist() == [sum(group.values()) for group in groups]


def test_what_drops_tokens_counts_no_sizes_and_what_merges_does() -> None:
    x, state = stream(10), drawn_state(10)
    counted = {kind: reducer(kind, 9, 4).choose(x, state).size is not None for kind in TOKEN_REDUCTIONS}
    assert counted == {
        "lfe": False, "attention": False, "merge": True, "lfe-merge": True, "attention-merge": True, "quickshift": True
    }  # fmt: skip


# Merging


@pytest.mark.parametrize(("kind", "prefix", "keep"), builders.every_pair(MERGES, [0, 1, 5], [1, 2, 5, 8]))
def test_merging_conserves_the_patches_and_their_sum(kind: TokenReduction, prefix: int, keep: int) -> None:
    count = prefix + 9
    x, size = stream(count), sizes(count, prefix=prefix)
    reduced = reducer(kind, 9, keep, prefix).choose(x, drawn_state(count, size=size))
    assert reduced.size is not None
    assert reduced.size.shape == (3, prefix + keep, 1)
    assert torch.equal(reduced.size[:, :prefix], torch.ones(3, prefix, 1))
    assert torch.equal(reduced.size.sum(dim=1), size.sum(dim=1))
    torch.testing.assert_close((reduced.size * reduced.apply(x)).sum(dim=1), (size * x).sum(dim=1))


@pytest.mark.parametrize("kind", ["merge", "lfe-merge", "attention-merge"])
@pytest.mark.parametrize(
    ("count", "keep", "rounds"), [(9, 8, 1), (9, 5, 1), (9, 4, 2), (16, 8, 1), (16, 7, 2), (16, 4, 2), (16, 1, 4)]
)
def test_in_pairs_more_than_half_goes_in_rounds(kind: TokenReduction, count: int, keep: int, rounds: int) -> None:
    reduced = reducer(kind, count, keep).choose(stream(count + 1), drawn_state(count + 1))
    assert len(reduced.steps) == rounds
    moved = [step.moved.shape[1] for step in reduced.steps if step.moved is not None]
    assert sum(moved) == count - keep


def test_the_two_patches_with_parallel_keys_merge_and_all_others_stay_bit_equal() -> None:
    k = torch.eye(8).expand(3, 2, -1, -1).clone()
    k[1:, :, 6] = 3 * k[1:, :, 3]  # token 6 is patch 5, odd; token 3 is patch 2, even: it moves
    k[0, :, 1] = 0.5 * k[0, :, 8 - 6]  # token 1 is patch 0, even; token 2 is patch 1, odd
    x = stream(8)
    reduced = reducer("merge", 7, 6).choose(x, state_of(k, k))
    expected = [
        torch.stack([x[0, 0], (x[0, 1] + x[0, 2]) / 2, *x[0, 3:]]),
        *(torch.stack([*x[i, :3], *x[i, 4:6], (x[i, 6] + x[i, 3]) / 2, x[i, 7]]) for i in (1, 2)),
    ]
    out = reduced.apply(x)
    torch.testing.assert_close(out, torch.stack(expected))
    assert torch.equal(out[0, 2:], x[0, 3:]) and torch.equal(out[1:, 1:3], x[1:, 1:3])


@pytest.mark.parametrize(("count", "keep"), [(9, 8), (9, 3), (16, 1), (2, 1)])
def test_a_quick_shift_takes_one_round_however_many_go(count: int, keep: int) -> None:
    (step,) = reducer("quickshift", count, keep).choose(stream(count + 1), drawn_state(count + 1)).steps
    assert step.moved is not None and step.moved.shape == (3, count - keep)


def turned(angles: list[float]) -> Tensor:
    """Keys (1, 1, N, 2) of a class token and of patches at these angles, in degrees."""
    degrees = torch.tensor([90.0, *angles]).deg2rad()
    return torch.stack([degrees.cos(), degrees.sin()], dim=-1)[None, None]


def test_a_patch_goes_to_its_nearest_of_more_attention_wherever_that_is_and_chains_end_where_none_goes_on() -> None:
    # The class token looks up, so the patch at 80 degrees has most of its attention, that at -90 degrees least.
    k = turned([-90, 80, -78, 20, -69, 35, -85, 50])
    weights = matrix(reducer("quickshift", 8, 6).choose(stream(9, images=1), state_of(k, k)), 9, images=1)
    assert weights[0].argmax(dim=1).tolist() == [0, 2, 1, 4, 5, 6, 8]  # -90 went to -85, and with that to -78
    assert weights[0, 2].tolist() == pytest.approx([0, 1 / 3, 0, 1 / 3, 0, 0, 0, 1 / 3, 0])


def test_all_patches_in_one_chain_end_at_the_most_attended() -> None:
    k = turned([float(angle) for angle in range(-90, 80, 5)])  # each is nearest to the next, which looks up more
    reduced = reducer("quickshift", 34, 1).choose(stream(35, images=1), state_of(k, k))
    assert reduced.steps[0].kept.tolist() == [[0, 34]]
    assert matrix(reduced, 35, images=1)[0, 1].tolist() == pytest.approx([0.0] + [1 / 34] * 34)


def test_a_head_of_long_keys_does_not_drown_the_others() -> None:
    one, other = turned([0, 1, 60, 120]), turned([0, 100, 1, 200])  # patches 0 and 1 are alike, or 0 and 2
    x, q = stream(5, images=1), torch.zeros(1, 2, 5, 2)
    heads = torch.cat([one, other], dim=1)
    expected = matrix(reducer("quickshift", 4, 3).choose(x, state_of(q, heads)), 5, images=1)
    for lengths in ([1.0, 1000.0], [1000.0, 1.0]):
        k = heads * torch.tensor(lengths)[:, None, None]
        assert torch.equal(matrix(reducer("quickshift", 4, 3).choose(x, state_of(q, k)), 5, images=1), expected)


def test_patches_at_places_of_the_same_kind_never_merge() -> None:
    k = torch.eye(9).expand(1, 2, -1, -1).clone()
    k[:, :, 1] = k[:, :, 3]  # patches 0 and 2: both even
    weights = matrix(reducer("merge", 8, 7).choose(stream(9, images=1), state_of(k, k)), 9, images=1)
    assert not ((weights[..., 1] > 0) & (weights[..., 3] > 0)).any()
    assert ((weights > 0).sum(dim=2) == 2).sum() == 1


@pytest.mark.parametrize("kind", ["lfe-merge", "attention-merge"])
def test_of_equally_near_pairs_the_one_of_least_weight_goes_first(kind: TokenReduction) -> None:
    k = torch.zeros(1, 1, 9, 8)
    k[:, :, 1:] = torch.eye(8)  # all patches equally far from each other
    q, x = torch.zeros(1, 1, 9, 8), torch.ones(1, 9, 6)
    q[0, 0, 0] = torch.tensor([5.0, 4, 5, 3, -5, -4, 5, 4])  # the class token looks least at patches 4 and 5
    x[0, 1 + 4], x[0, 1 + 5] = 100, -100  # whose low frequencies are small beside themselves
    weights = matrix(reducer(kind, 8, 7).choose(x, state_of(q, k)), 9, images=1)
    assert weights[0, :, 1 + 4].nonzero().tolist() == weights[0, :, 1 + 5].nonzero().tolist()
    assert weights[0, :, 1 + 4].max() == 0.5


@every_reduction
@pytest.mark.parametrize("prefix", [0, 1])
def test_an_image_of_nan_leaves_the_others_of_its_batch_as_they_are(kind: TokenReduction, prefix: int) -> None:
    x, state = stream(prefix + 9), drawn_state(prefix + 9)
    reduce = reducer(kind, 9, 4, prefix)
    expected = reduce.choose(x, state).apply(x)
    broken = [part.index_fill(0, torch.tensor([0]), torch.nan) for part in (x, state.q, state.k)]
    out = reduce.choose(broken[0], state_of(broken[1], broken[2])).apply(broken[0])
    assert out[0].isnan().all()
    assert torch.equal(out[1:], expected[1:])


@every_reduction
def test_gradients_through_a_reduction_are_those_of_its_matrix(kind: TokenReduction) -> None:
    x, state = stream(10).requires_grad_(), drawn_state(10)
    reduced = reducer(kind, 9, 4).choose(x, state)
    weights, after = matrix(reduced, 10).float(), stream(5, seed=7)
    (given,) = torch.autograd.grad(reduced.apply(x).mul(after).sum(), x)
    torch.testing.assert_close(given, weights.transpose(1, 2) @ after)


def test_gradients_reach_the_weights_of_an_average() -> None:
    x, weight = stream(4, images=1).double(), torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)[None, :, None]
    weight.requires_grad_()

    def average(weight: Tensor) -> Tensor:
        moved, into = torch.tensor([[1, 3]]), torch.tensor([[1, 0]])
        return Step(num_tokens=4, kept=torch.tensor([[0, 2]]), moved=moved, into=into, weight=weight).average(x)

    assert torch.autograd.gradcheck(average, weight)


def test_a_large_token_weighs_as_many_patches_as_it_stands_for() -> None:
    size = torch.tensor([1.0, 1, 3])[None, :, None]
    x = torch.tensor([[7.0], [0.0], [4.0]])[None]
    reduced = reducer("merge", 2, 1).choose(x, drawn_state(3, images=1, size=size))
    assert reduced.apply(x).flatten().tolist() == [7.0, 3.0]
    assert reduced.size is not None and reduced.size.flatten().tolist() == [1.0, 4.0]


@torch.no_grad()
def streams(model: Any, images: Tensor) -> list[Tensor]:
    """The output of every block."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in blocks_of(model)]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("kind", "family", "is_whole"),
    builders.every_pair(MERGES, ["vit", "registers", "average_pooling"], [True, False]),
)
def test_sizes_travel_with_the_tokens_to_the_last_block_and_add_up(
    kind: TokenReduction, family: str, is_whole: bool
) -> None:
    model = builders.model(family, depth=5)
    anatomy = examine(model)
    counts = (16, 12, 12, 3, 3)  # the third block and the last are whole, where units stay
    plan = builders.plan(anatomy, num_tokens=counts)
    if is_whole:
        plan = replace(plan, blocks=tuple(keep_all_block(anatomy.blocks[0], count) for count in counts))
    seen = streams(apply_plan(model, replace(plan, token_reduction=kind)), builders.batch())
    prefix = anatomy.blocks[0].num_prefix_tokens
    assert [out.shape[1:] for out in seen] == [
        (prefix + 16, 24), (prefix + 12, 25), (prefix + 12, 25), (prefix + 3, 25), (prefix + 3, 24)
    ]  # fmt: skip
    for out in seen[1:4]:
        assert out[:, :prefix, -1].eq(1).all()
        assert out[..., -1].sum(dim=1).tolist() == [prefix + 16.0] * 4
        assert out[..., -1].min() >= 1
    assert torch.equal(seen[1][..., -1], seen[2][..., -1])


@pytest.mark.parametrize("kind", ["lfe", "attention"])
def test_where_nothing_merges_streams_keep_their_width(kind: TokenReduction) -> None:
    model = builders.model()
    plan = replace(builders.plan(examine(model), num_tokens=(12, 12, 3)), token_reduction=kind)
    assert [out.shape for out in streams(apply_plan(model, plan), builders.batch(2))] == [
        (2, 13, 24), (2, 13, 24), (2, 4, 24)
    ]  # fmt: skip


# Class attention, and EViT's fusion


def test_fusion_leaves_the_kept_bit_equal_and_the_others_as_their_mean_weighted_by_attention() -> None:
    x, state = stream(10), drawn_state(10)
    out = reducer("attention", 9, 4).choose(x, state).apply(x)
    assert state.attention is not None
    for image in range(3):
        paid = state.attention[image, :, 0, 1:].mean(dim=0)
        order = paid.argsort(descending=True).tolist()
        mean = sum(paid[i] * x[image, 1 + i] for i in order[3:]) / paid[order[3:]].sum()
        rows = {i: x[image, 1 + i] for i in order[:3]}
        places = sorted(order[:4])
        for place, row in zip(places, out[image, 1:], strict=True):
            if place in rows:
                assert torch.equal(row, rows[place])
            else:
                torch.testing.assert_close(row, mean)


def test_patches_without_any_attention_are_fused_to_numbers_all_the_same() -> None:
    q, k = torch.zeros(1, 1, 6, 1), torch.zeros(1, 1, 6, 1)
    q[:, :, 0], k[:, :, 1] = 1, 1e4  # a softmax of exactly 0 for every patch but the first
    x = stream(6, images=1)
    out = reducer("attention", 5, 3).choose(x, state_of(q, k)).apply(x)
    assert torch.equal(out[:, :3], x[:, :3])
    torch.testing.assert_close(out[:, 3], x[:, 3:].mean(dim=1))


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_class_attention_is_the_first_row_of_the_map(prefix: int) -> None:
    for state in (drawn_state(prefix + 9), drawn_state(prefix + 9, size=sizes(prefix + 9, prefix=prefix))):
        assert state.attention is not None
        expected = state.attention[:, :, 0, prefix:].mean(dim=1)
        torch.testing.assert_close(class_attention(state, prefix, True), expected)
        assert (expected.sum(dim=1) < 1).all()  # what goes to the prefix is missing, not spread


@pytest.mark.parametrize("prefix", [0, 2])
def test_without_a_class_token_the_mean_patch_asks(prefix: int) -> None:
    state = drawn_state(prefix + 9)
    query = state.q[:, :, prefix:].mean(dim=2)
    logits = SCALE * torch.einsum("bhk,bhnk->bhn", query, state.k)
    expected = logits.softmax(dim=-1)[..., prefix:].mean(dim=1)
    torch.testing.assert_close(class_attention(state, prefix, False), expected)


def test_a_token_gets_the_class_attention_of_all_its_copies() -> None:
    size = sizes(8, prefix=1)
    state = drawn_state(8, size=size)
    for image in range(3):
        copies = size[image, :, 0].long()
        q, k = (part[image : image + 1].repeat_interleave(copies, dim=2) for part in (state.q, state.k))
        copied = class_attention(state_of(q, k), 1, True)[0]
        expected = torch.stack([part.sum() for part in copied.split(copies[1:].tolist())])
        torch.testing.assert_close(class_attention(state, 1, True)[image], expected)


# Whole models


def shrinking(anatomy: Anatomy, kind: TokenReduction, *, seed: int = 0) -> Plan:
    plan = builders.plan(anatomy, seed=seed, num_tokens=(11, 5, 2))
    return replace(plan, token_reduction=kind, cutoff_token=0.4)


@pytest.mark.parametrize(("family", "kind"), builders.in_rotation(list(builders.FAMILIES), TOKEN_REDUCTIONS, 3))
def test_a_model_that_loses_units_and_tokens_equals_the_slow_definition(kind: TokenReduction, family: str) -> None:
    model, x = builders.model(family).double(), builders.batch(2).double()
    plan = shrinking(examine(model), kind, seed=3)
    with torch.no_grad():
        out = apply_plan(model, plan)(x)
        torch.testing.assert_close(out, reference.logits(model, plan, x), atol=1e-6, rtol=1e-6)
    assert out.shape == (2, 7) and out.isfinite().all()


@every_reduction
@pytest.mark.parametrize("family", ["vit", "distilled", "average_pooling"])
def test_whole_blocks_that_lose_tokens_equal_the_slow_definition(kind: TokenReduction, family: str) -> None:
    model, x = builders.model(family, depth=4).double(), builders.batch(3).double()
    blocks = tuple(keep_all_block(examine(model).blocks[0], count) for count in (16, 9, 9, 9))
    plan = Plan(blocks=blocks, token_reduction=kind)
    with torch.no_grad():
        torch.testing.assert_close(apply_plan(model, plan)(x), reference.logits(model, plan, x), atol=1e-6, rtol=1e-6)


def test_reductions_give_six_different_models() -> None:
    model, x = builders.model(), builders.batch(8)
    with torch.no_grad():
        out = [apply_plan(model, shrinking(examine(model), kind))(x) for kind in TOKEN_REDUCTIONS]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(out) for b in out[:i])


@pytest.mark.parametrize("family", builders.FAMILIES)
@torch.no_grad()
def test_where_no_token_leaves_the_reduction_does_not_matter(family: str) -> None:
    model, x = builders.model(family), builders.batch(2)
    keep_all, narrow = keep_all_plan(examine(model)), builders.plan(examine(model))
    dense, pruned = model(x), apply_plan(model, narrow)(x)
    for kind in TOKEN_REDUCTIONS:
        assert torch.equal(apply_plan(model, replace(keep_all, token_reduction=kind))(x), dense)
        assert torch.equal(apply_plan(model, replace(narrow, token_reduction=kind))(x), pruned)


@every_reduction
def test_a_reduced_model_has_the_weights_of_its_widths_and_no_more(kind: TokenReduction) -> None:
    model = builders.model()
    plan = builders.plan(examine(model))
    names = apply_plan(model, plan).state_dict().keys()
    assert apply_plan(model, shrinking(examine(model), kind)).state_dict().keys() == names


@every_reduction
def test_gradients_reach_every_weight_through_a_reduction(kind: TokenReduction) -> None:
    model = builders.model()
    pruned = apply_plan(model, shrinking(examine(model), kind))
    pruned(builders.batch(2)).square().sum().backward()
    for name, parameter in pruned.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_reduction
def test_a_reduced_model_runs_in_bfloat16_too(kind: TokenReduction) -> None:
    model, x = builders.model(), builders.batch(2)
    pruned = apply_plan(model, shrinking(examine(model), kind))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = pruned(x)
        seen = streams(pruned, x)
    assert out.shape == (2, 7) and out.isfinite().all()
    if merges(kind):
        assert seen[1][..., -1].sum(dim=1).tolist() == [17.0, 17.0]
