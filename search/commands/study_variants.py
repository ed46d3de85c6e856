"""The question of a study, and the variants of a recipe that answer it.

A study is a YAML file (`search/studies/`) that varies a few keys of the recipe and fixes the rest of its space, so that
every variant is one candidate; or, where a study asks about the search itself, one small search.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pruning.model.anatomy import Anatomy
from search.config import Config
from search.errors import ConfigError
from search.outcome import Candidate
from search.space import Space
from search.values import read_yaml

STUDY_DEFAULTS: dict[str, Any] = {
    "space.method": "cascade",
    "space.criterion": "lfs",
    "space.token_reduction": "none",
    "space.cutoff_channel": 0.1,
    "space.cutoff_token": 0.85,
    "space.drop_budget": 1.0,
    "space.token_share": 0.56,
    "space.target_ratio": 1.0,
    "space.exit_block": None,
    "space.round_to": 1,
    "space.pattern": "any",
    "space.recovery": "none",
    "cascade.order": "bottom-up",
    "data.noise": 0.0,
}
"""Values of the recipe's keys in every study that does not set them: VTC-LFC's, for channels, at the whole depth."""

QUICK_ROUNDS = 6
"""Number of timing rounds against the dense model in a study that does not ask for the speed: more would take most of
a variant's time."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    set: dict[str, Any] = {}
    """Keys of the recipe that are fixed, with their values. An exit may be a share of the depth, in (0, 1)."""
    each: dict[str, list[Any]] = {}
    """Keys of the recipe with a list of values each; every combination is a variant."""


class Series(_Part):
    """One line of the figure, with its own variants."""

    name: str
    """Name of the line."""
    trials: int | None = Field(default=None, ge=1)
    """Number of trials of the recipe's sampler in a space that is left open; None for one candidate."""


class Study(_Part):
    """A question that variants of a recipe answer."""

    question: str
    """The question, as the heading of table and figure."""
    source: str
    """Paper and figure that asked it first."""
    remark: str = ""
    """Differences from the source, for the reader."""
    x: str
    """Horizontal axis of the figure: a key of the recipe, or `share`, the measured share of the dense MACs."""
    x_label: str
    """Name of the horizontal axis."""
    x_unit: str = ""
    """Unit of the horizontal axis."""
    log_x: bool = False
    """True for a logarithmic horizontal axis."""
    y: list[Literal["top1", "speedup"]] = ["top1"]
    """Vertical axes of the figure, one panel each: fields of a measurement."""
    series_by: str | None = None
    """Key of the recipe whose values are the lines; None where `series` names them."""
    series_label: str = ""
    """Word before such a value in the name of a line: `target` for `target 0.5`."""
    series: list[Series] = []
    """Lines with variants of their own."""
    answer: Literal["best-x", "best-series"]
    """Form of the answer: the x that is best on most lines, or the line that is best at most x."""
    front_only: bool = False
    """True to count only variants that no other of their line beats at equal MACs, and to state hypervolumes."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One setting of a study."""

    series: str
    """Name of its line in the figure."""
    values: dict[str, Any]
    """Keys of the recipe that vary -> their values here."""
    config: Config
    """The recipe with all that the study sets."""
    trials: int | None
    """Number of trials of a search; None where the space has one candidate."""

    @property
    def id(self) -> str:
        """Hash of all that the outcome depends on, but for the machine."""
        free = {"name", "resources"} | ({"search"} if self.trials is None else set())
        record = self.config.model_dump(mode="json", exclude=free)
        record.get("search", {}).pop("trials", None)  # more trials go on with those there are
        return _hash(record)

    @property
    def context_id(self) -> str:
        """Hash of what the dense model, its images and its measurement depend on, which variants may share."""
        return _hash(self.config.model_dump(mode="json", include={"model", "data", "exits", "measure", "fingerprints"}))


def shipped_studies() -> list[str]:
    """Returns the names of the studies that come with vitfront."""
    folder = resources.files("search") / "studies"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_study(name: str) -> Study:
    """Loads a shipped study by its name, or a YAML file by its path.

    Raises:
        ConfigError: there is none, or a key or value of it is wrong.
    """
    shipped = resources.files("search") / "studies" / f"{name}.yaml"
    source = Path(name) if name.endswith((".yaml", ".yml")) else shipped
    if not source.is_file():
        raise ConfigError(f"no study {name!r}; give a YAML file or one of: {', '.join(shipped_studies())}")
    try:
        return Study.model_validate(read_yaml(source.read_text(encoding="utf-8"), name, Study))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {name}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def expand(study: Study, config: Config, anatomy: Anatomy) -> list[Variant]:
    """Returns all variants of a recipe, each once, in the order in which they run.

    Raises:
        ConfigError: a key or value does not fit the recipe or the model, or a parameter is left open.
    """
    variants: dict[str, Variant] = {}
    defaults = STUDY_DEFAULTS if "speedup" in study.y else STUDY_DEFAULTS | {"measure.num_rounds": QUICK_ROUNDS}
    all_series: Sequence[Series | None] = study.series or [None]
    for series in all_series:
        varied = study.each | (series.each if series else {})
        if series is None and study.series_by not in varied:
            raise ConfigError(f"the study's series_by {study.series_by!r} is none of the keys that it varies in each")
        fixed = defaults | study.set | (series.set if series else {})
        for combination in itertools.product(*varied.values()):
            values = dict(zip(varied, combination, strict=True))
            name = series.name if series else f"{study.series_label} {values[study.series_by or '']}".strip()
            variant = Variant(
                series=name, values=values, config=with_changes(config, fixed | values, anatomy),
                trials=series.trials if series else None,
            )  # fmt: skip
            variants.setdefault(f"{name} {variant.id}", variant)
            if variant.trials is None:
                only_candidate(variant, anatomy)
    return list(variants.values())


def only_candidate(variant: Variant, anatomy: Anatomy) -> Candidate:
    """Returns the one candidate of a variant's space.

    Raises:
        ConfigError: the space has more than one.
    """
    return space_of(variant.config, anatomy).choose(_NoChooser())


class _NoChooser:
    """A chooser that refuses to choose anything: nothing may be left open."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> NoReturn:
        self._refuse(name)

    def suggest_int(self, name: str, low: int, high: int) -> NoReturn:
        self._refuse(name)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> NoReturn:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise ConfigError(f"the study leaves space.{name.split('.')[0]} open; give it one value in set or each")


def space_of(config: Config, anatomy: Anatomy) -> Space:
    """Returns the recipe's space for a model."""
    return Space(config.space, anatomy.depth, anatomy.exits, has_windows=anatomy.has_windows)


def with_changes(config: Config, changes: Mapping[str, Any], anatomy: Anatomy) -> Config:
    """Returns the recipe with other values.

    Args:
        changes: key -> value; an exit may be a share of the depth, in (0, 1).

    Raises:
        ConfigError: a key is unknown, or its value does not fit.
    """
    record = config.model_dump(mode="json")
    for key, value in changes.items():
        if key == "space.exit_block" and isinstance(value, float):
            value = min(anatomy.exits, key=lambda block: abs(block - value * anatomy.depth))
        *path, last = key.split(".")
        section = record
        for name in path:
            section = section.get(name) or {}  # an unknown section is empty, so its keys are reported as unknown
        if last not in section:
            raise ConfigError(f"the study sets {key}, which no recipe has")
        section[last] = value
    return Config.from_dict(record)


def _hash(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
