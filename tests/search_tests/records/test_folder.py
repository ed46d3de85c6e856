"""The folder of a sweep: settings and front read back, and the export of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from pruning.artifact import Description, read_description, save
from pruning.data import InputSpec
from pruning.errors import ArtifactError
from pruning.fingerprints import fingerprint_of_record
from pruning.model.exits import truncate
from search.errors import SweepError
from search.front import Front
from search.records.folder import Folder, export
from tests.search_tests import builders, tiny
from tests.search_tests.disk import largest_file

POINTS = [
    tiny.kept_whole(outcome)
    for outcome in (
        builders.outcome("t003", 0.90, 1.2),
        builders.outcome("t001", 0.85, 2.0, top1_test=0.84),
        builders.outcome("t004", 0.60, 3.0),
    )
]
PREPROCESSING = fingerprint_of_record(InputSpec(size=(16, 16)))
FRONT = Front.of("digits", POINTS, builders.GOAL, trials=5, fingerprints={"preprocessing": PREPROCESSING})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Holds one sweep with a model for each of its points."""
    folder = Folder(tmp_path / "runs", "digits")
    for outcome in POINTS:
        tiny.save_model(folder.models / outcome.id, seed=int(outcome.id[1:]))
    folder.config.write_text(tiny.config().to_yaml())
    folder.write_front(FRONT)
    return tmp_path / "runs"


def test_settings_and_front_are_read_back(runs: Path) -> None:
    folder = Folder(runs, "digits")
    assert folder.read_config() == tiny.config()
    assert folder.read_front() == Front.from_json(FRONT.to_json())
    assert json.loads(folder.front.read_text()) == json.loads(json.dumps(FRONT.to_json()))


def test_unknown_sweep_is_answered_with_those_there_are(runs: Path) -> None:
    for read in (Folder(runs, "x").read_config, Folder(runs, "x").read_front):
        with pytest.raises(SweepError, match=r"no sweep 'x' in .*runs; there are digits$"):
            read()


def test_where_there_is_no_sweep_it_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"no sweep 'x' in .*; `vitfront run` makes one$"):
        Folder(tmp_path / "runs", "x").read_front()


def test_sweep_that_has_no_front_yet_says_so(runs: Path) -> None:
    folder = Folder(runs, "digits")
    folder.front.unlink()
    with pytest.raises(SweepError, match="sweep 'digits' has no front yet; `vitfront run` goes on with it"):
        folder.read_front()


@pytest.mark.parametrize("content", [b'{"name": ', b"", b"\xff\xfe"])
def test_broken_front_is_named_in_one_line(runs: Path, content: bytes) -> None:
    folder = Folder(runs, "digits")
    folder.front.write_bytes(content)
    with pytest.raises(SweepError, match=r"cannot read .*digits/front\.json: ") as raised:
        folder.read_front()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe", b"", b"name: 3"])
def test_broken_settings_are_one_line(runs: Path, content: bytes) -> None:
    folder = Folder(runs, "digits")
    folder.config.write_bytes(content)
    with pytest.raises(SweepError, match=r"cannot (read|use) .*digits/config\.yaml: .") as raised:
        folder.read_config()
    assert "\n" not in str(raised.value)


def test_folder_of_sweeps_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for read in (Folder(tmp_path / "runs", "x").read_front, Folder(tmp_path / "runs", "x").read_config):
        with pytest.raises(SweepError, match=r"cannot read .*runs/x/.*: .*Not a directory"):
            read()


@pytest.mark.parametrize(("how", "expected"), [("knee", "t001"), ("t004", "t004")])
def test_exported_folder_is_the_models(runs: Path, tmp_path: Path, how: str, expected: str) -> None:
    folder, target = Folder(runs, "digits"), tmp_path / "deep" / "down" / "model"
    point = export(runs, "digits", how, target)
    assert point == next(point for point in folder.read_front().points if point.id == expected)
    source = folder.models / expected
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }


def test_export_into_a_folder_that_exists_leaves_it_alone(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    with pytest.raises(ArtifactError, match="there exists; give a folder that does not"):
        export(runs, "digits", "knee", tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine"]


def test_export_that_the_disk_refuses_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model"
    with largest_file(1000), pytest.raises(ArtifactError, match=r"cannot write .*out/model: "):
        export(runs, "digits", "knee", target)
    assert list((tmp_path / "out").iterdir()) == []


def test_export_of_a_model_that_was_deleted_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    model = Folder(runs, "digits").models / "t001"
    for path in model.iterdir():
        path.unlink()
    model.rmdir()
    with pytest.raises(ArtifactError):
        export(runs, "digits", "knee", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _half_of_the_blocks(description: Description) -> tuple[nn.Module, Description]:
    plan = description.plan
    return truncate(tiny.model(), 2), replace(description, plan=replace(plan, blocks=plan.blocks[:2]))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda found: (tiny.model(), replace(found, input=InputSpec(size=(16, 16), mean=(0.4,) * 3))), "input"),
        (lambda found: (tiny.model(), replace(found, args={**found.args, "drop_rate": 0.1})), "model"),
        (_half_of_the_blocks, "plan"),
    ],
)
def test_a_model_with_the_description_of_another_is_not_exported(
    runs: Path, tmp_path: Path, change: Callable[[Description], tuple[nn.Module, Description]], what: str
) -> None:
    path = Folder(runs, "digits").models / "t001"
    save(*change(read_description(path)), path)  # whole in itself
    with pytest.raises(SweepError, match=rf"t001/plan\.json is not what its sweep wrote: its {what} changed since"):
        export(runs, "digits", "t001", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_fingerprints_is_exported(runs: Path, tmp_path: Path) -> None:
    Folder(runs, "digits").write_front(replace(FRONT, fingerprints=None))
    export(runs, "digits", "t001", tmp_path / "out")
    assert (tmp_path / "out" / "plan.json").is_file()
