"""The seconds of a trial: what counts as known, and what is predicted from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from search.outcome import State
from search.suggest.duration import OVERHEAD_S, Duration, fit_log_seconds, seconds_at
from tests.search_tests import builders

CHEAP, COSTLY = [1.0, 0.0], [0.0, 1.0]
"""Points of two methods."""


def grid(method: list[float], count: int) -> np.ndarray:
    """Points of a method, spread over a further axis without effect."""
    return np.array([[*method, share] for share in np.linspace(0, 1, count)])


def predicted(points: np.ndarray, durations: list[Duration], at: np.ndarray) -> np.ndarray:
    fitted = fit_log_seconds(points, durations)
    assert fitted is not None
    return seconds_at(fitted, at)


def both(cheap: Duration, costly: Duration, count: int = 6) -> tuple[np.ndarray, list[Duration]]:
    return np.vstack((grid(CHEAP, count), grid(COSTLY, count))), [cheap] * count + [costly] * count


def test_each_methods_seconds_are_predicted_between_its_trials() -> None:
    points, durations = both(Duration(seconds=2.0), Duration(seconds=20.0))
    at = np.array([[*CHEAP, 0.33], [*COSTLY, 0.77]])
    np.testing.assert_allclose(predicted(points, durations, at), [2.0, 20.0], rtol=0.1)


def test_equal_seconds_are_predicted_exactly_everywhere() -> None:
    points, durations = both(Duration(seconds=3.0), Duration(seconds=3.0))
    fitted = fit_log_seconds(points, durations)
    assert fitted is not None
    mean, _ = fitted.at(np.random.default_rng(0).random((50, 3)))
    assert set(mean) == {np.log(3.0 + OVERHEAD_S)}  # to the last bit, so that no choice changes


def test_one_trial_is_enough_and_none_gives_none() -> None:
    assert predicted(grid(CHEAP, 1), [Duration(seconds=7.0)], grid(COSTLY, 2)) == pytest.approx([7.0, 7.0])
    assert fit_log_seconds(np.empty((0, 3)), []) is None
    assert fit_log_seconds(grid(CHEAP, 2), [Duration(seconds=5.0, is_least=True)] * 2) is None


def test_a_lower_bound_above_the_prediction_counts_and_one_below_does_not() -> None:
    points, durations = grid(CHEAP, 8), [Duration(seconds=4.0 + 0.1 * number) for number in range(8)]
    at = np.array([[*CHEAP, 0.5]])
    alone = predicted(points, durations, at)
    with_bound = np.vstack((points, at))
    below = predicted(with_bound, [*durations, Duration(seconds=0.3, is_least=True)], at)
    above = predicted(with_bound, [*durations, Duration(seconds=40.0, is_least=True)], at)
    np.testing.assert_array_equal(below, alone)
    assert above[0] > 1.5 * alone[0]


def test_seconds_of_another_machine_tell_ratios_and_none_of_its_speed() -> None:
    """It is 5 times as fast; here, only the cheap method was tried so far."""
    there = [replace(one, is_elsewhere=True) for one in (Duration(seconds=0.4), Duration(seconds=4.0))]
    points, durations = both(*there)
    here = grid(CHEAP, 3)
    at = np.array([[*CHEAP, 0.4], [*COSTLY, 0.6]])
    cheap, costly = predicted(np.vstack((points, here)), durations + [Duration(seconds=2.0)] * 3, at)
    assert cheap == pytest.approx(2.0, rel=0.15)
    assert costly == pytest.approx((4.0 + OVERHEAD_S) / (0.4 + OVERHEAD_S) * (2.0 + OVERHEAD_S), rel=0.15)
    cheap, costly = predicted(points, durations, at)  # nothing here: the ratio stands
    assert costly / cheap == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("outcome", "is_least"),
    [
        (builders.outcome("t000", 0.9, 1.5), False),
        (replace(builders.outcome("t000", 0.9, 1.5), same_as="t001"), True),
        (builders.failed("t000", State.FAILED), True),
        (builders.failed("t000", State.INFEASIBLE), True),
        (builders.failed("t000", State.STOPPED), True),
    ],
    ids=["measured", "took over a fine-tune", "failed", "infeasible", "stopped"],
)
def test_a_trial_that_did_not_do_all_took_at_least_its_seconds(outcome: object, is_least: bool) -> None:
    timed = replace(outcome, seconds=3.0)  # type: ignore[type-var]
    assert Duration.of(timed) == Duration(seconds=3.0, is_least=is_least)
    assert Duration.of(timed, is_elsewhere=True) == Duration(seconds=3.0, is_least=is_least, is_elsewhere=True)
