"""`vitfront run`: a sweep from end to end.

The driver does all of it but for pruning and measuring, which the cluster does: it alone writes the ledger, MLflow and
the front.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from pruning.artifact import Description, Weights, save
from pruning.measure.stopwatch import Timing
from pruning.model.anatomy import examine
from pruning.model.loading import read_weights
from search.cluster.session import TrialResources, cluster_resources, fetch, ray_running, share, submit
from search.cluster.tasks import confirm_remotely, look_remotely, prepare_remotely, time_remotely
from search.commands.run_search import Prepared, Searched, Sweep, run_search
from search.config import Config, Fingerprints, flat
from search.errors import SweepError
from search.front import Front, contenders
from search.goal import Goal
from search.observer import Observer
from search.outcome import Measurement, Outcome, idle_share, num_trials
from search.records import ledger
from search.records.files import write_atomically
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.records.profiles import ProfileCache
from search.records.store import default_uri
from search.records.tracking import Tracker
from search.trial.context import TrialContext
from search.trial.fingerprinting import check_unchanged, with_weights
from search.trial.first_look import FirstLook, tell
from search.trial.inputs import Inputs, check_pinned, load_inputs
from search.trial.measure import Confirmation, speed_of
from search.trial.prepare import keep_trained, profile_splits, profiled_reductions
from search.trial.reuse import finetuned_before, measured_before
from search.views.front_plot import front_html

TEACHING_KEYS = ("model.", "data.", "exits.", "measure.batch_size", "measure.precision", "search.accuracy")
"""Beginnings of the recipe's keys that must be equal for a sweep to learn from another."""

LEAVE_OUT = "leave it out of --from"
"""Way out where a sweep cannot be learned from."""


def run_sweep(config: Config, runs: Path, observer: Observer, *, address: str | None = None) -> Front:
    """Runs a sweep, or what is left of it, and returns its front.

    Args:
        runs: the folder of all sweeps.
        address: of a Ray cluster; by default Ray runs on this machine, for this sweep.

    Raises:
        VitfrontError: wrong input; nothing was written then.
        SweepError: the name belongs to a sweep with other settings or other inputs, or another process runs it.
    """
    folder = Folder(runs, config.name)
    _check_same_settings(config, folder)
    observer.stage("loading the model and the images for a first look")
    inputs = load_inputs(config, runs)
    if folder.config.is_file():
        _check_same_inputs(folder, inputs.fingerprints)
    finished = read_finished(folder, config)
    if finished is not None:
        return finished
    prior_outcomes = _read_prior_outcomes(config, runs, inputs)
    with _opened_ledger(folder) as book:
        if not folder.config.is_file():  # now: a disk that is full shows before the dense model is trained
            _write_config(folder, config, inputs.fingerprints)
        with ray_running(address):
            if address is None:
                available = cluster_resources()
                TrialResources.of(config, available).check(available)
            looked = _look(config, inputs, observer)
            # Weights that were to be trained are known only now.
            _check_same_inputs(folder, looked.fingerprints)
            for name in config.search.earlier:
                _check_same_inputs(Folder(runs, name), looked.fingerprints, LEAVE_OUT)
            config = _write_config(folder, config, looked.fingerprints)
            tracker = Tracker(
                default_uri(runs), runs / "mlartifacts", config.name, _settings(config),
                run_dir=folder.path, done=[outcome.id for outcome in book.found],
            )  # fmt: skip
            sweep = Sweep(
                config=config, space=inputs.space, folder=folder, ledger=book, tracker=tracker, observer=observer
            )
            try:
                prepared = _prepare(sweep, inputs, looked)
                searched = run_search(sweep, prepared, prior_outcomes)
                candidates, confirmation = _confirm(sweep, prepared, searched.outcomes)
                return _write(sweep, inputs, prepared.goal, searched, candidates, confirmation)
            except BaseException:
                tracker.interrupt()
                raise


def read_finished(folder: Folder, config: Config) -> Front | None:
    """Reads the front of a sweep that has ended; None if it has not, or if trials ended after the front was written."""
    num_done = num_trials(ledger.read(folder.ledger))
    if not folder.front.is_file():
        return None
    front, settings = folder.read_front(), config.search
    is_complete = num_done >= settings.trials
    if front.ended_by == "saturation":  # fronts of older sweeps have no ended_by
        before = folder.read_config().search
        is_complete |= (settings.patience, settings.min_gain) == (before.patience, before.min_gain)
    return front if is_complete and front.trials == num_done else None


@dataclass(frozen=True, kw_only=True)
class Looked:
    """The dense model of a sweep, trained and found worth pruning."""

    inputs_ref: Any
    """Ray's reference to the inputs, which lie in the object store once."""
    trained_ref: Any
    """Ray's reference to the model if it was trained just now, else to None."""
    first: FirstLook
    fingerprints: Fingerprints
    """Hashes of the inputs, that of the weights included."""


def _look(config: Config, inputs: Inputs, observer: Observer) -> Looked:
    """Trains the dense model if need be, and tells its accuracy on val before anything else is spent.

    Raises:
        VitfrontError: the dense model is not to be pruned; nothing was measured but its accuracy.
    """
    # Everything gets a trial's share of the machine. More threads would not pay: on two cores of which another
    # process takes one, digits train in 65 s with one thread and in 220 s with two.
    resources = TrialResources.of(config, cluster_resources())
    if not inputs.trained:
        observer.stage("training the dense model")
    inputs_ref = share(inputs)
    first_ref, trained_ref = submit(look_remotely, resources, config, inputs_ref, num_returns=2)
    first: FirstLook = fetch(first_ref)
    fingerprints = inputs.fingerprints
    if not inputs.trained:
        trained: nn.Module = fetch(trained_ref)
        keep_trained(inputs, trained)
        fingerprints = with_weights(fingerprints, trained)
        check_pinned(config, fingerprints)
    tell(first, inputs.notes, observer.note)
    return Looked(inputs_ref=inputs_ref, trained_ref=trained_ref, first=first, fingerprints=fingerprints)


def _prepare(sweep: Sweep, inputs: Inputs, looked: Looked) -> Prepared:
    """Fits the exits and measures the dense model; new profiles are kept."""
    resources = TrialResources.of(sweep.config, cluster_resources())
    sweep.observer.stage("preparing the dense model")
    kinds, images = profiled_reductions(inputs.space), profile_splits(inputs.space, inputs.splits)
    cache = ProfileCache(inputs.cache.parent, sweep.config, looked.fingerprints, images)
    profiles = cache.read(kinds)
    context_ref, dense_ref, proposed_ref = submit(
        prepare_remotely, resources, sweep.config, looked.inputs_ref, looked.trained_ref, looked.first, profiles,
        num_returns=3,
    )  # fmt: skip
    dense: Measurement = fetch(dense_ref)
    if len(profiles) < len(kinds):
        context: TrialContext = fetch(context_ref)
        cache.write(context.profiles)
    anatomy = examine(inputs.model)
    return Prepared(
        context_ref=context_ref,
        goal=Goal.of(dense, sweep.config.search.accuracy, sweep.config.search.limits),
        proposed=fetch(proposed_ref),
        measurements=measured_before(anatomy, dense, sweep.ledger.found),
        finetunes=finetuned_before(anatomy, sweep.ledger.found),
    )


def _write_config(folder: Folder, config: Config, fingerprints: Fingerprints) -> Config:
    """Writes config.yaml, with the hashes of the inputs, and returns what it holds."""
    config = config.model_copy(update={"fingerprints": fingerprints})
    write_atomically(folder.config, config.to_yaml())
    return config


def _settings(config: Config) -> dict[str, object]:
    """Returns all keys of a recipe, flat; fingerprints that are missing are left out."""
    settings = flat(config.model_dump(mode="json"))
    return {key: value for key, value in settings.items() if value is not None or not key.startswith("fingerprints")}


def _confirm(sweep: Sweep, prepared: Prepared, outcomes: Sequence[Outcome]) -> tuple[list[Outcome], Confirmation]:
    """Measures again, quietly, the outcomes that may be on the front.

    Returns:
        Their outcomes with the new measurements; and the confirmation, with their models in the same order.
    """
    sweep.observer.stage("measuring the front once more, quietly, and on test")
    goal, resources = prepared.goal, TrialResources.of(sweep.config, cluster_resources())
    different = [outcome for outcome in outcomes if outcome.same_as is None]
    candidates = contenders(goal.acceptable(different), goal)
    timings = fetch(submit(time_remotely, resources, prepared.context_ref, [outcome.plan for outcome in candidates]))
    timed = list(map(_with_timing, candidates, timings))
    candidates = contenders(timed, goal)  # fewer: the timings beside trials are less certain
    plans = [outcome.plan for outcome in candidates if outcome.plan is not None]
    weights = [_read_weights(sweep.folder, outcome) for outcome in candidates]
    confirmation: Confirmation = fetch(submit(confirm_remotely, resources, prepared.context_ref, plans, weights))
    measured = zip(candidates, confirmation.measured, strict=True)
    return [replace(outcome, measurement=measurement) for outcome, measurement in measured], confirmation


def _write(
    sweep: Sweep, inputs: Inputs, goal: Goal, searched: Searched, confirmed: Sequence[Outcome],
    confirmation: Confirmation,
) -> Front:  # fmt: skip
    """Writes the front into the folder and into MLflow.

    Args:
        confirmed: the outcomes that may be on the front, as they were confirmed.
    """
    fingerprints = sweep.config.fingerprints
    assert fingerprints is not None
    front = Front.of(
        sweep.config.name, confirmed, replace(goal, dense=confirmation.dense),
        trials=num_trials(searched.outcomes), ended_by=searched.ended_by, idle_share=idle_share(searched.outcomes),
        conditions=confirmation.conditions, fingerprints=fingerprints.model_dump(exclude_none=True),
    )  # fmt: skip
    models = {outcome.id: model for outcome, model in zip(confirmed, confirmation.models, strict=True)}
    _write_front(sweep, inputs, front, models)
    by_id = {outcome.id: outcome for outcome in confirmed}
    final = [by_id.get(outcome.id, outcome) for outcome in searched.outcomes]
    sweep.tracker.finish(front, final, front_html(front, final), front_csv(front))
    return front


def _write_front(sweep: Sweep, inputs: Inputs, front: Front, models: Mapping[str, nn.Module]) -> None:
    """Writes models/, then front.csv, then front.json, which says that the rest is there."""
    folder, model = sweep.folder, sweep.config.model
    for point in front.points:
        assert point.plan is not None
        description = Description(name=model.name, args=model.args, input=inputs.spec, plan=point.plan)
        save(models[point.id], description, folder.models / point.id)
    ids = {point.id for point in front.points}
    for path in folder.models.iterdir() if folder.models.is_dir() else ():
        if path.name not in ids:
            shutil.rmtree(path)
    write_atomically(folder.table, front_csv(front))
    folder.write_front(front)


def front_csv(front: Front) -> str:
    """Returns the front as a table: the measurements, then the candidate's parameters."""
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


def _read_prior_outcomes(config: Config, runs: Path, inputs: Inputs) -> list[Outcome]:
    """Reads the outcomes of the sweeps that the recipe names, as far as they lie within this space.

    Raises:
        SweepError: there is no such sweep, or it is of another model or other images, or measured otherwise.
    """
    outcomes: list[Outcome] = []
    for name in config.search.earlier:
        folder = Folder(runs, name)
        different = [key for key in config.differences(folder.read_config()) if key.startswith(TEACHING_KEYS)]
        if different:
            raise SweepError(f"sweep {name!r} teaches nothing here: its settings differ ({', '.join(different)})")
        _check_same_inputs(folder, inputs.fingerprints, LEAVE_OUT)
        outcomes += [outcome for outcome in ledger.read(folder.ledger) if outcome.id == outcome.trial]
    return [outcome for outcome in outcomes if inputs.space.holds(outcome.candidate)]


def _check_same_inputs(folder: Folder, fingerprints: Fingerprints, way_out: str = "take another --name") -> None:
    """Raises SweepError if a sweep was run with other weights or images than those of now; `way_out` ends its text."""
    recorded = folder.read_config().fingerprints
    if recorded is None:
        raise SweepError(
            f"{folder.path} was started by an older vitfront, without fingerprints of its inputs, so it cannot be told "
            f"whether they are the same now; {way_out}"
        )
    check_unchanged(recorded, fingerprints, f"{folder.path} was run with other inputs", way_out)


def _with_timing(outcome: Outcome, timing: Timing) -> Outcome:
    """Returns the outcome with another timing in its measurement."""
    assert outcome.measurement is not None
    return replace(outcome, measurement=replace(outcome.measurement, **speed_of(timing)))


def _read_weights(folder: Folder, outcome: Outcome) -> Weights | None:
    return read_weights(folder.weights_of(outcome.weights_id)) if outcome.has_weights else None


@contextmanager
def _opened_ledger(folder: Folder) -> Iterator[Ledger]:
    """Opens the sweep's ledger; a folder made for a sweep that never got to an outcome is removed again."""
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
    """Raises SweepError if the folder is of a sweep with other settings."""
    if not folder.config.is_file():
        return
    different = config.differences(folder.read_config())
    if different:
        raise SweepError(
            f"{folder.path} was started with other settings ({', '.join(different)}); "
            "take another --name, or the same settings to continue it"
        )
