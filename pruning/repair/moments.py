"""Weighted mean and covariance of samples that come in batches, with a part of the samples held out.

n features, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Of samples in two parts: those to fit on, and those held out to choose by.

    Products are taken in float32 around the first batch's mean and summed in float64: as exact as needed, and fast.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    def add(self, x: Tensor, weight: Tensor, is_held: Tensor) -> None:
        """x: (S, n); weight: (S,), at least 0; is_held: (S,) bool."""
        x = x.detach().float()
        if self._weight is None:
            self._origin = x.mean(dim=0)
            self._weight = torch.zeros(2, dtype=torch.float64, device=x.device)
            self._sum = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
            self._products = torch.zeros(2, x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        x = x - self._origin
        for part, chosen in enumerate((~is_held, is_held)):
            if not chosen.any():
                continue
            some, weights = x[chosen], weight[chosen].float()[:, None]
            weighted = some * weights
            self._weight[part] += weights.sum()
            self._sum[part] += weighted.sum(dim=0)
            self._products[part] += weighted.T @ some

    @property
    def has_held(self) -> bool:
        """Whether both parts have samples."""
        return self._weight is not None and bool((self._weight > 0).all())

    def mean(self, part: int | None = None) -> Tensor:
        """(n,), float64; of the fitting part (0), the held-out one (1), or both."""
        return self._origin.double() + self._shift(part)

    def covariance(self, part: int | None = None) -> Tensor:
        """(n, n), float64, divided by the sum of weights."""
        shift = self._shift(part)
        products = self._products.sum(dim=0) if part is None else self._products[part]
        return products / self._total(part) - shift[:, None] * shift

    def _total(self, part: int | None) -> Tensor:
        assert self._weight is not None, "no sample yet"
        total = self._weight.sum() if part is None else self._weight[part]
        return total.clamp_min(torch.finfo(torch.float64).tiny)

    def _shift(self, part: int | None) -> Tensor:
        return (self._sum.sum(dim=0) if part is None else self._sum[part]) / self._total(part)
