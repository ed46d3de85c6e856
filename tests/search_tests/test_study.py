"""Studies: the shipped ones fit their recipes, run once, and say what is in their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pruning.anatomy import Anatomy, examine
from pruning.models import create_model
from search.config import load_config
from search.errors import ConfigError
from search.ledger import read
from search.study import expand, load_study, only_candidate, run_study, shipped_studies
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
