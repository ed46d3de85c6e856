"""The observer of a sweep: what a sweep tells while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from search.outcome import Candidate, Outcome


class Observer(Protocol):
    """Watches a sweep; the command line's progress line is one."""

    def stage(self, text: str) -> None:
        """Notes that a stage starts which takes a while."""

    def note(self, text: str) -> None:
        """Notes a line that the user is to keep."""

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None:
        """Notes that the trials start.

        Args:
            num_done: trials done by an earlier run.
            num_trials: trials in all, those done included.
            deadline: time on the monotonic clock after which no trial starts; None for no such time.
        """

    def prepared(self, seconds: float) -> None:
        """Notes that all that trials need was measured, so many seconds after the command began."""

    def started(self, trial_id: str, candidate: Candidate) -> None:
        """Notes that a trial starts."""

    def epoch(self, trial_id: str, progress: Mapping[str, float]) -> None:
        """Notes that a trial has trained one more epoch.

        Args:
            progress: `epoch` first, then figures such as `loss`.
        """

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        """Notes an outcome of a trial that ended, and the hypervolume of all outcomes so far."""

    def interrupted(self) -> None:
        """Notes that no further trial starts, while those that run are finished."""
