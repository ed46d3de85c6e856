"""The work of a sweep under Ray Tune, and what the driver does at the end of each piece.

There is one actor for each slot of the cluster, which does trials and jobs one after the other (a fresh one costs 8 s
of imports). The dense model and the images lie in the object store once, and every actor takes them from there.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler

from pruning.artifact import Weights
from pruning.errors import VitfrontError
from search.cluster.exchange import Exchange
from search.cluster.scheduler import RungScheduler
from search.cluster.searcher import Agenda, RaySearcher, outcomes_of
from search.cluster.session import TrialResources, cluster_resources
from search.cluster.stores import SharedStore, Store
from search.cluster.worker import SetUp, StartTrial, TrialActor, WorkerSettings
from search.config import Config
from search.errors import SweepError
from search.outcome import Candidate, Measurement, Outcome, State
from search.records.checkpoints import Checkpoint
from search.trial.inputs import Inputs
from search.trial.jobs import DENSE, LOOK, NeedFailedError, Workplace
from search.trial.trial import start_trial


@dataclass(frozen=True, kw_only=True)
class Work:
    """All that the workers share, beside the candidates and the jobs."""

    config: Config
    inputs: Inputs
    products: Mapping[str, Any] = field(default_factory=dict)
    """Products of jobs that need not be done, by id."""
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """States of the trials that an earlier run did not end, by id."""
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    """Measurements that need not be repeated; see `search.trial.reuse.measured_before`."""
    finetunes: Mapping[str, Outcome] = field(default_factory=dict)
    """Outcomes of fine-tunes that need not be repeated; see `search.trial.reuse.finetuned_before`."""
    start: StartTrial = start_trial
    """Starts a trial."""
    set_up: SetUp = Workplace
    """Sets up a worker's workplace."""


class Driver(Agenda, Protocol):
    """The side of a sweep that decides on the work and keeps what came of it."""

    def epoch(self, checkpoint: Checkpoint, progress: Mapping[str, float]) -> None:
        """Keeps the state of a trial that has trained one more epoch."""

    def trial_ended(self, outcomes: Sequence[Outcome], weights: Mapping[str, Weights]) -> None:
        """Keeps the outcomes of a trial that has ended or was stopped."""

    def job_ended(self, job_id: str, product: Any) -> None:
        """Takes the product of a job."""

    def promotes(self, rung: int, values: tuple[float, float]) -> bool:
        """Tells whether a trial goes on from a rung."""

    def give_up(self) -> None:
        """Hands out no more work."""


def run_work(
    work: Work, driver: Driver, resources: TrialResources, num_trials: int, *, num_ahead: int = 1
) -> float:  # fmt: skip
    """Runs jobs and trials until the driver has no more.

    Args:
        driver: called in this process; if it raises, no further work starts.
        resources: of one slot.
        num_trials: number of trials that are to be expected.
        num_ahead: pieces of work that wait for a slot, so that none waits for work; an autoscaler starts so many nodes.

    Returns:
        Seconds of all slots together in which they worked.

    Raises:
        VitfrontError: the driver raised it.
    """
    gc.collect()  # actors of a sweep that was interrupted in this process hold their slots as long as they are known
    exchange: Any = (
        ray.remote(Exchange).options(num_cpus=0).remote(work.products, work.states, work.measurements, work.finetunes)
    )
    bookkeeper = Bookkeeper(
        driver,
        products=SharedStore(exchange, "products"),
        states=SharedStore(exchange, "states"),
        weights=SharedStore(exchange, "weights"),
        finetunes=SharedStore(exchange, "finetunes"),
    )
    num_slots = resources.num_slots(cluster_resources())
    # Else Tune lets one piece wait at a time, and the workers would start one after the other.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(num_slots, num_ahead))
    settings = WorkerSettings(
        config=work.config, inputs_ref=ray.put(work.inputs), exchange=exchange, cpus=resources.cpus,
        num_trials=num_trials, num_workers=num_slots, start=work.start, set_up=work.set_up,
    )  # fmt: skip
    trainable = tune.with_parameters(TrialActor, settings=settings)
    scheduler: TrialScheduler = RungScheduler(driver.promotes)
    # Tune keeps what it would resume by; we resume by the ledger.
    with tempfile.TemporaryDirectory(prefix="vitfront.", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"CPU": resources.cpus, "GPU": resources.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=RaySearcher(
                    driver,
                    SharedStore(exchange, "jobs"),
                    room=lambda: resources.num_slots(cluster_resources()) + num_ahead,
                ),
                scheduler=scheduler,
                num_samples=-1,  # until the searcher has no more
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
        try:
            tuner.fit()
        finally:
            ray.kill(exchange)  # it holds all products, and would live on as long as this process
    if bookkeeper.error is not None:
        raise bookkeeper.error
    return bookkeeper.busy_s


class Bookkeeper(tune.Callback):
    """Tells the driver of every epoch and of the end of all work; a worker that died leaves an outcome too."""

    def __init__(
        self,
        driver: Driver,
        products: Store[Any],
        states: Store[Mapping[str, Any]],
        weights: Store[Mapping[str, Weights]],
        finetunes: Store[Outcome],
    ) -> None:
        """
        Args:
            products: products of jobs by id, as the workers left them.
            states: states of trainings by trial, as the workers left them.
            weights: trained weights by trial, as the workers left them.
            finetunes: outcomes of fine-tunes that no worker need repeat, by key.
        """
        self._driver = driver
        self._products, self._states, self._weights, self._finetunes = products, states, weights, finetunes
        self.error: VitfrontError | None = None
        """Reason why the sweep cannot go on."""
        self.busy_s = 0.0
        """Seconds of all slots together in which they worked."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks to resume by; we resume by the ledger

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Records an epoch; a result with outcomes is none, nor is that of a job."""
        trial_id = trial.config["id"]
        state = self._states.take(trial_id) if "progress" in result else None
        if state is not None:  # else the next epoch's is on its way
            candidate = Candidate.from_json(trial.config["candidate"])
            checkpoint = Checkpoint(id=trial_id, candidate=candidate, state=state)
            self._tell(self._driver.epoch, checkpoint, result["progress"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Records the outcomes of a trial that ended or was stopped, or the product of a job."""
        self.busy_s += trial.last_result.get("busy_s", 0.0)
        if trial.config.get("is_job"):
            if "wait_s" not in trial.config:
                self._end_job(trial.config["id"], self._products.get(trial.config["id"]))
            return
        outcomes = outcomes_of(trial.last_result)
        has_weights = any(outcome.has_weights and outcome.same_as is None for outcome in outcomes)
        weights = (self._weights.take(trial.config["id"]) if has_weights else None) or {}
        self._tell(self._driver.trial_ended, outcomes, weights)
        for key in trial.last_result.get("finetunes", ()):  # only now: its worker may die before the weights are kept
            self._finetunes[key] = outcomes[0]

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Records a trial that broke without an outcome; a job that broke ends the sweep."""
        reason = f"the worker broke: {_last_line_of(Path(trial.error_file))}"
        if trial.config.get("is_job"):
            job_id = trial.config["id"]
            error = SweepError(f"{job_id}: {reason}")
            for product in (job_id, DENSE) if job_id == LOOK else (job_id,):
                self._products[product] = error  # nobody waits for it in vain
            self._end_job(job_id, error)
            return
        failed = Outcome(
            id=trial.config["id"],
            state=State.FAILED,
            candidate=Candidate.from_json(trial.config["candidate"]),
            reason=reason,
        )
        self._tell(self._driver.trial_ended, [failed], {})

    def _end_job(self, job_id: str, product: Any) -> None:
        if isinstance(product, NeedFailedError):  # what has failed is told by itself
            self._driver.give_up()
        elif isinstance(product, VitfrontError):
            self._fail(product)
        else:
            self._tell(self._driver.job_ended, job_id, product)

    def _tell(self, call: Callable[..., None], *args: Any) -> None:
        """Calls the driver, and gives up if it raises."""
        if self.error is not None:  # so that the ledger has no gap: what comes now may fit where the last did not
            return
        try:
            call(*args)
        except VitfrontError as error:  # Tune would log it, take the trial for failed and go on
            self._fail(error)

    def _fail(self, error: VitfrontError) -> None:
        if self.error is None:
            self.error = error
        self._driver.give_up()


def _last_line_of(error_file: Path) -> str:
    lines = error_file.read_text(encoding="utf-8").split("\n") if error_file.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no reason was left behind")
