"""The picture of several sweeps: hypervolume over trials and over seconds."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import cycle
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from search.views.page import AXIS, LINE_COLOURS, lay_out, to_page


def comparison_html(record: Mapping[str, Any]) -> str:
    """Draws the comparison of several sweeps as one HTML page that needs no other file and no network.

    Args:
        record: as `search.commands.compare.compare_sweeps` returns it.
    """
    return to_page(draw_comparison(record), "Hypervolume of sweeps")


def draw_comparison(record: Mapping[str, Any]) -> go.Figure:
    """Draws hypervolumes over trials on the left, over seconds on the right; bands are the intervals of the means."""
    figure = make_subplots(cols=2, horizontal_spacing=0.08)
    for column, key in enumerate(("by_trial", "by_second"), start=1):
        for curve, colour in zip(record[key], cycle(LINE_COLOURS)):  # the colours go round
            band = {"x": [*curve["x"], *curve["x"][::-1]], "y": [*curve["high"], *curve["low"][::-1]]}
            group = {"legendgroup": curve["line"]}
            if curve["num_seeds"] > 1:
                style = {"fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}}
                figure.add_trace(
                    go.Scatter(**band, **style, **group, mode="lines", hoverinfo="skip", showlegend=False),
                    row=1, col=column,
                )  # fmt: skip
            name = f"{escape(curve['line'])} ({curve['num_seeds']} seed{'s' if curve['num_seeds'] > 1 else ''})"
            line = {"color": colour, "width": 2, "shape": "hv"}
            figure.add_trace(
                go.Scatter(
                    x=curve["x"], y=curve["mean"], name=name, mode="lines", line=line, showlegend=column == 1, **group
                ),
                row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(AXIS)
    # By the means: the interval of two seeds may be many times the figure.
    largest = max(value for curve in record["by_trial"] for value in curve["mean"])
    figure.update_yaxes(AXIS, range=[0, 1.1 * largest if largest > 0 else 1])
    lay_out(figure, "Hypervolume of accuracy and speed-up, over the dense model's", top=110)
    figure.update_layout(xaxis={"title": {"text": "trials"}}, xaxis2={"title": {"text": "seconds"}})
    return figure
