"""The search as Ray calls it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from optuna.trial import TrialState
from ray import cloudpickle
from ray.tune.search import Searcher

from search.cluster.searcher import RaySearcher, outcomes_of
from search.outcome import Candidate, Outcome
from tests.search_tests import builders
from tests.search_tests.suggest.searches import FIRST, measured, new_search


def result_of(*outcomes: Outcome) -> dict[str, Any]:
    return {"outcomes": json.dumps([outcome.to_json() for outcome in outcomes])}


def test_ray_gets_the_suggestions_as_what_json_knows_and_tells_their_outcomes_by_its_own_names() -> None:
    search = new_search()
    searcher = RaySearcher(search)
    configs = [searcher.suggest(f"ray-{number}") for number in range(3)]
    assert json.loads(json.dumps(configs)) == [
        {"id": f"t{number:03d}", "candidate": config["candidate"], "is_resumed": False, "has_rungs": False}
        for number, config in enumerate(json.loads(json.dumps(configs)))
    ]
    candidates = [Candidate.from_json(json.loads(json.dumps(config))["candidate"]) for config in configs]
    assert candidates == FIRST[:3]
    for number in (2, 0):
        own = measured(f"t{number:03d}", FIRST[number], top1=number / 10)
        at_exit = builders.outcome(f"t{number:03d}.2", 0.99, 1.5)
        searcher.on_trial_complete(f"ray-{number}", result_of(own, at_exit))
    assert [trial.values[0] for trial in search.learner.study.trials] == [0.2, 0.0]


@pytest.mark.parametrize(
    ("result", "error"),
    [(None, True), (None, False), ({}, False), (result_of(builders.outcome("t000", 0.9, 1.5)), True)],
    ids=["no result and error", "no result", "no outcomes", "error"],
)
def test_trial_whose_worker_broke_is_told_as_failed(result: dict[str, Any] | None, error: bool) -> None:
    search = new_search()
    searcher = RaySearcher(search)
    searcher.suggest("ray-0")
    searcher.on_trial_complete("ray-0", result, error)
    assert [trial.state for trial in search.learner.study.trials] == [TrialState.FAIL]


def test_who_watches_is_told_of_every_suggestion() -> None:
    told: list[tuple[str, Candidate]] = []
    searcher = RaySearcher(new_search(), on_suggest=lambda trial_id, candidate: told.append((trial_id, candidate)))
    for number in range(3):
        searcher.suggest(f"ray-{number}")
    assert told == [(f"t{number:03d}", FIRST[number]) for number in range(3)]


def test_from_the_deadline_on_nothing_is_suggested() -> None:
    told, now = list[str](), [99.9]
    searcher = RaySearcher(
        new_search(), deadline=100.0, on_suggest=lambda trial_id, candidate: told.append(trial_id), clock=lambda: now[0]
    )
    assert searcher.suggest("ray-0") != Searcher.FINISHED
    now[0] = 100.0
    assert searcher.suggest("ray-1") == Searcher.FINISHED
    assert told == ["t000"]


def test_search_without_a_suggestion_is_finished() -> None:
    search = new_search(sampler="grid", first_candidates=FIRST[:1], num_trials=0)
    searcher = RaySearcher(search)
    searcher.suggest("ray-0")
    assert searcher.suggest("ray-1") == Searcher.FINISHED


@pytest.mark.parametrize("end", [RaySearcher.stop, RaySearcher.close])
def test_once_stopped_nothing_is_suggested_but_what_runs_is_told(end: Any) -> None:
    search = new_search()
    searcher = RaySearcher(search)
    searcher.suggest("ray-0")
    end(searcher)
    assert searcher.suggest("ray-1") == Searcher.FINISHED
    searcher.on_trial_complete("ray-0", result_of(measured("t000", FIRST[0])))
    assert [trial.state for trial in search.learner.study.trials] == [TrialState.COMPLETE]


def test_tune_may_pickle_it() -> None:
    """Tune saves its searcher to resume by."""
    searcher = RaySearcher(new_search(), on_suggest=lambda trial_id, candidate: None)
    assert isinstance(cloudpickle.loads(cloudpickle.dumps(searcher)), RaySearcher)


def test_outcomes_come_back_as_they_were_sent() -> None:
    outcomes = [builders.outcome("t000", 0.9, 1.5), builders.failed("t001")]
    assert outcomes_of(result_of(*outcomes)) == outcomes
    assert outcomes_of({"progress": {}}) == []
