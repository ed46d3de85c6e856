"""What a block loses when channels go and the rest is repaired: Optimal Brain Surgeon, closed form.

The loss is 1/2 tr(G E[D D^T]) of the error D that is left in the stream after the repair, G the metric of
`pruning.repair.sensitivity`: nats of log-likelihood an image, to second order.

- Hidden units: the greedy removal of Optimal Brain Surgeon for a least-squares target (Hassibi and Stork 1993; the
  structured form is ZipLM's, Kurtic et al. 2023). Without unit j, and the others refitted, the loss grows by
  W_j^T G W_j / (C^-1)_jj; the units of least growth go, C^-1 and W are brought up to date, and so on.
- Values: the singular values of G^(1/2) P_h C_h^(1/2) that are left out, squared.
- Query/key pairs: a few widths are tried, with the logits of best rank, and the error measured.

B images, N tokens, C model width, H heads, D head width, h hidden units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.model.anatomy import parts_of
from pruning.model.layers import SlimBlock
from pruning.model.surgery import as_slim
from pruning.precision import autocast
from pruning.repair.compensation import CalibrationStream, matrix_power, samples
from pruning.repair.moments import Moments
from pruning.scores.channel import check_finite

NUM_WIDTHS = 8
"""Query/key widths that are tried: eighths of the dense one."""

NUM_STEPS = 96
"""Steps in which the hidden units go."""

RIDGE = 1e-4
"""Of the mean variance: added to the covariance before it is inverted, since smaller ones are noise of the estimate."""


@dataclass(frozen=True, kw_only=True)
class RemovalCurves:
    """Losses by number removed, from 0 to all; none falls."""

    qk: Tensor
    """(D + 1,): query/key pairs removed from every head."""
    v: Tensor
    """(D + 1,): value channels removed from every head."""
    hidden: Tensor
    """(h + 1,)."""
    qk_order: Tensor
    """(H, D): a head's pairs, the first to go first."""
    v_order: Tensor
    """(H, D)."""
    hidden_order: Tensor
    """(h,)."""


@torch.no_grad()
def measure_curves(flow: CalibrationStream, block: nn.Module | None = None) -> RemovalCurves:
    """Of the current block of a flow.

    Args:
        block: at dense widths; its tokens may be reduced. By default the dense block.
    """
    anatomy = flow.anatomy
    dense = flow.blocks[flow.index] if block is None else block
    slim = dense if isinstance(dense, SlimBlock) else as_slim(dense, anatomy, is_last=False)
    parts, place = parts_of(slim), flow.sensitivity[flow.index]
    values, hidden = Moments(), Moments()
    energy = torch.zeros(anatomy.num_heads, anatomy.head_dim, dtype=torch.float64, device=flow.x.device)
    before = place.mid.token_weights(flow.num_all_tokens, anatomy.num_prefix_tokens)
    with autocast(flow.x.device, flow.precision):
        for stage in flow.stages(slim):
            q, k = stage.clues.q.float(), stage.clues.k.float()
            energy += (
                q.square().mean(dim=(0, 2)) * (k - k.mean(dim=2, keepdim=True)).square().mean(dim=(0, 2))
            ).double()
            values.add(*samples(stage, before, stage.mixed.float()))
            stage.reduce()
            after = place.out.token_weights(stage.x.shape[1], anatomy.num_prefix_tokens)
            hidden.add(*samples(stage, after, parts.act(parts.fc1(parts.norm2(stage.x))).float()))
    found = {"qk": energy, "v": values.covariance(), "hidden": hidden.covariance()}
    check_finite(flow.index, found)
    one = torch.ones(anatomy.width, device=flow.x.device)
    outer = matrix_power(place.mid.metric, 0.5) @ (parts.ls1(one)[:, None] * parts.proj.weight).double()
    v, v_order = _value_curve(found["v"], outer, anatomy.num_heads)
    outer = matrix_power(place.out.metric, 0.5) @ (parts.ls2(one)[:, None] * parts.fc2.weight).double()
    loss, hidden_order = obs_removal_curve(found["hidden"], outer)
    qk = torch.zeros(anatomy.head_dim + 1, dtype=torch.float64)
    if not anatomy.has_qk_norm:
        qk = _pair_curve(flow, slim, before)
    return RemovalCurves(
        qk=qk, v=v.cpu(), hidden=loss.cpu(), qk_order=energy.argsort(dim=1).cpu(), v_order=v_order.cpu(),
        hidden_order=hidden_order.cpu(),
    )  # fmt: skip


def obs_removal_curve(covariance: Tensor, outer: Tensor, num_steps: int = NUM_STEPS) -> tuple[Tensor, Tensor]:
    """The greedy removal of a linear layer's inputs, the others refitted after every step.

    Args:
        covariance: (n, n) of the inputs, float64.
        outer: (m, n), the layer's weights times a root of the metric.
        num_steps: n / num_steps inputs go at once.

    Returns:
        Losses (n + 1,) by number removed, and the order (n,) in which they go.
    """
    count = len(covariance)
    ridge = (RIDGE * covariance.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.linalg.inv(covariance + ridge * torch.eye(count, dtype=covariance.dtype, device=covariance.device))
    left, residual = torch.arange(count, device=covariance.device), outer.clone()
    losses, order, total = [0.0], [], 0.0
    chunk = max(1, count // num_steps)
    while len(left):
        growth = residual.square().sum(dim=0) / inverse.diagonal()
        chosen = growth.argsort(stable=True)[: min(chunk, len(left))]
        inner = torch.linalg.inv(inverse[chosen][:, chosen])
        lost = float(((residual[:, chosen] @ inner) * residual[:, chosen]).sum()) / 2
        share = growth[chosen] / growth[chosen].sum().clamp_min(torch.finfo(torch.float64).tiny)
        losses += [total + lost * float(part) for part in share.cumsum(0)]
        total += lost
        losses[-1] = total
        order += left[chosen].tolist()
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[chosen] = False
        pull = inner @ inverse[chosen][:, stays]
        residual = residual[:, stays] - residual[:, chosen] @ pull
        inverse = inverse[stays][:, stays] - inverse[stays][:, chosen] @ pull
        left = left[stays]
    return torch.tensor(losses, dtype=torch.float64).cummax(dim=0).values, torch.tensor(order)


def _value_curve(covariance: Tensor, outer: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The curve of all heads together, and the channels of each by what they carry alone."""
    head_dim = len(covariance) // num_heads
    squares, orders = torch.zeros(head_dim, dtype=torch.float64, device=covariance.device), []
    for head in range(num_heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        strengths = torch.linalg.svdvals(outer[:, own] @ matrix_power(covariance[own, own], 0.5))
        squares[: len(strengths)] += strengths.square()
        orders.append((outer[:, own].square().sum(dim=0) * covariance[own, own].diagonal()).argsort())
    losses = torch.cat([squares.new_zeros(1), squares.flip(0).cumsum(0)]) / 2
    return losses, torch.stack(orders)


def _pair_curve(flow: CalibrationStream, slim: SlimBlock, weights: Tensor) -> Tensor:
    """The error of a few widths, on one batch; between them the loss is interpolated geometrically."""
    head_dim, place = flow.anatomy.head_dim, flow.sensitivity[flow.index].mid
    query, key = flow.logit_factors()
    tried = sorted({math.ceil(head_dim * step / NUM_WIDTHS) for step in range(NUM_WIDTHS)}, reverse=True)
    removed, losses = [0], [0.0]
    stage = next(flow.stages(slim))
    x, projection = stage.x, slim.attn.proj.weight
    q, k, v = slim.attn.project(slim.norm1(x))
    gain = slim.ls1(torch.ones(flow.anatomy.width, device=x.device))
    for width in tried:
        if width == 0:
            narrow_q, narrow_k = torch.zeros_like(q[..., :1]), torch.zeros_like(k[..., :1])
        else:
            narrow_q = torch.einsum("bhnd,hkd->bhnk", q, query[:, :width].to(q.dtype))
            narrow_k = torch.einsum("bhnd,hkd->bhnk", k, key[:, :width].to(k.dtype))
        error = stage.mixed - slim.attn.mix(narrow_q, narrow_k, v, stage.clues.size)
        error = (error.float() @ projection.T) * gain
        moment = ((error * weights[:, None]).flatten(0, 1).T @ error.flatten(0, 1)).double() / len(x)
        removed.append(head_dim - width)
        losses.append(max(losses[-1], float((place.metric * moment).sum()) / 2))
    return interpolated(removed, losses)


def interpolated(places: list[int], losses: list[float]) -> Tensor:
    """Losses at all whole numbers from 0 to the last place: a power law between two places. float64."""
    curve = [0.0]
    for (low, least), (high, most) in zip(
        zip(places, losses, strict=True), list(zip(places, losses, strict=True))[1:], strict=False
    ):
        for n in range(low + 1, high + 1):
            if least <= 0 or low == 0:  # the first loss grows from nothing as the square of the share
                curve.append(most * (n / high) ** 2)
            else:
                curve.append(least * (most / least) ** (math.log(n / low) / math.log(high / low)))
    return torch.tensor(curve, dtype=torch.float64)
