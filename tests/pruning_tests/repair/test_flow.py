"""The stream of calibration images: its samples, and its dense tokens reduced as the pruned ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.model.anatomy import embed
from pruning.model.layers import SlimBlock
from pruning.model.surgery import keep_all_block
from pruning.plan import TOKEN_REDUCTIONS, TokenReduction
from pruning.repair.flow import PATCH_SAMPLES, CalibrationStream, sample_tokens
from tests.pruning_tests import builders


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("patches", [1, PATCH_SAMPLES, 2 * PATCH_SAMPLES - 1, 2 * PATCH_SAMPLES, 200])
def test_sampled_patches_weigh_as_much_as_all_and_no_place_is_left_out(prefix: int, patches: int) -> None:
    num_tokens, seen = prefix + patches, torch.zeros(prefix + patches)
    weights = torch.full((num_tokens,), 0.5 / patches)
    weights[:prefix] = 3.0
    places = torch.arange(num_tokens, dtype=torch.float32)[None, :, None].expand(2, -1, 1)
    stream = SimpleNamespace(
        anatomy=SimpleNamespace(num_prefix_tokens=prefix), batch_size=2, is_held=torch.arange(16) % 4 == 3
    )
    for start in range(0, 16, 2):
        batch: Any = SimpleNamespace(stream=stream, rows=slice(start, start + 2))
        values, counts, is_held = sample_tokens(batch, weights, places, 10 * places)
        assert torch.equal(values[:, 1], 10 * values[:, 0])
        assert float(counts.sum()) == pytest.approx(2 * float(weights.sum()), rel=1e-5)
        assert int(is_held.sum()) == (len(values) // 2 if start % 4 == 2 else 0)
        assert values[is_held, 0].tolist() == (values[: len(values) // 2, 0].tolist() if start % 4 == 2 else [])
        taken = values[: len(values) // 2, 0].long()
        assert taken[:prefix].tolist() == list(range(prefix))
        assert len(taken) - prefix >= min(patches, PATCH_SAMPLES)
        assert counts[:prefix].tolist() == [3.0] * prefix
        seen[taken] += 1
    assert (seen > 0).all()


@pytest.mark.parametrize("kind", TOKEN_REDUCTIONS)
@torch.no_grad()
def test_the_dense_stream_is_reduced_as_the_pruned_one(kind: TokenReduction) -> None:
    """Both streams are the same right after a reduction of tokens, if nothing else was pruned."""
    model = builders.model("registers")
    stream = builders.calibration_stream(model, builders.images(6), 1, kind)
    block = stream.slim(keep_all_block(stream.anatomy, 7))
    for batch in stream.batches(block):
        assert isinstance(block, SlimBlock)
        tokens = torch.arange(stream.num_all_tokens)
        drift = batch.missing(stream.dense_mid, tokens) - block.ls1(block.attn.proj(batch.mixed))
        assert float(drift.abs().max()) < 1e-5
        batch.reduce()
        assert batch.share is not None
        torch.testing.assert_close(batch.share @ stream.dense_mid[batch.rows], batch.x, rtol=1e-4, atol=1e-4)


def tensors(stream: CalibrationStream) -> list[Tensor]:
    return [stream.x, stream.dense_mid, stream.dense_out]


@torch.no_grad()
def test_a_stream_holds_the_input_and_the_halves_of_its_block_and_a_copy_moves_alone() -> None:
    model, images = builders.model("layer_scale"), builders.images(6)
    stream = builders.calibration_stream(model, images, 1, batch_size=4)
    block: Any = stream.blocks[1]
    x = stream.blocks[0](embed(model, images.normalized(slice(None))))
    mid = x + block.ls1(block.attn(block.norm1(x)))
    for held, expected in zip(tensors(stream), (x, mid, block(x)), strict=True):
        torch.testing.assert_close(held, expected, rtol=1e-5, atol=1e-5)
    before, copied = [tensor.clone() for tensor in tensors(stream)], stream.copy()
    copied.advance(block)
    assert (stream.index, copied.index) == (1, 2)
    assert all(map(torch.equal, tensors(stream), before))
    torch.testing.assert_close(copied.x, block(x), rtol=1e-5, atol=1e-5)


def test_a_stream_that_is_turned_to_a_block_is_as_one_that_came_there_through_dense_blocks() -> None:
    model, images = builders.model(), builders.images(6)
    came, turned = (builders.calibration_stream(model, images, index, "merge") for index in (1, 0))
    turned.advance(turned.slim(keep_all_block(turned.anatomy, 9)))
    assert turned.share is not None and turned.num_tokens == 9
    turned.turn_to(1, came.x)
    assert turned.share is None and (turned.num_tokens, turned.num_all_tokens) == (16, 17)
    assert all(map(torch.equal, tensors(turned), tensors(came)))
