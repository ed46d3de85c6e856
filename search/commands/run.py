"""`vitfront run`: a sweep from end to end.

The driver does all of it but for pruning and measuring, which the cluster does: it alone writes the ledger, MLflow and
the front.
"""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from pruning.artifact import Description, save
from pruning.measure.stopwatch import device_name
from pruning.model.anatomy import examine
from search.cluster.session import TrialResources, cluster_resources, ray_running
from search.cluster.tune import Work, run_work
from search.commands.run_cache import PartCache
from search.commands.run_driver import SweepDriver, calling_on_interrupt
from search.commands.run_state import Sweep
from search.config import Config, Fingerprints, flat
from search.errors import SweepError
from search.front import Front
from search.observer import Observer
from search.outcome import Outcome, idle_share, num_trials
from search.records import ledger
from search.records.checkpoints import Checkpoints
from search.records.files import write_atomically
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.records.recorder import OutcomeLog
from search.records.store import default_uri
from search.trial.context import ContextPart
from search.trial.fingerprinting import check_unchanged, with_weights
from search.trial.first_look import local_device, tell
from search.trial.inputs import Inputs, check_pinned, load_inputs
from search.trial.jobs import Looked
from search.trial.prepare import keep_trained, profile_splits, steps_of
from search.trial.reuse import finetuned_before, measured_before
from search.views.front_plot import front_html

if TYPE_CHECKING:
    from search.records.tracking import Tracker

TEACHING_KEYS = ("model.", "data.", "exits.", "measure.batch_size", "measure.precision", "search.accuracy")
"""Beginnings of the recipe's keys that must be equal for a sweep to learn from another."""

QUICK_S = 0.3
"""Time in which inputs that are wrong mostly show it; Ray, which takes seconds to start, is started only then."""

NUM_AHEAD = 4
"""Pieces of work that wait for a slot of a cluster: an autoscaler starts nodes for all of them."""

LEAVE_OUT = "leave it out of --from"
"""Way out where a sweep cannot be learned from."""


def run_sweep(
    config: Config, runs: Path, observer: Observer, *, address: str | None = None, began: float | None = None
) -> Front:
    """Runs a sweep, or what is left of it, and returns its front.

    Args:
        runs: the folder of all sweeps.
        address: of a Ray cluster; by default Ray runs on this machine, for this sweep.
        began: time on the monotonic clock at which the time budget begins; by default now.

    Raises:
        VitfrontError: wrong input; nothing was written then.
        SweepError: the name belongs to a sweep with other settings or other inputs, or another process runs it.
    """
    began = time.monotonic() if began is None else began
    folder = Folder(runs, config.name)
    _check_same_settings(config, folder)
    observer.stage("loading the model and the images for a first look")
    with ThreadPoolExecutor(max_workers=1) as thread:
        loading = thread.submit(load_inputs, config, runs)
        if folder.front.is_file():
            _check_same_inputs(folder, loading.result().fingerprints)
            finished = read_finished(folder, config)
            if finished is not None:
                return finished
        with suppress(FutureTimeoutError):  # most mistakes show at once; Ray starts while the images are read
            loading.result(timeout=QUICK_S)
        _check_space(folder, config)
        with ray_running(address):
            inputs = loading.result()
            available = cluster_resources()
            resources = TrialResources.of(config, available)
            if address is None:
                resources.check(available)
            if folder.config.is_file():
                _check_same_inputs(folder, inputs.fingerprints)
            prior_outcomes = _read_prior_outcomes(config, runs, inputs)
            with _opened_ledger(folder) as book:
                if not folder.config.is_file():
                    _write_config(folder, config, inputs.fingerprints)
                sweep = Sweep(
                    config=config, inputs=inputs, folder=folder, ledger=book, observer=observer,
                    num_slots=resources.num_slots(available), began=began,
                )  # fmt: skip
                return _run(sweep, runs, prior_outcomes, resources, num_ahead=1 if address is None else NUM_AHEAD)


def _run(
    sweep: Sweep, runs: Path, prior_outcomes: Sequence[Outcome], resources: TrialResources, num_ahead: int
) -> Front:  # fmt: skip
    """Does all the work of a sweep, and writes its front."""
    known = _known_parts(sweep)
    book = Book(sweep, runs)
    driver = SweepDriver(sweep, known, book.begin, prior_outcomes)
    anatomy, found = examine(sweep.inputs.model), sweep.ledger.found
    work = Work(
        config=sweep.config, inputs=sweep.inputs, products=known, states=_states(sweep),
        measurements=measured_before(anatomy, None, found), finetunes=finetuned_before(anatomy, found),
    )  # fmt: skip
    if not sweep.inputs.trained:
        sweep.observer.stage("training the dense model")
    with book:
        try:
            with calling_on_interrupt(driver.interrupt):
                busy_s = run_work(work, driver, resources, sweep.config.search.trials, num_ahead=num_ahead)
        finally:
            driver.close()
        return _write(book, driver, busy_s)


def _states(sweep: Sweep) -> dict[str, Mapping[str, Any]]:
    """Reads the states of the trials that an earlier run did not end, by id."""
    done = {outcome.trial for outcome in sweep.ledger.found}
    return {checkpoint.id: checkpoint.state for checkpoint in Checkpoints(sweep.folder.checkpoints).read(done=done)}


class Book:
    """The records of a sweep beside its ledger, which begin once the dense model is known: settings, MLflow, cache."""

    def __init__(self, sweep: Sweep, runs: Path) -> None:
        self.sweep, self.config, self._runs = sweep, sweep.config, runs
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow-start")
        self._tracker: Future[Tracker] | None = None

    @property
    def tracker(self) -> Tracker:
        """MLflow, as soon as it is ready.

        Raises:
            SweepError: it cannot be used.
        """
        assert self._tracker is not None
        return self._tracker.result()

    def begin(self, looked: Looked) -> tuple[OutcomeLog, PartCache]:
        """Tells the accuracy of the dense model, checks that it is worth pruning, and begins the records.

        Raises:
            VitfrontError: the model is not to be pruned.
        """
        sweep, inputs = self.sweep, self.sweep.inputs
        fingerprints = inputs.fingerprints
        if looked.weights is not None:
            inputs.model.load_state_dict(dict(looked.weights))
            keep_trained(inputs, inputs.model)
            fingerprints = with_weights(fingerprints, inputs.model)
            check_pinned(sweep.config, fingerprints)
        tell(looked.first, inputs.notes, sweep.observer.note)
        # Weights that were to be trained are known only now.
        _check_same_inputs(sweep.folder, fingerprints)
        for name in sweep.config.search.earlier:
            _check_same_inputs(Folder(self._runs, name), fingerprints, LEAVE_OUT)
        self.config = _write_config(sweep.folder, sweep.config, fingerprints)
        # In a thread: its import and its database take seconds, in which the workers would wait.
        self._tracker = self._thread.submit(self._begin_tracker)
        return LateLog(self._tracker), _part_cache(sweep, fingerprints, looked.device)

    def _begin_tracker(self) -> Tracker:
        from search.records.tracking import Tracker  # here: mlflow takes seconds to import

        sweep, runs = self.sweep, self._runs
        return Tracker(
            default_uri(runs), runs / "mlartifacts", sweep.config.name, _settings(self.config),
            run_dir=sweep.folder.path, done=[outcome.id for outcome in sweep.ledger.found],
        )  # fmt: skip

    def __enter__(self) -> Book:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tells MLflow of a sweep that was interrupted, if it has begun there."""
        self._thread.shutdown()
        if error is not None and self._tracker is not None and self._tracker.exception() is None:
            self.tracker.interrupt()


@dataclass(frozen=True)
class LateLog:
    """A log of outcomes that is still being opened; whoever writes waits for it."""

    tracker: Future[Tracker]

    def sync(self, outcomes: Sequence[Outcome], hypervolumes: Sequence[float]) -> None:
        """Writes those of all outcomes that the log lacks."""
        self.tracker.result().sync(outcomes, hypervolumes)

    def log(self, outcome: Outcome, hypervolume: float, number: int) -> None:
        """Writes one outcome, the `number`-th of the sweep."""
        self.tracker.result().log(outcome, hypervolume, number)


def _part_cache(sweep: Sweep, fingerprints: Fingerprints, device: str) -> PartCache:
    images = profile_splits(sweep.space, sweep.inputs.splits)
    return PartCache(
        sweep.inputs.cache.parent, sweep.config, fingerprints, images, sweep.space.exit_blocks, device
    )  # fmt: skip


def _known_parts(sweep: Sweep) -> dict[str, ContextPart]:
    """Reads what earlier sweeps measured of this dense model, by the ids of the steps.

    Widths are only known of this machine's device: what workers of a cluster have is not known yet.
    """
    if not sweep.inputs.trained:
        return {}
    cache = _part_cache(sweep, sweep.inputs.fingerprints, device_name(local_device()))
    parts = {step.id: cache.read(step) for step in steps_of(sweep.space)}
    return {step_id: part for step_id, part in parts.items() if part is not None}


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


def _write_config(folder: Folder, config: Config, fingerprints: Fingerprints) -> Config:
    """Writes config.yaml, with the hashes of the inputs, and returns what it holds."""
    config = config.model_copy(update={"fingerprints": fingerprints})
    write_atomically(folder.config, config.to_yaml())
    return config


def _settings(config: Config) -> dict[str, object]:
    """Returns all keys of a recipe, flat; fingerprints that are missing are left out."""
    settings = flat(config.model_dump(mode="json"))
    return {key: value for key, value in settings.items() if value is not None or not key.startswith("fingerprints")}


def _write(book: Book, driver: SweepDriver, busy_s: float) -> Front:
    """Writes the front into the folder and into MLflow.

    Args:
        busy_s: seconds of all slots together in which they worked.
    """
    sweep, confirmed, outcomes = book.sweep, driver.confirmation.result(), driver.outcomes
    fingerprints = book.config.fingerprints
    assert fingerprints is not None
    front = Front.of(
        sweep.config.name, confirmed.outcomes, replace(driver.goal, dense=confirmed.dense),
        trials=num_trials(outcomes), ended_by=driver.ended_by, idle_share=idle_share(outcomes),
        busy_share=busy_s / (sweep.num_slots * (time.monotonic() - sweep.began)),
        conditions=confirmed.conditions, fingerprints=fingerprints.model_dump(exclude_none=True),
    )  # fmt: skip
    _write_front(sweep, front, confirmed.models)
    by_id = {outcome.id: outcome for outcome in confirmed.outcomes}
    final = [by_id.get(outcome.id, outcome) for outcome in outcomes]
    book.tracker.finish(front, final, front_html(front, final), front_csv(front))
    return front


def _write_front(sweep: Sweep, front: Front, models: Mapping[str, nn.Module]) -> None:
    """Writes models/, then front.csv, then front.json, which says that the rest is there."""
    folder, model, inputs = sweep.folder, sweep.config.model, sweep.inputs
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


def _check_space(folder: Folder, config: Config) -> None:
    """Raises SweepError if the disk is full, before Ray starts and a dense model is trained; leaves nothing behind."""
    if folder.config.is_file():
        return
    new = [path for path in (folder.path, folder.path.parent) if not path.exists()]
    try:
        with suppress(OSError):  # the ledger tells what is wrong with the folder
            folder.path.mkdir(parents=True, exist_ok=True)
        if folder.path.is_dir():
            write_atomically(folder.config, config.to_yaml())
    finally:
        with suppress(OSError):
            folder.config.unlink(missing_ok=True)
        for path in new:
            with suppress(OSError):
                path.rmdir()


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
