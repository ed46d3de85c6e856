"""The recipe of a sweep: its sections, what is wrong with one, and how two of them differ."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from pruning.training import TrainSettings
from search.config import Config, DataConfig, ModelConfig, TrainingConfig, flat
from search.errors import ConfigError
from search.recipe import load_config, shipped_recipes
from tests.search_tests import tiny

SECTIONS = [
    "model", "model.training", "data", "exits", "space", "search", "cascade", "learned", "soft_mask", "distill",
    "measure", "resources",
]  # fmt: skip


def changed(key: str, value: Any) -> dict[str, Any]:
    return tiny.record(**{key.replace(".", "__"): value})


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
    lines = str(raised.value).split("; ")
    assert sorted(lines) == [
        "data.val_images: input should be greater than or equal to 8 (given: 2)",
        "model.name: field required",
        "search.trails: unknown key",
        "space.exit_block: needs two values, [low, high]",
    ]


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
        ("model.training.seed", -1),
        ("data.seed", 2**32),
        ("search.seed", -1),
        ("name", "../elsewhere"),
        ("name", ""),
    ],
)
def test_value_out_of_range_is_one_line_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: ") as raised:
        Config.from_dict(changed(key, value))
    assert "\n" not in str(raised.value)


def test_by_default_nothing_is_left_to_choose() -> None:
    space = tiny.config().space
    assert (space.method, space.criterion, space.token_reduction, space.round_to) == ("cascade", "lfs", "lfe", 1)


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The classes of a recipe's sections, that of the whole recipe first."""
    inner = [kind for field in model.model_fields.values() for kind in (field.annotation, *get_args(field.annotation))]
    below = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [model, *(section for kind in below for section in sections(kind))]


@pytest.mark.parametrize("section", sections(Config), ids=lambda section: section.__name__)
def test_every_key_says_by_itself_what_it_is(section: type[BaseModel]) -> None:
    """A tooltip shows the sentence without the key's neighbours."""
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel) or field.annotation in (ModelConfig, DataConfig):
            continue  # a section has its class's docstring
        assert field.description, name
        assert not re.match(r"(Of|What|Whether|How|Where|Who|The same|Likewise|It|So)\b", field.description), name


def test_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        tiny.config().search.trials = 3


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
        ("data.exif", "ignore"),  # as it is by default; told by the fingerprint of the preprocessing
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
