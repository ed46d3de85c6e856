"""Steps of the preparation on the disk: found again by model, images and settings alone, and told when broken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.data import Splits
from search.commands.run_cache import PartCache
from search.config import Config, Fingerprints
from search.errors import SweepError
from search.trial.context import ContextPart, TrialContext
from search.trial.prepare import Step
from tests.search_tests import tiny
from tests.search_tests.builders import same

FINGERPRINTS = Fingerprints(weights="weights", preprocessing="as timm", train="images", val="more images")
EXITS = Step(kind="exits")
CUT, UNCUT = Step(kind="sensitivity", subject=2), Step(kind="sensitivity", subject=3)
WIDTHS, PROFILE = Step(kind="widths", subject="lfe"), Step(kind="profile", subject="lfe")
CURVES = Step(kind="curves")
STEPS = [EXITS, CUT, UNCUT, WIDTHS, PROFILE]

CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"fingerprints": FINGERPRINTS.model_copy(update={"weights": "other"})},
    "images": {"fingerprints": FINGERPRINTS.model_copy(update={"train": "other"})},
    "preprocessing": {"fingerprints": FINGERPRINTS.model_copy(update={"preprocessing": "other"})},
    "part of the images": {"splits": tiny.splits().thinned(2)},
    "calibration": {"splits": replace(tiny.splits(), num_calibration=8)},
    "noise": {"config": tiny.config(data__noise=0.1)},
    "batch size": {"config": tiny.config(cascade__batch_size=3)},
    "precision": {"config": tiny.config(measure__precision="bfloat16")},
    "exits": {"exit_blocks": [1, 3]},
    "epochs of exits": {"config": tiny.config(exits__epochs=3)},
    "device": {"device": "another"},
    "timed batch": {"config": tiny.config(measure__batch_size=16)},
    "resources": {"config": tiny.config(resources__cpus_per_trial=2)},
    "val": {"fingerprints": FINGERPRINTS.model_copy(update={"val": "other"})},
    "space": {"config": tiny.config(space__target_ratio=0.3)},
    "search": {"config": tiny.config(search__trials=7)},
}
"""What differs -> arguments of a cache."""

OF_EXITS, OF_WIDTHS, OF_NONE = {"exits", "sensitivity"}, {"widths"}, set[str]()
MADE_ANEW: dict[str, set[str]] = {
    "exits": OF_EXITS, "epochs of exits": OF_EXITS, "device": OF_WIDTHS, "timed batch": OF_WIDTHS,
    "resources": OF_WIDTHS, "val": OF_NONE, "space": OF_NONE, "search": OF_NONE,
}  # fmt: skip
"""What differs -> kinds of the steps that are then not found; of all else, every kind."""


@pytest.fixture(scope="module")
def context() -> TrialContext:
    space = {"method": ["cascade", "global"], "exit_block": [2, 3], "token_reduction": "lfe", "round_to": [8, "auto"]}
    config = tiny.config(space=space)
    return tiny.prepared(config, tiny.inputs(config), timer=tiny.timer, time_widths=tiny.time_widths)[0]


@pytest.fixture(scope="module")
def parts(context: TrialContext) -> dict[Step, ContextPart]:
    """What each step measures."""
    known = context.known
    return {
        EXITS: ContextPart(exit_heads=known.exit_heads),
        CUT: ContextPart(sensitivities={2: known.sensitivities[2]}),
        UNCUT: ContextPart(sensitivities={3: known.sensitivities[3]}),
        WIDTHS: ContextPart(allowed_widths={"lfe": known.allowed_widths["lfe"]}),
        CURVES: ContextPart(channel_curves=known.channel_curves),
        PROFILE: ContextPart(profiles=known.profiles),
    }


def cache(folder: Path, **changes: Any) -> PartCache:
    config: Config = changes.pop("config", tiny.config())
    splits: Splits = changes.pop("splits", tiny.splits())
    arguments: dict[str, Any] = {"fingerprints": FINGERPRINTS, "exit_blocks": [2, 3], "device": "cpu"}
    return PartCache(folder, config, splits=splits, **arguments | changes)


@pytest.mark.parametrize("step", STEPS, ids=[step.id for step in STEPS])
def test_what_a_step_measured_comes_back_bit_for_bit(
    parts: dict[Step, ContextPart], tmp_path: Path, step: Step
) -> None:
    folder = tmp_path / "new"
    assert cache(folder).read(step) is None
    cache(folder).write(step, parts[step])
    assert same(cache(folder).read(step), parts[step])
    assert [other for other in STEPS if cache(folder).read(other) is not None] == [step]
    [path] = folder.iterdir()
    assert path.name.startswith(step.id)


def test_parts_of_other_steps_are_other_things(parts: dict[Step, ContextPart]) -> None:
    """Else the tests here would say nothing."""
    assert not any(same(parts[one], parts[other]) for one in STEPS for other in STEPS if one != other)


@pytest.mark.parametrize("different", CHANGES)
def test_only_what_a_step_depends_on_makes_it_anew(
    parts: dict[Step, ContextPart], tmp_path: Path, different: str
) -> None:
    for step in STEPS:
        cache(tmp_path).write(step, parts[step])
    other = cache(tmp_path, **CHANGES[different])
    missing = {step.kind for step in STEPS if other.read(step) is None}
    assert missing == MADE_ANEW.get(different, {step.kind for step in STEPS})


def test_a_file_that_is_there_is_not_written_again(parts: dict[Step, ContextPart], tmp_path: Path) -> None:
    cache(tmp_path).write(PROFILE, parts[PROFILE])
    cache(tmp_path).write(PROFILE, ContextPart())
    assert same(cache(tmp_path).read(PROFILE), parts[PROFILE])


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_broken_file_is_named(parts: dict[Step, ContextPart], tmp_path: Path, content: bytes) -> None:
    cache(tmp_path).write(PROFILE, parts[PROFILE])
    [path] = tmp_path.iterdir()
    path.write_bytes(content)
    with pytest.raises(SweepError, match=rf"^{path} holds no profile; remove it, and it is made again$"):
        cache(tmp_path).read(PROFILE)


def test_a_file_that_holds_another_class_is_not_unpickled(parts: dict[Step, ContextPart], tmp_path: Path) -> None:
    cache(tmp_path).write(PROFILE, parts[PROFILE])
    [path] = tmp_path.iterdir()
    torch.save({"profiles": tiny.config()}, path)
    with pytest.raises(SweepError, match="holds no profile"):
        cache(tmp_path).read(PROFILE)
