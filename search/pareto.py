"""Dominance, hypervolume and knee of points with several objectives; numpy only."""

# n points, m objectives; every objective is maximised

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
"""(n, m): one row a point, one column an objective."""


def non_dominated(values: Values) -> NDArray[np.intp]:
    """Returns the rows of the points that no other point dominates.

    A point dominates another if it is as good in every objective and better in one. Of equal points only the
    first counts; a point with a NaN never does.

    Args:
        values: (n, m), all maximised; n = 0 is fine.

    Returns:
        Row numbers, ascending.
    """
    (rows,) = np.nonzero(~np.isnan(values).any(axis=1))
    # Best first, objective by objective: no row is dominated by a later one. lexsort is stable, equal rows keep order.
    order = rows[np.lexsort(-values[rows].T[::-1])]
    front: list[int] = []
    for row in order:
        if not (values[front] >= values[row]).all(axis=1).any():
            front.append(int(row))
    return np.sort(np.array(front, dtype=np.intp))


def selection_order(values: Values) -> NDArray[np.intp]:
    """Sorts rows by non-dominated rank, best first, and within a rank by crowding distance (NSGA-II, Deb et al. 2002).

    The first rank is the front, the next the front of the rest, and so on. The distance of a point is the perimeter of
    the box between its neighbours of the same rank, each objective scaled to its range there; ends come first. Equal
    points keep their order, each at a rank of its own; a point with a NaN comes last.

    Args:
        values: (n, m), all maximised.
    """
    is_number = ~np.isnan(values).any(axis=1)
    rows = np.arange(len(values))
    as_good = (values[:, None] >= values[None]).all(axis=2)  # (n, n): of a row against a column
    beats = as_good & (~as_good.T | (rows[:, None] < rows[None]))
    num_better, left, order = beats.sum(axis=0), rows[is_number], list[int]()
    while len(left):
        is_front = num_better[left] == 0
        front, left = left[is_front], left[~is_front]
        order += front[np.argsort(-_crowding(values[front]), kind="stable")].tolist()
        num_better = num_better - beats[front].sum(axis=0)
    return np.array([*order, *rows[~is_number]], dtype=np.intp)


def _crowding(values: Values) -> Values:
    """Computes the crowding distance of each point of one rank: (n, m) -> (n,)."""
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance


def hypervolume(values: Values, reference: Values) -> float:
    """Computes the volume that the points dominate above the reference, exactly.

    Points at or below the reference in any objective add nothing, nor do duplicates, dominated points and NaNs.

    Args:
        values: (n, m), all maximised, m >= 1; n = 0 gives 0.
        reference: (m,).
    """
    gains = values - reference
    gains = gains[(gains > 0).all(axis=1)]
    return _volume(gains[non_dominated(gains)])


def _volume(gains: Values) -> float:
    """Computes the volume of the union of the boxes from the origin to each point; (n, m), positive, non-dominated."""
    if len(gains) == 0:
        return 0.0
    if gains.shape[1] == 1:
        return float(gains.max())
    gains = gains[np.argsort(-gains[:, -1])]
    heights = -np.diff(gains[:, -1], append=0.0)
    if gains.shape[1] == 2:  # a staircase: as the last objective falls, the first rises
        return float(gains[:, 0] @ heights)
    # Between two neighbouring heights, the slice is the union of all boxes at least as high.
    tops = (gains[: count + 1, :-1] for count in range(len(gains)))
    return sum(float(height) * _volume(top[non_dominated(top)]) for height, top in zip(heights, tops, strict=True))


def knee(values: Values) -> int:
    """Returns the row of the point of a front after which more of one objective costs much of the other.

    Both objectives are scaled to [0, 1]; the knee is the point nearest to (1, 1), the best of both. The usual
    distance above the line between the ends finds no knee on a front that sags below it, and would give an end.
    Ties, and so a front of two points, go to the first objective (the more accurate model).

    Args:
        values: (n, 2), non-dominated, n >= 1.

    Returns:
        Its row.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    missing = (high - values) / np.where(high > low, high - low, 1.0)
    distance = np.linalg.norm(missing, axis=1).round(12)  # rounded, so that a tie stays one
    return int(np.lexsort((-values[:, 0], distance))[0])
