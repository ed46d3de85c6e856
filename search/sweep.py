"""A sweep from end to end: wires the cluster, the searcher, the ledger and the tracking.

All of it runs in the driver, which is the only writer of ledger, MLflow and front; the cluster prunes and measures.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pruning.artifact import Description, save, save_weights
from pruning.models import read_weights
from pruning.plan import Plan
from search import ledger
from search.bench import Confirmation, Weights
from search.checkpoints import Checkpoint, Checkpoints
from search.cluster import (
    StartTrial,
    check_resources,
    confirm_remotely,
    fetch,
    prepare_remotely,
    ray_running,
    run_trials,
    submit,
    trial_share,
)
from search.config import Config, flat
from search.errors import SweepError
from search.files import write_atomically
from search.folder import Folder
from search.front import GrowingFront, contenders, front_record, running_hypervolume
from search.inputs import Inputs, load_inputs
from search.ledger import Ledger
from search.limits import Limit, acceptable, parse_limit
from search.outcome import Candidate, Measurement, Outcome, idle_share, num_trials
from search.plots import front_html
from search.searcher import StudySearcher
from search.space import Space
from search.tracking import Tracker, default_uri
from search.trial import start_trial


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


def run_sweep(config: Config, runs: Path, observer: Observer, *, address: str | None = None) -> dict[str, Any]:
    """Runs a sweep, or what is left of it, and gives the record of its front (`front.json`).

    Args:
        runs: the folder of all sweeps.
        address: of a Ray cluster; by default Ray runs on this machine, for this sweep.

    Raises:
        VitfrontError: wrong input; nothing was written then.
        SweepError: the name belongs to a sweep with other settings, or another process runs it.
    """
    folder = Folder(runs, config.name)
    _check_same_settings(config, folder)
    finished = read_finished(folder, config.search.trials)
    if finished is not None:
        return finished
    observer.stage("loading the model and the images")
    inputs = load_inputs(config, runs)
    with _ledger_of(folder) as book:
        write_atomically(folder.config, config.to_yaml())
        with ray_running(address):
            if address is None:
                check_resources(config)
            tracker = Tracker(
                default_uri(runs), runs / "mlartifacts", config.name, flat(config.model_dump(mode="json")),
                run_dir=folder.path, done=[outcome.id for outcome in book.found],
            )  # fmt: skip
            try:
                record = _run(config, folder, inputs, book, tracker, observer)
            except BaseException:
                tracker.interrupt()
                raise
    return record


def read_finished(folder: Folder, wanted: int) -> dict[str, Any] | None:
    """The front of a sweep that has all its trials, if it was written after the last of them."""
    num_done = num_trials(ledger.read(folder.ledger))
    if num_done < wanted or not folder.front.is_file():
        return None
    record = folder.read_front()
    return record if record["trials"] == num_done else None


def _run(
    config: Config, folder: Folder, inputs: Inputs, book: Ledger, tracker: Tracker, observer: Observer
) -> dict[str, Any]:
    # Everything gets a trial's share of the machine. More threads would not pay: on two cores of which another
    # process takes one, digits train in 65 s with one thread and in 220 s with two.
    share = trial_share(config)
    observer.stage("preparing the dense model" if inputs.trained else "training the dense model")
    bench_ref, dense_ref = submit(
        prepare_remotely, share, config, inputs, list(inputs.space.exit_blocks), num_returns=2
    )
    dense = fetch(dense_ref)
    if not inputs.trained:
        save_weights(fetch(bench_ref).model.state_dict(), inputs.cache)

    outcomes = run_search(config, folder, inputs.space, bench_ref, dense, book, tracker, observer)
    accuracy, limits = config.search.accuracy, [parse_limit(text) for text in config.search.limits]
    observer.stage("measuring the front once more, quietly, and on test")
    candidates = contenders(acceptable(outcomes, limits, dense), accuracy)
    plans = [outcome.plan for outcome in candidates if outcome.plan is not None]
    weights = [_read_weights(folder, outcome) for outcome in candidates]
    found: Confirmation = fetch(submit(confirm_remotely, share, bench_ref, plans, weights))
    confirmed = {o.id: replace(o, measurement=m) for o, m in zip(candidates, found.measured, strict=True)}
    final = [confirmed.get(outcome.id, outcome) for outcome in outcomes]
    kept = acceptable(list(confirmed.values()), limits, found.dense)
    record = front_record(config.name, kept, found.dense, accuracy) | {
        "limits": [limit.text for limit in limits],
        "trials": num_trials(outcomes),
        "idle_share": idle_share(outcomes),
        "conditions": found.conditions,
    }
    _write_front(folder, config, inputs, record, dict(zip(confirmed, found.models, strict=True)))
    tracker.finish(record, final, front_html(record, final), front_csv(record))
    return record


def run_search(
    config: Config, folder: Folder, space: Space, bench_ref: Any, dense: Measurement, book: Ledger, tracker: Tracker,
    observer: Observer, *, start: StartTrial = start_trial,
) -> list[Outcome]:  # fmt: skip
    """Runs the trials that a sweep lacks; gives all its outcomes, those of earlier runs first.

    Args:
        bench_ref: Ray's reference to the bench.
        start: what a worker does with a candidate.
    """
    accuracy, limits = config.search.accuracy, [parse_limit(text) for text in config.search.limits]
    outcomes = list(book.found)
    tracker.sync(outcomes, running_hypervolume(outcomes, dense, accuracy, limits))
    num_done = num_trials(outcomes)
    if num_done < config.search.trials:
        budget = config.search.time_budget_s
        deadline = None if budget is None else time.monotonic() + budget
        recorder = _Recorder(folder, book, outcomes, dense, accuracy, limits, tracker, observer)
        unfinished = recorder.checkpoints.read(done={outcome.trial for outcome in outcomes})
        observer.start_trials(num_done, config.search.trials, deadline)
        searcher = StudySearcher(
            space, known=outcomes, sampler=config.search.sampler, seed=config.search.seed,
            num_trials=config.search.trials, ahead=1,
            unfinished=[(each.id, each.candidate) for each in unfinished], accuracy=accuracy, limits=limits,
            dense=dense, deadline=deadline, on_suggest=observer.started,
        )  # fmt: skip
        torch.set_num_threads(1)  # of the sampler, here in the driver: the cores have trials to do
        states = {each.id: each.state for each in unfinished}
        try:
            run_trials(
                bench_ref, searcher, config.search.trials - num_done, trial_share(config), recorder, states, start=start
            )  # fmt: skip
        finally:
            searcher.finish()
            recorder.close()
    return outcomes


class _Recorder:
    """Keeps what comes of the trials: weights, then the ledger; only then MLflow and the observer hear of it."""

    def __init__(
        self, folder: Folder, book: Ledger, outcomes: list[Outcome], dense: Measurement, accuracy: str,
        limits: Sequence[Limit], tracker: Tracker, observer: Observer,
    ) -> None:  # fmt: skip
        """outcomes: all of the ledger; new ones are added."""
        self._folder, self._book, self._outcomes, self._dense = folder, book, outcomes, dense
        self._accuracy, self._limits, self._tracker, self._observer = accuracy, limits, tracker, observer
        self.checkpoints = Checkpoints(folder.checkpoints)
        self._front = GrowingFront(dense, accuracy, limits)
        for outcome in outcomes:
            self._front.add(outcome)
        self._contenders = contenders(acceptable(outcomes, limits, dense), accuracy)
        self._writing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._written: list[Future[None]] = []
        self._start = time.monotonic() - max((outcome.ended_s for outcome in outcomes), default=0.0)

    def epoch(self, checkpoint: Checkpoint, progress: Mapping[str, float]) -> None:
        self.checkpoints.write(checkpoint)
        self._observer.epoch(checkpoint.id, progress)

    def ended(self, outcomes: Sequence[Outcome], weights: Mapping[str, Weights]) -> None:
        for name, each in weights.items():
            save_weights(each, self._folder.weights_of(name))
        outcomes = [replace(outcome, ended_s=time.monotonic() - self._start) for outcome in outcomes]
        self._book.append(*outcomes)
        self.checkpoints.remove(outcomes[0].trial)
        for outcome in outcomes:
            self._outcomes.append(outcome)
            volume = self._front.add(outcome)
            # In a thread: a tenth of a second and more, in which the worker would wait for its next trial.
            self._written.append(self._writing.submit(self._tracker.log, outcome, volume, len(self._outcomes)))
            self._observer.finished(outcome, volume)
        self._remove_beaten_weights(outcomes)

    def close(self) -> None:
        """Waits for MLflow."""
        self._writing.shutdown()
        for each in self._written:
            each.result()

    def _remove_beaten_weights(self, new: Sequence[Outcome]) -> None:
        """Who is beaten beyond the noise stays so: nobody will ask for its weights."""
        kept = [*self._contenders, *acceptable(new, self._limits, self._dense)]
        self._contenders = contenders(kept, self._accuracy)
        asked_for = {outcome.id for outcome in self._contenders}
        for path in self._folder.weights.glob("*.safetensors"):
            if path.stem not in asked_for:
                path.unlink()


def _read_weights(folder: Folder, outcome: Outcome) -> Weights | None:
    return read_weights(folder.weights_of(outcome.id)) if outcome.has_weights else None


@contextmanager
def _ledger_of(folder: Folder) -> Iterator[Ledger]:
    """The sweep's ledger; a folder made for a sweep that never got to an outcome is taken away again."""
    is_new = not folder.path.exists()
    try:
        with Ledger(folder.ledger) as book:
            yield book
    except BaseException:
        if is_new and not ledger.read(folder.ledger) and not folder.checkpoints.is_dir():
            with suppress(OSError):
                shutil.rmtree(folder.path)
        raise


def _check_same_settings(config: Config, folder: Folder) -> None:
    if not folder.config.is_file():
        return
    different = config.differences(folder.read_config())
    if different:
        raise SweepError(
            f"{folder.path} was started with other settings ({', '.join(different)}); "
            "take another --name, or the same settings to continue it"
        )


def _write_front(
    folder: Folder, config: Config, inputs: Inputs, record: dict[str, Any], models: dict[str, nn.Module]
) -> None:
    """models/, then front.csv, then front.json, which says that the rest is there."""
    points = {point["id"]: Plan.from_json(point["plan"]) for point in record["points"]}
    for point_id, plan in points.items():
        description = Description(name=config.model.name, args=config.model.args, input=inputs.spec, plan=plan)
        save(models[point_id], description, folder.models / point_id)
    for left_over in folder.models.iterdir() if folder.models.is_dir() else ():
        if left_over.name not in points:
            shutil.rmtree(left_over)
    write_atomically(folder.table, front_csv(record))
    write_atomically(folder.front, json.dumps(record, indent=1))


def front_csv(record: dict[str, Any]) -> str:
    """The front as a table: the measurements, then the candidate's parameters."""
    rows = []
    for point in record["points"]:
        scalars = {key: value for key, value in point.items() if key not in ("candidate", "plan")}
        rows.append(scalars | Candidate.from_json(point["candidate"]).to_params())
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
