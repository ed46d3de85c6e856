"""`vitfront lottery`: its trainings, its table and files, and the mistakes that it refuses before anything starts."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pruning.artifact import save_weights
from pruning.measure.accuracy import predict, top1
from pruning.methods.lottery import Arm, LotteryRow
from pruning.training import train
from search.commands.lottery import lottery_csv, run_lottery_seeds, seeded_model, summaries
from search.config import Config
from search.errors import SweepError
from search.trial.inputs import load_inputs
from tests.search_tests import tiny
from tests.search_tests.command_line import call, check_refused, files
from tests.search_tests.views.pages import Page

ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 1, "num_heads": 1}
DATA = {"dataset": "digits", "calibration_images": 60, "probe_images": 40, "mean": [0.3], "std": [0.4]}
CHANGES: dict[str, Any] = {
    "model__args": ARGS,
    "model__training": {"epochs": 2, "batch_size": 50, "warmup_epochs": 1, "seed": 3},
    "data": DATA | {"val_images": 30},
}
ARMS = [("dense", 0), ("ticket", 1), ("ticket", 2), ("random", 2), ("sparse-aware", 2)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command runs, with a recipe that trains."""
    monkeypatch.chdir(tmp_path)
    tiny.write_recipe(tmp_path / "tiny.yaml", **CHANGES)
    return tmp_path


def config(**changes: Any) -> Config:
    return tiny.config(**(CHANGES | changes))


def run(config: Config, runs: Path, **other: Any) -> dict[str, Any]:
    return run_lottery_seeds(config, runs, **({"sparsity": 0.75, "rounds": 1, "rewind_step": 0, "seeds": 1} | other))


class Lottery(NamedTuple):
    record: dict[str, Any]
    stages: list[str]
    """The texts that told of its trainings, in their order."""


@pytest.fixture(scope="module")
def lottery(tmp_path_factory: pytest.TempPathFactory) -> Lottery:
    """A lottery of two seeds and one round, in a folder without trained weights."""
    stages: list[str] = []
    record = run(config(), tmp_path_factory.mktemp("lottery"), seeds=2, on_stage=stages.append)
    return Lottery(record, stages)


def row(arm: Arm, number: int, seed: int, share: float, norms: tuple[float, ...] = (1.0,)) -> LotteryRow:
    sparsity = 0.0 if arm == "dense" else 0.5 * number
    return LotteryRow(arm=arm, round=number, sparsity=sparsity, seed=seed, top1=share, gradient_norms=norms)


def test_lottery_is_printed_as_a_table_and_written(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    given = ["--sparsity", "0.75", "--rounds", "2", "--seeds", "2", "--name", "mine"]
    code, out, _ = call(capsys, "lottery", "tiny.yaml", *given)
    assert code == 0
    rows = [line.replace("│", " ").split() for line in out.splitlines() if line.startswith("│")]
    assert [(row[0], int(row[1])) for row in rows] == ARMS
    assert [row[2] for row in rows] == ["0.0%", "50.0%", "75.0%", "75.0%", "75.0%"]
    assert "Lottery tickets of mine" in out and "runs/lottery-mine" in out
    names = ("table.csv", "result.json", "lottery.html")
    assert files(folder / "runs") == {"lottery-mine", *(f"lottery-mine/{name}" for name in names)}
    record = json.loads((folder / "runs" / "lottery-mine" / "result.json").read_text())
    assert [float(row[3]) for row in rows] == [round(arm["top1"], 4) for arm in record["arms"]]
    with (folder / "runs" / "lottery-mine" / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["arm"], int(line["round"]), int(line["seed"])) for line in lines] == [
        (*arm, seed) for seed in (3, 4) for arm in ARMS
    ]
    assert [float(line["top1"]) for line in lines] == [training["top1"] for training in record["rows"]]
    assert Page((folder / "runs" / "lottery-mine" / "lottery.html").read_text()).loads == []


def test_json_is_the_record_that_is_written(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    given = ["--seeds", "1", "--rounds", "1", "--rewind-step", "2", "--runs", "there", "--json"]
    code, out, _ = call(capsys, "lottery", "tiny.yaml", *given, "--set", "model.training.epochs=3")
    record = json.loads(out)
    assert code == 0
    assert record == json.loads((folder / "there" / "lottery-tiny" / "result.json").read_text())
    assert (record["sparsity"], record["rewind_step"], record["steps"]) == (0.8, 2, 6)
    assert all(len(training["gradient_norms"]) == 6 for training in record["rows"])


def test_recipe_without_training_is_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    tiny.write_recipe(folder / "given.yaml", **(CHANGES | {"model__training": None}))
    check_refused(capsys, folder, "lottery", "given.yaml", says=["model.training", "--set model.training={}"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--sparsity", "1"], ["sparsity 1.0 is out of range"]),
        (["--rounds", "0"], ["0 rounds"]),
        (["--rewind-step", "9"], ["rewind step 9", "0 to 4"]),
        (["--seeds", "0"], ["0 seeds"]),
        (["--name", "a/b"], ["name"]),
        (["--set", "data.dataset=folders"], ["'folders'"]),
        (["--runs", "tiny.yaml"], ["tiny.yaml"]),
    ],
)
def test_wrong_lottery_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], folder: Path, given: list[str], says: list[str]
) -> None:
    check_refused(capsys, folder, "lottery", "tiny.yaml", *given, says=says)


def test_dense_arm_is_the_model_that_a_sweep_would_train(tmp_path: Path, lottery: Lottery) -> None:
    inputs = load_inputs(config(), tmp_path)
    assert not inputs.trained
    splits, training = inputs.splits, config().model.training
    assert training is not None
    images = replace(
        splits.probe,
        pixels=torch.cat([splits.calibration.pixels, splits.probe.pixels]),
        labels=torch.cat([splits.calibration.labels, splits.probe.labels]),
    )
    norms: list[float] = []
    weights = [
        parameter for name, parameter in inputs.model.named_parameters() if "blocks" in name and "norm" not in name
    ]

    def note(step: int) -> None:
        gradients = [weight.grad.flatten() for weight in weights if weight.grad is not None and weight.ndim == 2]
        norms.append(float(torch.cat(gradients).norm()))

    train(inputs.model, images, training.settings(), after_step=note)
    dense = lottery.record["rows"][0]
    assert dense["top1"] == top1(predict(inputs.model, splits.val), splits.val.labels)
    assert dense["gradient_norms"] == pytest.approx(norms, rel=1e-3)
    assert lottery.record["training_images"] == 100


def test_lottery_starts_untrained_even_where_a_sweep_has_left_trained_weights(tmp_path: Path, lottery: Lottery) -> None:
    cache = load_inputs(config(), tmp_path).cache
    save_weights(seeded_model(config(), 99).state_dict(), cache)
    assert load_inputs(config(), tmp_path).trained
    first_seed = [row for row in lottery.record["rows"] if row["seed"] == 3]
    assert run(config(), tmp_path)["rows"] == first_seed


def test_given_weights_are_where_training_starts_but_not_what_is_drawn_anew(tmp_path: Path) -> None:
    given = seeded_model(config(), 42)
    save_file(given.state_dict(), tmp_path / "given.safetensors")
    with_checkpoint = config(model__checkpoint=str(tmp_path / "given.safetensors"))
    drawn = seeded_model(config(), 7)
    for model, expected in (
        (seeded_model(with_checkpoint, 7), given),
        (seeded_model(with_checkpoint, 7, untouched=True), drawn),
    ):
        assert all(
            torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True)
        )


def test_each_training_is_told_before_it_starts(lottery: Lottery) -> None:
    assert lottery.stages[0] == "seed 1 of 2: dense, pruned 0 of 1 times"
    assert lottery.stages[-1] == "seed 2 of 2: sparse-aware, pruned 1 of 1 times"
    assert len(lottery.stages) == 8


ROWS = [
    row("dense", 0, 0, 0.9, (4.0, 2.0)),
    row("ticket", 1, 0, 0.8),
    row("ticket", 2, 0, 0.7, (2.0, 0.5)),
    row("dense", 0, 1, 0.7, (2.0, 1.0)),
    row("ticket", 1, 1, 0.6),
    row("ticket", 2, 1, 0.6, (4.0, 1.5)),
]


def test_summary_is_over_the_seeds_of_an_arm_and_round() -> None:
    dense, first, last = summaries(ROWS)
    assert dense == {
        "arm": "dense", "round": 0, "sparsity": 0.0, "top1": pytest.approx(0.8), "top1_low": 0.7, "top1_high": 0.9,
        "gradient_norm_first": 3.0, "gradient_norm_mean": 2.25,
    }  # fmt: skip
    assert (first["arm"], first["round"], first["top1"]) == ("ticket", 1, pytest.approx(0.7))
    assert (last["arm"], last["round"], last["sparsity"]) == ("ticket", 2, 1.0)


def test_csv_has_a_line_a_training() -> None:
    assert lottery_csv(ROWS[:1]).splitlines() == [
        "arm,round,sparsity,seed,top1,gradient_norm_first,gradient_norm_mean",
        "dense,0,0.0,0,0.9,4,3",
    ]


def test_a_lottery_says_which_weights_and_images_it_was_run_on(tmp_path: Path) -> None:
    path = tmp_path / "first.safetensors"
    records = []
    for seed in (0, 1):
        save_file(seeded_model(config(), seed).state_dict(), path)
        records.append(run(config(model__checkpoint=str(path)), tmp_path / "runs"))
    first, second = (record["config"]["fingerprints"] for record in records)
    assert first["first_weights"] != second["first_weights"]
    assert first["train"] == second["train"] is not None
    assert records[0]["rows"] != records[1]["rows"]


def test_a_lottery_of_an_overwritten_image_says_so(tmp_path: Path) -> None:
    for split, blue in (("train", 5), ("val", 90)):
        tiny.write_images(tmp_path / "images" / split, blue=blue)
    of_images = tiny.config(data__root=str(tmp_path / "images"), model__training={"epochs": 1, "warmup_epochs": 0})
    before = run(of_images, tmp_path / "runs")["config"]["fingerprints"]
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "images/train/a/0.png")
    after = run(of_images, tmp_path / "runs")["config"]["fingerprints"]
    assert [key for key in before if before[key] != after[key]] == ["train"]


def test_a_checkpoint_that_is_overwritten_while_a_lottery_runs_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "first.safetensors"
    save_file(seeded_model(config(), 0).state_dict(), path)

    def overwrite(stage: str) -> None:
        if stage.startswith("seed 1"):
            save_file(seeded_model(config(), 1).state_dict(), path)

    with pytest.raises(SweepError, match="begun with other inputs: the weights that training starts from changed"):
        run(config(model__checkpoint=str(path)), tmp_path / "runs", seeds=2, on_stage=overwrite)
