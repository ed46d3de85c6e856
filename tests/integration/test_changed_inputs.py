"""Weights or images that are overwritten between two runs are noticed: a sweep has one model and one set of images."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pruning.artifact import save_weights
from search.commands.run import run_sweep
from search.config import Config
from search.errors import SweepError
from search.front import Front
from tests.integration import sweeps
from tests.integration.sweeps import Watcher
from tests.search_tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.alone]

WEIGHTS = "the weights"
TRAINING_IMAGES = "the training images"


@dataclass(frozen=True)
class Place:
    """A folder with weights, images and a sweep of two trials."""

    path: Path
    front: Front

    def config(self, **changes: Any) -> Config:
        return config_in(self.path, **changes)

    def run(self, **changes: Any) -> Front:
        return run_sweep(self.config(**changes), self.path / "runs", Watcher())

    def overwrite(self, what: str) -> None:
        if what == WEIGHTS:
            save_weights(tiny.model(seed=7).state_dict(), self.path / "weights.safetensors")
        else:
            Image.new("RGB", (16, 16), (1, 2, 3)).save(self.path / "images/train/a/0.png")


def config_in(path: Path, **changes: Any) -> Config:
    settings = {
        "model__checkpoint": str(path / "weights.safetensors"), "data__root": str(path / "images"),
        "model__untrained": False, "space__method": "constant", "space__token_reduction": "merge", "search__trials": 2,
    }  # fmt: skip
    return tiny.config(**settings | changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Place:
    sweeps.start_ray()
    path = tmp_path_factory.mktemp("inputs")
    for split, blue in (("train", 5), ("val", 90)):
        tiny.write_images(path / "images" / split, blue=blue)
    save_weights(tiny.model().state_dict(), path / "weights.safetensors")
    return Place(path, run_sweep(config_in(path), path / "runs", Watcher()))


@pytest.fixture
def place(swept: Place, tmp_path: Path) -> Place:
    """A copy of the folder: a sweep is known by its inputs, not by where they lie."""
    shutil.copytree(swept.path, tmp_path / "copy")
    return Place(tmp_path / "copy", swept.front)


@pytest.mark.parametrize("what", [WEIGHTS, TRAINING_IMAGES])
@pytest.mark.parametrize(
    "command",
    [{}, {"search__trials": 4}, {"name": "next", "search__earlier": ["tiny"]}],
    ids=["run again", "resume", "from"],
)
def test_a_run_on_overwritten_inputs_is_refused_and_says_what_changed(
    place: Place, command: dict[str, Any], what: str
) -> None:
    before = {path: path.read_bytes() for path in (place.path / "runs").glob("*/*.*")}
    place.overwrite(what)
    way_out = "leave it out of --from" if "name" in command else "take another --name"
    said = f"runs/tiny was run with other inputs: {what} changed meanwhile; put back what was there, or {way_out}"
    with pytest.raises(SweepError, match=f"{said}$"):
        place.run(**command)
    assert {path: path.read_bytes() for path in (place.path / "runs").glob("*/*.*")} == before


def test_a_moved_folder_with_equal_inputs_is_the_same_sweep(place: Place) -> None:
    assert place.run() == place.front


def test_a_sweep_of_an_older_vitfront_is_not_mixed_with_new_trials(place: Place) -> None:
    (place.path / "runs/tiny/config.yaml").write_text(place.config().to_yaml())  # without fingerprints
    with pytest.raises(SweepError, match=r"older vitfront, without fingerprints of its inputs.*take another --name"):
        place.run(search__trials=4)
