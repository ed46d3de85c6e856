"""The picture of a lottery: the accuracy of each arm and round, and the gradient norms of the last round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from search.views.page import AXIS, DENSE_COLOUR, FRONT_COLOUR, KNEE_COLOUR, lay_out, to_page

ARM_COLOURS = {"dense": DENSE_COLOUR, "ticket": FRONT_COLOUR, "random": KNEE_COLOUR, "sparse-aware": "#2a9d6f"}


@dataclass(frozen=True, kw_only=True)
class ArmInfo:
    """One arm of a lottery in the picture."""

    name: str
    places: tuple[str, ...]
    """Names on the horizontal axis, one a round: `ticket, 42 %`, with the share of the weights that are gone."""
    top1: tuple[tuple[float, ...], ...]
    """Accuracies of every seed, one tuple a place, in [0, 1]."""
    gradient_norms: tuple[float, ...]
    """Gradient norm at each step of the last round, as mean over the seeds."""


def lottery_html(record: Mapping[str, Any]) -> str:
    """Draws a lottery as one HTML page that needs no other file and no network.

    Args:
        record: as `search.commands.lottery.run_lottery_seeds` returns it.
    """
    title = f"Lottery tickets of {record['name']}"
    return to_page(draw_lottery(lottery_info(record), escape(title)), title)


def lottery_info(record: Mapping[str, Any]) -> tuple[ArmInfo, ...]:
    """Collects what the picture of a lottery shows, arm by arm."""
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


def draw_lottery(arms: Sequence[ArmInfo], title: str) -> go.Figure:
    """Draws the accuracies of each arm and round on the left, the gradient norms of the last round on the right."""
    figure = make_subplots(cols=2, horizontal_spacing=0.1)
    for arm in arms:
        style: dict[str, Any] = {"name": arm.name, "legendgroup": arm.name}
        colour = ARM_COLOURS[arm.name]
        seeds = [(place, 100 * top1) for place, values in zip(arm.places, arm.top1, strict=True) for top1 in values]
        figure.add_trace(
            go.Scatter(
                x=[place for place, _ in seeds], y=[top1 for _, top1 in seeds], mode="markers", showlegend=False,
                marker={"color": colour, "size": 8, "opacity": 0.4}, hovertemplate="one seed: %{y:.2f} %", **style,
            ),
            row=1, col=1,
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=arm.places, y=[100 * fmean(values) for values in arm.top1], mode="markers", showlegend=False,
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
    lay_out(figure, title, bottom=110, font_size=14)
    figure.update_layout(
        xaxis={"title": {"text": "share of the blocks' weights that are gone"}},
        yaxis={"title": {"text": "top-1 accuracy on val (%), seeds and mean"}},
        xaxis2={"title": {"text": "step, under the last mask"}},
        yaxis2={
            "title": {"text": "gradient norm of the weights that stay"},
            "type": "log",
            "exponentformat": "power",
        },
    )
    return figure
