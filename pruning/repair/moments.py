"""Weighted mean and covariance of samples that come in batches, with a part of the samples held out.

n features, S samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Part = Literal["fit", "held", "all"]
"""The samples to fit on, those held out to choose by, or both together."""


class Moments:
    """Mean and covariance of samples, kept apart for those to fit on and those held out to choose by.

    Products are taken in float32 around the first batch's mean and summed in float64: as exact as needed, and fast.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    def add(self, x: Tensor, weight: Tensor, is_held: Tensor) -> None:
        """Adds samples. x: (S, n); weight: (S,), at least 0; is_held: (S,) bool."""
        x = x.detach().float()
        if self._weight is None:
            self._origin = x.mean(dim=0)
            self._weight = torch.zeros(2, dtype=torch.float64, device=x.device)
            self._sum = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
            self._products = torch.zeros(2, x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        x = x - self._origin
        for row, chosen in enumerate((~is_held, is_held)):
            if not chosen.any():
                continue
            samples, weights = x[chosen], weight[chosen].float()[:, None]
            weighted = samples * weights
            self._weight[row] += weights.sum()
            self._sum[row] += weighted.sum(dim=0)
            with torch.autocast(x.device.type, enabled=False):  # in bfloat16 a covariance has negative eigenvalues
                self._products[row] += weighted.T @ samples

    @property
    def has_held(self) -> bool:
        """True where there are samples of some weight both to fit on and held out."""
        return self._weight is not None and bool((self._weight > 0).all())

    def mean(self, part: Part = "all") -> Tensor:
        """Returns the weighted mean of a part of the samples: (n,), float64."""
        return self._origin.double() + self._shift(part)

    def covariance(self, part: Part = "all") -> Tensor:
        """Returns the weighted covariance of a part of the samples, divided by the sum of weights: (n, n), float64."""
        shift = self._shift(part)
        return self._total(self._products, part) / self._total_weight(part) - shift[:, None] * shift

    def _total_weight(self, part: Part) -> Tensor:
        assert self._weight is not None, "no sample yet"
        return self._total(self._weight, part).clamp_min(torch.finfo(torch.float64).tiny)

    def _shift(self, part: Part) -> Tensor:
        """Returns the mean's distance from the origin. (n,)."""
        return self._total(self._sum, part) / self._total_weight(part)

    @staticmethod
    def _total(sums: Tensor, part: Part) -> Tensor:
        """Adds up the sums of a part. sums: (2, ...), of the samples to fit on and of those held out."""
        return sums.sum(dim=0) if part == "all" else sums[("fit", "held").index(part)]
