"""One sweep with real Ray and a real MLflow store: a worker is killed, the disk is full, a resume, and what is left."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from pruning.artifact import load
from pruning.data import Images
from pruning.errors import ModelError, VitfrontError
from pruning.fingerprints import fingerprint_of_weights
from pruning.measure.cost import count_macs, count_params
from pruning.model.anatomy import examine
from pruning.plan import Plan
from search.commands.run import run_sweep
from search.errors import ConfigError, SweepError
from search.front import contenders, running_hypervolume
from search.outcome import State, idle_share
from search.pareto import non_dominated
from search.trial.inputs import load_inputs
from tests.integration import sweeps
from tests.integration.sweeps import NUM_TRIALS, Sweep, Watcher, record_of

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("one_node")]

POINT = {
    *("id", "top1", "top1_low", "top1_high", "top1_test", "throughput_img_s", "speedup", "speedup_low", "speedup_high"),
    *(
        "latency_ms_p50",
        "macs",
        "params",
        "sparsity",
        "recall_at_1",
        "mean_average_precision",
        "num_images",
        "candidate",
        "plan",
    ),
}


def images(sweep: Sweep, split: str) -> Images:
    splits = load_inputs(sweep.config, sweep.runs).splits
    found = getattr(splits, split)
    assert isinstance(found, Images)
    return found


def accuracy(model: torch.nn.Module, images: Images) -> float:
    with torch.no_grad():
        logits = model(images.normalized(slice(None)))
    return float((logits.argmax(dim=1) == images.labels).double().mean())


def history(client: MlflowClient, run: Run, metric: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric))


def artifact(client: MlflowClient, run: Run, name: str) -> str:
    return Path(client.download_artifacts(run.info.run_id, name)).read_text(encoding="utf-8")


def test_killed_worker_leaves_a_failed_outcome_and_the_sweep_goes_on(first: Sweep, flag: Path) -> None:
    assert not flag.exists()
    assert [outcome.id for outcome in first.outcomes] == [f"t{number:03d}" for number in range(NUM_TRIALS)]
    [broken] = [outcome for outcome in first.outcomes if outcome.state is not State.MEASURED]
    assert broken.state is State.FAILED
    assert broken.reason is not None
    assert broken.reason.startswith("the worker broke: ")
    assert "died" in broken.reason
    assert "\n" not in broken.reason


def test_watcher_is_told_of_every_trial(first: Sweep) -> None:
    ids = [outcome.id for outcome in first.outcomes]
    assert first.watcher.started_ids == first.watcher.finished_ids == ids
    # Their start is half the accuracy of the dense model, and its speed, which is 1 in every run.
    assert first.watcher.hypervolumes == list(running_hypervolume(first.outcomes, first.front.goal))


def test_watcher_is_told_once_that_all_is_prepared(first: Sweep) -> None:
    [seconds] = first.watcher.prepared_s
    assert seconds > 0


def test_dense_accuracy_is_told_once_before_the_trials(first: Sweep) -> None:
    dense = first.outcomes[0].measurement
    assert dense is not None
    interval = f"{dense.top1_low:.3f} to {dense.top1_high:.3f}"
    line, *notes = first.watcher.notes
    assert line == f"dense top-1 on val {dense.top1:.3f} ({interval}, 64 images)"
    assert all(note.startswith("note: ") for note in notes)


def test_dense_model_was_tried_first_and_has_learned(first: Sweep) -> None:
    dense = first.outcomes[0]
    assert (dense.candidate.target_ratio, set(dense.candidate.drop_budget)) == (1.0, {0.0})
    assert dense.measurement is not None
    assert dense.measurement.top1 == first.record["dense"]["top1"] > 0.5
    assert dense.measurement.speedup_low == dense.measurement.speedup_high == 1.0  # its shape was not timed again


def test_every_block_of_every_outcome_kept_its_budget(first: Sweep) -> None:
    for outcome in first.outcomes:
        if outcome.state is State.MEASURED:
            budgets = outcome.candidate.drop_budget[: outcome.candidate.exit_block]
            assert all(drop <= budget for drop, budget in zip(outcome.block_drops, budgets, strict=True))


def test_folder_of_a_sweep_holds_its_files_and_no_others(first: Sweep) -> None:
    assert {path.name for path in first.folder.path.iterdir()} == {
        *("config.yaml", "outcomes.jsonl", "front.json", "front.csv", "models"),
    }
    assert {path.name for path in first.runs.iterdir()} == {"tiny", ".cache", "mlflow.db", "mlartifacts"}
    recorded = first.folder.read_config()
    assert recorded.model_copy(update={"fingerprints": None}) == first.config


def test_front_json_is_as_documented(first: Sweep) -> None:
    record = json.loads(first.folder.front.read_text(encoding="utf-8"))
    assert record == first.record
    assert record.keys() >= {"name", "objectives", "dense", "reference_point", "hypervolume", "points"}
    assert (record["name"], record["trials"]) == ("tiny", NUM_TRIALS)
    assert record["objectives"] == [
        {"name": "top1", "direction": "maximize"},
        {"name": "speedup", "direction": "maximize"},
    ]
    assert all(point.keys() == POINT for point in record["points"])
    assert all(point["num_images"] is None for point in record["points"])  # they were measured on all
    assert record["knee"] in [point["id"] for point in record["points"]]
    assert record["conditions"]["batch_size"] == 128
    assert 0 < record["busy_share"] <= 1


def test_config_front_and_mlflow_hold_the_fingerprints_of_the_inputs(first: Sweep) -> None:
    fingerprints = first.folder.read_config().fingerprints
    assert fingerprints is not None
    record = fingerprints.model_dump(exclude_none=True)
    assert record.keys() >= {"first_weights", "weights", "preprocessing", "train", "val", "test"}
    assert first.record["fingerprints"] == record
    inputs = load_inputs(first.config, first.runs)
    assert inputs.fingerprints == fingerprints
    assert record["weights"] == fingerprint_of_weights(inputs.model.state_dict())
    _, [parent], _ = first.mlflow()
    params = parent.data.params
    assert {key: params[f"fingerprints.{key}"] for key in record} == record


def test_points_are_those_that_no_other_beats_and_run_from_slow_to_fast(first: Sweep) -> None:
    points = first.record["points"]
    throughput = [point["throughput_img_s"] for point in points]
    assert throughput == sorted(throughput)
    values = torch.tensor([[point["top1"], point["speedup"]] for point in points]).double().numpy()
    assert list(non_dominated(values)) == list(range(len(points)))
    assert {point["id"] for point in points} <= {outcome.id for outcome in contenders(first.outcomes, first.front.goal)}


def test_dense_model_and_every_point_have_a_test_accuracy(first: Sweep) -> None:
    for measured in (first.record["dense"], *first.record["points"]):
        assert 0 <= measured["top1_test"] <= 1


def test_table_has_the_points_and_their_parameters(first: Sweep) -> None:
    with first.folder.table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [point["id"] for point in first.record["points"]]
    for row, point in zip(rows, first.record["points"], strict=True):
        assert float(row["top1"]) == point["top1"]
        assert float(row["speedup"]) == point["speedup"]
        assert int(row["macs"]) == point["macs"]
        assert int(row["exit_block"]) == point["candidate"]["exit_block"]
        assert float(row["drop_budget.0"]) == point["candidate"]["drop_budget"][0]


def test_every_point_has_a_model_that_does_what_the_front_says(first: Sweep) -> None:
    points = {point["id"]: point for point in first.record["points"]}
    assert {path.name for path in first.folder.models.iterdir()} == points.keys()
    for id, point in points.items():
        assert {path.name for path in (first.folder.models / id).iterdir()} == {"plan.json", "model.safetensors"}
        model, description = load(first.folder.models / id)
        assert description.plan == Plan.from_json(point["plan"])
        assert accuracy(model, images(first, "val")) == pytest.approx(point["top1"])
        assert accuracy(model, images(first, "test")) == pytest.approx(point["top1_test"])
        assert count_params(model) == point["params"]


def test_dense_weights_and_all_that_was_prepared_are_kept_for_other_sweeps(first: Sweep) -> None:
    inputs = load_inputs(first.config, first.runs)
    assert inputs.trained
    *parts, weights = sorted((first.runs / ".cache").iterdir(), key=lambda path: (path.suffix, path.name))
    assert weights == inputs.cache
    kinds = [path.name.rsplit("-", 1)[0].rstrip("0123456789") for path in parts]
    assert sorted(set(kinds)) == ["curves", "exits", "profile-lfe", "sensitivity-"]
    assert accuracy(inputs.model, inputs.splits.val) == pytest.approx(first.record["dense"]["top1"])
    anatomy = examine(inputs.model)
    whole = first.outcomes[0].plan
    assert whole is not None
    assert count_macs(anatomy, whole) == first.record["dense"]["macs"]


def test_mlflow_has_one_run_with_the_settings_the_front_and_its_picture(first: Sweep) -> None:
    client, [parent], _ = first.mlflow()
    assert (parent.info.run_name, parent.info.status) == ("tiny", "FINISHED")
    assert parent.data.params["search.trials"] == str(NUM_TRIALS)
    assert parent.data.metrics["front_points"] == len(first.record["points"])
    assert parent.data.metrics["front_hypervolume"] == pytest.approx(first.record["hypervolume"])
    assert artifact(client, parent, "front.csv") == first.folder.table.read_text(encoding="utf-8")
    assert json.loads(artifact(client, parent, "front.json")) == json.loads(first.folder.front.read_text())
    html = artifact(client, parent, "front.html")
    assert html.lstrip().lower().startswith(("<!doctype html", "<html"))
    assert all(outcome.id in html for outcome in first.outcomes if outcome.state is State.MEASURED)


def test_mlflow_has_the_hypervolume_after_each_trial(first: Sweep) -> None:
    client, [parent], _ = first.mlflow()
    assert history(client, parent, "hypervolume") == list(enumerate(first.watcher.hypervolumes, start=1))


def test_mlflow_has_a_child_for_every_trial(first: Sweep) -> None:
    client, [parent], children = first.mlflow()
    assert sorted(children) == [outcome.id for outcome in first.outcomes]
    points = {point["id"]: point for point in first.record["points"]}
    for outcome in first.outcomes:
        run = children[outcome.id]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params == {key: str(value) for key, value in outcome.candidate.to_params().items()}
        assert run.data.tags["on_front"] == str(outcome.id in points).lower()
        assert run.data.tags["knee"] == str(outcome.id == first.record["knee"]).lower()
        if outcome.state is State.FAILED:
            assert (run.info.status, run.data.tags["vitfront.reason"]) == ("FAILED", outcome.reason)
            continue
        assert run.info.status == "FINISHED"
        assert outcome.plan is not None
        assert outcome.measurement is not None
        final = points.get(outcome.id)
        if final is not None:
            assert run.data.metrics["top1_test"] == pytest.approx(final["top1_test"])
            assert run.data.metrics["speedup"] == pytest.approx(final["speedup"])
        assert run.data.metrics["top1"] == pytest.approx(outcome.measurement.top1)
        assert run.data.metrics["macs"] == outcome.measurement.macs
        assert history(client, run, "block_drop") == list(enumerate(outcome.block_drops))
        assert Plan.from_json(json.loads(artifact(client, run, "plan.json"))) == outcome.plan


def test_same_command_again_does_nothing(first: Sweep) -> None:
    def state() -> list[bytes]:
        return [path.read_bytes() for path in (first.folder.ledger, first.folder.front, first.folder.table)]

    files, (_, parents, children) = state(), first.mlflow()
    watcher = Watcher()
    assert record_of(run_sweep(first.config, first.runs, watcher)) == first.record
    assert watcher.num_stages == 1  # the inputs are looked at: they may have changed
    assert state() == files
    _, parents_now, children_now = first.mlflow()
    assert [run.to_dictionary() for run in parents_now] == [run.to_dictionary() for run in parents]
    assert children_now.keys() == children.keys()
    assert all(children_now[name].to_dictionary() == children[name].to_dictionary() for name in children)


def test_sweep_of_other_settings_may_not_take_the_name(first: Sweep, flag: Path) -> None:
    before = first.folder.ledger.read_bytes(), first.folder.config.read_bytes()
    other = sweeps.config(flag, measure={"batch_size": 4}, space={"target_ratio": 0.5})
    expected = r"was started with other settings \(measure.batch_size, space.target_ratio\); take another --name"
    with pytest.raises(SweepError, match=expected):
        run_sweep(other, first.runs, Watcher())
    assert (first.folder.ledger.read_bytes(), first.folder.config.read_bytes()) == before


def test_full_disk_ends_the_sweep_and_harms_nothing(first: Sweep, disk: Path) -> None:
    sweep = first.copy(disk / "runs")
    book, front = sweep.folder.ledger.read_bytes(), sweep.folder.front.read_bytes()

    def fill(_: str) -> None:
        with suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    watcher = Watcher(on_started=fill)
    with (
        pytest.warns(UserWarning, match="cannot write to MLflow .*resume it to write what MLflow lacks"),
        pytest.raises(SweepError, match=r"^cannot use the ledger .*outcomes\.jsonl: No space left on device$"),
    ):
        run_sweep(sweep.with_trials(NUM_TRIALS + 30), sweep.runs, watcher)
    (disk / "filler").unlink()
    assert len(watcher.started_ids) < 30
    assert sweep.folder.ledger.read_bytes().startswith(book)
    assert len(sweep.outcomes) == NUM_TRIALS + len(watcher.finished_ids)  # a line may fit into the ledger's last page
    assert sweep.folder.front.read_bytes() == front


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 32 MB, so that it can be full."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "vitfront-test", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs a disk of its own, and no tmpfs could be mounted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)  # mlflow never closes its database


@dataclass(frozen=True)
class Resumed:
    """The first sweep with two more trials, after a kill that tore its ledger and came before its front was written."""

    sweep: Sweep
    book: bytes
    """The ledger before that."""
    children: dict[str, Run]
    """Runs of the trials in MLflow before that, by name."""


@pytest.fixture(scope="module")
def resumed(first: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    sweep = first.copy(tmp_path_factory.mktemp("resumed") / "runs")
    book, (_, _, children) = sweep.folder.ledger.read_bytes(), sweep.mlflow()
    sweep.folder.ledger.write_bytes(book + book[:100])
    sweep.folder.front.unlink()
    config, watcher = sweep.with_trials(NUM_TRIALS + 2), Watcher()
    front = run_sweep(config, sweep.runs, watcher)
    return Resumed(Sweep(sweep.runs, config, watcher, front), book, children)


def test_resume_runs_only_what_is_left(resumed: Resumed) -> None:
    sweep, ids = resumed.sweep, [f"t{number:03d}" for number in range(NUM_TRIALS + 2)]
    assert sweep.folder.ledger.read_bytes().startswith(resumed.book)
    assert sweep.watcher.started_ids == sweep.watcher.finished_ids == ids[NUM_TRIALS:]
    assert [outcome.id for outcome in sweep.outcomes] == ids
    assert len({outcome.candidate for outcome in sweep.outcomes}) == len(ids)


def test_outcomes_say_when_they_ended_and_a_resume_counts_on(resumed: Resumed) -> None:
    ends = [outcome.ended_s for outcome in resumed.sweep.outcomes]
    assert ends[0] > 0
    assert ends == sorted(ends)
    for before, outcome in zip(ends[:-1], resumed.sweep.outcomes[1:], strict=True):
        assert outcome.ended_s - before >= outcome.seconds * 0.99  # one after the other, on one core


def test_outcomes_say_how_long_their_worker_waited(resumed: Resumed) -> None:
    outcomes = resumed.sweep.outcomes
    for before, outcome in pairwise(outcomes):
        if outcome.state is State.MEASURED:
            assert outcome.waited_s > 0
            assert outcome.waited_s + outcome.seconds <= outcome.ended_s - before.ended_s + 1.0  # on one core
    assert 0 < resumed.sweep.record["idle_share"] == idle_share(outcomes) < 1


def test_resume_writes_the_front_anew(resumed: Resumed) -> None:
    sweep = resumed.sweep
    assert json.loads(sweep.folder.front.read_text()) == sweep.record
    assert sweep.record["trials"] == NUM_TRIALS + 2
    assert {path.name for path in sweep.folder.models.iterdir()} == {point["id"] for point in sweep.record["points"]}
    assert sweep.folder.read_config().model_copy(update={"fingerprints": None}) == sweep.config


def test_resume_adds_to_the_run_in_mlflow(resumed: Resumed) -> None:
    sweep = resumed.sweep
    client, [parent], children = sweep.mlflow()
    assert parent.info.status == "FINISHED"
    assert sorted(children) == [outcome.id for outcome in sweep.outcomes]
    for name, run in resumed.children.items():
        assert children[name].info.to_proto() == run.info.to_proto()
        assert children[name].data.params == run.data.params
    curve = history(client, parent, "hypervolume")
    assert [step for step, _ in curve] == list(range(1, NUM_TRIALS + 3))
    assert [value for _, value in curve[NUM_TRIALS:]] == sweep.watcher.hypervolumes


def test_what_is_wrong_with_the_input_on_a_worker_is_told_as_it_was_raised(flag: Path, tmp_path: Path) -> None:
    training = sweeps.config(flag).model.training
    assert training is not None
    diverging = training.model_dump() | {"learning_rate": 1e38}
    with pytest.raises(VitfrontError, match="training diverged in step 2: the loss is nan; lower the learning rate"):
        run_sweep(sweeps.config(flag, model={"training": diverging}), tmp_path, Watcher())
    assert not (tmp_path / "tiny").exists()


def test_dense_model_that_is_worse_than_expected_ends_a_sweep_before_anything_is_measured(
    first: Sweep, tmp_path: Path
) -> None:
    sweeps.copy_cache(first.runs, tmp_path / "runs")
    kept = set((tmp_path / "runs" / ".cache").iterdir())
    watcher = Watcher()
    model = first.config.model.model_copy(update={"expected_top1": 1.0})
    with pytest.raises(ModelError, match=r"^dense top-1 on val is .*, below model.expected_top1, 1; "):
        run_sweep(first.config.model_copy(update={"model": model}), tmp_path / "runs", watcher)
    assert watcher.notes == first.watcher.notes
    assert watcher.num_stages == 1  # the model was trained before
    assert set((tmp_path / "runs" / ".cache").iterdir()) == kept
    assert not (tmp_path / "runs" / "tiny").exists()


def test_worker_that_dies_before_the_trials_ends_a_sweep_that_leaves_nothing(flag: Path, tmp_path: Path) -> None:
    flag.touch()
    with pytest.raises(SweepError, match=r"^look: the worker broke: .*died") as raised:
        run_sweep(sweeps.config(flag), tmp_path, Watcher())
    assert "\n" not in str(raised.value)
    assert not flag.exists()
    assert not (tmp_path / "tiny").exists()
    assert not (tmp_path / ".cache").exists()


def test_trial_larger_than_the_machine_is_refused(flag: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^resources\.cpus_per_trial: 9 is more than this machine has, 1$"):
        run_sweep(sweeps.config(flag, resources={"cpus_per_trial": 9}), tmp_path, Watcher())
    assert not (tmp_path / "tiny").exists()
