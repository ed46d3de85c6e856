"""A sweep that has ended, and the table of its front; whole sweeps are in tests/integration."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.commands.run import front_csv, read_finished
from search.front import Front
from search.outcome import Outcome
from search.records.folder import Folder
from search.records.ledger import Ledger
from tests.search_tests import builders, tiny

OUTCOMES = [builders.outcome(f"t{number:03d}", 0.9 - number / 10, 1.5 + number) for number in range(3)]


def finished_folder(tmp_path: Path, outcomes: list[Outcome] = OUTCOMES, trials: int = 3, **front: Any) -> Folder:
    """The folder of a sweep of three trials that has a front, and perhaps more outcomes than the front knows."""
    folder = Folder(tmp_path, "tiny")
    with Ledger(folder.ledger) as book:
        book.append(*outcomes)
    folder.config.write_text(tiny.config(search={"trials": 50, "patience": 4}).to_yaml())
    folder.write_front(Front.of("tiny", OUTCOMES, builders.GOAL, trials=trials, **front))
    return folder


def is_finished(folder: Folder, **search: Any) -> bool:
    return read_finished(folder, tiny.config(search=search)) is not None


def test_a_sweep_is_finished_once_it_has_its_trials_and_their_front(tmp_path: Path) -> None:
    folder = finished_folder(tmp_path, ended_by="trials")
    assert read_finished(folder, tiny.config(search={"trials": 3})) == folder.read_front()
    assert is_finished(folder, trials=2)
    assert not is_finished(folder, trials=4)


def test_outcomes_at_earlier_exits_are_no_trials_of_their_own(tmp_path: Path) -> None:
    folder = finished_folder(tmp_path, [*OUTCOMES, replace(OUTCOMES[0], id="t000.2")], ended_by="trials")
    assert is_finished(folder, trials=3)
    assert not is_finished(folder, trials=4)


@pytest.mark.parametrize(("patience", "expected"), [(4, True), (5, False)])
def test_a_saturated_sweep_is_finished_unless_it_is_to_be_more_patient(
    tmp_path: Path, patience: int, expected: bool
) -> None:
    folder = finished_folder(tmp_path, ended_by="saturation")
    assert is_finished(folder, trials=50, patience=patience) is expected


@pytest.mark.parametrize("ended_by", ["time", "interrupt", None])
def test_a_sweep_that_was_stopped_goes_on(tmp_path: Path, ended_by: str | None) -> None:
    assert not is_finished(finished_folder(tmp_path, ended_by=ended_by), trials=50, patience=4)


def test_a_front_that_lacks_a_trial_is_made_again(tmp_path: Path) -> None:
    assert not is_finished(finished_folder(tmp_path, trials=2, ended_by="trials"), trials=3)


def test_a_sweep_without_a_front_is_not_finished(tmp_path: Path) -> None:
    folder = finished_folder(tmp_path)
    folder.front.unlink()
    assert not is_finished(folder, trials=3)


def test_the_table_of_a_front_has_measurements_then_parameters() -> None:
    front = Front.of("tiny", OUTCOMES, builders.GOAL)
    rows = list(csv.DictReader(io.StringIO(front_csv(front))))
    assert [row["id"] for row in rows] == [point.id for point in front.points]
    columns = list(rows[0])
    assert columns[:2] == ["id", "top1"]
    assert columns.index("params") < columns.index("method") < columns.index("drop_budget.0")
    for row, point in zip(rows, front.points, strict=True):
        assert point.measurement is not None
        assert float(row["speedup"]) == point.measurement.speedup
        assert float(row["target_ratio"]) == point.candidate.target_ratio


def test_a_parameter_that_only_some_points_have_is_a_column_that_others_leave_empty() -> None:
    other = replace(OUTCOMES[1], candidate=replace(OUTCOMES[1].candidate, method="global", drop_budget=(0.0,) * 3))
    rows = list(csv.DictReader(io.StringIO(front_csv(Front.of("tiny", [OUTCOMES[0], other], builders.GOAL)))))
    assert {row["id"]: row["drop_budget.0"] for row in rows} == {"t000": "1.5", "t001": ""}
