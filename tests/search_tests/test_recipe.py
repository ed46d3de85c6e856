"""Recipes: those that are shipped, those that cannot be read, and what the command line changes."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize("change", ["search.trials", "=3", "", "search", ".=3", "search.=3", "search..trials=3"])
def test_set_of_another_form_is_told_the_form(change: str) -> None:
    with pytest.raises(ConfigError, match=f"^--set '{change}' is not of the form a.b=c$"):
        load_config("digits", sets=[change])


@pytest.mark.parametrize(
    ("change", "needs"),
    [
        ("data.mean=0.5,0.5,0.5", r"data.mean: input should be a list, \[a, b, ...\] \(given: '0.5,0.5,0.5'\)"),
        ("data.std=0.5", r"data.std: input should be a list"),
        ("model.args=num_classes=3", "model.args: input should be keys and values, {key: value, ...}"),
        ("model.training=true", "model.training: input should be keys and values"),
    ],
)
def test_list_or_section_of_another_form_is_told_the_form(change: str, needs: str) -> None:
    with pytest.raises(ConfigError, match=f"^{needs}"):
        load_config("digits", sets=[change])


def test_set_below_a_value_says_that_there_are_no_keys() -> None:
    with pytest.raises(ConfigError, match="name holds a value, not keys"):
        load_config("digits", sets=["model.name.first=3"])


def test_set_of_an_unknown_key_names_it() -> None:
    with pytest.raises(ConfigError, match=r"^search\.trails: unknown key; do you mean search\.trials\?$"):
        load_config("digits", sets=["search.trails=3"])


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ("data.roots=x", r"; do you mean data\.root\?"),
        ("model.training.epocs=3", r"; do you mean model\.training\.epochs\?"),
        ("checkpoint=x", r"; do you mean model\.checkpoint\?"),  # the section is forgotten
        ("search.limit=x", r"; do you mean search\.limits\?"),
        ("frobnicate=1", ""),
    ],
)
def test_unknown_key_is_answered_with_the_nearest_one(change: str, advice: str) -> None:
    key = re.escape(change.partition("=")[0])
    with pytest.raises(ConfigError, match=f"^{key}: unknown key{advice}$"):
        load_config("digits", sets=[change])


def test_unknown_keys_of_a_file_are_answered_all_at_once(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "r.yaml", search__trails=3, data__rot="images")
    with pytest.raises(ConfigError, match=r"; do you mean data\.root, search\.trials\?$|search\.trials, data\.root\?$"):
        load_config(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "/data/set #2",
        "yes",
        "1e3",
        "2024",
        "1:30",
        "a: b",
        "'q'",
        '"q"',
        "[x]",
        "{x",
        " a ",
        "~x",
        "C:\\new",
        "a=b",
        "&a",
    ],
)
def test_text_is_taken_as_it_stands(text: str) -> None:
    config = load_config("digits", sets=[f"data.train={text}", f"data.root=/{text}", f"model.checkpoint_key={text}"])
    assert (config.data.train, config.data.root, config.model.checkpoint_key) == (text, Path(f"/{text}"), text)


def test_key_that_may_be_empty_is_emptied_by_null_or_nothing() -> None:
    config = load_config("digits", sets=["data.test=null", "data.root=", "search.time_budget=null", "search.earlier="])
    assert (config.data.test, config.data.root, config.search.time_budget) == (None, None, None)
    assert config.search.earlier == ()
    assert load_config("digits", sets=["data.train=null"]).data.train == "null"  # this one is never empty
    with pytest.raises(ConfigError, match=r"^--set 'data.train=' gives no value; it needs a text$"):
        load_config("digits", sets=["data.train="])


def test_tilde_is_the_home_folder_in_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config("digits", sets=["data.root=~", "model.checkpoint=~/a.pt"])
    assert (config.data.root, config.model.checkpoint) == (Path("/home/me"), Path("/home/me/a.pt"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("search.trials=08", 8), ("search.trials=010", 10), ("search.trials=0o10", 8), ("search.trials=1_000", 1000)),
        *(("data.noise=.5", 0.5), ("data.noise=1e-3", 0.001), ("data.noise=5.", 5.0), ("data.noise= 1 ", 1.0)),
        *(("model.pretrained=yes", True), ("model.pretrained=off", False), ("model.pretrained=True", True)),
        *(("space.pattern=2:4", "2:4"), ("space.pattern=[2:4, any]", ("2:4", "any"))),
        *(("space.target_ratio=[1e-1, .5]", (0.1, 0.5)), ("space.exit_block=null", None)),
        *(("search.earlier=a", ("a",)), ("search.earlier=[a, 2024]", ("a", "2024"))),
        *(("search.limits=macs <= 60%", ("macs <= 60%",)), ("search.time_budget=90", 90.0), ("name=2024", "2024")),
        *(("model.args.x=a #b", "a #b"), ("model.args.x=1:30", "1:30"), ("model.args.x='no'", "no")),
        *(("model.args.x=1e-3", 1e-3), ("model.args.x=0x10", 16), ("model.args.x=[4, 4]", [4, 4])),
    ],
)
def test_value_is_read_by_the_type_of_its_key(text: str, value: Any) -> None:
    found: Any = load_config("digits", sets=[text])
    for part in text.partition("=")[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("search.trials=1:30", "search.trials: .* unable to parse string as an integer .given: '1:30'"),
        ("search.trials=true", "search.trials: .* unable to parse string as an integer .given: 'true'"),
        ("search.trials=" + "9" * 5000, "a number has too many digits"),
        ("data.mean=0.5", r"data.mean: input should be a list, \[a, b, \.\.\.\] .given: 0\.5"),
        ("data.mean=0.5,0.5,0.5", r"data.mean: input should be a list, \[a, b, \.\.\.\] .given: '0\.5,0\.5,0\.5'"),
        ("data.noise=inf", "data.noise: input should be a finite number"),
        ("data.noise=.inf", "data.noise: input should be a finite number"),
        ("data.noise=nan", "data.noise: input should be a finite number"),
        ("data.noise=0.5 # half", "data.noise: .* unable to parse string as a number"),
        ("search.time_budget=1:30", "time budget '1:30' is no time; give seconds, or 90s, 10m, 2h"),
        ("model.args.class_token=no", "no is false to some readers of YAML and text to others; give false, or"),
        ("model.args={class_token: off}", "off is false to some readers"),
        ("model.args={depth: 4", "^cannot read --set 'model.args={depth: 4': while parsing a flow mapping"),
        ("model.args={a: 1, a: 2}", "'a' is given twice"),
        ("model.args=" + 3000 * "[", "nests its lists too deep"),
        ("model.args={a: !!python/object/apply:os.getcwd []}", "could not determine a constructor for the tag"),
        ("space.criterion=[lfs", "expected ',' or '.'"),
    ],
)  # fmt: skip
def test_value_that_does_not_fit_its_key_is_one_line(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_config("digits", sets=[change])
    assert "\n" not in str(raised.value)


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
        (b"a: [1", "cannot read .*r.yaml: while parsing a flow sequence"),
        (b"a: 1\nb: [1\n", "cannot read .*r.yaml, line 3: while parsing"),
        (b"a: \x00", "cannot read .*r.yaml: unacceptable character #x0000"),
        (b"\x89PNG\xff", "cannot read .*utf-8"),
        (b"- 1\n- 2\n", "is not a recipe: it holds list, not keys and values"),
        (b"", "is not a recipe: it holds NoneType"),
        (b"model: 3\ndata: {}", r"model: input should be keys and values, {key: value, ...} \(given: 3\)"),
    ],
)
def test_file_that_is_no_recipe_is_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as raised:
        load_config(str(path))
    assert "\n" not in str(raised.value)


def test_text_of_a_file_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: 2024\nmodel: {name: vit_tiny_patch16_224, args: {window: 2:4, scale: 1e-3}}\n"
        "data: {train: no, val: 1e3, test: 12:30:45, root: ~/x}\n"
        "space: {pattern: 2:4, target_ratio: [1e-1, 5e-1]}\nsearch: {earlier: [2023, on], time_budget: 90}\n"
    )
    config = load_config(str(path))
    assert (config.name, config.data.train, config.data.val, config.data.test) == ("2024", "no", "1e3", "12:30:45")
    assert config.data.root == Path.home() / "x"
    assert (config.space.pattern, config.space.target_ratio) == ("2:4", (0.1, 0.5))
    assert (config.search.earlier, config.search.time_budget) == (("2023", "on"), 90.0)
    assert config.model.args == {"window": "2:4", "scale": 1e-3}


def test_null_of_a_file_is_none_and_in_quotes_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {name: vit_tiny_patch16_224}\ndata:\n  root: ~\n  test:\n  class_map: null\n  val: 'null'\n"
    )
    data = load_config(str(path)).data
    assert (data.root, data.test, data.class_map, data.val) == (None, None, None, "null")


def test_key_that_a_file_gives_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  name: a\ndata:\n  seed: 1\n  val: x\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"r.yaml, line 6: 'seed' is given twice, first in line 4; keep one$"):
        load_config(str(path))


def test_keys_that_are_merged_in_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: a}\ndata: {}\nlearned: &all {epochs: 3, flip: on}\ndistill: {<<: *all, epochs: 5}\n")
    config = load_config(str(path))
    assert (config.learned.epochs, config.learned.flip) == (3, True)
    assert (config.distill.epochs, config.distill.flip) == (5, True)


@pytest.mark.parametrize("text", ["yes", "1e3", "2024", "2:4", "~", "null", "a #b", "it's", "0x1", "é", "a: b"])
def test_settings_that_a_sweep_wrote_are_a_recipe(tmp_path: Path, text: str) -> None:
    config = tiny.config(data__train=text, model__checkpoint_key=text, model__args={"number": 1e-5})
    path = tmp_path / "r.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(str(path)) == config
