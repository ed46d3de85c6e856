"""Weighted moments against numpy's in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pruning.repair.moments import Moments, Part

PARTS: tuple[Part, ...] = ("fit", "held", "all")


def drawn(count: int = 200, width: int = 6, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated samples of unequal spread, weights of which some are 0, and which are held out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x = x * torch.logspace(-1, 1, width) + 5 * torch.randn(width, generator=generator)
    weight = torch.rand(count, generator=generator)
    weight[::17] = 0
    return x, weight, torch.rand(count, generator=generator) < 0.3


def moments_of(x: Tensor, weight: Tensor, is_held: Tensor, sizes: tuple[int, ...]) -> Moments:
    moments = Moments()
    for batch in zip(*(part.split(sizes) for part in (x, weight, is_held)), strict=True):
        moments.add(*batch)
    return moments


def check(moments: Moments, x: Tensor, weight: Tensor, is_held: Tensor) -> None:
    for part in PARTS:
        chosen = {"fit": ~is_held, "held": is_held, "all": torch.ones_like(is_held)}[part]
        values, weights = x[chosen].double().numpy(), weight[chosen].double().numpy()
        covariance = np.cov(values, rowvar=False, ddof=0, aweights=weights)
        spread = np.sqrt(covariance.diagonal())
        mean_error = np.abs(moments.mean(part).numpy() - np.average(values, axis=0, weights=weights))
        assert (mean_error < 1e-6 * (spread + np.abs(values).max(axis=0))).all()
        assert (np.abs(moments.covariance(part).numpy() - covariance) < 1e-5 * spread[:, None] * spread).all()


@pytest.mark.parametrize("sizes", [(200,), (1, 199), (50, 150), (64, 64, 64, 8)])
def test_moments_of_each_part_and_of_both_equal_numpy_whatever_the_batches(sizes: tuple[int, ...]) -> None:
    samples = drawn()
    check(moments_of(*samples, sizes), *samples)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_samples_does_not_matter(seed: int) -> None:
    samples = drawn()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
    x, weight, is_held = (part[order] for part in samples)
    check(moments_of(x, weight, is_held, (30, 100, 70)), *samples)


def test_a_mean_far_above_the_spread_costs_no_digits() -> None:
    x, weight, is_held = drawn()
    x = (x.double() + torch.linspace(-3e3, 3e3, x.shape[1])).float()
    check(moments_of(x, weight, is_held, (20,) * 10), x, weight, is_held)


def test_moments_are_as_exact_where_products_run_in_bfloat16() -> None:
    samples = drawn()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = moments_of(*samples, (50, 150))
    check(moments, *samples)


def test_the_first_values_alone_may_be_features_that_have_rows() -> None:
    x, weight, is_held = drawn()
    every, some = Moments(), Moments(2)
    for moments in (every, some):
        moments.add(x, weight, is_held)
    for part in PARTS:
        torch.testing.assert_close(some.covariance(part), every.covariance(part)[:2])
        torch.testing.assert_close(every.covariance(part).diagonal(), every.variance(part), rtol=1e-5, atol=1e-6)
        assert torch.equal(some.variance(part), every.variance(part)) and torch.equal(some.mean(part), every.mean(part))


def test_batches_of_one_part_each_give_the_same_as_mixed_ones() -> None:
    x, weight, is_held = drawn()
    order = is_held.int().argsort(stable=True)
    cut = (int((~is_held).sum()), int(is_held.sum()))
    check(moments_of(x[order], weight[order], is_held[order], cut), x, weight, is_held)


def test_a_weight_of_three_counts_as_three_equal_samples() -> None:
    x, _, is_held = drawn(40)
    weight = torch.ones(40)
    weight[::2] = 3
    again = torch.cat([torch.arange(40), torch.arange(0, 40, 2), torch.arange(0, 40, 2)])
    once = moments_of(x, weight, is_held, (40,))
    thrice = moments_of(x[again], torch.ones(80), is_held[again], (80,))
    for part in PARTS:
        torch.testing.assert_close(once.mean(part), thrice.mean(part), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(once.covariance(part), thrice.covariance(part), rtol=1e-5, atol=1e-5)


def test_only_samples_that_weigh_something_make_a_held_out_part() -> None:
    moments = Moments()
    assert not moments.has_held
    x, ones, held = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.ones(4), torch.arange(4) == 3
    moments.add(x, ones, torch.zeros(4, dtype=torch.bool))
    assert not moments.has_held
    moments.add(x, (~held).float(), held)
    assert not moments.has_held
    moments.add(x, ones, held)
    assert moments.has_held


def test_one_sample_has_its_own_mean_and_no_spread() -> None:
    moments = Moments()
    moments.add(torch.tensor([[3.0, -7.0]]), torch.tensor([0.5]), torch.tensor([False]))
    assert moments.mean().tolist() == [3.0, -7.0]
    assert moments.covariance().tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_moments_are_float64_and_keep_no_graph() -> None:
    moments = Moments()
    moments.add(torch.ones(3, 2, requires_grad=True) * 2, torch.ones(3), torch.tensor([True, False, False]))
    assert moments.covariance("fit").dtype == moments.mean("held").dtype == torch.float64
    assert not moments.mean().requires_grad and not moments.covariance().requires_grad
