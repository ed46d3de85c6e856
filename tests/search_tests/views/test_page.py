"""The page and layout of all pictures: no network, no upload, titles that are text."""

from __future__ import annotations

import plotly.graph_objects as go

from search.views.page import lay_out, to_page
from tests.search_tests.views.pages import Page


def test_page_loads_nothing_and_cannot_upload_the_figure() -> None:
    html = to_page(go.Figure(go.Scatter(x=[1], y=[2], name="a trace")), "title")
    assert Page(html).loads == []
    assert "plotly.js v" in html
    assert '"modeBarButtonsToRemove": ["sendChartToCloud"' in html
    assert "a trace" in html


def test_title_of_a_page_is_text_not_markup() -> None:
    assert Page(to_page(go.Figure(), "a<script>b")).title == "a<script>b"


def test_every_picture_is_on_white_with_its_title_and_margins() -> None:
    figure = go.Figure()
    lay_out(figure, "Title", top=123, bottom=45, font_size=11)
    layout = figure.layout
    assert (layout.title.text, layout.margin.t, layout.margin.b, layout.font.size) == ("Title", 123, 45, 11)
    assert (layout.plot_bgcolor, layout.paper_bgcolor) == ("white", "white")
