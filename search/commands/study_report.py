"""The report of a study: rows of a table, lines of a figure, and a sentence that is computed from them."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from search.outcome import Measurement, Outcome, State
from search.pareto import non_dominated
from search.views.study_plot import StudyLine

SHARE = "share"
"""Column of the measured share of the dense multiply-adds, which may be a study's x."""

MISSED = 0.02
"""Share of the dense multiply-adds by which a model may be above its target before a caveat says so."""

METRICS = {"top1": "top-1", "speedup": "speed-up"}
"""Metrics that a study may ask for -> their names in sentences."""

TABLE_COLUMNS = ("series", "x", "top-1 %", "speed-up", "MACs", "seconds")


def row_of(series: str, values: Mapping[str, Any], outcome: Outcome, dense: Measurement) -> dict[str, Any]:
    """Returns one row of the table; figures are None where nothing was measured.

    Args:
        series: name of the line.
        values: keys of the recipe that vary -> their values.
        dense: measurement of the dense model.
    """
    measured = outcome.measurement
    names = ("top1", "top1_low", "top1_high", "speedup", "speedup_low", "speedup_high", "throughput_img_s", "macs")
    return {
        "id": outcome.id,
        "series": series,
        **values,
        SHARE: None if measured is None else measured.macs / dense.macs,
        **{name: None if measured is None else getattr(measured, name) for name in (*names, "params")},
        "target_ratio": outcome.candidate.target_ratio,
        "exit_block": outcome.candidate.exit_block,
        "forward_passes": outcome.forward_passes,
        "seconds": outcome.seconds,
        "state": outcome.state.value,
        "reason": outcome.reason,
    }


def lines_of(rows: Sequence[Mapping[str, Any]], x: str, metric: str, *, front_only: bool = False) -> list[StudyLine]:
    """Returns the measured rows as lines of one metric, in the order of the table.

    Args:
        x: a column; where several rows of a series have the same x, their mean is drawn, with their range.
        front_only: count only rows that no other of their series beats with as little x or less.
    """
    measured = [row for row in rows if row["state"] == State.MEASURED.value]
    lines = []
    for name in dict.fromkeys(row["series"] for row in measured):
        of_series = [row for row in measured if row["series"] == name]
        if front_only:
            front = non_dominated(np.array([[-row[x], row[metric]] for row in of_series]))
            of_series = [of_series[place] for place in front]
        by_x: dict[float, list[float]] = {}
        for row in sorted(of_series, key=lambda row: float(row[x])):
            by_x.setdefault(float(row[x]), []).append(float(row[metric]))
        lines.append(
            StudyLine(
                name=name,
                x=tuple(by_x),
                y=tuple(sum(values) / len(values) for values in by_x.values()),
                low=tuple(map(min, by_x.values())),
                high=tuple(map(max, by_x.values())),
            )
        )
    return lines


def best_x(lines: Sequence[StudyLine], metric: str, x_label: str, series_label: str) -> str:
    """Returns a sentence on the x that is best on most lines; of several, the one with the largest mean.

    On a line where several x are best, each of them counts.
    """
    if not lines:
        return "nothing was measured."
    points = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    wins = Counter(x for line in points for x, y in line.items() if y == max(line.values()))
    means = {x: float(np.mean([line[x] for line in points if x in line])) for x in wins}
    best = max(wins, key=lambda x: (wins[x], means[x]))
    spans = ", ".join(f"{_shown(metric, min(line.y), max(line.y))} at {line.name}" for line in lines)
    plural = f"{series_label}s" if series_label else "series"
    return (
        f"best {x_label} {best:g} at {wins[best]} of {len(lines)} {plural}; {METRICS[metric]} over all tried {spans}."
    )


def best_series(lines: Sequence[StudyLine], metric: str, x_label: str) -> str:
    """Returns a sentence on the line that is highest at most x.

    Lines are compared at the points of all of them, within the range that all cover; a line is straight between two of
    its points.
    """
    if not lines:
        return "nothing was measured."
    low, high = max(line.x[0] for line in lines), min(line.x[-1] for line in lines)
    grid = sorted({x for line in lines for x in line.x if low <= x <= high})
    if not grid:
        return f"the lines have no {x_label} in common, so their {METRICS[metric]} does not compare."
    values = {line.name: np.interp(grid, line.x, line.y) for line in lines}
    highest = np.max(list(values.values()), axis=0)
    wins = {name: int((heights >= highest - 1e-9).sum()) for name, heights in values.items()}
    order = sorted(values, key=lambda name: (-wins[name], -values[name].mean()))
    means = ", ".join(f"{name} {_shown(metric, float(values[name].mean()))}" for name in order)
    return (
        f"at equal {x_label}, {order[0]} has the highest {METRICS[metric]} at {wins[order[0]]} of {len(grid)} points "
        f"(means: {means})."
    )


def caveats(rows: Sequence[Mapping[str, Any]], x: str) -> list[str]:
    """Returns sentences on variants that broke, and on targets that were not reached."""
    broken = [row for row in rows if row[SHARE] is None]
    sentences = (
        [f"{len(broken)} of {len(rows)} gave no model, the first since {broken[0]['reason']}."] if broken else []
    )
    if x != SHARE:  # else the line shows where they are
        missed = [row for row in rows if row[SHARE] is not None and row[SHARE] > row["target_ratio"] + MISSED]
        if missed:
            sentences.append(f"{len(missed)} of {len(rows)} spent their budgets before they met the target.")
    return sentences


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns all columns of all rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(record: Mapping[str, Any]) -> str:
    """Returns the table for readers, below the question and its answer.

    Args:
        record: as `search.commands.study.run_study` returns it.
    """
    columns = [record["x_label"] if column == "x" else column for column in TABLE_COLUMNS]
    return "\n".join([
        f"# {record['question']}", "",
        f"After {record['source']}; asked of the recipe {record['recipe']}. {record['remark']}", "",
        f"**{record['sentence']}**", "",
        f"Dense top-1 {100 * record['dense']['top1']:.1f} % of {record['val_images']} val images; one image is "
        f"{100 / record['val_images']:.2f} points. Speed-ups are paired with the dense model; 95 % in brackets.", "",
        "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|",
        *("| " + " | ".join(table_cells(record["x"], row)) + " |" for row in record["rows"]),
    ]) + "\n"  # fmt: skip


def table_cells(x: str, row: Mapping[str, Any]) -> list[str]:
    """Returns a row as texts, in the order of `TABLE_COLUMNS`; with the reason where nothing was measured."""
    seconds = f"{row['seconds']:.1f}"
    if row[SHARE] is None:
        return [row["series"], str(row.get(x, "")), row["reason"], "", "", seconds]
    return [
        row["series"],
        f"{row[x]:.3f}" if x == SHARE else f"{row[x]:g}",
        f"{100 * row['top1']:.1f} ({100 * row['top1_low']:.1f}-{100 * row['top1_high']:.1f})",
        f"{row['speedup']:.2f} ({row['speedup_low']:.2f}-{row['speedup_high']:.2f})",
        f"{row[SHARE]:.1%}",
        seconds,
    ]


def _shown(metric: str, *values: float) -> str:
    """Returns a value, or a range of two, as a text with its unit."""
    is_share = metric == "top1"
    return " to ".join(f"{100 * v:.1f}" if is_share else f"{v:.2f}" for v in values) + (" %" if is_share else "")
