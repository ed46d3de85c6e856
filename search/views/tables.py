"""The tables that commands print, each with the sentences below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from search.front import Front
from search.goal import ACCURACIES
from search.outcome import Measurement, Outcome

ENDINGS = {
    "time": "the time was up",
    "saturation": "the hypervolume had stopped to grow",
    "interrupt": "it was interrupted",
    "exhaustion": "there was nothing new to try",
}
"""`Front.ended_by` -> its words; a sweep that ended by its trials needs none."""


def front_report(front: Front, folder: Path) -> Iterator[RenderableType]:
    """Tells a front to people: a table of the dense model and every point, and how the search ended.

    Args:
        folder: folder of the sweep.
    """
    yield front_table(front)
    if front.ended_by in ENDINGS:
        yield f"ended after {front.trials} trials: {ENDINGS[front.ended_by]}"
    limits = " and ".join(limit.text for limit in front.goal.limits)
    if limits:
        yield f"of the models with {limits}" if front.points else f"no model has {limits}"
    contents = (
        "outcomes and plans" if front.conditions is None else "models, tables and plans"
    )  # a replay has no models
    yield f"hypervolume {front.hypervolume:.4f}; {contents} are in {folder}"
    if front.idle_share is not None:
        yield f"the workers waited for trials {front.idle_share:.1%} of their time"


def front_table(front: Front) -> Table:
    """Makes a table of a front, whose first row is the dense model; a retrieval metric has a column if it counts."""
    goal, dense = front.goal, front.goal.dense
    retrieval = {} if goal.accuracy == "top1" else {goal.accuracy: ACCURACIES[goal.accuracy]}
    counts = f"{len(front.points)} models from {front.trials} trials"
    columns = (*retrieval.values(), "val", "test", "speed-up", "95 %", "images/s", "ms/batch", "MACs", "exit")
    table = _table(f"Front of {front.name}: {counts}; accuracy on val and test", ("", *columns))

    def add(label: str, model: Measurement, exit_block: str) -> None:
        table.add_row(
            label,
            *(f"{getattr(model, metric):.4f}" for metric in retrieval),
            f"{model.top1:.4f}",
            "-" if model.top1_test is None else f"{model.top1_test:.4f}",
            f"{model.speedup:.2f}",
            f"{model.speedup_low:.2f}-{model.speedup_high:.2f}",
            f"{model.throughput_img_s:,.0f}",
            f"{model.latency_ms_p50:.2f}",
            f"{model.macs / dense.macs:.0%}",
            exit_block,
        )

    add("dense", dense, "")
    for point in front.points:
        assert point.measurement is not None
        assert point.plan is not None
        mark = " knee" if point.id == front.knee else ""
        add(point.id + mark, point.measurement, str(point.plan.exit_block))
    return table


def comparison_report(record: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Tells the hypervolumes of several sweeps, a row a line.

    Args:
        record: as `search.commands.compare.compare_sweeps` returns it.
    """
    milestones = record["milestones"]
    columns = ("", "seeds", *(f"{count} trials" for count in milestones), "all trials", "seconds")
    table = _table("Hypervolume: mean over the seeds, and its 95 % interval", columns)
    for curve, over_time in zip(record["by_trial"], record["by_second"], strict=True):
        num_trials = len(curve["x"])
        cells = ["-" if count > num_trials else _with_interval(curve, count - 1) for count in milestones]
        table.add_row(
            curve["line"], str(curve["num_seeds"]), *cells, f"{_with_interval(curve, -1)} ({num_trials})",
            f"{over_time['x'][-1]:.0f}",
        )  # fmt: skip
    yield table


def _with_interval(curve: Mapping[str, Any], index: int) -> str:
    mean, high = curve["mean"][index], curve["high"][index]
    return f"{mean:.4f}" if curve["num_seeds"] == 1 else f"{mean:.4f} ± {high - mean:.4f}"


def pruning_report(
    blocks: Sequence[Mapping[str, Any]], outcome: Outcome, dense: Measurement
) -> Iterator[RenderableType]:
    """Tells one pruned model: a table of what each block keeps, and the model against the dense one.

    Args:
        blocks: as `search.commands.prune.block_rows` returns them.
        outcome: a measured outcome.
    """
    columns = ("block", "heads", "qk", "v", "hidden", "tokens", "drop", "MACs")
    table = _table("What is kept, of what", columns)
    for row in blocks:
        table.add_row(*(str(row[column]) for column in columns))
    yield table
    pruned = outcome.measurement
    assert pruned is not None
    dense_img_s = pruned.throughput_img_s / pruned.speedup
    yield (
        f"top-1 {dense.top1:.4f} -> {pruned.top1:.4f}, MACs {dense.macs / 1e6:,.4g} M -> {pruned.macs / 1e6:,.4g} M, "
        f"images/s {dense_img_s:,.0f} -> {pruned.throughput_img_s:,.0f}"
    )
    yield (
        f"{pruned.speedup:.2f} x as fast ({pruned.speedup_low:.2f}-{pruned.speedup_high:.2f}) "
        f"with {pruned.macs / dense.macs:.0%} of the MACs"
    )
    for note in outcome.notes:
        yield f"note: {note}; more data.calibration_images would help"


def lottery_report(record: Mapping[str, Any], folder: Path) -> Iterator[RenderableType]:
    """Tells a lottery, a row for each arm and round.

    Args:
        record: as `search.commands.lottery.run_lottery_seeds` returns it.
        folder: folder of the lottery.
    """
    title = f"Lottery tickets of {record['name']}: top-1 on val; seeds {record['seeds']}, steps {record['steps']}"
    columns = ("", "round", "sparsity", "top-1", "of seeds", "first gradient", "mean gradient")
    table = _table(title, columns)
    for arm in record["arms"]:
        table.add_row(
            arm["arm"],
            str(arm["round"]),
            f"{arm['sparsity']:.1%}",
            f"{arm['top1']:.4f}",
            f"{arm['top1_low']:.4f}-{arm['top1_high']:.4f}",
            f"{arm['gradient_norm_first']:.3g}",
            f"{arm['gradient_norm_mean']:.3g}",
        )
    yield table
    yield f"the table, every gradient norm and lottery.html are in {folder}"


def study_report(
    record: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]], folder: Path
) -> Iterator[RenderableType]:
    """Tells a study: its table and its answer.

    Args:
        record: as `search.commands.study.run_study` returns it.
        columns: names of the columns, the series first.
        rows: cells of the table.
        folder: folder of the study.
    """
    table = Table(title=record["question"], title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    yield table
    yield record["sentence"]
    yield f"Tables and figure are in {folder}"


def _table(title: str, columns: Sequence[str]) -> Table:
    """Makes an empty table; columns are on the right, those without a name on the left."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table
