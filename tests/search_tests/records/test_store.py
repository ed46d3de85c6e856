"""The store of a folder of sweeps, read back by MLflow: odd characters, and folders that were moved or copied."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from sqlalchemy import make_url

from search.errors import SweepError
from search.front import Front, running_hypervolume
from search.outcome import Outcome
from search.records.store import default_uri, follow_moved_artifacts, is_store_of, sqlite_uri, without_stray_folders
from search.records.tracking import Tracker, all_runs, serve_ui
from tests.search_tests import builders
from tests.search_tests.disk import largest_file

# mlflow 3.17 calls what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

OUTCOMES = tuple(builders.outcome(f"t{number:03}", 0.7 + 0.05 * number, 2 - 0.2 * number) for number in range(4))


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables alone: to make them takes a second, to copy them nothing."""
    folder = tmp_path_factory.mktemp("empty")
    MlflowClient(tracking_uri=sqlite_uri(folder / "mlflow.db")).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return new_runs(tmp_path / "runs", empty_store)


def new_runs(folder: Path, empty_store: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


def track(runs: Path, done: Sequence[Outcome], outcomes: Sequence[Outcome], uri: str | None = None) -> Tracker:
    """Runs or resumes the sweep `s` up to these outcomes."""
    (runs / "s").mkdir(parents=True, exist_ok=True)
    ids = [outcome.id for outcome in done]
    tracker = Tracker(uri or default_uri(runs), runs / "mlartifacts", "s", {"seed": 0}, run_dir=runs / "s", done=ids)
    tracker.sync(outcomes, running_hypervolume(outcomes, builders.GOAL))
    tracker.finish(Front.of("s", outcomes, builders.GOAL), outcomes, "<p>front</p>", "id\n")
    return tracker


def track_elsewhere(runs: Path, outcomes: Sequence[Outcome]) -> None:
    """Runs the sweep in another process: MLflow remembers in each where a run's artifacts are."""
    call = f"track(Path({str(runs)!r}), (), OUTCOMES[:{len(outcomes)}])"
    code = f"from tests.search_tests.records.test_store import *; {call}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[3])


def sweeps(runs: Path, uri: str | None = None) -> dict[str, list[Run]]:
    """The runs of all sweeps, by id, with their trials."""
    client = MlflowClient(tracking_uri=uri or default_uri(runs))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    parents = all_runs(client, experiments, "vitfront.sweep", "s")
    children = {
        run.info.run_id: list(all_runs(client, experiments, "mlflow.parentRunId", run.info.run_id)) for run in parents
    }
    return {run_id: sorted(of_run, key=lambda run: str(run.info.run_name)) for run_id, of_run in children.items()}


def trials(runs: Path, tracker: Tracker, uri: str | None = None) -> list[str | None]:
    """The trials of the one sweep that there is."""
    found = sweeps(runs, uri)
    assert list(found) == [tracker.run_id]
    return [run.info.run_name for run in found[tracker.run_id]]


def artifact(runs: Path, run_id: str, name: str, to: Path) -> str:
    to.mkdir(exist_ok=True)
    return Path(MlflowClient(tracking_uri=default_uri(runs)).download_artifacts(run_id, name, str(to))).read_text()


@pytest.mark.parametrize(
    "name",
    [
        "a%20b",
        "a#b",
        "a?b",
        "a b",
        "100%",
        "ünï 日本",
        "it's",
        'q"q',
        "a:b",
        "a&b=c",
        "-x",
        "~",
        "a;b",
        "a\\b",
        "%2F",
        "*",
    ],
)
def test_sweeps_are_tracked_in_a_folder_of_any_name(tmp_path: Path, empty_store: Path, name: str) -> None:
    runs = new_runs(tmp_path / name / "runs", empty_store)
    tracker = track(runs, (), OUTCOMES[:1])
    again = track(runs, OUTCOMES[:1], OUTCOMES[:2])
    assert again.run_id == tracker.run_id
    assert trials(runs, again) == ["t000", "t001"]
    trial = sweeps(runs)[again.run_id][0].info.run_id
    assert artifact(runs, again.run_id, "front.html", tmp_path / "there") == "<p>front</p>"
    assert len(json.loads(artifact(runs, trial, "plan.json", tmp_path / "there"))["blocks"]) == 2
    assert (runs / "mlartifacts" / again.run_id / "artifacts" / "front.html").read_text() == "<p>front</p>"
    assert sorted(os.listdir(runs)) == ["mlartifacts", "mlflow.db", "s"]


def test_nothing_is_made_beside_a_folder_with_a_percent_sign(tmp_path: Path, empty_store: Path) -> None:
    for name in ("a%20b", "a?b"):
        track(new_runs(tmp_path / name / "runs", empty_store), (), OUTCOMES[:1])
    assert sorted(os.listdir(tmp_path)) == ["a%20b", "a?b"]


def test_folder_that_is_not_empty_is_no_stray_one(tmp_path: Path) -> None:
    with without_stray_folders(f"sqlite:///{tmp_path}/new/deep/mlflow.db"):
        (tmp_path / "new" / "deep").mkdir(parents=True)
        (tmp_path / "new" / "x").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "x"]


@pytest.mark.parametrize("name", ["plain", "a%20b", "a%3Fb?", "%", "a b#", "%25"])
def test_address_is_read_back_as_the_path(name: str) -> None:
    path = Path("/data") / name / "mlflow.db"
    assert make_url(sqlite_uri(path)).database == str(path)
    assert is_store_of(path.parent, sqlite_uri(path))
    assert not is_store_of(path.parent.parent, sqlite_uri(path))
    assert not is_store_of(path.parent, "http://tracking:5000")


def test_sweep_that_was_moved_goes_on_in_its_run_and_the_old_folder_stays_gone(runs: Path, tmp_path: Path) -> None:
    track_elsewhere(runs, OUTCOMES[:2])
    (before,) = sweeps(runs)
    moved = runs.rename(tmp_path / "elsewhere #2")
    after = track(moved, OUTCOMES[:2], OUTCOMES)
    assert after.run_id == before
    assert trials(moved, after) == ["t000", "t001", "t002", "t003"]
    for run in sweeps(moved)[after.run_id]:
        assert json.loads(artifact(moved, run.info.run_id, "plan.json", tmp_path / "there"))
    assert len(json.loads(artifact(moved, after.run_id, "front.json", tmp_path / "there"))["points"]) == 4
    assert len(list((moved / "mlartifacts").rglob("plan.json"))) == 4
    assert not runs.exists()


@pytest.mark.slow
def test_sweep_that_was_copied_goes_on_in_the_copy_alone(runs: Path, tmp_path: Path) -> None:
    track_elsewhere(runs, OUTCOMES[:2])
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    copy = Path(shutil.copytree(runs, tmp_path / "copy"))
    after = track(copy, OUTCOMES[:2], OUTCOMES)
    assert trials(copy, after) == ["t000", "t001", "t002", "t003"]
    assert len(json.loads(artifact(copy, after.run_id, "front.json", tmp_path / "there"))["points"]) == 4
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_moved_folder_keeps_the_artifacts_that_are_elsewhere(runs: Path, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=default_uri(runs))
    theirs = client.create_experiment("theirs", "s3://bucket/mlartifacts")
    other = client.create_experiment("other", (tmp_path / "notes").as_uri())
    track(runs, (), OUTCOMES[:1])
    moved = runs.rename(tmp_path / "moved")
    follow_moved_artifacts(moved, moved / "mlartifacts")
    client = MlflowClient(tracking_uri=default_uri(moved))
    locations = {experiment.name: experiment.artifact_location for experiment in client.search_experiments()}
    assert locations["vitfront"] == (moved / "mlartifacts").as_uri()
    assert client.get_experiment(theirs).artifact_location == "s3://bucket/mlartifacts"
    assert client.get_experiment(other).artifact_location == (tmp_path / "notes").as_uri()


def test_folder_without_a_store_has_nothing_to_follow(tmp_path: Path) -> None:
    follow_moved_artifacts(tmp_path, tmp_path / "mlartifacts")
    assert not (tmp_path / "mlflow.db").exists()
    (tmp_path / "mlflow.db").touch()
    follow_moved_artifacts(tmp_path, tmp_path / "mlartifacts")


def test_sweep_moved_away_from_a_shared_store_is_another_run(runs: Path, tmp_path: Path) -> None:
    shared = default_uri(runs)
    first = track(tmp_path / "a", (), OUTCOMES[:2], shared)
    (tmp_path / "a" / "s").rename(tmp_path / "s")
    second = track(tmp_path / "b", OUTCOMES[:2], OUTCOMES, shared)  # on another machine it could be anybody's
    found = sweeps(runs, shared)
    assert {run_id: len(of_run) for run_id, of_run in found.items()} == {first.run_id: 2, second.run_id: 4}


def test_deleted_experiment_is_restored_with_a_word(runs: Path) -> None:
    first = track(runs, (), OUTCOMES[:2])
    client = MlflowClient(tracking_uri=default_uri(runs))
    experiment = client.get_experiment_by_name("vitfront")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.warns(UserWarning, match="experiment 'vitfront' was deleted; it is restored with its runs"):
        again = track(runs, OUTCOMES[:2], OUTCOMES)
    assert again.run_id == first.run_id
    assert trials(runs, again) == ["t000", "t001", "t002", "t003"]


def test_sweep_goes_on_in_an_experiment_that_was_renamed_and_a_new_one_does_not(runs: Path) -> None:
    first = track(runs, (), OUTCOMES[:2])
    client = MlflowClient(tracking_uri=default_uri(runs))
    experiment = client.get_experiment_by_name("vitfront")
    assert experiment is not None
    client.rename_experiment(experiment.experiment_id, "last year")
    again = track(runs, OUTCOMES[:2], OUTCOMES)
    assert again.run_id == first.run_id
    assert trials(runs, again) == ["t000", "t001", "t002", "t003"]
    assert client.get_experiment_by_name("vitfront") is None
    new = track(runs, (), OUTCOMES[:1])
    assert new.run_id != first.run_id
    assert client.get_experiment_by_name("vitfront") is not None


def test_sweep_whose_run_was_deleted_begins_another_with_all_trials(runs: Path) -> None:
    first = track(runs, (), OUTCOMES[:2])
    client = MlflowClient(tracking_uri=default_uri(runs))
    for run_id in (first.run_id, *(run.info.run_id for run in sweeps(runs)[first.run_id])):
        client.delete_run(run_id)
    again = track(runs, OUTCOMES[:2], OUTCOMES[:3])
    assert again.run_id != first.run_id
    assert trials(runs, again) == ["t000", "t001", "t002"]


def test_trial_deleted_by_hand_is_written_again_by_a_resume(runs: Path) -> None:
    first = track(runs, (), OUTCOMES[:2])
    MlflowClient(tracking_uri=default_uri(runs)).delete_run(sweeps(runs)[first.run_id][0].info.run_id)
    assert trials(runs, first) == ["t001"]
    assert trials(runs, track(runs, OUTCOMES[:2], OUTCOMES[:2])) == ["t000", "t001"]


def test_store_that_was_deleted_is_made_anew_with_all_trials(runs: Path, empty_store: Path) -> None:
    track(runs, (), OUTCOMES[:2])
    shutil.copy(empty_store, runs / "mlflow.db")
    assert trials(runs, track(runs, OUTCOMES[:2], OUTCOMES)) == ["t000", "t001", "t002", "t003"]


def test_store_that_may_only_be_read_is_one_line(runs: Path) -> None:
    track(runs, (), OUTCOMES[:1])
    uri = f"sqlite:///file:{runs}/mlflow.db?mode=ro&uri=true"
    with pytest.raises(
        SweepError, match=r"^MLflow cannot be used at .*readonly database.*set MLFLOW_TRACKING_URI to"
    ) as raised:
        track(runs, OUTCOMES[:1], OUTCOMES[:2], uri)
    assert "\n" not in str(raised.value)


def test_half_a_store_of_a_full_disk_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with largest_file(300_000), pytest.raises(SweepError, match=r"^MLflow cannot be used at .*full|I/O"):
        track(tmp_path / "runs", (), OUTCOMES[:1])
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_file_that_is_no_store_is_one_line_for_the_pages_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_text("notes, and more notes: no database at all" * 50)
    for use in (
        lambda: track(tmp_path, (), OUTCOMES[:1]),
        lambda: serve_ui(default_uri(tmp_path), tmp_path / "mlartifacts", 5000),
    ):
        with pytest.raises(
            SweepError,
            match=r"^MLflow cannot be used at .*file is not a database.*; if the file is broken, move it away",
        ):
            use()


@pytest.mark.parametrize("uri", ["mlruns", "file:mlruns", "{tmp}/mlruns", "file:{tmp}/mlruns", "file://{tmp}/mlruns"])
def test_store_of_files_is_refused_with_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.chdir(tmp_path)
    uri = uri.format(tmp=tmp_path)
    with pytest.raises(SweepError) as raised:
        track(Path("runs"), (), (), uri)
    with pytest.raises(SweepError) as pages:
        serve_ui(uri, Path("runs/mlartifacts"), 5000)
    assert str(pages.value) == str(raised.value)
    what = f"MLFLOW_TRACKING_URI={uri} is a folder, which MLflow no longer takes"
    database, default = f"sqlite:///{tmp_path}/mlruns/mlflow.db", f"{tmp_path}/runs/mlflow.db"
    ways = f"give a database ({database}) or a server (http://host:port), or unset it for {default}"
    assert str(raised.value) == f"{what}; {ways}"


@pytest.mark.parametrize(
    "uri", ["postgresql://me@127.0.0.1:9/db", "localhost:5000", "sqlite:mlflow.db", "sqlite://x.db"]
)
def test_address_that_cannot_be_used_is_answered_with_those_that_can(tmp_path: Path, uri: str) -> None:
    with pytest.raises(
        SweepError, match=f"^MLflow cannot be used at {uri} .*; set MLFLOW_TRACKING_URI to a database"
    ) as e:
        track(tmp_path, (), (), uri)
    assert "\n" not in str(e.value)
    with pytest.raises(SweepError, match=f"^MLflow cannot be used at {uri} "):
        serve_ui(uri, tmp_path / "mlartifacts", 5000)


def test_address_of_blanks_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", " ")
    assert default_uri(tmp_path) == sqlite_uri(tmp_path / "mlflow.db")


def test_artifacts_are_found_by_a_plain_reader_of_the_database(runs: Path, tmp_path: Path) -> None:
    """A moved folder tells MLflow what MLflow itself writes for a folder that was there from the start."""
    track(runs, (), OUTCOMES[:1])
    moved = runs.rename(tmp_path / "moved")
    follow_moved_artifacts(moved, moved / "mlartifacts")
    with closing(sqlite3.connect(moved / "mlflow.db")) as database:
        uris = database.execute("SELECT run_uuid, artifact_uri FROM runs").fetchall()
    assert uris == [(run, f"{(moved / 'mlartifacts').as_uri()}/{run}/artifacts") for run, _ in uris]
