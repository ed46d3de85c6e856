"""Ray that a sweep starts for itself and Ray that it is given: a sweep stopped by Ctrl-C goes on on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from search.commands.run import run_sweep
from search.config import Config
from search.errors import SweepError
from search.records import ledger
from search.records.folder import Folder
from search.records.tracking import default_uri
from tests.integration import sweeps
from tests.integration.sweeps import Watcher

ROOT = Path(__file__).parents[2]
# Whoever runs the tests in the background has Ctrl-C ignored, and the processes started here inherit that.
RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from search.cli import main
main(["run", "tiny.yaml"])
"""


@dataclass(frozen=True)
class Stopped:
    """A sweep of `vitfront run` that got Ctrl-C as soon as its first trial had ended."""

    runs: Path
    config: Config
    exit_code: int
    stdout: str
    stderr: str
    book: bytes
    """Its ledger then."""
    mlflow_status: str


def status_of_the_sweep(runs: Path) -> str:
    client = MlflowClient(tracking_uri=default_uri(runs))
    experiment = client.get_experiment_by_name("vitfront")
    assert experiment is not None
    [parent] = client.search_runs([experiment.experiment_id], "tags.`vitfront.sweep` = 'tiny'")
    status: str = parent.info.status
    return status


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    folder = tmp_path_factory.mktemp("stopped")
    config = sweeps.config(None, search={"trials": 50})
    (folder / "tiny.yaml").write_text(config.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith(("1/50 t000 ", "no further trial starts")):
                process.send_signal(signal.SIGINT)  # the second leaves at once
        stdout = process.stdout.read()
    runs = folder / "runs"
    return Stopped(
        runs=runs,
        config=config,
        exit_code=process.returncode,
        stdout=stdout,
        stderr="".join(lines),
        book=Folder(runs, "tiny").ledger.read_bytes(),
        mlflow_status=status_of_the_sweep(runs),
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of one node that nobody is connected to."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def test_ctrl_c_ends_a_sweep_without_a_traceback_and_keeps_what_it_has(stopped: Stopped) -> None:
    assert stopped.exit_code == 130
    assert stopped.stdout == ""
    # The progress ("1/50 done, ...") is no line of a trial; on a busy machine it was seen once.
    told = [line.split(" ")[0] for line in stopped.stderr.splitlines() if " done, " not in line]
    assert told[:3] == ["training", "50", "1/50"]
    assert "no" in told  # further trial starts
    assert set(told[3:]) <= {"no", "2/50", "3/50"}
    assert 1 <= stopped.book.count(b"\n") <= 3
    assert stopped.mlflow_status == "KILLED"
    assert sorted(path.name for path in Folder(stopped.runs, "tiny").path.iterdir()) == [
        "config.yaml",
        "outcomes.jsonl",
    ]


def test_sweep_goes_on_on_the_cluster_at_the_address(stopped: Stopped, cluster: Cluster) -> None:
    used = []
    watcher = Watcher(on_started=lambda _: used.append(ray.get_runtime_context().gcs_address))
    search = stopped.config.search.model_copy(update={"trials": 2})
    config = stopped.config.model_copy(update={"search": search})
    record = run_sweep(config, stopped.runs, watcher, address=cluster.address)
    assert set(used) == {cluster.address}
    assert not ray.is_initialized()
    assert watcher.started_ids == ["t001"]
    folder = Folder(stopped.runs, "tiny")
    assert folder.ledger.read_bytes().startswith(stopped.book)
    assert [outcome.id for outcome in ledger.read(folder.ledger)] == ["t000", "t001"]
    assert record["trials"] == 2
    assert record["ended_by"] == "trials"
    assert status_of_the_sweep(stopped.runs) == "FINISHED"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no.where.invalid:6379", "ray:/x"])
def test_address_without_a_cluster_is_one_line_and_leaves_nothing(tmp_path: Path, address: str) -> None:
    with pytest.raises(SweepError, match=f"^no Ray cluster at '{address}': ") as raised:
        run_sweep(sweeps.config(None), tmp_path / "runs", Watcher(), address=address)
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "runs").iterdir()) == []
