"""The front of a sweep against brute force, its record, and the picks by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from search.errors import SweepError
from search.front import (
    Front,
    GrowingFront,
    contenders,
    distinct,
    front_of,
    hypervolume_of,
    running_hypervolume,
    within,
)
from search.goal import ACCURACIES, Goal
from search.outcome import Outcome, State
from search.pareto import hypervolume
from tests.search_tests import builders
from tests.search_tests.builders import GOAL

NAN = float("nan")


def front(outcomes: list[Outcome], goal: Goal = GOAL) -> Front:
    return Front.of("digits", outcomes, goal)


@pytest.fixture
def sweep() -> list[Outcome]:
    """On the front: t003, t001, t004, from slow to fast."""
    return [
        builders.outcome("t000", 0.70, 1.5),
        builders.outcome("t001", 0.85, 2.0, top1_test=0.84),
        builders.failed("t002"),
        builders.outcome("t003", 0.90, 1.2),
        builders.outcome("t004", 0.60, 3.0),
        builders.outcome("t005", NAN, 9.0),
    ]


def test_front_of_a_sweep_runs_from_slow_to_fast(sweep: list[Outcome]) -> None:
    assert [outcome.id for outcome in front_of(sweep, GOAL)] == ["t003", "t001", "t004"]


def test_front_of_a_sweep_where_all_failed_is_empty() -> None:
    assert front_of([builders.failed("t000"), builders.failed("t001", State.INFEASIBLE)], GOAL) == ()


def test_hypervolume_of_a_sweep_is_the_staircase_above_half_the_dense_accuracy(sweep: list[Outcome]) -> None:
    assert GOAL.reference_point == {"top1": 0.45, "speedup": 1.0}
    stairs = 0.45 * 0.2 + 0.40 * 0.8 + 0.15 * 1.0
    assert hypervolume_of(sweep, GOAL) == pytest.approx(stairs)
    assert hypervolume_of([], GOAL) == 0.0


def test_running_hypervolume_is_that_of_each_beginning(sweep: list[Outcome]) -> None:
    running = running_hypervolume(sweep, GOAL)
    assert running == tuple(hypervolume_of(sweep[: count + 1], GOAL) for count in range(len(sweep)))
    assert running[0] == pytest.approx(0.25 * 0.5)
    assert running[1] == running[2] < running[3] < running[4] == running[5]


def drawn_at_random(count: int) -> list[Outcome]:
    """Few values, so that ties are common; some failed, some without their accuracy."""
    random = np.random.default_rng(count)
    outcomes = []
    for number in range(count):
        top1, speedup = random.integers(4, 10) / 10, 1 + random.integers(0, 30) / 20
        other = {"speedup_high": NAN} if random.random() < 0.05 else {}
        outcome = builders.outcome(f"t{number:03d}", NAN if random.random() < 0.1 else top1, speedup, **other)
        outcomes.append(builders.failed(outcome.id) if random.random() < 0.1 else outcome)
    return outcomes


def test_front_that_grows_has_the_hypervolume_of_the_whole() -> None:
    goal = Goal.of(builders.DENSE, "top1", ["top1 >= 0.5", "speedup <= 2.3"])
    outcomes = drawn_at_random(60)
    growing, reference = GrowingFront(goal), np.array([0.45, 1.0])
    volumes = []
    for count, outcome in enumerate(outcomes, start=1):
        volumes.append(growing.add(outcome))
        kept = goal.acceptable(outcomes[:count])
        values = [[o.measurement.top1, o.measurement.speedup] for o in kept if o.measurement is not None]
        assert volumes[-1] == hypervolume(np.array(values).reshape(-1, 2), reference)
    assert volumes == sorted(volumes)
    assert 0 < volumes[20] < volumes[-1]


def test_front_record_survives_json(sweep: list[Outcome]) -> None:
    read = json.loads(json.dumps(front(sweep).to_json()))
    assert read["name"] == "digits"
    assert read["objectives"] == [
        {"name": "top1", "direction": "maximize"},
        {"name": "speedup", "direction": "maximize"},
    ]
    assert read["dense"]["top1"] == 0.9
    assert read["reference_point"] == {"top1": 0.45, "speedup": 1.0}
    assert read["hypervolume"] == hypervolume_of(sweep, GOAL)
    assert read["knee"] == "t001"
    assert [point["id"] for point in read["points"]] == ["t003", "t001", "t004"]


def test_point_of_a_record_has_measurement_candidate_and_plan(sweep: list[Outcome]) -> None:
    point = json.loads(json.dumps(front(sweep).to_json()["points"][1]))
    assert point.keys() == {
        *("id", "top1", "top1_low", "top1_high", "top1_test", "throughput_img_s", "speedup", "speedup_low"),
        *("speedup_high", "latency_ms_p50", "macs", "params", "sparsity", "recall_at_1", "mean_average_precision"),
        "num_images",
        *("candidate", "plan"),
    }
    rebuilt = Outcome.from_json(
        json.loads(json.dumps(sweep[1].to_json())) | {"candidate": point["candidate"], "plan": point["plan"]}
    )
    assert rebuilt == sweep[1]
    assert (point["top1"], point["top1_test"], point["speedup"]) == (0.85, 0.84, 2.0)


def test_record_of_an_empty_front_has_no_knee() -> None:
    record = front([builders.failed("t000")]).to_json()
    assert (record["knee"], record["points"], record["hypervolume"]) == (None, [], 0.0)


def test_bounds_are_kept_and_include_their_ends(sweep: list[Outcome]) -> None:
    points = front_of(sweep, GOAL)
    assert [o.id for o in within(points, {"top1": 0.85}, {})] == ["t003", "t001"]
    assert [o.id for o in within(points, {}, {"latency_ms_p50": 320.0})] == ["t001", "t004"]
    assert [o.id for o in within(points, {"top1": 0.85}, {"latency_ms_p50": 320.0})] == ["t001"]
    assert within(points, {}, {}) == points


def test_metric_that_was_not_taken_keeps_no_bound(sweep: list[Outcome]) -> None:
    points = front_of(sweep, GOAL)
    assert [o.id for o in within(points, {"top1_test": 0.0}, {})] == ["t001"]
    assert [o.id for o in within(points, {}, {"top1_test": 1.0})] == ["t001"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [("knee", "t001"), ("fastest", "t004"), ("most-accurate", "t003"), ("t004", "t004")],
)
def test_pick_without_bounds(sweep: list[Outcome], how: str, expected: str) -> None:
    assert front(sweep).pick(how, {}, {}).id == expected


def test_pick_chooses_among_what_the_bounds_leave(sweep: list[Outcome]) -> None:
    assert front(sweep).pick("fastest", {"top1": 0.7}, {}).id == "t001"
    assert front(sweep).pick("most-accurate", {"speedup": 1.5}, {}).id == "t001"
    assert front(sweep).pick("knee", {"speedup": 2.5}, {}).id == "t004"


def test_unknown_metric_is_answered_with_those_there_are(sweep: list[Outcome]) -> None:
    with pytest.raises(SweepError, match=r"^no metric 'accuracy'; there are top1, .*speedup.*macs"):
        front(sweep).pick("knee", {"accuracy": 0.5}, {})
    with pytest.raises(SweepError, match="no metric 'ms'"):
        within([], {}, {"ms": 0.5})


def test_unknown_point_is_answered_with_those_there_are(sweep: list[Outcome]) -> None:
    with pytest.raises(SweepError, match="no point 't000' to pick; there are t003, t001, t004, and knee, fastest"):
        front(sweep).pick("t000", {}, {})


def test_bounds_that_leave_nothing_are_answered_with_the_best_values(sweep: list[Outcome]) -> None:
    expected = "has top1 >= 0.95 and macs <= 1000; it reaches top1 up to 0.9, macs down to 4.115e"
    with pytest.raises(SweepError, match=expected):
        front(sweep).pick("knee", {"top1": 0.95}, {"macs": 1000})


def test_bound_on_what_was_never_measured_says_so() -> None:
    with pytest.raises(SweepError, match="top1_test not measured"):
        front([builders.outcome("t000", 0.95, 2.0)]).pick("knee", {"top1_test": 0.5}, {})


def test_empty_front_says_that_it_is_empty() -> None:
    with pytest.raises(SweepError, match=r"the front is empty: none of \d+ trials keeps the limits and differs"):
        front([]).pick("knee", {"top1": 0.5}, {})


def test_contenders_are_those_not_beaten_beyond_the_noise() -> None:
    outcomes = [
        builders.outcome("t000", 0.9, 2.0),
        builders.outcome("t001", 0.9, 1.95),  # slower, but within the intervals
        builders.outcome("t002", 0.9, 1.0),  # beaten by t000
        builders.outcome("t003", 0.8, 2.1),  # faster within the noise: may be on the front
        builders.outcome("t004", 0.91, 0.5),  # the most accurate
        builders.failed("t005"),
    ]
    assert [outcome.id for outcome in contenders(outcomes, GOAL)] == ["t000", "t001", "t003", "t004"]


def test_points_within_the_noise_of_one_before_them_are_not_points_of_their_own() -> None:
    # top-1 by 0.01 each way, speed-ups by 5 %: two differ from 0.0141 on, and from 7 % on
    points = [
        builders.outcome("t000", 0.95, 1.5),
        builders.outcome("t001", 0.94, 1.55),
        builders.outcome("t002", 0.93, 1.6),
        builders.outcome("t003", 0.925, 1.9),
    ]
    assert [outcome.id for outcome in distinct(points, GOAL)] == ["t000", "t002", "t003"]
    assert [point.id for point in front(points).points] == ["t000", "t002", "t003"]


def test_point_within_the_noise_of_the_dense_model_is_not_called_faster() -> None:
    goal = Goal(dense=builders.measurement(0.9, 1.0, speedup_low=1.0, speedup_high=1.0))
    same, faster, better = (
        builders.outcome("t000", 0.9, 1.04),
        builders.outcome("t001", 0.9, 1.06),
        builders.outcome("t002", 0.92, 1.0),
    )
    assert distinct([same], goal) == ()
    assert distinct([faster], goal) == (faster,)
    assert distinct([better], goal) == (better,)


def test_metric_without_an_interval_is_exact() -> None:
    points = [
        builders.outcome("t000", 0.9, 1.5, recall_at_1=0.5),
        builders.outcome("t001", 0.9, 1.51, recall_at_1=0.499),
    ]
    goal = Goal(dense=builders.measurement(0.9, 1.0, recall_at_1=0.6), accuracy="recall_at_1")
    assert distinct(points, goal) == tuple(points)


def test_contenders_are_those_of_brute_force_also_when_they_come_one_by_one() -> None:
    outcomes = drawn_at_random(80)
    measured = [(outcome.id, outcome.measurement) for outcome in outcomes if outcome.measurement is not None]
    expected = [
        id
        for id, model in measured
        if not any(other.speedup_low > model.speedup_high and other.top1 >= model.top1 for _, other in measured)
    ]
    assert [outcome.id for outcome in contenders(outcomes, GOAL)] == expected
    left: tuple[Outcome, ...] = ()
    for outcome in outcomes:
        left = contenders([*left, outcome], GOAL)
    assert [outcome.id for outcome in left] == expected
    assert 1 < len(expected) < 60
    assert contenders([], GOAL) == ()


def test_front_lies_within_the_contenders() -> None:
    draw = np.random.default_rng(0)
    outcomes = [
        builders.outcome(f"t{i:03d}", top1, speed) for i, (top1, speed) in enumerate(draw.random((60, 2)) + 0.5)
    ]
    assert {outcome.id for outcome in front_of(outcomes, GOAL)} <= {
        outcome.id for outcome in contenders(outcomes, GOAL)
    }
    assert len(contenders(outcomes, GOAL)) < len(outcomes)


RETRIEVAL = ("recall_at_1", "mean_average_precision")


def searched_by(accuracy: str, outcomes: list[Outcome]) -> list[Outcome]:
    """Copies a sweep with its accuracies under another name, and with top-1 accuracies that say the opposite."""
    changed = []
    for outcome in outcomes:
        measurement = outcome.measurement
        if measurement is not None:
            values = {accuracy: measurement.top1, "top1": 1 - measurement.top1, "top1_low": 0.0, "top1_high": 1.0}
            measurement = replace(measurement, **values)
        changed.append(replace(outcome, measurement=measurement))
    return changed


@pytest.mark.parametrize("accuracy", RETRIEVAL)
def test_front_by_a_retrieval_metric_is_the_front_by_top1_of_these_values(sweep: list[Outcome], accuracy: str) -> None:
    by_metric, ids = searched_by(accuracy, sweep), [outcome.id for outcome in front_of(sweep, GOAL)]
    goal = Goal(dense=builders.measurement(0.1, 1.0, **{accuracy: 0.9}), accuracy=accuracy)
    by_top1 = Goal(dense=goal.dense)
    assert [outcome.id for outcome in front_of(by_metric, goal)] == ids
    assert [outcome.id for outcome in front_of(by_metric, by_top1)] != ids
    assert [o.id for o in contenders(by_metric, goal)] == [o.id for o in contenders(sweep, GOAL)]
    assert [o.id for o in contenders(by_metric, by_top1)] != [o.id for o in contenders(sweep, GOAL)]
    assert goal.reference_point == {accuracy: 0.45, "speedup": 1.0}
    assert running_hypervolume(by_metric, goal) == running_hypervolume(sweep, GOAL)
    assert hypervolume_of(by_metric, goal) == hypervolume_of(sweep, GOAL)
    for how in ("knee", "fastest", "most-accurate"):
        assert front(by_metric, goal).pick(how).id == front(sweep).pick(how).id
    assert replace(front(by_metric, goal), goal=by_top1).pick("most-accurate").id == "t004"


@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_record_says_which_accuracy_was_searched_by(sweep: list[Outcome], accuracy: str) -> None:
    outcomes = sweep if accuracy == "top1" else searched_by(accuracy, sweep)
    goal = Goal(dense=replace(builders.DENSE, **{accuracy: 0.8}), accuracy=accuracy)
    read = json.loads(json.dumps(front(outcomes, goal).to_json()))
    assert [objective["name"] for objective in read["objectives"]] == [accuracy, "speedup"]
    assert Front.from_json(read).goal == goal
    assert read["reference_point"] == {accuracy: 0.4, "speedup": 1.0}
    assert (read["knee"], [point["id"] for point in read["points"]]) == ("t001", ["t003", "t001", "t004"])
    assert [point[accuracy] for point in read["points"]] == [0.9, 0.85, 0.6]


def test_outcome_without_the_metric_is_not_on_its_front_and_beats_nobody() -> None:
    outcomes = [builders.outcome("t000", 0.9, 9.0), builders.outcome("t001", 0.5, 1.5, recall_at_1=0.8)]
    goal = Goal(dense=builders.DENSE, accuracy="recall_at_1")
    assert [outcome.id for outcome in front_of(outcomes, goal)] == ["t001"]
    assert "t001" in [outcome.id for outcome in contenders(outcomes, goal)]


def test_front_comes_back_from_json_as_it_was(sweep: list[Outcome]) -> None:
    goal = Goal.of(builders.DENSE, "top1", ["macs <= 90%"])
    conditions = {"device": "cpu", "batch_size": 16}
    ended = Front.of("digits", sweep, goal, trials=6, ended_by="time", idle_share=0.25, conditions=conditions)
    again = Front.from_json(json.loads(json.dumps(ended.to_json())))
    assert again.to_json() == ended.to_json()
    assert (again.goal, again.trials, again.ended_by, again.conditions) == (goal, 6, "time", conditions)


@pytest.mark.parametrize("key", ["name", "objectives", "dense", "hypervolume", "knee", "points", "trials"])
def test_record_without_a_key_is_no_front(sweep: list[Outcome], key: str) -> None:
    record = front(sweep).to_json()
    del record[key]
    with pytest.raises(SweepError, match=f"it is not a front: it has no key '{key}'"):
        Front.from_json(record)


@pytest.mark.parametrize(
    ("at_least", "at_most", "expected"),
    [
        ({}, {}, ["t003", "t001", "t004"]),
        ({"top1": 0.85}, {}, ["t003", "t001"]),
        ({}, {"latency_ms_p50": 400.0}, ["t001", "t004"]),
        ({"top1": 0.99}, {}, []),
    ],
)
def test_front_within_bounds_is_the_same_front_with_fewer_points(
    sweep: list[Outcome], at_least: dict[str, float], at_most: dict[str, float], expected: list[str]
) -> None:
    full_front = front(sweep)
    left = full_front.within(at_least, at_most)
    assert [point.id for point in left.points] == expected
    assert replace(left, points=full_front.points) == full_front


def test_front_of_a_retrieval_sweep_is_bounded_and_picked_by_its_metric_after_it_was_read_back() -> None:
    figures = {"t000": (0.3, 0.9, 1.2), "t001": (0.4, 0.85, 2.0), "t002": (0.9, 0.6, 3.0)}
    outcomes = [builders.outcome(id, top1, speedup, recall_at_1=r) for id, (top1, r, speedup) in figures.items()]
    goal = Goal(dense=builders.measurement(0.9, 1.0, recall_at_1=0.9), accuracy="recall_at_1")
    read = Front.from_json(json.loads(json.dumps(front(outcomes, goal).to_json())))
    assert read.pick("most-accurate").id == "t000"
    assert read.pick("knee").id == "t001"
    assert [point.id for point in read.within({"recall_at_1": 0.85}, {}).points] == ["t000", "t001"]
    assert read.pick("fastest", {"recall_at_1": 0.85}).id == "t001"


def test_front_written_before_a_metric_was_known_is_read(sweep: list[Outcome]) -> None:
    record = front(sweep).to_json()
    points = [{key: value for key, value in point.items() if key != "recall_at_1"} for point in record["points"]]
    assert Front.from_json(record | {"points": points}).pick("knee").id == "t001"
