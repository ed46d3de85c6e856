"""Successive halving by non-dominated rank: against the slow definition, and as Ray calls it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from search.cluster.scheduler import NonDominatedHalving
from search.front import selection_order
from tests.search_tests import builders

Points = list[tuple[float, float]]


def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and one != other


def slow_ranks(points: list[tuple[float, ...]]) -> dict[tuple[float, ...], int]:
    """Of points that are all different: how many fronts have to go before each is on the front."""
    ranks, rank, left = dict[tuple[float, ...], int](), 0, list(points)
    while left:
        front = [point for point in left if not any(beats(other, point) for other in left)]
        ranks |= dict.fromkeys(front, rank)
        left = [point for point in left if point not in front]
        rank += 1
    return ranks


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_order_is_by_non_dominated_rank(m: int, seed: int) -> None:
    points = np.random.default_rng(seed).random((30, m))
    ranks = slow_ranks([tuple(point) for point in points])
    order = selection_order(points)
    assert sorted(order) == list(range(30))
    ordered = [ranks[tuple(points[row])] for row in order]
    assert ordered == sorted(ordered)


def test_within_a_rank_the_ends_come_first_then_the_least_crowded() -> None:
    #                      neighbours' box: 0.1 + 0.2 ...  0.1 + 0.8    0.8 + 0.2
    line = np.array([[0.0, 1.0], [0.1, 0.9], [0.2, 0.8], [0.9, 0.1], [1.0, 0.0]])
    order = selection_order(line)
    assert set(order[:2]) == {0, 4}
    assert order[2:].tolist() == [2, 3, 1] or order[2:].tolist() == [3, 2, 1]
    distance_2, distance_3, distance_1 = 0.8 + 0.8, 0.8 + 0.8, 0.2 + 0.2
    assert distance_2 == distance_3 > distance_1


def test_equal_points_and_nan_come_later_and_nothing_gives_nothing() -> None:
    assert selection_order(np.array([[1.0, 1.0], [1.0, 1.0], [np.nan, 9.0], [0.5, 0.5]])).tolist() == [0, 1, 3, 2]
    assert selection_order(np.empty((0, 2))).tolist() == []
    assert selection_order(np.array([[1.0, 2.0]])).tolist() == [0]


def test_the_first_at_a_rung_goes_on_then_the_best_share_of_all_that_came() -> None:
    scheduler = NonDominatedHalving(3)
    assert scheduler.promotes(0, (0.5, 1.5))
    assert not scheduler.promotes(0, (0.4, 1.4))
    assert not scheduler.promotes(0, (0.3, 1.3))
    assert scheduler.promotes(0, (0.6, 1.6))
    assert scheduler.promotes(0, (0.55, 1.55))  # 5 / 3: two may
    assert not scheduler.promotes(0, (0.52, 1.52))
    assert scheduler.promotes(0, (0.7, 1.7))
    assert scheduler.promotes(1, (0.1, 1.1))  # another rung


@pytest.mark.parametrize("rung", [0, 1, 2])
def test_who_is_no_faster_than_dense_does_not_go_on(rung: int) -> None:
    scheduler = NonDominatedHalving(3)
    assert not scheduler.promotes(rung, (0.99, 1.0))
    assert not scheduler.promotes(rung, (0.999, 0.9))
    assert scheduler.promotes(rung, (0.98, 1.01))  # the others do not count


def test_a_factor_of_one_stops_none() -> None:
    scheduler = NonDominatedHalving(1)
    assert all(scheduler.promotes(0, (1 / n, 1 + 1 / n)) for n in range(1, 20))


@pytest.mark.parametrize("rung", [0, 1])
def test_about_the_share_goes_on(rung: int) -> None:
    points = 1 + np.random.default_rng(0).random((300, 2))
    scheduler = NonDominatedHalving(3)
    promoted = [scheduler.promotes(rung, (a, b)) for a, b in points]
    assert 0.25 < np.mean(promoted) < 0.45  # at random, the later are held against more that is good


def test_what_was_not_good_stays_out_whatever_the_order() -> None:
    good, bad = [(0.9, 1.9 + n / 100) for n in range(10)], [(0.1, 1.1 + n / 100) for n in range(20)]
    scheduler = NonDominatedHalving(3)
    points = [*good, *bad]
    promoted = {point: scheduler.promotes(0, point) for point in points}
    assert not any(promoted[point] for point in bad)


def test_a_resumed_search_remembers_the_rungs() -> None:
    known = [replace(builders.outcome(f"t{n:03d}", 0.9, 1.5), rungs=((0.9, 1.9),)) for n in range(5)]
    assert not NonDominatedHalving(2, known).promotes(0, (0.5, 1.5))
    assert NonDominatedHalving(2).promotes(0, (0.5, 1.5))
    slow = [replace(each, rungs=((0.9, 1.0), (0.9, float("nan")))) for each in known]
    assert all(NonDominatedHalving(2, slow).promotes(rung, (0.5, 1.5)) for rung in (0, 1))


def test_ray_is_told_to_go_on_or_to_stop() -> None:
    scheduler: Any = NonDominatedHalving(2)
    told = [
        scheduler.on_trial_result(None, None, result)
        for result in (
            {"rungs": [(0.5, 1.5)]},
            {"progress": {}},
            {"rungs": [(0.4, 1.4)]},
            {"rungs": [(0.5, 1.5), (0.1, 1.1)]},
        )
    ]
    go_on, stop = TrialScheduler.CONTINUE, TrialScheduler.STOP
    assert told == [go_on, go_on, stop, go_on]
