"""The picture of a front: first the record of what it shows, then the drawing. plotly only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from search.outcome import Measurement, Outcome

FRONT_COLOUR, KNEE_COLOUR, DENSE_COLOUR = "#1f5fa8", "#d1495b", "#222222"
FAINT_COLOUR, GRID_COLOUR = "#b9c1cb", "#e9ecef"

# plotly 7 gives every page a button that uploads the figure to Plotly's cloud; ours has none.
PAGE_CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"]}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in the picture."""

    name: str
    throughput_img_s: float
    top1: float
    """In [0, 1]; drawn in %."""
    top1_low: float
    top1_high: float
    label: str
    """What is shown when the mouse is on it: HTML, one fact a line."""


@dataclass(frozen=True, kw_only=True)
class FrontInfo:
    """All that the picture shows."""

    title: str
    measured: tuple[Point, ...]
    """Every measured model that is not on the front."""
    front: tuple[Point, ...]
    """From the slowest to the fastest."""
    knee: Point | None
    """One of the front; none if the front is empty."""
    dense: Point


def front_picture(record: dict[str, Any], outcomes: Sequence[Outcome]) -> go.Figure:
    """The front over all measured models: throughput to the right, accuracy up.

    Args:
        record: what `front_record` gives, or `front.json` holds.
        outcomes: all outcomes of the sweep; those without a measurement are not drawn.
    """
    return draw(front_info(record, outcomes))


def front_html(record: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The picture as one HTML page that needs no other file and no network."""
    figure = front_picture(record, outcomes)
    html: str = figure.to_html(include_plotlyjs=True, full_html=True, config=PAGE_CONFIG)
    return html.replace("<head>", f"<head><title>{escape(record['name'])}</title>", 1)


def front_info(record: dict[str, Any], outcomes: Sequence[Outcome]) -> FrontInfo:
    """What the picture shows, as numbers and labels."""
    front = {point["id"]: _point(point["id"], point, _exit(point["plan"])) for point in record["points"]}
    others = (outcome for outcome in outcomes if outcome.id not in front)
    return FrontInfo(
        title=f"Pareto front of {escape(record['name'])}",
        measured=tuple(
            _point(outcome.id, _rescaled(outcome.measurement, record), f"exit after block {outcome.plan.exit_block}")
            for outcome in others
            if outcome.measurement is not None and outcome.plan is not None
        ),
        front=tuple(front.values()),
        knee=front.get(record["knee"]),
        dense=_point("dense", record["dense"], "the model before pruning"),
    )


def _rescaled(measurement: Measurement, record: dict[str, Any]) -> dict[str, Any]:
    """With the throughput that its speed-up means at the front's dense throughput.

    Trials are measured while others run, the front quietly: only the ratios to dense compare.
    """
    throughput = measurement.speedup * record["dense"]["throughput_img_s"]
    return asdict(measurement) | {"throughput_img_s": throughput}


def _exit(plan: dict[str, Any]) -> str:
    return f"exit after block {len(plan['blocks'])}"


def _point(name: str, measurement: dict[str, Any], remark: str) -> Point:
    test, low, high = (measurement[key] for key in ("top1_test", "speedup_low", "speedup_high"))
    lines = (
        f"<b>{escape(name)}</b>",
        f"top-1 {measurement['top1']:.2%} ({measurement['top1_low']:.2%} to {measurement['top1_high']:.2%})",
        "test top-1 not taken" if test is None else f"test top-1 {test:.2%}",
        f"{measurement['throughput_img_s']:,.0f} img/s",
        f"speed-up {measurement['speedup']:.2f}x ({low:.2f} to {high:.2f})",
        f"{_short(measurement['macs'])} MACs an image, {_short(measurement['params'])} parameters",
        remark,
    )
    return Point(
        name=name,
        throughput_img_s=measurement["throughput_img_s"],
        top1=measurement["top1"],
        top1_low=measurement["top1_low"],
        top1_high=measurement["top1_high"],
        label="<br>".join(lines),
    )


def _short(count: float) -> str:
    """1234567 -> 1.23 M."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g} G"


def draw(info: FrontInfo) -> go.Figure:
    """The picture of `front_info`."""
    figure = go.Figure()
    figure.add_trace(_trace("measured", info.measured, mode="markers", marker={"color": FAINT_COLOUR, "size": 7}))
    figure.add_trace(
        _trace(
            "front",
            info.front,
            mode="lines+markers",
            marker={"color": FRONT_COLOUR, "size": 10},
            line={"color": FRONT_COLOUR, "width": 2},
            error_y=_interval(info.front),
        )
    )
    if info.knee is not None:
        marker = {"color": "white", "size": 16, "line": {"color": KNEE_COLOUR, "width": 4}}
        figure.add_trace(_trace(f"knee ({info.knee.name})", [info.knee], mode="markers", marker=marker))
    marker = {"color": DENSE_COLOUR, "size": 12, "symbol": "diamond"}
    figure.add_trace(_trace("dense", [info.dense], mode="markers", marker=marker))
    axis = {"gridcolor": GRID_COLOUR, "linecolor": DENSE_COLOUR, "ticks": "outside", "zeroline": False}
    figure.update_layout(
        title={"text": info.title, "x": 0.02},
        xaxis=axis | {"title": {"text": "throughput, measured (img/s)"}},
        yaxis=axis | {"title": {"text": "top-1 accuracy on val (%)"}},
        plot_bgcolor="white",
        paper_bgcolor="white",
        showlegend=True,
        font={"family": "Helvetica, Arial, sans-serif", "size": 15, "color": DENSE_COLOUR},
        hoverlabel={"bgcolor": "white", "align": "left", "font": {"size": 14}},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        margin={"l": 80, "r": 30, "t": 90, "b": 70},
    )
    return figure


def _trace(name: str, points: Iterable[Point], **style: Any) -> go.Scatter:
    points = tuple(points)
    return go.Scatter(
        name=name,
        x=[point.throughput_img_s for point in points],
        y=[100 * point.top1 for point in points],
        hovertext=[point.label for point in points],
        hoverinfo="text",
        **style,
    )


def _interval(points: Iterable[Point]) -> dict[str, Any]:
    """The 95 % interval of the accuracy, as thin bars."""
    points = tuple(points)
    return {
        "symmetric": False,
        "array": [100 * (point.top1_high - point.top1) for point in points],
        "arrayminus": [100 * (point.top1 - point.top1_low) for point in points],
        "color": FRONT_COLOUR,
        "thickness": 1,
        "width": 3,
    }
