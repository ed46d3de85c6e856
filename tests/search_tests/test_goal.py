"""The goal of a sweep: objectives, reference point, limits and the values of outcomes."""

from __future__ import annotations

from dataclasses import fields
from math import isnan

import pytest

from search.errors import ConfigError
from search.goal import ACCURACIES, Goal, metric_of
from search.outcome import Measurement
from tests.search_tests import builders

DENSE = builders.measurement(0.8, 1.0, recall_at_1=0.6, mean_average_precision=0.4, macs=1000)
OUTCOMES = [
    builders.outcome("t000", 0.75, 1.6, recall_at_1=0.5),
    builders.outcome("t001", 0.65, 3.0),
    builders.failed("t002"),
    builders.outcome("t003", 0.9, 1.2),
]
MEASURED = [outcome for outcome in OUTCOMES if outcome.measurement is not None]


@pytest.mark.parametrize(("accuracy", "half"), [("top1", 0.4), ("recall_at_1", 0.3), ("mean_average_precision", 0.2)])
def test_reference_is_half_the_dense_accuracy_at_the_dense_speed(accuracy: str, half: float) -> None:
    goal = Goal(dense=DENSE, accuracy=accuracy)
    assert goal.objectives == (accuracy, "speedup")
    assert goal.reference == (half, 1.0)
    assert goal.reference_point == {accuracy: half, "speedup": 1.0}


def test_accuracies_are_metrics_that_are_measured() -> None:
    assert ACCURACIES.keys() < {field.name for field in fields(Measurement)}


def test_values_of_outcomes_are_the_objectives_in_their_order() -> None:
    assert Goal(dense=DENSE).values(MEASURED).tolist() == [[0.75, 1.6], [0.65, 3.0], [0.9, 1.2]]
    assert Goal(dense=DENSE).values([]).shape == (0, 2)


def test_value_of_a_metric_that_was_not_taken_is_nan() -> None:
    recalls = Goal(dense=DENSE, accuracy="recall_at_1").values(MEASURED)[:, 0]
    assert recalls[0] == 0.5 and isnan(recalls[1]) and isnan(recalls[2])
    assert isnan(metric_of(builders.measurement(0.8, 1.0), "top1_test"))
    assert isnan(metric_of(None, "top1"))
    assert metric_of(DENSE, "macs") == 1000.0


def test_acceptable_is_what_was_measured_and_keeps_all_limits() -> None:
    goal = Goal.of(DENSE, "top1", ["top1 >= 0.7", "speedup >= 1.5"])
    assert [outcome.id for outcome in goal.acceptable(OUTCOMES)] == ["t000"]
    assert [outcome.id for outcome in Goal(dense=DENSE).acceptable(OUTCOMES)] == ["t000", "t001", "t003"]


def test_outcome_at_a_limit_is_acceptable() -> None:
    goal = Goal.of(DENSE, "top1", ["top1 >= dense - 0.05", "speedup <= 1.6"])
    assert [outcome.id for outcome in goal.acceptable(OUTCOMES)] == ["t000", "t003"]


def test_excesses_are_told_by_limit() -> None:
    goal = Goal.of(DENSE, "top1", ["macs <= 60%", "top1 >= dense - 0.08"])
    assert [limit.text for limit in goal.limits] == ["macs <= 60%", "top1 >= dense - 0.08"]
    excesses = goal.excesses(builders.measurement(0.64, 2.0, macs=500))
    assert excesses == {"macs <= 60%": pytest.approx(-0.1), "top1 >= dense - 0.08": pytest.approx(0.1)}


def test_limit_of_no_known_form_makes_no_goal() -> None:
    with pytest.raises(ConfigError, match="limit 'fast' is of no known form"):
        Goal.of(DENSE, "top1", ["macs <= 60%", "fast"])
