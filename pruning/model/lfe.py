"""Low-frequency energy: a score of the tokens that carry the image (VTC-LFC, eq. 6-9).

B images, N tokens, P prefix tokens, M = N - P patch tokens, H heads, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_frequency_energy(patches: Tensor, token_filter: Tensor) -> Tensor:
    """Returns the share of each token that passes the low-pass filter: |(F x)_i| / |x_i|, L2 norms (eq. 6).

    Args:
        patches: (B, M, C) patch tokens, as a sequence.
        token_filter: (M, M), from `pruning.spectrum.token_filter`.

    Returns:
        (B, M), at least 0; 1 for a constant sequence; 0 for a token that is zero.
    """
    passed = torch.linalg.vector_norm((token_filter.to(patches.dtype) @ patches).float(), dim=-1)
    norm = torch.linalg.vector_norm(patches.float(), dim=-1)
    return torch.where(norm > 0, passed / norm.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def attention_received(attention: Tensor, num_prefix_tokens: int, has_class_token: bool) -> Tensor:
    """Returns the attention of the class token to each patch, direct and through the other patches (eq. 7-9).

    Computed head by head, then averaged: A(cls, i) * mean_j A(j, cls) + A(cls, cls) * mean_j A(j, i),
    j over the patches. Without a class token: mean_j A(j, i).

    Args:
        attention: (B, H, N, N), rows are queries and sum to one.

    Returns:
        (B, M), at least 0.
    """
    patches = slice(num_prefix_tokens, None)
    attention = attention.float()
    from_patches = attention[:, :, patches, patches].mean(dim=2)
    if not has_class_token:
        return from_patches.mean(dim=1)
    to_class = attention[:, :, patches, 0].mean(dim=2, keepdim=True)
    direct = attention[:, :, 0, patches] * to_class
    return (direct + attention[:, :, 0, :1] * from_patches).mean(dim=1)


def score_tokens(
    x: Tensor, attention: Tensor, token_filter: Tensor, *, num_prefix_tokens: int, has_class_token: bool
) -> Tensor:
    """Scores every patch token by its low-frequency energy times the attention it receives.

    Args:
        x: (B, N, C) tokens after the block's attention.
        attention: (B, H, N, N) of the same block.
        token_filter: (M, M).

    Returns:
        (B, M).
    """
    energy = low_frequency_energy(x[:, num_prefix_tokens:], token_filter)
    return energy * attention_received(attention, num_prefix_tokens, has_class_token)
