"""One sweep of trials that train, with real Ray and MLflow: stopped in the middle of a training, and gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient

from pruning.artifact import load
from pruning.measure.accuracy import predict, top1
from search.commands.run import run_sweep
from search.config import Config
from search.front import contenders
from search.outcome import Outcome, State
from search.records import ledger
from search.records.folder import Folder
from search.records.tracking import default_uri
from search.trial.inputs import load_inputs
from tests.integration import sweeps
from tests.integration.sweeps import Watcher

NUM_EPOCHS = 4
TRAINING = {"epochs": NUM_EPOCHS, "batch_size": 32, "max_shift": 0}


@dataclass(frozen=True)
class Swept:
    """A sweep that was stopped after the second epoch of its first trial, and then ended."""

    runs: Path
    config: Config
    stopped: Watcher
    left_behind: list[str]
    ended: Watcher
    outcomes: tuple[Outcome, ...]

    @property
    def folder(self) -> Folder:
        return Folder(self.runs, self.config.name)


@pytest.fixture(scope="module")
def one_worker() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def swept(one_worker: None, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    runs = tmp_path_factory.mktemp("runs")
    config = sweeps.config(
        None,
        space={"method": ["learned", "unstructured"], "exit_block": [1, sweeps.DEPTH], "recovery": "distill"},
        learned=TRAINING, distill=TRAINING, search={"trials": 4},
    )  # fmt: skip

    def stop(trial_id: str, epoch: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    stopped = Watcher(on_epoch=stop)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config, runs, stopped)
    folder = Folder(runs, config.name)
    left_behind = sorted(path.name for path in folder.checkpoints.iterdir())
    ended = Watcher()
    run_sweep(config, runs, ended)
    return Swept(runs, config, stopped, left_behind, ended, ledger.read(folder.ledger))


def test_stopped_training_goes_on_at_its_next_epoch(swept: Swept) -> None:
    assert swept.stopped.epochs == [("t000", 1), ("t000", 2)]
    assert swept.left_behind == ["t000.pt"]
    assert swept.ended.started_ids == ["t000", "t001", "t002", "t003"]
    first = [epoch for trial_id, epoch in swept.ended.epochs if trial_id == "t000"]
    assert first[-1] == NUM_EPOCHS and first[0] in (3, 4)  # a worker may be an epoch ahead of what is written
    assert len(swept.outcomes[0].history) == NUM_EPOCHS
    assert not any(swept.folder.checkpoints.iterdir())


def test_learned_trial_puts_a_point_for_each_exit_into_the_ledger(swept: Swept) -> None:
    learned = [outcome for outcome in swept.outcomes if outcome.candidate.method == "learned"]
    trials = {outcome.trial for outcome in learned}
    assert len(trials) >= 2
    for trial in trials:
        exits = {
            outcome.id: outcome.plan.exit_block
            for outcome in learned
            if outcome.trial == trial and outcome.plan is not None
        }
        assert exits == {trial: 3, f"{trial}.2": 2, f"{trial}.1": 1}
    assert {outcome.trial for outcome in swept.outcomes} == {f"t{number:03d}" for number in range(4)}
    assert all(outcome.state is State.MEASURED for outcome in swept.outcomes)


def test_a_finished_sweep_is_not_run_again(swept: Swept) -> None:
    watcher = Watcher()
    record = run_sweep(swept.config, swept.runs, watcher)
    assert watcher.num_stages == 0 and record["trials"] == 4


def test_weights_are_kept_for_those_that_may_be_on_the_front_alone(swept: Swept) -> None:
    kept = {path.stem for path in swept.folder.weights.iterdir()}
    assert kept == {outcome.id for outcome in contenders(swept.outcomes) if outcome.has_weights}


def test_models_of_the_front_are_those_that_were_trained(swept: Swept) -> None:
    val = load_inputs(swept.config, swept.runs).splits.val
    trained = {outcome.id: outcome for outcome in swept.outcomes if outcome.has_weights}
    points = [point for point in swept.folder.read_front()["points"] if point["id"] in trained]
    assert points
    for point in points:
        model, _ = load(swept.folder.models / point["id"])
        assert top1(predict(model, val), val.labels) == point["top1"] == trained[point["id"]].measurement.top1  # type: ignore[union-attr]


def test_epochs_are_curves_in_mlflow(swept: Swept) -> None:
    client = MlflowClient(tracking_uri=default_uri(swept.runs))
    (experiment,) = [each for each in client.search_experiments() if each.name == "vitfront"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"tiny", *(outcome.id for outcome in swept.outcomes)}
    curve = client.get_metric_history(runs["t000"].info.run_id, "train_loss")
    assert [point.step for point in curve] == [1, 2, 3, 4]
    assert [point.value for point in curve] == [epoch["loss"] for epoch in swept.outcomes[0].history]


def test_trials_of_one_plan_are_trained_once_also_by_a_resumed_sweep(one_worker: None, tmp_path: Path) -> None:
    """Nothing may go, so all have the dense shape, cut at the first block: who trains it first trains it for all."""
    space = {"exit_block": 1, "target_ratio": 1.0, "recovery": "distill"}

    def run(num_trials: int) -> tuple[dict[str, Any], Watcher]:
        watcher = Watcher()
        config = sweeps.config(None, space=space, distill=TRAINING, search={"trials": num_trials})
        return run_sweep(config, tmp_path, watcher), watcher

    for num_trials, trained in ((2, {"t000"}), (4, set())):
        record, watcher = run(num_trials)
        assert {trial_id for trial_id, _ in watcher.epochs} == trained
        outcomes = ledger.read(Folder(tmp_path, "tiny").ledger)
        assert [outcome.same_as for outcome in outcomes] == [None, *["t000"] * (num_trials - 1)]
        assert [path.stem for path in Folder(tmp_path, "tiny").weights.iterdir()] == ["t000"]
        (point,) = record["points"]
        assert point["top1"] == outcomes[0].measurement.top1  # type: ignore[union-attr]
