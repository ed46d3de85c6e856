"""Limits: their forms, their bounds against a dense model, and the excess of a measurement beyond them."""

from __future__ import annotations

import pytest

from search.config import Config
from search.errors import ConfigError
from search.front import running_hypervolume
from search.goal import Goal
from search.limits import parse_limit
from tests.search_tests import builders, tiny

DENSE = builders.measurement(0.8, 1.0, macs=1000, latency_ms_p50=4.0)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("top1 >= dense - 0.01", 0.79),
        ("top1>=dense-0.01", 0.79),
        ("top1 >= dense", 0.8),
        ("top1 >= 99%", 0.792),
        ("macs <= 60%", 600.0),
        ("macs <= 62.5 %", 625.0),
        ("macs <= 1e-3", 0.001),
        ("latency_ms_p50 <= 5", 5.0),
        ("latency_ms_p50 <= dense + 2", 6.0),
        ("  speedup >= 1.5 ", 1.5),
    ],
)
def test_a_limit_is_a_number_a_share_of_dense_or_so_far_from_it(text: str, bound: float) -> None:
    limit = parse_limit(text)
    assert limit.bound(DENSE) == pytest.approx(bound)
    assert limit.is_most == ("<=" in text)


@pytest.mark.parametrize(
    "text",
    ["top1", "top1 > 0.5", "top1 >= ", ">= 0.5", "top1 >= dense * 2", "top1 >= fast", "0.5 <= top1", "top1 >= 1.2.3"],
)
def test_another_form_says_which_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is of no known form; give metric <= 5, metric <= 60%"):
        parse_limit(text)


def test_an_unknown_metric_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no metric 'accuracy'; there are top1, .*speedup.*macs"):
        parse_limit("accuracy >= 0.9")
    with pytest.raises(ConfigError, match="no metric 'top1_test'"):  # which the search must never see
        parse_limit("top1_test >= 0.9")


def test_excess_is_a_share_of_dense_above_0_beyond_the_limit_alone() -> None:
    most, least = parse_limit("macs <= 60%"), parse_limit("top1 >= dense - 0.08")
    assert most.excess(builders.measurement(0.5, 2.0, macs=700), DENSE) == pytest.approx(0.1)
    assert most.excess(builders.measurement(0.5, 2.0, macs=600), DENSE) == 0
    assert most.excess(builders.measurement(0.5, 2.0, macs=500), DENSE) == pytest.approx(-0.1)
    assert least.excess(builders.measurement(0.64, 2.0), DENSE) == pytest.approx(0.1)
    assert least.excess(builders.measurement(0.8, 2.0), DENSE) == pytest.approx(-0.1)


def test_value_at_the_bound_is_within() -> None:
    for dense, top1 in ((0.9, 0.87), (0.3, 0.27), (0.7, 0.67)):  # 0.3 - 0.03 is above 0.27 in binary fractions
        limit = parse_limit("top1 >= dense - 0.03")
        assert limit.excess(builders.measurement(top1, 2.0), builders.measurement(dense, 1.0)) <= 0
        assert limit.excess(builders.measurement(top1 - 0.001, 2.0), builders.measurement(dense, 1.0)) > 0


def test_a_limit_on_what_the_recipe_does_not_measure_is_refused() -> None:
    record = tiny.config().model_dump(mode="json")
    record["search"]["limits"] = ["recall_at_1 >= 0.5"]
    with pytest.raises(ConfigError, match=r"measured only with search\.accuracy=recall_at_1"):
        Config.from_dict(record)
    record["search"]["accuracy"] = "recall_at_1"
    assert Config.from_dict(record).search.limits == ("recall_at_1 >= 0.5",)


def test_the_hypervolume_counts_what_keeps_the_limits() -> None:
    goal = Goal.of(DENSE, "top1", ["top1 >= 0.7"])
    outcomes = [
        builders.outcome("t000", 0.65, 3.0),
        builders.outcome("t001", 0.75, 1.6),
        builders.outcome("t002", 0.6, 4.0),
    ]
    volumes = running_hypervolume(outcomes, goal)
    assert volumes == (0.0, pytest.approx((0.75 - 0.4) * 0.6), volumes[1])


def test_a_recipe_with_a_wrong_limit_names_the_key() -> None:
    record = tiny.config().model_dump(mode="json")
    record["search"]["limits"] = ["top1 >= dense - 0.01", "speed >= 2"]
    with pytest.raises(ConfigError, match=r"search\.limits.*no metric 'speed'"):
        Config.from_dict(record)
    record["search"]["limits"] = ["top1 >= dense - 0.01"]
    assert Config.from_dict(record).search.limits == ("top1 >= dense - 0.01",)
