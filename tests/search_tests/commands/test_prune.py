"""One model, one plan: the candidate of the settings, errors before the work, and what is saved and told."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.artifact import load, save_weights
from pruning.errors import ArtifactError, ModelError, VitfrontError
from search.commands.prune import PruneSettings, block_rows, prune_once
from search.config import Config
from search.errors import ConfigError, SweepError
from search.outcome import Candidate, Measurement, Outcome, State
from search.trial.context import TrialContext
from search.trial.inputs import load_inputs
from search.trial.prepare import prepare_locally
from search.trial.trial import Ended, run_to_end
from tests.search_tests import tiny

SETTINGS = PruneSettings(
    target_ratio=0.5, budget=100.0, exit_block=None, cutoff_channel=0.2, cutoff_token=0.3, token_share=0.25,
    method="global", criterion="obs", token_reduction="attention-merge", round_to="auto",
)  # fmt: skip
prepare = partial(prepare_locally, timer=tiny.timer, time_widths=tiny.time_widths)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for split in ("train", "val"):
        tiny.write_images(tmp_path / "images" / split)
    return tiny.config(data__root=str(tmp_path / "images"))


def prune(
    config: Config,
    tmp_path: Path,
    to: Path | None = None,
    run: Any = run_to_end,
    say: Any = lambda _: None,
    **changes: Any,
) -> tuple[Outcome, Measurement, list[dict[str, Any]]]:
    return prune_once(config, tmp_path / "runs", to, replace(SETTINGS, **changes), say, prepare=prepare, run=run)


def never(*_: Any) -> Ended:
    raise AssertionError("nothing is to be run")


@pytest.mark.parametrize(
    ("changes", "budgets"),
    [({}, 0.0), ({"method": "cascade", "criterion": "lfs", "round_to": "8"}, 100.0), ({"exit_block": 2}, 0.0)],
)
def test_candidate_is_that_of_the_settings_whatever_the_recipes_space(
    config: Config, tmp_path: Path, changes: dict[str, Any], budgets: float
) -> None:
    outcome, dense, _ = prune(config, tmp_path, **changes)
    assert outcome.state is State.MEASURED and outcome.measurement is not None
    expected: dict[str, Any] = {
        "method": "global", "criterion": "obs", "token_reduction": "attention-merge", "round_to": "auto",
        "exit_block": 3, "cutoff_channel": 0.2, "cutoff_token": 0.3, "token_share": 0.25, "target_ratio": 0.5,
        "drop_budget": (budgets,) * tiny.DEPTH,
    } | changes  # fmt: skip
    expected["round_to"] = 8 if expected["round_to"] == "8" else expected["round_to"]
    assert outcome.candidate == Candidate(**expected)
    assert outcome.measurement.macs <= 0.5 * dense.macs


def test_model_is_saved_with_its_plan(config: Config, tmp_path: Path) -> None:
    outcome, _, _ = prune(config, tmp_path, to=tmp_path / "out")
    model, description = load(tmp_path / "out")
    assert description.plan == outcome.plan
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, tiny.NUM_CLASSES)


def test_folder_that_exists_is_refused_before_anything_is_done(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"exists; give a folder that does not"):
        prune(config, tmp_path, to=tmp_path, run=never)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_ratio": 1.5}, "target ratio 1.5 is out of range; give 0 to 1"),
        ({"token_share": -0.5}, "token share -0.5 is out of range; give 0 to 1"),
        ({"token_share": 1.0, "token_reduction": "none"}, "token share 1 prunes tokens alone, but the token reduction"),
        ({"method": "best"}, r"space\.method: "),
        ({"round_to": "0"}, r"space\.round_to: "),
        ({"exit_block": 4}, r"space\.exit_block: 4 is no exit"),
    ],
)
def test_settings_that_are_wrong_are_refused_before_anything_is_run(
    config: Config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        prune(config, tmp_path, run=never, **changes)


def test_dense_accuracy_is_told_before_anything_is_timed(config: Config, tmp_path: Path) -> None:
    events: list[str] = []

    def timer(*arguments: Any, **options: Any) -> Any:
        events.append("timed")
        return tiny.timer(*arguments, **options)

    prepare = partial(prepare_locally, timer=timer, time_widths=tiny.time_widths)
    prune_once(config, tmp_path / "runs", None, SETTINGS, events.append, prepare=prepare)
    assert events[0].startswith("dense top-1 on val 0.") and events[0].endswith(", 16 images)")
    notes = [event for event in events[1:] if event.startswith("note: ")]
    assert any("16 of the 16 val images are in train too" in note for note in notes)
    timed = events[1 + len(notes) :]
    assert timed and set(timed) == {"timed"}


def test_dense_model_that_is_worse_than_expected_is_not_pruned(config: Config, tmp_path: Path) -> None:
    said: list[str] = []
    model = config.model.model_copy(update={"expected_top1": 1.0})
    with pytest.raises(ModelError, match=r"^dense top-1 on val is .*, below model.expected_top1, 1; "):
        prune(config.model_copy(update={"model": model}), tmp_path, run=never, say=said.append)
    assert said[0].startswith("dense top-1 on val") and {line.split()[0] for line in said[1:]} == {"note:"}


def test_trial_that_fails_is_told_with_its_reason_and_nothing_is_saved(config: Config, tmp_path: Path) -> None:
    def run(context: TrialContext, candidate: Candidate, trial_id: str) -> Ended:
        outcome = Outcome(id=trial_id, state=State.FAILED, candidate=candidate, reason="out of memory")
        return Ended(outcomes=[outcome], models={})

    with pytest.raises(VitfrontError, match=r"^pruning failed: out of memory$"):
        prune(config, tmp_path, to=tmp_path / "out", run=run)
    assert not (tmp_path / "out").exists()


def test_rows_tell_what_each_block_keeps_of_what_there_was(config: Config, tmp_path: Path) -> None:
    contexts: list[TrialContext] = []

    def run(context: TrialContext, *arguments: Any) -> Ended:
        contexts.append(context)
        return run_to_end(context, *arguments)

    outcome, _, rows = prune(config, tmp_path, run=run)
    (context,) = contexts
    assert rows == block_rows(outcome, context.anatomy)
    assert [row["block"] for row in rows] == [0, 1, 2]
    assert outcome.plan is not None
    for row, block in zip(rows, outcome.plan.blocks, strict=True):
        assert row["hidden"] == f"{len(block.keep_hidden)}/128" and row["tokens"] == f"{block.num_tokens}/16"
        assert row["drop"] == "-"  # only a cascade measures it
    dense = replace(outcome, plan=context.dense_plan, block_drops=(0.0, 1.25, -2.5))
    assert [(row["drop"], row["MACs"]) for row in block_rows(dense, context.anatomy)] == [
        ("+0.00", "100%"), ("+1.25", "100%"), ("-2.50", "100%"),
    ]  # fmt: skip


def test_overwritten_weights_give_another_model_and_a_pinned_recipe_refuses_them(tmp_path: Path) -> None:
    for split, blue in (("train", 5), ("val", 90)):
        tiny.write_images(tmp_path / "images" / split, blue=blue)
    path = tmp_path / "weights.safetensors"
    changes = {"data__root": str(tmp_path / "images"), "model__checkpoint": str(path), "model__untrained": False}
    tops = []
    for seed in (0, 1):
        save_weights(tiny.model(seed=seed).state_dict(), path)
        prune(tiny.config(**changes), tmp_path, tmp_path / f"model{seed}")
        tops.append(load(tmp_path / f"model{seed}")[1].weights)
    assert tops[0] != tops[1]
    save_weights(tiny.model(seed=0).state_dict(), path)
    fingerprints = load_inputs(tiny.config(**changes), tmp_path / "runs").fingerprints.model_dump()
    save_weights(tiny.model(seed=1).state_dict(), path)
    with pytest.raises(SweepError, match="the recipe's fingerprints are of other inputs: the weights changed"):
        prune(tiny.config(**changes, fingerprints=fingerprints), tmp_path, run=never)


def test_trained_weights_of_images_that_were_exchanged_meanwhile_are_not_taken(tmp_path: Path) -> None:
    for split, blue in (("train", 5), ("val", 90)):
        tiny.write_images(tmp_path / "images" / split, blue=blue)
    config = tiny.config(
        data__root=str(tmp_path / "images"),
        model__training={"epochs": 1},
        model__untrained=False,
        space__method="global",
    )
    prune(config, tmp_path)
    prune(config, tmp_path)
    assert len(list((tmp_path / "runs/.cache").glob("*.safetensors"))) == 1
    for name, other in (("a", "x"), ("b", "a"), ("x", "b")):
        (tmp_path / "images/train" / name).rename(tmp_path / "images/train" / other)
    prune(config, tmp_path)
    assert len(list((tmp_path / "runs/.cache").glob("*.safetensors"))) == 2
