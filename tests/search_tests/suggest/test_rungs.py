"""Successive halving by non-dominated rank."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from search.suggest.rungs import Rungs, RungValues, is_promoted
from tests.search_tests import builders


@pytest.mark.parametrize(("factor", "num_best"), [(1, 12), (1.5, 8), (2, 6), (5, 3), (12, 1), (20, 1)])
def test_the_best_share_of_all_that_came_is_promoted(factor: float, num_best: int) -> None:
    chain = [(1 - n / 20, 2 - n / 20) for n in range(12)]  # each dominates the next
    shuffled = random.Random(0).sample(chain, 12)
    for place, values in enumerate(chain):
        others = [other for other in shuffled if other != values]
        assert is_promoted(values, others, factor) is (place < num_best)


def test_the_first_at_a_rung_is_promoted_then_the_best_share_of_all_that_came() -> None:
    rungs = Rungs(3)
    assert rungs.promotes(0, (0.5, 1.5))
    assert not rungs.promotes(0, (0.4, 1.4))
    assert not rungs.promotes(0, (0.3, 1.3))
    assert rungs.promotes(0, (0.6, 1.6))
    assert rungs.promotes(0, (0.55, 1.55))  # 5 / 3: two may
    assert not rungs.promotes(0, (0.52, 1.52))
    assert rungs.promotes(0, (0.7, 1.7))
    assert rungs.promotes(1, (0.1, 1.1))  # another rung


@pytest.mark.parametrize("values", [(0.99, 1.0), (0.999, 0.9), (0.99, float("nan"))])
def test_a_trial_no_faster_than_dense_is_not_promoted_and_does_not_count(values: RungValues) -> None:
    assert not is_promoted(values, [], 3)
    assert not is_promoted(values, [(0.1, 1.1)], 1)
    assert is_promoted((0.98, 1.01), [values, values], 3)
    rungs = Rungs(3)
    assert not any(rungs.promotes(2, values) for _ in range(3))
    assert rungs.promotes(2, (0.98, 1.01))


def test_a_factor_of_one_stops_none_that_is_faster() -> None:
    rungs = Rungs(1)
    assert all(rungs.promotes(0, (1 / n, 1 + 1 / n)) for n in range(1, 20))


def test_of_equal_trials_the_later_are_worse() -> None:
    assert not is_promoted((0.5, 1.5), [(0.5, 1.5)], 2)
    assert is_promoted((0.5, 1.5), [(0.5, 1.5)], 1)


def test_about_the_share_is_promoted() -> None:
    points = 1 + np.random.default_rng(0).random((200, 2))
    rungs = Rungs(3)
    promoted = [rungs.promotes(1, (a, b)) for a, b in points]
    assert 0.25 < np.mean(promoted) < 0.45  # at random, the later are compared with more that is good


def test_what_was_not_good_stays_out_whatever_the_order() -> None:
    good, bad = [(0.9, 1.9 + n / 100) for n in range(10)], [(0.1, 1.1 + n / 100) for n in range(20)]
    rungs = Rungs(3)
    promoted = {point: rungs.promotes(0, point) for point in [*good, *bad]}
    assert not any(promoted[point] for point in bad)


def test_a_resumed_search_remembers_the_rungs() -> None:
    outcomes = [replace(builders.outcome(f"t{n:03d}", 0.9, 1.5), rungs=((0.9, 1.9),)) for n in range(5)]
    assert not Rungs(2, outcomes).promotes(0, (0.5, 1.5))
    assert Rungs(2).promotes(0, (0.5, 1.5))
    slow = [replace(outcome, rungs=((0.9, 1.0), (0.9, float("nan")))) for outcome in outcomes]
    assert all(Rungs(2, slow).promotes(rung, (0.5, 1.5)) for rung in (0, 1))
