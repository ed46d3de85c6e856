"""MLflow after a sweep, a kill, an outage and a resume, read back from a real SQLite store."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from search.errors import SweepError
from search.front import Front, running_hypervolume
from search.outcome import Outcome, State
from search.records.files import alone_in
from search.records.store import default_uri
from search.records.tracking import Tracker, all_runs, serve_ui
from tests.search_tests import builders

# mlflow 3.17 calls what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

OUTCOMES = (
    builders.outcome("t000", 0.70, 1.5),
    builders.outcome("t001", 0.85, 2.0),
    builders.failed("t002"),
    builders.outcome("t003", 0.90, 1.2),
)
HYPERVOLUMES = running_hypervolume(OUTCOMES, builders.GOAL)


class Store:
    """One SQLite store for all tests of the file (a new one takes a second); each test has its own sweep in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifacts = folder / "artifacts"
        self.database = folder / "runs" / "mlflow.db"
        self.uri = default_uri(folder / "runs")
        self.client = MlflowClient(tracking_uri=self.uri)
        self.printed_when_made = ""
        """All that making the store printed."""

    def tracker(self, sweep: str, done: Sequence[Outcome] = (), **other: Any) -> Tracker:
        settings: dict[str, Any] = {"params": {"seed": 0}, "run_dir": self.folder / "runs" / sweep}
        done_ids = [outcome.id for outcome in done]
        return Tracker(self.uri, self.artifacts, sweep, done=done_ids, **settings | other)

    def parents(self, sweep: str) -> list[Run]:
        return list(all_runs(self.client, [self.experiment], "vitfront.sweep", sweep))

    def children(self, tracker: Tracker) -> dict[str, Run]:
        """By run name; each name once, or the test fails here."""
        runs = list(all_runs(self.client, [self.experiment], "mlflow.parentRunId", tracker.run_id))
        by_name = {run.info.run_name: run for run in runs}
        assert len(by_name) == len(runs), "a trial was written twice"
        return by_name

    def curve(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, metric))

    def artifact(self, run_id: str, name: str) -> str:
        return Path(self.client.download_artifacts(run_id, name)).read_text()

    @property
    def experiment(self) -> str:
        experiment = self.client.get_experiment_by_name("vitfront")
        assert experiment is not None
        experiment_id: str = experiment.experiment_id
        return experiment_id

    @contextmanager
    def broken(self, part: str) -> Iterator[None]:
        """The store without its table `part`, or without its `artifacts` folder."""
        if part == "artifacts":
            self.artifacts.mkdir(exist_ok=True)  # it is made with the first artifact
            away = self.artifacts.rename(self.folder / "away")
            self.artifacts.write_text("")
            try:
                yield
            finally:
                self.artifacts.unlink()
                away.rename(self.artifacts)
            return
        self._rename(part, "away")
        try:
            yield
        finally:
            self._rename("away", part)

    def _rename(self, old: str, new: str) -> None:
        with closing(sqlite3.connect(self.database)) as database:
            database.execute("PRAGMA legacy_alter_table = ON")
            database.execute(f"ALTER TABLE {old} RENAME TO {new}")
            database.commit()


@contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """Sends stdout and stderr to a file, of Python and of what lies below it."""
    with path.open("w+") as file, redirect_stdout(file), redirect_stderr(file):
        before = [os.dup(handle) for handle in (1, 2)]
        try:
            for handle in (1, 2):
                os.dup2(file.fileno(), handle)
            yield
        finally:
            for copy, handle in zip(before, (1, 2), strict=True):
                os.dup2(copy, handle)
                os.close(copy)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("store")
        store = Store(folder)
        with printed_to(folder / "printed.txt"):
            store.tracker("first")
        store.printed_when_made = (folder / "printed.txt").read_text()
        yield store


def stairs(outcomes: Sequence[Outcome]) -> list[tuple[int, float]]:
    """Computes the curve of the hypervolume that a complete sweep shows."""
    return list(enumerate(running_hypervolume(outcomes, builders.GOAL), start=1))


def test_new_store_is_made_with_its_folder_and_without_a_word(store: Store) -> None:
    assert store.database.exists()
    assert store.printed_when_made == ""


def test_all_that_is_printed_is_caught(tmp_path: Path) -> None:
    with printed_to(tmp_path / "printed.txt"):
        sys.stdout.write("from Python\n")
        sys.stdout.flush()
        os.write(2, b"from below\n")
    assert (tmp_path / "printed.txt").read_text() == "from Python\nfrom below\n"


def test_store_is_a_file_among_the_sweeps_unless_the_environment_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert default_uri(Path("runs")) == "http://tracking:5000"


def test_sweep_is_a_run_with_its_settings(store: Store) -> None:
    params = {f"setting.{number}": number for number in range(250)}  # MLflow takes 100 a call
    tracker = store.tracker("settings", params=params)
    run = store.client.get_run(tracker.run_id)
    assert run.info.run_name == "settings"
    assert run.info.status == "RUNNING"
    assert run.data.params == {key: str(value) for key, value in params.items()}
    assert run.info.artifact_uri.startswith(store.artifacts.as_uri())


def test_measured_trial_is_a_finished_child_with_all_it_has(store: Store) -> None:
    tracker = store.tracker("measured")
    outcome = builders.outcome("t000", 0.7, 1.5, top1_test=0.69)
    tracker.log(outcome, 0.125, 1)
    (run,) = store.children(tracker).values()
    assert (run.info.run_name, run.info.status) == ("t000", "FINISHED")
    assert run.data.tags["vitfront.trial"] == "t000"
    assert run.data.tags["vitfront.state"] == "measured"
    assert run.data.params == {key: str(value) for key, value in outcome.candidate.to_params().items()}
    measured = {"top1": 0.7, "top1_test": 0.69, "speedup": 1.5, "throughput_img_s": 150.0, "macs": 823045.0}
    assert run.data.metrics.items() >= (measured | {"seconds": 3.5, "forward_passes": 12.0}).items()
    assert run.data.metrics.keys() == {
        *("top1", "top1_low", "top1_high", "top1_test", "throughput_img_s", "speedup", "speedup_low", "speedup_high"),
        *("latency_ms_p50", "macs", "params", "sparsity", "seconds", "forward_passes", "block_drop"),
    }
    assert store.curve(run.info.run_id, "block_drop") == [(0, 1.25), (1, 0.5)]
    assert json.loads(store.artifact(run.info.run_id, "plan.json"))["blocks"][1]["keep_heads"] == [0, 2]
    assert run.info.end_time - run.info.start_time == 3500
    assert store.curve(tracker.run_id, "hypervolume") == [(1, 0.125)]


def test_metric_that_was_not_taken_is_not_logged(store: Store) -> None:
    tracker = store.tracker("no-test-set")
    tracker.log(OUTCOMES[0], 0.1, 1)
    assert "top1_test" not in store.children(tracker)["t000"].data.metrics


@pytest.mark.parametrize(
    ("state", "status"), [(State.FAILED, "FAILED"), (State.INFEASIBLE, "FINISHED"), (State.STOPPED, "FINISHED")]
)
def test_trial_without_a_measurement_says_why(store: Store, state: State, status: str) -> None:
    tracker = store.tracker(f"state-{state.value}")
    tracker.log(builders.failed("t000", state, "because\n" + 9000 * "x"), 0.0, 1)
    run = store.children(tracker)["t000"]
    assert run.info.status == status
    assert run.data.tags["vitfront.state"] == state.value
    assert run.data.tags["vitfront.reason"] == "because\n" + 4992 * "x"
    assert run.data.metrics == {"seconds": 0.5, "forward_passes": 0.0}
    assert run.data.params["exit_block"] == "2"
    assert store.client.list_artifacts(run.info.run_id) == []


def test_notes_of_the_repair_are_a_tag_of_the_trials_run(store: Store) -> None:
    tracker = store.tracker("notes")
    tracker.log(replace(OUTCOMES[0], notes=("block 0 proj: only the bias", "block 2 fc2: only the bias")), 0.1, 1)
    tracker.log(replace(OUTCOMES[1], notes=("x" * 9000,)), 0.1, 2)
    tracker.log(OUTCOMES[3], 0.1, 3)
    tags = {name: run.data.tags for name, run in store.children(tracker).items()}
    assert tags["t000"]["vitfront.notes"] == "block 0 proj: only the bias; block 2 fc2: only the bias"
    assert tags["t001"]["vitfront.notes"] == 5000 * "x"
    assert "vitfront.notes" not in tags["t003"]


def test_resume_writes_what_is_missing_and_no_second_run(store: Store) -> None:
    first = store.tracker("resumed")
    for number in (0, 1):
        first.log(OUTCOMES[number], HYPERVOLUMES[number], number + 1)
    before = store.children(first)
    again = store.tracker("resumed", done=OUTCOMES)
    again.sync(OUTCOMES, HYPERVOLUMES)
    again.sync(OUTCOMES, HYPERVOLUMES)
    assert again.run_id == first.run_id
    assert len(store.parents("resumed")) == 1
    after = store.children(again)
    assert sorted(after) == ["t000", "t001", "t002", "t003"]
    for name, run in before.items():
        assert after[name].to_dictionary() == run.to_dictionary()
    assert store.curve(again.run_id, "hypervolume") == stairs(OUTCOMES)


def test_sync_does_not_touch_what_is_complete(store: Store) -> None:
    tracker = store.tracker("complete")
    tracker.sync(OUTCOMES, HYPERVOLUMES)
    runs = [run.info.run_id for run in store.children(tracker).values()]
    for run_id in runs:
        (store.artifacts / run_id / "artifacts" / "plan.json").unlink(missing_ok=True)
    tracker.sync(OUTCOMES, HYPERVOLUMES)
    store.tracker("complete", done=OUTCOMES).sync(OUTCOMES, HYPERVOLUMES)
    assert [store.client.list_artifacts(run_id) for run_id in runs] == [[], [], [], []]


def test_call_that_failed_but_arrived_is_not_made_again(store: Store) -> None:
    tracker = store.tracker("arrived", retry_seconds=0.0)
    with store.broken("runs"), pytest.warns(UserWarning, match="cannot write to MLflow"):
        tracker.log(OUTCOMES[0], HYPERVOLUMES[0], 1)
    tags = {"mlflow.parentRunId": tracker.run_id, "vitfront.trial": "t000"}
    arrived = store.client.create_run(store.experiment, tags=tags, run_name="t000")
    tracker.log(OUTCOMES[1], HYPERVOLUMES[1], 2)
    children = store.children(tracker)
    assert sorted(children) == ["t000", "t001"]
    assert children["t000"].info.run_id == arrived.info.run_id
    assert children["t000"].info.status == "FINISHED"


@pytest.mark.parametrize("part", ["params", "metrics", "artifacts"])
def test_trial_cut_off_half_way_is_completed_in_place_on_resume(store: Store, part: str) -> None:
    killed = store.tracker(f"cut-{part}")
    with store.broken(part), pytest.warns(UserWarning, match="cannot write to MLflow"):
        killed.log(OUTCOMES[0], HYPERVOLUMES[0], 1)
    (half,) = store.children(killed).values()
    assert half.info.status == "RUNNING"
    again = store.tracker(f"cut-{part}", done=OUTCOMES[:1])
    again.sync(OUTCOMES[:1], HYPERVOLUMES[:1])
    (complete,) = store.children(again).values()
    assert complete.info.run_id == half.info.run_id
    assert complete.info.status == "FINISHED"
    assert complete.data.params["exit_block"] == "2"
    assert store.curve(complete.info.run_id, "top1") == [(0, 0.7)]
    assert store.curve(complete.info.run_id, "block_drop") == [(0, 1.25), (1, 0.5)]
    assert store.artifact(complete.info.run_id, "plan.json")
    assert store.curve(again.run_id, "hypervolume") == stairs(OUTCOMES[:1])


def test_outage_warns_once_and_is_made_up_for_when_it_ends(store: Store) -> None:
    tracker = store.tracker("outage", retry_seconds=0.0)
    tracker.log(OUTCOMES[0], HYPERVOLUMES[0], 1)
    with store.broken("runs"):
        with pytest.warns(UserWarning, match="cannot write to MLflow") as warned:
            tracker.log(OUTCOMES[1], HYPERVOLUMES[1], 2)
        tracker.log(OUTCOMES[2], HYPERVOLUMES[2], 3)  # a second warning would be an error here
    assert [warning.filename for warning in warned] == [__file__]
    tracker.log(OUTCOMES[3], HYPERVOLUMES[3], 4)
    assert sorted(store.children(tracker)) == ["t000", "t001", "t002", "t003"]
    assert store.curve(tracker.run_id, "hypervolume") == stairs(OUTCOMES)


def test_server_that_is_down_is_left_alone_until_the_next_sync(store: Store) -> None:
    tracker = store.tracker("pause", retry_seconds=1000.0)
    with store.broken("runs"), pytest.warns(UserWarning, match="cannot write to MLflow"):
        tracker.log(OUTCOMES[0], HYPERVOLUMES[0], 1)
    tracker.log(OUTCOMES[1], HYPERVOLUMES[1], 2)
    assert store.children(tracker) == {}
    tracker.sync(OUTCOMES[:2], HYPERVOLUMES[:2])
    assert sorted(store.children(tracker)) == ["t000", "t001"]
    tracker.log(OUTCOMES[2], HYPERVOLUMES[2], 3)
    assert store.curve(tracker.run_id, "hypervolume") == stairs(OUTCOMES[:3])


def test_outage_at_the_end_warns_again_and_a_second_finish_makes_up_for_it(store: Store) -> None:
    tracker = store.tracker("lost-end", retry_seconds=1000.0)
    front = Front.of("lost-end", OUTCOMES[:1], builders.GOAL)
    with store.broken("runs"):
        with pytest.warns(UserWarning, match="cannot write to MLflow"):
            tracker.log(OUTCOMES[0], HYPERVOLUMES[0], 1)
        with pytest.warns(UserWarning, match="cannot write to MLflow"):
            tracker.finish(front, OUTCOMES[:1], "", "")
    tracker.finish(front, OUTCOMES[:1], "", "")
    assert store.children(tracker)["t000"].data.tags["on_front"] == "true"
    assert store.client.get_run(tracker.run_id).info.status == "FINISHED"


def finished(store: Store, sweep: str) -> Tracker:
    tracker = store.tracker(sweep)
    tracker.sync(OUTCOMES, HYPERVOLUMES)
    tracker.finish(Front.of(sweep, OUTCOMES, builders.GOAL), OUTCOMES, "<p>\N{SNOWMAN}</p>", "id,top1\n")
    return tracker


def marked(store: Store, tracker: Tracker, tag: str) -> list[str]:
    runs = store.children(tracker)
    assert {run.data.tags[tag] for run in runs.values()} <= {"true", "false"}
    return sorted(name for name, run in runs.items() if run.data.tags[tag] == "true")


def test_finished_sweep_has_the_front_as_artifacts_metrics_and_tags(store: Store) -> None:
    tracker = finished(store, "finished")
    front = Front.of("finished", OUTCOMES, builders.GOAL)
    assert json.loads(store.artifact(tracker.run_id, "front.json")) == json.loads(json.dumps(front.to_json()))
    assert store.artifact(tracker.run_id, "front.html") == "<p>\N{SNOWMAN}</p>"
    assert store.artifact(tracker.run_id, "front.csv") == "id,top1\n"
    run = store.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {
        "hypervolume": HYPERVOLUMES[-1],
        "front_hypervolume": front.hypervolume,
        "front_points": 2.0,
        "best_top1": 0.90,
        "best_speedup": 2.0,
        "knee_top1": 0.90,
        "knee_speedup": 1.2,
    }
    assert marked(store, tracker, "on_front") == ["t001", "t003"]
    assert marked(store, tracker, "knee") == ["t003"]


def test_front_that_changes_on_resume_moves_its_tags_and_rewrites_nothing_else(store: Store) -> None:
    first = finished(store, "moved")
    before = store.children(first)
    outcomes = (*OUTCOMES, builders.outcome("t004", 0.88, 2.5))
    again = store.tracker("moved", done=OUTCOMES)
    assert store.client.get_run(again.run_id).info.status == "RUNNING"
    again.sync(outcomes, running_hypervolume(outcomes, builders.GOAL))
    again.finish(Front.of("moved", outcomes, builders.GOAL), outcomes, "", "")
    assert marked(store, again, "on_front") == ["t003", "t004"]
    assert store.curve(again.run_id, "hypervolume") == stairs(outcomes)
    after = store.children(again)
    assert store.curve(after["t001"].info.run_id, "top1") == [(0, 0.85)]
    assert after["t000"].to_dictionary() == before["t000"].to_dictionary()


def test_final_measurement_replaces_the_first_and_adds_the_test_accuracy(store: Store) -> None:
    tracker = finished(store, "remeasured")
    measurement = OUTCOMES[1].measurement
    assert measurement is not None
    final = replace(OUTCOMES[1], measurement=replace(measurement, speedup=1.9, top1_test=0.83))
    outcomes = (OUTCOMES[0], final, *OUTCOMES[2:])
    tracker.finish(Front.of("remeasured", outcomes, builders.GOAL), outcomes, "", "")
    run = store.children(tracker)["t001"]
    assert run.data.metrics.items() >= {"speedup": 1.9, "top1_test": 0.83, "top1": 0.85}.items()
    assert store.curve(run.info.run_id, "top1") == [(0, 0.85)]


def test_sweep_without_a_front_finishes_too(store: Store) -> None:
    outcomes = (builders.failed("t000"),)
    tracker = store.tracker("no-front")
    tracker.sync(outcomes, (0.0,))
    tracker.finish(Front.of("no-front", outcomes, builders.GOAL), outcomes, "", "")
    assert store.client.get_run(tracker.run_id).data.metrics == {
        "hypervolume": 0.0,
        "front_hypervolume": 0.0,
        "front_points": 0.0,
    }
    assert marked(store, tracker, "on_front") == []


def test_trial_deleted_by_hand_does_not_stop_the_end(store: Store) -> None:
    tracker = finished(store, "deleted")
    store.client.delete_run(store.children(tracker)["t000"].info.run_id)
    tracker.finish(Front.of("deleted", OUTCOMES, builders.GOAL), OUTCOMES, "", "")
    assert store.client.get_run(tracker.run_id).info.status == "FINISHED"


def test_interrupted_sweep_is_killed_and_runs_again_on_resume(store: Store) -> None:
    tracker = store.tracker("interrupted")
    tracker.interrupt()
    assert store.client.get_run(tracker.run_id).info.status == "KILLED"
    assert store.tracker("interrupted").run_id == tracker.run_id
    assert store.client.get_run(tracker.run_id).info.status == "RUNNING"


def test_sweep_begun_anew_in_an_emptied_folder_is_another_run(store: Store) -> None:
    old = finished(store, "emptied")
    new = store.tracker("emptied", done=())
    new.sync(OUTCOMES[:1], HYPERVOLUMES[:1])
    assert new.run_id != old.run_id
    assert sorted(store.children(new)) == ["t000"]
    assert store.client.get_run(old.run_id).info.status == "FINISHED"
    assert store.tracker("emptied", done=OUTCOMES[:1]).run_id == new.run_id


def test_one_name_in_two_folders_is_two_runs(store: Store, tmp_path: Path) -> None:
    first = store.tracker("twice")
    second = store.tracker("twice", run_dir=tmp_path / "twice")
    assert first.run_id != second.run_id
    assert store.tracker("twice").run_id == first.run_id


def test_settings_changed_on_resume_stand_beside_the_first(store: Store) -> None:
    store.tracker("settings-changed", params={"trials": 20, "seed": 0})
    tracker = store.tracker("settings-changed", params={"trials": 40, "seed": 0, "budget": "10m"})
    data = store.client.get_run(tracker.run_id).data
    assert data.params == {"trials": "20", "seed": "0", "budget": "10m"}
    resumed = {key: value for key, value in data.tags.items() if key.startswith("vitfront.resumed.")}
    assert resumed == {"vitfront.resumed.trials": "40"}


def test_all_pages_of_runs_are_read(store: Store) -> None:
    tracker = finished(store, "pages")
    runs = all_runs(store.client, [store.experiment], "mlflow.parentRunId", tracker.run_id, page_size=1)
    assert sorted(run.info.run_name for run in runs) == ["t000", "t001", "t002", "t003"]


def test_name_with_quote_is_found_again(store: Store) -> None:
    assert store.tracker("it's").run_id == store.tracker("it's").run_id


def test_sweeps_that_begin_together_use_the_store_in_turn(store: Store) -> None:
    begin = Thread(target=store.tracker, args=("turn",))
    with alone_in(store.folder / "runs"):
        begin.start()
        begin.join(timeout=0.3)
        assert begin.is_alive()
    begin.join()
    assert len(store.parents("turn")) == 1


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/none/mlflow.db", "sqlite:////etc/hostname"])
def test_store_that_cannot_be_used_is_named_in_one_line(tmp_path: Path, uri: str) -> None:
    with pytest.raises(SweepError, match=f"^MLflow cannot be used at {uri} ") as raised:
        Tracker(uri, tmp_path, "s", {}, run_dir=tmp_path, done=())
    assert "\n" not in str(raised.value)


def test_healthy_sweep_gives_no_warning(store: Store) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        finished(store, "quiet")
    assert [run.info.status for run in store.parents("quiet")] == ["FINISHED"]


def test_tracking_server_shows_its_own_pages(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="http://tracking:5000 is a tracking server"):
        serve_ui("http://tracking:5000", tmp_path, 5000)
