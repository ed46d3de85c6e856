"""Studies of a tiny model: each variant runs once, a stopped one goes on, and the files say what the rows say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pruning.artifact import save_weights
from search.commands.study import run_study
from search.commands.study_report import SHARE, csv_table, markdown
from search.config import Config
from search.errors import SweepError
from search.records.ledger import read
from search.views.study_plot import draw_study, study_info
from tests.search_tests import tiny
from tests.search_tests.commands.studies import write_study


def config_in(folder: Path) -> Config:
    """A recipe whose images are written into the folder."""
    for split in ("train", "val"):
        tiny.write_images(folder / "images" / split)
    return tiny.config(data__root=str(folder / "images"))


@dataclass(frozen=True)
class Finished:
    """A study that has run."""

    path: str
    config: Config
    runs: Path
    record: dict[str, Any]
    said: list[str]

    @property
    def folder(self) -> Path:
        return self.runs / "study-mine-tiny"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A study of four variants, two of which ask for less than there can be."""
    place = tmp_path_factory.mktemp("study")
    each = {"space.token_reduction": ["lfe", "merge"], "space.target_ratio": [0.9, 0.01]}
    path = write_study(
        place, set={"space.method": "constant"}, each=each, series_by="space.token_reduction", y=["top1", "speedup"]
    )
    config, said = config_in(place), list[str]()
    record = run_study(path, config, place / "runs", said.append)
    return Finished(path=path, config=config, runs=place / "runs", record=record, said=said)


def test_a_study_runs_each_variant_once_and_says_what_its_rows_say(finished: Finished) -> None:
    record, folder = finished.record, finished.folder
    assert len(read(folder / "outcomes.jsonl")) == 5  # the dense model, too
    assert [row["series"] for row in record["rows"]] == ["lfe", "lfe", "merge", "merge"]
    measured = [row for row in record["rows"] if row["top1"] is not None]
    assert all(row[SHARE] <= row["space.target_ratio"] for row in measured)
    assert record["sentence"] in (folder / "table.md").read_text()
    assert (folder / "table.csv").read_text() == csv_table(record["rows"])
    assert (folder / "table.csv").read_text().count("\n") == 5
    assert "plotly" in (folder / "figure.html").read_text()
    json.dumps(record)


def test_a_study_says_what_happens_line_by_line(finished: Finished) -> None:
    assert [text.split(":")[0] for text in finished.said if not text.startswith("note: ")] == [
        "preparing the dense model for 4 of 4 variants",
        "dense top-1 on val 0.250 (0.102 to 0.495, 16 images)",
        "dense",
        "lfe, target_ratio 0.9",
        "lfe, target_ratio 0.01",
        "merge, target_ratio 0.9",
        "merge, target_ratio 0.01",
    ]


def test_a_finished_study_is_reported_again_without_a_run(finished: Finished) -> None:
    said, before = list[str](), (finished.folder / "outcomes.jsonl").read_bytes()
    assert run_study(finished.path, finished.config, finished.runs, said.append) == finished.record
    assert said == []
    assert (finished.folder / "outcomes.jsonl").read_bytes() == before


def test_a_variant_that_breaks_is_reported_and_leaves_the_rest(finished: Finished) -> None:
    assert [row["top1"] is None for row in finished.record["rows"]] == [False, True, False, True]
    assert "2 of 4 gave no model, the first since no constant schedule has" in finished.record["sentence"]


def test_the_picture_has_a_panel_a_metric_and_the_tables_all_rows(finished: Finished) -> None:
    record = finished.record
    info = study_info(record)
    assert [panel.y_label for panel in info.panels] == ["top-1 on val (%)", "speed-up over dense, measured"]
    traces = draw_study(info).data
    assert [trace.xaxis for trace in traces] == ["x", "x", "x2", "x2"]
    rows = [row for row in record["rows"] if row["top1"] is not None]
    assert [list(trace.x) for trace in traces[:2]] == [[row[SHARE]] for row in rows]
    assert [list(trace.y) for trace in traces[:2]] == [[pytest.approx(100 * row["top1"])] for row in rows]
    assert [list(trace.y) for trace in traces[2:]] == [[pytest.approx(row["speedup"])] for row in rows]
    assert info.panels[1].dense == 1.0
    assert markdown(record).startswith("# How small?\n")


def test_a_study_goes_on_where_it_stopped_also_within_a_search(tmp_path: Path) -> None:
    open_space = {"space.method": "cascade", "space.token_reduction": "none", "space.drop_budget": [0.0, 9.0]}
    config = config_in(tmp_path)

    def run(trials: int) -> tuple[dict[str, Any], list[str]]:
        series = [{"name": "searched", "trials": trials, "set": open_space}]
        path, said = write_study(tmp_path, series=series, set={"space.target_ratio": 0.5}, each={}), list[str]()
        return run_study(path, config, tmp_path / "runs", said.append), said

    first, _ = run(1)
    longer, said = run(2)
    assert [row["id"] for row in first["rows"]] == [row["id"] for row in longer["rows"][:1]]
    assert [row["id"].split("-")[1] for row in longer["rows"]] == ["t000", "t001"]
    assert sum(text.startswith("searched") for text in said) == 1  # the first did not run again
    assert run(2)[1] == []
    assert len(run(1)[0]["rows"]) == 1


def test_variants_of_other_images_have_a_dense_model_each(tmp_path: Path) -> None:
    path = write_study(
        tmp_path, each={"data.noise": [0.0, 0.2]}, series_by=None, series=[{"name": "all"}],
        set={"space.method": "global", "space.target_ratio": 0.8},
    )  # fmt: skip
    run_study(path, config_in(tmp_path), tmp_path / "runs", lambda _: None)
    ids = [outcome.id for outcome in read(tmp_path / "runs" / "study-mine-tiny" / "outcomes.jsonl")]
    assert [one.startswith("dense-") for one in ids] == [True, False, True, False]


def test_a_study_of_overwritten_weights_or_images_is_measured_anew_and_says_so(tmp_path: Path) -> None:
    each = {"space.token_reduction": ["merge"]}
    path = write_study(tmp_path, each=each, series_by="space.token_reduction", set={"space.method": "constant"})
    save_weights(tiny.model().state_dict(), tmp_path / "weights.safetensors")
    plain = config_in(tmp_path)
    model = plain.model.model_copy(update={"checkpoint": tmp_path / "weights.safetensors", "untrained": False})
    config = plain.model_copy(update={"model": model})

    def run() -> list[str]:
        said: list[str] = []
        run_study(path, config, tmp_path / "runs", said.append)
        return said

    assert run()[0] == "preparing the dense model for 1 of 1 variants"
    assert run() == []
    save_weights(tiny.model(seed=5).state_dict(), tmp_path / "weights.safetensors")
    said = run()
    assert said[0] == "2 earlier outcomes are of other settings or other inputs, and are left out"
    assert said[1] == "preparing the dense model for 1 of 1 variants"
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "images/val/a/0.png")
    assert run()[0] == "4 earlier outcomes are of other settings or other inputs, and are left out"
    assert len(read(tmp_path / "runs/study-mine-tiny/outcomes.jsonl")) == 6


def test_weights_that_are_overwritten_while_a_study_runs_end_it(tmp_path: Path) -> None:
    path = write_study(tmp_path, each={"data.noise": [0.0, 0.2]}, series_by=None, series=[{"name": "all"}])
    save_weights(tiny.model().state_dict(), tmp_path / "weights.safetensors")
    plain = config_in(tmp_path)
    model = plain.model.model_copy(update={"checkpoint": tmp_path / "weights.safetensors", "untrained": False})

    def overwrite(text: str) -> None:
        if text.startswith("dense"):
            save_weights(tiny.model(seed=5).state_dict(), tmp_path / "weights.safetensors")

    with pytest.raises(SweepError, match="the weights changed meanwhile"):
        run_study(path, plain.model_copy(update={"model": model}), tmp_path / "runs", overwrite)
