"""Dominance against brute force, hypervolumes against closed forms and unit cubes, the knee by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from search.pareto import Values, hypervolume, knee, non_dominated, selection_order

NAN = float("nan")


def brute_force_front(values: Values) -> list[int]:
    """Finds the front by its definition, row against row."""

    def beats(a: int, b: int) -> bool:
        better = (values[a] >= values[b]).all() and (values[a] > values[b]).any()
        return bool(better or (a < b and (values[a] == values[b]).all()))

    rows = [row for row in range(len(values)) if not np.isnan(values[row]).any()]
    return [row for row in rows if not any(beats(other, row) for other in rows)]


def count_unit_cubes(values: Values, reference: Values, size: int) -> int:
    """Counts the unit cubes of a grid below at least one of some whole-numbered points up to `size`."""
    corners = product(*(range(int(start), size) for start in reference))
    return sum(any((np.array(corner) + 1 <= value).all() for value in values) for corner in corners)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_front_is_that_of_brute_force(m: int) -> None:
    random = np.random.default_rng(m)
    for n in (1, 2, 5, 40):
        for _ in range(20):  # few whole numbers, so that ties and equal rows are common
            values = random.integers(0, 6, (n, m)).astype(float)
            values[random.random((n, m)) < 0.05] = NAN
            assert non_dominated(values).tolist() == brute_force_front(values)


def test_front_of_nothing_is_empty() -> None:
    assert non_dominated(np.empty((0, 2))).tolist() == []


def test_of_equal_points_the_first_is_on_the_front() -> None:
    assert non_dominated(np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])).tolist() == [1]


def test_point_with_nan_is_not_on_the_front_and_beats_nothing() -> None:
    assert non_dominated(np.array([[9.0, NAN], [1.0, 1.0], [NAN, NAN]])).tolist() == [1]


def test_infinite_point_beats_all() -> None:
    assert non_dominated(np.array([[1.0, 2.0], [np.inf, 2.0], [-np.inf, 3.0]])).tolist() == [1, 2]


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_hypervolume_counts_the_unit_cubes_below_the_points(m: int) -> None:
    random = np.random.default_rng(m)
    for n in (1, 2, 3, 8):
        for _ in range(5):
            values = random.integers(0, 6, (n, m)).astype(float)
            reference = random.integers(0, 3, m).astype(float)
            assert hypervolume(values, reference) == count_unit_cubes(values, reference, size=6)


def test_hypervolume_of_one_point_is_its_box() -> None:
    assert hypervolume(np.array([[0.5, 3.0]]), np.array([0.25, 1.0])) == 0.5
    assert hypervolume(np.array([[2.0, 3.0, 4.0]]), np.zeros(3)) == 24.0


def test_hypervolume_of_two_points_is_boxes_less_overlap() -> None:
    values = np.array([[0.9, 1.5], [0.6, 3.0]])
    assert hypervolume(values, np.array([0.0, 1.0])) == pytest.approx(0.9 * 0.5 + 0.6 * 2.0 - 0.6 * 0.5)


def test_hypervolume_of_points_on_a_line_tends_to_the_triangle() -> None:
    x = np.linspace(0, 1, 1001)
    assert hypervolume(np.column_stack((x, 1 - x)), np.zeros(2)) == pytest.approx(0.5 - 0.5 / 1000)


def test_points_at_or_outside_the_reference_add_nothing() -> None:
    reference = np.array([1.0, 1.0])
    outside = np.array([[1.0, 9.0], [9.0, 1.0], [0.5, 9.0], [NAN, 9.0]])
    assert hypervolume(outside, reference) == 0.0
    assert hypervolume(np.vstack((outside, [[2.0, 3.0]])), reference) == 2.0


def test_hypervolume_of_nothing_is_zero_and_duplicates_count_once() -> None:
    assert hypervolume(np.empty((0, 3)), np.zeros(3)) == 0.0
    assert hypervolume(np.array([[2.0, 2.0]] * 3), np.zeros(2)) == 4.0


def test_knee_is_nearest_to_the_best_of_both() -> None:
    front = np.array([[1.0, 0.0], [0.9, 0.7], [0.5, 0.8], [0.0, 1.0]])
    assert knee(front) == min(range(4), key=lambda row: np.hypot(*(1 - front[row]))) == 1


def test_knee_of_a_front_that_sags_is_not_an_end() -> None:
    assert knee(np.array([[1.0, 0.0], [0.4, 0.45], [0.0, 1.0]])) == 1


def test_knee_does_not_depend_on_the_units() -> None:
    front = np.array([[1.0, 0.0], [0.9, 0.7], [0.5, 0.8], [0.0, 1.0]])
    assert knee(front * [100.0, 1e-3] + [5.0, -7.0]) == 1


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ([[0.5, 2.0]], 0),
        ([[0.5, 2.0], [0.9, 1.0]], 1),
        ([[0.7, 1.3], [0.3, 1.7], [0.1, 1.9], [0.9, 1.1]], 0),  # on one line: the two in the middle tie
        (np.linspace((0.3, 3.1), (0.9, 1.2), 10).tolist(), 5),  # the same, but for rounding
        ([[0.0, 1.0], [0.1, 0.2], [1.0, 0.0]], 2),  # bent inwards so far that the ends are nearer
        ([[0.0, 1.0], [0.6, 0.9], [0.9, 0.6], [1.0, 0.0]], 2),
    ],
)
def test_knee_of_a_tie_is_the_more_accurate(front: list[list[float]], expected: int) -> None:
    assert knee(np.array(front)) == expected


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and one != other


def slow_ranks(points: list[tuple[float, ...]]) -> dict[tuple[float, ...], int]:
    """Counts, for points that are all different, the fronts that have to go before each is on the front."""
    ranks, rank, left = dict[tuple[float, ...], int](), 0, list(points)
    while left:
        front = [point for point in left if not any(dominates(other, point) for other in left)]
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
