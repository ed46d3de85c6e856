"""The picture of several sweeps: a line for each, a band where there are several seeds."""

from __future__ import annotations

from typing import Any

from search.views.comparison_plot import comparison_html, draw_comparison
from tests.search_tests.views.pages import Page


def curve(line: str, num_seeds: int, mean: tuple[float, ...] = (0.25, 0.25, 0.4)) -> dict[str, Any]:
    """One curve of `compare_sweeps`, whose interval is 0.1 each way."""
    low, high = [value - 0.1 for value in mean], [value + 0.1 for value in mean]
    return {"line": line, "num_seeds": num_seeds, "x": (1, 2, 3), "mean": mean, "low": low, "high": high}


RECORD = {"by_trial": [curve("gp", 2), curve("a<b", 1)], "by_second": [curve("gp", 2), curve("a<b", 1)]}


def test_figure_has_a_line_for_each_and_a_band_where_there_are_seeds() -> None:
    figure = draw_comparison(RECORD)
    lines = [trace for trace in figure.data if trace.fill is None]
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert [trace.name for trace in lines] == ["gp (2 seeds)", "a&lt;b (1 seed)"] * 2
    assert [trace.xaxis for trace in lines] == ["x", "x", "x2", "x2"]
    assert len(bands) == 2  # of gp, left and right
    assert tuple(lines[0].y) == (0.25, 0.25, 0.4)
    assert tuple(bands[0].x) == (1, 2, 3, 3, 2, 1)
    assert tuple(bands[0].y) == (0.35, 0.35, 0.5, 0.4 - 0.1, 0.15, 0.15)


def test_axes_name_what_they_show_and_end_above_the_means() -> None:
    layout = draw_comparison(RECORD).layout
    assert (layout.xaxis.title.text, layout.xaxis2.title.text) == ("trials", "seconds")
    assert layout.yaxis.range == (0, 1.1 * 0.4)


def test_sweeps_that_found_nothing_are_drawn_up_to_1() -> None:
    nothing = curve("gp", 1, mean=(0.0, 0.0, 0.0))
    assert draw_comparison({"by_trial": [nothing], "by_second": [nothing]}).layout.yaxis.range == (0, 1)


def test_page_of_a_comparison_loads_nothing() -> None:
    page = Page(comparison_html(RECORD))
    assert (page.loads, page.title) == ([], "Hypervolume of sweeps")
