"""The values of a recipe: bounds, choices, paths and times, and what is refused of each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pruning.plan import TOKEN_REDUCTIONS
from pruning.scores.criteria import CRITERIA
from search.config import Config
from search.errors import ConfigError
from search.fields import parse_seconds
from tests.search_tests import tiny


def changed(key: str, value: Any) -> dict[str, Any]:
    return tiny.record(**{key.replace(".", "__"): value})


@pytest.mark.parametrize(
    ("key", "bounds"),
    [
        ("cutoff_channel", [0.5, 0.02]),
        ("cutoff_token", [0.95, 0.05]),
        ("drop_budget", [2.0, 0.0]),
        ("token_share", [1.0, 0.0]),
        ("target_ratio", [1.0, 0.2]),
        ("exit_block", [3, 2]),
    ],
)
def test_bounds_upside_down_are_named(key: str, bounds: list[float]) -> None:
    expected = f"space.{key}: bounds {bounds} are upside down; give the lower one first"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        Config.from_dict(changed(f"space.{key}", bounds))


@pytest.mark.parametrize(("given", "read"), [(0.5, 0.5), ([0.3, 0.3], (0.3, 0.3)), ([0.1, 0.9], (0.1, 0.9))])
def test_parameter_is_a_number_or_a_range(given: Any, read: Any) -> None:
    assert tiny.config(space__target_ratio=given).space.target_ratio == read


@pytest.mark.parametrize(
    ("key", "given", "read"),
    [
        ("method", "global", "global"),
        ("method", ["cascade", "global"], ("cascade", "global")),
        ("method", ["global"], ("global",)),
        ("criterion", "obs", "obs"),
        ("criterion", [*CRITERIA], tuple(CRITERIA)),
        ("token_reduction", "attention-merge", "attention-merge"),
        ("token_reduction", [*TOKEN_REDUCTIONS], TOKEN_REDUCTIONS),
        ("token_reduction", "none", "none"),
        ("token_reduction", ["none", "merge"], ("none", "merge")),
        ("token_reduction", "auto", "auto"),
        ("round_to", 8, 8),
        ("round_to", [8, 1, 4], (8, 1, 4)),
        ("round_to", "auto", "auto"),
        ("round_to", ["auto"], ("auto",)),
        ("round_to", [8, "auto", 1], (8, "auto", 1)),
    ],
)
def test_choice_is_one_value_or_a_list_in_the_recipes_order(key: str, given: Any, read: Any) -> None:
    config = Config.from_dict(changed(f"space.{key}", given))
    assert getattr(config.space, key) == read
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("in_list", [False, True])
@pytest.mark.parametrize(
    ("key", "wrong", "names"),
    [
        ("method", "globl", ["cascade", "global"]),
        ("criterion", "lsf", list(CRITERIA)),
        ("token_reduction", "drop", ["none", *TOKEN_REDUCTIONS]),
    ],
)
def test_unknown_choice_is_one_line_with_the_key_the_value_and_those_there_are(
    key: str, wrong: str, names: list[str], in_list: bool
) -> None:
    with pytest.raises(ConfigError, match=rf"^space\.{key}: ") as raised:
        Config.from_dict(changed(f"space.{key}", [names[0], wrong] if in_list else wrong))
    message = str(raised.value)
    assert repr(wrong) in message
    assert all(re.search(rf"\b{re.escape(name)}\b", message) for name in names)
    assert "\n" not in message
    assert "; space" not in message


@pytest.mark.parametrize("key", ["method", "criterion", "token_reduction", "round_to"])
def test_empty_list_of_choices_is_refused(key: str) -> None:
    expected = f"^space.{key}: an empty list leaves no choice; give one value at least$"
    with pytest.raises(ConfigError, match=expected):
        Config.from_dict(changed(f"space.{key}", []))


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("method", ["global", "global"]),
        ("criterion", ["lfs", "obs", "lfs"]),
        ("token_reduction", ["merge", "merge"]),
        ("token_reduction", ["none", "lfe", "none"]),
        ("round_to", [8, 1, 8.0]),
        ("round_to", ["auto", 8, "auto"]),
    ],
)
def test_choice_that_is_given_twice_is_named(key: str, choices: list[Any]) -> None:
    twice = re.escape(repr(choices[0]))
    with pytest.raises(ConfigError, match=f"^space.{key}: {twice} is given twice; give each choice once$"):
        Config.from_dict(changed(f"space.{key}", choices))


def test_relative_paths_count_from_here(tmp_path: Path) -> None:
    config = tiny.config(data__root="images", model__checkpoint="~/w.pt", data__class_map=str(tmp_path))
    assert config.data.root == Path.cwd() / "images"
    assert config.model.checkpoint == Path.home() / "w.pt"
    assert config.data.class_map == tmp_path


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("90", 90), (90, 90), (1.5, 1.5), ("90s", 90), ("1.5m", 90), ("2h", 7200), (" 10 m ", 600), ("0", 0)],
)
def test_time_is_read(given: str | float, seconds: float) -> None:
    assert parse_seconds(given) == seconds
    assert tiny.config(search__time_budget=given).search.time_budget_s == seconds


@pytest.mark.parametrize("given", ["soon", "-3", "10 minutes", "", "1d", "1h30m", "nan", "inf"])
def test_what_is_no_time_is_told_what_is(given: str) -> None:
    with pytest.raises(ConfigError, match=f"search: time budget '{given}' is no time; give seconds, or 90s, 10m, 2h"):
        tiny.config(search__time_budget=given)
