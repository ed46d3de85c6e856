"""The slim layers: K != V attention, and the tokens that are dropped, image by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pruning.layers import SlimAttention, TokenDrop
from pruning.scores.lfe import score_tokens
from tests.pruning_tests.test_lfe import attention, tokens


def token_drop(count: int, keep: int, prefix: int = 1) -> TokenDrop:
    return TokenDrop(num_patches=count, num_keep=keep, num_prefix_tokens=prefix, has_class_token=prefix > 0, cutoff=0.5)


def scores_of(drop: TokenDrop, x: Tensor, maps: Tensor) -> Tensor:
    return score_tokens(
        x, maps, drop.token_filter, num_prefix_tokens=drop.num_prefix_tokens, has_class_token=drop.has_class_token
    )


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("keep", [1, 4, 8, 9])
def test_prefix_and_the_best_patches_stay_in_their_order(prefix: int, keep: int) -> None:
    drop, x, maps = token_drop(9, keep, prefix), tokens(prefix + 9, images=6), attention(prefix + 9, images=6)
    scores = scores_of(drop, x, maps).tolist()
    for image, of_patches, out in zip(x, scores, drop(x, maps), strict=True):
        best = sorted(sorted(range(9), key=lambda i: -of_patches[i])[:keep])
        assert torch.equal(out, torch.stack([*image[:prefix], *(image[prefix + i] for i in best)]))


def test_images_keep_tokens_of_their_own() -> None:
    drop, x = token_drop(9, 3), tokens(10, images=8)
    numbered = x.clone()
    numbered[..., 0] = torch.arange(10)
    kept = drop(numbered, attention(10, images=8))[..., 0]
    assert len({tuple(row) for row in kept.tolist()}) > 1


def test_tokens_of_equal_score_leave_as_many_as_asked() -> None:
    drop, x = token_drop(8, 5), torch.ones(2, 9, 6)
    assert drop(x, torch.full((2, 3, 9, 9), 1 / 9)).shape == (2, 6, 6)


def test_the_token_filter_is_no_weight() -> None:
    assert not token_drop(9, 3).state_dict()


def slim_attention(qk_width: int, v_width: int, *, bias: bool = True) -> SlimAttention:
    torch.manual_seed(0)
    return SlimAttention(
        nn.Linear(12, 2 * (2 * qk_width + v_width), bias=bias),
        nn.Linear(2 * v_width, 12),
        num_heads=2,
        qk_width=qk_width,
        v_width=v_width,
        scale=0.7,
        q_norm=nn.Identity(),
        k_norm=nn.Identity(),
    )


@pytest.mark.parametrize("widths", [(5, 2), (2, 5), (3, 3), (1, 4), (4, 1)])
def test_the_fused_attention_equals_a_loop_over_heads(widths: tuple[int, int]) -> None:
    qk, v = widths
    layer = slim_attention(qk, v)
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))
    out, maps = layer.forward_with_map(x)
    queries, keys, values = layer.qkv(x).split([2 * qk, 2 * qk, 2 * v], dim=-1)
    mixed = []
    for head in range(2):
        q, k = queries[..., head * qk : (head + 1) * qk], keys[..., head * qk : (head + 1) * qk]
        expected = torch.softmax(0.7 * q @ k.transpose(1, 2), dim=-1)
        torch.testing.assert_close(maps[:, head], expected)
        mixed.append(expected @ values[..., head * v : (head + 1) * v])
    torch.testing.assert_close(out, layer.proj(torch.cat(mixed, dim=-1)))
    torch.testing.assert_close(layer(x), out)
