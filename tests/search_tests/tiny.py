"""The smallest sweep there is: a ViT of three blocks, and a handful of coloured images on disk or in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from pruning.artifact import Description, save
from pruning.data import Images, InputSpec, Splits
from pruning.measure.cost import count_params
from pruning.measure.stopwatch import Timing
from pruning.measure.widths import measure_allowed_widths
from pruning.model.anatomy import examine
from pruning.model.loading import create_model
from pruning.model.surgery import keep_all_plan
from search.config import Config
from search.outcome import Measurement, Outcome
from search.space import Space
from search.trial.context import TrialContext
from search.trial.fingerprinting import fingerprints_of, hash_splits
from search.trial.first_look import look
from search.trial.inputs import Inputs
from search.trial.prepare import prepare

DEPTH = 3
NUM_CLASSES = 4
NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": NUM_CLASSES}

SWIN = "swin_tiny_patch4_window7_224"
SWIN_ARGS = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
"""Two stages of two blocks; the grid has to be of 8 x 8 patches."""


def record(**changes: Any) -> dict[str, Any]:
    """A recipe; `changes` as `section__key=value`."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": NAME, "args": dict(ARGS), "untrained": "model__checkpoint" not in changes},
        "data": {"root": "images", "calibration_images": 8, "probe_images": 8},
        "exits": {"epochs": 2},
        "space": {"method": "cascade", "token_reduction": "lfe", "round_to": 1},
        "search": {"trials": 1},
        "cascade": {"num_levels": 3},
        "measure": {"batch_size": 8, "num_rounds": 6, "precision": "float32"},
    }
    fields["model"]["expected_top1"] = 0.0  # its answers are guesses
    for key, value in changes.items():
        if key == "space":  # the other keys stay
            fields["space"] = None if value is None else fields["space"] | value
            continue
        *path, last = key.split("__")
        inner = fields
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return fields


def config(**changes: Any) -> Config:
    return Config.from_dict(record(**changes))


def write_recipe(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(record(**changes)))
    return path


def model(seed: int = 0) -> torch.nn.Module:
    """The dense model, untrained."""
    torch.manual_seed(seed)
    return create_model(NAME, args=ARGS)


def swin(seed: int = 0) -> torch.nn.Module:
    """A Swin, untrained, for the same images."""
    torch.manual_seed(seed)
    return create_model(SWIN, args=SWIN_ARGS | {"img_size": 16, "patch_size": 2, "num_classes": NUM_CLASSES})


def steady_timer(calls: Sequence[Any], device: torch.device, num_rounds: int) -> list[list[float]]:
    """Stands for `pruning.measure.stopwatch.time_in_turn`: each call takes longer than the one before; none is run."""
    return [[1.0 + index for index in range(len(calls))]] * num_rounds


time_widths = partial(measure_allowed_widths, timer=steady_timer)
"""The argument of `search.trial.prepare.prepare` with which each width is faster than all larger ones."""


def images(count: int, seed: int = 0) -> Images:
    """Images of noise, with labels of noise."""
    generator = torch.Generator().manual_seed(seed)
    return Images(
        pixels=torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, NUM_CLASSES, (count,), generator=generator),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def splits(test: bool = True) -> Splits:
    calibration, probe = images(16, seed=1), images(40, seed=2)
    training = replace(
        calibration,
        pixels=torch.cat([calibration.pixels, probe.pixels]),
        labels=torch.cat([calibration.labels, probe.labels]),
    )
    return Splits(
        training=training,
        num_calibration=16,
        val=images(24, seed=3),
        test=images(20, seed=4) if test else None,
    )


def inputs(config: Config, **changes: Any) -> Inputs:
    """The inputs of a recipe, without a disk; `changes` are fields, as `model` and `splits`."""
    dense = changes.get("model") or model()
    anatomy = examine(dense)
    spec = InputSpec(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
    in_memory = changes.get("splits") or splits()
    loaded = Inputs(
        model=dense,
        trained=True,
        spec=spec,
        splits=in_memory,
        fingerprints=fingerprints_of(config, dense, spec, in_memory, hash_splits(in_memory)),
        space=Space(config.space, anatomy.depth, anatomy.exits, has_windows=anatomy.has_windows),
        cache=Path("nowhere"),
    )
    return replace(loaded, **changes)


def prepared(config: Config, inputs: Inputs, **options: Any) -> tuple[TrialContext, Measurement]:
    """The context of a recipe, with its first look; `options` are arguments of `search.trial.prepare.prepare`."""
    return prepare(config, inputs, look(config, inputs), **options)


def timer(
    dense: torch.nn.Module, models: Sequence[torch.nn.Module], batch: torch.Tensor, *, num_rounds: int, **_: Any
) -> tuple[Timing, list[Timing]]:
    """Stands for `pruning.measure.stopwatch.time_against_dense`: half the parameters are twice as fast."""

    def timing(model: torch.nn.Module) -> Timing:
        speedup = count_params(dense) / count_params(model)
        return Timing(
            speedup=speedup, speedup_low=0.95 * speedup, speedup_high=1.05 * speedup, latency_ms_p50=10 / speedup,
            throughput_img_s=100 * len(batch) * speedup, batch_size=len(batch), num_rounds=num_rounds,
        )  # fmt: skip

    return timing(dense), [timing(model) for model in models]


def kept_whole(outcome: Outcome) -> Outcome:
    """The outcome with the plan of the model that `save_model` saves."""
    return replace(outcome, plan=keep_all_plan(examine(model())))


def save_model(folder: Path, seed: int = 0) -> None:
    """Saves a model that keeps all of the dense one, as a sweep saves those of its front."""
    dense = model(seed)
    description = Description(
        name=NAME, args=ARGS, input=InputSpec(size=(16, 16)), plan=keep_all_plan(examine(dense))
    )  # fmt: skip
    save(dense, description, folder)


def write_images(folder: Path, classes: str = "abcd", count: int = 4, *, blue: int = 5) -> Path:
    """One folder a class below `folder`, each image of a colour of its own; those of another `blue` share no image."""
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            color = (30 + 50 * index, 10 * number, blue)
            Image.new("RGB", (16, 16), color).save(folder / name / f"{number}.png")
    return folder
