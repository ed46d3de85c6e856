"""Gaussian processes: the value of a function between points where it was measured, and how well that is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

Values = NDArray[np.float64]

MIN_LENGTH, MAX_LENGTH = 0.05, 50.0
"""Bounds of a fitted length scale, in edges of the unit cube."""


class GaussianProcess:
    """A Gaussian process of one value over the unit cube: Matern 5/2, a length for each axis, a constant mean, noise.

    Lengths and noise are the most likely ones under a prior whose lengths grow with the root of the number of axes
    (Hvarfner et al. 2024, "Vanilla Bayesian Optimization Performs Great in High Dimensions").
    """

    def __init__(self, points: Values, values: Values, logs: Values) -> None:
        """
        Args:
            points: (n, d), n >= 1.
            values: (n,)
            logs: (d + 1,), logarithms of the lengths, then of the noise's variance where the values have variance 1.
        """
        self.points, self.logs = points, logs
        self._mean, self._scale = values.mean(), values.std() or 1.0
        covariance, _ = _covariance(points, points, logs[:-1])
        self._factor = cho_factor(covariance + np.exp(logs[-1]) * np.eye(len(points)), lower=True)
        self._weights = cho_solve(self._factor, (values - self._mean) / self._scale)

    @classmethod
    def fitted(cls, points: Values, values: Values, start: Values | None = None) -> GaussianProcess:
        """Fits the most likely lengths and noise.

        Args:
            points: (n, d)
            values: (n,)
            start: (d + 1,), the `logs` of an earlier fit to start from; by default the middle of the prior.
        """
        scaled = (values - values.mean()) / (values.std() or 1.0)
        axes = points.shape[1]
        middle = np.append(np.full(axes, np.sqrt(2) + np.log(axes) / 2), -4.0)
        width = np.append(np.full(axes, np.sqrt(3)), 1.0)
        bounds = [(np.log(MIN_LENGTH), np.log(MAX_LENGTH))] * axes + [(-12.0, 1.0)]
        fit = minimize(
            _loss, middle if start is None else start, args=(points, scaled, middle, width), jac=True, bounds=bounds,
            options={"maxiter": 50},
        )  # fmt: skip
        return cls(points, values, fit.x)

    def at(self, points: Values) -> tuple[Values, Values]:
        """Computes mean and standard deviation of the value, without noise, at (m, d) points: (m,) each."""
        across, _ = _covariance(points, self.points, self.logs[:-1])
        reduced = solve_triangular(self._factor[0], across.T, lower=True)
        variance = np.maximum(1.0 - (reduced**2).sum(axis=0), 1e-12)
        return self._mean + self._scale * (across @ self._weights), self._scale * np.sqrt(variance)


def _loss(logs: Values, points: Values, scaled: Values, middle: Values, width: Values) -> tuple[float, Values]:
    """Computes minus the log of likelihood and prior, and its gradient by `logs`.

    Args:
        logs: (d + 1,), of lengths and noise.
        points: (n, d)
        scaled: (n,), values with mean 0 and variance 1.
        middle: (d + 1,), means of the normal prior of `logs`.
        width: (d + 1,), its standard deviations.
    """
    covariance, slope = _covariance(points, points, logs[:-1])
    factor = cho_factor(covariance + np.exp(logs[-1]) * np.eye(len(points)), lower=True)
    weights = cho_solve(factor, scaled)
    away = (logs - middle) / width
    value = scaled @ weights / 2 + np.log(np.diag(factor[0])).sum() + away @ away / 2
    inner = cho_solve(factor, np.eye(len(points))) - np.outer(weights, weights)
    weighted = inner * slope  # times the squared distance along an axis: what its length changes
    lengths = weighted.sum(axis=1) @ points**2 - (points * (weighted @ points)).sum(axis=0)
    gradient = np.append(lengths * np.exp(-2 * logs[:-1]), np.trace(inner) * np.exp(logs[-1]) / 2)
    return float(value), gradient + away / width


def _covariance(one: Values, other: Values, logs: Values) -> tuple[Values, Values]:
    """Computes the Matern 5/2 covariance between points, (n, d) and (m, d) -> (n, m), and its slope.

    Returns:
        The covariance; and by how much it grows with the log of an axis's length, over the squared distance along it.
    """
    lengths = np.exp(logs)
    distance = np.sqrt(5) * cdist(one / lengths, other / lengths)
    fading = np.exp(-distance)
    return (1 + distance + distance**2 / 3) * fading, 5 / 3 * (1 + distance) * fading
