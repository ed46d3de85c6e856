"""The predicted cost of a plan against a sum unit by unit, and token costs against the line between two points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pruning.methods.allocation import PricedPlans
from pruning.methods.profile import REMOVED_SHARES, block_costs, token_costs_at
from tests.pruning_tests.methods.invented import (
    MIDDLE,
    multiples_of,
    profile_of,
    random_plan,
    slow_cost,
    slow_token_cost,
)


def test_the_predicted_cost_of_a_plan_is_the_sum_over_units_and_removals() -> None:
    profile, generator = profile_of(MIDDLE, seed=5), torch.Generator().manual_seed(1)
    plans = PricedPlans(profile, MIDDLE, 0.5, multiples_of(MIDDLE, 8))
    for _ in range(20):
        plan = random_plan(plans, generator)
        expected = slow_cost(profile, MIDDLE, plan, 0.5)
        assert sum(map(sum, block_costs(profile, MIDDLE, plan))) == pytest.approx(expected, rel=1e-9)


def test_costs_of_other_shares_lie_on_lines_between_the_measured_ones_on_logarithmic_axes() -> None:
    costs = profile_of(MIDDLE, seed=2).tokens[0]
    np.testing.assert_allclose(token_costs_at(costs, np.array(REMOVED_SHARES)), costs, rtol=1e-9)
    shares = np.array([[0.001, 0.03, 0.1], [0.4, 0.9, 0.99]])
    expected = [[slow_token_cost(costs, share) for share in row] for row in shares.tolist()]
    np.testing.assert_allclose(token_costs_at(costs, shares), expected, rtol=1e-9)


def test_tokens_that_cost_nothing_are_priced_at_next_to_nothing() -> None:
    costs = token_costs_at((0.0,) * len(REMOVED_SHARES), np.array([0.01, 0.5, 0.99]))
    np.testing.assert_allclose(costs, 1e-7)
