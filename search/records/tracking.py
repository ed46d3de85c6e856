"""Tracking of a sweep in MLflow: one run a sweep, one child run a trial. The only file that imports mlflow.

The ledger is the truth, MLflow its picture: outcomes that MLflow lacks are written again from the ledger, and MLflow is
only ever asked which runs, metrics and tags it has. A trial is written in an order that survives a kill at any point:
its run ends last, so a run that has ended is complete, and one that has not is written again in place.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from urllib.parse import unquote

# Before mlflow is imported, which reads them then; values that the user has set stay.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a sweep needs no network, and reports to nobody
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines a trial
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # 7 of 120 s hold the search up if a server is gone
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError  # mlflow lets some through

from pruning.errors import first_line_of
from search.errors import SweepError
from search.front import Front
from search.goal import metric_of
from search.outcome import Outcome, State
from search.records.files import alone_in
from search.records.store import (
    follow_moved_artifacts,
    is_store_of,
    sqlite_uri,
    without_half_a_store,
    without_stray_folders,
)

# A new SQLite store is announced at INFO, a failed statement at ERROR with its traceback; both reach us as well.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

EXPERIMENT = "vitfront"
MAX_REASON_CHARS = 5000  # MLflow's limit for a tag
MAX_PARAM_CHARS = 6000  # MLflow's limit for a param

# SQLite's own from moved artifacts, an ImportError where a database has no driver
_UNUSABLE = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError, UnicodeError)


class Tracker:
    """Writes a sweep to MLflow; only the driver has a tracker.

    A tracking server that goes down costs a warning, not the sweep: outcomes that could not be written wait, are tried
    again with later trials, and at the latest when the sweep is resumed.
    """

    def __init__(
        self,
        uri: str,
        artifact_root: Path,
        sweep: str,
        params: Mapping[str, object],
        *,
        run_dir: Path,
        done: Collection[str],
        retry_seconds: float = 120.0,
    ) -> None:
        """Finds the sweep's run, or begins it.

        Args:
            uri: address of the tracking server or of a database (`sqlite:////absolute/path.db`), which is created if
                it is missing.
            artifact_root: folder for the artifacts; a tracking server has a folder of its own and ignores this one.
            sweep: name of the sweep, and of its run.
            params: the settings, flat.
            run_dir: folder of the sweep; one name in two folders is two sweeps. One that was moved together with its
                store, the SQLite file beside it, is the same sweep still.
            done: ids of the ledger's outcomes. A run of this sweep with other ids belongs to an earlier sweep whose
                folder was deleted; it is left as it is.
            retry_seconds: seconds for which a server that is down is left alone.

        Raises:
            SweepError: MLflow cannot be reached or used.
        """
        self._retry_seconds = retry_seconds
        self._down, self._retry_at = False, 0.0
        self._waiting: deque[tuple[Outcome, float, int]] = deque()
        try:
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            # One sweep at a time: two that make mlflow's tables at once break them.
            with alone_in(run_dir.parent), without_stray_folders(uri), without_half_a_store(run_dir.parent, uri):
                self._moves_with_store = is_store_of(run_dir.parent, uri)
                if self._moves_with_store:
                    follow_moved_artifacts(run_dir.parent, artifact_root)
                self._client = MlflowClient(tracking_uri=uri)
                found = self._find_sweep(sweep, run_dir.absolute(), frozenset(done))
                self._parent, self._children = found or (self._begin_sweep(sweep, run_dir, uri, artifact_root), {})
            self._experiment: str = self._parent.info.experiment_id
            self._log_settings(params)
        except _UNUSABLE as error:
            raise SweepError(_why_unusable(uri, run_dir.parent, error)) from error

    @property
    def run_id(self) -> str:
        """MLflow's id of the sweep's run."""
        run_id: str = self._parent.info.run_id
        return run_id

    def sync(self, outcomes: Sequence[Outcome], hypervolumes: Sequence[float]) -> None:
        """Writes the outcomes that MLflow lacks, after a resume or an outage.

        Args:
            outcomes: all outcomes of the ledger, in its order.
            hypervolumes: hypervolume after each of them.
        """
        self._waiting = deque(zip(outcomes, hypervolumes, range(1, len(outcomes) + 1), strict=True))
        with self._tolerant():
            self._write_waiting(fresh=True)

    def log(self, outcome: Outcome, hypervolume: float, number: int) -> None:
        """Writes one outcome.

        Args:
            outcome: outcome of a trial.
            hypervolume: hypervolume of all outcomes up to and with this one.
            number: number of these outcomes.
        """
        self._waiting.append((outcome, hypervolume, number))
        if time.monotonic() >= self._retry_at:
            with self._tolerant():
                self._write_waiting()

    def finish(self, front: Front, outcomes: Sequence[Outcome], html: str, csv_text: str) -> None:
        """Ends the sweep's run: the front as artifacts, its best as metrics, its trials tagged.

        Args:
            front: the final front.
            outcomes: all outcomes of the ledger; measurements that changed since they were logged are logged anew.
            html: picture of the front.
            csv_text: table of the front.
        """
        with self._tolerant(last=True):
            self._write_waiting()
            self._tag_children(front, outcomes)
            for name, text in (
                ("front.json", json.dumps(front.to_json())),
                ("front.html", html),
                ("front.csv", csv_text),
            ):
                self._client.log_text(self.run_id, text, name)
            self._client.log_batch(self.run_id, metrics=_metrics(_best(front), _now_ms()))
            self._client.set_terminated(self.run_id, "FINISHED")

    def interrupt(self) -> None:
        """Ends the sweep's run as killed; a resume opens it again."""
        with self._tolerant(last=True):
            self._write_waiting()
            self._client.set_terminated(self.run_id, "KILLED")

    def _find_sweep(self, sweep: str, run_dir: Path, done: frozenset[str]) -> tuple[Run, dict[str, Run]] | None:
        """Returns the sweep's run, made to run again, and its child runs by trial id; None if it has none."""
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None and experiment.lifecycle_stage == LifecycleStage.DELETED:
            self._client.restore_experiment(experiment.experiment_id)
            warnings.warn(f"MLflow's experiment {EXPERIMENT!r} was deleted; it is restored with its runs", stacklevel=3)
        own = [] if experiment is None else [experiment.experiment_id]
        found = self._find_run(own, sweep, run_dir, done)
        if found is None and done:  # its experiment may have another name now
            others = [other.experiment_id for other in self._client.search_experiments()]
            found = self._find_run([other for other in others if other not in own], sweep, run_dir, done)
        if found is not None:
            run_id = found[0].info.run_id
            self._client.set_tag(run_id, "vitfront.run_dir", self._place_of(run_dir))
            self._client.update_run(run_id, status="RUNNING")
        return found

    def _find_run(
        self, experiments: Sequence[str], sweep: str, run_dir: Path, done: frozenset[str]
    ) -> tuple[Run, dict[str, Run]] | None:
        for run in all_runs(self._client, experiments, "vitfront.sweep", sweep):
            if run.data.tags["vitfront.run_dir"] in (self._place_of(run_dir), str(run_dir)):
                children = self._find_children(run)
                return (run, children) if children.keys() <= done else None  # the earlier ones are not ours either
        return None

    def _place_of(self, run_dir: Path) -> str:
        """Returns what tells a sweep from others of its name: in a store that is moved with it, not the whole path."""
        return run_dir.name if self._moves_with_store else str(run_dir.absolute())

    def _begin_sweep(self, sweep: str, run_dir: Path, uri: str, artifact_root: Path) -> Run:
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            # The pages open on runs and metrics then, not on prompts and traces.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            location = None if _is_server(uri) else artifact_root.absolute().as_uri()
            experiment_id = self._client.create_experiment(EXPERIMENT, location, kind)
        else:
            experiment_id = experiment.experiment_id
        tags = {"vitfront.sweep": sweep, "vitfront.run_dir": self._place_of(run_dir)}
        return self._client.create_run(experiment_id, tags=tags, run_name=sweep)

    def _find_children(self, parent: Run) -> dict[str, Run]:
        runs = all_runs(self._client, [parent.info.experiment_id], "mlflow.parentRunId", parent.info.run_id)
        return {run.data.tags["vitfront.trial"]: run for run in runs}

    def _log_settings(self, params: Mapping[str, object]) -> None:
        """Writes the settings as params; MLflow never changes a param, so what a resume sets anew stands in a tag."""
        texts = {key: str(value)[:MAX_PARAM_CHARS] for key, value in params.items()}
        params_there = self._parent.data.params
        new = [Param(key, text) for key, text in texts.items() if key not in params_there]
        self._client.log_batch(self.run_id, params=new)
        for key, text in texts.items():
            if params_there.get(key, text) != text:
                self._client.set_tag(self.run_id, f"vitfront.resumed.{key}", text)

    @contextmanager
    def _tolerant(self, *, last: bool = False) -> Iterator[None]:
        """Turns errors into one warning an outage, and one more if no later call can make up for it.

        Args:
            last: no later call will write what this one could not.
        """
        try:
            yield
            self._down, self._retry_at = False, 0.0
        except Exception as error:  # besides mlflow's and the network's, every artifact store has errors of its own
            warned, self._down, self._retry_at = self._down, True, time.monotonic() + self._retry_seconds
            if last or not warned:
                advice = "the sweep is not harmed, resume it to write what MLflow lacks"
                warnings.warn(f"cannot write to MLflow ({first_line_of(error)}); {advice}", stacklevel=4)

    def _write_waiting(self, *, fresh: bool = False) -> None:
        if fresh or self._down:  # after an outage: the call that failed may have arrived all the same
            self._children = self._find_children(self._parent)
        while self._waiting:
            self._write(*self._waiting[0])
            self._waiting.popleft()

    def _write(self, outcome: Outcome, hypervolume: float, number: int) -> None:
        run = self._children.get(outcome.id)
        if run is None:
            run = self._children[outcome.id] = self._begin(outcome)
        elif run.info.end_time is not None:
            return
        run_id, ended = run.info.run_id, run.info.start_time + round(1000 * outcome.seconds)
        # All times follow from the run's start, so that a second write of a metric is the same metric, not another.
        metrics = _metrics(_scalars(outcome), ended)
        metrics += [Metric("block_drop", drop, ended, block) for block, drop in enumerate(outcome.block_drops)]
        for epoch, progress in enumerate(outcome.history, start=1):
            metrics += [Metric(f"train_{name}", value, ended, epoch) for name, value in progress.items()]
        params = [Param(key, str(value)) for key, value in outcome.candidate.to_params().items()]
        self._client.log_batch(run_id, metrics, params)
        if outcome.plan is not None:  # log_dict would indent: a line a kept index
            self._client.log_text(run_id, json.dumps(outcome.plan.to_json()), "plan.json")
        self._client.log_metric(self.run_id, "hypervolume", hypervolume, ended, number)
        self._client.set_terminated(run_id, "FAILED" if outcome.state is State.FAILED else "FINISHED", ended)

    def _begin(self, outcome: Outcome) -> Run:
        tags = {
            "mlflow.parentRunId": self.run_id,
            "vitfront.trial": outcome.id,
            "vitfront.state": outcome.state.value,
        }
        if outcome.reason:
            tags["vitfront.reason"] = outcome.reason[:MAX_REASON_CHARS]
        if outcome.notes:
            tags["vitfront.notes"] = "; ".join(outcome.notes)[:MAX_REASON_CHARS]
        if outcome.same_as:
            tags["vitfront.same_as"] = outcome.same_as
        started = _now_ms() - round(1000 * outcome.seconds)
        return self._client.create_run(self._experiment, started, tags, outcome.id)

    def _tag_children(self, front: Front, outcomes: Sequence[Outcome]) -> None:
        """Tags the child runs that are on the front; writes only tags and metrics that differ from MLflow's."""
        on_front = {point.id for point in front.points}
        self._children = self._find_children(self._parent)
        for outcome in outcomes:
            run = self._children.get(outcome.id)
            if run is None:
                continue  # deleted by hand
            tags = {"on_front": str(outcome.id in on_front).lower(), "knee": str(outcome.id == front.knee).lower()}
            new_tags = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
            metrics_there = run.data.metrics
            changed = {key: value for key, value in _scalars(outcome).items() if metrics_there.get(key) != value}
            if new_tags or changed:
                self._client.log_batch(run.info.run_id, metrics=_metrics(changed, _now_ms()), tags=new_tags)


def all_runs(
    client: MlflowClient, experiments: Sequence[str], tag: str, value: str, page_size: int = 1000
) -> Iterator[Run]:
    """Yields every run of these experiments that has a tag with a value, the newest first, without deleted ones."""
    page_token = None
    while experiments:
        page = client.search_runs(
            list(experiments),
            f'tags.`{tag}` = "{value}"',
            max_results=page_size,
            order_by=["start_time DESC"],
            page_token=page_token,
        )
        yield from page
        page_token = page.token
        if not page_token:
            return


def serve_ui(uri: str, artifact_root: Path, port: int) -> int:
    """Serves MLflow's pages on 127.0.0.1, until Ctrl-C.

    Returns:
        Exit code of the server; 0 after Ctrl-C.

    Raises:
        SweepError: the store is a tracking server, which has its own pages, or cannot be used.
    """
    if _is_server(uri):
        raise SweepError(f"{uri} is a tracking server and shows its own pages: open it in a browser")
    try:
        if is_store_of(artifact_root.parent, uri):
            follow_moved_artifacts(artifact_root.parent, artifact_root)
        with without_stray_folders(uri), without_half_a_store(artifact_root.parent, uri):
            MlflowClient(tracking_uri=uri).search_experiments(max_results=1)  # the server's own errors are tracebacks
    except _UNUSABLE as error:
        raise SweepError(_why_unusable(uri, artifact_root.parent, error)) from error
    store = ["--backend-store-uri", uri, "--default-artifact-root", artifact_root.absolute().as_uri()]
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (
        without_stray_folders(uri),
        subprocess.Popen([sys.executable, "-m", "mlflow", "server", *store, *where]) as server,
    ):
        try:
            return server.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the server as well
            server.wait()
            return 0


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def _why_unusable(uri: str, runs: Path, error: Exception) -> str:
    scheme, colon, path = uri.partition(":")
    if (not colon and not _is_server(uri)) or scheme == "file":
        folder = Path(unquote(path.removeprefix("//")) if colon else uri)
        database = sqlite_uri(folder.absolute() / "mlflow.db")
        return (
            f"MLFLOW_TRACKING_URI={uri} is a folder, which MLflow no longer takes; give a database "
            f"({database}) or a server (http://host:port), or unset it for {runs.absolute()}/mlflow.db"
        )
    ways = "a database (sqlite:////folder/mlflow.db) or a server (http://host:port)"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, sqlite3.Error):  # SQLAlchemy talks of its own doings first
        cause = cause.__cause__ or cause.__context__
    reason = first_line_of(cause if isinstance(cause, sqlite3.Error) else error)
    move_away = "if the file is broken, move it away: a sweep that is continued writes its trials anew; or "
    other = f"{move_away if is_store_of(runs, uri) else ''}set MLFLOW_TRACKING_URI to {ways}"
    return f"MLflow cannot be used at {uri} ({reason}); {other}"


def _scalars(outcome: Outcome) -> dict[str, float]:
    metrics = asdict(outcome.measurement) if outcome.measurement is not None else {}
    cost = {"seconds": outcome.seconds, "forward_passes": outcome.forward_passes}
    return cost | {name: float(value) for name, value in metrics.items() if value is not None}


def _best(front: Front) -> dict[str, float]:
    best = {"front_points": float(len(front.points)), "front_hypervolume": front.hypervolume}
    for name in front.goal.objectives if front.points else ():
        values = {point.id: metric_of(point.measurement, name) for point in front.points}
        best |= {f"best_{name}": max(values.values())}
        best |= {f"knee_{name}": values[front.knee]} if front.knee in values else {}
    return best


def _metrics(values: Mapping[str, float], timestamp_ms: int) -> list[Metric]:
    return [Metric(key, value, timestamp_ms, 0) for key, value in values.items()]


def _now_ms() -> int:
    return round(1000 * time.time())
