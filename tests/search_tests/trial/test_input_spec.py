"""The model is fed what timm's own transform gives, or what the recipe says, and it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from pruning.data import Images
from pruning.errors import DataError, SettingError
from search.config import Config
from search.trial.inputs import Inputs, input_spec, load_inputs
from tests.search_tests import tiny

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data" / "cifar10-mini"

TIMM = {
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "border",
    "input_size": (3, 224, 224),
}


def test_input_is_what_timm_knows_unless_the_recipe_says_otherwise() -> None:
    default = input_spec(tiny.config(), TIMM, (16, 16), 3)
    assert {name: getattr(default, name) for name in TIMM if name != "input_size"} | {
        "input_size": (3, 224, 224)
    } == TIMM
    assert default.size == (16, 16) and default.exif == "ignore"
    changes = {"mean": (0.5,), "std": (0.25,), "interpolation": "nearest", "crop_pct": 1.0, "crop_mode": "squash"}
    changes |= {"exif": "apply"}
    spec = input_spec(tiny.config(**{f"data__{name}": value for name, value in changes.items()}), TIMM, (8, 8), 1)
    assert {name: getattr(spec, name) for name in changes} == changes


@pytest.mark.parametrize(
    ("mean", "std", "channels", "expected"),
    [
        ([0.5], [0.5], 3, "data.mean and data.std have 1 and 1 channels, the model 3; give both as"),
        ([0.5] * 3, [0.5], 3, "have 3 and 1 channels, the model 3"),
        ([], [], 3, "have 0 and 0 channels, the model 3"),
        (None, None, 1, "have 3 and 3 channels, the model 1"),
        ([0.5] * 3, [0.5] * 3, 1, "have 3 and 3 channels, the model 1"),
        ([0.5] * 4, [0.5] * 4, 4, r"the model takes 4 channels, but images are read with 1 \(grey\) or 3 \(RGB\)"),
    ],
)
def test_another_number_of_channels_is_refused(mean: Any, std: Any, channels: int, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        input_spec(tiny.config(data__mean=mean, data__std=std), TIMM, (16, 16), channels)


def test_three_equal_means_of_timm_are_one_for_a_model_of_one_channel() -> None:
    spec = input_spec(tiny.config(), TIMM | {"mean": (0.5,) * 3, "std": (0.25,) * 3}, (16, 16), 1)
    assert (spec.mean, spec.std, spec.mode) == ((0.5,), (0.25,), "L")


def test_means_in_units_of_255_are_refused() -> None:
    with pytest.raises(SettingError, match=r"data\.mean is \(123.675, .*; it looks like units of 0 to 255"):
        input_spec(tiny.config(data__mean=[123.675, 116.28, 103.53]), TIMM, (16, 16), 3)


def timms_predictions(inputs: Inputs, files: list[Path], **overrides: Any) -> torch.Tensor:
    """The model's logits of files that go through timm's transform."""
    settings = resolve_data_config(overrides, model=inputs.model)
    transform = create_transform(**settings | {"input_size": (3, *inputs.spec.size)})
    with torch.inference_mode():
        return inputs.model(torch.stack([transform(Image.open(file).convert("RGB")) for file in files]))


def predictions(inputs: Inputs, images: Images) -> torch.Tensor:
    with torch.inference_mode():
        return inputs.model(images.normalized(slice(None)))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_model_is_fed_by_the_crop_mode_of_its_timm_configuration(crop_mode: str, tmp_path: Path) -> None:
    files = []
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in "abcd":
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(4):
                pixels = torch.randint(0, 256, (32, 64, 3), generator=generator, dtype=torch.uint8).numpy()
                files.append(tmp_path / split / label / f"{number}.png")
                Image.fromarray(pixels).save(files[-1])
    args = tiny.ARGS | {"pretrained_cfg_overlay": {"crop_mode": crop_mode, "crop_pct": 0.95}}
    config = tiny.config(data__root=str(tmp_path), model__args=args, data__mean=None, data__std=None)
    inputs = load_inputs(config, tmp_path / "runs")
    assert inputs.spec.crop_mode == crop_mode
    logits = predictions(inputs, inputs.splits.val)
    expected = timms_predictions(inputs, files[-16:])
    order = [min(range(16), key=lambda index: (logits[index] - row).abs().sum().item()) for row in expected]  # shuffled
    assert sorted(order) == list(range(16))
    torch.testing.assert_close(logits[order], expected, rtol=0, atol=1e-6)  # batches in another order may round anew


def test_the_pixels_are_told_in_one_line(tmp_path: Path) -> None:
    for split in ("train", "val"):
        tiny.write_images(tmp_path / split)
    notes = load_inputs(tiny.config(data__root=str(tmp_path), data__crop_mode="squash"), tmp_path / "runs").notes
    told = [note for note in notes if note.startswith("pixels: ")]
    assert told == ["pixels: 16x16, bicubic, crop 0.9 squash, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)"]


def real(**data: Any) -> Config:
    """A recipe for the real ViT on CIFAR-10."""
    record = json.loads((DATA / "vit_cifar10.json").read_text())
    args = {key: record[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")}
    return Config.from_dict({
        "name": "real",
        "model": {"name": record["model"], "args": args, "checkpoint": str(DATA / "vit_cifar10.safetensors")},
        "data": {"root": str(DATA), "mean": record["mean"], "std": record["std"], "val_images": 300,
                 "calibration_images": 10, "probe_images": 10} | data,
    })  # fmt: skip


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
class TestRealModel:
    @pytest.mark.parametrize(("crop_pct", "top1"), [(None, 0.767), (1.0, 0.81)])
    def test_its_accuracy_depends_on_the_crop(self, crop_pct: float | None, top1: float, tmp_path: Path) -> None:
        inputs = load_inputs(real(crop_pct=crop_pct), tmp_path)
        correct = predictions(inputs, inputs.splits.val).argmax(1) == inputs.splits.val.labels
        assert correct.float().mean().item() == pytest.approx(top1, abs=0.004)

    @pytest.mark.parametrize("crop_mode", ["center", "squash"])
    def test_images_twice_as_wide_give_what_timms_transform_gives(self, crop_mode: str, tmp_path: Path) -> None:
        val = load_inputs(real(crop_pct=1.0), tmp_path).splits.val.take(slice(0, 100))
        classes = sorted(entry.name for entry in (DATA / "val").iterdir())
        folders = [tmp_path / "wide" / split for split in ("train", "val")]
        files = []
        for folder in folders:
            for name in classes:
                (folder / name).mkdir(parents=True)
            for index, (pixels, label) in enumerate(zip(val.pixels, val.labels.tolist(), strict=True)):
                files.append(folder / classes[label] / f"{index:03d}.png")
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((64, 32)).save(files[-1])
        inputs = load_inputs(
            real(root=str(tmp_path / "wide"), crop_mode=crop_mode, crop_pct=1.0, val_images=None), tmp_path
        )
        files = sorted(files[100:])
        labels = torch.tensor([classes.index(file.parent.name) for file in files])
        expected = timms_predictions(
            inputs, files, crop_mode=crop_mode, crop_pct=1.0, mean=inputs.spec.mean, std=inputs.spec.std
        )
        loaded = inputs.splits.val
        right = (predictions(inputs, loaded).argmax(1) == loaded.labels).sum()
        assert right == (expected.argmax(1) == labels).sum()
        assert (right > 65) == (crop_mode == "squash")  # cut to its middle half, an image says less
