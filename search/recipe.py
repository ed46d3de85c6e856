"""Reads recipes: YAML files or shipped names, with the changes of the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from search.config import Config
from search.errors import ConfigError


def load_config(
    recipe: str, *, name: str | None = None, trials: int | None = None, time_budget: str | None = None,
    earlier: Sequence[str] = (), sets: Sequence[str] = (),
) -> Config:  # fmt: skip
    """A recipe with the command line's changes.

    Args:
        recipe: path of a YAML file, or a shipped name.
        sets: `a.b=c` each, c in YAML.

    Raises:
        ConfigError: no such recipe, a key or value that is wrong.
    """
    record = _read_recipe(recipe)
    record.setdefault("name", Path(recipe).stem)
    changes = [*sets]
    changes += [f"search.trials={trials}"] if trials is not None else []
    changes += [f"search.time_budget={time_budget}"] if time_budget is not None else []
    changes += [f"search.earlier={json.dumps(earlier)}"] if earlier else []
    for change in changes:
        _set(record, change)
    if name is not None:
        record["name"] = name  # not through YAML, where 2024 is a number
    return Config.from_dict(record)


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
        record = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {recipe}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{recipe} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{recipe} is not a recipe: it holds {type(record).__name__}, not keys and values")
    return record


def _set(record: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {change!r} is not of the form a.b=c")
    *path, last = key.split(".")
    for part in path:
        inner = record.setdefault(part, {})
        record[part] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {change!r}: {part} holds a value, not keys")
        record = inner
    try:
        record[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        record[last] = text
