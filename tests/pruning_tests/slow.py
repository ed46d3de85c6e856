"""The definitions, written out one image, one head, one token at a time: what the fast code is held against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pruning.anatomy import Anatomy, classify, embed, examine
from pruning.plan import Plan


def filtered(sequence: list[list[float]], cutoff: float) -> list[list[float]]:
    """A sequence of vectors through the Gaussian low-pass filter, by the definition of the Fourier transform."""
    count, width = len(sequence), len(sequence[0])
    deviation = cutoff * count / 2
    passed = [[0.0] * width for _ in range(count)]
    for here in range(count):
        for there in range(count):
            weight = 0.0
            for k in range(count):
                frequency = min(k, count - k)
                gain = math.exp(-(frequency**2) / (2 * deviation**2))
                weight += gain * math.cos(2 * math.pi * k * (here - there) / count) / count
            for channel in range(width):
                passed[here][channel] += weight * sequence[there][channel]
    return passed


def token_scores(x: Tensor, attention: Tensor, cutoff: float, anatomy: Anatomy) -> list[float]:
    """LFE times the attention part of every patch token of one image. x: (N, C), attention: (H, N, N)."""
    prefix, num_heads = anatomy.num_prefix_tokens, len(attention)
    patches = x[prefix:].tolist()
    passed = filtered(patches, cutoff)
    a = attention.tolist()
    image_tokens = range(prefix, len(x))
    scores = []
    for i in image_tokens:
        energy = math.hypot(*passed[i - prefix]) / math.hypot(*patches[i - prefix])
        part = 0.0
        for h in range(num_heads):
            received = sum(a[h][j][i] for j in image_tokens) / len(image_tokens)
            if anatomy.has_class_token:
                to_class = sum(a[h][j][0] for j in image_tokens) / len(image_tokens)
                part += a[h][0][i] * to_class + a[h][0][0] * received
            else:
                part += received
        scores.append(energy * part / num_heads)
    return scores


@torch.no_grad()
def logits(model: Any, plan: Plan, images: Tensor) -> Tensor:
    """What the pruned model gives, from the dense one: units that go are left out of the sums."""
    anatomy = examine(model)
    prefix, width = anatomy.num_prefix_tokens, anatomy.head_dim
    inner = anatomy.num_heads * width
    rows = []
    for image in images:
        x = embed(model, image[None])[0]
        for block, kept in zip(model.blocks, plan.blocks, strict=True):
            qkv = block.attn.qkv(block.norm1(x))
            mixed = torch.zeros(len(x), inner, dtype=x.dtype)
            maps = []
            for head, qk, v in zip(kept.keep_heads, kept.keep_qk, kept.keep_v, strict=True):
                of_qk = [head * width + channel for channel in qk]
                of_v = [head * width + channel for channel in v]
                q = block.attn.q_norm(qkv[:, of_qk])
                k = block.attn.k_norm(qkv[:, [inner + channel for channel in of_qk]])
                maps.append((q @ k.T / math.sqrt(width)).softmax(dim=1))
                mixed[:, of_v] = maps[-1] @ qkv[:, [2 * inner + channel for channel in of_v]]
            x = x + block.ls1(block.attn.proj(mixed))
            if kept.num_tokens < len(x) - prefix:
                scores = token_scores(x, torch.stack(maps), plan.cutoff_token, anatomy)
                best = sorted(range(len(scores)), key=lambda i: -scores[i])[: kept.num_tokens]
                x = torch.cat([x[:prefix], x[[prefix + i for i in sorted(best)]]])
            hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
            stays = torch.zeros(anatomy.num_hidden, dtype=x.dtype)
            stays[list(kept.keep_hidden)] = 1
            x = x + block.ls2(block.mlp.fc2(hidden * stays))
        rows.append(classify(model, x[None])[0])
    return torch.stack(rows)
