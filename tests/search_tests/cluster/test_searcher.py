"""The work of a sweep as Ray asks for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ray import cloudpickle
from ray.tune.search import Searcher

from search.cluster.searcher import RaySearcher, outcomes_of
from search.outcome import Candidate, Outcome
from search.suggest.ask import Suggestion
from search.trial.jobs import Job
from tests.search_tests import builders
from tests.search_tests.cluster.stores import DictStore

JOB = Job(id="profile-lfe", kind="step", needs=("dense",), subject=object())  # nothing that JSON knows
CANDIDATES = [builders.candidate(target_ratio=0.5 + number / 10) for number in range(3)]
NEEDS = ("look", "sensitivity-3")


def trial(number: int) -> tuple[Suggestion, tuple[str, ...]]:
    suggestion = Suggestion(
        id=f"t{number:03d}", candidate=CANDIDATES[number], is_resumed=number == 1, has_rungs=number == 2
    )
    return suggestion, NEEDS


class FakeAgenda:
    """Hands out what it was given, and remembers what it is told."""

    def __init__(self, *work: Any) -> None:
        self.work = list(work)
        self.is_done = False
        self.tellings: list[tuple[str, Outcome | None]] = []

    def next(self) -> Any:
        return self.work.pop(0) if self.work else None

    def told(self, trial_id: str, outcome: Outcome | None) -> None:
        self.tellings.append((trial_id, outcome))


def room() -> int:
    return 10


def result_of(*outcomes: Outcome) -> dict[str, Any]:
    return {"outcomes": json.dumps([outcome.to_json() for outcome in outcomes])}


def test_ray_gets_trials_as_what_json_knows_and_their_outcomes_are_told_by_our_names() -> None:
    agenda = FakeAgenda(*map(trial, range(3)))
    searcher = RaySearcher(agenda, DictStore(), room)
    configs: Any = [json.loads(json.dumps(searcher.suggest(f"ray-{number}"))) for number in range(3)]
    assert [Candidate.from_json(config.pop("candidate")) for config in configs] == CANDIDATES
    assert configs == [
        {"id": f"t{number:03d}", "is_resumed": number == 1, "has_rungs": number == 2, "needs": list(NEEDS)}
        for number in range(3)
    ]
    for number in (2, 0):
        own = builders.outcome(f"t{number:03d}", 0.9, 1.5)
        at_exit = builders.outcome(f"t{number:03d}.2", 0.99, 1.5)
        searcher.on_trial_complete(f"ray-{number}", result_of(own, at_exit))
        assert agenda.tellings[-1] == (f"t{number:03d}", own)
    assert len(agenda.tellings) == 2


def test_ray_gets_the_id_of_a_job_and_its_worker_finds_the_rest_in_the_store() -> None:
    jobs, agenda = DictStore(), FakeAgenda(JOB)
    searcher = RaySearcher(agenda, jobs, room)
    config: Any = searcher.suggest("ray-0")
    assert json.loads(json.dumps(config)) == {"id": "profile-lfe", "is_job": True}
    assert jobs.take(config["id"]) is JOB
    searcher.on_trial_complete("ray-0", {"done": True})
    searcher.on_trial_complete("ray-0", None, True)
    assert agenda.tellings == []  # the search has never heard of it


@pytest.mark.parametrize(
    ("result", "error"),
    [(None, True), (None, False), ({}, False), (result_of(builders.outcome("t000", 0.9, 1.5)), True)],
    ids=["no result and error", "no result", "no outcomes", "error"],
)
def test_trial_whose_worker_broke_is_told_as_one_without_an_outcome(result: dict[str, Any] | None, error: bool) -> None:
    agenda = FakeAgenda(trial(0))
    searcher = RaySearcher(agenda, DictStore(), room)
    searcher.suggest("ray-0")
    searcher.on_trial_complete("ray-0", result, error)
    assert agenda.tellings == [("t000", None)]


def test_where_there_is_no_work_now_a_worker_waits_a_little_longer_each_time_until_there_is_some() -> None:
    agenda = FakeAgenda()
    searcher = RaySearcher(agenda, DictStore(), room)
    waits: list[Any] = [searcher.suggest(f"ray-{number}") for number in range(5)]
    assert [wait["wait_s"] for wait in waits] == [0.25, 0.5, 1.0, 2.0, 2.0]
    assert len({wait["id"] for wait in waits}) == 5
    assert all(wait["is_job"] for wait in waits)
    agenda.work.append(JOB)
    assert searcher.suggest("ray-5") == {"id": JOB.id, "is_job": True}
    after: Any = searcher.suggest("ray-6")
    assert after["wait_s"] == 0.25
    agenda.is_done = True
    assert searcher.suggest("ray-7") == Searcher.FINISHED
    searcher.on_trial_complete("ray-0", {"done": True})
    assert agenda.tellings == []  # the search has never heard of it


def test_no_more_work_is_under_way_than_there_is_room_for() -> None:
    agenda = FakeAgenda(*map(trial, range(3)))
    searcher = RaySearcher(agenda, DictStore(), lambda: 2)
    assert [isinstance(searcher.suggest(f"ray-{number}"), dict) for number in range(3)] == [True, True, False]
    assert len(agenda.work) == 1  # it was not asked
    searcher.on_trial_complete("ray-0", {}, True)
    assert isinstance(searcher.suggest("ray-2"), dict)
    assert searcher.suggest("ray-3") is None


def test_tune_may_pickle_it() -> None:
    """Tune saves its searcher to resume by."""
    agenda: Any = FakeAgenda(lambda: None)
    agenda.lock = (each for each in ())  # a thing that cannot be pickled
    assert isinstance(cloudpickle.loads(cloudpickle.dumps(RaySearcher(agenda, DictStore(), room))), RaySearcher)


def test_outcomes_come_back_as_they_were_sent() -> None:
    outcomes = [builders.outcome("t000", 0.9, 1.5), builders.failed("t001")]
    assert outcomes_of(result_of(*outcomes)) == outcomes
    assert outcomes_of({"progress": {}}) == []
