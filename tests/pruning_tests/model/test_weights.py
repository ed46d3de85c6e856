"""The loader of weights: wrapped in whatever way, it finds them or says in one line why not; never others in silence.

The oracle is the state dict itself: whatever it was wrapped in, the model has it bit for bit, or nothing was loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pruning.errors import CheckpointError, ModelError
from pruning.model.loading import create_model
from pruning.model.weights import load_checkpoint, load_pretrained
from tests.pruning_tests import builders

Weights = dict[str, Tensor]

DATA = Path(__file__).parents[4] / "shared" / "data" / "cifar10-mini"
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}

PREFIXES = (
    "", "module.", "_orig_mod.", "model.", "net.", "backbone.", "timm_model.", "module._orig_mod.", "_orig_mod.module.",
    "model.module.", "model.net.", "net._orig_mod.",
)  # fmt: skip
WRAPPERS: tuple[tuple[str, ...], ...] = (
    (), ("state_dict",), ("model",), ("model_state_dict",), ("net",), ("weights",), ("state_dict", "model"),
    ("model", "state_dict"), ("checkpoint", "model", "state_dict"), ("state_dict_ema",), ("ema",), ("teacher",),
)  # fmt: skip


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def wrapped(keys: tuple[str, ...], content: dict[str, Any]) -> dict[str, Any]:
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{}]}}
    return content


def some(seed: int = 4) -> Weights:
    return builders.model(seed=seed).state_dict()


def write(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "model.pth.tar")
    return folder / "model.pth.tar"


def load(path: Path, key: str | None = None, **args: Any) -> tuple[nn.Module, str]:
    """A new model with the weights of a file, and the note."""
    model = create_model("vit_tiny_patch16_224", args=builders.ARGS | args)
    return model, load_checkpoint(model, path, key)


def refusal(path: Path, key: str | None = None, **args: Any) -> str:
    """Why a file is refused; the model is left as it was."""
    model = create_model("vit_tiny_patch16_224", args=builders.ARGS | args)
    before = builders.state(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path, key)
    assert builders.same_state(model, before)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    return str(caught.value)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: it is no part of the project")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_real_model_comes_out_of_every_wrapping_bit_equal(prefix: str, tmp_path: Path) -> None:
    description = json.loads((DATA / "vit_cifar10.json").read_text())
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    model: Any = create_model(description["model"], args={name: description[name] for name in names})
    weights = load_file(DATA / "vit_cifar10.safetensors")
    for keys in WRAPPERS:
        nn.init.zeros_(model.patch_embed.proj.weight)  # so that the weights before do not pass for these
        note = load_checkpoint(model, write(tmp_path, wrapped(keys, prefixed(prefix, weights))))
        assert builders.same_state(model, weights)
        source = f"{'.'.join(keys)} of model.pth.tar" if keys else "model.pth.tar"
        assert note == f"weights: {source}" + (f", without the prefix {prefix}" if prefix else "")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_safetensors_file_has_prefixes_too(prefix: str, tmp_path: Path) -> None:
    weights = some()
    save_file(prefixed(prefix, weights) | {"criterion.weight": torch.ones(3)}, tmp_path / "weights.bin")
    if prefix:
        model, note = load(tmp_path / "weights.bin")
        assert builders.same_state(model, weights)
        assert note.endswith(f"without the prefix {prefix}; left out: criterion.weight")
    else:
        assert "criterion.weight is unknown to the model" in refusal(tmp_path / "weights.bin")


def test_nested_modules_are_joined(tmp_path: Path) -> None:
    weights = some()
    nested: dict[str, Any] = {}
    for name, tensor in weights.items():
        *path, last = name.split(".")
        inner: Any = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = tensor
    assert builders.same_state(load(write(tmp_path, {"params": nested}))[0], weights)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "EMA.model", "ema_model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_moving_average_is_taken_and_the_other_is_told_and_can_be_chosen(
    name: str, prefix: str, tmp_path: Path
) -> None:
    raw, average = some(seed=1), some(seed=2)
    path = write(tmp_path, {"state_dict": prefixed(prefix, raw), "epoch": 3, name: prefixed(prefix, average)})
    model, note = load(path)
    assert builders.same_state(model, average)
    assert note.startswith(f"weights: {name} of model.pth.tar")
    assert note.endswith("; state_dict is there too (model.checkpoint_key)")
    model, note = load(path, "state_dict")
    assert builders.same_state(model, raw)
    assert note.endswith(f"; {name} is there too (model.checkpoint_key)")
    for key in (name, f"{name}.", f"{name}.{prefix}"):
        assert builders.same_state(load(path, key)[0], average)


def test_weights_beside_an_average_at_the_top_are_chosen_by_an_empty_key(tmp_path: Path) -> None:
    raw, average = some(seed=1), some(seed=2)
    path = write(tmp_path, {**raw, "ema": average})
    model, note = load(path)
    assert builders.same_state(model, average) and '; "" is there too' in note
    assert builders.same_state(load(path, "")[0], raw)


@pytest.mark.parametrize("together", [False, True])
def test_two_models_that_differ_are_asked_for_by_key(together: bool, tmp_path: Path) -> None:
    student, teacher = some(seed=1), some(seed=2)
    content: dict[str, Any] = {"student": prefixed("module.", student), "teacher": teacher}
    if together:
        content = {"state_dict": prefixed("student.", student) | prefixed("teacher.", teacher)}
    outer = "state_dict." if together else ""
    path = write(tmp_path, content)
    assert f"several weights for this model: {outer}student, {outer}teacher; choose by model.ch" in refusal(path)
    assert builders.same_state(load(path, f"{outer}student")[0], student)
    assert builders.same_state(load(path, f"{outer}teacher")[0], teacher)
    assert f"has no weights 'students' (model.checkpoint_key); it has {outer}student, {outer}t" in refusal(
        path, "students"
    )


def test_two_names_of_equal_weights_are_one(tmp_path: Path) -> None:
    weights = some()
    model, note = load(write(tmp_path, {"model": weights, "state_dict": {k: v.clone() for k, v in weights.items()}}))
    assert builders.same_state(model, weights)
    assert note == "weights: model of model.pth.tar"


def test_a_lightning_checkpoint_is_unwrapped_and_what_was_left_out_is_named(tmp_path: Path) -> None:
    weights = some()
    state = prefixed("model.", weights) | {"loss.weight": torch.ones(7), "metric.total": torch.tensor(3)}
    path = write(tmp_path, {"epoch": 3, "state_dict": state, "callbacks": {}, "optimizer_states": [{"state": {}}]})
    model, note = load(path)
    assert builders.same_state(model, weights)
    assert note.endswith("without the prefix model.; left out: state_dict.loss.weight, state_dict.metric.total")


def test_weights_of_an_averaged_model_of_torch_are_found(tmp_path: Path) -> None:
    model = builders.model(seed=4)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert builders.same_state(load(write(tmp_path, averaged.state_dict()))[0], model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_weights_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in some().items()}
    model, _ = load(write(tmp_path, weights))
    assert builders.same_state(model, {name: tensor.float() for name, tensor in weights.items()})
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


def test_tensors_that_share_memory_are_all_loaded(tmp_path: Path) -> None:
    weights = some()
    weights["blocks.1.norm1.weight"] = weights["blocks.0.norm1.weight"]
    assert builders.same_state(load(write(tmp_path, weights))[0], weights)


def one_bad(value: Any, name: str = "head.bias") -> dict[str, Any]:
    return {**some(), name: value}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (one_bad(torch.tensor([1.0, 2, 3, 4, 5, float("nan"), 7])), "head.bias has 1 values of 7 that are NaN or inf"),
        (one_bad(torch.full((7,), float("-inf"))), "head.bias has 7 values of 7 that are NaN or infinite"),
        (one_bad(torch.full((7,), 1e300, dtype=torch.float64)), "head.bias has 7 values of 7 that are NaN or infinite"),
        (one_bad(torch.ones(7, dtype=torch.int8)), "head.bias is int8"),
        (one_bad(torch.ones(7, dtype=torch.bool)), "head.bias is bool"),
        (one_bad(torch.ones(7, dtype=torch.complex64)), "head.bias is complex64"),
        (one_bad(torch.ones(7, device="meta")), r"head.bias has no values \(device meta\)"),
        (one_bad(None), "head.bias is None, not a plain tensor"),
        (one_bad("text"), "head.bias is str, not a plain tensor"),
        (one_bad([1.0] * 7), "head.bias is list, not a plain tensor"),
        (one_bad(torch.ones(8)), r"head.bias is \[8\], not \[7\]"),
        (one_bad(torch.ones(1), "extra.weight"), "extra.weight is unknown to the model"),
        ({k: v.to(torch.int8) for k, v in some().items()}, r"is int8; .* is int8, and \d+ more; save them dense"),
        ({k: v for k, v in some().items() if k != "cls_token"}, "cls_token is missing"),
        ({k: v for k, v in some().items() if "head" not in k}, "it has no classifier: give weights that were fine-t"),
        (builders.model(depth=4).state_dict(), r"blocks\.3\..* is unknown to the model, .*; try depth=4 in model.args"),
        (builders.model(depth=2).state_dict(), r"blocks\.2\..* is missing, .*; try depth=2 in model.args"),
        (builders.model(num_classes=9).state_dict(), r"head.weight is \[9, 24\], not \[7, 24\].*; try num_classes=9"),
        (builders.model(embed_dim=48).state_dict(), r"is \[1, 1, 48\], not \[1, 1, 24\].*; try embed_dim=48 with its"),
        (builders.model(embed_dim=48, patch_size=2).state_dict(), "try embed_dim=48 .*, patch_size=2, img_size="),
        (builders.model(in_chans=1).state_dict(), "try in_chans=1 in model.args"),
        ({k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in some().items()},
         "norm.weight is missing; .*; try global_pool=avg in model.args"),
        ({**some(), "blocks.0.attn.qkv.SCB": torch.ones(72)}, "it is quantised: save the weights before that"),
        ({**some(), "blocks.0.attn.qkv.lora_A.weight": torch.ones(2)}, "it has LoRA layers: merge them"),
        ({"vit.embeddings.cls_token": torch.ones(1, 1, 24)}, "its names are those of Hugging Face's"),
        ({"encoder.layers.encoder_layer_0.ln_1.weight": torch.ones(24)}, "its names are those of torchvision"),
        (builders.model("distilled").state_dict(), "dist_token is unknown"),
        (builders.model("registers").state_dict(), "reg_token is unknown"),
        (builders.model("average_pooling").state_dict(), "cls_token is missing"),
        ({"vit.encoder.layer.0.query.weight": torch.ones(2)}, "it has none of timm's names, as cls_token, "),
        ({"weight": torch.ones(2)}, "it has none of timm's names, as .*, but weight"),
        ({"epoch": 3, "args": None}, r"holds no tensor by name \(epoch, args\); where it was made, save the weights"),
        ({}, "holds no tensor by name; where it was made"),
        ([torch.ones(2)], "holds a list, not tensors by name"),
        (torch.ones(2), "holds a Tensor, not tensors by name"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_no_weight_of_the_model_is_named(weights: Any, message: str, legacy: bool, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "weights.pth", _use_new_zipfile_serialization=not legacy)
    assert re.search(rf"weights\.pth.* {message}", refusal(tmp_path / "weights.pth"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize", "ignore:TypedStorage")
def test_a_model_that_was_quantised_dynamically_is_told_so(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(builders.model(), {torch.nn.Linear}, dtype=torch.qint8)
    assert "; it is quantised: save the weights before that" in refusal(write(tmp_path, model.state_dict()))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:Validating sparse", "ignore:TypedStorage")
def test_quantised_and_sparse_tensors_are_named(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(7), 0.1, 0, torch.qint8)
    assert "head.bias is qint8" in refusal(write(tmp_path, one_bad(quantised)))
    assert "head.bias is sparse" in refusal(write(tmp_path, one_bad(torch.ones(7).to_sparse())))


def test_float8_is_named(tmp_path: Path) -> None:
    assert "head.bias is float8_e4m3fn" in refusal(write(tmp_path, one_bad(torch.ones(7).to(torch.float8_e4m3fn))))


def test_a_mapping_that_holds_itself_is_read(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": some()}
    content["again"] = content
    model, note = load(write(tmp_path, content))
    assert builders.same_state(model, content["model"]) and note.startswith("weights: model of")


def test_names_that_are_the_same_once_joined_are_refused(tmp_path: Path) -> None:
    assert "holds two values named a.b" in refusal(write(tmp_path, {"a": {"b": torch.ones(1)}, "a.b": torch.ones(2)}))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_of_another_image_size_is_resampled_as_timm_does_and_that_is_told(
    prefix: str, ema: bool, tmp_path: Path
) -> None:
    weights = some()
    content = {"state_dict": prefixed(prefix, some(seed=5)), "ema": prefixed(prefix, weights)} if ema else weights
    path = write(tmp_path, content if ema else {"state_dict": prefixed(prefix, weights)})
    model, note = load(path, img_size=48)
    torch.save(weights, tmp_path / "bare.pth")
    expected = timm.create_model(
        "vit_tiny_patch16_224", **builders.ARGS | {"img_size": 48}, pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "bare.pth"), "num_classes": 7},
    )  # fmt: skip
    assert builders.same_state(model, expected.state_dict())
    assert "; pos_embed resampled from [1, 17, 24] to [1, 37, 24]" in note
    assert note.endswith("; state_dict is there too (model.checkpoint_key)") == ema


def test_a_size_that_hides_another_fault_tells_that_fault_alone(tmp_path: Path) -> None:
    said = refusal(write(tmp_path, some()), img_size=48, num_classes=9)
    assert "head.weight is [7, 24], not [9, 24]" in said and "pos_embed" not in said


@pytest.mark.parametrize(
    "args", [{"no_embed_class": True}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}]
)
def test_a_position_embedding_of_other_tokens_is_not_resampled(args: dict[str, Any], tmp_path: Path) -> None:
    assert "pos_embed is [1, 17, 24]" in refusal(write(tmp_path, some()), **args)


def test_the_first_authors_names_of_deit3_are_known(tmp_path: Path) -> None:
    weights = builders.model("layer_scale", seed=4).state_dict()
    original = {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): tensor for name, tensor in weights.items()}
    model, note = load(write(tmp_path, {"model": original}), init_values=0.1)
    assert builders.same_state(model, weights)
    assert note == "weights: model of model.pth.tar; 6 names changed to timm's"


def test_a_mask_token_and_a_patch_embedding_by_a_linear_layer_are_known(tmp_path: Path) -> None:
    weights = some()
    flat = weights | {"patch_embed.proj.weight": weights["patch_embed.proj.weight"].flatten(1)}
    model, note = load(write(tmp_path, {"teacher": prefixed("backbone.", flat | {"mask_token": torch.ones(1, 24)})}))
    assert builders.same_state(model, weights)
    assert note.startswith("weights: teacher of model.pth.tar, without the prefix backbone.; patch_embed.proj.weight")
    assert note.endswith("; left out: mask_token")


def test_clip_names_are_known(tmp_path: Path) -> None:
    model = create_model("vit_tiny_patch16_224", args=builders.ARGS | {"pre_norm": True})
    weights = builders.randomised(model, seed=4).state_dict() | {"head.bias": torch.zeros(7)}
    names = {
        "patch_embed.proj": "conv1", "norm_pre": "ln_pre", "blocks.": "transformer.resblocks.",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", ".norm": ".ln_",
    }  # fmt: skip
    original = {"visual.proj": weights["head.weight"].T, "visual.class_embedding": weights["cls_token"][0, 0]}
    original |= {"visual.positional_embedding": weights["pos_embed"][0], "logit_scale": torch.ones(())}
    for name, tensor in weights.items():
        if name not in ("head.weight", "head.bias", "cls_token", "pos_embed"):
            new = re.sub(r"^norm\.", "ln_post.", name)
            for old, theirs in names.items():
                new = new.replace(old, theirs)
            original[f"visual.{new}"] = tensor
    loaded, note = load(write(tmp_path, {"state_dict": original}), pre_norm=True)
    assert builders.same_state(loaded, weights)
    assert "head.bias made up" in note and "names changed to timm's" in note


def swin(**args: Any) -> nn.Module:
    return create_model("swin_tiny_patch4_window7_224", args=SWIN | {"num_classes": 7} | args)


def test_the_first_authors_names_of_swin_are_known(tmp_path: Path) -> None:
    weights = builders.randomised(swin(), seed=4).state_dict()
    original = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): tensor
        for name, tensor in weights.items()
    }
    original |= {
        "layers.0.blocks.1.attn_mask": torch.ones(2),
        "layers.0.blocks.0.attn.relative_position_index": torch.ones(2),
    }
    model = swin()
    note = load_checkpoint(model, write(tmp_path, {"model": original}))
    assert builders.same_state(model, weights)
    assert note.startswith("weights: model of model.pth.tar; 5 names changed to timm's; left out: ")
    other = swin(window_size=2)
    note = load_checkpoint(other, write(tmp_path, {"model": weights}))
    assert "relative_position_bias_table resampled from [49, 1] to [9, 1]" in note
    with pytest.raises(CheckpointError, match=r"head.fc.weight is \[7, 16\], not \[9, 16\].*try num_classes=7"):
        load_checkpoint(swin(num_classes=9), write(tmp_path, weights))


@timm.models.register_model
def vit_of_the_hub(**args: Any) -> nn.Module:
    """A small ViT of 1,000 classes, whose weights are where the arguments say."""
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 1000}
    build = timm.models.model_entrypoint("vit_tiny_patch16_224")
    model: nn.Module = build(**defaults | args)
    return model


@pytest.fixture
def hub(tmp_path: Path) -> tuple[Weights, dict[str, Any]]:
    """The weights that stand for timm's own, and the arguments that say where they are."""
    weights = builders.randomised(timm.create_model("vit_of_the_hub"), seed=4).state_dict()
    torch.save(weights, tmp_path / "timm.pth")
    return weights, {"pretrained_cfg_overlay": {"file": str(tmp_path / "timm.pth")}}


def test_timms_weights_are_loaded_as_they_are(hub: tuple[Weights, dict[str, Any]]) -> None:
    weights, source = hub
    model = create_model("vit_of_the_hub", args=source)
    note = load_pretrained(model, "vit_of_the_hub", source)
    assert builders.same_state(model, weights)
    assert re.fullmatch(r"weights: timm's vit_tiny_patch16_224\.\w+", note)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"img_size": 48}, "; pos_embed resampled from [1, 17, 24] to [1, 37, 24]"),
        ({"in_chans": 1}, "; patch_embed.proj.weight changed from 3 input channels to 1"),
        ({"num_classes": 10}, "; the classifier is random, as they are for 1000 classes"),
    ],
)
def test_timms_weights_are_adapted_as_timm_does_and_that_is_told(
    args: dict[str, Any], told: str, hub: tuple[Weights, dict[str, Any]]
) -> None:
    args = args | hub[1]
    torch.manual_seed(0)
    model = create_model("vit_of_the_hub", args=args)
    note = load_pretrained(model, "vit_of_the_hub", args, new_classifier=True)
    torch.manual_seed(0)
    expected = timm.create_model("vit_of_the_hub", pretrained=True, **args)
    assert builders.same_state(model, expected.state_dict())
    assert note.endswith(told)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_classes": 10}, "are for 1000 classes, the model is for 10: its classifier would be random; train it"),
        ({"depth": 1}, r"do not fit: blocks\.1\..* is unknown to the model"),
        ({"depth": 3}, r"do not fit: blocks\.2\..* is missing"),
        ({"init_values": 0.1}, r"do not fit: blocks\.0\.ls1\.gamma is missing"),
        ({"embed_dim": 48}, r"do not fit: .*, not \[1, 1, 48\]"),
    ],
)
def test_timms_weights_that_would_leave_a_part_random_are_refused(
    args: dict[str, Any], message: str, hub: tuple[Weights, dict[str, Any]]
) -> None:
    model = create_model("vit_of_the_hub", args=args | hub[1])
    before = builders.state(model)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(model, "vit_of_the_hub", args | hub[1])
    assert builders.same_state(model, before)


def test_weights_that_timm_does_not_have_or_that_are_out_of_reach_name_the_way_out(tmp_path: Path) -> None:
    model = builders.model()
    with pytest.raises(ModelError, match=r"has no weights for vit_of_the_hub; give your own \(model.checkpoint\)"):
        load_pretrained(model, "vit_of_the_hub", {})
    gone = {"pretrained_cfg_overlay": {"file": str(tmp_path / "gone.pth")}}
    with pytest.raises(
        ModelError, match=r"cannot get timm's weights for vit_of_the_hub; give a file .*model.checkpoint"
    ):
        load_pretrained(model, "vit_of_the_hub", gone)
