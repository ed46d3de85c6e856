"""Ray as a sweep uses it: started or joined, what a trial takes of it, tasks, and the trials under Ray Tune.

Workers: one actor for each slot of the cluster, reused from trial to trial (a fresh one costs 8 s of imports). The
dense model and the images lie in the object store once, and every actor takes them from there. What a worker makes that
is too large for Tune's results, trained weights and the states of trainings, it leaves in the exchange, from which the
driver takes it: nodes need no shared disk.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # read at import: no CSV and JSON file a trial
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables are printed whatever `verbose` says
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it takes Ctrl-C for the end of the trials
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")  # all trials so far, every ten seconds; see run_trials
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune
from ray.exceptions import RayError, RaySystemError, RayTaskError

from pruning.errors import VitfrontError
from search.cluster.exchange import Exchange
from search.cluster.scheduler import NonDominatedHalving
from search.cluster.searcher import StudySearcher
from search.cluster.worker import StartTrial, TrialActor, run_task
from search.config import Config
from search.errors import ConfigError, SweepError
from search.outcome import Candidate, Measurement, Outcome, State
from search.records.checkpoints import Checkpoint
from search.records.recorder import Recorder
from search.trial.trial import start_trial


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    """What a task or a trial takes of the cluster."""

    cpus: int
    """Cores, and torch threads."""
    gpus: float


class _Bookkeeper(tune.Callback):
    """Turns the end of every trial into an outcome; a worker that died leaves one too."""

    def __init__(self, recorder: Recorder, exchange: Any, give_up: Callable[[], None]) -> None:
        self._recorder, self._exchange, self._give_up = recorder, exchange, give_up
        self.error: VitfrontError | None = None
        """Why an outcome could not be recorded."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks to resume by; we resume by the ledger

    def _tell(self, call: Callable[..., None], *args: Any) -> None:
        if self.error is not None:  # so that the ledger has no gap: what comes now may fit where the last did not
            return
        try:
            call(*args)
        except VitfrontError as error:  # Tune would log it, take the trial for failed and go on
            self.error = error
            self._give_up()
        if self._recorder.is_saturated():
            self._give_up()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        state = None if "outcomes" in result else ray.get(self._exchange.take.remote(trial.config["id"]))
        if state is not None:  # else the next epoch's is on its way
            candidate = Candidate.from_json(trial.config["candidate"])
            checkpoint = Checkpoint(id=trial.config["id"], candidate=candidate, state=state)
            self._tell(self._recorder.epoch, checkpoint, result["progress"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        outcomes = [Outcome.from_json(each) for each in json.loads(trial.last_result["outcomes"])]
        has_weights = any(outcome.has_weights and outcome.same_as is None for outcome in outcomes)
        weights = ray.get(self._exchange.take.remote(trial.config["id"])) if has_weights else {}
        self._tell(self._recorder.ended, outcomes, weights)
        for key in trial.last_result.get("trained", ()):  # only now: its worker may die before the weights are kept
            ray.get(self._exchange.put.remote(key, outcomes[0]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        failed = Outcome(
            id=trial.config["id"],
            state=State.FAILED,
            candidate=Candidate.from_json(trial.config["candidate"]),
            reason=f"the worker broke: {_last_line(Path(trial.error_file))}",
        )
        self._tell(self._recorder.ended, [failed], {})


def _last_line(error_file: Path) -> str:
    lines = error_file.read_text(encoding="utf-8").split("\n") if error_file.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no reason was left behind")


def run_trials(
    context_ref: Any,
    searcher: StudySearcher,
    num_trials: int,
    resources: TrialResources,
    recorder: Recorder,
    states: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, Measurement | Outcome],
    scheduler: NonDominatedHalving,
    *,
    start: StartTrial = start_trial,
) -> None:
    """Runs trials until there are so many, or until the searcher has no more to suggest.

    Args:
        context_ref: reference to the context.
        recorder: called in the driver; if it raises, no further trial starts.
        states: of the trials that an earlier run did not end, by id.
        known: what need not be measured or trained again; see `search.trial.context.known_from` and `trained_from`.
        scheduler: says at every rung who goes on.
        start: what a worker does with a candidate.

    Raises:
        VitfrontError: what `recorder` raised.
    """
    exchange: Any = ray.remote(Exchange).options(num_cpus=0).remote({**states, **known})
    bookkeeper = _Bookkeeper(recorder, exchange, searcher.finish)
    trainable = tune.with_parameters(
        TrialActor, context=[context_ref], exchange=exchange, cpus=resources.cpus, start=start,
        num_workers=min(num_trials, _num_slots(resources)), num_trials=num_trials,
    )  # fmt: skip
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


def submit(function: Callable[..., Any], resources: TrialResources, *args: Any, num_returns: int = 1) -> Any:
    """A task on the cluster, with as many torch threads as it has cores; gives a reference to each of its results."""
    options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "num_returns": num_returns, "max_retries": 0}
    return ray.remote(run_task).options(**options).remote(function, resources.cpus, *args)


def fetch(reference: Any) -> Any:
    """A task's result; the user's errors come as they were raised, not wrapped in the worker's traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, VitfrontError):
            raise error.cause from None
        if isinstance(error.cause, RaySystemError):  # the worker cannot even unpickle its work
            raise SweepError(f"a worker has not what it needs: {_first_line(error.cause)}") from error
        raise
    except RayError as error:  # the worker was killed, its node is gone, ...
        raise SweepError(f"a worker broke: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def trial_resources(config: Config) -> TrialResources:
    """What the recipe gives a trial: one GPU, or the recipe's part of one, where the cluster has any."""
    gpus = config.resources.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
    return TrialResources(cpus=config.resources.cpus_per_trial, gpus=gpus)


def _num_slots(resources: TrialResources) -> int:
    """For trials, on the nodes that there are."""
    there, wanted = ray.cluster_resources(), {"CPU": resources.cpus, "GPU": resources.gpus}
    return max(1, min(int(there.get(kind, 0) // amount) for kind, amount in wanted.items() if amount))


def check_resources(config: Config) -> None:
    """A trial that is larger than this machine would wait for ever; to a cluster, nodes may still come.

    Raises:
        ConfigError: names the key and what there is.
    """
    resources = trial_resources(config)
    for key, wanted, kind in (("cpus_per_trial", resources.cpus, "CPU"), ("gpus_per_trial", resources.gpus, "GPU")):
        there = ray.cluster_resources().get(kind, 0)
        if wanted > there:
            raise ConfigError(f"resources.{key}: {wanted:g} is more than this machine has, {there:g}")


def _reach(address: str | None) -> None:
    """Raises OSError if nobody answers at host:port; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def ray_running(address: str | None) -> Iterator[None]:
    """Ray, quiet; started for this sweep unless an address is given or it runs already."""
    if address is not None:  # Tune lets one trial wait at a time, so an autoscaler would start worker by worker
        os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "4")
    ours = not ray.is_initialized()
    if ours:
        try:
            _reach(address)
            ray.init(
                address=address or "local",  # else Ray joins whatever cluster it finds on this machine
                logging_level=logging.ERROR,
                log_to_driver=False,
                include_dashboard=None if address else False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            where = "Ray cannot be started" if address is None else f"no Ray cluster at {address!r}"
            hint = "; it wants a token: RAY_AUTH_MODE=token, and the head's ~/.ray/auth_token here"
            is_locked = "AuthToken" in str(error.__cause__)  # as `ray start` has it, and --address auto knows it
            raise SweepError(f"{where}: {_first_line(error)}{hint if is_locked else ''}") from error
    try:
        yield
    finally:
        if ours:
            ray.shutdown()
