"""Curves of the loss when a block's channels go and the rest is repaired: Optimal Brain Surgeon, closed form.

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
from itertools import pairwise

import torch
from torch import Tensor, nn

from pruning.model.anatomy import parts_of
from pruning.model.layers import SlimBlock
from pruning.model.surgery import as_slim
from pruning.precision import autocast
from pruning.repair.compensation import BlockRepair
from pruning.repair.flow import CalibrationStream, sample_tokens
from pruning.repair.moments import Moments
from pruning.repair.regression import matrix_power
from pruning.scores.channel import check_finite

NUM_WIDTHS = 8
"""The number of query/key widths that are measured: eighths of the dense width."""

NUM_STEPS = 48
"""The number of steps in which the hidden units go."""

RIDGE = 1e-2
"""Share of the mean variance that is added to the covariance before it is inverted: smaller variances are noise.

Late in a network hardly more than one token an image counts, and fewer images than units make some units seem to be
free. ViT-Tiny, 128 images, divergence of models with fewer channels at 0.9 and 0.65 of the multiply-adds: 0.092 and
0.883 with 1e-4, 0.077 and 0.853 with 1e-2, 0.072 and 0.910 with 0.1."""

PAIR_IMAGES = 16
"""The most images on which query/key widths are measured."""


@dataclass(frozen=True, kw_only=True)
class RemovalCurves:
    """A block's losses by the number of channels removed, from 0 to all, never falling; and the order of removal."""

    qk: Tensor
    """(D + 1,): losses by query/key pairs removed from every head."""
    v: Tensor
    """(D + 1,): losses by value channels removed from every head."""
    hidden: Tensor
    """(h + 1,): losses by hidden units removed."""
    qk_order: Tensor
    """(H, D): every head's query/key pairs, the first to go first."""
    v_order: Tensor
    """(H, D): every head's value channels, the first to go first."""
    hidden_order: Tensor
    """(h,): the hidden units, the first to go first."""


@torch.no_grad()
def measure_curves(repair: BlockRepair, block: nn.Module | None = None) -> RemovalCurves:
    """Measures the removal curves of the block that a calibration stream has come to.

    Args:
        repair: of the stream's current block.
        block: at dense widths; its tokens may be reduced. By default the dense block.
    """
    stream = repair.stream
    anatomy, block = stream.anatomy, stream.blocks[stream.index] if block is None else block
    slim = block if isinstance(block, SlimBlock) else as_slim(block, anatomy, is_last=False)
    parts, sensitivity = parts_of(slim), stream.sensitivity[stream.index]
    moments = _observe(stream, slim)
    check_finite(stream.index, {"qk": moments.qk_energy, "v": moments.v, "hidden": moments.hidden})
    ones = torch.ones(anatomy.width, device=stream.x.device)
    outer = matrix_power(sensitivity.mid.metric, 0.5) @ (parts.ls1(ones)[:, None] * parts.proj.weight).double()
    v, v_order = _value_curve(_with_ridge(moments.v), outer, anatomy.num_heads)
    outer = matrix_power(sensitivity.out.metric, 0.5) @ (parts.ls2(ones)[:, None] * parts.fc2.weight).double()
    hidden, hidden_order = obs_removal_curve(moments.hidden, outer)
    qk = torch.zeros(anatomy.head_dim + 1, dtype=torch.float64)
    if not anatomy.has_qk_norm:
        qk = _pair_curve(repair, slim)
    return RemovalCurves(
        qk=qk, v=v.cpu(), hidden=hidden.cpu(), qk_order=moments.qk_energy.argsort(dim=1).cpu(), v_order=v_order.cpu(),
        hidden_order=hidden_order.cpu(),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _BlockMoments:
    """Second moments of one block's channels, float64."""

    qk_energy: Tensor
    """(H, D): mean square of the query, times that of the key around its mean over the tokens; summed over batches."""
    v: Tensor
    """(H*D, H*D): covariance of the values, mixed by attention."""
    hidden: Tensor
    """(h, h): covariance of the hidden units."""


def _observe(stream: CalibrationStream, slim: SlimBlock) -> _BlockMoments:
    """Runs the stream through a block and takes the moments of its channels."""
    anatomy, parts, sensitivity = stream.anatomy, parts_of(slim), stream.sensitivity[stream.index]
    values, hidden = Moments(), Moments()
    energy = torch.zeros(anatomy.num_heads, anatomy.head_dim, dtype=torch.float64, device=stream.x.device)
    mid_weights = sensitivity.mid.token_weights(stream.num_all_tokens, anatomy.num_prefix_tokens)
    with autocast(stream.x.device, stream.precision):
        for batch in stream.batches(slim):
            q, k = batch.state.q.float(), batch.state.k.float()
            energy += (
                q.square().mean(dim=(0, 2)) * (k - k.mean(dim=2, keepdim=True)).square().mean(dim=(0, 2))
            ).double()
            values.add(*sample_tokens(batch, mid_weights, batch.mixed.float()))
            batch.reduce()
            out_weights = sensitivity.out.token_weights(batch.x.shape[1], anatomy.num_prefix_tokens)
            units = parts.act(parts.fc1(parts.norm2(batch.x))).float()
            hidden.add(*sample_tokens(batch, out_weights, units))
    return _BlockMoments(qk_energy=energy, v=values.covariance(), hidden=hidden.covariance())


def obs_removal_curve(covariance: Tensor, outer: Tensor, num_steps: int = NUM_STEPS) -> tuple[Tensor, Tensor]:
    """Removes a linear layer's inputs greedily, the others refitted after every step.

    Args:
        covariance: (n, n) of the inputs, float64.
        outer: (m, n), the layer's weights times a root of the metric.
        num_steps: n / num_steps inputs go at once.

    Returns:
        Losses (n + 1,) by number removed, and the order (n,) in which they go.
    """
    count = len(covariance)
    inverse = torch.linalg.inv(_with_ridge(covariance))
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
        stays = torch.ones_like(left, dtype=torch.bool).index_fill(0, chosen, False).nonzero()[:, 0]
        pull = inner @ inverse[chosen].index_select(1, stays)
        residual = residual.index_select(1, stays).addmm_(residual[:, chosen], pull, alpha=-1)
        columns = inverse[:, chosen].index_select(0, stays)
        inverse = inverse.index_select(0, stays).index_select(1, stays).addmm_(columns, pull, alpha=-1)
        left = left[stays]
    return torch.tensor(losses, dtype=torch.float64).cummax(dim=0).values, torch.tensor(order)


def _with_ridge(covariance: Tensor) -> Tensor:
    """Adds the ridge to a covariance, float64."""
    ridge = (RIDGE * covariance.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    return covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def _value_curve(covariance: Tensor, outer: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The loss of all heads together by values removed from each, and the order in which a head's values go.

    Args:
        covariance: (H*D, H*D) of the mixed values, float64.
        outer: (m, H*D), the projection's weights times a root of the metric.

    Returns:
        Losses (D + 1,), and for every head its channels (H, D) by the loss that each carries alone, the least first.
    """
    head_dim = len(covariance) // num_heads
    squares, orders = torch.zeros(head_dim, dtype=torch.float64, device=covariance.device), []
    for head in range(num_heads):
        of_head = slice(head * head_dim, (head + 1) * head_dim)
        inner = covariance[of_head, of_head]
        strengths = torch.linalg.svdvals(outer[:, of_head] @ matrix_power(inner, 0.5))
        squares[: len(strengths)] += strengths.square()
        orders.append((outer[:, of_head].square().sum(dim=0) * inner.diagonal()).argsort())
    losses = torch.cat([squares.new_zeros(1), squares.flip(0).cumsum(0)]) / 2
    return losses, torch.stack(orders)


def _pair_curve(repair: BlockRepair, slim: SlimBlock) -> Tensor:
    """The loss by query/key pairs removed: measured at a few widths, on a few images, and interpolated between them."""
    stream, head_dim = repair.stream, repair.stream.anatomy.head_dim
    sensitivity = stream.sensitivity[stream.index].mid
    weights = sensitivity.token_weights(stream.num_all_tokens, stream.anatomy.num_prefix_tokens)
    query, key = repair.logit_factors()
    widths = sorted({math.ceil(head_dim * step / NUM_WIDTHS) for step in range(NUM_WIDTHS)}, reverse=True)
    removed, losses = [0], [0.0]
    x, size = slim.enter(stream.x[: min(PAIR_IMAGES, stream.batch_size)])
    q, k, v = slim.attn.project(slim.norm1(x))
    mixed = slim.attn.mix(q, k, v, size)
    projection = slim.ls1(torch.ones(stream.anatomy.width, device=x.device))[:, None] * slim.attn.proj.weight
    metric = (projection.T.double() @ sensitivity.metric @ projection.double()).float()  # of the projection's input
    # All combinations at once, the ones that count most first; a width takes the first of them.
    q, k = (torch.einsum("bhnd,hkd->bhnk", part, factor.to(q.dtype)) for part, factor in ((q, query), (k, key)))
    for width in widths:
        narrow_q, narrow_k = (part[..., :width] if width else torch.zeros_like(part[..., :1]) for part in (q, k))
        error = (mixed - slim.attn.mix(narrow_q, narrow_k, v, size)).float()
        moment = (error * weights[:, None]).flatten(0, 1).T @ error.flatten(0, 1) / len(x)
        removed.append(head_dim - width)
        losses.append(max(losses[-1], float((metric * moment).sum()) / 2))
    return interpolated(removed, losses)


def interpolated(places: list[int], losses: list[float]) -> Tensor:
    """Interpolates losses to all whole numbers from 0 to the last place, by a power law between two places; float64."""
    curve = [0.0]
    for (low, least), (high, most) in pairwise(zip(places, losses, strict=True)):
        for n in range(low + 1, high + 1):
            if least <= 0 or low == 0:  # the first loss grows from nothing as the square of the share
                curve.append(most * (n / high) ** 2)
            else:
                curve.append(least * (most / least) ** (math.log(n / low) / math.log(high / low)))
    return torch.tensor(curve, dtype=torch.float64)
