"""What came of a study, as rows, lines of a figure, and a sentence that is computed from them."""

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
"""As a study's x: the measured share of the dense multiply-adds."""

MISSED = 0.02
"""Share of the dense multiply-adds by which a model may be above its target before that is said."""

CALLED = {"top1": "top-1", "speedup": "speed-up"}

TABLE_COLUMNS = ("series", "x", "top-1 %", "speed-up", "MACs", "seconds")


def row_of(series: str, values: Mapping[str, Any], outcome: Outcome, dense: Measurement) -> dict[str, Any]:
    """One row of the table; figures are None where nothing was measured.

    Args:
        values: of the recipe's keys that vary.
    """
    found = outcome.measurement
    names = ("top1", "top1_low", "top1_high", "speedup", "speedup_low", "speedup_high", "throughput_img_s", "macs")
    return {
        "id": outcome.id,
        "series": series,
        **values,
        SHARE: None if found is None else found.macs / dense.macs,
        **{name: None if found is None else getattr(found, name) for name in (*names, "params")},
        "target_ratio": outcome.candidate.target_ratio,
        "exit_block": outcome.candidate.exit_block,
        "forward_passes": outcome.forward_passes,
        "seconds": outcome.seconds,
        "state": outcome.state.value,
        "reason": outcome.reason,
    }


def lines_of(rows: Sequence[Mapping[str, Any]], x: str, metric: str, *, front_only: bool = False) -> list[StudyLine]:
    """The measured rows as lines of one metric, in the order of the table.

    Args:
        x: a column; where several rows of a series have the same, their mean is drawn, from the least to the largest.
        front_only: only rows that no other of their series beats, at most x, count.
    """
    measured = [row for row in rows if row["state"] == State.MEASURED.value]
    lines = []
    for name in dict.fromkeys(row["series"] for row in measured):
        own = [row for row in measured if row["series"] == name]
        if front_only:
            own = [own[place] for place in non_dominated(np.array([[-row[x], row[metric]] for row in own]))]
        at: dict[float, list[float]] = {}
        for row in sorted(own, key=lambda row: float(row[x])):
            at.setdefault(float(row[x]), []).append(float(row[metric]))
        lines.append(
            StudyLine(
                name=name,
                x=tuple(at),
                y=tuple(sum(values) / len(values) for values in at.values()),
                low=tuple(map(min, at.values())),
                high=tuple(map(max, at.values())),
            )
        )
    return lines


def best_x(lines: Sequence[StudyLine], metric: str, x_label: str, series_label: str) -> str:
    """Which x is best on most of the lines; of those that are on as many, the one of the largest mean.

    On a line where several x are best, each counts.
    """
    if not lines:
        return "nothing was measured."
    points = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    wins = Counter(x for of in points for x, y in of.items() if y == max(of.values()))
    means = {x: float(np.mean([of[x] for of in points if x in of])) for x in wins}
    best = max(wins, key=lambda x: (wins[x], means[x]))
    spans = ", ".join(f"{_shown(metric, min(line.y), max(line.y))} at {line.name}" for line in lines)
    what = f"{series_label}s" if series_label else "series"
    return f"best {x_label} {best:g} at {wins[best]} of {len(lines)} {what}; {CALLED[metric]} over all tried {spans}."


def best_series(lines: Sequence[StudyLine], metric: str, x_label: str) -> str:
    """Which line is highest at most x: at the points of all, within what all cover, straight between their own."""
    if not lines:
        return "nothing was measured."
    low, high = max(line.x[0] for line in lines), min(line.x[-1] for line in lines)
    grid = sorted({x for line in lines for x in line.x if low <= x <= high})
    if not grid:
        return f"the lines have no {x_label} in common, so their {CALLED[metric]} does not compare."
    values = {line.name: np.interp(grid, line.x, line.y) for line in lines}
    highest = np.max(list(values.values()), axis=0)
    wins = {name: int((own >= highest - 1e-9).sum()) for name, own in values.items()}
    order = sorted(values, key=lambda name: (-wins[name], -values[name].mean()))
    means = ", ".join(f"{name} {_shown(metric, float(values[name].mean()))}" for name in order)
    return (
        f"at equal {x_label}, {order[0]} has the highest {CALLED[metric]} at {wins[order[0]]} of {len(grid)} points "
        f"(means: {means})."
    )


def caveats(rows: Sequence[Mapping[str, Any]], x: str) -> list[str]:
    """What a reader of the sentence has to know: what broke, and which targets were not reached."""
    broken = [row for row in rows if row[SHARE] is None]
    told = [f"{len(broken)} of {len(rows)} gave no model, the first since {broken[0]['reason']}."] if broken else []
    if x != SHARE:  # else the line shows where they are
        missed = [row for row in rows if row[SHARE] is not None and row[SHARE] > row["target_ratio"] + MISSED]
        told += [f"{len(missed)} of {len(rows)} spent their budgets before they met the target."] if missed else []
    return told


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All columns of all rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(record: Mapping[str, Any]) -> str:
    """The table for readers, below the question and its answer.

    Args:
        record: what `search.commands.study.run_study` gives.
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
    """A row for people, in the order of `TABLE_COLUMNS`; where nothing was measured, why."""
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
    """One value, or from one to another."""
    is_share = metric == "top1"
    return " to ".join(f"{100 * v:.1f}" if is_share else f"{v:.2f}" for v in values) + (" %" if is_share else "")
