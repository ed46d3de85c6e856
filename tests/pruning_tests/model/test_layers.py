"""The slim layers: attention with K != V, and tokens that stand for several patches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pruning.model.layers import SlimAttention, SlimBlock, SlimMlp, log_size, unpack
from pruning.model.tokens import REDUCERS

WIDTHS = [(5, 2), (2, 5), (3, 3), (1, 4), (4, 1)]


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


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn_sizes(images: int, count: int) -> Tensor:
    return torch.randint(1, 5, (images, count, 1), generator=torch.Generator().manual_seed(3)).float()


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("has_sizes", [False, True])
def test_the_fused_attention_equals_a_loop_over_heads(widths: tuple[int, int], has_sizes: bool) -> None:
    qk, v = widths
    layer, x = slim_attention(qk, v), drawn(3, 7, 12)
    size = drawn_sizes(3, 7) if has_sizes else None
    copies = torch.ones(3, 1, 7) if size is None else size.transpose(1, 2)
    parts = layer.project(x)
    out, maps = layer.mix_with_map(*parts, size)
    queries, keys, values = layer.qkv(x).split([2 * qk, 2 * qk, 2 * v], dim=-1)
    mixed = []
    for head in range(2):
        q, k = queries[..., head * qk : (head + 1) * qk], keys[..., head * qk : (head + 1) * qk]
        strength = copies * torch.exp(0.7 * q @ k.transpose(1, 2))
        expected = strength / strength.sum(dim=2, keepdim=True)
        torch.testing.assert_close(maps[:, head], expected)
        mixed.append(expected @ values[..., head * v : (head + 1) * v])
    torch.testing.assert_close(out, torch.cat(mixed, dim=-1))
    torch.testing.assert_close(layer.mix(*parts, size), out)
    if size is None:
        torch.testing.assert_close(layer(x), layer.proj(out))


@pytest.mark.parametrize("widths", WIDTHS)
def test_a_token_of_size_n_counts_as_n_equal_tokens(widths: tuple[int, int]) -> None:
    layer, x, size = slim_attention(*widths), drawn(3, 7, 12), drawn_sizes(3, 7)
    mixed = layer.mix(*layer.project(x), size)
    for image, of_image, copies in zip(x, mixed, size[..., 0].long(), strict=True):
        repeated = image.repeat_interleave(copies, dim=0)[None]
        torch.testing.assert_close(layer.mix(*layer.project(repeated))[0], of_image.repeat_interleave(copies, dim=0))


def test_sizes_of_one_add_nothing() -> None:
    layer, x = slim_attention(4, 4), drawn(2, 5, 12)
    torch.testing.assert_close(layer.mix(*layer.project(x), torch.ones(2, 5, 1)), layer.mix(*layer.project(x)))
    assert log_size(None, torch.float32) is None
    bias = log_size(torch.tensor([1.0, 4.0])[None, :, None], torch.float64)
    assert bias is not None and bias.dtype == torch.float64 and bias.shape == (1, 1, 1, 2)
    torch.testing.assert_close(bias.flatten(), torch.tensor([0.0, 1.3862943611198906], dtype=torch.float64))


def slim_block(*, keep: int | None, is_last: bool) -> SlimBlock:
    merge = None
    if keep is not None:
        merge = REDUCERS["merge"](num_patches=8, num_keep=keep, num_prefix_tokens=1, has_class_token=True, cutoff=0.5)
    return SlimBlock(
        downsample=None, norm1=nn.LayerNorm(12), attn=slim_attention(4, 3), ls1=nn.Identity(), reducer=merge,
        norm2=nn.LayerNorm(12), mlp=SlimMlp(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)), ls2=nn.Identity(),
        is_last=is_last,
    )  # fmt: skip


@pytest.mark.parametrize("is_last", [False, True])
def test_sizes_are_one_channel_more_that_the_last_block_takes_off(is_last: bool) -> None:
    x = torch.cat([drawn(2, 9, 12), torch.ones(2, 9, 1)], dim=2)
    x[:, 3:, 12] = torch.tensor([1.0, 2, 3, 4, 5, 6])
    for keep, total in ((None, 24.0), (5, 24.0)):
        out = slim_block(keep=keep, is_last=is_last)(x)
        assert out.shape == (2, 9 if keep is None else 6, 12 if is_last else 13)
        tokens, size = unpack(out, 12)
        assert tokens.shape[2] == 12
        if is_last:
            assert size is None
        else:
            assert size is not None and size.sum(dim=1).tolist() == [[total], [total]]
            assert keep is not None or torch.equal(size, x[..., 12:])


def test_the_size_of_a_token_is_no_feature_of_it() -> None:
    x, block = drawn(2, 9, 12), slim_block(keep=None, is_last=False)
    out = block(torch.cat([x, torch.full((2, 9, 1), 3.0)], dim=2))
    torch.testing.assert_close(out[..., :12], block(x))  # equal sizes change nothing but the sizes
    other = torch.cat([x, drawn_sizes(2, 9)], dim=2)
    assert (block(other)[..., :12] - block(x)).abs().max() > 1e-3
