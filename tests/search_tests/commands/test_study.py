"""Studies: the shipped ones fit their recipes, run once, and say what is in their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pruning.model.anatomy import Anatomy, examine
from pruning.model.loading import create_model
from search.commands.study import expand, load_study, only_candidate, run_study, shipped_studies
from search.commands.study_report import SHARE, best_series, best_x, caveats, csv_table, lines_of, markdown
from search.config import load_config
from search.errors import ConfigError
from search.outcome import Candidate
from search.records.ledger import read
from search.views.study_plot import StudyLine, draw_study, study_info
from tests.search_tests import tiny

NAMES = ["budgets", "cutoff", "noise", "order", "tokens", "width-or-depth"]


def digits_anatomy() -> Anatomy:
    config = load_config("digits")
    return examine(create_model(config.model.name, args=config.model.args))


def test_the_papers_questions_are_shipped() -> None:
    assert shipped_studies() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_of_a_shipped_study_is_one_candidate_or_a_search(name: str) -> None:
    anatomy = digits_anatomy()
    variants = expand(load_study(name), load_config("digits"), anatomy)
    assert len(variants) > 1
    assert len({(variant.series, variant.id) for variant in variants}) == len(variants)
    for variant in variants:
        if variant.trials is None:
            candidate = only_candidate(variant, anatomy)
            assert candidate.recovery == "none"


def test_cutoff_varies_the_cutoff_and_the_target_alone() -> None:
    anatomy, study = digits_anatomy(), load_study("cutoff")
    candidates = [only_candidate(variant, anatomy) for variant in expand(study, load_config("digits"), anatomy)]
    assert len({candidate.cutoff_channel for candidate in candidates}) >= 4
    rest = {(candidate.criterion, candidate.token_reduction, candidate.exit_block) for candidate in candidates}
    assert rest == {("lfs", "none", anatomy.depth)}


def test_an_unknown_study_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=f"no study 'cutof'; give a YAML file or one of: {', '.join(NAMES)}"):
        load_study("cutof")


def test_a_key_that_no_recipe_has_is_named(tmp_path: Path) -> None:
    study = {
        "question": "q", "source": "s", "x": "space.target_ratio", "x_label": "x", "answer": "best-x",
        "series_by": "space.method", "set": {"space.speed": 1}, "each": {"space.method": ["global"]},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ConfigError, match=r"sets space\.speed, which no recipe has"):
        expand(load_study(str(tmp_path / "mine.yaml")), load_config("digits"), digits_anatomy())


def test_a_study_runs_each_variant_once_and_says_what_its_rows_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        tiny.write_images(tmp_path / "images" / split)
    study = {
        "question": "Which?", "source": "here", "x": "space.target_ratio", "x_label": "share", "answer": "best-series",
        "series_by": "space.token_reduction", "set": {"space.method": "constant"},
        "each": {"space.token_reduction": ["lfe", "merge"], "space.target_ratio": [0.9, 0.7]},
    }  # fmt: skip
    (tmp_path / "which.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    told: list[str] = []
    record = run_study("which.yaml", tiny.config(), tmp_path / "runs", told.append)
    folder = tmp_path / "runs" / "study-which-tiny"
    assert len(read(folder / "outcomes.jsonl")) == 5  # the dense model, too
    assert [row["series"] for row in record["rows"]] == ["lfe", "lfe", "merge", "merge"]
    assert all(row["share"] <= row["space.target_ratio"] for row in record["rows"])
    assert record["sentence"] in (folder / "table.md").read_text()
    assert (folder / "table.csv").read_text().count("\n") == 5
    assert "plotly" in (folder / "figure.html").read_text()
    json.dumps(record)

    told.clear()
    assert run_study("which.yaml", tiny.config(), tmp_path / "runs", told.append) == record
    assert told == []


def write_study(folder: Path, **changes: Any) -> str:
    """A study of two targets of a schedule; `changes` override its keys."""
    study = {
        "question": "How small?", "source": "here", "x": SHARE, "x_label": "MACs", "answer": "best-series",
        "series_by": "space.method", "set": {"space.token_reduction": "merge"},
        "each": {"space.method": ["constant"], "space.target_ratio": [0.9, 0.7]},
    } | changes  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return str(folder / "mine.yaml")


def tiny_anatomy() -> Anatomy:
    return examine(tiny.model())


def candidates(path: str) -> list[Candidate]:
    anatomy = tiny_anatomy()
    return [only_candidate(variant, anatomy) for variant in expand(load_study(path), tiny.config(), anatomy)]


def test_every_combination_is_a_variant_in_the_order_of_the_file(tmp_path: Path) -> None:
    each = {"space.method": ["constant", "decreasing"], "space.target_ratio": [0.9, 0.7, 0.5]}
    found = [(one.method, one.target_ratio) for one in candidates(write_study(tmp_path, each=each))]
    assert found == [(method, ratio) for method in each["space.method"] for ratio in each["space.target_ratio"]]


def test_a_series_has_variants_of_its_own(tmp_path: Path) -> None:
    series = [
        {"name": "a", "set": {"space.method": "global"}, "each": {"space.target_ratio": [0.5]}},
        {"name": "b", "trials": 3, "set": {"space.drop_budget": [0.0, 2.0]}},
    ]
    path = write_study(tmp_path, series=series, each={})
    one, searched = expand(load_study(path), tiny.config(), tiny_anatomy())
    assert (one.series, one.trials, one.config.space.method) == ("a", None, "global")
    assert (searched.series, searched.trials, searched.config.space.drop_budget) == ("b", 3, (0.0, 2.0))


@pytest.mark.parametrize(("share", "block"), [(0.34, 1), (0.67, 2), (0.99, 3)])
def test_an_exit_may_be_a_share_of_the_depth(tmp_path: Path, share: float, block: int) -> None:
    path = write_study(tmp_path, each={"space.method": ["global"], "space.exit_block": [share]})
    assert [one.exit_block for one in candidates(path)] == [block]


def test_a_parameter_that_is_left_open_is_named(tmp_path: Path) -> None:
    path = write_study(tmp_path, set={"space.cutoff_channel": [0.1, 0.2]}, each={"space.method": ["cascade"]})
    with pytest.raises(ConfigError, match=r"the study leaves space\.cutoff_channel open"):
        candidates(path)


def test_an_id_is_of_what_an_outcome_depends_on(tmp_path: Path) -> None:
    study, anatomy = load_study(write_study(tmp_path)), tiny_anatomy()

    def ids(**changes: Any) -> list[str]:
        return [variant.id for variant in expand(study, tiny.config(**changes), anatomy)]

    assert len(set(ids())) == 2
    assert ids() == ids(name="other") == ids(resources={"cpus_per_trial": 2}) == ids(search__trials=9)
    assert not set(ids()) & set(ids(data__seed=1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the study runs, with images."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        tiny.write_images(tmp_path / "images" / split)
    return tmp_path


def test_a_study_goes_on_where_it_stopped_also_within_a_search(folder: Path) -> None:
    wide = {"space.method": "cascade", "space.token_reduction": "none", "space.drop_budget": [0.0, 9.0]}

    def run(trials: int) -> tuple[dict[str, Any], list[str]]:
        series = [{"name": "searched", "trials": trials, "set": wide}]
        path, told = write_study(folder, series=series, set={"space.target_ratio": 0.5}, each={}), list[str]()
        return run_study(path, tiny.config(), folder / "runs", told.append), told

    first, _ = run(2)
    longer, told = run(4)
    assert [row["id"] for row in first["rows"]] == [row["id"] for row in longer["rows"][:2]]
    assert [row["id"].split("-")[1] for row in longer["rows"]] == ["t000", "t001", "t002", "t003"]
    assert sum(text.startswith("searched") for text in told) == 2  # the first two did not run again
    assert run(4)[1] == []
    assert len(run(3)[0]["rows"]) == 3


def test_variants_of_other_images_have_a_dense_model_each(folder: Path) -> None:
    path = write_study(folder, each={"data.noise": [0.0, 0.2]}, series_by=None, series=[{"name": "all"}],
                       set={"space.method": "global", "space.target_ratio": 0.8})  # fmt: skip
    run_study(path, tiny.config(), folder / "runs", lambda _: None)
    names = [outcome.id for outcome in read(folder / "runs" / "study-mine-tiny" / "outcomes.jsonl")]
    assert [name.startswith("dense-") for name in names] == [True, False, True, False]


def test_a_variant_that_breaks_is_told_of_and_leaves_the_rest(folder: Path) -> None:
    each = {"space.method": ["constant"], "space.target_ratio": [0.01, 0.9]}
    record = run_study(write_study(folder, each=each), tiny.config(), folder / "runs", lambda _: None)
    assert [row["top1"] is None for row in record["rows"]] == [True, False]
    assert "1 of 2 gave no model, the first since no constant schedule has" in record["sentence"]


def line(name: str, **points: float) -> StudyLine:
    """Of points given as `x5=0.9`: at 0.5."""
    x, y = tuple(float(key[1:]) / 10 for key in points), tuple(points.values())
    return StudyLine(name=name, x=x, y=y, low=y, high=y)


def test_the_best_x_is_best_on_most_lines() -> None:
    lines = [line("t 1", x1=0.9, x2=0.8), line("t 2", x1=0.7, x2=0.6), line("t 3", x1=0.1, x2=0.5)]
    told = best_x(lines, "top1", "cut-off", "target")
    assert told.startswith("best cut-off 0.1 at 2 of 3 targets; top-1 over all tried 80.0 to 90.0 % at t 1, 60.0")


def test_an_x_that_ties_counts_and_the_mean_decides_between_as_many() -> None:
    lines = [line("a", x1=0.9, x2=0.9), line("b", x1=0.2, x2=0.8), line("c", x1=0.5, x2=0.4)]
    assert best_x(lines, "top1", "x", "line").startswith("best x 0.2 at 2 of 3 lines")


def test_the_best_series_is_found_between_the_points_where_all_have_values() -> None:
    # At 0.2, 0.4 and 0.6; a is 0.5, 0.7, 0.9 there, b 0.8, 0.8, 0.8; a's points at 0.0 and 0.8 do not count.
    lines = [line("a", x0=0.3, x4=0.7, x8=1.1), line("b", x2=0.8, x6=0.8)]
    told = best_series(lines, "top1", "MACs")
    assert told == "at equal MACs, b has the highest top-1 at 2 of 3 points (means: b 80.0 %, a 70.0 %)."


def test_speed_is_told_as_a_ratio() -> None:
    told = best_series([line("a", x1=1.5), line("b", x1=1.25)], "speedup", "MACs")
    assert told == "at equal MACs, a has the highest speed-up at 1 of 1 points (means: a 1.50, b 1.25)."


def test_lines_without_a_common_x_do_not_compare_and_no_line_says_so() -> None:
    told = best_series([line("a", x1=0.5, x2=0.6), line("b", x3=0.5)], "top1", "MACs")
    assert told == "the lines have no MACs in common, so their top-1 does not compare."
    assert best_series([], "top1", "MACs") == best_x([], "top1", "x", "") == "nothing was measured."


def row(series: str, x: float, top1: float | None, **other: Any) -> dict[str, Any]:
    share = None if top1 is None else x
    made = {"series": series, "x": x, SHARE: share, "top1": top1, "state": "measured" if top1 else "failed"}
    return made | {"target_ratio": x, "reason": None if top1 else "it broke"} | other


def test_variants_at_one_x_are_drawn_as_their_mean_with_their_spread() -> None:
    rows = [row("a", 0.5, 0.8), row("a", 0.2, 0.5), row("a", 0.5, 0.9), row("a", 0.5, None)]
    (found,) = lines_of(rows, "x", "top1")
    assert (found.x, found.low, found.high) == ((0.2, 0.5), (0.5, 0.8), (0.5, 0.9))
    assert found.y == pytest.approx((0.5, 0.85))


def test_a_front_leaves_out_what_its_own_series_beats() -> None:
    rows = [row("a", 0.2, 0.5), row("a", 0.4, 0.4), row("a", 0.6, 0.9), row("b", 0.6, 0.1)]
    a, b = lines_of(rows, SHARE, "top1", front_only=True)
    assert (a.x, a.y, b.x) == ((0.2, 0.6), (0.5, 0.9), (0.6,))


def test_caveats_count_broken_variants_and_missed_targets() -> None:
    rows = [row("a", 0.5, 0.8), row("a", 0.5, 0.8, target_ratio=0.4), row("a", 0.5, None)]
    broken = "1 of 3 gave no model, the first since it broke."
    assert caveats(rows, "x") == [broken, "1 of 3 spent their budgets before they met the target."]
    assert caveats(rows, SHARE) == [broken]
    assert caveats(rows[:1], "x") == []


def test_the_picture_has_a_panel_a_metric_and_the_tables_all_rows(folder: Path) -> None:
    record = run_study(write_study(folder, y=["top1", "speedup"]), tiny.config(), folder / "runs", lambda _: None)
    info = study_info(record)
    assert [panel.y_label for panel in info.panels] == ["top-1 on val (%)", "speed-up over dense, measured"]
    traces = draw_study(info).data
    assert [trace.xaxis for trace in traces] == ["x", "x2"]
    by_share = sorted(record["rows"], key=lambda row: row[SHARE])
    assert list(traces[0].x) == [row[SHARE] for row in by_share]
    assert list(traces[0].y) == pytest.approx([100 * row["top1"] for row in by_share])
    assert list(traces[1].y) == pytest.approx([row["speedup"] for row in by_share])
    assert info.panels[1].dense == 1.0
    assert csv_table(record["rows"]).count("\n") == 1 + len(record["rows"])
    assert markdown(record).startswith("# How small?\n")
