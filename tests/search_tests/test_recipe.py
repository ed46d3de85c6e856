"""Recipes: those that are shipped, those that cannot be read, and what the command line changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from search.config import TrainingConfig
from search.errors import ConfigError
from search.recipe import load_config, shipped_recipes
from tests.search_tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_is_valid_and_named_after_itself(name: str) -> None:
    assert load_config(name).name == name


def test_digits_and_a_template_are_shipped() -> None:
    assert {"digits", "imagefolder"} <= set(shipped_recipes())


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.yaml")), ids=lambda path: path.name)
def test_recipe_of_a_benchmark_is_valid(path: Path) -> None:
    assert load_config(str(path)).name == path.stem


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("search.trials=7", ("search", "trials"), 7),
        ("search.time_budget=10m", ("search", "time_budget"), "10m"),
        ("space.target_ratio=0.5", ("space", "target_ratio"), 0.5),
        ("space.target_ratio=[0.4, 0.6]", ("space", "target_ratio"), (0.4, 0.6)),
        ("space.method=global", ("space", "method"), "global"),
        ("space.criterion=[lfs, obs]", ("space", "criterion"), ("lfs", "obs")),
        ("space.round_to=[auto, 8]", ("space", "round_to"), ("auto", 8)),
        ("space.token_reduction=none", ("space", "token_reduction"), "none"),
        ("data.test=null", ("data", "test"), None),
        ("model.pretrained=true", ("model", "pretrained"), True),
        ("model.args={depth: 4}", ("model", "args"), {"depth": 4}),
        ("data.dataset=hfds/a=b", ("data", "dataset"), "hfds/a=b"),
        ("model.training.epochs=3", ("model", "training"), TrainingConfig(epochs=3)),
    ],
)
def test_set_changes_one_key_to_a_value_of_its_type(
    tmp_path: Path, text: str, key: tuple[str, str], value: Any
) -> None:
    recipe = str(tiny.write_recipe(tmp_path / "r.yaml"))
    section, name = key
    config = load_config(recipe, sets=[text])
    assert getattr(getattr(config, section), name) == value
    assert [k for k in config.differences(load_config(recipe)) if not k.startswith(".".join(key))] == []


def test_set_fills_a_section_that_is_empty_or_null(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "r.yaml", space=None, model__training=None)
    config = load_config(str(recipe), sets=["space.exit_block=2", "model.training.seed=5"])
    assert config.space.exit_block == 2
    assert config.model.training == TrainingConfig(seed=5)


def test_set_reaches_into_the_models_arguments(tmp_path: Path) -> None:
    config = load_config(str(tiny.write_recipe(tmp_path / "r.yaml")), sets=["model.args.num_classes=7"])
    assert config.model.args == tiny.ARGS | {"num_classes": 7}


def test_of_two_sets_the_later_wins_and_trials_over_both(tmp_path: Path) -> None:
    recipe = str(tiny.write_recipe(tmp_path / "r.yaml"))
    sets = ["search.trials=3", "search.trials=4"]
    assert load_config(recipe, sets=sets).search.trials == 4
    assert load_config(recipe, sets=sets, trials=5, time_budget="3s").search.trials == 5
    assert load_config(recipe, time_budget="3m").search.time_budget_s == 180


@pytest.mark.parametrize("change", ["search.trials", "=3", "", "search"])
def test_set_of_another_form_is_told_the_form(change: str) -> None:
    with pytest.raises(ConfigError, match=f"^--set '{change}' is not of the form a.b=c$"):
        load_config("digits", sets=[change])


def test_set_below_a_value_says_that_there_are_no_keys() -> None:
    with pytest.raises(ConfigError, match="name holds a value, not keys"):
        load_config("digits", sets=["model.name.first=3"])


def test_set_of_an_unknown_key_names_it() -> None:
    with pytest.raises(ConfigError, match=r"^search\.trails: unknown key$"):
        load_config("digits", sets=["search.trails=3"])


def test_name_is_the_files_the_recipes_or_the_callers(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "pets.yaml")
    assert load_config(str(path)).name == "tiny"
    path.write_text(yaml.safe_dump({key: value for key, value in tiny.record().items() if key != "name"}))
    assert load_config(str(path)).name == "pets"
    assert load_config(str(path), name="2024").name == "2024"  # which YAML takes for a number


@pytest.mark.parametrize("recipe", ["digit", "none.yaml", "none/digits.yml"])
def test_unknown_recipe_is_answered_with_those_there_are(recipe: str) -> None:
    with pytest.raises(ConfigError, match=rf"^no recipe '{recipe}'; give a YAML file or one of: digits, imagefolder"):
        load_config(recipe)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [1", "is not YAML: "),
        (b"\x89PNG\xff", "cannot read .*utf-8"),
        (b"- 1\n- 2\n", "is not a recipe: it holds list, not keys and values"),
        (b"", "is not a recipe: it holds NoneType"),
        (b"model: 3\ndata: {}", "model: input should be a valid dictionary"),
    ],
)
def test_file_that_is_no_recipe_is_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as raised:
        load_config(str(path))
    assert "\n" not in str(raised.value)
