"""Helpers for the tests of whole sweeps: a recipe of seconds, a watcher, a model that dies when it is told to."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import timm
from mlflow import MlflowClient
from mlflow.entities import Run
from timm.models import register_model
from torch import nn

from search.config import Config
from search.front import Front
from search.outcome import Candidate, Outcome
from search.records import ledger
from search.records.folder import Folder
from search.records.store import default_uri

ROOT = Path(__file__).parents[2]
DEPTH = 3
NUM_TRIALS = 4

# Whoever runs the tests in the background has Ctrl-C ignored, and the processes started here inherit that.
RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import tests.integration.sweeps
from search.cli import main
main(["run", "recipe.yaml"])
"""


def start_ray() -> None:
    """Ray for all sweeps, so that they share its workers; one core, so that trials follow each other."""
    if not ray.is_initialized():
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def start_vitfront(config: Config, folder: Path) -> subprocess.Popen[str]:
    """`vitfront run` in a process of its own, below `folder`; its output is read from pipes."""
    (folder / "recipe.yaml").write_text(config.to_yaml())
    return subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@register_model
def vit_that_may_die(*, die_if: str, **other: Any) -> nn.Module:
    """timm's vit_tiny_patch16_224, but a worker that runs it while the file `die_if` exists removes it and dies."""
    names = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # told to every model by timm
    model = timm.create_model("vit_tiny_patch16_224", **{k: v for k, v in other.items() if k not in names})

    def die(*_: Any) -> None:  # local, so that it reaches the workers as code: they cannot import the tests
        if os.path.exists(die_if):
            os.unlink(die_if)
            os._exit(1)

    model.patch_embed.register_forward_pre_hook(die)
    return model


def config(die_if: Path | None, **sections: dict[str, Any]) -> Config:
    """A sweep of digits that takes seconds; of a model that never dies if it is not told when."""
    args = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    args |= {"embed_dim": 32, "depth": DEPTH, "num_heads": 2} | ({} if die_if is None else {"die_if": str(die_if)})
    name = "vit_tiny_patch16_224" if die_if is None else "vit_that_may_die"
    training = {"epochs": 10, "batch_size": 32, "max_shift": 0, "max_turn": 0}
    data = {"dataset": "digits", "test": "test", "mean": [0.3], "std": [0.38]}
    data |= {"calibration_images": 200, "probe_images": 200, "val_images": 64, "test_images": 64}
    record: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": name, "args": args, "training": training},
        "data": data,
        "exits": {"epochs": 5},
        "space": {"method": "cascade", "token_reduction": "lfe", "round_to": 1, "exit_block": [2, DEPTH]},
        "search": {"trials": 4},
        "cascade": {"num_levels": 3},
        "measure": {"batch_size": 128, "num_rounds": 9, "precision": "float32"},
    }
    for section, changes in sections.items():
        record[section] = record.get(section, {}) | changes
    return Config.from_dict(record)


class Watcher:
    """An observer that remembers, and does what a test wants when a trial is suggested or has ended."""

    def __init__(
        self,
        on_started: Callable[[str], None] = lambda trial_id: None,
        on_finished: Callable[[Outcome], None] = lambda outcome: None,
        on_epoch: Callable[[str, int], None] = lambda trial_id, epoch: None,
        on_prepared: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_started, self._on_finished, self._on_epoch = on_started, on_finished, on_epoch
        self._on_prepared = on_prepared
        self.num_stages = 0
        self.prepared_s: list[float] = []
        self.notes: list[str] = []
        self.started_ids: list[str] = []
        self.finished_ids: list[str] = []
        self.hypervolumes: list[float] = []
        self.epochs: list[tuple[str, int]] = []

    def stage(self, text: str) -> None:
        self.num_stages += 1

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None:
        self.num_stages += 1

    def prepared(self, seconds: float) -> None:
        self.prepared_s.append(seconds)
        self._on_prepared()

    def started(self, trial_id: str, candidate: Candidate) -> None:
        self.started_ids.append(trial_id)
        self._on_started(trial_id)

    def epoch(self, trial_id: str, progress: Mapping[str, float]) -> None:
        self.epochs.append((trial_id, int(progress["epoch"])))
        self._on_epoch(*self.epochs[-1])

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        self.finished_ids.append(outcome.id)
        self.hypervolumes.append(hypervolume)
        self._on_finished(outcome)

    def interrupted(self) -> None:
        self.num_stages += 1


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was when it had ended."""

    runs: Path
    config: Config
    watcher: Watcher
    front: Front

    @property
    def folder(self) -> Folder:
        return Folder(self.runs, self.config.name)

    @property
    def record(self) -> dict[str, Any]:
        return record_of(self.front)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return ledger.read(self.folder.ledger)

    def with_trials(self, num_trials: int) -> Config:
        search = self.config.search.model_copy(update={"trials": num_trials})
        return self.config.model_copy(update={"search": search})

    def copy(self, runs: Path) -> Sweep:
        """The sweep as if it had been run in another folder, which must not be there."""
        copy_runs(self.runs, runs)
        return replace(self, runs=runs)

    def mlflow(self) -> tuple[MlflowClient, list[Run], dict[str, Run]]:
        """The client, the sweep's runs, and the trials' runs by name."""
        client = MlflowClient(tracking_uri=default_uri(self.runs))
        experiment = client.get_experiment_by_name("vitfront")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], max_results=1000)
        parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
        assert len({run.info.run_name for run in children}) == len(children)
        return client, parents, {run.info.run_name: run for run in children}


def record_of(front: Front) -> dict[str, Any]:
    """The content of front.json."""
    record: dict[str, Any] = json.loads(json.dumps(front.to_json()))
    return record


def copy_runs(runs: Path, to: Path) -> None:
    """Copies all sweeps and their MLflow as if they had been run in the folder `to`.

    MLflow knows absolute paths, and remembers for each id of a run where its artifacts are: the copies get new ids.
    """
    shutil.copytree(runs, to, ignore=shutil.ignore_patterns("mlflow.db*"))
    with closing(sqlite3.connect(runs / "mlflow.db")) as old, closing(sqlite3.connect(to / "mlflow.db")) as new:
        old.backup(new)  # mlflow has it open
        ids = {before: uuid.uuid4().hex for (before,) in new.execute("SELECT run_uuid FROM runs")}
        tables = [name for (name,) in new.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [(table, row[1]) for table in tables for row in new.execute(f"PRAGMA table_info({table})")]
        for before, after in [*ids.items(), (str(runs), str(to))]:
            for table, column in columns:
                where = f"WHERE instr({column}, ?)"
                new.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?) {where}", (before, after, before))
        new.commit()
    for artifacts in list((to / "mlartifacts").iterdir()):
        artifacts.rename(artifacts.with_name(ids[artifacts.name]))


def copy_cache(runs: Path, to: Path) -> None:
    """Copies the dense weights and the profile alone: for other sweeps of the same model and images."""
    shutil.copytree(runs / ".cache", to / ".cache")
