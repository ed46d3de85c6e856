"""Outcomes as the study of a sampler is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from search.goal import Goal
from search.outcome import Candidate, Outcome, State
from search.suggest.learner import LIMIT_KEEPERS, STOPPED, Learner
from search.suggest.samplers import Sampler, SamplerSettings
from tests.search_tests import builders
from tests.search_tests.suggest.searches import FIRST, SPACE, failed, measured


def learner(goal: Goal | None = None, **settings: Any) -> Learner:
    def candidate_of(values: Mapping[str, Any]) -> Candidate:
        return SPACE.of_values(values)

    return Learner(SPACE, candidate_of, SamplerSettings(**{"sampler": "tpe", "seed": 0} | settings), goal)


def told(outcome: Outcome | None, goal: Goal | None = None, **settings: Any) -> list[FrozenTrial]:
    """The study's trials once it was told the outcome of a draw, and of a candidate that was not drawn."""
    learning = learner(goal, **settings)
    learning.tell(learning.draw(), outcome)
    learning.tell(FIRST[0], outcome)
    learning.close()
    return learning.study.trials


def test_measured_outcome_is_told_with_both_objectives_which_are_maximised() -> None:
    for trial in told(measured("t000", FIRST[0], top1=0.75, speedup=2.5)):
        assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.75, 2.5])
    assert [direction.name for direction in learner().study.directions] == ["MAXIMIZE"] * 2


def test_drawn_trial_keeps_its_draw_and_a_given_one_has_the_values_of_its_candidate() -> None:
    learning = learner()
    draw = learning.draw()
    learning.tell(draw, None)
    learning.tell(FIRST[1], None)
    first, second = learning.study.trials
    assert first.params == draw.params
    assert SPACE.of_values(second.params) == FIRST[1]


@pytest.mark.parametrize("accuracy", ["recall_at_1", "mean_average_precision"])
def test_the_accuracy_of_the_goal_is_told(accuracy: str) -> None:
    outcome = builders.outcome("t000", 0.75, 2.5, **{accuracy: 0.25})
    goal = Goal(dense=builders.measurement(0.9, 1.0, **{accuracy: 0.5}), accuracy=accuracy)
    for trial in told(outcome, goal):
        assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.25, 2.5])


@pytest.mark.parametrize(
    "outcome",
    [
        None,
        failed("t000", FIRST[0], State.FAILED),
        failed("t000", FIRST[0], State.INFEASIBLE),
        failed("t000", FIRST[0], State.STOPPED),
        measured("t000", FIRST[0], top1=float("nan")),
        measured("t000", FIRST[0], speedup=float("inf")),
    ],
    ids=["none", "failed", "infeasible", "stopped without rungs", "nan", "infinite"],
)
def test_outcome_without_two_finite_values_is_told_as_failed(outcome: Outcome | None) -> None:
    assert [trial.state for trial in told(outcome)] == [TrialState.FAIL] * 2


def test_outcome_without_the_accuracy_of_the_goal_is_told_as_failed() -> None:
    goal = Goal(dense=builders.measurement(0.9, 1.0, recall_at_1=0.5), accuracy="recall_at_1")
    assert [trial.state for trial in told(measured("t000", FIRST[0]), goal)] == [TrialState.FAIL] * 2


def test_limits_are_told_as_constraints() -> None:
    goal = Goal.of(builders.DENSE, "top1", ["speedup >= 2", "top1 >= dense - 0.1"])
    for trial in told(measured("t000", FIRST[0], top1=0.9, speedup=1.5), goal):
        assert trial.constraints["speedup >= 2"] == pytest.approx(0.5)
        assert trial.constraints["top1 >= dense - 0.1"] == pytest.approx(-0.1 / 0.9)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "gp"])
def test_what_was_stopped_at_a_rung_is_no_final_value(sampler: Sampler) -> None:
    learning = learner(sampler=sampler, has_rungs=True)
    learning.tell(FIRST[0], measured("t000", FIRST[0]))
    stopped = replace(failed("t001", FIRST[1], State.STOPPED), rungs=((0.5, 1.1), (0.6, 1.2)))
    for draw in (FIRST[1], learning.draw()):
        learning.tell(draw, stopped)
    learning.close()
    first, *stopped_trials = learning.study.trials
    keeps_limits = sampler in LIMIT_KEEPERS
    assert keeps_limits is (sampler in ("tpe", "nsga2"))
    assert (first.state, first.constraints) == (TrialState.COMPLETE, {STOPPED: 0.0} if keeps_limits else {})
    for trial in stopped_trials:
        if keeps_limits:  # beyond a limit: of use, but not compared with the others
            assert trial.state is TrialState.COMPLETE
            assert (trial.values, trial.constraints) == ([0.6, 1.2], {STOPPED: 1.0})
            assert [best.number for best in learning.study.best_trials] == [0]
        else:
            assert trial.state is TrialState.FAIL


def test_uniform_candidates_are_of_the_whole_space() -> None:
    learning = learner()
    candidates = [learning.sample_uniform() for _ in range(30)]
    learning.close()
    assert all(SPACE.holds(candidate) for candidate in candidates)
    assert len(set(candidates)) == 30
    assert {candidate.exit_block for candidate in candidates} == {2, 3}
