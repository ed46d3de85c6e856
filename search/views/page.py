"""The page, colours, axes and layout that all pictures share."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go

FRONT_COLOUR, KNEE_COLOUR, DENSE_COLOUR = "#1f5fa8", "#d1495b", "#222222"
FAINT_COLOUR, GRID_COLOUR = "#b9c1cb", "#e9ecef"

LINE_COLOURS = ("#1f5fa8", "#d1495b", "#2e8b57", "#c98a00", "#7a4ea3", "#5b6770")
"""Colours of lines that stand for nothing in particular, in the order of their use."""

AXIS = {"gridcolor": GRID_COLOUR, "linecolor": DENSE_COLOUR, "ticks": "outside", "zeroline": False}

# plotly 7 gives every page a button that uploads the figure to Plotly's cloud; ours has none.
PAGE_CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"]}


def lay_out(figure: go.Figure, title: str, *, top: int = 90, bottom: int = 70, font_size: int = 15) -> None:
    """Gives a figure its title, colours, font, legend and margins.

    Args:
        title: HTML.
        top: margin above the axes in pixels; title and legend stand in it.
        bottom: margin below the axes in pixels.
    """
    figure.update_layout(
        title={"text": title, "x": 0.02},
        plot_bgcolor="white",
        paper_bgcolor="white",
        font={"family": "Helvetica, Arial, sans-serif", "size": font_size, "color": DENSE_COLOUR},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        margin={"l": 80, "r": 30, "t": top, "b": bottom},
    )


def to_page(figure: go.Figure, title: str) -> str:
    """Returns a figure as one HTML page that needs no other file and no network.

    Args:
        title: plain text, for the browser's tab.
    """
    html: str = figure.to_html(include_plotlyjs=True, full_html=True, config=PAGE_CONFIG)
    return html.replace("<head>", f"<head><title>{escape(title)}</title>", 1)
