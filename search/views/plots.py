"""The pictures of a front and of a lottery: first the record of what it shows, then the drawing. plotly only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import cycle
from statistics import fmean
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from search.front import Front
from search.goal import ACCURACIES, metric_of
from search.outcome import Measurement, Outcome

FRONT_COLOUR, KNEE_COLOUR, DENSE_COLOUR = "#1f5fa8", "#d1495b", "#222222"
FAINT_COLOUR, GRID_COLOUR = "#b9c1cb", "#e9ecef"
ARM_COLOURS = {"dense": DENSE_COLOUR, "ticket": FRONT_COLOUR, "random": KNEE_COLOUR, "sparse-aware": "#2a9d6f"}

AXIS = {"gridcolor": GRID_COLOUR, "linecolor": DENSE_COLOUR, "ticks": "outside", "zeroline": False}

STUDY_COLOURS = ("#1f5fa8", "#d1495b", "#2e8b57", "#c98a00", "#7a4ea3", "#5b6770")

# plotly 7 gives every page a button that uploads the figure to Plotly's cloud; ours has none.
PAGE_CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"]}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in the picture."""

    name: str
    throughput_img_s: float
    accuracy: float
    """The one that was searched by, in [0, 1]; drawn in %."""
    interval: tuple[float, float] | None
    """Of the accuracy; none if it was not taken."""
    label: str
    """What is shown when the mouse is on it: HTML, one fact a line."""


@dataclass(frozen=True, kw_only=True)
class FrontInfo:
    """All that the picture shows."""

    title: str
    accuracy: str
    """What goes up, as it is called."""
    measured: tuple[Point, ...]
    """Every measured model that is not on the front."""
    front: tuple[Point, ...]
    """From the slowest to the fastest."""
    knee: Point | None
    """One of the front; none if the front is empty."""
    dense: Point


def front_picture(front: Front, outcomes: Sequence[Outcome]) -> go.Figure:
    """The front over all measured models: throughput to the right, accuracy up.

    Args:
        front: the front of the sweep.
        outcomes: all outcomes of the sweep; those without a measurement are not drawn.
    """
    return draw(front_info(front, outcomes))


def front_html(front: Front, outcomes: Sequence[Outcome]) -> str:
    """The picture as one HTML page that needs no other file and no network."""
    return _page(front_picture(front, outcomes), front.name)


def front_info(front: Front, outcomes: Sequence[Outcome]) -> FrontInfo:
    """Collects what the picture shows, as numbers and labels."""
    accuracy, dense = front.goal.accuracy, front.goal.dense

    def point(outcome: Outcome, measurement: Measurement) -> Point:
        assert outcome.plan is not None
        return _point(accuracy, outcome.id, measurement, f"exit after block {outcome.plan.exit_block}")

    points = {each.id: point(each, each.measurement) for each in front.points if each.measurement is not None}
    return FrontInfo(
        title=f"Pareto front of {escape(front.name)}",
        accuracy=ACCURACIES[accuracy],
        measured=tuple(
            point(outcome, _rescaled(outcome.measurement, dense))
            for outcome in outcomes
            if outcome.id not in points and outcome.measurement is not None
        ),
        front=tuple(points.values()),
        knee=points.get(front.knee or ""),
        dense=_point(accuracy, "dense", dense, "the model before pruning"),
    )


def _rescaled(measurement: Measurement, dense: Measurement) -> Measurement:
    """The measurement with the throughput that its speed-up means at the front's dense throughput.

    Trials are measured while others run, the front quietly: only the ratios to dense compare.
    """
    return replace(measurement, throughput_img_s=measurement.speedup * dense.throughput_img_s)


def _point(accuracy: str, name: str, found: Measurement, remark: str) -> Point:
    retrieval = {called: getattr(found, key) for key, called in ACCURACIES.items() if key != "top1"}
    lines = (
        f"<b>{escape(name)}</b>",
        f"top-1 {found.top1:.2%} ({found.top1_low:.2%} to {found.top1_high:.2%})",
        *(f"{called} {value:.2%}" for called, value in retrieval.items() if value is not None),
        "test top-1 not taken" if found.top1_test is None else f"test top-1 {found.top1_test:.2%}",
        f"{found.throughput_img_s:,.0f} img/s",
        f"speed-up {found.speedup:.2f}x ({found.speedup_low:.2f} to {found.speedup_high:.2f})",
        f"{_short(found.macs)} MACs an image, {_short(found.params)} parameters",
        remark,
    )
    return Point(
        name=name,
        throughput_img_s=found.throughput_img_s,
        accuracy=metric_of(found, accuracy),
        interval=(found.top1_low, found.top1_high) if accuracy == "top1" else None,
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
    figure.update_layout(
        title={"text": info.title, "x": 0.02},
        xaxis=AXIS | {"title": {"text": "throughput, measured (img/s)"}},
        yaxis=AXIS | {"title": {"text": f"{info.accuracy} on val (%)"}},
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
        y=[100 * point.accuracy for point in points],
        hovertext=[point.label for point in points],
        hoverinfo="text",
        **style,
    )


def _interval(points: Iterable[Point]) -> dict[str, Any] | None:
    """The 95 % interval of the accuracy, as thin bars; none where there is no interval."""
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


@dataclass(frozen=True, kw_only=True)
class ArmInfo:
    """One arm of a lottery in the picture."""

    name: str
    places: tuple[str, ...]
    """One for each round: `ticket, 42 %`, the share of the weights that are gone."""
    top1: tuple[tuple[float, ...], ...]
    """In [0, 1]; of every seed, for each place."""
    gradient_norms: tuple[float, ...]
    """Of each step of the last round, mean over the seeds."""


def lottery_info(record: dict[str, Any]) -> tuple[ArmInfo, ...]:
    """What the picture of a lottery shows, from the record of `search.commands.lottery`."""
    arms: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in record["rows"]:
        place = row["arm"] if row["arm"] == "dense" else f"{row['arm']}, {row['sparsity']:.0%}"
        arms.setdefault(row["arm"], {}).setdefault(place, []).append(row)
    return tuple(
        ArmInfo(
            name=arm,
            places=tuple(places),
            top1=tuple(tuple(row["top1"] for row in rows) for rows in places.values()),
            gradient_norms=tuple(
                fmean(norms)
                for norms in zip(*(row["gradient_norms"] for row in list(places.values())[-1]), strict=True)
            ),
        )
        for arm, places in arms.items()
    )


def lottery_html(record: dict[str, Any]) -> str:
    """The picture of a lottery as one HTML page that needs no other file and no network."""
    title = f"Lottery tickets of {record['name']}"
    return _page(draw_lottery(lottery_info(record), escape(title)), title)


def draw_lottery(arms: Sequence[ArmInfo], title: str) -> go.Figure:
    """Left the accuracy of each arm and round, right the gradient norm as training goes on."""
    figure = make_subplots(cols=2, horizontal_spacing=0.1)
    for arm in arms:
        style: dict[str, Any] = {"name": arm.name, "legendgroup": arm.name}
        colour = ARM_COLOURS[arm.name]
        seeds = [(place, 100 * top1) for place, some in zip(arm.places, arm.top1, strict=True) for top1 in some]
        figure.add_trace(
            go.Scatter(
                x=[place for place, _ in seeds], y=[top1 for _, top1 in seeds], mode="markers", showlegend=False,
                marker={"color": colour, "size": 8, "opacity": 0.4}, hovertemplate="one seed: %{y:.2f} %", **style,
            ),
            row=1, col=1,
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=arm.places, y=[100 * fmean(some) for some in arm.top1], mode="markers", showlegend=False,
                marker={"color": colour, "size": 26, "symbol": "line-ew", "line": {"color": colour, "width": 3}},
                hovertemplate="mean: %{y:.2f} %", **style,
            ),
            row=1, col=1,
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=list(range(1, len(arm.gradient_norms) + 1)), y=arm.gradient_norms, mode="lines",
                line={"color": colour, "width": 1.5}, **style,
            ),
            row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(AXIS)
    figure.update_yaxes(AXIS)
    figure.update_layout(
        title={"text": title, "x": 0.02},
        xaxis={"title": {"text": "share of the blocks' weights that are gone"}},
        yaxis={"title": {"text": "top-1 accuracy on val (%), seeds and mean"}},
        xaxis2={"title": {"text": "step, under the last mask"}},
        yaxis2={
            "title": {"text": "gradient norm of the weights that stay"},
            "type": "log",
            "exponentformat": "power",
        },
        plot_bgcolor="white",
        paper_bgcolor="white",
        font={"family": "Helvetica, Arial, sans-serif", "size": 14, "color": DENSE_COLOUR},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        margin={"l": 80, "r": 30, "t": 90, "b": 110},
    )
    return figure


def _page(figure: go.Figure, title: str) -> str:
    html: str = figure.to_html(include_plotlyjs=True, full_html=True, config=PAGE_CONFIG)
    return html.replace("<head>", f"<head><title>{escape(title)}</title>", 1)


@dataclass(frozen=True, kw_only=True)
class StudyLine:
    """One line in the picture of a study."""

    name: str
    x: tuple[float, ...]
    """Ascending."""
    y: tuple[float, ...]
    """At an x of several variants, as where a study varies a seed, their mean."""
    low: tuple[float, ...]
    """The least of them."""
    high: tuple[float, ...]
    """The largest of them."""


@dataclass(frozen=True, kw_only=True)
class StudyPanel:
    """One metric of a study."""

    y_label: str
    lines: tuple[StudyLine, ...]
    dense: float
    """What the dense model does."""


@dataclass(frozen=True, kw_only=True)
class StudyInfo:
    """All that the picture of a study shows."""

    title: str
    answer: str
    x_label: str
    log_x: bool
    panels: tuple[StudyPanel, ...]


STUDY_METRICS = {"top1": ("top-1 on val (%)", 100.0), "speedup": ("speed-up over dense, measured", 1.0)}
"""What a metric is called, and what it is multiplied by."""


def study_info(record: dict[str, Any]) -> StudyInfo:
    """What the picture of a study shows, of what `run_study` gives."""

    def panel(metric: str) -> StudyPanel:
        label, factor = STUDY_METRICS[metric]
        lines = [
            StudyLine(
                name=line["name"],
                x=tuple(line["x"]),
                **{key: tuple(factor * value for value in line[key]) for key in ("y", "low", "high")},
            )
            for line in record["lines"][metric]
        ]
        return StudyPanel(y_label=label, lines=tuple(lines), dense=factor * record["dense"][metric])

    return StudyInfo(
        title=record["question"],
        answer=record["sentence"],
        x_label=f"{record['x_label']} ({record['x_unit']})" if record["x_unit"] else record["x_label"],
        log_x=record["log_x"],
        panels=tuple(map(panel, record["lines"])),
    )


def study_html(record: dict[str, Any]) -> str:
    """The picture of a study as one HTML page that needs no other file and no network."""
    return _page(draw_study(study_info(record)), record["question"])


def draw_study(info: StudyInfo) -> go.Figure:
    """The picture of `study_info`: a panel a metric, the same colour for a line in each."""
    figure = make_subplots(cols=len(info.panels), horizontal_spacing=0.1)
    for column, panel in enumerate(info.panels, start=1):
        for line, colour in zip(panel.lines, cycle(STUDY_COLOURS)):  # the colours go round
            figure.add_trace(
                go.Scatter(
                    name=escape(line.name),
                    legendgroup=line.name,
                    showlegend=column == 1,
                    x=line.x,
                    y=line.y,
                    mode="lines+markers",
                    line={"color": colour, "width": 2},
                    marker={"size": 9},
                    error_y=_spread(line),
                ),
                row=1,
                col=column,
            )
        dash = {"color": DENSE_COLOUR, "dash": "dot", "width": 1}
        figure.add_hline(y=panel.dense, line=dash, row=1, col=column)
        kind = "log" if info.log_x else "linear"
        figure.update_xaxes(**AXIS, type=kind, title={"text": info.x_label}, row=1, col=column)
        figure.update_yaxes(**AXIS, title={"text": panel.y_label}, row=1, col=column)
    figure.update_layout(
        title={"text": f"{escape(info.title)}<br><sup>{'<br>'.join(wrap(escape(info.answer), 140))}</sup>", "x": 0.02},
        plot_bgcolor="white",
        paper_bgcolor="white",
        showlegend=True,
        font={"family": "Helvetica, Arial, sans-serif", "size": 15, "color": DENSE_COLOUR},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        margin={"l": 80, "r": 30, "t": 150, "b": 70},
    )
    return figure


def comparison_html(record: dict[str, Any]) -> str:
    """The picture of several sweeps as one HTML page that needs no other file and no network."""
    return _page(draw_comparison(record), "Hypervolume of sweeps")


def draw_comparison(record: dict[str, Any]) -> go.Figure:
    """Left after trials, right after seconds; the bands are the intervals of the means.

    Args:
        record: what `search.commands.compare.compare_sweeps` gives.
    """
    figure = make_subplots(cols=2, horizontal_spacing=0.08)
    for column, key in enumerate(("by_trial", "by_second"), start=1):
        for curve, colour in zip(record[key], cycle(STUDY_COLOURS)):  # the colours go round
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
    most = max(value for curve in record["by_trial"] for value in curve["mean"])
    figure.update_yaxes(AXIS, range=[0, 1.1 * most if most > 0 else 1])
    figure.update_layout(
        title={"text": "Hypervolume of accuracy and speed-up, over the dense model's", "x": 0.02},
        xaxis={"title": {"text": "trials"}},
        xaxis2={"title": {"text": "seconds"}},
        plot_bgcolor="white",
        paper_bgcolor="white",
        font={"family": "Helvetica, Arial, sans-serif", "size": 15, "color": DENSE_COLOUR},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        margin={"l": 80, "r": 30, "t": 110, "b": 70},
    )
    return figure


def _spread(line: StudyLine) -> dict[str, Any] | None:
    """From the least to the largest of several variants at one x; none where there is one alone."""
    if line.low == line.high:
        return None
    return {
        "symmetric": False,
        "array": [high - middle for high, middle in zip(line.high, line.y, strict=True)],
        "arrayminus": [middle - low for middle, low in zip(line.y, line.low, strict=True)],
        "thickness": 1,
        "width": 3,
    }
