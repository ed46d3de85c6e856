"""Ray that a sweep starts for itself and Ray that it is given: a sweep stopped by Ctrl-C goes on on a cluster."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pytest
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from search.commands.run import run_sweep
from search.config import Config
from search.errors import SweepError
from search.records import ledger
from search.records.folder import Folder
from search.records.store import default_uri
from tests.integration import sweeps
from tests.integration.sweeps import Watcher

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@dataclass(frozen=True)
class Stopped:
    """A sweep of `vitfront run` that got Ctrl-C as soon as its first trial had ended, and once more at once."""

    runs: Path
    config: Config
    exit_code: int
    stdout: str
    stderr: str
    book_before: bytes
    """Its ledger when it got the first."""
    book: bytes
    """Its ledger in the end."""
    files: list[str]
    """Names of the files in its folder in the end."""
    mlflow_status: str


def status_of_the_sweep(runs: Path) -> str:
    client = MlflowClient(tracking_uri=default_uri(runs))
    experiment = client.get_experiment_by_name("vitfront")
    assert experiment is not None
    [parent] = client.search_runs([experiment.experiment_id], "tags.`vitfront.sweep` = 'tiny'")
    status: str = parent.info.status
    return status


def interrupt(process: subprocess.Popen[str]) -> None:
    """Sends Ctrl-C until the process ends: Python loses one that comes while it cleans up an object."""
    while process.returncode is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    folder = tmp_path_factory.mktemp("stopped")
    config = sweeps.config(None, search={"trials": 50})
    runs, books = folder / "runs", []
    with sweeps.start_vitfront(config, folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("1/50 "):
                books.append(Folder(runs, "tiny").ledger.read_bytes())
                process.send_signal(signal.SIGINT)
            if line.startswith("no further trial starts"):
                Thread(target=interrupt, args=(process,)).start()
        stdout = process.stdout.read()
    return Stopped(
        runs=runs,
        config=config,
        exit_code=process.returncode,
        stdout=stdout,
        stderr="".join(lines),
        book_before=books[0],
        book=Folder(runs, "tiny").ledger.read_bytes(),
        files=sorted(path.name for path in Folder(runs, "tiny").path.iterdir()),
        mlflow_status=status_of_the_sweep(runs),
    )


@pytest.fixture(scope="module")
def no_ray() -> None:
    """Ray of other files is ended, so that a sweep has to find its own."""
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster(no_ray: None) -> Iterator[Cluster]:
    """A cluster of one node that nobody is connected to."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def test_second_ctrl_c_ends_a_sweep_at_once_without_a_traceback_and_loses_nothing(stopped: Stopped) -> None:
    assert stopped.exit_code == 130
    assert stopped.stdout == ""
    # The progress ("1/50 done, ...") is no line of a trial; on a busy machine it was seen once.
    told = [line.split(" ")[0] for line in stopped.stderr.splitlines() if " done, " not in line]
    assert told[:3] == ["training", "dense", "50"]
    assert {"1/50", "no"} <= set(told[3:])  # no further trial starts
    # rich writes a line once more if Ctrl-C comes after it was written and before its buffer is emptied.
    assert set(told[3:]) <= {"all", "no", "1/50", "2/50", "3/50"}  # all is prepared
    assert 1 <= stopped.book.count(b"\n") <= 3
    assert stopped.book_before.count(b"\n") >= 1
    assert stopped.book.startswith(stopped.book_before)
    assert stopped.mlflow_status == "KILLED"
    assert stopped.files == ["config.yaml", "outcomes.jsonl"]


def test_sweep_goes_on_on_the_cluster_at_the_address(stopped: Stopped, cluster: Cluster) -> None:
    used = []
    watcher = Watcher(on_started=lambda _: used.append(ray.get_runtime_context().gcs_address))
    num_before = stopped.book.count(b"\n")
    search = stopped.config.search.model_copy(update={"trials": num_before + 1})
    config = stopped.config.model_copy(update={"search": search})
    front = run_sweep(config, stopped.runs, watcher, address=cluster.address)
    assert set(used) == {cluster.address}
    assert not ray.is_initialized()
    assert watcher.started_ids == [f"t{num_before:03d}"]
    folder = Folder(stopped.runs, "tiny")
    assert folder.ledger.read_bytes().startswith(stopped.book)
    assert [outcome.id for outcome in ledger.read(folder.ledger)] == [
        f"t{number:03d}" for number in range(num_before + 1)
    ]
    assert (front.trials, front.ended_by) == (num_before + 1, "trials")
    assert status_of_the_sweep(stopped.runs) == "FINISHED"


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("address", ["127.0.0.1:9", "no.where.invalid:6379", "ray:/x"])
def test_address_without_a_cluster_is_one_line_and_leaves_nothing(tmp_path: Path, address: str) -> None:
    with pytest.raises(SweepError, match=f"^no Ray cluster at '{address}': ") as raised:
        run_sweep(sweeps.config(None), tmp_path / "runs", Watcher(), address=address)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
