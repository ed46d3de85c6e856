"""What comes of the trials, kept by the driver: weights, ledger, MLflow; and who watches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from pruning.artifact import Weights, save_weights
from search.config import SearchConfig
from search.front import GrowingFront, contenders
from search.goal import Goal
from search.outcome import Candidate, Outcome, State
from search.records.checkpoints import Checkpoint, Checkpoints
from search.records.ending import is_saturated
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.records.tracking import Tracker


class Observer(Protocol):
    """Who watches a sweep; the command line's progress line is one."""

    def stage(self, text: str) -> None:
        """Something starts that takes a while."""

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None:
        """The trials start; `num_done` of them were done by an earlier run; `deadline` on the monotonic clock."""

    def started(self, trial_id: str, candidate: Candidate) -> None:
        """A trial starts."""

    def epoch(self, trial_id: str, progress: Mapping[str, float]) -> None:
        """A trial has trained one more epoch."""

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        """An outcome of a trial that ended; the hypervolume of all of them so far."""

    def interrupted(self) -> None:
        """No further trial starts; those that run are finished."""


class Recorder:
    """Keeps what comes of the trials: weights, then the ledger; only then MLflow and the observer hear of it."""

    def __init__(
        self, search: SearchConfig, goal: Goal, folder: Folder, book: Ledger, tracker: Tracker, observer: Observer
    ) -> None:
        """
        Args:
            search: settings of the search; the patience counts here.
            book: with the outcomes of earlier runs.
        """
        self._search, self._goal, self._folder, self._book = search, goal, folder, book
        self._tracker, self._observer = tracker, observer
        self.checkpoints = Checkpoints(folder.checkpoints)
        self.outcomes = list(book.found)
        """All of the sweep."""
        self._front = GrowingFront(goal)
        volumes = [self._front.add(outcome) for outcome in self.outcomes]
        self._trial_volumes = [v for each, v in zip(self.outcomes, volumes, strict=True) if _is_measured_trial(each)]
        self._contenders = contenders(goal.acceptable(self.outcomes), goal.accuracy)
        self._start = time.monotonic() - max((outcome.ended_s for outcome in self.outcomes), default=0.0)
        self._writing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._written: list[Future[None]] = []
        tracker.sync(self.outcomes, volumes)

    def is_saturated(self) -> bool:
        """Whether the last trials found too little for more to be worth their time."""
        return is_saturated(self._trial_volumes, self._search.patience, self._search.min_gain)

    def epoch(self, checkpoint: Checkpoint, progress: Mapping[str, float]) -> None:
        """A trial has trained one more epoch."""
        self.checkpoints.write(checkpoint)
        self._observer.epoch(checkpoint.id, progress)

    def ended(self, outcomes: Sequence[Outcome], weights: Mapping[str, Weights]) -> None:
        """A trial has ended: what came of it, and the weights that do not follow from a plan, by the outcomes' ids."""
        for name, each in weights.items():
            save_weights(each, self._folder.weights_of(name))
        outcomes = [replace(outcome, ended_s=time.monotonic() - self._start) for outcome in outcomes]
        self._book.append(*outcomes)
        self.checkpoints.remove(outcomes[0].trial)
        for outcome in outcomes:
            self.outcomes.append(outcome)
            volume = self._front.add(outcome)
            self._trial_volumes += [volume] if _is_measured_trial(outcome) else []
            # In a thread: a tenth of a second and more, in which the worker would wait for its next trial.
            self._written.append(self._writing.submit(self._tracker.log, outcome, volume, len(self.outcomes)))
            self._observer.finished(outcome, volume)
        self._remove_beaten_weights(outcomes)

    def close(self) -> None:
        """Waits for MLflow."""
        self._writing.shutdown()
        for each in self._written:
            each.result()

    def _remove_beaten_weights(self, new: Sequence[Outcome]) -> None:
        """Who is beaten beyond the noise stays so: nobody will ask for its weights."""
        kept = [*self._contenders, *self._goal.acceptable(new)]
        self._contenders = contenders(kept, self._goal.accuracy)
        asked_for = {outcome.weights_id for outcome in self._contenders}
        for path in self._folder.weights.glob("*.safetensors"):
            if path.stem not in asked_for:
                path.unlink()


def _is_measured_trial(outcome: Outcome) -> bool:
    """Whether it is a trial that was measured, not what a trial gave beside."""
    return outcome.state is State.MEASURED and outcome.id == outcome.trial
