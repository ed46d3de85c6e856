"""Recipes: those that are shipped, those that are wrong, and what the command line changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pruning.plan import TOKEN_REDUCTIONS
from pruning.scores.criteria import CRITERIA
from pruning.training import TrainSettings
from search.config import Config, TrainingConfig, flat, input_spec, load_config, parse_seconds, shipped_recipes
from search.errors import ConfigError
from tests.search_tests import tiny

ROOT = Path(__file__).parents[2]
SECTIONS = ["model", "model.training", "data", "exits", "space", "search", "cascade", "measure", "resources"]
TIMM = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic", "crop_pct": 0.9}


def changed(key: str, value: Any) -> dict[str, Any]:
    return tiny.record(**{key.replace(".", "__"): value})


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_is_valid_and_named_after_itself(name: str) -> None:
    assert load_config(name).name == name


def test_digits_and_a_template_are_shipped() -> None:
    assert {"digits", "imagefolder"} <= set(shipped_recipes())


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.yaml")), ids=lambda path: path.name)
def test_recipe_of_a_benchmark_is_valid(path: Path) -> None:
    assert load_config(str(path)).name == path.stem


@pytest.mark.parametrize("name", shipped_recipes())
def test_config_survives_yaml(name: str) -> None:
    config = load_config(name)
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config


def test_training_defaults_are_those_of_the_library() -> None:
    assert TrainingConfig().settings() == TrainSettings()


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_key_is_named(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(section)}\.trails: unknown key$"):
        Config.from_dict(changed(f"{section}.trails", 3))


def test_unknown_section_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^serach: unknown key$"):
        Config.from_dict(changed("serach", {}))


def test_all_that_is_wrong_is_told_in_one_line() -> None:
    record = tiny.record(search__trails=3, data__val_images=2, space__exit_block=[2])
    del record["model"]["name"]
    with pytest.raises(ConfigError) as raised:
        Config.from_dict(record)
    told = str(raised.value).split("; ")
    assert sorted(told) == [
        "data.val_images: input should be greater than or equal to 8 (given: 2)",
        "model.name: field required",
        "search.trails: unknown key",
        "space.exit_block: needs two values, [low, high]",
    ]


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("space.cutoff_channel", [0.0, 0.5]),
        ("space.cutoff_token", [0.5, 1.5]),
        ("space.drop_budget", -1),
        ("space.drop_budget", [0, 101]),
        ("space.token_share", 1.01),
        ("space.target_ratio", 0),
        ("space.target_ratio", [0.2, 0.5, 0.8]),
        ("space.exit_block", 2.5),
        ("space.round_to", 0),
        ("space.round_to", [8, 0]),
        ("space.round_to", 1.5),
        ("space.round_to", "best"),
        ("space.round_to", ["auto", 0]),
        ("space.round_to", ["auto", "best"]),
        ("space.token_reduction", ["lfe", "auto"]),
        ("space.criterion", 3),
        ("search.trials", 0),
        ("search.sampler", "annealing"),
        ("data.calibration_images", 7),
        ("data.crop_pct", 1.1),
        ("data.interpolation", "cubic"),
        ("exits.epochs", 0),
        ("exits.distillation", 2),
        ("cascade.num_levels", 0),
        ("measure.batch_size", 0),
        ("measure.num_rounds", 5),
        ("measure.precision", "float16"),
        ("resources.cpus_per_trial", 0),
        ("resources.gpus_per_trial", 2),
        ("model.training.epochs", 0),
        ("model.training.learning_rate", 0),
        ("name", "../elsewhere"),
        ("name", ""),
    ],
)
def test_value_out_of_range_is_one_line_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: ") as raised:
        Config.from_dict(changed(key, value))
    assert "\n" not in str(raised.value)


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


def test_by_default_nothing_is_left_to_choose() -> None:
    space = tiny.config().space
    assert (space.method, space.criterion, space.token_reduction, space.round_to) == ("cascade", "lfs", "lfe", 1)


@pytest.mark.parametrize("in_list", [False, True])
@pytest.mark.parametrize(
    ("key", "wrong", "known"),
    [
        ("method", "globl", ["cascade", "global"]),
        ("criterion", "lsf", list(CRITERIA)),
        ("token_reduction", "drop", ["none", *TOKEN_REDUCTIONS]),
    ],
)
def test_unknown_choice_is_one_line_with_the_key_the_value_and_those_there_are(
    key: str, wrong: str, known: list[str], in_list: bool
) -> None:
    with pytest.raises(ConfigError, match=rf"^space\.{key}: ") as raised:
        Config.from_dict(changed(f"space.{key}", [known[0], wrong] if in_list else wrong))
    told = str(raised.value)
    assert repr(wrong) in told
    assert all(re.search(rf"\b{re.escape(name)}\b", told) for name in known)
    assert "\n" not in told
    assert "; space" not in told


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


def test_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        tiny.config().search.trials = 3


def test_relative_paths_count_from_here(tmp_path: Path) -> None:
    config = tiny.config(data__root="images", model__checkpoint="~/w.pt", data__class_map=str(tmp_path))
    assert config.data.root == Path.cwd() / "images"
    assert config.model.checkpoint == Path.home() / "w.pt"
    assert config.data.class_map == tmp_path


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


def test_no_time_budget_is_none() -> None:
    assert tiny.config().search.time_budget_s is None


def test_same_settings_have_no_differences() -> None:
    assert tiny.config().differences(tiny.config()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "other"),
        ("search.trials", 99),
        ("search.time_budget", "1h"),
        ("resources.cpus_per_trial", 7),
        ("resources.gpus_per_trial", 0.5),
    ],
)
def test_how_long_and_where_a_sweep_runs_makes_no_difference(key: str, value: Any) -> None:
    assert tiny.config().differences(Config.from_dict(changed(key, value))) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.name", "deit_tiny_patch16_224"),
        ("model.args", {"depth": 2}),
        ("model.training", {"epochs": 1}),
        ("data.seed", 1),
        ("exits.epochs", 3),
        ("space.exit_block", [2, 3]),
        ("space.method", ["cascade", "global"]),
        ("space.round_to", 8),
        ("space.round_to", "auto"),
        ("space.token_reduction", "auto"),
        ("search.sampler", "random"),
        ("search.seed", 1),
        ("search.accuracy", "recall_at_1"),
        ("search.accuracy", "mean_average_precision"),
        ("cascade.alpha", 0.5),
        ("measure.batch_size", 4),
    ],
)
def test_what_makes_other_outcomes_is_a_difference(key: str, value: Any) -> None:
    other = Config.from_dict(changed(key, value))
    for differences in (tiny.config().differences(other), other.differences(tiny.config())):
        assert differences
        assert all(difference.startswith(key) for difference in differences)


def test_flat_settings_keep_the_models_arguments_whole() -> None:
    settings = flat({"a": {"b": {"c": 1}, "args": {"d": 2}}, "e": None, "f": {}})
    assert settings == {"a.b.c": 1, "a.args": {"d": 2}, "e": None}


def test_input_is_what_timm_knows_unless_the_recipe_says_otherwise() -> None:
    default = input_spec(tiny.config(), TIMM, (16, 16))
    assert (default.mean, default.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (default.interpolation, default.crop_pct, default.size) == ("bicubic", 0.9, (16, 16))
    own = {"data__mean": [0.5], "data__std": [0.25], "data__interpolation": "nearest", "data__crop_pct": 1.0}
    spec = input_spec(tiny.config(**own), TIMM, (8, 8))
    assert (spec.mean, spec.std, spec.interpolation, spec.crop_pct) == ((0.5,), (0.25,), "nearest", 1.0)
