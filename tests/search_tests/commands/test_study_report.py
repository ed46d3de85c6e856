"""The report of a study: rows, lines and the sentences that are computed from them."""

from __future__ import annotations

from typing import Any

import pytest

from search.commands.study_report import SHARE, best_series, best_x, caveats, lines_of
from search.views.study_plot import StudyLine


def line(name: str, **points: float) -> StudyLine:
    """A line through points that are given as `x5=0.9`, which is 0.9 at 0.5."""
    x, y = tuple(float(key[1:]) / 10 for key in points), tuple(points.values())
    return StudyLine(name=name, x=x, y=y, low=y, high=y)


def test_the_best_x_is_best_on_most_lines() -> None:
    lines = [line("t 1", x1=0.9, x2=0.8), line("t 2", x1=0.7, x2=0.6), line("t 3", x1=0.1, x2=0.5)]
    sentence = best_x(lines, "top1", "cut-off", "target")
    assert sentence.startswith("best cut-off 0.1 at 2 of 3 targets; top-1 over all tried 80.0 to 90.0 % at t 1, 60.0")


def test_an_x_that_ties_counts_and_the_mean_decides_between_as_many() -> None:
    lines = [line("a", x1=0.9, x2=0.9), line("b", x1=0.2, x2=0.8), line("c", x1=0.5, x2=0.4)]
    assert best_x(lines, "top1", "x", "line").startswith("best x 0.2 at 2 of 3 lines")


def test_the_best_series_is_found_between_the_points_where_all_have_values() -> None:
    # At 0.2, 0.4 and 0.6; a is 0.5, 0.7, 0.9 there, b 0.8, 0.8, 0.8; a's points at 0.0 and 0.8 do not count.
    lines = [line("a", x0=0.3, x4=0.7, x8=1.1), line("b", x2=0.8, x6=0.8)]
    sentence = best_series(lines, "top1", "MACs")
    assert sentence == "at equal MACs, b has the highest top-1 at 2 of 3 points (means: b 80.0 %, a 70.0 %)."


def test_speed_is_stated_as_a_ratio() -> None:
    sentence = best_series([line("a", x1=1.5), line("b", x1=1.25)], "speedup", "MACs")
    assert sentence == "at equal MACs, a has the highest speed-up at 1 of 1 points (means: a 1.50, b 1.25)."


def test_lines_without_a_common_x_do_not_compare_and_no_line_says_so() -> None:
    sentence = best_series([line("a", x1=0.5, x2=0.6), line("b", x3=0.5)], "top1", "MACs")
    assert sentence == "the lines have no MACs in common, so their top-1 does not compare."
    assert best_series([], "top1", "MACs") == best_x([], "top1", "x", "") == "nothing was measured."


def row(series: str, x: float, top1: float | None, **other: Any) -> dict[str, Any]:
    share = None if top1 is None else x
    values = {"series": series, "x": x, SHARE: share, "top1": top1, "state": "measured" if top1 else "failed"}
    return values | {"target_ratio": x, "reason": None if top1 else "it broke"} | other


def test_variants_at_one_x_are_drawn_as_their_mean_with_their_spread() -> None:
    rows = [row("a", 0.5, 0.8), row("a", 0.2, 0.5), row("a", 0.5, 0.9), row("a", 0.5, None)]
    (drawn,) = lines_of(rows, "x", "top1")
    assert (drawn.x, drawn.low, drawn.high) == ((0.2, 0.5), (0.5, 0.8), (0.5, 0.9))
    assert drawn.y == pytest.approx((0.5, 0.85))


def test_a_front_leaves_out_what_its_own_series_beats() -> None:
    rows = [row("a", 0.2, 0.5), row("a", 0.4, 0.4), row("a", 0.6, 0.9), row("b", 0.6, 0.1)]
    a, b = lines_of(rows, SHARE, "top1", front_only=True)
    assert (a.x, a.y, b.x) == ((0.2, 0.6), (0.5, 0.9), (0.6,))


def test_caveats_count_broken_variants_and_missed_targets() -> None:
    rows = [row("a", 0.5, 0.8), row("a", 0.5, 0.8, target_ratio=0.4), row("a", 0.5, None)]
    broken = "1 of 3 gave no model, the first since it broke."
    assert caveats(rows, "x") == [broken, "1 of 3 spent their budgets before they met the target."]
    assert caveats(rows, SHARE) == [broken]
    assert caveats(rows[:1], "x") == []
