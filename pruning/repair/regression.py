"""From moments to a repaired linear layer: ridge regressions, and the powers of a matrix that they need.

A layer y = W f + b that keeps only features g of f (some of them, or combinations) becomes
W' = W_0 + (W f - W_0 g regressed on g) + (drift regressed on g), where W_0 is W expressed in g. The drift is what the
dense stream has and the pruned one lacks at this place, due to all that was pruned before.

C outputs of the layer, n features f, k kept features g.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from pruning.repair.moments import Moments, Part

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""The ridges tried for every regression, as shares of the features' mean variance."""


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """The repaired weight and bias of a linear layer, float64."""

    weight: Tensor
    """(C, k)."""
    bias: Tensor | None
    """(C,), which makes the mean output that of the dense stream; None where the dense layer has none."""
    is_loss_left: bool
    """True where the layer loses outputs that no regression recovers on held-out samples: the bias alone makes up."""


def fit_layer(
    weight: Tensor, bias: Tensor | None, combinations: Tensor | None, moments: Moments, metric: Tensor
) -> LayerFit:
    """Fits a layer's weight and bias to its kept features.

    Args:
        weight: (C, n), the dense layer's weight on the features f of the moments.
        bias: (C,), the dense layer's bias if it has one.
        combinations: (k, n), the kept features are `combinations @ f`; None where all of f is kept.
        moments: of [f, lost, drift], where lost = dense output - bias - weight @ f.
        metric: (C, C), float64, of an error of the layer's output.
    """
    start, transform = weight.double(), None
    if combinations is not None:
        start, transform = _in_combinations(start, combinations.double())
    num_targets, num_features = start.shape
    seconds = {part: SecondMoments.of(moments, part, transform, centred=bias is not None) for part in get_args(Part)}
    lost, drift = (slice(first, first + num_targets) for first in (num_features, num_features + num_targets))
    fitted, is_loss_left = start, False
    for target in (lost, drift):
        slope = best_slope(seconds, num_features, target, metric) if moments.has_held else None
        if slope is not None:
            fitted = fitted + slope
        elif target is lost:
            is_loss_left = _loses(seconds["all"].moment, start, lost)
    if bias is not None:
        mean = seconds["all"].mean
        wanted = start @ mean[:num_features] + mean[num_features:].view(2, -1).sum(dim=0)
        bias = bias.double() + wanted - fitted @ mean[:num_features]
    return LayerFit(weight=fitted, bias=bias, is_loss_left=is_loss_left)


def _in_combinations(weight: Tensor, combinations: Tensor) -> tuple[Tensor, Tensor]:
    """Expresses a weight (C, n) on f in combinations (k, n) of f, as well as it goes.

    Returns:
        The weight W_0 (C, k) on the combinations, and the matrix (k + 2 C, n + 2 C) that takes [f, lost, drift] to
        [combinations @ f, lost + (W - W_0 combinations) f, drift].
    """
    num_targets, num_kept = len(weight), len(combinations)
    start = weight @ torch.linalg.pinv(combinations)
    eye = torch.eye(2 * num_targets, dtype=start.dtype, device=start.device)
    transform = torch.block_diag(combinations, eye)
    transform[num_kept : num_kept + num_targets, : weight.shape[1]] = weight - start @ combinations
    return start, transform


def _loses(moment: Tensor, start: Tensor, lost: slice) -> bool:
    """Tells whether the lost outputs are more than rounding, also of bfloat16."""
    kept = moment[: start.shape[1], : start.shape[1]]
    energy = moment.diagonal()[lost].sum()
    return bool(energy > 1e-4 * (energy + ((start @ kept) * start).sum()))


@dataclass(frozen=True)
class SecondMoments:
    """Mean and second moment of [features, target 0, target 1], float64."""

    mean: Tensor
    """(k + 2 C,); 0 where the layer has no bias, so that the regression's line must go through 0."""
    moment: Tensor
    """(k + 2 C, k + 2 C), around this mean."""

    @classmethod
    def of(cls, moments: Moments, part: Part, transform: Tensor | None, *, centred: bool) -> SecondMoments:
        """The second moments of a part of the samples, after `transform`; around their mean, or around 0."""
        mean, moment = moments.mean(part), moments.covariance(part)
        if transform is not None:
            mean, moment = transform @ mean, transform @ moment @ transform.T
        return cls(mean, moment) if centred else cls(torch.zeros_like(mean), moment + mean[:, None] * mean)


def best_slope(
    seconds: Mapping[Part, SecondMoments], num_features: int, target: slice, metric: Tensor
) -> Tensor | None:
    """The slope of a target on the features, with the ridge that does best on the held-out samples.

    Args:
        seconds: of every part of the samples.
        target: rows of the moments that are the target.
        metric: (C, C) of an error.

    Returns:
        (C, k), fitted on all samples; None where no slope does better on the held-out ones than none.
    """

    def solve(second: Tensor, ridge: float) -> Tensor:
        inner = second[:num_features, :num_features]
        strength = (ridge * inner.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
        factor, failed = torch.linalg.cholesky_ex(inner + strength * torch.eye(num_features, device=inner.device))
        slope = torch.cholesky_solve(second[:num_features, target], factor).T
        return slope if not failed and bool(slope.isfinite().all()) else torch.zeros_like(slope)

    held = seconds["held"].moment
    shift = seconds["held"].mean - seconds["fit"].mean
    cross = held[:num_features, target] + shift[:num_features, None] * shift[target]
    inner = held[:num_features, :num_features] + shift[:num_features, None] * shift[:num_features]

    def gain_of(slope: Tensor) -> float:
        """Returns by how much the held-out error is smaller than without a slope."""
        weighted = metric @ slope
        return float(2 * (weighted * cross.T).sum() - (weighted * (slope @ inner)).sum())

    gains = {ridge: gain_of(solve(seconds["fit"].moment, ridge)) for ridge in RIDGES}
    best = max(gains, key=lambda ridge: gains[ridge])
    return solve(seconds["all"].moment, best) if gains[best] > 0 else None


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric matrix without negative eigenvalues; numerically zero directions stay zero."""
    values, vectors = torch.linalg.eigh(matrix)
    is_there = values > 1e-9 * values.amax().clamp_min(torch.finfo(matrix.dtype).tiny)
    return (vectors * torch.where(is_there, values.clamp_min(0) ** exponent, 0.0)) @ vectors.T
