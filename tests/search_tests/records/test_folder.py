"""What is read back of a sweep: its settings, its front, a point of it, a model."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pruning.errors import ArtifactError
from search.errors import ConfigError, SweepError
from search.front import front_record
from search.records.folder import Folder, export, select
from tests.search_tests import builders, tiny

FRONT = [
    builders.outcome("t003", 0.90, 1.2),
    builders.outcome("t001", 0.85, 2.0, top1_test=0.84),
    builders.outcome("t004", 0.60, 3.0),
]
RECORD = json.loads(json.dumps(front_record("digits", FRONT, builders.DENSE) | {"trials": 5}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Holds one sweep, whose models are a few bytes each."""
    folder = Folder(tmp_path / "runs", "digits")
    for outcome in FRONT:
        (folder.models / outcome.id).mkdir(parents=True)
        (folder.models / outcome.id / "plan.json").write_text(json.dumps(outcome.id))
        (folder.models / outcome.id / "model.safetensors").write_bytes(b"w" * 5000)
    folder.config.write_text(tiny.config().to_yaml())
    folder.front.write_text(json.dumps(RECORD))
    return tmp_path / "runs"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow past `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_settings_and_front_are_read_back(runs: Path) -> None:
    folder = Folder(runs, "digits")
    assert folder.read_config() == tiny.config()
    assert folder.read_front() == RECORD


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
    with pytest.raises((SweepError, ConfigError)) as raised:
        folder.read_config()
    assert "\n" not in str(raised.value)


def test_folder_of_sweeps_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for read in (Folder(tmp_path / "runs", "x").read_front, Folder(tmp_path / "runs", "x").read_config):
        with pytest.raises(SweepError, match=r"cannot read .*runs/x/.*: .*Not a directory"):
            read()


def test_without_bounds_or_pick_all_is_shown() -> None:
    assert select(RECORD, None, {}, {}) == RECORD


@pytest.mark.parametrize(
    ("how", "at_least", "at_most", "expected"),
    [
        (None, {"top1": 0.85}, {}, ["t003", "t001"]),
        (None, {}, {"latency_ms_p50": 400.0}, ["t001", "t004"]),
        (None, {"top1": 0.99}, {}, []),
        ("knee", {}, {}, ["t001"]),
        ("fastest", {"top1": 0.7}, {}, ["t001"]),
        ("most-accurate", {}, {}, ["t003"]),
        ("t004", {}, {}, ["t004"]),
    ],
)
def test_points_are_selected_and_the_rest_of_the_record_stays(
    how: str | None, at_least: dict[str, float], at_most: dict[str, float], expected: list[str]
) -> None:
    record = select(RECORD, how, at_least, at_most)
    assert [point["id"] for point in record["points"]] == expected
    assert {**record, "points": RECORD["points"]} == RECORD


def test_points_of_a_retrieval_sweep_are_picked_and_bounded_by_its_metric() -> None:
    found = {"t000": (0.3, 0.9, 1.2), "t001": (0.4, 0.85, 2.0), "t002": (0.9, 0.6, 3.0)}
    front = [builders.outcome(id, top1, speedup, recall_at_1=recall) for id, (top1, recall, speedup) in found.items()]
    dense = builders.measurement(0.9, 1.0, recall_at_1=0.9)
    record = json.loads(json.dumps(front_record("digits", front, dense, "recall_at_1")))

    def ids(how: str | None, at_least: dict[str, float]) -> list[str]:
        return [point["id"] for point in select(record, how, at_least, {})["points"]]

    assert ids("most-accurate", {}) == ["t000"]
    assert ids("knee", {}) == ["t001"]
    assert ids(None, {"recall_at_1": 0.85}) == ["t000", "t001"]
    assert ids("fastest", {"recall_at_1": 0.85}) == ["t001"]


def test_front_written_before_a_metric_was_known_is_read() -> None:
    points = [{k: v for k, v in point.items() if k != "recall_at_1"} for point in RECORD["points"]]
    assert [point["id"] for point in select(RECORD | {"points": points}, "knee", {}, {})["points"]] == ["t001"]


def test_unknown_point_is_answered_with_those_there_are() -> None:
    with pytest.raises(SweepError, match="no point 't000' to pick; there are t003, t001, t004"):
        select(RECORD, "t000", {}, {})


@pytest.mark.parametrize(("how", "expected"), [("knee", "t001"), ("t004", "t004")])
def test_exported_folder_is_the_models(runs: Path, tmp_path: Path, how: str, expected: str) -> None:
    target = tmp_path / "deep" / "down" / "model"
    point = export(runs, "digits", how, target)
    assert point == next(point for point in RECORD["points"] if point["id"] == expected)
    source = Folder(runs, "digits").models / expected
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
