"""The dense model by name and arguments, and the error where they or its weights do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, resolve_data_config

from pruning.artifact import save_weights
from pruning.errors import CheckpointError, ModelError
from pruning.model.anatomy import examine
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
    with pytest.raises(ModelError, match=r"no model 'vit_tiny'; did you mean vit_tiny_[^?]*\?$"):
        create_model("vit_tiny")  # not gcvit_tiny, which cannot be pruned
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


def test_saved_weights_come_back_bit_equal_and_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    weights = builders.model(seed=4).state_dict()
    save_weights(weights, tmp_path / "weights.safetensors")
    model = create()
    load_weights(model, read_weights(tmp_path / "weights.safetensors"), "it")
    assert builders.same_state(model, weights)
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    for name in ("nowhere.safetensors", "broken.safetensors"):
        with pytest.raises(CheckpointError, match=f"cannot read weights .*{name}"):
            read_weights(tmp_path / name)


def test_saved_weights_that_were_overwritten_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(builders.model(seed=4).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is not what vitfront wrote there: its weights"):
        read_weights(path)
    save_file(builders.model(seed=5).state_dict(), path)
    with pytest.raises(CheckpointError, match="is not what vitfront wrote there"):
        read_weights(path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depth": "6"}, "depth is '6'; give whole numbers of at least 1"),
        ({"depth": 0}, "depth is 0;"),
        ({"num_heads": -3}, "num_heads is -3;"),
        ({"num_heads": 5}, "should be divisible by num_heads"),
        ({"num_classes": True}, "num_classes is True;"),
        ({"embed_dim": 24.0}, r"embed_dim is 24\.0;"),
        ({"img_size": [32, "32"]}, r"img_size is \[32, '32'\];"),
        ({"global_pool": "mean"}, "Only avg, .* is supported"),
        ({"global_pool": ""}, "global_pool='' gives an answer for each token; give 'token' or 'avg'"),
        ({"img_size": 30}, "img_size 30 is no multiple of the patch size 8; give e.g. 32"),
        ({"img_size": (32, 4)}, "img_size 4 is no multiple of the patch size 8; give e.g. 8"),
        ({"img_size": 30, "dynamic_img_pad": True}, "img_size 30 is no multiple"),
        ({"checkpoint_path": "my.pth"}, "have checkpoint_path; give the file as model.checkpoint"),
        ({"pretrained": True}, "have pretrained; give model.pretrained"),
        ({"dtype": "float16"}, "have dtype; models are made in float32"),
        ({"device": "meta"}, "have device; models are made on the CPU"),
        ({"features_only": True}, "FeatureGetterNet is not a model that can be pruned"),
        ({"drop_path_rate": "much"}, "cannot create vit_tiny_patch16_224 with .*'drop_path_rate': 'much'"),
    ],
)
def test_an_argument_that_gives_another_model_than_meant_is_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        create_model("vit_tiny_patch16_224", args=builders.ARGS | args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"img_size": 30}, "img_size 30 is no multiple of the patch size 4; give e.g. 32"),
        ({"img_size": 2}, "img_size 2 is no multiple of the patch size 4; give e.g. 4"),
        ({"img_size": 100}, "pads its grid of 25 x 25 tokens to windows of 7 x 7"),
        ({"depths": 3}, "cannot create swin_tiny_patch4_window7_224"),
        ({"window_size": "7"}, "window_size is '7'"),
        ({"global_pool": ""}, "global_pool=''"),
    ],
)
def test_sizes_of_a_swin_that_do_not_fit_are_refused(args: dict[str, Any], message: str) -> None:
    small = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    with pytest.raises(ModelError, match=message):
        create_model("swin_tiny_patch4_window7_224", args=small | args)


def test_the_family_is_refused_before_its_arguments_are() -> None:
    with pytest.raises(ModelError, match=r"resnet18 \(timm.models.resnet\) is not a model that can be pruned"):
        create_model("resnet18", args={"img_size": 8, "patch_size": 2})


def test_a_name_of_the_hub_is_told_timms_name() -> None:
    with pytest.raises(ModelError, match=r"did you mean vit_tiny_patch16_224\.augreg_in21k\?"):
        create_model("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k")


def refusal(name: str) -> str:
    """Creates a model of timm by name without its tensors; why it is refused, or nothing."""
    try:
        with torch.device("meta"):
            create_model(name)
    except ModelError as error:
        return str(error)
    return ""


def test_a_stem_of_convolutions_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ModelError, match="a model with HybridEmbed cannot be pruned"):
        examine(timm.create_model("vit_base_mci_224"))
    assert refusal("vit_base_r50_s16_384").startswith("vit_base_r50_s16_384 (timm.models.vision_transformer_hybrid)")


@pytest.mark.slow
def test_every_vision_transformer_of_timm_is_supported_or_refused_in_one_line() -> None:
    patterns = ("vit*", "deit*", "swin*", "eva*", "beit*", "flexivit*", "test_vit*")
    names = [name for pattern in patterns for name in timm.list_models(pattern)]
    timms_own = [name for name in names if timm.models.model_entrypoint(name).__module__.startswith("timm.")]
    refusals = {name: refusal(name) for name in timms_own}  # without those that other tests register
    assert not any("\n" in text or text.startswith("cannot create") for text in refusals.values())
    assert sum(not text for text in refusals.values()) > 100
    assert not refusals["vit_tiny_patch16_224"] and not refusals["swin_tiny_patch4_window7_224"]
