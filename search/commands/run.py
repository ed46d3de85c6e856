"""A sweep from end to end: wires the cluster, the searcher, the ledger and the tracking.

All of it runs in the driver, which is the only writer of ledger, MLflow and front; the cluster prunes and measures.
"""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import nn

from pruning.artifact import Description, Weights, save, save_weights
from pruning.measure.stopwatch import Timing
from pruning.model.anatomy import examine
from pruning.model.loading import read_weights
from search.cluster.scheduler import NonDominatedHalving
from search.cluster.searcher import StudySearcher
from search.cluster.tune import (
    check_resources,
    fetch,
    ray_running,
    run_trials,
    submit,
    trial_resources,
)
from search.cluster.worker import StartTrial, confirm_remotely, prepare_remotely, time_remotely
from search.config import Config, flat
from search.errors import SweepError
from search.front import Front, contenders, front_of
from search.goal import Goal
from search.observer import Observer
from search.outcome import Candidate, Measurement, Outcome, idle_share, num_trials
from search.records import ledger
from search.records.ending import calling_on_interrupt
from search.records.files import write_atomically
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.records.profiles import ProfileCache
from search.records.recorder import Recorder
from search.records.tracking import Tracker, default_uri
from search.space import Space
from search.trial.context import (
    Confirmation,
    TrialContext,
    known_from,
    profile_images,
    profiled,
    speed_of,
    trained_from,
)
from search.trial.inputs import Inputs, load_inputs
from search.trial.trial import start_trial
from search.views.front_plot import front_html


def run_sweep(config: Config, runs: Path, observer: Observer, *, address: str | None = None) -> Front:
    """Runs a sweep, or what is left of it, and gives its front.

    Args:
        runs: the folder of all sweeps.
        address: of a Ray cluster; by default Ray runs on this machine, for this sweep.

    Raises:
        VitfrontError: wrong input; nothing was written then.
        SweepError: the name belongs to a sweep with other settings, or another process runs it.
    """
    folder = Folder(runs, config.name)
    _check_same_settings(config, folder)
    finished = read_finished(folder, config)
    if finished is not None:
        return finished
    observer.stage("loading the model and the images")
    inputs = load_inputs(config, runs)
    learned = _read_earlier(config, runs, inputs.space)
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
                front = _run(config, folder, inputs, learned, book, tracker, observer)
            except BaseException:
                tracker.interrupt()
                raise
    return front


def read_finished(folder: Folder, config: Config) -> Front | None:
    """The front of a sweep that has ended, if it was written after the last of its trials."""
    num_done = num_trials(ledger.read(folder.ledger))
    if not folder.front.is_file():
        return None
    front, search = folder.read_front(), config.search
    has_all = num_done >= search.trials
    if front.ended_by == "saturation":  # older sweeps do not tell
        before = folder.read_config().search
        has_all |= (search.patience, search.min_gain) == (before.patience, before.min_gain)
    return front if has_all and front.trials == num_done else None


def _run(
    config: Config, folder: Folder, inputs: Inputs, learned: Sequence[Outcome], book: Ledger, tracker: Tracker,
    observer: Observer,
) -> Front:  # fmt: skip
    # Everything gets a trial's share of the machine. More threads would not pay: on two cores of which another
    # process takes one, digits train in 65 s with one thread and in 220 s with two.
    share = trial_resources(config)
    observer.stage("preparing the dense model" if inputs.trained else "training the dense model")
    kinds, shown = profiled(inputs.space), profile_images(inputs.space, inputs.splits)
    cache = ProfileCache(inputs.cache.parent, config, inputs.model.state_dict(), shown)
    known = cache.read(kinds) if inputs.trained else {}
    context_ref, dense_ref, proposed_ref = submit(prepare_remotely, share, config, inputs, known, num_returns=3)
    dense = fetch(dense_ref)
    if not inputs.trained or len(known) < len(kinds):
        context: TrialContext = fetch(context_ref)
        if not inputs.trained:
            save_weights(context.model.state_dict(), inputs.cache)
            cache = ProfileCache(inputs.cache.parent, config, context.model.state_dict(), shown)
        cache.write(context.profiles)

    anatomy = examine(inputs.model)
    goal = Goal.of(dense, config.search.accuracy, config.search.limits)
    done = known_from(anatomy, dense, book.found) | trained_from(anatomy, book.found)
    outcomes, ended_by = run_search(
        config, goal, folder, inputs.space, context_ref, book, tracker, observer, proposed=fetch(proposed_ref),
        learned=learned, known=done,
    )  # fmt: skip
    observer.stage("measuring the front once more, quietly, and on test")
    different = [outcome for outcome in outcomes if outcome.same_as is None]
    candidates = contenders(goal.acceptable(different), goal.accuracy)
    timings = fetch(submit(time_remotely, share, context_ref, [outcome.plan for outcome in candidates]))
    candidates = contenders(
        list(map(_timed, candidates, timings)), goal.accuracy
    )  # beside trials they are less certain
    plans = [outcome.plan for outcome in candidates if outcome.plan is not None]
    weights = [_read_weights(folder, outcome) for outcome in candidates]
    found: Confirmation = fetch(submit(confirm_remotely, share, context_ref, plans, weights))
    confirmed = {o.id: replace(o, measurement=m) for o, m in zip(candidates, found.measured, strict=True)}
    final = [confirmed.get(outcome.id, outcome) for outcome in outcomes]
    front = Front.of(
        config.name, list(confirmed.values()), replace(goal, dense=found.dense), trials=num_trials(outcomes),
        ended_by=ended_by, idle_share=idle_share(outcomes), conditions=found.conditions,
    )  # fmt: skip
    _write_front(folder, config, inputs, front, dict(zip(confirmed, found.models, strict=True)))
    tracker.finish(front, final, front_html(front, final), front_csv(front))
    return front


def run_search(
    config: Config, goal: Goal, folder: Folder, space: Space, context_ref: Any, book: Ledger, tracker: Tracker,
    observer: Observer, *, proposed: Sequence[Candidate] = (), learned: Sequence[Outcome] = (),
    known: Mapping[str, Measurement | Outcome] | None = None, start: StartTrial = start_trial,
) -> tuple[list[Outcome], str]:  # fmt: skip
    """Runs the trials that a sweep lacks.

    Args:
        context_ref: Ray's reference to the context.
        proposed: candidates to begin with.
        learned: outcomes of other sweeps; the search begins with their front.
        known: what need not be measured or trained again.
        start: what a worker does with a candidate.

    Returns:
        All outcomes of the sweep, those of earlier runs first; and what ended it: `trials`, `time`, `saturation` of the
        hypervolume, `interrupt`, or `exhaustion` of what can be tried.
    """
    search, recorder = config.search, Recorder(config.search, goal, folder, book, tracker, observer)
    num_done = num_trials(recorder.outcomes)
    if num_done >= search.trials or recorder.is_saturated():
        recorder.close()
        return recorder.outcomes, "trials" if num_done >= search.trials else "saturation"
    deadline = None if search.time_budget_s is None else time.monotonic() + search.time_budget_s
    first = [outcome.candidate for outcome in front_of(learned, goal)]
    unfinished = recorder.checkpoints.read(done={outcome.trial for outcome in recorder.outcomes})
    observer.start_trials(num_done, search.trials, deadline)
    searcher = StudySearcher(
        space, known=list(recorder.outcomes), sampler=search.sampler, seed=search.seed, num_trials=search.trials,
        first=first + space.first_candidates(proposed), learned=learned, has_rungs=search.reduction_factor > 1, ahead=1,
        unfinished=[(each.id, each.candidate) for each in unfinished], goal=goal,
        deadline=deadline, on_suggest=observer.started,
    )  # fmt: skip
    interrupted = Event()

    def interrupt() -> None:
        interrupted.set()
        searcher.stop()
        observer.interrupted()

    torch.set_num_threads(1)  # of the sampler, here in the driver: the cores have trials to do
    states = {each.id: each.state for each in unfinished}
    scheduler = NonDominatedHalving(search.reduction_factor, recorder.outcomes)
    try:
        with calling_on_interrupt(interrupt):
            run_trials(
                context_ref, searcher, search.trials - num_done, trial_resources(config), recorder, states, known or {},
                scheduler, start=start,
            )  # fmt: skip
    finally:
        searcher.finish()
        recorder.close()
    if interrupted.is_set():
        return recorder.outcomes, "interrupt"
    if num_trials(recorder.outcomes) >= search.trials:
        return recorder.outcomes, "trials"
    if recorder.is_saturated():
        return recorder.outcomes, "saturation"
    return recorder.outcomes, "exhaustion" if deadline is None or time.monotonic() < deadline else "time"


def _read_earlier(config: Config, runs: Path, space: Space) -> list[Outcome]:
    """What the sweeps that the recipe names found within this space.

    Raises:
        SweepError: there is no such sweep, or it is of another model or other images, or measured otherwise.
    """
    found: list[Outcome] = []
    for name in config.search.earlier:
        folder = Folder(runs, name)
        same = ("model.", "data.", "exits.", "measure.batch_size", "measure.precision", "search.accuracy")
        different = [key for key in config.differences(folder.read_config()) if key.startswith(same)]
        if different:
            raise SweepError(f"sweep {name!r} teaches nothing here: its settings differ ({', '.join(different)})")
        found += [each for each in ledger.read(folder.ledger) if each.id == each.trial]
    return [outcome for outcome in found if space.holds(outcome.candidate)]


def _timed(outcome: Outcome, timing: Timing) -> Outcome:
    """The same with another timing."""
    assert outcome.measurement is not None
    return replace(outcome, measurement=replace(outcome.measurement, **speed_of(timing)))


def _read_weights(folder: Folder, outcome: Outcome) -> Weights | None:
    return read_weights(folder.weights_of(outcome.weights_id)) if outcome.has_weights else None


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


def _write_front(folder: Folder, config: Config, inputs: Inputs, front: Front, models: dict[str, nn.Module]) -> None:
    """models/, then front.csv, then front.json, which says that the rest is there."""
    for point in front.points:
        assert point.plan is not None
        description = Description(name=config.model.name, args=config.model.args, input=inputs.spec, plan=point.plan)
        save(models[point.id], description, folder.models / point.id)
    ids = {point.id for point in front.points}
    for left_over in folder.models.iterdir() if folder.models.is_dir() else ():
        if left_over.name not in ids:
            shutil.rmtree(left_over)
    write_atomically(folder.table, front_csv(front))
    folder.write_front(front)


def front_csv(front: Front) -> str:
    """The front as a table: the measurements, then the candidate's parameters."""
    rows = []
    for point in front.points:
        assert point.measurement is not None
        rows.append({"id": point.id} | asdict(point.measurement) | point.candidate.to_params())
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
