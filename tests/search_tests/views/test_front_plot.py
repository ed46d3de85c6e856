"""The picture of a front shows each model once, where it was measured, and its page needs no network."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go
import pytest

from search.front import Front
from search.goal import Goal
from search.outcome import Outcome
from search.views.front_plot import draw_front, front_html, front_info
from tests.search_tests import builders
from tests.search_tests.views.pages import Page

OUTCOMES = (
    builders.outcome("t000", 0.70, 1.5),
    builders.outcome("t001", 0.85, 2.0, top1_test=0.8412),
    builders.failed("t002"),
    builders.outcome("t003", 0.90, 1.2),
    builders.outcome("t004", 0.60, 3.0),
)
FRONT = Front.of("digits", OUTCOMES, builders.GOAL)


def traces(front: Front, outcomes: tuple[Outcome, ...]) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in draw_front(front_info(front, outcomes)).data}


def places(trace: go.Scatter) -> list[tuple[float, float]]:
    return [(round(x, 6), round(y, 6)) for x, y in zip(trace.x, trace.y, strict=True)]


def test_each_model_is_where_it_was_measured() -> None:
    drawn = traces(FRONT, OUTCOMES)
    assert list(drawn) == ["measured", "front", "knee (t001)", "dense"]
    assert places(drawn["measured"]) == [(150, 70)]
    assert places(drawn["front"]) == [(120, 90), (200, 85), (300, 60)]
    assert places(drawn["knee (t001)"]) == [(200, 85)]
    assert places(drawn["dense"]) == [(100, 90)]


def test_accuracy_bars_span_the_interval() -> None:
    bars = traces(FRONT, OUTCOMES)["front"].error_y
    assert bars.array == pytest.approx((1, 1, 1))
    assert bars.arrayminus == pytest.approx((1, 1, 1))


def test_label_tells_all_about_a_point() -> None:
    lines = traces(FRONT, OUTCOMES)["front"].hovertext[1].split("<br>")
    assert lines == [
        "<b>t001</b>",
        "top-1 85.00% (84.00% to 86.00%)",
        "test top-1 84.12%",
        "200 img/s",
        "speed-up 2.00x (1.90 to 2.10)",
        "617 k MACs an image, 2.85 M parameters",
        "exit after block 2",
    ]


def test_dominated_and_dense_models_have_labels_too() -> None:
    drawn = traces(FRONT, OUTCOMES)
    assert drawn["measured"].hovertext[0].startswith("<b>t000</b><br>top-1 70.00%")
    assert "test top-1 not taken" in drawn["measured"].hovertext[0]
    assert drawn["dense"].hovertext[0].endswith("the model before pruning")


@pytest.mark.parametrize(
    ("macs", "text"), [(999, "999 MACs"), (1_260_000, "1.26 M MACs"), (4_610_000_000, "4.61 G MACs")]
)
def test_counts_have_three_digits_and_a_unit(macs: int, text: str) -> None:
    front = Front.of("digits", (builders.outcome("t000", 0.9, 2.0, macs=macs),), builders.GOAL)
    assert text in front_info(front, ()).front[0].label


def test_axes_name_what_they_show_and_its_unit() -> None:
    layout = draw_front(front_info(FRONT, OUTCOMES)).layout
    assert layout.xaxis.title.text == "throughput, measured (img/s)"
    assert layout.yaxis.title.text == "top-1 on val (%)"
    assert (layout.plot_bgcolor, layout.paper_bgcolor) == ("white", "white")


@pytest.mark.parametrize(("accuracy", "called"), [("recall_at_1", "recall@1"), ("mean_average_precision", "mAP")])
def test_sweep_by_retrieval_is_drawn_by_it_without_bars_where_no_interval_was_taken(accuracy: str, called: str) -> None:
    values = {accuracy: 0.75}
    outcomes = (builders.outcome("t000", 0.2, 1.5, **values), builders.outcome("t001", 0.9, 1.2, **{accuracy: 0.5}))
    goal = Goal(dense=builders.measurement(0.9, 1.0, **{accuracy: 0.8}), accuracy=accuracy)
    front = Front.of("digits", outcomes, goal)
    drawn = traces(front, outcomes)
    assert places(drawn["front"]) == [(150, 75)]
    assert places(drawn["measured"]) == [(120, 50)]
    assert places(drawn["dense"]) == [(100, 80)]
    assert drawn["front"].error_y.array is None
    assert drawn["front"].hovertext[0].split("<br>")[1:3] == ["top-1 20.00% (19.00% to 21.00%)", f"{called} 75.00%"]
    assert draw_front(front_info(front, outcomes)).layout.yaxis.title.text == f"{called} on val (%)"


def test_sweep_without_a_front_still_shows_the_dense_model() -> None:
    drawn = traces(Front.of("digits", (), builders.GOAL), (builders.failed("t000"),))
    assert list(drawn) == ["measured", "front", "dense"]
    assert places(drawn["dense"]) == [(100, 90)]
    assert places(drawn["front"]) == []


def test_page_of_a_front_loads_nothing() -> None:
    html = front_html(FRONT, OUTCOMES)
    assert Page(html).loads == []
    assert "t001" in html


def test_name_of_the_sweep_is_text_not_markup() -> None:
    front = replace(FRONT, name="a<script>b")
    assert Page(front_html(front, ())).title == "a<script>b"
    assert front_info(front, ()).title == "Pareto front of a&lt;script&gt;b"
