"""The picture of a front: throughput to the right, accuracy up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import plotly.graph_objects as go

from search.front import Front
from search.goal import ACCURACIES, Goal, metric_of
from search.outcome import Measurement, Outcome
from search.views.page import AXIS, DENSE_COLOUR, FAINT_COLOUR, FRONT_COLOUR, KNEE_COLOUR, lay_out, to_page


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in the picture."""

    name: str
    throughput_img_s: float
    accuracy: float
    """The accuracy that was searched by, in [0, 1]; drawn in %."""
    interval: tuple[float, float] | None
    """The 95 % interval of the accuracy; None if it was not taken."""
    label: str
    """The text shown under the mouse: HTML, one fact a line."""


@dataclass(frozen=True, kw_only=True)
class FrontInfo:
    """The numbers and labels that the picture of a front shows."""

    title: str
    accuracy: str
    """Name of the accuracy on the vertical axis."""
    measured: tuple[Point, ...]
    """Every measured model that is not on the front."""
    front: tuple[Point, ...]
    """The models on the front, from the slowest to the fastest."""
    knee: Point | None
    """The knee of the front; None if the front is empty."""
    dense: Point


def front_html(front: Front, outcomes: Sequence[Outcome]) -> str:
    """Draws a front over all measured models, as one HTML page that needs no other file and no network.

    Args:
        front: the front of the sweep.
        outcomes: all outcomes of the sweep; those without a measurement are not drawn.
    """
    return to_page(draw_front(front_info(front, outcomes)), front.name)


def front_info(front: Front, outcomes: Sequence[Outcome]) -> FrontInfo:
    """Collects what the picture of a front shows, as numbers and labels."""
    goal = front.goal

    def point(outcome: Outcome, measurement: Measurement) -> Point:
        assert outcome.plan is not None
        return _point(goal, outcome.id, measurement, f"exit after block {outcome.plan.exit_block}")

    points = {model.id: point(model, model.measurement) for model in front.points if model.measurement is not None}
    return FrontInfo(
        title=f"Pareto front of {escape(front.name)}",
        accuracy=ACCURACIES[goal.accuracy],
        measured=tuple(
            point(outcome, _rescaled(outcome.measurement, goal))
            for outcome in outcomes
            if outcome.id not in points and outcome.measurement is not None
        ),
        front=tuple(points.values()),
        knee=points.get(front.knee or ""),
        dense=_point(goal, "dense", goal.dense, "the model before pruning"),
    )


def _rescaled(measurement: Measurement, goal: Goal) -> Measurement:
    """Replaces the throughput by the one that the speed-up means at the front's dense throughput.

    Trials are measured while others run, the front quietly: only the ratios to dense compare.
    """
    return replace(measurement, throughput_img_s=measurement.speedup * goal.dense.throughput_img_s)


def _point(goal: Goal, name: str, measurement: Measurement, remark: str) -> Point:
    retrieval = {title: getattr(measurement, metric) for metric, title in ACCURACIES.items() if metric != "top1"}
    top1_test = measurement.top1_test
    lines = (
        f"<b>{escape(name)}</b>",
        f"top-1 {measurement.top1:.2%} ({measurement.top1_low:.2%} to {measurement.top1_high:.2%})",
        *(f"{title} {value:.2%}" for title, value in retrieval.items() if value is not None),
        "test top-1 not taken" if top1_test is None else f"test top-1 {top1_test:.2%}",
        f"{measurement.throughput_img_s:,.0f} img/s",
        f"speed-up {measurement.speedup:.2f}x ({measurement.speedup_low:.2f} to {measurement.speedup_high:.2f})",
        f"{_with_unit(measurement.macs)} MACs an image, {_with_unit(measurement.params)} parameters",
        remark,
    )
    return Point(
        name=name,
        throughput_img_s=measurement.throughput_img_s,
        accuracy=metric_of(measurement, goal.accuracy),
        interval=(measurement.top1_low, measurement.top1_high) if goal.accuracy == "top1" else None,
        label="<br>".join(lines),
    )


def _with_unit(count: float) -> str:
    """Formats a count with three digits: 1234567 -> 1.23 M."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g} G"


def draw_front(info: FrontInfo) -> go.Figure:
    """Draws the front over all measured models: throughput to the right, accuracy up."""
    figure = go.Figure()
    figure.add_trace(_trace("measured", info.measured, mode="markers", marker={"color": FAINT_COLOUR, "size": 7}))
    figure.add_trace(
        _trace(
            "front",
            info.front,
            mode="lines+markers",
            marker={"color": FRONT_COLOUR, "size": 10},
            line={"color": FRONT_COLOUR, "width": 2},
            error_y=_interval_bars(info.front),
        )
    )
    if info.knee is not None:
        marker = {"color": "white", "size": 16, "line": {"color": KNEE_COLOUR, "width": 4}}
        figure.add_trace(_trace(f"knee ({info.knee.name})", [info.knee], mode="markers", marker=marker))
    marker = {"color": DENSE_COLOUR, "size": 12, "symbol": "diamond"}
    figure.add_trace(_trace("dense", [info.dense], mode="markers", marker=marker))
    figure.update_xaxes(AXIS, title={"text": "throughput, measured (img/s)"})
    figure.update_yaxes(AXIS, title={"text": f"{info.accuracy} on val (%)"})
    lay_out(figure, info.title)
    figure.update_layout(showlegend=True, hoverlabel={"bgcolor": "white", "align": "left", "font": {"size": 14}})
    return figure


def _trace(name: str, points: Iterable[Point], **style: Any) -> go.Scatter:
    points = tuple(points)
    return go.Scatter(
        name=name,
        x=[point.throughput_img_s for point in points],
        y=[100 * point.accuracy for point in points],
        hovertext=[point.label for point in points],
        hoverinfo="text",
        **style,
    )


def _interval_bars(points: Iterable[Point]) -> dict[str, Any] | None:
    """Returns the 95 % intervals of the accuracies as thin bars; None where no interval was taken."""
    spans = [(point.accuracy, *point.interval) for point in points if point.interval is not None]
    if not spans:
        return None
    return {
        "symmetric": False,
        "array": [100 * (high - middle) for middle, _, high in spans],
        "arrayminus": [100 * (middle - low) for middle, low, _ in spans],
        "color": FRONT_COLOUR,
        "thickness": 1,
        "width": 3,
    }
