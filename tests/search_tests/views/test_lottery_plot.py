"""The picture of a lottery: every seed, its mean, and the gradient norms of the last round."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import pytest

from search.views.lottery_plot import draw_lottery, lottery_html, lottery_info
from tests.search_tests.views.pages import Page


def row(arm: str, number: int, top1: float, norms: tuple[float, ...] = (1.0,)) -> dict[str, Any]:
    """One row of a lottery's record: half of the weights go in each of two rounds."""
    return {"arm": arm, "sparsity": 0.0 if arm == "dense" else 0.5 * number, "top1": top1, "gradient_norms": norms}


FIRST_SEED = [row("dense", 0, 0.9, (4.0, 2.0)), row("ticket", 1, 0.8), row("ticket", 2, 0.7, (2.0, 0.5))]
SECOND_SEED = [row("dense", 0, 0.7, (2.0, 1.0)), row("ticket", 1, 0.6), row("ticket", 2, 0.6, (4.0, 1.5))]
RECORD = {"name": "a<b", "rows": [*FIRST_SEED, *SECOND_SEED]}


def test_picture_shows_every_seed_its_mean_and_the_norms_of_the_last_round() -> None:
    figure = draw_lottery(lottery_info(RECORD), "title")
    seeds, means, norms = (trace for trace in figure.data if trace.name == "ticket")
    assert isinstance(seeds, go.Scatter)
    assert list(zip(seeds.x, seeds.y, strict=True)) == [
        ("ticket, 50%", 80), ("ticket, 50%", 60), ("ticket, 100%", 70), ("ticket, 100%", 60),
    ]  # fmt: skip
    assert (list(means.x), list(means.y)) == (["ticket, 50%", "ticket, 100%"], pytest.approx([70, 65]))
    assert (list(norms.x), list(norms.y)) == ([1, 2], [3, 1])
    assert [trace.name for trace in figure.data if trace.showlegend is None] == ["dense", "ticket"]
    assert (figure.layout.yaxis2.type, norms.yaxis) == ("log", "y2")


def test_page_of_a_lottery_loads_nothing_and_its_name_is_text() -> None:
    html = lottery_html(RECORD)
    assert Page(html).loads == [] and Page(html).title == "Lottery tickets of a<b"
    assert "a&lt;b" in html
