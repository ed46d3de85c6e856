"""The dense model of a recipe: which weights it has, and what is refused before anything is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pruning.artifact import save_weights
from pruning.errors import ModelError
from pruning.measure.accuracy import predict, top1
from search.config import Config, ModelConfig
from search.errors import ConfigError
from search.recipe import load_config
from search.trial.dense import load_dense
from search.trial.inputs import load_inputs
from tests.search_tests import tiny

DATA = Path(__file__).parents[4] / "shared" / "data" / "cifar10-mini"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: it is no part of the project")


def recipe(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"name": tiny.NAME, "args": dict(tiny.ARGS), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the model has no weights: give model.checkpoint, model.pretrained=true or model.training, or"),
        ({"untrained": True, "checkpoint": "a.pth"}, "model.checkpoint and model.untrained contradict each other"),
        ({"untrained": True, "pretrained": True}, "model.pretrained and model.untrained contradict each other"),
        ({"checkpoint": "a.pth", "pretrained": True}, "model.checkpoint and model.pretrained contradict each other"),
        ({"untrained": True, "checkpoint_key": "ema"}, "model.checkpoint_key=ema needs model.checkpoint"),
    ],
)  # fmt: skip
def test_a_recipe_that_leaves_its_weights_open_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_dense(recipe(**changes))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_classes": 0}, r"the model has no classifier \(num_classes is 0\); give model.args.num_classes"),
        ({"in_chans": 4}, "the model takes 4 channels, images have 1 or 3; give model.args.in_chans"),
        ({"in_chans": 2}, "the model takes 2 channels"),
    ],
)
def test_a_model_that_tells_no_images_apart_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_dense(recipe(args=tiny.ARGS | args, untrained=True))


def test_weights_are_those_of_the_checkpoint_or_the_seeds_and_that_is_told(tmp_path: Path) -> None:
    given = tiny.model(seed=3)
    save_weights(given.state_dict(), tmp_path / "given.safetensors")
    torch.save({"a": given.state_dict(), "b": tiny.model(seed=4).state_dict()}, tmp_path / "two.pt")
    cases: list[tuple[dict[str, Any], torch.nn.Module, tuple[str, ...]]] = [
        ({"checkpoint": str(tmp_path / "given.safetensors")}, given, ("weights: given.safetensors",)),
        (
            {"checkpoint": str(tmp_path / "two.pt"), "checkpoint_key": "b"}, tiny.model(seed=4),
            ("weights: b of two.pt; a is there too (model.checkpoint_key)",),
        ),
        ({"untrained": True}, tiny.model(seed=5), ("weights: random (model.untrained)",)),
        ({"training": {}}, tiny.model(seed=5), ()),
        ({"training": {}, "untrained": True}, tiny.model(seed=5), ()),
    ]  # fmt: skip
    for changes, expected, notes in cases:
        torch.manual_seed(5)
        model, told = load_dense(recipe(**changes))
        assert told == notes
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def test_the_shipped_recipe_as_it_is_asks_for_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model has no weights: give"):
        load_inputs(load_config("imagefolder"), tmp_path)


def test_a_sweep_of_before_that_has_no_weights_can_still_be_read() -> None:
    record = tiny.record()
    del record["model"]["untrained"]
    assert Config.from_dict(record).model.untrained is False


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Real images: those of train, and the first 30 of each class of val, on which the model's top-1 is 0.773."""
    root = tmp_path / "cifar"
    root.mkdir()
    (root / "train").symlink_to(DATA / "train")
    for folder in (DATA / "val").iterdir():
        (root / "val" / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:30]:
            (root / "val" / folder.name / image.name).symlink_to(image)
    return root


@real
def test_a_real_model_in_a_training_checkpoint_has_its_accuracy(cifar: Path, tmp_path: Path) -> None:
    description = json.loads((DATA / "vit_cifar10.json").read_text())
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    weights = {f"module.{name}": tensor for name, tensor in load_file(DATA / "vit_cifar10.safetensors").items()}
    worse = {name: tensor * 0 for name, tensor in weights.items()}
    torch.save({"state_dict": worse, "state_dict_ema": weights, "epoch": 26}, tmp_path / "last.pth.tar")
    config = tiny.config(
        model={
            "name": description["model"], "args": {name: description[name] for name in names},
            "checkpoint": str(tmp_path / "last.pth.tar"),
        },
        data={
            "root": str(cifar), "mean": description["mean"], "std": description["std"], "crop_pct": 1.0,
            "calibration_images": 8, "probe_images": 8,
        },
    )  # fmt: skip
    inputs = load_inputs(config, tmp_path)
    assert (
        "weights: state_dict_ema of last.pth.tar, without the prefix module.; "
        "state_dict is there too (model.checkpoint_key)"
    ) in inputs.notes
    val = inputs.splits.val
    accuracy = top1(predict(inputs.model, val, batch_size=100), val.labels)
    assert (len(val), round(accuracy, 3)) == (300, 0.773)
