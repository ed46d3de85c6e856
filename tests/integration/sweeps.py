"""What the tests of whole sweeps share: a recipe of seconds, a watcher, and a model that can be told to die."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from search.config import Config
from search.outcome import Candidate, Outcome

DEPTH = 3


@register_model
def vit_that_may_die(*, die_if: str, **other: Any) -> nn.Module:
    """timm's vit_tiny_patch16_224, but a worker that runs it while the file `die_if` exists removes it and dies."""
    names = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # told to every model by timm
    model = timm.create_model("vit_tiny_patch16_224", **{k: v for k, v in other.items() if k not in names})

    def die(*_: Any) -> None:  # local, so that it reaches the workers as code: they cannot import the tests
        if os.path.exists(die_if):
            os.unlink(die_if)
            os._exit(1)

    model.patch_embed.register_forward_pre_hook(die)
    return model


def config(die_if: Path | None, **sections: dict[str, Any]) -> Config:
    """A sweep of digits that takes seconds; of a model that never dies if it is not told when."""
    args = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    args |= {"embed_dim": 32, "depth": DEPTH, "num_heads": 2} | ({} if die_if is None else {"die_if": str(die_if)})
    name = "vit_tiny_patch16_224" if die_if is None else "vit_that_may_die"
    training = {"epochs": 10, "batch_size": 32, "max_shift": 0, "max_turn": 0}
    data = {"dataset": "digits", "test": "test", "mean": [0.3], "std": [0.38]}
    data |= {"calibration_images": 200, "probe_images": 200, "val_images": 64, "test_images": 64}
    record: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": name, "args": args, "training": training},
        "data": data,
        "exits": {"epochs": 5},
        "space": {"exit_block": [2, DEPTH]},
        "search": {"trials": 4},
        "cascade": {"num_levels": 3},
        "measure": {"batch_size": 128, "num_rounds": 9, "precision": "float32"},
    }
    for section, changes in sections.items():
        record[section] = record.get(section, {}) | changes
    return Config.from_dict(record)


class Watcher:
    """An observer that remembers, and does what a test wants when a trial is suggested or has ended."""

    def __init__(
        self,
        on_started: Callable[[str], None] = lambda trial_id: None,
        on_finished: Callable[[Outcome], None] = lambda outcome: None,
        on_epoch: Callable[[str, int], None] = lambda trial_id, epoch: None,
    ) -> None:
        self._on_started, self._on_finished, self._on_epoch = on_started, on_finished, on_epoch
        self.num_stages = 0
        self.started_ids: list[str] = []
        self.finished_ids: list[str] = []
        self.hypervolumes: list[float] = []
        self.epochs: list[tuple[str, int]] = []

    def stage(self, text: str) -> None:
        self.num_stages += 1

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None:
        self.num_stages += 1

    def started(self, trial_id: str, candidate: Candidate) -> None:
        self.started_ids.append(trial_id)
        self._on_started(trial_id)

    def epoch(self, trial_id: str, progress: Mapping[str, float]) -> None:
        self.epochs.append((trial_id, int(progress["epoch"])))
        self._on_epoch(*self.epochs[-1])

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        self.finished_ids.append(outcome.id)
        self.hypervolumes.append(hypervolume)
        self._on_finished(outcome)

    def interrupted(self) -> None:
        self.num_stages += 1
