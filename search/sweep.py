"""A sweep from end to end: wires the cluster, the searcher, the ledger and the tracking.

All of it runs in the driver, which is the only writer of ledger, MLflow and front; the cluster prunes and measures.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from pruning.artifact import Description, save, save_weights
from pruning.plan import Plan
from search import ledger
from search.cluster import (
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
from search.front import contenders, front_record, running_hypervolume
from search.inputs import Inputs, load_inputs
from search.ledger import Ledger
from search.outcome import Candidate, Outcome
from search.plots import front_html
from search.searcher import StudySearcher
from search.tracking import Tracker, default_uri
from search.trial import Confirmation


class Observer(Protocol):
    """Who watches a sweep; the command line's progress line is one."""

    def stage(self, text: str) -> None:
        """Something starts that takes a while."""

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None:
        """The trials start; `num_done` of them were done by an earlier run; `deadline` on the monotonic clock."""

    def started(self, trial_id: str, candidate: Candidate) -> None:
        """A trial starts."""

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        """A trial ended; the hypervolume of all of them so far."""


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


def read_finished(folder: Folder, num_trials: int) -> dict[str, Any] | None:
    """The front of a sweep that has all its trials, if it was written after the last of them."""
    num_done = len(ledger.read(folder.ledger))
    if num_done < num_trials or not folder.front.is_file():
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
        save_weights(fetch(bench_ref).model, inputs.cache)

    outcomes = list(book.found)
    tracker.sync(outcomes, running_hypervolume(outcomes, dense))
    num_left = config.search.trials - len(outcomes)
    if num_left > 0:
        budget = config.search.time_budget_s
        deadline = None if budget is None else time.monotonic() + budget
        observer.start_trials(len(outcomes), config.search.trials, deadline)

        def record_outcome(outcome: Outcome) -> None:
            book.append(outcome)
            outcomes.append(outcome)
            volume = running_hypervolume(outcomes, dense)[-1]
            tracker.log(outcome, volume, len(outcomes))
            observer.finished(outcome, volume)

        searcher = StudySearcher(
            inputs.space, known=outcomes, sampler=config.search.sampler, seed=config.search.seed,
            deadline=deadline, on_suggest=observer.started,
        )  # fmt: skip
        run_trials(bench_ref, searcher, num_left, share, record_outcome)

    observer.stage("measuring the front once more, quietly, and on test")
    candidates = contenders(outcomes)
    plans = [outcome.plan for outcome in candidates if outcome.plan is not None]
    found: Confirmation = fetch(submit(confirm_remotely, share, bench_ref, plans))
    confirmed = {o.id: replace(o, measurement=m) for o, m in zip(candidates, found.measured, strict=True)}
    final = [confirmed.get(outcome.id, outcome) for outcome in outcomes]
    record = front_record(config.name, list(confirmed.values()), found.dense) | {
        "trials": len(outcomes),
        "conditions": found.conditions,
    }
    _write_front(folder, config, inputs, record, dict(zip(confirmed, found.models, strict=True)))
    tracker.finish(record, final, front_html(record, final), front_csv(record))
    return record


@contextmanager
def _ledger_of(folder: Folder) -> Iterator[Ledger]:
    """The sweep's ledger; a folder made for a sweep that never got to an outcome is taken away again."""
    is_new = not folder.path.exists()
    try:
        with Ledger(folder.ledger) as book:
            yield book
    except BaseException:
        if is_new and not ledger.read(folder.ledger):
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
