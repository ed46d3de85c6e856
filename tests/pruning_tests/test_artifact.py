"""A saved model comes back bit-equal, or an error says what is wrong; nothing is saved by half."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pruning.artifact import Description, copy_to, load, read_description, save, save_weights, skeleton
from pruning.data import InputSpec
from pruning.errors import ArtifactError
from pruning.model.anatomy import examine
from pruning.model.exits import fit_exits, truncate
from pruning.model.surgery import apply_plan, keep_all_block, keep_all_plan
from pruning.plan import TOKEN_REDUCTIONS, TokenReduction
from pruning.repair.compensation import repaired_model
from tests.pruning_tests import builders

INPUT = InputSpec(size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), interpolation="bilinear", crop_pct=0.9)


def pruned(family: str = "vit") -> tuple[nn.Module, Description]:
    """An exit with a head of its own, tokens dropped, everything else pruned and repaired."""
    dense, images = builders.model(family), builders.images(16)
    head = fit_exits(dense, images, [2], epochs=2)[2]
    shorter = truncate(dense, 2, head)
    plan = replace(builders.plan(examine(shorter), num_tokens=(12, 5)), cutoff_token=0.4)
    return repaired_model(shorter, plan, images).model, description(family, plan=plan)


def description(family: str = "vit", **other: Any) -> Description:
    name, more = builders.FAMILIES[family]
    given: dict[str, Any] = {
        "name": name,
        "args": builders.ARGS | more,
        "input": INPUT,
        "plan": keep_all_plan(builders.anatomy(family)),
    }
    return Description(**(given | other))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_a_saved_model_comes_back_with_bit_equal_logits(family: str, tmp_path: Path) -> None:
    model, its_description = pruned(family)
    save(model, its_description, tmp_path / "point")
    loaded, read = load(tmp_path / "point")
    assert read == its_description
    assert torch.equal(loaded(builders.batch()), model(builders.batch()))
    assert builders.same_state(loaded, builders.state(model))
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize(
    ("family", "kind", "is_whole"),
    builders.every_pair(["vit", "distilled", "registers_average"], TOKEN_REDUCTIONS, [False, True]),
)
def test_a_model_of_every_token_reduction_comes_back(
    family: str, kind: TokenReduction, is_whole: bool, tmp_path: Path
) -> None:
    model, anatomy = builders.model(family), builders.anatomy(family)
    plan = builders.plan(anatomy, num_tokens=(12, 5, 5))
    if is_whole:
        plan = replace(plan, blocks=tuple(keep_all_block(anatomy.blocks[0], count) for count in (12, 5, 5)))
    plan = replace(plan, token_reduction=kind, cutoff_token=0.4)
    reduced = apply_plan(model, plan)
    save(reduced, description(family, plan=plan), tmp_path / "point")
    loaded, read = load(tmp_path / "point")
    assert read.plan == plan
    assert torch.equal(loaded(builders.batch()), reduced(builders.batch()))


def test_a_dense_model_comes_back_too(tmp_path: Path) -> None:
    model = builders.model()
    save(model, description(), tmp_path / "dense")
    assert torch.equal(load(str(tmp_path / "dense"))[0](builders.batch()), model(builders.batch()))


def test_the_folder_holds_the_plan_and_the_weights_and_no_pickle(tmp_path: Path) -> None:
    model, its_description = pruned()
    save(model, its_description, tmp_path / "deep" / "down" / "point")
    assert names(tmp_path / "deep" / "down") == ["point"]
    folder = tmp_path / "deep" / "down" / "point"
    assert names(folder) == ["model.safetensors", "plan.json"]
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert record.keys() == {"format", "model", "input", "plan", "weights"}
    assert record["plan"] == its_description.plan.to_json() and record["model"]["args"] == dict(its_description.args)


def test_a_description_comes_back_from_json_text() -> None:
    its_description = description(args={"img_size": [32, 48]})
    assert Description.from_json(json.loads(json.dumps(its_description.to_json()))) == its_description


FORMAT_2 = """
{"format": 2,
 "model": {"name": "vit_tiny_patch16_224", "args": {"img_size": 8, "patch_size": 4, "embed_dim": 4, "depth": 1,
           "num_heads": 2, "mlp_ratio": 1.0, "num_classes": 3}},
 "input": {"size": [8, 8], "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear",
           "crop_pct": 0.9},
 "plan": {"blocks": [{"keep_heads": [1], "keep_qk": [[0, 1]], "keep_v": [[0, 1]], "keep_hidden": [0, 2],
          "num_tokens": 4}], "cutoff_token": null, "token_reduction": "lfe"}}
"""


def test_a_model_saved_in_format_2_loads_with_the_crop_mode_of_its_time(tmp_path: Path) -> None:
    old = Description.from_json(json.loads(FORMAT_2))
    assert old.input == replace(INPUT, size=(8, 8), crop_mode="center", exif="ignore")
    model = skeleton(old)
    save(model, old, tmp_path / "point")
    (tmp_path / "point" / "plan.json").write_text(FORMAT_2)
    loaded, read = load(tmp_path / "point")
    assert read == old and builders.same_state(loaded, builders.state(model))


def test_the_input_is_saved_with_its_crop_mode_and_exif_rule() -> None:
    spec = replace(INPUT, crop_mode="border", exif="apply")
    record = json.loads(json.dumps(description(input=spec).to_json()))
    assert record["format"] == 3
    assert (record["input"]["crop_mode"], record["input"]["exif"]) == ("border", "apply")
    assert Description.from_json(record).input == spec


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "point"
    save(builders.model(seed=1), description(), folder)
    (folder / "stale").touch()
    model, its_description = pruned()
    save(model, its_description, folder)
    assert names(folder) == ["model.safetensors", "plan.json"] and names(tmp_path) == ["point"]
    assert torch.equal(load(folder)[0](builders.batch()), model(builders.batch()))


def test_saving_that_fails_leaves_nothing_half_written_and_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "point"
    with pytest.raises(ArtifactError, match=r"cannot write .*point"):
        save(builders.model(), description(args={"no": object()}), folder)
    assert names(tmp_path) == []
    model, its_description = pruned()
    save(model, its_description, folder)
    with pytest.raises(ArtifactError, match=r"cannot write .*point"):
        save(builders.model(), description(args={"no": object()}), folder)
    assert names(tmp_path) == ["point"]
    assert torch.equal(load(folder)[0](builders.batch()), model(builders.batch()))


def test_weights_that_cannot_be_saved_leave_nothing(tmp_path: Path) -> None:
    model: Any = builders.model()
    model.pos_embed = nn.Parameter(model.pos_embed.detach().to_sparse())  # safetensors refuses it, after the plan
    with pytest.raises(ArtifactError, match="cannot write"):
        save(model, description(), tmp_path / "point")
    with pytest.raises(ArtifactError, match="cannot write"):
        save_weights(model.state_dict(), tmp_path / "weights.safetensors")
    assert names(tmp_path) == []


def test_a_place_that_is_no_folder_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model = builders.model()
    for place in (tmp_path / "file" / "point", tmp_path / "file" / "deeper" / "point"):
        with pytest.raises(ArtifactError, match="cannot write"):
            save(model, description(), place)
        with pytest.raises(ArtifactError, match="cannot write"):
            save_weights(model.state_dict(), place)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "in the way"


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Rewrites plan.json; a change gives the new record, or None where it changes the old one in place."""

    def apply(folder: Path) -> None:
        record = json.loads((folder / "plan.json").read_text())
        changed = change(record)
        (folder / "plan.json").write_text(json.dumps(record if changed is None else changed))

    return apply


def reweigh(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no plan": (lambda folder: (folder / "plan.json").unlink(), "plan.json"),
    "half a plan": (lambda folder: cut_in_half(folder / "plan.json"), "plan.json"),
    "an empty plan": (lambda folder: (folder / "plan.json").write_text(""), "plan.json"),
    "a plan that is no text": (lambda folder: (folder / "plan.json").write_bytes(b"\xff\xfe\x00\x80"), "plan.json"),
    "a list for a plan": (edit(lambda record: [record]), "plan.json"),
    "another format": (edit(lambda record: record.update(format=1)), "format is 1, not 2 or 3"),
    "no format": (edit(lambda record: record.pop("format") and None), "format is None"),
    "no model": (edit(lambda record: record.pop("model") and None), "KeyError 'model'"),
    "no name": (edit(lambda record: record["model"].pop("name") and None), "KeyError 'name'"),
    "args that are none": (edit(lambda record: record["model"].update(args=None)), "plan.json"),
    "an unknown model": (edit(lambda record: record["model"].update(name="vit_nowhere")), "vit_nowhere"),
    "an unknown argument": (edit(lambda record: record["model"]["args"].update(colour=3)), "colour"),
    "another family": (edit(lambda record: record["model"].update(name="resnet10t", args={})), "timm.models.resnet"),
    "an unknown input": (edit(lambda record: record["input"].update(sound=1)), "sound"),
    "no input size": (edit(lambda record: record["input"].pop("size") and None), "size"),
    "a mean out of range": (
        edit(lambda record: record["input"].update(mean=[123.0] * 3)),
        r"mean is .*not in \[0, 1\]",
    ),
    "an unknown crop mode": (edit(lambda record: record["input"].update(crop_mode="round")), "crop_mode is 'round'"),
    "no plan in the plan": (edit(lambda record: record.update(plan=None)), "PlanError"),
    "a block without heads": (edit(lambda record: record["plan"]["blocks"][0].update(keep_heads=[])), "no head"),
    "an unknown token reduction": (edit(lambda record: record["plan"].update(token_reduction="melt")), "melt"),
    "a unit too many": (edit(lambda record: record["plan"]["blocks"][0].update(keep_hidden=[96])), "hidden unit 96"),
    "a block too many": (
        edit(lambda record: record["plan"]["blocks"].append(record["plan"]["blocks"][2])),
        "exit after",
    ),
    "another width": (edit(lambda record: record["plan"]["blocks"][1].update(keep_hidden=[1])), "blocks.1.mlp.fc1"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "half the weights": (lambda folder: cut_in_half(folder / "model.safetensors"), "model.safetensors"),
    "weights that are none": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "a weight less": (reweigh(lambda weights: weights.pop("norm.bias")), "norm.bias is missing"),
    "a weight more": (reweigh(lambda weights: weights.update(more=torch.ones(1))), "more is unknown"),
    "a weight of another shape": (reweigh(lambda weights: weights.update({"norm.bias": torch.ones(3)})), "norm.bias"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved model, to copy from."""
    model = builders.model()
    plan = builders.plan(examine(model), num_tokens=(16, 9, 9))
    folder = tmp_path_factory.mktemp("saved") / "point"
    save(apply_plan(model, plan), description(plan=plan), folder)
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_as_it_was_saved_is_an_artifact_error_that_names_it(case: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "point")
    breaks, message = BROKEN[case]
    breaks(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_no_folder_is_an_artifact_error(tmp_path: Path) -> None:
    for call in (load, read_description):
        with pytest.raises(ArtifactError, match=r"cannot read .*nowhere"):
            call(tmp_path / "nowhere")


def test_weights_alone_are_saved_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.safetensors"
    for seed in (1, 2):
        model = builders.model(seed=seed)
        save_weights(model.state_dict(), path)
        weights = load_file(path)
        assert builders.same_state(model, weights)
    assert names(path.parent) == ["weights.safetensors"]


def test_saving_leaves_the_model_as_it_was_even_where_memory_is_not_in_order(tmp_path: Path) -> None:
    model: Any = builders.model()
    model.head.weight = nn.Parameter(model.head.weight.detach().T.contiguous().T)
    before = builders.state(model)
    save(model, description(), tmp_path / "point")
    assert builders.same_state(model, before)
    loaded, _ = load(tmp_path / "point")
    assert builders.same_state(loaded, before)  # some processors multiply in another order for another memory order
    torch.testing.assert_close(loaded(builders.batch()), model(builders.batch()))


def test_a_copy_loads_and_never_overwrites(tmp_path: Path) -> None:
    model = builders.model()
    save(model, description(), tmp_path / "point")
    copy_to(tmp_path / "point", tmp_path / "far" / "copy")
    assert torch.equal(load(tmp_path / "far" / "copy")[0](builders.batch()), model(builders.batch()))
    assert names(tmp_path / "far") == ["copy"]
    with pytest.raises(ArtifactError, match="copy exists; give a folder that does not"):
        copy_to(tmp_path / "point", tmp_path / "far" / "copy")
    with pytest.raises(ArtifactError, match=r"cannot read .*nowhere"):
        copy_to(tmp_path / "nowhere", tmp_path / "far" / "other")
    assert names(tmp_path / "far") == ["copy"]


@pytest.mark.parametrize("use", [load, lambda folder: copy_to(folder, folder.parent / "copy")], ids=["load", "copy_to"])
def test_weights_that_were_overwritten_since_are_refused(tmp_path: Path, use: Callable[[Path], object]) -> None:
    folder = tmp_path / "point"
    save(builders.model(), description(), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"head.bias": weights["head.bias"] + 1e-3}, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"model.safetensors is not what was saved with its plan.json"):
        use(folder)
    assert names(tmp_path) == ["point"]


def test_a_model_that_an_older_version_saved_has_no_fingerprint_and_loads(tmp_path: Path) -> None:
    save(builders.model(), description(), tmp_path / "point")
    path = tmp_path / "point" / "plan.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["weights"]
    path.write_text(json.dumps(record), encoding="utf-8")
    assert load(tmp_path / "point")[1].weights is None
