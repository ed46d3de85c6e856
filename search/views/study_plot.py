"""The picture of a study: one panel a metric, one line a series."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from itertools import cycle
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from search.views.page import AXIS, DENSE_COLOUR, LINE_COLOURS, lay_out, to_page

STUDY_METRICS = {"top1": ("top-1 on val (%)", 100.0), "speedup": ("speed-up over dense, measured", 1.0)}
"""Metric -> its label in the picture, and the factor that brings it to that label's unit."""


@dataclass(frozen=True, kw_only=True)
class StudyLine:
    """One line in the picture of a study."""

    name: str
    x: tuple[float, ...]
    """Values of the parameter that the study varies, ascending."""
    y: tuple[float, ...]
    """Metric at each x; the mean where a study has several variants at one x, as where it varies a seed."""
    low: tuple[float, ...]
    """The least metric among the variants at each x."""
    high: tuple[float, ...]
    """The largest metric among the variants at each x."""


@dataclass(frozen=True, kw_only=True)
class StudyPanel:
    """One metric of a study."""

    y_label: str
    lines: tuple[StudyLine, ...]
    dense: float
    """The dense model's value of the metric, in the unit of the label."""


@dataclass(frozen=True, kw_only=True)
class StudyInfo:
    """The numbers and labels that the picture of a study shows."""

    title: str
    answer: str
    """The sentence below the title."""
    x_label: str
    log_x: bool
    """True for a logarithmic horizontal axis."""
    panels: tuple[StudyPanel, ...]


def study_html(record: Mapping[str, Any]) -> str:
    """Draws a study as one HTML page that needs no other file and no network.

    Args:
        record: as `search.commands.study.run_study` returns it.
    """
    return to_page(draw_study(study_info(record)), record["question"])


def study_info(record: Mapping[str, Any]) -> StudyInfo:
    """Collects what the picture of a study shows, from the record that `run_study` returns."""

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


def draw_study(info: StudyInfo) -> go.Figure:
    """Draws a panel for each metric; a line has the same colour in all panels."""
    figure = make_subplots(cols=len(info.panels), horizontal_spacing=0.1)
    for column, panel in enumerate(info.panels, start=1):
        for line, colour in zip(panel.lines, cycle(LINE_COLOURS)):  # the colours go round
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
                    error_y=_spread_bars(line),
                ),
                row=1,
                col=column,
            )
        dash = {"color": DENSE_COLOUR, "dash": "dot", "width": 1}
        figure.add_hline(y=panel.dense, line=dash, row=1, col=column)
        kind = "log" if info.log_x else "linear"
        figure.update_xaxes(AXIS, type=kind, title={"text": info.x_label}, row=1, col=column)
        figure.update_yaxes(AXIS, title={"text": panel.y_label}, row=1, col=column)
    lay_out(figure, f"{escape(info.title)}<br><sup>{'<br>'.join(wrap(escape(info.answer), 140))}</sup>", top=150)
    figure.update_layout(showlegend=True)
    return figure


def _spread_bars(line: StudyLine) -> dict[str, Any] | None:
    """Returns bars from the least to the largest of the variants at each x; None where every x has one variant."""
    if line.low == line.high:
        return None
    return {
        "symmetric": False,
        "array": [high - middle for high, middle in zip(line.high, line.y, strict=True)],
        "arrayminus": [middle - low for middle, low in zip(line.y, line.low, strict=True)],
        "thickness": 1,
        "width": 3,
    }
