"""The picture of a study: panels, lines, units and bars, from a record made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from search.views.study_plot import draw_study, study_html, study_info
from tests.search_tests.views.pages import Page


def line(name: str, spread: float = 0.0) -> dict[str, Any]:
    y = [0.5, 0.625, 0.75]
    low, high = [value - spread for value in y], [value + 2 * spread for value in y]
    return {"name": name, "x": [0.1, 0.2, 0.4], "y": y, "low": low, "high": high}


def record(**changes: Any) -> dict[str, Any]:
    lines = {"top1": [line("a", spread=0.125), line("b<c")], "speedup": [line("a")]}
    question = {"question": "How <small>?", "sentence": "As small & fast as it gets.", "x_label": "cut-off"}
    return question | {"x_unit": "", "log_x": False, "dense": {"top1": 0.9, "speedup": 1.0}, "lines": lines} | changes


def test_picture_has_a_panel_a_metric_in_its_unit() -> None:
    info = study_info(record())
    assert [panel.y_label for panel in info.panels] == ["top-1 on val (%)", "speed-up over dense, measured"]
    assert [panel.dense for panel in info.panels] == [90.0, 1.0]
    traces = draw_study(info).data
    assert [(trace.name, trace.xaxis) for trace in traces] == [("a", "x"), ("b&lt;c", "x"), ("a", "x2")]
    assert list(traces[0].x) == [0.1, 0.2, 0.4]
    assert list(traces[0].y) == [50.0, 62.5, 75.0]
    assert list(traces[2].y) == [0.5, 0.625, 0.75]


def test_line_that_is_in_both_panels_has_one_colour_and_one_entry_in_the_legend() -> None:
    first, _, again = draw_study(study_info(record())).data
    assert first.line.color == again.line.color
    assert (first.showlegend, again.showlegend) == (True, False)


def test_bars_span_the_variants_at_one_x_and_lines_of_single_variants_have_none() -> None:
    several, single, _ = draw_study(study_info(record())).data
    assert list(several.error_y.array) == pytest.approx([25.0] * 3)
    assert list(several.error_y.arrayminus) == pytest.approx([12.5] * 3)
    assert single.error_y.array is None


@pytest.mark.parametrize(("unit", "log_x", "label"), [("", False, "cut-off"), ("share", True, "cut-off (share)")])
def test_axis_names_the_parameter_and_its_unit(unit: str, log_x: bool, label: str) -> None:
    axis = draw_study(study_info(record(x_unit=unit, log_x=log_x))).layout.xaxis
    assert (axis.title.text, axis.type) == (label, "log" if log_x else "linear")


def test_page_loads_nothing_and_its_question_and_answer_are_text() -> None:
    page = Page(study_html(record()))
    assert (page.loads, page.title) == ([], "How <small>?")
    title = draw_study(study_info(record())).layout.title.text
    assert title == "How &lt;small&gt;?<br><sup>As small &amp; fast as it gets.</sup>"
