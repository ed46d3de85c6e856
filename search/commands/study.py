"""The source papers' questions, asked of a recipe: what `vitfront study` does.

A study is a YAML file (`search/studies/`) that varies a few keys of the recipe and fixes the rest of its space, so that
every variant is one candidate; or, where a study asks about the search itself, one small search. The variants run one
after the other in this process. The ledger names them by what they are, so the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pruning.artifact import save_weights
from pruning.model.anatomy import Anatomy, examine
from pruning.model.surgery import keep_all_plan
from search.cluster.searcher import StudySearcher
from search.commands.study_report import best_series, best_x, caveats, csv_table, lines_of, markdown, row_of
from search.config import Config
from search.errors import ConfigError
from search.front import hypervolume_of
from search.goal import Goal
from search.outcome import Candidate, Measurement, Outcome, State
from search.records.files import write_atomically
from search.records.ledger import Ledger
from search.space import Space
from search.trial.context import TrialContext, prepare
from search.trial.inputs import load_inputs
from search.trial.trial import run_to_end
from search.views.study_plot import study_html

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
"""What holds in every study that does not say otherwise: VTC-LFC's settings, for channels, of the whole depth."""

QUICK_ROUNDS = 6
"""Rounds of timing against the dense model in a study that does not ask for the speed: more would take most of a
variant's time."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    set: dict[str, Any] = {}
    """Keys of the recipe that are fixed. An exit may be a share of the depth, in (0, 1)."""
    each: dict[str, list[Any]] = {}
    """Key of the recipe -> its values; every combination is a variant."""


class Series(_Part):
    """One line of the figure, with its own variants."""

    name: str
    trials: int | None = Field(default=None, ge=1)
    """So many trials of the recipe's sampler in a space that is left open, instead of one candidate."""


class Study(_Part):
    """A question."""

    question: str
    source: str
    """Paper and figure."""
    remark: str = ""
    """What to know of how it is asked here."""
    x: str
    """A key of the recipe, or `share`."""
    x_label: str
    x_unit: str = ""
    log_x: bool = False
    y: list[Literal["top1", "speedup"]] = ["top1"]
    """Fields of a measurement."""
    series_by: str | None = None
    """The key of the recipe whose values are the lines; None where `series` names them."""
    series_label: str = ""
    """What stands before such a value: `target 0.5`."""
    series: list[Series] = []
    answer: Literal["best-x", "best-series"]
    """What the sentence tells: which x is best, line by line; or which line is best, at equal x."""
    front_only: bool = False
    """Only variants that no other of their line beats count, at equal multiply-adds; and hypervolumes are told."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One setting of a study."""

    series: str
    values: dict[str, Any]
    """What `each` gave: key -> value."""
    config: Config
    trials: int | None
    """None: the space has one candidate."""

    @property
    def id(self) -> str:
        """The same wherever the outcome must be; not for another machine."""
        free = {"name", "resources"} | ({"search"} if self.trials is None else set())
        record = self.config.model_dump(mode="json", exclude=free)
        record.get("search", {}).pop("trials", None)  # more trials go on with those there are
        return _hash(record)

    @property
    def context_id(self) -> str:
        """The same for all variants that share the dense model, its images and how it is measured."""
        return _hash(self.config.model_dump(mode="json", include={"model", "data", "exits", "measure"}))


def shipped_studies() -> list[str]:
    """Names of the studies that come with vitfront."""
    folder = resources.files("search") / "studies"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_study(name: str) -> Study:
    """A shipped study, or a YAML file.

    Raises:
        ConfigError: there is none, or a key or value of it is wrong.
    """
    shipped = resources.files("search") / "studies" / f"{name}.yaml"
    source = Path(name) if name.endswith((".yaml", ".yml")) else shipped
    if not source.is_file():
        raise ConfigError(f"no study {name!r}; give a YAML file or one of: {', '.join(shipped_studies())}")
    try:
        return Study.model_validate(yaml.safe_load(source.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {name}: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def expand(study: Study, config: Config, anatomy: Anatomy) -> list[Variant]:
    """All variants of a recipe, each once, in the order in which they run.

    Raises:
        ConfigError: a key or value does not fit the recipe or the model, or a parameter is left open.
    """
    variants: dict[str, Variant] = {}
    settled = STUDY_DEFAULTS if "speedup" in study.y else STUDY_DEFAULTS | {"measure.num_rounds": QUICK_ROUNDS}
    parts: Sequence[Series | None] = study.series or [None]
    for part in parts:
        each = study.each | (part.each if part else {})
        fixed = settled | study.set | (part.set if part else {})
        for chosen in itertools.product(*each.values()):
            values = dict(zip(each, chosen, strict=True))
            changed = _changed(config, fixed | values, anatomy)
            name = part.name if part else f"{study.series_label} {values[study.series_by or '']}".strip()
            variant = Variant(series=name, values=values, config=changed, trials=part.trials if part else None)
            variants.setdefault(f"{name} {variant.id}", variant)
            if variant.trials is None:
                only_candidate(variant, anatomy)
    return list(variants.values())


def only_candidate(variant: Variant, anatomy: Anatomy) -> Candidate:
    """The one candidate of a variant's space.

    Raises:
        ConfigError: the space has more.
    """
    return _space(variant.config, anatomy).choose(_Nobody())


class _Nobody:
    """Nothing may be left to choose."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> NoReturn:
        self._refuse(name)

    def suggest_int(self, name: str, low: int, high: int) -> NoReturn:
        self._refuse(name)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> NoReturn:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise ConfigError(f"the study leaves space.{name.split('.')[0]} open; give it one value in set or each")


def _space(config: Config, anatomy: Anatomy) -> Space:
    return Space(config.space, anatomy.depth, anatomy.exits, has_windows=anatomy.has_windows)


def _changed(config: Config, changes: Mapping[str, Any], anatomy: Anatomy) -> Config:
    record = config.model_dump(mode="json")
    for key, value in changes.items():
        if key == "space.exit_block" and isinstance(value, float):
            value = min(anatomy.exits, key=lambda block: abs(block - value * anatomy.depth))
        *path, last = key.split(".")
        inner = record
        for part in path:
            inner = inner.get(part) or {}  # an unknown section is left out, so its keys are told as unknown
        if last not in inner:
            raise ConfigError(f"the study sets {key}, which no recipe has")
        inner[last] = value
    return Config.from_dict(record)


def _hash(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def run_study(
    name: str, config: Config, runs: Path, tell: Callable[[str], None], study: Study | None = None
) -> dict[str, Any]:
    """Runs what is left of a study, and writes its table and figure into runs/study-NAME-RECIPE.

    Args:
        name: a shipped study, or a YAML file.
        tell: is told what happens, one line at a time.
        study: instead of the one of that name, as one with other values.

    Returns:
        The question, the sentence that answers it, the rows of the table and the lines of the figure.

    Raises:
        VitfrontError: wrong input; or another process runs the same study.
    """
    study, name = study or load_study(name), Path(name).stem
    inputs = load_inputs(config, runs)
    anatomy = examine(inputs.model)
    variants = expand(study, config, anatomy)
    torch.set_num_threads(config.resources.cpus_per_trial)  # as in a sweep: more are slower where cores are busy
    folder = runs / f"study-{name}-{config.name}"
    with Ledger(folder / "outcomes.jsonl") as book:
        found = {outcome.id: outcome for outcome in book.found}

        def record_outcome(outcome: Outcome, label: str) -> None:
            book.append(outcome)
            found[outcome.id] = outcome
            tell(f"{label}: {_described(outcome)}")

        for context_id in dict.fromkeys(variant.context_id for variant in variants):
            group = [variant for variant in variants if variant.context_id == context_id]
            left = [variant for variant in group if len(_outcomes_of(variant, found)) < (variant.trials or 1)]
            if not left:
                continue
            tell(f"preparing the dense model for {len(left)} of {len(variants)} variants")
            context, dense = _prepared(left, runs)
            if f"dense-{context_id}" not in found:
                record_outcome(_dense_outcome(context, dense, f"dense-{context_id}"), "dense")
            for variant in left:
                for outcome in _outcomes(replace(context, config=variant.config), variant, found):
                    record_outcome(outcome, _label(variant, study))
    record = _record(name, study, config, variants, found, len(inputs.splits.val))
    write_atomically(folder / "table.csv", csv_table(record["rows"]))
    write_atomically(folder / "table.md", markdown(record))
    write_atomically(folder / "figure.html", study_html(record))
    return record


def _outcomes_of(variant: Variant, found: Mapping[str, Outcome]) -> list[Outcome]:
    """What there is of a variant so far."""
    if variant.trials is None:
        return [found[variant.id]] if variant.id in found else []
    return [outcome for key, outcome in found.items() if key.startswith(f"{variant.id}-")][: variant.trials]


def _prepared(variants: Sequence[Variant], runs: Path) -> tuple[TrialContext, Measurement]:
    """The context of variants that share one, with all that any of them needs, and what its dense model does."""
    config = variants[0].config
    inputs = load_inputs(config, runs)
    anatomy = examine(inputs.model)
    spaces = [_space(variant.config, anatomy) for variant in variants]
    exits = sorted({block for space in spaces for block in space.exit_blocks})
    profiled = [space for space in spaces if "global" in space.method]
    paced = [space for space in spaces if "auto" in space.round_to]
    kinds = [kind for space in profiled + paced for kind in space.token_reduction]
    union = {
        "space.method": "global" if profiled else "cascade",
        "space.round_to": "auto" if paced else 1,
        "space.token_reduction": list(dict.fromkeys(kinds)) or "none",
    }
    context, dense = prepare(
        _changed(config, union, anatomy), inputs.model.to("cuda" if torch.cuda.is_available() else "cpu"),
        inputs.splits, exits, trained=inputs.trained,
    )  # fmt: skip
    if not inputs.trained:
        save_weights(context.model.state_dict(), inputs.cache)
    return context, dense


def _dense_outcome(context: TrialContext, dense: Measurement, name: str) -> Outcome:
    """The dense model as an outcome, so that a study that is done needs no context to be told again."""
    anatomy = examine(context.model)
    candidate = Candidate(
        cutoff_channel=0.1, cutoff_token=0.85, drop_budget=(0.0,) * anatomy.depth, token_share=0.0, target_ratio=1.0,
        exit_block=anatomy.depth, token_reduction="none",
    )  # fmt: skip
    return Outcome(id=name, state=State.MEASURED, candidate=candidate, plan=keep_all_plan(anatomy), measurement=dense)


def _outcomes(context: TrialContext, variant: Variant, found: Mapping[str, Outcome]) -> Iterator[Outcome]:
    """What is left of a variant, run now."""
    anatomy = examine(context.model)
    if variant.trials is None:
        yield run_to_end(context, only_candidate(variant, anatomy), variant.id).outcomes[0]
        return
    known = [replace(outcome, id=outcome.id.rsplit("-", 1)[1]) for outcome in _outcomes_of(variant, found)]
    searcher = StudySearcher(
        _space(variant.config, anatomy), known=known, sampler=variant.config.search.sampler, num_trials=variant.trials,
        seed=variant.config.search.seed,
    )  # fmt: skip
    for _ in range(variant.trials - len(known)):
        asked = searcher.suggest("the one")
        if not isinstance(asked, dict):  # nothing new is left to try
            break
        outcome = run_to_end(context, Candidate.from_json(asked["candidate"]), asked["id"]).outcomes[0]
        searcher.on_trial_complete("the one", {"outcomes": json.dumps([outcome.to_json()])})
        yield replace(outcome, id=f"{variant.id}-{outcome.id}")


def _label(variant: Variant, study: Study) -> str:
    """Its line, and what sets it apart from the others there."""
    apart = [f"{key.split('.')[-1]} {value}" for key, value in variant.values.items() if key != study.series_by]
    return ", ".join([variant.series, *apart])


def _described(outcome: Outcome) -> str:
    if outcome.measurement is None:
        return f"{outcome.state.value}: {outcome.reason}"
    found = outcome.measurement
    return f"top-1 {found.top1:.3f}, {found.speedup:.2f} x as fast, {found.macs:,} MACs, {outcome.seconds:.1f} s"


def _record(
    name: str, study: Study, config: Config, variants: Sequence[Variant], found: Mapping[str, Outcome], num_val: int
) -> dict[str, Any]:
    """What a study gives: all that its files show."""
    dense = {variant.context_id: _measured(found[f"dense-{variant.context_id}"]) for variant in variants}
    by_series: dict[str, list[Outcome]] = {}
    rows = []
    for variant in variants:
        own = _outcomes_of(variant, found)
        by_series.setdefault(variant.series, []).extend(own)
        rows += [row_of(variant.series, variant.values, outcome, dense[variant.context_id]) for outcome in own]
    whole = dense[variants[0].context_id]
    lines = {metric: lines_of(rows, study.x, metric, front_only=study.front_only) for metric in study.y}
    told = [
        best_x(of, metric, study.x_label, study.series_label)
        if study.answer == "best-x"
        else best_series(of, metric, study.x_label)
        for metric, of in lines.items()
    ]
    if study.front_only:
        goal = Goal(dense=whole)
        volumes = [f"{series} {hypervolume_of(outcomes, goal):.4f}" for series, outcomes in by_series.items()]
        told.append(f"hypervolume: {', '.join(volumes)}.")
    told += caveats(rows, study.x)
    return {
        "name": name,
        "recipe": config.name,
        "question": study.question,
        "source": study.source,
        "remark": study.remark,
        "sentence": " ".join(text[0].upper() + text[1:] for text in told),
        "x": study.x,
        "x_label": study.x_label,
        "x_unit": study.x_unit,
        "log_x": study.log_x,
        "dense": asdict(whole),
        "val_images": num_val,
        "rows": rows,
        "lines": {metric: [asdict(line) for line in of] for metric, of in lines.items()},
    }


def _measured(outcome: Outcome) -> Measurement:
    assert outcome.measurement is not None
    return outcome.measurement
