"""From moments to a repaired linear layer: ridge regressions, and the powers of a matrix that they need.

A layer y = W f + b that keeps only features g of f (some of them, or combinations) becomes
W' = W_0 + (W f - W_0 g regressed on g) + (drift regressed on g), where W_0 is W expressed in g. The drift is what the
dense stream has and the pruned one lacks at this place, due to all that was pruned before. The two have a ridge each:
one for their sum cost 4.5 % of divergence at 0.65 of the multiply-adds (ViT-Tiny, channels only).

C outputs of the layer, n features f, k kept features g, T targets of a regression, of C values each.
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


ROUNDING = 1e-11
"""The least ridge, as a share of the features' squared mean: smaller variances are rounding."""


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
        moments: of [f, drift, lost], with rows for f, where lost = dense output - bias - weight @ f; without lost where
            it is 0 and all of f is kept.
        metric: (C, C), float64, of an error of the layer's output.
    """
    start = weight.double()
    if combinations is not None:
        combinations = combinations.double()
        start = start @ torch.linalg.pinv(combinations)
    seconds = {
        part: SecondMoments.of(moments, part, weight.double(), combinations, start, centred=bias is not None)
        for part in get_args(Part)
    }
    every = seconds["all"]
    slopes = best_slopes(seconds, metric) if moments.has_held else [None, None]
    fitted = sum((slope for slope in slopes if slope is not None), start)
    if bias is not None:
        wanted = every.target_mean.view(-1, len(start)).sum(dim=0)
        bias = bias.double() + wanted + (start - fitted) @ every.mean
    return LayerFit(weight=fitted, bias=bias, is_loss_left=slopes[-1] is None and every.loses(start))


@dataclass(frozen=True, kw_only=True)
class SecondMoments:
    """Means and second moments of features and targets, float64; around the means, or around 0."""

    mean: Tensor
    """(k,), of the features."""
    target_mean: Tensor
    """(T * C,)."""
    inner: Tensor
    """(k, k), of the features."""
    cross: Tensor
    """(k, T * C), of features with targets."""
    energy: Tensor
    """(T * C,), of the targets."""
    centre: float
    """1 around the means; 0 around 0, where the layer has no bias and the regression's line must go through 0."""

    @classmethod
    def of(
        cls, moments: Moments, part: Part, weight: Tensor, combinations: Tensor | None, start: Tensor, *, centred: bool
    ) -> SecondMoments:
        """The second moments of a part of the samples, of the targets drift and lost.

        Args:
            moments: of [f, drift, lost], or of [f, drift] where nothing is lost.
            combinations: (k, n); the features are `combinations @ f`, and the targets drift and
                lost + (weight - start @ combinations) @ f.
        """
        num_features = weight.shape[1]
        mean, moment, energy = moments.mean(part), moments.covariance(part), moments.variance(part)[num_features:]
        if not centred:
            moment = moment + mean[:num_features, None] * mean
            energy = energy + mean[num_features:].square()
        mean, target_mean = mean[:num_features], mean[num_features:]
        inner, cross = moment[:, :num_features], moment[:, num_features:]
        if combinations is not None:
            rest = weight - start @ combinations
            lost = slice(len(weight), None)
            target_mean, cross, energy = target_mean.clone(), cross.clone(), energy.clone()
            energy[lost] += (rest * (2 * cross[:, lost].T + rest @ inner)).sum(dim=1)
            target_mean[lost] += rest @ mean
            cross[:, lost] += inner @ rest.T
            mean, inner, cross = combinations @ mean, combinations @ inner @ combinations.T, combinations @ cross
        return cls(
            mean=mean, target_mean=target_mean, inner=inner, cross=cross, energy=energy, centre=float(centred)
        )  # fmt: skip

    def loses(self, start: Tensor) -> bool:
        """Tells whether the lost outputs, the second target, are more than rounding, also of bfloat16."""
        energy = self.energy[len(start) :].sum()  # 0 where there is no second target
        return bool(energy > 1e-4 * (energy + ((start @ self.inner) * start).sum()))


def best_slopes(seconds: Mapping[Part, SecondMoments], metric: Tensor) -> list[Tensor | None]:
    """The slope of every target on the features, with the ridge that does best on the held-out samples.

    Args:
        seconds: of every part of the samples.
        metric: (C, C) of an error.

    Returns:
        (C, k) for each target, fitted on all samples; None where no slope does better on the held-out ones than none.
    """
    fit, held, every = seconds["fit"], seconds["held"], seconds["all"]
    width = len(metric)
    shift, target_shift = (
        held.centre * (at - of) for at, of in ((held.mean, fit.mean), (held.target_mean, fit.target_mean))
    )
    # float32 is enough to choose by.
    cross = (held.cross + shift[:, None] * target_shift).float()
    inner = (held.inner + shift[:, None] * shift).float()
    least = ROUNDING * float(every.mean.square().mean())
    fit_inner, fit_cross, metric = fit.inner.float(), fit.cross.float(), metric.float()

    def gains_of(ridge: float) -> list[float]:
        """Returns for every target by how much the held-out error is smaller than without a slope."""
        slopes = solve_ridge(fit_inner, fit_cross, ridge, least)
        growth = 2 * cross - inner @ slopes
        weighted = (slopes.unflatten(1, (-1, width)) @ metric).flatten(1)
        gains: list[float] = (weighted * growth).sum(dim=0).view(-1, width).sum(dim=1).tolist()
        return gains

    # One ridge for all outputs: one for each eigenvector of the metric cost 3 % of divergence (ViT-Tiny, 128 images).
    gains = [gains_of(ridge) for ridge in RIDGES]
    slopes: list[Tensor | None] = []
    for target, of_target in enumerate(zip(*gains, strict=True)):
        best = max(range(len(RIDGES)), key=lambda row: of_target[row])
        columns = slice(target * width, (target + 1) * width)
        slopes.append(
            solve_ridge(every.inner, every.cross[:, columns], RIDGES[best], least).T if of_target[best] > 0 else None
        )
    return slopes


def solve_ridge(inner: Tensor, cross: Tensor, ridge: float, least: float = 0.0) -> Tensor:
    """Solves a ridge regression: (k, k) and (k, m) -> slopes (k, m); 0 where it cannot be solved.

    Args:
        ridge: strength, as a share of the mean variance of the features.
        least: the least strength.
    """
    strength = (ridge * inner.diagonal().mean()).clamp_min(max(least, torch.finfo(inner.dtype).tiny))
    eye = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    factor, failed = torch.linalg.cholesky_ex(inner + strength * eye)
    slope = torch.cholesky_solve(cross, factor)
    return slope if not failed and bool(slope.isfinite().all()) else torch.zeros_like(slope)


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric matrix without negative eigenvalues; numerically zero directions stay zero."""
    values, vectors = torch.linalg.eigh(matrix)
    is_there = values > 1e-9 * values.amax().clamp_min(torch.finfo(matrix.dtype).tiny)
    return (vectors * torch.where(is_there, values.clamp_min(0) ** exponent, 0.0)) @ vectors.T
