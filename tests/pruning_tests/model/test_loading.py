"""The dense model by name and checkpoint, and the error where one does not fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, resolve_data_config

from pruning.errors import CheckpointError, ModelError
from pruning.model.loading import create_model, default_input, load_weights, read_weights
from tests.pruning_tests import builders


def create(family: str = "vit", **other: Any) -> Any:
    name, more = builders.FAMILIES[family]
    return create_model(name, args=builders.ARGS | more, **other)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_a_model_is_ready_to_run(family: str) -> None:
    model = create(family)
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model(builders.batch()).shape == (4, 7)


def test_an_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(ModelError, match=r"no model 'vit_tinny_patch16_224'; did you mean .*vit_tiny_patch16_224"):
        create_model("vit_tinny_patch16_224")
    with pytest.raises(ModelError, match="no model '~~~~'; supported is timm's VisionTransformer"):
        create_model("~~~~")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet10t", {}),
        ("swinv2_tiny_window8_256", {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 4)}),
    ],
)
def test_a_family_that_is_not_supported_says_what_is(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(
        ModelError, match=r"is not a model that can be pruned; supported is .*\(vit_\*, deit_\*, .*\(swin_\*\)"
    ):
        create_model(name, args=args)


@pytest.mark.parametrize("args", [{"colour": 3}, {"num_heads": 5}, {"depth": 0}])
def test_arguments_that_give_no_model_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        create_model("vit_tiny_patch16_224", args=builders.ARGS | args)


def test_timm_tells_the_input() -> None:
    model = create()
    assert default_input(model) == resolve_data_config(model=model)
    overlay = {"crop_mode": "squash", "mean": None}
    settings = default_input(
        create_model("vit_tiny_patch16_224", args=builders.ARGS | {"pretrained_cfg_overlay": overlay})
    )
    assert settings["crop_mode"] == "squash" and settings["mean"] == IMAGENET_DEFAULT_MEAN


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
def test_a_checkpoint_gives_its_weights(wrapped: str | None, tmp_path: Path) -> None:
    source = builders.model(seed=4)
    weights = source.state_dict()
    torch.save(weights if wrapped is None else {wrapped: weights, "epoch": 3}, tmp_path / "weights.pth")
    assert builders.same_state(create(checkpoint=tmp_path / "weights.pth"), weights)


def test_half_precision_weights_load_into_float32(tmp_path: Path) -> None:
    weights = {name: tensor.half() for name, tensor in builders.model(seed=4).state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    model = create(checkpoint=tmp_path / "weights.safetensors")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].float())
    assert model(builders.batch()).isfinite().all()


def test_weights_that_do_not_fit_are_named_and_none_is_loaded() -> None:
    model = builders.model()
    before = builders.state(model)
    good = builders.model(seed=4).state_dict()
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        (good | {"head.weight": torch.ones(1000, 24)}, r"head.weight is \[1000, 24\], not \[7, 24\]"),
        ({name: good[name] for name in good if name != "cls_token"}, "cls_token is missing"),
        (good | {"dist_token": torch.ones(1)}, "dist_token is unknown to the model"),
        ({}, f"is missing.*, and {len(good) - 4} more"),
        (good | {"head.weight": good["head.weight"].flatten()}, r"head.weight is \[168\]"),
    ]
    for weights, message in wrong:
        with pytest.raises(CheckpointError, match=f"a.pth does not fit VisionTransformer: .*{message}"):
            load_weights(model, weights, "a.pth")
        assert builders.same_state(model, before)
    load_weights(model, good, "a.pth")
    assert builders.same_state(model, good)


def test_weights_of_another_depth_are_refused(tmp_path: Path) -> None:
    torch.save(builders.model(depth=4).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights.pth .*blocks\.3\..* is unknown to the model"):
        create(checkpoint=tmp_path / "weights.pth")


def test_a_missing_or_broken_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*nowhere\.pth"):
        create(checkpoint=tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_weights(tmp_path)
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(CheckpointError, match=f"cannot read checkpoint .*{name}"):
            create(checkpoint=tmp_path / name)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_checkpoint_runs_no_code(how: str, tmp_path: Path) -> None:
    path, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    if how == "torch":
        torch.save({"state_dict": Trap(str(sprung))}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Trap(str(sprung))}))
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        create(checkpoint=path)
    assert not sprung.exists()
