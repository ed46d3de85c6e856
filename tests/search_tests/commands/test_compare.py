"""Sweeps against each other: curves by hand, seeds, intervals, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import t

from search.commands.compare import compare_sweeps, read_trace
from search.errors import SweepError
from search.front import Front
from search.goal import Goal
from search.outcome import Outcome
from search.records import ledger
from search.records.folder import Folder
from tests.search_tests import builders

DENSE = builders.measurement(0.8, 1.0)


def write(runs: Path, name: str, outcomes: list[Outcome]) -> None:
    place = Folder(runs, name)
    with ledger.Ledger(place.ledger) as book:
        book.append(*outcomes)
    place.config.write_text(f"name: {name}\n")
    place.write_front(Front.of(name, outcomes, Goal(dense=DENSE), trials=len(outcomes)))


def outcome(id: str, top1: float, speedup: float, ended_s: float) -> Outcome:
    return replace(builders.outcome(id, top1, speedup), ended_s=ended_s)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Areas above top-1 0.4 and speed-up 1: 0.2, 0.2, 0.5 and 0.3, 0.3, 0.3; alone 0.1."""
    first = [outcome("t000", 0.6, 2.0, 1.0), outcome("t002", 0.5, 1.5, 2.0), outcome("t001", 0.65, 3.0, 4.0)]
    second = [outcome("t000", 0.7, 2.0, 2.0), outcome("t001", 0.4, 4.0, 3.0), outcome("t002", 0.5, 1.1, 6.0)]
    write(tmp_path, "gp-0", first)
    write(tmp_path, "gp-1", second)
    write(tmp_path, "random", [outcome("t000", 0.5, 2.0, 5.0)])
    return tmp_path


def test_hypervolume_after_each_trial_and_at_each_time(runs: Path) -> None:
    trace = read_trace(runs, "gp-0")
    assert trace.line == "gp"
    assert trace.hypervolumes == pytest.approx((0.2, 0.2, 0.5))
    assert trace.seconds == (1.0, 2.0, 4.0)
    assert [trace.after(seconds) for seconds in (0.5, 1.0, 3.9, 4.0, 9.0)] == pytest.approx([0.0, 0.2, 0.2, 0.5, 0.5])


def test_exits_of_one_trial_count_as_one(tmp_path: Path) -> None:
    write(tmp_path, "x", [outcome("t000", 0.6, 2.0, 1.0), outcome("t000.2", 0.5, 3.0, 1.0)])
    trace = read_trace(tmp_path, "x")
    assert trace.hypervolumes == pytest.approx((0.3,))


def test_names_that_differ_in_a_number_are_one_line_with_an_interval(runs: Path) -> None:
    record = compare_sweeps(runs, ["gp-0", "gp-1", "random"])
    gp, random = record["by_trial"]
    assert (gp["line"], gp["num_seeds"]) == ("gp", 2)
    assert (random["line"], random["num_seeds"]) == ("random", 1)
    assert gp["x"] == (1, 2, 3)
    assert gp["mean"] == pytest.approx((0.25, 0.25, 0.4))
    half = t.ppf(0.975, 1) * 0.1 / 2  # two values 0.1 apart: their deviation is 0.1 / sqrt(2), and of the mean 0.1 / 2
    assert gp["high"][0] - gp["mean"][0] == pytest.approx(half)
    assert gp["mean"][0] - gp["low"][0] == pytest.approx(half)
    assert random["low"] == random["mean"] == random["high"] == pytest.approx((0.1,))


def test_curves_over_time_end_where_the_first_seed_does(runs: Path) -> None:
    gp, random = compare_sweeps(runs, ["gp-0", "gp-1", "random"])["by_second"]
    assert (gp["x"][0], gp["x"][-1], random["x"][-1]) == (0.0, 4.0, 5.0)
    assert (gp["mean"][0], gp["mean"][-1]) == pytest.approx((0.0, 0.4))
    at = gp["x"].index(pytest.approx(1.0))
    assert gp["mean"][at - 1] == 0.0
    assert gp["mean"][at + 1] == pytest.approx(0.1)  # one of two has found 0.2


def test_all_are_held_against_the_dense_model_of_the_first(runs: Path) -> None:
    place = Folder(runs, "random")
    front = place.read_front()
    place.write_front(replace(front, goal=Goal(dense=replace(DENSE, top1=0.2))))
    assert compare_sweeps(runs, ["gp-0", "random"])["by_trial"][1]["mean"] == pytest.approx((0.1,))
    assert compare_sweeps(runs, ["random"])["by_trial"][0]["mean"] == pytest.approx((0.4,))


def test_a_sweep_without_times_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "old", [builders.outcome("t000", 0.6, 2.0)])
    with pytest.raises(SweepError, match="'old' was recorded before the times"):
        compare_sweeps(tmp_path, ["old"])


def test_an_unknown_sweep_is_named(runs: Path) -> None:
    with pytest.raises(SweepError, match="no sweep 'tpe'"):
        compare_sweeps(runs, ["gp-0", "tpe"])


@pytest.mark.parametrize(
    ("other", "compares"),
    [
        ({"val": "a", "preprocessing": "p"}, True),
        ({"val": "b", "preprocessing": "p"}, False),
        ({"val": "b", "preprocessing": "q"}, True),  # the same images may look otherwise
        ({}, True),  # of an older version
    ],
)
def test_accuracies_on_other_val_images_are_not_compared(runs: Path, other: dict[str, str], compares: bool) -> None:
    for name, fingerprints in (("gp-0", {"val": "a", "preprocessing": "p"}), ("random", other)):
        folder = Folder(runs, name)
        folder.write_front(replace(folder.read_front(), fingerprints=fingerprints or None))
    if compares:
        assert len(compare_sweeps(runs, ["gp-0", "random"])["by_trial"]) == 2
    else:
        with pytest.raises(SweepError, match="'gp-0' and 'random' do not compare: their val images differ"):
            compare_sweeps(runs, ["gp-0", "random"])
