"""The search as a Ray `Searcher`: asked when Ray has room for a trial, told when one has ended.

Ray's own OptunaSearch leaves failed and NaN trials running for ever.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ray.tune.search import Searcher

from search.outcome import Candidate, Outcome
from search.suggest.ask import CandidateSearch


class RaySearcher(Searcher):
    """Hands a search's suggestions to Ray until a deadline; Ray's names of trials are mapped to ours."""

    def __init__(
        self,
        search: CandidateSearch,
        deadline: float | None = None,
        on_suggest: Callable[[str, Candidate], None] = lambda trial_id, candidate: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            deadline: no trial is suggested from this time on, by the clock.
            on_suggest: called with the id and candidate of every trial that is about to start.
        """
        super().__init__()
        self._search, self._on_suggest, self._clock = search, on_suggest, clock
        self._deadline = math.inf if deadline is None else deadline
        self._ids: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Ray's FINISHED is a str
        """Returns the next `Suggestion` as Ray's config of a trial, or `FINISHED` if there is none."""
        suggestion = self._search.ask() if self._clock() < self._deadline else None
        if suggestion is None:
            finished: str = Searcher.FINISHED
            return finished
        self._ids[trial_id] = suggestion.id
        self._on_suggest(suggestion.id, suggestion.candidate)
        return asdict(suggestion)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the search the trial's own outcome; a result without outcomes, or an error, is none."""
        outcomes = [] if error else outcomes_of(result or {})
        self._search.tell(self._ids.pop(trial_id), next(iter(outcomes), None))

    def stop(self) -> None:
        """Suggests no trial from now on; a signal handler may call it."""
        self._deadline = -math.inf

    def close(self) -> None:
        """Suggests no trial from now on, nor makes one ready."""
        self.stop()
        self._search.close()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its searcher to resume by; we resume by the ledger

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the ledger holds all that a resumed sweep needs."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: the ledger holds all that a resumed sweep needs."""


def outcomes_of(result: Mapping[str, Any]) -> list[Outcome]:
    """Returns the outcomes in a worker's result, the trial's own first; none if the trial goes on without any."""
    return [Outcome.from_json(record) for record in json.loads(result.get("outcomes", "[]"))]
