"""Ridge regressions and matrix powers against brute force."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from pruning.repair.moments import Moments, Part
from pruning.repair.regression import SecondMoments, best_slopes, matrix_power
from tests.pruning_tests import reference


def second_moments(x: Tensor, y: Tensor, is_held: Tensor, *, centred: bool = True) -> dict[Part, SecondMoments]:
    moments, weight = Moments(x.shape[1]), torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64)
    moments.add(torch.cat([x, y], dim=1), torch.ones(len(x)), is_held)
    return {part: SecondMoments.of(moments, part, weight, None, weight, centred=centred) for part in get_args(Part)}


@pytest.mark.parametrize("centred", [True, False])
def test_regression_takes_the_ridge_that_is_best_on_held_out_samples(centred: bool) -> None:
    answers = set()
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        count, noise = int(torch.randint(12, 60, (), generator=generator)), 10.0 ** float(seed % 6 - 2)
        x = torch.randn(count, 6, generator=generator) * torch.logspace(-1, 0.5, 6)
        x = x + torch.randn(6, generator=generator)
        truth = torch.randn(6, 3, generator=generator)
        y = x @ truth + noise * torch.randn(count, 3, generator=generator) + torch.randn(3, generator=generator)
        is_held = torch.arange(count) % 4 == 3
        root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        metric = root @ root.T
        both = torch.cat([y, y.flip(0)], dim=1)  # the second target has little to do with the features
        slope, _ = best_slopes(second_moments(x, both, is_held, centred=centred), metric)
        expected = reference.ridge_slope(x, y, is_held, metric, centred=centred)
        assert (slope is None) == (expected is None), seed
        answers.add(slope is None)
        if slope is not None and expected is not None:
            torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert answers == {True, False}  # both answers were seen


def test_a_target_that_has_nothing_to_do_with_the_features_gets_no_slope() -> None:
    x = torch.eye(8).repeat(4, 1)
    y = torch.cat([torch.full((8, 2), 1.0), torch.full((8, 2), -1.0)]).repeat(2, 1)  # as often +1 as -1 for every x
    seconds = second_moments(x, y, torch.arange(32) >= 16)
    assert best_slopes(seconds, torch.eye(2, dtype=torch.float64)) == [None]


def test_features_that_never_vary_give_no_slope_or_a_finite_one() -> None:
    generator = torch.Generator().manual_seed(0)
    seconds = second_moments(torch.full((20, 4), 2.5), torch.randn(20, 2, generator=generator), torch.arange(20) < 5)
    (slope,) = best_slopes(seconds, torch.eye(2, dtype=torch.float64))
    assert slope is None or bool(slope.isfinite().all())


def test_powers_of_a_matrix_of_full_rank_are_those_of_its_eigenvalues() -> None:
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = root @ root.T + torch.eye(5)
    torch.testing.assert_close(matrix_power(matrix, 0.5) @ matrix_power(matrix, 0.5), matrix)
    torch.testing.assert_close(
        matrix_power(matrix, -0.5) @ matrix @ matrix_power(matrix, -0.5), torch.eye(5, dtype=torch.float64)
    )
    assert matrix_power(torch.zeros(3, 3, dtype=torch.float64), -0.5).isfinite().all()
