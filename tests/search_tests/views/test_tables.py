"""The tables and sentences that commands print, from records made by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import RenderableType
from rich.table import Table

from search.front import Front
from search.goal import Goal
from search.outcome import Outcome
from search.views.console import show
from search.views.tables import comparison_report, front_report, lottery_report, pruning_report, study_report
from tests.search_tests import builders

OUTCOMES = [builders.outcome("t000", 0.9, 1.0), builders.outcome("t001", 0.88, 2.0), builders.outcome("t002", 0.5, 2.5)]


def table_and_texts(report: Iterable[RenderableType]) -> tuple[list[list[str]], list[str]]:
    """The rows of a report's table, the names of its columns first, and the texts below it."""
    table, *texts = report
    assert isinstance(table, Table)
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)], [str(text) for text in texts]


def tell(goal: Goal = builders.GOAL, outcomes: list[Outcome] = OUTCOMES, **ended: Any) -> list[str]:
    """The texts below the table of a front."""
    front = Front.of("mine", outcomes, goal, trials=3, **ended)
    return table_and_texts(front_report(front, Path("runs/mine")))[1]


def test_front_is_a_row_for_the_dense_model_and_for_every_point() -> None:
    front = Front.of("mine", [*OUTCOMES[:2], replace(OUTCOMES[2])], builders.GOAL)
    rows, _ = table_and_texts(front_report(front, Path("runs/mine")))
    assert rows == [
        ["", "val", "test", "speed-up", "95 %", "images/s", "ms/batch", "MACs", "exit"],
        ["dense", "0.9000", "-", "1.00", "0.95-1.05", "100", "640.00", "100%", ""],
        ["t001 knee", "0.8800", "-", "2.00", "1.90-2.10", "200", "320.00", "50%", "2"],
        ["t002", "0.5000", "-", "2.50", "2.38-2.62", "250", "256.00", "40%", "2"],
    ]


def test_front_of_a_retrieval_sweep_has_a_column_for_its_metric() -> None:
    goal = Goal(dense=builders.measurement(0.9, 1.0, recall_at_1=0.75), accuracy="recall_at_1")
    outcomes = [builders.outcome("t000", 0.5, 2.0, recall_at_1=0.625, top1_test=0.25)]
    rows, _ = table_and_texts(front_report(Front.of("mine", outcomes, goal), Path("runs/mine")))
    assert [row[:4] for row in rows] == [
        ["", "recall@1", "val", "test"],
        ["dense", "0.7500", "0.9000", "-"],
        ["t000 knee", "0.6250", "0.5000", "0.2500"],
    ]


@pytest.mark.parametrize(
    ("ended_by", "words"),
    [
        ("time", "the time was up"),
        ("saturation", "the hypervolume had stopped to grow"),
        ("interrupt", "it was interrupted"),
        ("exhaustion", "there was nothing new to try"),
    ],
)
def test_search_that_ended_early_says_why(ended_by: str, words: str) -> None:
    assert tell(ended_by=ended_by)[0] == f"ended after 3 trials: {words}"
    assert not any("ended" in text for text in tell(ended_by="trials"))


def test_front_says_where_its_models_are_and_a_replay_that_it_has_none() -> None:
    assert tell()[-1].endswith("; outcomes and plans are in runs/mine")
    assert tell(conditions={"device": "cpu"})[-1].endswith("; models, tables and plans are in runs/mine")


def test_front_within_limits_says_which() -> None:
    goal = Goal.of(builders.DENSE, "top1", ["macs <= 60%", "top1 >= dense - 0.1"])
    assert tell(goal)[0] == "of the models with macs <= 60% and top1 >= dense - 0.1"
    assert tell(goal, [])[0] == "no model has macs <= 60% and top1 >= dense - 0.1"


def test_share_of_time_that_workers_waited_is_told_where_it_is_known() -> None:
    assert tell(idle_share=0.0312)[-1] == "the workers waited for trials 3.1% of their time"
    assert not any("waited" in text for text in tell())


def test_pruned_model_is_told_block_by_block_and_against_the_dense_one() -> None:
    columns = ("block", "heads", "qk", "v", "hidden", "tokens", "drop", "MACs")
    blocks = [dict(zip(columns, (n, "2/2", "8/16", "8/16", "40/128", "9/16", "-", "31%"), strict=True)) for n in (0, 1)]
    outcome = builders.outcome("t000", 0.85, 2.0)
    rows, texts = table_and_texts(pruning_report(blocks, outcome, builders.DENSE))
    assert rows == [list(columns), *([str(n), "2/2", "8/16", "8/16", "40/128", "9/16", "-", "31%"] for n in (0, 1))]
    assert texts == [
        "top-1 0.9000 -> 0.8500, MACs 1.235 M -> 0.6173 M, images/s 100 -> 200",
        "2.00 x as fast (1.90-2.10) with 50% of the MACs",
    ]


def test_layers_that_too_few_images_repair_are_told_one_a_line() -> None:
    outcome = replace(OUTCOMES[1], notes=("block 0 a: only the bias", "block 1 b: only the bias"))
    _, texts = table_and_texts(pruning_report([], outcome, builders.DENSE))
    assert texts[2:] == [
        "note: block 0 a: only the bias; more data.calibration_images would help",
        "note: block 1 b: only the bias; more data.calibration_images would help",
    ]


def test_sweeps_are_compared_at_milestones_and_at_their_ends() -> None:
    def curve(line: str, num_seeds: int, mean: list[float]) -> dict[str, Any]:
        spread = 0.125 if num_seeds > 1 else 0.0
        x = list(range(1, len(mean) + 1))
        return {"line": line, "num_seeds": num_seeds, "x": x, "mean": mean, "high": [value + spread for value in mean]}

    by_trial = [curve("gp", 2, [0.25, 0.5, 0.75]), curve("random", 1, [0.125])]
    by_second = [curve("gp", 2, [0.0] * 60), curve("random", 1, [0.0] * 7)]
    record = {"by_trial": by_trial, "by_second": by_second, "milestones": [1, 2]}
    rows, texts = table_and_texts(comparison_report(record))
    assert rows == [
        ["", "seeds", "1 trials", "2 trials", "all trials", "seconds"],
        ["gp", "2", "0.2500 ± 0.1250", "0.5000 ± 0.1250", "0.7500 ± 0.1250 (3)", "60"],
        ["random", "1", "0.1250", "-", "0.1250 (1)", "7"],
    ]
    assert texts == []


def test_lottery_is_a_row_for_each_arm_and_round() -> None:
    arm = {"arm": "ticket", "round": 2, "sparsity": 0.75, "top1": 0.8, "top1_low": 0.7, "top1_high": 0.9}
    arms = [arm | {"gradient_norm_first": 3.0, "gradient_norm_mean": 2.25}]
    record = {"name": "mine", "seeds": 2, "steps": 40, "arms": arms}
    rows, texts = table_and_texts(lottery_report(record, Path("runs/lottery-mine")))
    assert rows[1:] == [["ticket", "2", "75.0%", "0.8000", "0.7000-0.9000", "3", "2.25"]]
    assert texts == ["the table, every gradient norm and lottery.html are in runs/lottery-mine"]


def test_study_is_its_table_and_its_answer() -> None:
    record = {"question": "How small?", "sentence": "As small as 0.2."}
    columns, cells = ["series", "cut-off"], [["a", "0.1"], ["b", "0.2"]]
    rows, texts = table_and_texts(study_report(record, columns, cells, Path("runs/study-x")))
    assert rows == [columns, *cells]
    assert texts == ["As small as 0.2.", "Tables and figure are in runs/study-x"]


def test_brackets_in_a_text_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    show(["block [0] of [bold]2[/bold]"])
    assert capsys.readouterr().out == "block [0] of [bold]2[/bold]\n"
