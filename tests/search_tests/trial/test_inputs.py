"""The inputs that are loaded for a recipe, and the errors that they show before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pruning.artifact import save_weights
from pruning.data import Images
from pruning.errors import CheckpointError, DataError
from pruning.fingerprints import fingerprint_of_weights
from search.config import Config
from search.errors import ConfigError, SweepError
from search.trial.inputs import Inputs, load_inputs
from tests.search_tests import tiny

DIGITS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 1, "num_heads": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_images(tmp_path / "images" / "train")
    tiny.write_images(tmp_path / "images" / "val", count=2)
    return tmp_path


def config(folder: Path, **changes: Any) -> Config:
    return tiny.config(data__root=str(folder / "images"), **changes)


def digits(**changes: Any) -> Config:
    data = {"dataset": "digits", "test": "test", "calibration_images": 60, "probe_images": 40}
    data |= {"mean": [0.3], "std": [0.4], "val_images": 30}
    return tiny.config(**{"model__args": DIGITS, "model__training": {"epochs": 1}, "data": data} | changes)


def colors(images: Images) -> list[tuple[int, ...]]:
    """The colour of each image, which tells it from all others."""
    return [tuple(pixels[:, 0, 0].tolist()) for pixels in images.pixels]


def test_inputs_are_the_model_its_space_and_its_images(folder: Path) -> None:
    inputs = load_inputs(config(folder, space__exit_block=[2, 3], data__mean=[0.1, 0.2, 0.3]), folder / "runs")
    assert inputs.trained
    assert list(inputs.space.exit_blocks) == [2, 3]
    assert (inputs.spec.size, inputs.spec.mean, inputs.spec.std) == ((16, 16), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert inputs.splits.val.mean == (0.1, 0.2, 0.3)
    assert inputs.splits.val.pixels.shape == (8, 3, 16, 16)
    assert inputs.splits.test is None
    assert not inputs.model.training
    assert not (folder / "runs").exists()


def test_training_images_are_dealt_to_calibration_and_probe(folder: Path) -> None:
    splits = load_inputs(config(folder), folder).splits
    assert (len(splits.calibration), len(splits.probe)) == (8, 8)
    assert len({*colors(splits.calibration), *colors(splits.probe)}) == 16
    assert splits.calibration.labels.bincount().tolist() == [2, 2, 2, 2]


def test_few_training_images_are_dealt_in_the_shares_that_were_asked_for(folder: Path) -> None:
    splits = load_inputs(config(folder, data__calibration_images=100, data__probe_images=300), folder).splits
    assert (len(splits.calibration), len(splits.probe)) == (4, 12)


def test_fewer_training_images_than_were_asked_for_are_told(folder: Path) -> None:
    inputs = load_inputs(config(folder, data__calibration_images=100, data__probe_images=300), folder)
    said = "16 training images are fewer than data.calibration_images + data.probe_images: 4 are for calibration, 12 to"
    assert [note for note in inputs.notes if note.startswith(said)]
    assert not [note for note in load_inputs(config(folder), folder).notes if "fewer" in note]


def test_copies_of_images_under_two_labels_are_told(folder: Path) -> None:
    first, second = (sorted(place.iterdir())[0] for place in sorted((folder / "images" / "val").iterdir())[:2])
    shutil.copy(first, second)
    assert "2 of the 8 val images are there under two labels, as copies" in load_inputs(config(folder), folder).notes


def test_training_images_that_cannot_be_dealt_are_too_few(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"16 training images are too few: .*data.probe_images=10000 would get 0 and 16 of"
    ):
        load_inputs(config(folder, data__probe_images=10_000), folder)


def test_images_are_drawn_with_the_seed(folder: Path) -> None:
    first, same, other = (load_inputs(config(folder, data__seed=seed), folder).splits for seed in (0, 0, 1))
    assert colors(first.calibration) == colors(same.calibration)
    assert colors(first.calibration) != colors(other.calibration)


def test_limited_split_has_as_many_of_each_class(folder: Path) -> None:
    tiny.write_images(folder / "images" / "exam", count=5, blue=90)
    changes = {"data__test": "exam", "data__test_images": 12, "data__val_images": 8}
    splits = load_inputs(config(folder, **changes), folder).splits
    assert splits.test is not None
    assert splits.test.labels.bincount().tolist() == [3, 3, 3, 3]
    assert splits.val.labels.bincount().tolist() == [2, 2, 2, 2]


def test_val_folder_with_fewer_classes_keeps_the_indices_of_train(folder: Path) -> None:
    (folder / "images" / "val").rename(folder / "images" / "whole")
    tiny.write_images(folder / "images" / "val", classes="bd")
    splits = load_inputs(config(folder), folder).splits
    assert sorted(splits.val.labels.tolist()) == [1] * 4 + [3] * 4


def test_class_map_gives_the_indices(folder: Path) -> None:
    class_map = folder / "classes.txt"
    class_map.write_text("d\nc\nb\na\n")
    plain = load_inputs(config(folder), folder).splits.val
    mapped = load_inputs(config(folder, data__class_map=str(class_map)), folder).splits.val
    label = dict(zip(colors(plain), plain.labels.tolist(), strict=True))
    assert [label[color] for color in colors(mapped)] == [3 - index for index in mapped.labels.tolist()]


def test_exit_beyond_the_depth_shows_before_any_image_is_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"space\.exit_block: 4 is no exit of a model with 3 blocks"):
        load_inputs(config(folder / "none", space__exit_block=[1, 4]), folder)


def test_weights_to_train_from_follow_from_the_recipes_seed(tmp_path: Path) -> None:
    one, same = (load_inputs(digits(), tmp_path).model.state_dict() for _ in range(2))
    other = load_inputs(digits(model__training={"epochs": 1, "seed": 1}), tmp_path).model.state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_weights_are_trained_once(tmp_path: Path) -> None:
    inputs = load_inputs(digits(), tmp_path)
    assert not inputs.trained
    with torch.no_grad():
        inputs.model.head.bias.fill_(7)
    save_weights(inputs.model.state_dict(), inputs.cache)
    again = load_inputs(digits(), tmp_path)
    assert again.trained
    assert again.model.head.bias.tolist() == [7] * 10


def cache_of(config: Config, runs: Path) -> Path:
    inputs: Inputs = load_inputs(config, runs)
    return inputs.cache


def test_other_training_data_or_model_is_trained_anew(tmp_path: Path) -> None:
    base = digits()
    data = base.model_dump(mode="json")["data"]
    changed = [
        digits(model__training={"epochs": 2}),
        digits(model__training={"epochs": 1, "seed": 1}),
        digits(model__args=DIGITS | {"depth": 2}),
        digits(data=data | {"probe_images": 50}),
        digits(data=data | {"seed": 1}),
        digits(data=data | {"mean": [0.2]}),
    ]
    caches = [cache_of(config, tmp_path) for config in (base, *changed)]
    assert len(set(caches)) == len(caches)


def test_what_the_search_does_afterwards_needs_no_new_training(tmp_path: Path) -> None:
    base = digits()
    data = base.model_dump(mode="json")["data"]
    same = [
        digits(data=data | {"test": None, "val_images": 50}),
        digits(search__trials=9),
        digits(space__target_ratio=0.5),
        digits(name="other"),
    ]
    assert {cache_of(config, tmp_path) for config in same} == {cache_of(base, tmp_path)}


def grey(folder: Path, **changes: Any) -> Inputs:
    for image in (folder / "images").rglob("*.png"):
        Image.new("RGB", (16, 16), (128, 128, 128)).save(image)
    return load_inputs(config(folder, **changes), folder)


def test_noise_of_zero_leaves_all_pixels_bit_equal(folder: Path) -> None:
    plain, none = (load_inputs(config(folder, **noise), folder).splits for noise in ({}, {"data__noise": 0.0}))
    assert torch.equal(plain.calibration.pixels, none.calibration.pixels)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_training_images_are_stored_once_and_noise_is_among_those_to_train_on(folder: Path, noise: float) -> None:
    splits = load_inputs(config(folder, data__noise=noise), folder).splits
    stored = splits.training.pixels.untyped_storage()
    assert stored.nbytes() == splits.training.pixels.numel()
    for part in (splits.calibration, splits.probe):
        assert part.pixels.untyped_storage().data_ptr() == stored.data_ptr()
    assert torch.equal(torch.cat([splits.calibration.pixels, splits.probe.pixels]), splits.training.pixels)


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_noise_has_the_standard_deviation_that_is_asked_for(folder: Path, noise: float) -> None:
    pixels = grey(folder, data__noise=noise).splits.calibration.pixels
    assert pixels.dtype == torch.uint8
    values = pixels.double() / 255
    assert values.std().item() == pytest.approx(noise, rel=0.05)
    assert values.mean().item() == pytest.approx(128 / 255, abs=0.01)


def test_strong_noise_stays_within_the_pixels_range(folder: Path) -> None:
    pixels = grey(folder, data__noise=5.0).splits.calibration.pixels
    assert {0, 255} <= set(pixels.flatten().tolist())
    assert (pixels == 0).double().mean().item() == pytest.approx(0.46, abs=0.02)  # not wrapped around: P(z < -0.1)


def test_noise_is_drawn_with_the_seed(folder: Path) -> None:
    first, same, other = (grey(folder, data__noise=0.1, data__seed=seed).splits.calibration for seed in (0, 0, 1))
    assert torch.equal(first.pixels, same.pixels)
    assert not torch.equal(first.pixels, other.pixels)


def test_noise_is_on_the_calibration_images_alone(folder: Path) -> None:
    clean, noisy = (load_inputs(config(folder, data__noise=noise), folder).splits for noise in (0.0, 0.3))
    assert not torch.equal(clean.calibration.pixels, noisy.calibration.pixels)
    assert torch.equal(clean.probe.pixels, noisy.probe.pixels)
    assert torch.equal(clean.val.pixels, noisy.val.pixels)
    assert torch.equal(clean.calibration.labels, noisy.calibration.labels)


def test_noise_waits_for_a_dense_model_that_was_trained_without(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run the recipe once without noise"):
        load_inputs(noisy := digits(data__noise=0.1), tmp_path)
    clean = load_inputs(digits(), tmp_path)
    save_weights(clean.model.state_dict(), clean.cache)
    assert load_inputs(noisy, tmp_path).trained


def overwrite(path: Path, color: tuple[int, int, int] = (1, 2, 3)) -> None:
    Image.new("RGB", (16, 16), color).save(path)


def changes_between(first: Config, second: Config, folder: Path) -> list[str]:
    before, now = (load_inputs(which, folder / "runs").fingerprints for which in (first, second))
    return before.changes(now)


def test_equal_inputs_have_equal_fingerprints_wherever_they_lie(folder: Path) -> None:
    plain = config(folder)
    shutil.copytree(folder / "images", folder / "moved")
    moved = tiny.config(data__root=str(folder / "moved"))
    assert changes_between(plain, moved, folder) == []
    assert not plain.differences(moved)


@pytest.mark.parametrize(
    ("image", "changed"),
    [
        ("train/a/0.png", ["the training images"]),
        ("val/b/1.png", ["the val images", "the val images to confirm with"]),
        ("exam/c/0.png", ["the test images"]),
    ],
)
def test_an_image_that_was_overwritten_changes_the_fingerprint_of_its_split(
    folder: Path, image: str, changed: list[str]
) -> None:
    tiny.write_images(folder / "images" / "exam", blue=90)
    plain = config(folder, data__test="exam", data__confirm_images=8)
    before = load_inputs(plain, folder / "runs").fingerprints
    overwrite(folder / "images" / image)
    assert before.changes(load_inputs(plain, folder / "runs").fingerprints) == changed


def test_exchanged_class_folders_preprocessing_and_weights_change_their_fingerprints(folder: Path) -> None:
    torch.manual_seed(0)
    plain = config(folder, model__training={"epochs": 1})
    before = load_inputs(plain, folder / "runs").fingerprints
    assert changes_between(plain, config(folder, model__training={"epochs": 1, "seed": 1}), folder) == [
        "the weights that training starts from"
    ]
    assert "the preprocessing" in changes_between(
        plain, config(folder, model__training={"epochs": 1}, data__mean=[0.1] * 3), folder
    )
    (folder / "images/val/a").rename(folder / "images/val/x")
    (folder / "images/val/b").rename(folder / "images/val/a")
    (folder / "images/val/x").rename(folder / "images/val/b")
    assert before.changes(load_inputs(plain, folder / "runs").fingerprints) == ["the val images"]


def test_a_recipe_with_fingerprints_refuses_other_inputs_and_says_what_changed(folder: Path) -> None:
    plain = config(folder)
    save_weights(tiny.model().state_dict(), folder / "weights.safetensors")
    given: dict[str, Any] = {"model__checkpoint": str(folder / "weights.safetensors")}
    trained = config(folder, **given)
    fingerprints = load_inputs(trained, folder / "runs").fingerprints.model_dump()
    pinned = config(folder, **given, fingerprints=fingerprints)
    load_inputs(pinned, folder / "runs")
    save_weights(tiny.model(seed=1).state_dict(), folder / "weights.safetensors")
    overwrite(folder / "images/train/a/0.png")
    with pytest.raises(SweepError, match="other inputs: the weights, the training images changed meanwhile; put back"):
        load_inputs(pinned, folder / "runs")
    with pytest.raises(SweepError, match=r"or take these with --set fingerprints=null$"):
        load_inputs(pinned, folder / "runs")
    assert plain.fingerprints is None


def test_pinned_weights_are_where_an_added_training_starts(folder: Path) -> None:
    path = folder / "weights.safetensors"
    save_weights(tiny.model().state_dict(), path)
    fingerprints = load_inputs(config(folder, model__checkpoint=str(path)), folder / "runs").fingerprints.model_dump()
    further = config(folder, model__checkpoint=str(path), model__training={"epochs": 1}, fingerprints=fingerprints)
    save_weights(tiny.model(seed=2).state_dict(), load_inputs(further, folder / "runs").cache)
    load_inputs(further, folder / "runs")  # its trained weights are others, as they should be
    save_weights(tiny.model(seed=1).state_dict(), path)
    with pytest.raises(SweepError, match="other inputs: the weights that training starts from changed"):
        load_inputs(further, folder / "runs")


def test_trained_weights_that_were_overwritten_are_refused_with_a_way_out(folder: Path) -> None:
    plain = config(folder, model__training={"epochs": 1})
    cache = load_inputs(plain, folder / "runs").cache
    save_weights(tiny.model(seed=3).state_dict(), cache)
    whole = cache.read_bytes()
    for content, what in ((whole[:-1] + b"?", "is not what vitfront wrote there"), (whole[:900], "cannot read")):
        cache.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{what}.*; remove it, and the model is trained again$"):
            load_inputs(plain, folder / "runs")


def test_trained_weights_are_taken_only_for_the_images_that_they_were_trained_on(folder: Path) -> None:
    plain = config(folder, model__training={"epochs": 1})
    inputs = load_inputs(plain, folder / "runs")
    assert not inputs.trained
    save_weights(tiny.model(seed=3).state_dict(), inputs.cache)
    again = load_inputs(plain, folder / "runs")
    assert again.trained
    assert again.fingerprints.weights == fingerprint_of_weights(tiny.model(seed=3).state_dict())
    for name, other in (("a", "x"), ("b", "a"), ("x", "b")):  # two classes change places
        (folder / "images/train" / name).rename(folder / "images/train" / other)
    assert not load_inputs(plain, folder / "runs").trained


def test_noise_is_part_of_the_recipe_and_not_of_the_fingerprints(folder: Path) -> None:
    assert changes_between(config(folder), config(folder, data__noise=0.2), folder) == []


def test_images_that_splits_share_are_told_or_refused(folder: Path) -> None:
    assert load_inputs(config(folder), folder / "runs").notes[-1] == (
        "8 of the 8 val images are in train too: accuracy on val is too high"
    )
    tiny.write_images(folder / "images" / "exam", blue=90)
    shutil.copy(folder / "images/val/a/1.png", folder / "images/exam/d/0.png")
    with pytest.raises(DataError, match="1 of the 16 test images are in val too"):
        load_inputs(config(folder, data__test="exam"), folder / "runs")
    allowed = load_inputs(config(folder, data__test="exam", data__shared_images="allow"), folder / "runs")
    assert "1 of the 16 test images are in val too: accuracy on test is too high" in allowed.notes
