"""One sweep of trials that train, with real Ray and MLflow: stopped in the middle of a training, and gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pruning.artifact import load
from pruning.measure.accuracy import predict, top1
from search.commands.run import run_sweep
from search.config import Config
from search.front import contenders
from search.outcome import Outcome, State
from search.records import ledger
from search.records.folder import Folder
from search.records.store import default_uri
from search.trial.inputs import load_inputs
from tests.integration import sweeps
from tests.integration.sweeps import Sweep, Watcher, copy_cache, record_of

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("one_node")]

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
def swept(first: Sweep, flag: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    runs = tmp_path_factory.mktemp("trained")
    copy_cache(first.runs, runs)
    config = sweeps.config(
        flag,
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
    front = run_sweep(swept.config, swept.runs, watcher)
    assert watcher.num_stages == 1 and front.trials == 4  # the inputs are looked at: they may have changed


def test_weights_are_kept_for_those_that_may_be_on_the_front_alone(swept: Swept) -> None:
    kept = {path.stem for path in swept.folder.weights.iterdir()}
    assert kept == {
        outcome.id for outcome in contenders(swept.outcomes, swept.folder.read_front().goal) if outcome.has_weights
    }


def test_models_of_the_front_are_those_that_were_trained(swept: Swept) -> None:
    val = load_inputs(swept.config, swept.runs).splits.val
    trained = {outcome.id: outcome for outcome in swept.outcomes if outcome.has_weights}
    points = [point for point in swept.folder.read_front().points if point.id in trained]
    assert points
    for point in points:
        model, _ = load(swept.folder.models / point.id)
        assert top1(predict(model, val), val.labels) == top1_of(point) == top1_of(trained[point.id])


def test_epochs_are_curves_in_mlflow(swept: Swept) -> None:
    client = MlflowClient(tracking_uri=default_uri(swept.runs))
    (experiment,) = [found for found in client.search_experiments() if found.name == "vitfront"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"tiny", *(outcome.id for outcome in swept.outcomes)}
    curve = client.get_metric_history(runs["t000"].info.run_id, "train_loss")
    assert [point.step for point in curve] == [1, 2, 3, 4]
    assert [point.value for point in curve] == [epoch["loss"] for epoch in swept.outcomes[0].history]


def top1_of(outcome: Outcome) -> float:
    assert outcome.measurement is not None
    return outcome.measurement.top1


@pytest.fixture(scope="module")
def of_one_plan(first: Sweep, flag: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep that ended because it found no more: nothing may go, so all have the dense shape, cut at a block."""
    runs = tmp_path_factory.mktemp("of-one-plan")
    copy_cache(first.runs, runs)
    space = {"exit_block": 1, "target_ratio": 1.0, "recovery": "distill"}
    search = {"trials": 50, "patience": 2, "min_gain": 1.0}
    config = sweeps.config(flag, space=space, distill=TRAINING, search=search)
    watcher = Watcher()
    return Sweep(runs, config, watcher, run_sweep(config, runs, watcher))


def test_search_that_finds_no_more_ends_and_is_finished(of_one_plan: Sweep) -> None:
    assert of_one_plan.front.ended_by == "saturation"
    assert 3 <= of_one_plan.front.trials < 10
    again = Watcher()
    assert record_of(run_sweep(of_one_plan.config, of_one_plan.runs, again)) == of_one_plan.record
    assert again.started_ids == []


def test_trials_of_one_plan_are_trained_once_also_by_a_resumed_sweep(of_one_plan: Sweep, tmp_path: Path) -> None:
    """The first trial of a plan trains it for all; a sweep that is resumed to find more goes on to its last trial."""
    longer = of_one_plan.copy(tmp_path / "runs").with_trials(of_one_plan.front.trials + 2)
    config = longer.model_copy(update={"search": longer.search.model_copy(update={"patience": 0})})
    watcher = Watcher()
    front = run_sweep(config, tmp_path / "runs", watcher)
    assert (front.trials, front.ended_by) == (of_one_plan.front.trials + 2, "trials")
    resumed = Sweep(tmp_path / "runs", config, watcher, front)
    for sweep, trained in ((of_one_plan, {"t000"}), (resumed, set())):
        assert {trial_id for trial_id, _ in sweep.watcher.epochs} == trained
        outcomes = sweep.outcomes
        assert [outcome.same_as for outcome in outcomes] == [None, *["t000"] * (sweep.front.trials - 1)]
        assert [path.stem for path in sweep.folder.weights.iterdir()] == ["t000"]
        (point,) = sweep.front.points
        assert top1_of(point) == top1_of(outcomes[0])
