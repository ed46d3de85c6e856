"""The Gaussian process against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from search.suggest.gaussian_process import GaussianProcess


def wave(points: np.ndarray) -> np.ndarray:
    """A function of the first two axes; the last has no effect."""
    return np.sin(5 * points[:, 0]) + 3 * points[:, 1] ** 2 + 7


@pytest.mark.parametrize("count", [1, 5, 40])
def test_process_gives_what_scikit_learn_does_at_the_same_lengths(count: int) -> None:
    rng = np.random.default_rng(0)
    points, at = rng.random((count, 3)), rng.random((20, 3))
    values, lengths, noise = wave(points), np.array([0.5, 1.0, 3.0]), 0.01
    mean, deviation = GaussianProcess(points, values, np.log([*lengths, noise])).at(at)
    scale = values.std() or 1.0
    theirs = GaussianProcessRegressor(Matern(lengths, nu=2.5), alpha=noise, optimizer=None)
    theirs.fit(points, (values - values.mean()) / scale)
    their_mean, their_deviation = theirs.predict(at, return_std=True)
    np.testing.assert_allclose(mean, values.mean() + scale * their_mean, rtol=1e-9)
    np.testing.assert_allclose(deviation, scale * their_deviation, rtol=1e-6)


def test_fitted_process_predicts_and_knows_how_well() -> None:
    rng = np.random.default_rng(0)
    points, at = rng.random((60, 3)), rng.random((200, 3))
    fitted = GaussianProcess.fitted(points, wave(points) + 0.05 * rng.standard_normal(60))
    mean, deviation = fitted.at(at)
    error = np.abs(mean - wave(at))
    assert error.mean() < 0.05
    assert (error < 2 * deviation).mean() > 0.9
    lengths = np.exp(fitted.logs[:-1])
    assert lengths[2] > 3 * lengths[:2].max()


def test_fit_is_as_likely_as_scikit_learns_without_a_prior() -> None:
    rng = np.random.default_rng(1)
    points = rng.random((80, 2))
    values = wave(points) + 0.1 * rng.standard_normal(80)
    kernel = ConstantKernel(1.0, "fixed") * Matern([1.0, 1.0], nu=2.5) + WhiteKernel(0.01, (1e-5, 1.0))
    theirs = GaussianProcessRegressor(kernel).fit(points, (values - values.mean()) / values.std())
    logs = GaussianProcess.fitted(points, values).logs
    assert theirs.log_marginal_likelihood(logs) > theirs.log_marginal_likelihood_value_ - 3


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0]], ids=["one", "equal"])
def test_process_of_values_without_a_spread_gives_their_value(values: list[float]) -> None:
    points = np.random.default_rng(0).random((len(values), 2))
    mean, deviation = GaussianProcess.fitted(points, np.array(values)).at(points)
    np.testing.assert_allclose(mean, values)
    assert np.isfinite(deviation).all()
