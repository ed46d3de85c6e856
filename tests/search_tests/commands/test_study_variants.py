"""The variants of a study: the shipped ones fit their recipes, each is one candidate or a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pruning.model.anatomy import Anatomy, examine
from pruning.model.loading import create_model
from search.commands.study_variants import expand, load_study, only_candidate, shipped_studies
from search.errors import ConfigError
from search.outcome import Candidate
from search.recipe import load_config
from tests.search_tests import tiny
from tests.search_tests.commands.studies import write_study

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
    for key in ("space.speed", "speed.space", "speed"):
        path = write_study(tmp_path, set={key: 1})
        with pytest.raises(ConfigError, match=rf"sets {key}, which no recipe has"):
            expand(load_study(path), tiny.config(), tiny_anatomy())


def test_study_that_gives_a_key_twice_is_refused_and_its_patterns_stay_text(tmp_path: Path) -> None:
    path = Path(write_study(tmp_path))
    text = path.read_text().replace("each:", "each:\n  space.pattern: [2:4, 4:8]", 1)
    path.write_text(text)
    assert load_study(str(path)).each["space.pattern"] == ["2:4", "4:8"]
    path.write_text(text + "question: How fast?\n")
    with pytest.raises(ConfigError, match="'question' is given twice, first in line 1; keep one"):
        load_study(str(path))


def tiny_anatomy() -> Anatomy:
    return examine(tiny.model())


def candidates(path: str) -> list[Candidate]:
    anatomy = tiny_anatomy()
    return [only_candidate(variant, anatomy) for variant in expand(load_study(path), tiny.config(), anatomy)]


def test_every_combination_is_a_variant_in_the_order_of_the_file(tmp_path: Path) -> None:
    each = {"space.method": ["constant", "decreasing"], "space.target_ratio": [0.9, 0.7, 0.5]}
    combinations = [(one.method, one.target_ratio) for one in candidates(write_study(tmp_path, each=each))]
    assert combinations == [(method, ratio) for method in each["space.method"] for ratio in each["space.target_ratio"]]


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


def test_lines_by_a_key_that_is_not_varied_are_refused(tmp_path: Path) -> None:
    path = write_study(tmp_path, series_by="space.criterion")
    with pytest.raises(ConfigError, match=r"series_by 'space.criterion' is none of the keys that it varies in each"):
        expand(load_study(path), tiny.config(), tiny_anatomy())
