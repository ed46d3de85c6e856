"""The repair: exact where nothing is lost, least squares by brute force where something is, harmless on few images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pruning.data import Images
from pruning.errors import PlanError
from pruning.measure.accuracy import predict, top1
from pruning.model.anatomy import blocks_of, classify, embed, examine, parts_of
from pruning.model.layers import SlimBlock, unpack
from pruning.model.surgery import apply_plan, keep_all_block, keep_all_plan
from pruning.model.tokens import merges
from pruning.plan import TOKEN_REDUCTIONS, BlockPlan, Plan, TokenReduction
from pruning.repair.compensation import REPAIR_PASSES, BlockRepair, repair_block, repaired_model
from pruning.repair.flow import CalibrationStream, DenseStream
from pruning.repair.sensitivity import measure_sensitivity
from tests.pruning_tests import builders, reference

HIDDEN = 96
ALL = tuple(range(8))  # channels of a head
every_family = pytest.mark.parametrize("family", builders.FAMILIES)


def without(*channels: int) -> tuple[int, ...]:
    return tuple(channel for channel in ALL if channel not in channels)


def edited(model: nn.Module, block: BlockPlan, index: int = 1) -> Plan:
    """The plan that keeps all of a model but for one block."""
    blocks = list(keep_all_plan(examine(model)).blocks)
    blocks[index] = block
    return Plan(blocks=tuple(blocks))


def kl(dense: Tensor, pruned: Tensor) -> float:
    dense, pruned = dense.double().log_softmax(dim=1), pruned.double().log_softmax(dim=1)
    return float((dense.exp() * (dense - pruned)).sum(dim=1).mean())


def furthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def check_shapes(repaired: nn.Module, cut: nn.Module) -> None:
    assert {name: tensor.shape for name, tensor in repaired.state_dict().items()} == {
        name: tensor.shape for name, tensor in cut.state_dict().items()
    }


# Whole blocks


@every_family
def test_a_plan_that_keeps_all_gives_bit_equal_logits_and_copies(family: str) -> None:
    model, images = builders.model(family), builders.images(6)
    repaired = repaired_model(model, keep_all_plan(examine(model)), images)
    assert torch.equal(predict(repaired.model, images), predict(model, images))
    assert repaired.notes == ()
    dense = {parameter.data_ptr() for parameter in model.parameters()}
    assert not dense & {parameter.data_ptr() for parameter in repaired.model.parameters()}


def test_whole_blocks_before_and_after_a_pruned_one_are_not_touched() -> None:
    model = builders.model()
    plan = edited(model, builders.plan(examine(model)).blocks[1])
    repaired = blocks_of(repaired_model(model, plan, builders.images(8)).model)
    for index in (0, 2):
        assert builders.same_state(repaired[index], builders.state(blocks_of(model)[index]))


def test_the_repair_leaves_the_dense_model_as_it_was_and_is_the_same_each_time() -> None:
    model, images = builders.model(), builders.images(12)
    before, plan = (
        builders.state(model),
        replace(builders.plan(examine(model), num_tokens=(12, 7, 7)), token_reduction="merge"),
    )
    first, again = repaired_model(model, plan, images), repaired_model(model, plan, images)
    assert builders.same_state(first.model, builders.state(again.model))
    assert builders.same_state(model, before)
    assert not model.training and not first.model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad_fn is None and parameter.requires_grad for parameter in first.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in first.model.modules())


def test_a_given_sensitivity_is_as_good_as_one_measured_on_the_way() -> None:
    model, images = builders.model(), builders.images(8)
    plan, sensitivity = builders.plan(examine(model)), measure_sensitivity(model, images)
    given = repaired_model(model, plan, images, sensitivity)
    assert builders.same_state(repaired_model(model, plan, images).model, builders.state(given.model))


@pytest.mark.parametrize("family", ["vit", "average_pooling"])
def test_the_size_of_a_batch_changes_rounding_alone(family: str) -> None:
    model, images = builders.model(family), builders.images(16)
    plan = replace(builders.plan(examine(model), num_tokens=(12, 7, 7)), token_reduction="merge")
    sensitivity = measure_sensitivity(model, images)
    at_once, split = (repaired_model(model, plan, images, sensitivity, batch_size=size).model for size in (16, 5))
    assert furthest(predict(at_once, images), predict(split, images)) < 2e-3


def test_a_plan_for_another_model_is_refused() -> None:
    model = builders.model()
    plan = keep_all_plan(examine(model))
    with pytest.raises(PlanError, match="the plan has 2 blocks"):
        repaired_model(model, replace(plan, blocks=plan.blocks[:2]), builders.images(4))


# Several plans of one block


def test_plans_of_one_block_share_the_attention_that_depends_on_no_kept_channel() -> None:
    model = builders.model()
    repair = BlockRepair(builders.calibration_stream(model, builders.images(12), 1))
    plan = replace(keep_all_block(repair.stream.anatomy), keep_qk=((0, 1, 2),) * 3, keep_hidden=tuple(range(40)))
    assert not repair.has_attention(plan)
    first = repair.repair(plan)
    same = replace(plan, keep_qk=((3, 5, 6), (1, 2, 3), (0, 6, 7)), keep_hidden=tuple(range(20, 50)))
    others = [
        replace(plan, keep_heads=(0, 1), keep_qk=plan.keep_qk[:2], keep_v=plan.keep_v[:2]),
        replace(plan, keep_qk=((0, 1),) * 3),
        replace(plan, keep_v=((0, 1),) * 3),
    ]
    fewer_tokens = replace(plan, num_tokens=9)
    assert all(repair.has_attention(shared) for shared in (plan, same, fewer_tokens))
    assert not any(repair.has_attention(other) for other in others)
    for other in (same, fewer_tokens, *others, plan):
        again = repair.repair(other)
        alone = repair_block(repair.stream, other)
        assert builders.same_state(again.block, builders.state(alone.block)) and again.notes == alone.notes
        attentions = [parts_of(repaired.block).proj.weight for repaired in (first, again)]
        assert torch.equal(*attentions) == (other not in others)


def test_a_repair_is_for_the_block_that_the_stream_had_come_to() -> None:
    model = builders.model()
    stream = builders.calibration_stream(model, builders.images(4), 0)
    repair = BlockRepair(stream)
    stream.advance(blocks_of(model)[0])
    with pytest.raises(AssertionError, match="moved on"):
        repair.repair(keep_all_block(stream.anatomy))
    with pytest.raises(AssertionError, match="moved on"):
        repair.logit_factors()


@pytest.mark.parametrize(
    ("family", "kind"), builders.in_rotation(["vit", "distilled", "registers"], TOKEN_REDUCTIONS, 2)
)
def test_activations_that_are_kept_give_what_running_the_blocks_again_gives(family: str, kind: TokenReduction) -> None:
    """Kept are those of all batches, of some, or of none; and `advance` goes through them or through the block."""
    model, images = builders.model(family), builders.images(16)
    anatomy, sensitivity = examine(model), measure_sensitivity(model, images)
    plans = builders.plan(anatomy, seed=3, num_tokens=(13, 9, 9)).blocks
    streams = [
        CalibrationStream(
            model, images, sensitivity, token_reduction=kind, cutoff_token=0.85, batch_size=3, kept_bytes=kept_bytes
        )
        for kept_bytes in (10**9, 10**9, 30_000, 0)
    ]
    for plan in plans:
        repairs = [BlockRepair(stream) for stream in streams]
        blocks = [repair.repair(plan) for repair in repairs]
        for repair, repaired in zip(repairs[1:], blocks[1:], strict=True):
            repair.advance(repaired)
            for name, tensor in blocks[0].block.state_dict().items():
                torch.testing.assert_close(repaired.block.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)
        streams[0].advance(blocks[0].block)
        for stream in streams[1:]:
            assert stream.index == streams[0].index
            torch.testing.assert_close(stream.x, streams[0].x, rtol=1e-3, atol=1e-3)
            assert stream.share is not None and streams[0].share is not None
            torch.testing.assert_close(stream.share, streams[0].share, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_bytes", [10**9, 60_000, 0])
def test_plans_that_share_a_dense_stream_give_the_same_models_and_leave_it_as_it_was(max_bytes: int) -> None:
    model, images = builders.model(), builders.images(12)
    anatomy, sensitivity = examine(model), measure_sensitivity(model, images)
    dense = DenseStream(model, images, batch_size=5, max_bytes=max_bytes)
    for seed, num_tokens in enumerate([(16, 9, 4), (12, 12, 12), (16, 16, 16)]):
        plan = replace(builders.plan(anatomy, seed=seed, num_tokens=num_tokens), token_reduction="merge")
        shared = repaired_model(model, plan, images, sensitivity, batch_size=5, dense=dense)
        alone = repaired_model(model, plan, images, sensitivity, batch_size=5)
        assert builders.same_state(shared.model, builders.state(alone.model)) and shared.notes == alone.notes


def test_a_stream_may_go_on_through_a_block_that_was_repaired_before_the_last_one() -> None:
    model = builders.model()
    stream = builders.calibration_stream(model, builders.images(12), 0)
    other, repair = stream.copy(), BlockRepair(stream)
    first, second = (
        repair.repair(replace(keep_all_block(stream.anatomy), keep_hidden=tuple(range(count)))) for count in (30, 60)
    )
    assert repair.has_attention(keep_all_block(stream.anatomy))
    repair.advance(first)
    other.advance(first.block)
    torch.testing.assert_close(stream.x, other.x, rtol=1e-5, atol=1e-5)
    assert parts_of(second.block).fc2.in_features == 60


class CountedWork(TorchFunctionMode):
    """Counts the multiply-adds of linear layers, and of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.macs += result.numel() * args[0].shape[-1]
        if func is F.scaled_dot_product_attention:
            self.macs += (
                2 * args[0].shape[0] * args[0].shape[1] * args[0].shape[2] * args[1].shape[2] * args[0].shape[3]
            )
        return result


@pytest.mark.parametrize("kind", ["none", "merge"])
def test_a_repair_runs_the_images_through_the_dense_and_the_pruned_model_once(kind: TokenReduction) -> None:
    model, images = builders.model(depth=6), builders.images(16)
    anatomy, sensitivity = examine(model), measure_sensitivity(model, images)
    num_tokens = None if kind == "none" else (16, 12, 12, 8, 8, 4)
    plan = replace(builders.plan(anatomy, num_tokens=num_tokens), token_reduction=kind)
    with CountedWork() as dense:
        predict(model, images)
    with CountedWork() as repair:
        repaired_model(model, plan, images, sensitivity)
    assert repair.macs < (REPAIR_PASSES - 3) * 1.05 * dense.macs
    shared = DenseStream(model, images)
    repaired_model(model, plan, images, sensitivity, dense=shared)
    with CountedWork() as again:
        repaired_model(model, plan, images, sensitivity, dense=shared)
    assert again.macs < (REPAIR_PASSES - 4) * 1.05 * dense.macs


# Redundant units


@torch.no_grad()
def check_redundant(model: nn.Module, plan: Plan, bound: float) -> None:
    """Checks that the repaired model loses nothing, and that much would be lost without the repair."""
    images = builders.images(48)
    dense = predict(model, images)
    repaired = repaired_model(model, plan, images).model
    plain = furthest(predict(apply_plan(model, plan), images), dense)
    assert plain > 0.05
    assert furthest(predict(repaired, images), dense) < bound * plain
    fresh = builders.images(16, seed=7)
    assert furthest(predict(repaired, fresh), predict(model, fresh)) < 2 * bound * plain


@pytest.mark.parametrize("family", ["vit", "layer_scale", "average_pooling"])
def test_pruned_copies_of_hidden_units_are_taken_over(family: str) -> None:
    model = builders.model(family)
    block: Any = blocks_of(model)[1]
    copied = torch.arange(0, 20)
    with torch.no_grad():
        for tensor in (block.mlp.fc1.weight, block.mlp.fc1.bias):
            tensor[copied + 20] = tensor[copied]
    kept = (*range(20), *range(40, HIDDEN))
    # Not exact: the least ridge is a thousandth of the mean variance.
    check_redundant(model, edited(model, replace(keep_all_block(examine(model).blocks[0]), keep_hidden=kept)), 0.05)


def test_pruned_hidden_units_that_never_vary_go_into_the_bias() -> None:
    model = builders.model()
    block: Any = blocks_of(model)[1]
    with torch.no_grad():
        block.mlp.fc1.weight[:8] = 0
        block.mlp.fc1.bias[:8] = torch.linspace(-1, 3, 8)
    kept = tuple(range(8, HIDDEN))
    check_redundant(model, edited(model, replace(keep_all_block(examine(model).blocks[0]), keep_hidden=kept)), 1e-4)


@pytest.mark.parametrize("family", ["vit", "no_qkv_bias", "layer_scale", "qk_norm"])
def test_pruned_value_channels_that_depend_on_others_cost_nothing(family: str) -> None:
    """Head by head another channel depends on others, with a constant where there is a bias."""
    model = builders.model(family)
    qkv: Any = parts_of(blocks_of(model)[1]).qkv
    with torch.no_grad():
        for channel, one, other in ((3, 1, 5), (8, 9, 10), (23, 16, 22)):
            for tensor in [qkv.weight] + ([] if qkv.bias is None else [qkv.bias]):
                tensor[48 + channel] = 2 * tensor[48 + one] - tensor[48 + other]
            if qkv.bias is not None:
                qkv.bias[48 + channel] += 0.5
    plan = replace(keep_all_block(examine(model).blocks[0]), keep_v=(without(3), without(0), without(7)))
    check_redundant(model, edited(model, plan), 1e-3)


def test_which_value_channels_a_plan_names_does_not_matter_for_their_number_decides() -> None:
    model, images = builders.model(), builders.images(16)
    keep_all = keep_all_block(examine(model).blocks[0])
    logits = [
        predict(repaired_model(model, edited(model, replace(keep_all, keep_v=(kept,) * 3)), images).model, images)
        for kept in ((0, 1, 2, 3), (2, 4, 6, 7))
    ]
    assert furthest(*logits) < 1e-4


@pytest.mark.parametrize("family", ["vit", "no_qkv_bias"])
@pytest.mark.parametrize("narrow", ["q", "k"])
def test_queries_or_keys_of_low_rank_need_no_more_channels_than_their_rank(family: str, narrow: str) -> None:
    model = builders.model(family)
    qkv: Any = parts_of(blocks_of(model)[1]).qkv
    start = 0 if narrow == "q" else 24
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for head in range(3):
            rows = slice(start + 8 * head, start + 8 * head + 8)
            basis = torch.linalg.qr(torch.randn(8, 3, generator=generator)).Q
            for tensor in [qkv.weight] + ([] if qkv.bias is None else [qkv.bias]):
                tensor[rows] = 2 * basis @ (basis.T @ tensor[rows])
    plan = replace(keep_all_block(examine(model).blocks[0]), keep_qk=((0, 1, 2), (1, 2, 3), (2, 5, 7)))
    check_redundant(model, edited(model, plan), 2e-3)


def test_what_is_added_to_all_keys_takes_no_channel() -> None:
    """Softmax does not see it: keys of rank 2 and a constant in a third direction need 2 channels."""
    model = builders.model()
    qkv: Any = parts_of(blocks_of(model)[1]).qkv
    with torch.no_grad():
        for head in range(3):
            rows = slice(24 + 8 * head, 32 + 8 * head)
            qkv.weight[rows] *= torch.tensor([2.0, 2, 0, 0, 0, 0, 0, 0])[:, None]
            qkv.bias[rows] = torch.tensor([0.0, 0, 5, 0, 0, 0, 0, 0])
    plan = replace(keep_all_block(examine(model).blocks[0]), keep_qk=((4, 5), (0, 1), (6, 7)))
    check_redundant(model, edited(model, plan), 2e-3)


# Logit factors


def test_logit_factors_of_full_width_give_the_same_logits() -> None:
    model = builders.toy_model()
    stream = builders.calibration_stream(model, builders.toy_images(24, seed=2), 1, batch_size=10)
    query, key = BlockRepair(stream).logit_factors()
    assert query.shape == key.shape == (3, 8, 8)
    q, k = queries_and_keys(model, 1, builders.toy_images(8, seed=5))
    narrow_q = torch.einsum("bhnd,hkd->bhnk", q, query)
    narrow_k = torch.einsum("bhnd,hkd->bhnk", k, key)
    torch.testing.assert_close(narrow_q @ narrow_k.mT, q @ k.mT, rtol=1e-4, atol=1e-4 * float((q @ k.mT).abs().max()))


def test_logit_factors_share_the_strength_between_queries_and_keys_the_strongest_first() -> None:
    """The second moments of combined queries, and of combined keys around their mean, are one diagonal."""
    model, images = builders.toy_model(), builders.toy_images(24, seed=2)
    stream = builders.calibration_stream(model, images, 1, batch_size=10)
    strength = strengths(stream, *queries_and_keys(model, 1, images))
    assert strength.shape == (3, 8) and (strength.diff(dim=1) <= 0).all() and (strength >= 0).all()


def strengths(stream: CalibrationStream, q: Tensor, k: Tensor) -> Tensor:
    """(H, D): how much each of the factors' combinations counts, on the stream's own queries and keys (B, H, N, D)."""
    weights = stream.sensitivity[stream.index].mid.token_weights(q.shape[2], stream.anatomy.num_prefix_tokens).double()
    centred = k - k.mean(dim=2, keepdim=True)
    diagonals = []
    for part, factor, weight in zip(
        (q, centred), BlockRepair(stream).logit_factors(), (weights, 1 / q.shape[2]), strict=True
    ):
        combined = torch.einsum("bhnd,hkd->bhnk", part, factor)
        moment = torch.einsum("bhnk,bhnl->hkl", combined * torch.as_tensor(weight)[..., None], combined) / len(q)
        diagonals.append(moment.diagonal(dim1=1, dim2=2))
        torch.testing.assert_close(moment, torch.diag_embed(diagonals[-1]), rtol=1e-4, atol=1e-4 * float(moment.max()))
    torch.testing.assert_close(*diagonals, rtol=1e-3, atol=1e-4 * float(diagonals[0].max()))
    return diagonals[0]


@torch.no_grad()
def queries_and_keys(model: nn.Module, index: int, images: Images) -> tuple[Tensor, Tensor]:
    x = embed(model, images.normalized(slice(None)))
    block: Any
    for block in blocks_of(model)[:index]:
        x = block(x)
    block = blocks_of(model)[index]
    q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4).double()
    return q, k


@pytest.mark.parametrize("family", ["vit", "average_pooling"])
def test_logits_of_any_rank_are_the_best_for_one_image(family: str) -> None:
    """Best: the singular value decomposition of the image's own logits, less their mean over keys."""
    model, images = builders.toy_model(family), builders.toy_images(1, seed=2)
    stream = builders.calibration_stream(model, images, 1)
    query, key = BlockRepair(stream).logit_factors()
    q, k = queries_and_keys(model, 1, images)
    strength, num_tokens = strengths(stream, q, k), q.shape[2]
    weights = stream.sensitivity[1].mid.token_weights(num_tokens, stream.anatomy.num_prefix_tokens).double()

    def error(narrow: Tensor, head: int) -> float:
        gap = narrow - q[0, head] @ k[0, head].T
        gap = gap - gap.mean(dim=1, keepdim=True)
        return float((weights[:, None] * gap**2).sum()) / num_tokens

    for head in range(3):
        logits = q[0, head] @ k[0, head].T
        centred = weights.sqrt()[:, None] * (logits - logits.mean(dim=1, keepdim=True))
        singular = torch.linalg.svdvals(centred)[:8] ** 2 / num_tokens
        torch.testing.assert_close(strength[head].square(), singular, rtol=1e-3, atol=1e-4 * float(singular[0]))
        for rank in range(1, 8):
            narrow = (q[0, head] @ query[head, :rank].T) @ (k[0, head] @ key[head, :rank].T).T
            least = float(singular[rank:].sum())
            assert error(narrow, head) == pytest.approx(least, rel=1e-2, abs=1e-4 * float(singular[0]))


# Against the plain cut


@torch.no_grad()
def outputs(block: nn.Module, model: nn.Module, index: int, images: Images) -> Tensor:
    x = embed(model, images.normalized(slice(None)))
    for dense in blocks_of(model)[:index]:
        x = dense(x)
    return block(x)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_repaired_block_errs_less_than_a_plain_one_on_images_it_has_not_seen(index: int) -> None:
    model, fresh = builders.toy_model(), builders.toy_images(64, seed=3)
    stream = builders.calibration_stream(model, builders.toy_images(128, seed=2), index)
    place = stream.sensitivity[index].out
    weights = place.token_weights(17, 1)
    dense = outputs(blocks_of(model)[index], model, index, fresh)

    def error(block: nn.Module) -> float:
        gap = outputs(block, model, index, fresh) - dense
        return float(((gap @ place.metric.float() * gap).sum(dim=-1) * weights).sum(dim=1).mean())

    for seed in range(4):
        plan = builders.plan(examine(model), seed=seed).blocks[index]
        plain, repaired = error(stream.slim(plan)), error(repair_block(stream, plan).block)
        assert repaired < 0.8 * plain, seed


@pytest.mark.parametrize("family", ["no_qkv_bias", "qk_norm"])
def test_repaired_models_of_random_weights_are_nearer_to_the_dense_one(family: str) -> None:
    model, calibration, fresh = builders.model(family), builders.images(128), builders.images(128, seed=1)
    sensitivity, dense = measure_sensitivity(model, calibration), predict(model, fresh)
    for seed in range(3):
        plan = builders.plan(examine(model), seed=seed)
        repaired = predict(repaired_model(model, plan, calibration, sensitivity).model, fresh)
        assert kl(dense, repaired) < 0.8 * kl(dense, predict(apply_plan(model, plan), fresh)), seed


@pytest.mark.parametrize("family", ["vit", "average_pooling", "layer_scale"])
def test_repaired_models_all_answer_better_and_are_on_average_much_nearer_to_the_dense_one(family: str) -> None:
    model, fresh = builders.toy_model(family), builders.toy_images(256, seed=3)
    calibration = builders.toy_images(128, seed=2)
    sensitivity, dense = measure_sensitivity(model, calibration), predict(model, fresh)
    with_repair: list[tuple[float, float]] = []
    without_repair: list[tuple[float, float]] = []
    for seed in range(3):
        plan = builders.plan(examine(model), seed=seed)
        repaired, cut = repaired_model(model, plan, calibration, sensitivity).model, apply_plan(model, plan)
        check_shapes(repaired, cut)
        for logits, scores in ((predict(repaired, fresh), with_repair), (predict(cut, fresh), without_repair)):
            scores.append((kl(dense, logits), top1(logits, fresh.labels)))
        assert with_repair[-1][1] > without_repair[-1][1] + 0.05, seed
    (lost, right), (plain_lost, plain_right) = (
        torch.tensor(scores).mean(dim=0).tolist() for scores in (with_repair, without_repair)
    )
    assert lost < 0.6 * plain_lost
    assert right > plain_right + 0.1


@pytest.mark.parametrize("family", ["average_pooling", "layer_scale"])
def test_the_second_mlp_layer_regresses_what_it_loses_and_what_the_stream_has_lost_before(family: str) -> None:
    """The regression is done by hand, from the blocks' own outputs; the first block is pruned, so the stream drifts."""
    model, images = builders.toy_model(family).requires_grad_(False), builders.toy_images(200, seed=2)
    regressed = set()
    anatomy = examine(model)
    sensitivity, kept = measure_sensitivity(model, images), tuple(range(0, HIDDEN, 3))
    entering, parts = embed(model, images.normalized(slice(None))), parts_of(blocks_of(model)[1])
    dense_out = blocks_of(model)[1](blocks_of(model)[0](entering))
    gain, cut, place = parts.ls2(torch.ones(24)), parts.fc2.weight[:, kept], sensitivity[1].out
    weight = place.token_weights(entering.shape[1], anatomy.blocks[1].num_prefix_tokens).repeat(200)
    is_held = (torch.arange(200) % 4 == 3).repeat_interleave(entering.shape[1])
    metric = gain.double()[:, None] * place.metric * gain.double()
    for seed in range(6):
        plans = builders.plan(anatomy, seed=seed).blocks
        stream = CalibrationStream(model, images, sensitivity, token_reduction="lfe", cutoff_token=0.85)
        first = repair_block(stream, plans[0]).block
        stream.advance(first)
        slim: Any = repair_block(stream, replace(plans[1], keep_hidden=kept)).block

        x = first(entering)
        mid = x + slim.ls1(slim.attn(slim.norm1(x)))
        hidden = parts.act(parts.fc1(parts.norm2(mid)))
        lost = parts.fc2(hidden) - parts.fc2.bias - hidden[..., kept] @ cut.T
        drift = (dense_out - mid - gain * parts.fc2(hidden)) / gain
        expected, features = cut.double(), hidden[..., kept].flatten(0, 1)
        for what, target in (("lost", lost), ("drift", drift)):
            slope = reference.ridge_slope(features, target.flatten(0, 1), is_held, metric, weight, centred=True)
            if slope is not None:
                regressed.add(what)
                expected = expected + slope
        torch.testing.assert_close(slim.mlp.fc2.weight.double(), expected, rtol=1e-2, atol=2e-3)
        # The bias makes the weighted mean that of the dense stream.
        repaired, dense, bent = (
            (stream.flatten(0, 1) * weight[:, None]).sum(dim=0) / 200 for stream in (slim(x), dense_out, x)
        )
        torch.testing.assert_close(repaired, dense, rtol=1e-4, atol=1e-4)
        assert furthest(bent, dense) > 1e-2
    assert regressed == {"lost", "drift"}


# Token reductions


@pytest.mark.parametrize("family", ["vit", "no_qkv_bias", "average_pooling"])
def test_queries_keys_and_values_of_merged_tokens_are_refitted_to_the_means_of_the_dense_ones(family: str) -> None:
    """The regression is done by hand: behind the norm, from the merged tokens to the mean of those that they are."""
    model, images = builders.model(family).requires_grad_(False), builders.images(60)
    anatomy, sensitivity = examine(model).blocks[0], measure_sensitivity(model, images)
    stream = CalibrationStream(model, images, sensitivity, token_reduction="merge", cutoff_token=0.85, batch_size=25)
    stream.advance(repair_block(stream, keep_all_block(anatomy, 6)).block)
    slim: Any = repair_block(stream, replace(keep_all_block(anatomy, 6), keep_hidden=tuple(range(50)))).block

    parts, (x, _), share = parts_of(blocks_of(model)[1]), unpack(stream.x, anatomy.width), stream.share
    assert share is not None
    merged = parts.norm1(x).flatten(0, 1).double()
    means = (share @ parts.norm1(blocks_of(model)[0](embed(model, images.normalized(slice(None)))))).flatten(0, 1)
    weight, matrix = (
        sensitivity[0].out.token_weights(x.shape[1], anatomy.num_prefix_tokens).repeat(60),
        parts.qkv.weight,
    )
    is_held, has_bias = (torch.arange(60) % 4 == 3).repeat_interleave(x.shape[1]), parts.qkv.bias is not None
    slope = reference.ridge_slope(
        merged, means - merged, is_held, (matrix.T @ matrix).double(), weight, centred=has_bias
    )
    assert slope is not None and float(slope.abs().max()) > 0.05
    expected = matrix.double() @ (torch.eye(24) + slope)
    torch.testing.assert_close(slim.attn.qkv.weight[:48].double(), expected[:48], rtol=1e-3, atol=1e-4)
    if has_bias:
        shift = ((weight[:, None] * (means - merged - merged @ slope.T)).sum(dim=0) / weight.sum()).double()
        bias = parts.qkv.bias + matrix.double() @ shift
        torch.testing.assert_close(slim.attn.qkv.bias[:48].double(), bias[:48], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_tokens_that_are_all_there_have_the_queries_and_keys_of_the_dense_block() -> None:
    model = builders.model()
    stream = builders.calibration_stream(model, builders.images(24), 0)
    stream.advance(repair_block(stream, builders.plan(examine(model)).blocks[0]).block)
    slim: Any = repair_block(stream, replace(keep_all_block(stream.anatomy), keep_hidden=tuple(range(50)))).block
    assert torch.equal(slim.attn.qkv.weight[:48], parts_of(blocks_of(model)[1]).qkv.weight[:48])


@pytest.mark.parametrize(("family", "kind"), builders.in_rotation(list(builders.FAMILIES), TOKEN_REDUCTIONS, 2))
def test_every_family_and_every_token_reduction_is_repaired(family: str, kind: TokenReduction) -> None:
    """The stream ends with the tokens that the repaired model computes, sizes included."""
    model, images = builders.model(family), builders.images(6)
    anatomy = examine(model)
    prefix, width = anatomy.blocks[0].num_prefix_tokens, anatomy.blocks[0].width
    plan = replace(builders.plan(anatomy, seed=1, num_tokens=(16, 9, 4)), token_reduction=kind)
    plan = replace(plan, blocks=(replace(plan.blocks[0], num_tokens=13), *plan.blocks[1:]))
    sensitivity = measure_sensitivity(model, images)
    stream = CalibrationStream(
        model, images, sensitivity, token_reduction=kind, cutoff_token=plan.cutoff_token, batch_size=3
    )
    for block, count in zip(plan.blocks, (13, 9, 4), strict=True):
        repaired = repair_block(stream, block)
        assert isinstance(repaired.block, SlimBlock)
        is_last = repaired.block.is_last
        stream.advance(repaired.block)
        x, size = unpack(stream.x, width)
        assert x.shape == (6, prefix + count, width) and x.isfinite().all()
        assert (size is not None) == (merges(kind) and not is_last)
        if size is not None:
            assert (size[:, prefix:].sum(dim=1) == 16).all()
        assert stream.share is not None
        assert stream.share.shape == (6, prefix + count, prefix + 16)
        torch.testing.assert_close(stream.share.sum(dim=2), torch.ones(stream.share.shape[:2]))
        if size is not None:
            torch.testing.assert_close(stream.share.square().sum(dim=2), 1 / size[..., 0])
    at_once = repaired_model(model, plan, images, sensitivity, batch_size=3).model
    check_shapes(at_once, apply_plan(model, plan))
    with torch.no_grad():
        torch.testing.assert_close(
            predict(at_once, images, batch_size=3), classify(model, stream.x), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", TOKEN_REDUCTIONS)
def test_repair_pays_with_reduced_tokens_too(kind: TokenReduction) -> None:
    model, calibration, fresh = builders.toy_model(), builders.toy_images(96, seed=2), builders.toy_images(128, seed=3)
    sensitivity, dense = measure_sensitivity(model, calibration), predict(model, fresh)
    for seed in range(2):
        plan = replace(builders.plan(examine(model), seed=seed, num_tokens=(14, 10, 10)), token_reduction=kind)
        repaired = predict(repaired_model(model, plan, calibration, sensitivity).model, fresh)
        assert kl(dense, repaired) < 0.7 * kl(dense, predict(apply_plan(model, plan), fresh)), seed


# Few images


@pytest.mark.parametrize("count", [1, 3])
def test_with_too_few_images_to_hold_some_out_only_the_biases_are_repaired(count: int) -> None:
    model, images = builders.toy_model(), builders.toy_images(count, seed=2)
    anatomy = examine(model)
    plan = builders.plan(anatomy, seed=1)
    plan = replace(plan, blocks=(plan.blocks[0], keep_all_block(anatomy.blocks[0]), plan.blocks[2]))
    repaired = repaired_model(model, plan, images)
    assert predict(repaired.model, builders.toy_images(32, seed=3)).isfinite().all()
    assert repaired.notes == tuple(
        f"block {index} {layer}: only the bias is repaired"
        for index in (0, 2)
        for layer in ("projection", "second MLP layer")
    )
    for index in (0, 2):
        got, cut = (parts_of(blocks_of(of)[index]).fc2 for of in (repaired.model, apply_plan(model, plan)))
        assert torch.equal(got.weight, cut.weight)
        assert not torch.equal(got.bias, cut.bias)


def test_a_bias_that_alone_is_repaired_makes_the_mean_that_of_the_dense_stream() -> None:
    """One image, hidden units alone: the weighted mean over tokens of what leaves the block is the dense one."""
    model, images = builders.toy_model(), builders.toy_images(1, seed=2)
    stream = builders.calibration_stream(model, images, 1)
    plan = replace(keep_all_block(stream.anatomy), keep_hidden=tuple(range(0, HIDDEN, 3)))
    weights = stream.sensitivity[1].out.token_weights(17, 1)[:, None]
    dense, plain, repaired = (
        (outputs(block, model, 1, images)[0] * weights).sum(dim=0)
        for block in (blocks_of(model)[1], stream.slim(plan), repair_block(stream, plan).block)
    )
    torch.testing.assert_close(repaired, dense, rtol=1e-4, atol=1e-4)
    assert furthest(plain, dense) > 0.01


def test_a_layer_that_loses_nothing_is_not_noted() -> None:
    model = builders.toy_model()
    keep_all = keep_all_block(examine(model).blocks[0])
    for plan, layers in (
        (replace(keep_all, keep_hidden=tuple(range(40))), {"second MLP layer"}),
        (replace(keep_all, keep_v=((0, 1, 2),) * 3), {"projection"}),
    ):
        notes = repaired_model(model, edited(model, plan), builders.toy_images(2, seed=2)).notes
        assert set(notes) == {f"block 1 {layer}: only the bias is repaired" for layer in layers}


@pytest.mark.parametrize(
    ("family", "count"), builders.in_rotation(["vit", "no_qkv_bias", "qk_norm", "layer_scale"], [1, 4, 9], 2)
)
def test_images_that_are_all_the_same_do_not_explode(family: str, count: int) -> None:
    model = builders.model(family)
    images = builders.toy_images(1, seed=2).take(torch.zeros(count, dtype=torch.long))
    plan = replace(builders.plan(examine(model), seed=2, num_tokens=(16, 9, 9)), token_reduction="merge")
    fresh = builders.toy_images(64, seed=3)
    dense, plain = predict(model, fresh), predict(apply_plan(model, plan), fresh)
    repaired = predict(repaired_model(model, plan, images).model, fresh)
    assert repaired.isfinite().all()
    assert furthest(repaired, dense) < 3 * max(furthest(plain, dense), float(dense.abs().max()))


@pytest.mark.parametrize("value", [0, 255])
def test_blank_images_do_not_explode(value: int) -> None:
    model, blank = builders.toy_model(), builders.toy_images(8, seed=2)
    blank = replace(blank, pixels=torch.full_like(blank.pixels, value))
    repaired = repaired_model(model, builders.plan(examine(model), seed=2), blank).model
    assert predict(repaired, builders.toy_images(16, seed=3)).isfinite().all()
    assert furthest(predict(repaired, blank), predict(model, blank)) < 1e-2


# Kinds of models


@pytest.mark.parametrize("layer", ["ls1", "ls2"])
@pytest.mark.parametrize("channels", [slice(0, 24), slice(0, 5)])
def test_a_layer_scale_of_zero_is_not_divided_by(layer: str, channels: slice) -> None:
    model, calibration, fresh = (
        builders.toy_model("layer_scale"),
        builders.toy_images(64, seed=2),
        builders.toy_images(64, seed=3),
    )
    for block in blocks_of(model):
        with torch.no_grad():
            getattr(block, layer).gamma[channels] = 0
    plan = builders.plan(examine(model), seed=3)
    repaired = repaired_model(model, plan, calibration).model
    assert all(parameter.isfinite().all() for parameter in repaired.parameters())
    assert max(float(parameter.detach().abs().max()) for parameter in repaired.parameters()) < 1e3
    dense, plain = predict(model, fresh), predict(apply_plan(model, plan), fresh)
    assert kl(dense, predict(repaired, fresh)) < kl(dense, plain)


@pytest.mark.parametrize("layer", ["proj", "fc2"])
def test_a_layer_without_bias_gets_none(layer: str) -> None:
    model = builders.toy_model()
    for block in blocks_of(model):
        setattr(block.attn if layer == "proj" else block.mlp, layer, unbiased(getattr(parts_of(block), layer)))
    calibration, fresh = builders.toy_images(128, seed=2), builders.toy_images(128, seed=3)
    dense, plan = predict(model, fresh), builders.plan(examine(model), seed=1)
    repaired, cut = repaired_model(model, plan, calibration).model, apply_plan(model, plan)
    check_shapes(repaired, cut)
    assert kl(dense, predict(repaired, fresh)) < 0.6 * kl(dense, predict(cut, fresh))


def unbiased(layer: nn.Linear) -> nn.Linear:
    without_bias = nn.Linear(layer.in_features, layer.out_features, bias=False)
    without_bias.weight = layer.weight
    return without_bias
