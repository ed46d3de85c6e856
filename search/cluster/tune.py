"""The trials of a sweep under Ray Tune, and what the driver does at the end of each.

There is one actor for each slot of the cluster, reused from trial to trial (a fresh one costs 8 s of imports). The
dense model and the images lie in the object store once, and every actor takes them from there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler

from pruning.artifact import Weights
from pruning.errors import VitfrontError
from search.cluster.exchange import Exchange
from search.cluster.searcher import RaySearcher, outcomes_of
from search.cluster.session import TrialResources, cluster_resources
from search.cluster.stores import SharedStore, Store
from search.cluster.worker import StartTrial, TrialActor, WorkerSettings
from search.outcome import Candidate, Measurement, Outcome, State
from search.records.checkpoints import Checkpoint
from search.records.recorder import Recorder
from search.trial.trial import start_trial


@dataclass(frozen=True, kw_only=True)
class TrialWork:
    """The work that the workers share, beside the candidates."""

    context_ref: Any
    """Ray's reference to the context."""
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """States of the trials that an earlier run did not end, by id."""
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    """Measurements that need not be repeated; see `search.trial.reuse.measured_before`."""
    finetunes: Mapping[str, Outcome] = field(default_factory=dict)
    """Outcomes of fine-tunes that need not be repeated; see `search.trial.reuse.finetuned_before`."""
    start: StartTrial = start_trial
    """Starts a trial."""


def run_trials(
    work: TrialWork, searcher: RaySearcher, scheduler: TrialScheduler, recorder: Recorder, resources: TrialResources,
    num_trials: int,
) -> None:  # fmt: skip
    """Runs trials until there are so many, or until the searcher has no more to suggest.

    Args:
        scheduler: stops trials at their rungs.
        recorder: called in the driver; if it raises, no further trial starts.
        resources: of one trial.

    Raises:
        VitfrontError: the recorder raised it.
    """
    exchange: Any = ray.remote(Exchange).options(num_cpus=0).remote(work.states, work.measurements, work.finetunes)
    bookkeeper = Bookkeeper(
        recorder,
        states=SharedStore(exchange, "states"),
        weights=SharedStore(exchange, "weights"),
        finetunes=SharedStore(exchange, "finetunes"),
        give_up=searcher.close,
    )
    settings = WorkerSettings(
        context_ref=work.context_ref, exchange=exchange, cpus=resources.cpus, num_trials=num_trials,
        num_workers=min(num_trials, resources.num_slots(cluster_resources())), start=work.start,
    )  # fmt: skip
    trainable = tune.with_parameters(TrialActor, settings=settings)
    # Tune keeps what it would resume by; we resume by the ledger.
    with tempfile.TemporaryDirectory(prefix="vitfront.", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"CPU": resources.cpus, "GPU": resources.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=num_trials,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["id"],
                trial_dirname_creator=lambda trial: trial.config["id"],
            ),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=scratch,
                callbacks=[bookkeeper],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
        tuner.fit()
    if bookkeeper.error is not None:
        raise bookkeeper.error


class Bookkeeper(tune.Callback):
    """Tells the recorder of every epoch and of the end of every trial; a worker that died leaves an outcome too."""

    def __init__(
        self,
        recorder: Recorder,
        states: Store[Mapping[str, Any]],
        weights: Store[Mapping[str, Weights]],
        finetunes: Store[Outcome],
        give_up: Callable[[], None],
    ) -> None:
        """
        Args:
            states: states of trainings by trial, as the workers left them.
            weights: trained weights by trial, as the workers left them.
            finetunes: outcomes of fine-tunes that no worker need repeat, by key.
            give_up: called when no further trial should start.
        """
        self._recorder, self._give_up = recorder, give_up
        self._states, self._weights, self._finetunes = states, weights, finetunes
        self.error: VitfrontError | None = None
        """Reason why an outcome could not be recorded."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks to resume by; we resume by the ledger

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Records an epoch; a result with outcomes is none."""
        trial_id = trial.config["id"]
        state = None if "outcomes" in result else self._states.take(trial_id)
        if state is not None:  # else the next epoch's is on its way
            candidate = Candidate.from_json(trial.config["candidate"])
            checkpoint = Checkpoint(id=trial_id, candidate=candidate, state=state)
            self._record(self._recorder.epoch, checkpoint, result["progress"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Records the outcomes of a trial that ended or was stopped."""
        outcomes = outcomes_of(trial.last_result)
        has_weights = any(outcome.has_weights and outcome.same_as is None for outcome in outcomes)
        weights = (self._weights.take(trial.config["id"]) if has_weights else None) or {}
        self._record(self._recorder.ended, outcomes, weights)
        for key in trial.last_result.get("finetunes", ()):  # only now: its worker may die before the weights are kept
            self._finetunes[key] = outcomes[0]

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Records a trial that broke without an outcome."""
        failed = Outcome(
            id=trial.config["id"],
            state=State.FAILED,
            candidate=Candidate.from_json(trial.config["candidate"]),
            reason=f"the worker broke: {_last_line_of(Path(trial.error_file))}",
        )
        self._record(self._recorder.ended, [failed], {})

    def _record(self, call: Callable[..., None], *args: Any) -> None:
        """Calls the recorder, and gives up if it raises or the search is saturated."""
        if self.error is not None:  # so that the ledger has no gap: what comes now may fit where the last did not
            return
        try:
            call(*args)
        except VitfrontError as error:  # Tune would log it, take the trial for failed and go on
            self.error = error
            self._give_up()
        if self._recorder.is_saturated():
            self._give_up()


def _last_line_of(error_file: Path) -> str:
    lines = error_file.read_text(encoding="utf-8").split("\n") if error_file.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no reason was left behind")
