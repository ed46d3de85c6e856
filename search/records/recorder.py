"""The driver's record of a sweep's trials: weights and ledger first, then MLflow and the observer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from pruning.artifact import Weights, save_weights
from search.config import SearchConfig
from search.front import GrowingFront, contenders
from search.goal import Goal
from search.observer import Observer
from search.outcome import Outcome, State
from search.records.checkpoints import Checkpoint, Checkpoints
from search.records.folder import Folder
from search.records.ledger import Ledger


class OutcomeLog(Protocol):
    """Shows outcomes elsewhere, as `search.records.tracking.Tracker` does in MLflow."""

    def sync(self, outcomes: Sequence[Outcome], hypervolumes: Sequence[float]) -> None:
        """Writes those of all outcomes that the log lacks."""

    def log(self, outcome: Outcome, hypervolume: float, number: int) -> None:
        """Writes one outcome, the `number`-th of the sweep."""


class Recorder:
    """Keeps the outcomes of trials: the ledger has them before MLflow and the observer hear of them."""

    def __init__(
        self, search: SearchConfig, goal: Goal, folder: Folder, book: Ledger, tracker: OutcomeLog, observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Reads the outcomes of earlier runs from the ledger, and brings the tracker up to date with them.

        Args:
            search: settings of the search; patience and least gain decide when it is saturated.
            folder: where weights and checkpoints are kept.
            clock: gives seconds from any start.
        """
        self._search, self._goal, self._folder, self._book = search, goal, folder, book
        self._tracker, self._observer, self._clock = tracker, observer, clock
        self.checkpoints = Checkpoints(folder.checkpoints)
        self.outcomes = list(book.found)
        """All outcomes of the sweep, those of earlier runs first."""
        self._front = GrowingFront(goal)
        volumes = [self._front.add(outcome) for outcome in self.outcomes]
        self._trial_volumes = [
            volume for outcome, volume in zip(self.outcomes, volumes, strict=True) if _is_measured_trial(outcome)
        ]
        self._contenders = contenders(goal.acceptable(self.outcomes), goal)
        self._start = clock() - max((outcome.ended_s for outcome in self.outcomes), default=0.0)
        self._writing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._written: list[Future[None]] = []
        self._written.append(self._writing.submit(tracker.sync, list(self.outcomes), volumes))

    def is_saturated(self) -> bool:
        """Tells whether the last trials gained too little for more trials to be worth their time."""
        return is_saturated(self._trial_volumes, self._search.patience, self._search.min_gain)

    def epoch(self, checkpoint: Checkpoint, progress: Mapping[str, float]) -> None:
        """Keeps the checkpoint of a trial that has trained one more epoch."""
        self.checkpoints.write(checkpoint)
        self._observer.epoch(checkpoint.id, progress)

    def ended(self, outcomes: Sequence[Outcome], weights: Mapping[str, Weights]) -> None:
        """Keeps the outcomes of a trial that has ended.

        Args:
            outcomes: all outcomes of one trial.
            weights: outcome id -> weights that do not follow from its plan, since they were trained.

        Raises:
            Exception: whatever the tracker raised for an earlier outcome.
        """
        self.check()
        for outcome_id, trained in weights.items():
            save_weights(trained, self._folder.weights_of(outcome_id))
        outcomes = [replace(outcome, ended_s=self._clock() - self._start) for outcome in outcomes]
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

    def check(self) -> None:
        """Raises what the tracker raised so far."""
        for written in self._written:
            if written.done():
                written.result()
        self._written = [written for written in self._written if not written.done()]

    def close(self) -> None:
        """Waits until the tracker has all outcomes.

        Raises:
            Exception: whatever the tracker raised.
        """
        self._writing.shutdown()
        for written in self._written:
            written.result()

    def _remove_beaten_weights(self, new: Sequence[Outcome]) -> None:
        """Removes weights of models beaten beyond the noise: they stay beaten, so nobody will ask for them."""
        self._contenders = contenders([*self._contenders, *self._goal.acceptable(new)], self._goal)
        kept = {outcome.weights_id for outcome in self._contenders}
        for path in self._folder.weights.glob("*.safetensors"):
            if path.stem not in kept:
                path.unlink()


def is_saturated(hypervolumes: Sequence[float], patience: int, min_gain: float) -> bool:
    """Tells whether the last trials gained too little hypervolume.

    Args:
        hypervolumes: hypervolume after each measured trial.
        patience: number of trials that count as the last ones; with 0 a search is never saturated.
        min_gain: share of the hypervolume below which the gain of the last trials is too little.
    """
    if not 0 < patience < len(hypervolumes):
        return False
    return hypervolumes[-1] - hypervolumes[-1 - patience] < min_gain * hypervolumes[-1]


def _is_measured_trial(outcome: Outcome) -> bool:
    """Tells whether an outcome is a trial that was measured, not one of its earlier exits."""
    return outcome.state is State.MEASURED and outcome.id == outcome.trial
