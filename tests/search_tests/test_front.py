"""The front against brute force, the hypervolume against closed forms and unit cubes, the picks by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from search.errors import SweepError
from search.front import (
    ACCURACIES,
    GrowingFront,
    Values,
    accuracy_of,
    contenders,
    distinct,
    front_of,
    front_record,
    hypervolume,
    hypervolume_of,
    knee,
    non_dominated,
    pick,
    reference_point,
    running_hypervolume,
    within,
)
from search.limits import acceptable, parse_limit
from search.outcome import Outcome, State
from tests.search_tests import builders

NAN = float("nan")


def brute_force_front(values: Values) -> list[int]:
    """By the definition, row against row."""

    def beats(a: int, b: int) -> bool:
        better = (values[a] >= values[b]).all() and (values[a] > values[b]).any()
        return bool(better or (a < b and (values[a] == values[b]).all()))

    rows = [row for row in range(len(values)) if not np.isnan(values[row]).any()]
    return [row for row in rows if not any(beats(other, row) for other in rows)]


def count_unit_cubes(values: Values, reference: Values, size: int) -> int:
    """For whole-numbered points up to `size`: the unit cubes of the grid below at least one of them."""
    corners = product(*(range(int(start), size) for start in reference))
    return sum(any((np.array(corner) + 1 <= value).all() for value in values) for corner in corners)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_front_is_that_of_brute_force(m: int) -> None:
    random = np.random.default_rng(m)
    for n in (1, 2, 5, 40):
        for _ in range(20):  # few whole numbers, so that ties and equal rows are common
            values = random.integers(0, 6, (n, m)).astype(float)
            values[random.random((n, m)) < 0.05] = NAN
            assert non_dominated(values).tolist() == brute_force_front(values)


def test_front_of_nothing_is_empty() -> None:
    assert non_dominated(np.empty((0, 2))).tolist() == []


def test_of_equal_points_the_first_is_on_the_front() -> None:
    assert non_dominated(np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])).tolist() == [1]


def test_point_with_nan_is_not_on_the_front_and_beats_nothing() -> None:
    assert non_dominated(np.array([[9.0, NAN], [1.0, 1.0], [NAN, NAN]])).tolist() == [1]


def test_infinite_point_beats_all() -> None:
    assert non_dominated(np.array([[1.0, 2.0], [np.inf, 2.0], [-np.inf, 3.0]])).tolist() == [1, 2]


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_hypervolume_counts_the_unit_cubes_below_the_points(m: int) -> None:
    random = np.random.default_rng(m)
    for n in (1, 2, 3, 8):
        for _ in range(5):
            values = random.integers(0, 6, (n, m)).astype(float)
            reference = random.integers(0, 3, m).astype(float)
            assert hypervolume(values, reference) == count_unit_cubes(values, reference, size=6)


def test_hypervolume_of_one_point_is_its_box() -> None:
    assert hypervolume(np.array([[0.5, 3.0]]), np.array([0.25, 1.0])) == 0.5
    assert hypervolume(np.array([[2.0, 3.0, 4.0]]), np.zeros(3)) == 24.0


def test_hypervolume_of_two_points_is_boxes_less_overlap() -> None:
    values = np.array([[0.9, 1.5], [0.6, 3.0]])
    assert hypervolume(values, np.array([0.0, 1.0])) == pytest.approx(0.9 * 0.5 + 0.6 * 2.0 - 0.6 * 0.5)


def test_hypervolume_of_points_on_a_line_tends_to_the_triangle() -> None:
    x = np.linspace(0, 1, 1001)
    assert hypervolume(np.column_stack((x, 1 - x)), np.zeros(2)) == pytest.approx(0.5 - 0.5 / 1000)


def test_points_at_or_outside_the_reference_add_nothing() -> None:
    reference = np.array([1.0, 1.0])
    outside = np.array([[1.0, 9.0], [9.0, 1.0], [0.5, 9.0], [NAN, 9.0]])
    assert hypervolume(outside, reference) == 0.0
    assert hypervolume(np.vstack((outside, [[2.0, 3.0]])), reference) == 2.0


def test_hypervolume_of_nothing_is_zero_and_duplicates_count_once() -> None:
    assert hypervolume(np.empty((0, 3)), np.zeros(3)) == 0.0
    assert hypervolume(np.array([[2.0, 2.0]] * 3), np.zeros(2)) == 4.0


def test_knee_is_nearest_to_the_best_of_both() -> None:
    front = np.array([[1.0, 0.0], [0.9, 0.7], [0.5, 0.8], [0.0, 1.0]])
    assert knee(front) == min(range(4), key=lambda row: np.hypot(*(1 - front[row]))) == 1


def test_knee_of_a_front_that_sags_is_not_an_end() -> None:
    assert knee(np.array([[1.0, 0.0], [0.4, 0.45], [0.0, 1.0]])) == 1


def test_knee_does_not_depend_on_the_units() -> None:
    front = np.array([[1.0, 0.0], [0.9, 0.7], [0.5, 0.8], [0.0, 1.0]])
    assert knee(front * [100.0, 1e-3] + [5.0, -7.0]) == 1


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ([[0.5, 2.0]], 0),
        ([[0.5, 2.0], [0.9, 1.0]], 1),
        ([[0.7, 1.3], [0.3, 1.7], [0.1, 1.9], [0.9, 1.1]], 0),  # on one line: the two in the middle tie
        (np.linspace((0.3, 3.1), (0.9, 1.2), 10).tolist(), 5),  # the same, but for rounding
        ([[0.0, 1.0], [0.1, 0.2], [1.0, 0.0]], 2),  # bent inwards so far that the ends are nearer
        ([[0.0, 1.0], [0.6, 0.9], [0.9, 0.6], [1.0, 0.0]], 2),
    ],
)
def test_knee_of_a_tie_is_the_more_accurate(front: list[list[float]], expected: int) -> None:
    assert knee(np.array(front)) == expected


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
    assert [outcome.id for outcome in front_of(sweep)] == ["t003", "t001", "t004"]


def test_front_of_a_sweep_where_all_failed_is_empty() -> None:
    assert front_of([builders.failed("t000"), builders.failed("t001", State.INFEASIBLE)]) == ()


def test_hypervolume_of_a_sweep_is_the_staircase_above_half_the_dense_accuracy(sweep: list[Outcome]) -> None:
    assert reference_point(builders.DENSE) == {"top1": 0.45, "speedup": 1.0}
    stairs = 0.45 * 0.2 + 0.40 * 0.8 + 0.15 * 1.0
    assert hypervolume_of(sweep, builders.DENSE) == pytest.approx(stairs)
    assert hypervolume_of([], builders.DENSE) == 0.0


def test_running_hypervolume_is_that_of_each_beginning(sweep: list[Outcome]) -> None:
    running = running_hypervolume(sweep, builders.DENSE)
    assert running == tuple(hypervolume_of(sweep[: count + 1], builders.DENSE) for count in range(len(sweep)))
    assert running[0] == pytest.approx(0.25 * 0.5)
    assert running[1] == running[2] < running[3] < running[4] == running[5]


def made_at_random(count: int) -> list[Outcome]:
    """Few values, so that ties are common; some failed, some without their accuracy."""
    random = np.random.default_rng(count)
    found = []
    for number in range(count):
        top1, speedup = random.integers(4, 10) / 10, 1 + random.integers(0, 30) / 20
        other = {"speedup_high": NAN} if random.random() < 0.05 else {}
        outcome = builders.outcome(f"t{number:03d}", NAN if random.random() < 0.1 else top1, speedup, **other)
        found.append(builders.failed(outcome.id) if random.random() < 0.1 else outcome)
    return found


def test_front_that_grows_has_the_hypervolume_of_the_whole() -> None:
    limits = [parse_limit("top1 >= 0.5"), parse_limit("speedup <= 2.3")]
    outcomes = made_at_random(60)
    growing, reference = GrowingFront(builders.DENSE, "top1", limits), np.array([0.45, 1.0])
    volumes = []
    for count, outcome in enumerate(outcomes, start=1):
        volumes.append(growing.add(outcome))
        kept = acceptable(outcomes[:count], limits, builders.DENSE)
        values = [[o.measurement.top1, o.measurement.speedup] for o in kept if o.measurement is not None]
        assert volumes[-1] == hypervolume(np.array(values).reshape(-1, 2), reference)
    assert volumes == sorted(volumes)
    assert 0 < volumes[20] < volumes[-1]


def test_front_record_survives_json(sweep: list[Outcome]) -> None:
    record = front_record("digits", sweep, builders.DENSE)
    read = json.loads(json.dumps(record))
    assert read["name"] == "digits"
    assert read["objectives"] == [
        {"name": "top1", "direction": "maximize"},
        {"name": "speedup", "direction": "maximize"},
    ]
    assert read["dense"]["top1"] == 0.9
    assert read["reference_point"] == {"top1": 0.45, "speedup": 1.0}
    assert read["hypervolume"] == hypervolume_of(sweep, builders.DENSE)
    assert read["knee"] == "t001"
    assert [point["id"] for point in read["points"]] == ["t003", "t001", "t004"]


def test_point_of_a_record_has_measurement_candidate_and_plan(sweep: list[Outcome]) -> None:
    point = json.loads(json.dumps(front_record("digits", sweep, builders.DENSE)["points"][1]))
    assert point.keys() == {
        *("id", "top1", "top1_low", "top1_high", "top1_test", "throughput_img_s", "speedup", "speedup_low"),
        *("speedup_high", "latency_ms_p50", "macs", "params", "sparsity", "recall_at_1", "mean_average_precision"),
        *("candidate", "plan"),
    }
    rebuilt = Outcome.from_json(
        json.loads(json.dumps(sweep[1].to_json())) | {"candidate": point["candidate"], "plan": point["plan"]}
    )
    assert rebuilt == sweep[1]
    assert (point["top1"], point["top1_test"], point["speedup"]) == (0.85, 0.84, 2.0)


def test_record_of_an_empty_front_has_no_knee() -> None:
    record = front_record("digits", [builders.failed("t000")], builders.DENSE)
    assert (record["knee"], record["points"], record["hypervolume"]) == (None, [], 0.0)


def test_bounds_are_kept_and_include_their_ends(sweep: list[Outcome]) -> None:
    front = front_of(sweep)
    assert [o.id for o in within(front, {"top1": 0.85}, {})] == ["t003", "t001"]
    assert [o.id for o in within(front, {}, {"latency_ms_p50": 320.0})] == ["t001", "t004"]
    assert [o.id for o in within(front, {"top1": 0.85}, {"latency_ms_p50": 320.0})] == ["t001"]
    assert within(front, {}, {}) == front


def test_metric_that_was_not_taken_keeps_no_bound(sweep: list[Outcome]) -> None:
    front = front_of(sweep)
    assert [o.id for o in within(front, {"top1_test": 0.0}, {})] == ["t001"]
    assert [o.id for o in within(front, {}, {"top1_test": 1.0})] == ["t001"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [("knee", "t001"), ("fastest", "t004"), ("most-accurate", "t003"), ("t004", "t004")],
)
def test_pick_without_bounds(sweep: list[Outcome], how: str, expected: str) -> None:
    assert pick(front_of(sweep), how, {}, {}).id == expected


def test_pick_chooses_among_what_the_bounds_leave(sweep: list[Outcome]) -> None:
    assert pick(front_of(sweep), "fastest", {"top1": 0.7}, {}).id == "t001"
    assert pick(front_of(sweep), "most-accurate", {"speedup": 1.5}, {}).id == "t001"
    assert pick(front_of(sweep), "knee", {"speedup": 2.5}, {}).id == "t004"


def test_unknown_metric_is_answered_with_those_there_are(sweep: list[Outcome]) -> None:
    with pytest.raises(SweepError, match=r"^no metric 'accuracy'; there are top1, .*speedup.*macs"):
        pick(front_of(sweep), "knee", {"accuracy": 0.5}, {})
    with pytest.raises(SweepError, match="no metric 'ms'"):
        within([], {}, {"ms": 0.5})


def test_unknown_point_is_answered_with_those_there_are(sweep: list[Outcome]) -> None:
    with pytest.raises(SweepError, match="no point 't000' to pick; there are t003, t001, t004, and knee, fastest"):
        pick(front_of(sweep), "t000", {}, {})


def test_bounds_that_leave_nothing_are_answered_with_the_best_values(sweep: list[Outcome]) -> None:
    expected = "has top1 >= 0.95 and macs <= 1000; it reaches top1 up to 0.9, macs down to 4.115e"
    with pytest.raises(SweepError, match=expected):
        pick(front_of(sweep), "knee", {"top1": 0.95}, {"macs": 1000})


def test_bound_on_what_was_never_measured_says_so() -> None:
    with pytest.raises(SweepError, match="top1_test not measured"):
        pick([builders.outcome("t000", 0.9, 2.0)], "knee", {"top1_test": 0.5}, {})


def test_empty_front_says_that_it_is_empty() -> None:
    with pytest.raises(SweepError, match="the front is empty"):
        pick([], "knee", {"top1": 0.5}, {})


def test_contenders_are_those_not_beaten_beyond_the_noise() -> None:
    outcomes = [
        builders.outcome("t000", 0.9, 2.0),
        builders.outcome("t001", 0.9, 1.95),  # slower, but within the intervals
        builders.outcome("t002", 0.9, 1.0),  # beaten by t000
        builders.outcome("t003", 0.8, 2.1),  # faster within the noise: may be on the front
        builders.outcome("t004", 0.91, 0.5),  # the most accurate
        builders.failed("t005"),
    ]
    assert [outcome.id for outcome in contenders(outcomes)] == ["t000", "t001", "t003", "t004"]


def test_points_within_the_noise_of_one_before_them_are_not_points_of_their_own() -> None:
    # top-1 by 0.01 each way, speed-ups by 5 %: two differ from 0.0141 on, and from 7 % on
    front = [
        builders.outcome("t000", 0.95, 1.5),
        builders.outcome("t001", 0.94, 1.55),
        builders.outcome("t002", 0.93, 1.6),
        builders.outcome("t003", 0.925, 1.9),
    ]
    assert [outcome.id for outcome in distinct(front, builders.DENSE)] == ["t000", "t002", "t003"]
    record = front_record("digits", front, builders.DENSE)
    assert [point["id"] for point in record["points"]] == ["t000", "t002", "t003"]


def test_point_within_the_noise_of_the_dense_model_is_not_called_faster() -> None:
    dense = builders.measurement(0.9, 1.0, speedup_low=1.0, speedup_high=1.0)
    same, faster, better = (
        builders.outcome("t000", 0.9, 1.04),
        builders.outcome("t001", 0.9, 1.06),
        builders.outcome("t002", 0.92, 1.0),
    )
    assert distinct([same], dense) == ()
    assert distinct([faster], dense) == (faster,)
    assert distinct([better], dense) == (better,)


def test_metric_without_an_interval_is_exact() -> None:
    front = [
        builders.outcome("t000", 0.9, 1.5, recall_at_1=0.5),
        builders.outcome("t001", 0.9, 1.51, recall_at_1=0.499),
    ]
    dense = builders.measurement(0.9, 1.0, recall_at_1=0.6)
    assert distinct(front, dense, "recall_at_1") == tuple(front)


def test_contenders_are_those_of_brute_force_also_when_they_come_one_by_one() -> None:
    outcomes = made_at_random(80)
    measured = [(outcome.id, outcome.measurement) for outcome in outcomes if outcome.measurement is not None]
    expected = [
        id
        for id, own in measured
        if not any(other.speedup_low > own.speedup_high and other.top1 >= own.top1 for _, other in measured)
    ]
    assert [outcome.id for outcome in contenders(outcomes)] == expected
    left: tuple[Outcome, ...] = ()
    for outcome in outcomes:
        left = contenders([*left, outcome])
    assert [outcome.id for outcome in left] == expected
    assert 1 < len(expected) < 60
    assert contenders([]) == ()


def test_front_lies_within_the_contenders() -> None:
    draw = np.random.default_rng(0)
    outcomes = [
        builders.outcome(f"t{i:03d}", top1, speed) for i, (top1, speed) in enumerate(draw.random((60, 2)) + 0.5)
    ]
    assert {outcome.id for outcome in front_of(outcomes)} <= {outcome.id for outcome in contenders(outcomes)}
    assert len(contenders(outcomes)) < len(outcomes)


RETRIEVAL = ("recall_at_1", "mean_average_precision")


def searched_by(accuracy: str, outcomes: list[Outcome]) -> list[Outcome]:
    """The same sweep with its accuracies under another name, and top-1 accuracies that say the opposite."""
    changed = []
    for outcome in outcomes:
        found = outcome.measurement
        if found is not None:
            top1 = found.top1
            found = replace(found, **{accuracy: top1, "top1": 1 - top1, "top1_low": 0.0, "top1_high": 1.0})
        changed.append(replace(outcome, measurement=found))
    return changed


@pytest.mark.parametrize("accuracy", RETRIEVAL)
def test_what_is_best_by_a_retrieval_metric_is_what_is_best_by_top1_of_these_values(
    sweep: list[Outcome], accuracy: str
) -> None:
    others = searched_by(accuracy, sweep)
    dense = builders.measurement(0.1, 1.0, **{accuracy: 0.9})
    ids = [outcome.id for outcome in front_of(sweep)]
    assert [outcome.id for outcome in front_of(others, accuracy)] == ids
    assert [outcome.id for outcome in front_of(others)] != ids
    assert [o.id for o in contenders(others, accuracy)] == [o.id for o in contenders(sweep)]
    assert [o.id for o in contenders(others)] != [o.id for o in contenders(sweep)]
    assert reference_point(dense, accuracy) == {accuracy: 0.45, "speedup": 1.0}
    assert running_hypervolume(others, dense, accuracy) == running_hypervolume(sweep, builders.DENSE)
    assert hypervolume_of(others, dense, accuracy) == hypervolume_of(sweep, builders.DENSE)
    for how in ("knee", "fastest", "most-accurate"):
        assert pick(front_of(others, accuracy), how, {}, {}, accuracy).id == pick(front_of(sweep), how, {}, {}).id
    assert pick(front_of(others, accuracy), "most-accurate", {}, {}).id == "t004"


@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_record_says_which_accuracy_was_searched_by(sweep: list[Outcome], accuracy: str) -> None:
    outcomes = sweep if accuracy == "top1" else searched_by(accuracy, sweep)
    record = front_record("digits", outcomes, replace(builders.DENSE, **{accuracy: 0.8}), accuracy)
    read = json.loads(json.dumps(record))
    assert [objective["name"] for objective in read["objectives"]] == [accuracy, "speedup"]
    assert accuracy_of(read) == accuracy
    assert read["reference_point"] == {accuracy: 0.4, "speedup": 1.0}
    assert (read["knee"], [point["id"] for point in read["points"]]) == ("t001", ["t003", "t001", "t004"])
    assert [point[accuracy] for point in read["points"]] == [0.9, 0.85, 0.6]


def test_outcome_without_the_metric_is_not_on_its_front_and_beats_nobody() -> None:
    outcomes = [builders.outcome("t000", 0.9, 9.0), builders.outcome("t001", 0.5, 1.5, recall_at_1=0.8)]
    assert [outcome.id for outcome in front_of(outcomes, "recall_at_1")] == ["t001"]
    assert "t001" in [outcome.id for outcome in contenders(outcomes, "recall_at_1")]
