"""The work of a sweep as a Ray `Searcher`: asked when Ray has room for a piece of it, told when one has ended.

Ray's own OptunaSearch leaves failed and NaN trials running for ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from ray.tune.search import Searcher

from search.cluster.stores import Store
from search.outcome import Outcome
from search.suggest.ask import Suggestion
from search.trial.jobs import Job

WAIT_S = (0.25, 2.0)
"""Seconds after which a worker that found nothing to do asks again, at first and at most."""


class Agenda(Protocol):
    """Decides on the next piece of work."""

    def next(self) -> Job | tuple[Suggestion, tuple[str, ...]] | None:
        """Returns a job, or a trial with the ids of the products that it needs; None if there is nothing now."""

    @property
    def is_done(self) -> bool:
        """True if nothing is left to hand out."""

    def told(self, trial_id: str, outcome: Outcome | None) -> None:
        """Takes the own outcome of a trial; None if it left none."""


class RaySearcher(Searcher):
    """Hands the work of a sweep to Ray; Ray's names of trials are mapped to ours."""

    def __init__(self, agenda: Agenda, jobs: Store[Job], room: Callable[[], int]) -> None:
        """
        Args:
            jobs: jobs by id, from which their workers take them.
            room: gives the number of pieces of work that may be under way at once, those that wait for a slot included.
        """
        super().__init__()
        self._agenda, self._jobs, self._room = agenda, jobs, room
        self._trials: dict[str, str] = {}
        self._under_way: set[str] = set()
        self._num_waits = 0
        self._wait_s = WAIT_S[0]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a str
        """Returns the next piece of work as Ray's config of a trial, or `FINISHED` if there is none."""
        if len(self._under_way) >= self._room():
            return None
        work = self._agenda.next()
        if work is None and self._agenda.is_done:
            finished: str = Searcher.FINISHED
            return finished
        self._under_way.add(trial_id)
        if work is None:
            return self._wait()
        self._wait_s = WAIT_S[0]
        if isinstance(work, Job):
            self._jobs[work.id] = work
            return {"id": work.id, "is_job": True}
        suggestion, needs = work
        self._trials[trial_id] = suggestion.id
        return asdict(suggestion) | {"needs": list(needs)}

    def _wait(self) -> dict[str, Any]:
        """Returns the order to wait for a moment: Tune ends an actor that it has nothing for, and another costs 6 s."""
        self._num_waits += 1
        order = {"id": f"wait-{self._num_waits}", "is_job": True, "wait_s": self._wait_s}
        self._wait_s = min(2 * self._wait_s, WAIT_S[1])
        return order

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the agenda a trial's own outcome; a result without outcomes, or an error, is none."""
        self._under_way.discard(trial_id)
        if trial_id in self._trials:
            outcomes = [] if error else outcomes_of(result or {})
            self._agenda.told(self._trials.pop(trial_id), next(iter(outcomes), None))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its searcher to resume by; we resume by the ledger

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the ledger holds all that a resumed sweep needs."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: the ledger holds all that a resumed sweep needs."""


def outcomes_of(result: Mapping[str, Any]) -> list[Outcome]:
    """Returns the outcomes in a worker's result, the trial's own first; none if the trial goes on without any."""
    return [Outcome.from_json(record) for record in json.loads(result.get("outcomes", "[]"))]
