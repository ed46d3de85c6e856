"""The definitions, written out one image, one head, one token at a time, which the fast code is held against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pruning.model.anatomy import BlockAnatomy, classify, embed, examine
from pruning.plan import Plan, TokenReduction
from pruning.repair.regression import RIDGES


def filtered(sequence: list[list[float]], cutoff: float) -> list[list[float]]:
    """Filters a sequence of vectors by the Gaussian low-pass, by the definition of the Fourier transform."""
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


def token_scores(x: Tensor, attention: Tensor, cutoff: float, anatomy: BlockAnatomy) -> list[float]:
    """Multiplies LFE and the attention part of every patch token of one image. x: (N, C), attention: (H, N, N)."""
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


def class_attention(q: Tensor, k: Tensor, size: list[float], scale: float, anatomy: BlockAnatomy) -> list[float]:
    """Returns the attention of the class token, or of the mean patch, to every patch of one image. q, k: (H, N, K)."""
    prefix = anatomy.num_prefix_tokens
    paid = [0.0] * (q.shape[1] - prefix)
    for of_head, keys in zip(q, k, strict=True):
        query = of_head[0] if anatomy.has_class_token else of_head[prefix:].mean(dim=0)
        strength = [n * math.exp(scale * float(query @ key)) for n, key in zip(size, keys, strict=True)]
        for patch in range(len(paid)):
            paid[patch] += strength[prefix + patch] / sum(strength) / len(q)
    return paid


def fused(attention: list[float], keep: int) -> list[dict[int, float]]:
    """Keeps the patches of most attention; in the place of the last of them is its mean with all others (EViT)."""
    order = sorted(range(len(attention)), key=lambda patch: -attention[patch])
    stay, host = sorted(order[:keep]), order[keep - 1]
    return [{i: attention[i] for i in order[keep - 1 :]} if patch == host else {patch: 1.0} for patch in stay]


def merged(keys: list[list[float]], size: list[float], weight: list[float] | None, keep: int) -> list[dict[int, float]]:
    """Pairs each even place with its nearest odd one and merges the nearest pairs; again, where not enough (ToMe).

    Distances are 1 - cosine, times the sum of the roots of both weights where there are weights.
    """
    groups = [{patch: size[patch]} for patch in range(len(keys))]

    def distance(a: int, b: int) -> float:
        apart = one_minus_cosine(keys[a], keys[b])
        return apart if weight is None else apart * (math.sqrt(weight[a]) + math.sqrt(weight[b]))

    while (count := len(groups)) > keep:
        nearest = []
        for a in range(0, count, 2):
            apart, b = min((distance(a, b), b) for b in range(1, count, 2))
            nearest.append((apart, a, b))
        into = {a: b for _, a, b in sorted(nearest)[: min(count - keep, count // 2)]}
        stay = [place for place in range(count) if place not in into]
        parts = [[place, *(a for a in into if into[a] == place)] for place in stay]
        keys = [mean([keys[p] for p in places], [size[p] for p in places]) for places in parts]
        groups = [{patch: n for p in places for patch, n in groups[p].items()} for places in parts]
        size = [sum(size[p] for p in places) for places in parts]
        weight = None if weight is None else [sum(weight[p] for p in places) for places in parts]
    return groups


def quickshifted(keys: list[list[float]], size: list[float], weight: list[float], keep: int) -> list[dict[int, float]]:
    """Moves the patches that cost least to their nearest among those of more weight, or where that goes (quick shift).

    A move costs 1 - cosine, times the root of the weight of the patch that moves.
    """
    count = len(keys)
    order, moves = sorted(range(count), key=lambda place: weight[place]), []
    for rank, a in enumerate(order[:-1]):
        apart, b = min((one_minus_cosine(keys[a], keys[b]), b) for b in order[rank + 1 :])
        moves.append((apart * math.sqrt(weight[a]), a, b))
    into = {a: b for _, a, b in sorted(moves)[: count - keep]}

    def end(place: int) -> int:
        return end(into[place]) if place in into else place

    return [{p: size[p] for p in range(count) if end(p) == place} for place in range(count) if place not in into]


def one_minus_cosine(a: list[float], b: list[float]) -> float:
    return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def mean(vectors: list[list[float]], weights: list[float]) -> list[float]:
    total = sum(weights)
    return [sum(w * v for w, v in zip(weights, column, strict=True)) / total for column in zip(*vectors, strict=True)]


def reduction(
    kind: TokenReduction, x: Tensor, q: Tensor, k: Tensor, maps: Tensor, size: list[float],
    *, keep: int, scale: float, cutoff: float, anatomy: BlockAnatomy,
) -> list[dict[int, float]]:  # fmt: skip
    """Returns, for every token that leaves the block, in order, the tokens it is the mean of and their weights."""
    prefix = anatomy.num_prefix_tokens
    if kind == "lfe":
        scores = token_scores(x, maps, cutoff, anatomy)
        groups = [{i: 1.0} for i in sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:keep])]
    elif kind == "attention":
        groups = fused(class_attention(q, k, size, scale, anatomy), keep)
    elif kind == "quickshift":
        unit = (k / k.norm(dim=-1, keepdim=True)).mean(dim=0)
        groups = quickshifted(unit[prefix:].tolist(), size[prefix:], class_attention(q, k, size, scale, anatomy), keep)
    else:
        weight = None
        if kind == "lfe-merge":
            patches = x[prefix:].tolist()
            weight = [math.hypot(*a) / math.hypot(*b) for a, b in zip(filtered(patches, cutoff), patches, strict=True)]
        if kind == "attention-merge":
            weight = class_attention(q, k, size, scale, anatomy)
        groups = merged(k.mean(dim=0)[prefix:].tolist(), size[prefix:], weight, keep)
    shifted = [{prefix + patch: weight for patch, weight in group.items()} for group in groups]
    return [{token: size[token]} for token in range(prefix)] + shifted


@torch.no_grad()
def logits(model: Any, plan: Plan, images: Tensor) -> Tensor:
    """Returns the logits of the pruned model, from the dense one: units that go are left out of the sums."""
    (anatomy,) = set(examine(model).blocks)
    prefix, width = anatomy.num_prefix_tokens, anatomy.head_dim
    inner = anatomy.num_heads * width
    rows = []
    for image in images:
        x = embed(model, image[None])[0]
        size = [1.0] * len(x)
        for block, kept in zip(model.blocks, plan.blocks, strict=True):
            qkv = block.attn.qkv(block.norm1(x))
            mixed = torch.zeros(len(x), inner, dtype=x.dtype)
            maps, queries, keys = [], [], []
            for head, qk, v in zip(kept.keep_heads, kept.keep_qk, kept.keep_v, strict=True):
                of_qk = [head * width + channel for channel in qk]
                of_v = [head * width + channel for channel in v]
                q = block.attn.q_norm(qkv[:, of_qk])
                k = block.attn.k_norm(qkv[:, [inner + channel for channel in of_qk]])
                strength = (q @ k.T / math.sqrt(width)).exp() * torch.tensor(size, dtype=x.dtype)
                maps.append(strength / strength.sum(dim=1, keepdim=True))
                queries.append(q)
                keys.append(k)
                mixed[:, of_v] = maps[-1] @ qkv[:, [2 * inner + channel for channel in of_v]]
            x = x + block.ls1(block.attn.proj(mixed))
            if kept.num_tokens < len(x) - prefix:
                groups = reduction(
                    plan.token_reduction, x, torch.stack(queries), torch.stack(keys), torch.stack(maps), size,
                    keep=kept.num_tokens, scale=width**-0.5, cutoff=plan.cutoff_token, anatomy=anatomy,
                )  # fmt: skip
                x = torch.stack([sum(x[i] * n for i, n in group.items()) / sum(group.values()) for group in groups])
                counts = "merge" in plan.token_reduction or plan.token_reduction == "quickshift"
                size = [sum(group.values()) if counts else 1.0 for group in groups]
            hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
            stays = torch.zeros(anatomy.num_hidden, dtype=x.dtype)
            stays[list(kept.keep_hidden)] = 1
            x = x + block.ls2(block.mlp.fc2(hidden * stays))
        rows.append(classify(model, x[None])[0])
    return torch.stack(rows)


def ridge_slope(
    x: Tensor, y: Tensor, is_held: Tensor, metric: Tensor, weight: Tensor | None = None, *, centred: bool
) -> Tensor | None:
    """Fits every ridge on one part, tries it on the other, and fits the best on all; None where no slope is better."""
    x, y = x.double(), y.double()
    weight = torch.ones(len(x), dtype=torch.float64) if weight is None else weight.double()

    def origin(values: Tensor, weight: Tensor) -> Tensor:
        return (weight[:, None] * values).sum(dim=0) / weight.sum() * float(centred)

    def fit(chosen: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        w = weight[chosen]
        middle_x, middle_y = origin(x[chosen], w), origin(y[chosen], w)
        around = x[chosen] - middle_x
        second = around.T @ (w[:, None] * around) / w.sum()
        cross = around.T @ (w[:, None] * (y[chosen] - middle_y)) / w.sum()
        strength = ridge * second.diagonal().mean()
        return torch.linalg.solve(second + strength * torch.eye(len(second)), cross).T, middle_x, middle_y

    errors: dict[float | None, float] = {}
    for ridge in (None, *RIDGES):
        slope, middle_x, middle_y = fit(~is_held, ridge or 1.0)
        error = y[is_held] - middle_y
        if ridge is not None:
            error = error - (x[is_held] - middle_x) @ slope.T
        errors[ridge] = float((weight[is_held, None] * (error @ metric) * error).sum())
    best = min(errors, key=lambda ridge: errors[ridge])
    return None if best is None else fit(torch.ones_like(is_held), best)[0]
