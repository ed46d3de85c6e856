"""Reads recipes: YAML files or shipped names, with the changes of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from search.config import PRESETS, Config
from search.errors import ConfigError
from search.values import parse_value, read_yaml, section_of


def load_config(
    recipe: str, *, name: str | None = None, trials: int | None = None, time_budget: str | None = None,
    earlier: Sequence[str] = (), sets: Sequence[str] = (),
) -> Config:  # fmt: skip
    """A recipe with the command line's changes.

    Args:
        recipe: path of a YAML file, or a shipped name.
        sets: `a.b=c` each, c as `search.values.parse_value` reads it; or `space=NAME`, a preset of the search space.

    Raises:
        ConfigError: no such recipe, a key or value that is wrong.
    """
    record = _read_recipe(recipe)
    record.setdefault("name", Path(recipe).stem)
    for change in sets:
        key, equals, text = change.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {change!r} is not of the form a.b=c")
        if key == "space" and text in PRESETS:
            _set_preset(record, text)
        else:
            _set(record, key, parse_value(text, _kind_of(key), f"--set {change!r}"))
    options: dict[str, Any] = {"name": name, "search.trials": trials, "search.time_budget": time_budget}
    if earlier:
        options["search.earlier"] = list(earlier)
    for key, value in options.items():
        if value is not None:
            _set(record, key, value)
    try:
        return Config.from_dict(record)
    except ConfigError as error:
        nearest = ", ".join(dict.fromkeys(filter(None, map(_nearest_key, _unknown_keys(record, Config)))))
        raise ConfigError(f"{error}; do you mean {nearest}?" if nearest else str(error)) from None


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with vitfront."""
    folder = resources.files("search") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _read_recipe(recipe: str) -> dict[str, Any]:
    shipped = resources.files("search") / "recipes" / f"{recipe}.yaml"
    source = Path(recipe) if recipe.endswith((".yaml", ".yml")) else shipped
    if not source.is_file():
        raise ConfigError(f"no recipe {recipe!r}; give a YAML file or one of: {', '.join(shipped_recipes())}")
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {recipe}: {error}") from None
    record = read_yaml(text, recipe, Config)
    if not isinstance(record, dict):
        raise ConfigError(f"{recipe} is not a recipe: it holds {type(record).__name__}, not keys and values")
    return record


def _set_preset(record: dict[str, Any], name: str) -> None:
    """Sets the keys of a preset of the search space; the others of `space` stay."""
    for key, value in PRESETS[name].items():
        _set(record, f"space.{key}", value)


def _set(record: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        inner = record.setdefault(part, {})
        record[part] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise ConfigError(f"{key} cannot be set: {part} holds a value, not keys")
        record = inner
    record[last] = value


def _kind_of(key: str) -> Any:
    """Returns the type of a key of the recipe; Any for one below `model.args`, and for one that there is not."""
    kind: Any = Config
    for part in key.split("."):
        section = section_of(kind)
        if section is None or part not in section.model_fields:
            return Any
        kind = section.model_fields[part].annotation
    return kind


def _unknown_keys(record: Any, kind: Any, prefix: str = "") -> list[str]:
    section = section_of(kind)
    if section is None or not isinstance(record, dict):
        return []
    unknown = []
    for key, value in record.items():
        if key in section.model_fields:
            unknown += _unknown_keys(value, section.model_fields[key].annotation, f"{prefix}{key}.")
        else:
            unknown.append(f"{prefix}{key}")
    return unknown


def _nearest_key(key: str) -> str | None:
    """Returns the keys that end alike, in other sections, or else the one that is spelled most alike."""
    keys = _keys_of(Config)
    alike = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    return " or ".join(alike or get_close_matches(key, keys, n=1, cutoff=0.75)) or None


def _keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        keys += [f"{prefix}{name}"] + ([] if inner is None else _keys_of(inner, f"{prefix}{name}."))
    return keys
