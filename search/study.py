"""The source papers' questions, asked of a recipe: what `vitfront study` does.

A study is a YAML file (`search/studies/`) that varies a few keys of the recipe and fixes the rest of its space, so that
every variant is one candidate; or, where a study asks about the search itself, one small search. The variants run one
after the other in this process. The ledger names them by what they are, so the same command goes on where it stopped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pruning.anatomy import Anatomy, examine
from pruning.artifact import save_weights
from pruning.surgery import keep_all_plan
from search.config import Config
from search.errors import ConfigError
from search.files import write_atomically
from search.front import hypervolume_of, non_dominated
from search.inputs import load_inputs
from search.ledger import Ledger
from search.outcome import Candidate, Measurement, Outcome, State
from search.plots import StudyLine, study_html
from search.searcher import StudySearcher
from search.space import Space
from search.trial import Bench, prepare, run_to_end

SETTLED: dict[str, Any] = {
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

SHARE = "share"
"""As a study's x: the measured share of the dense multiply-adds."""

MISSED = 0.02
"""Share of the dense multiply-adds by which a variant may be above its target before that is said."""


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
    def bench_id(self) -> str:
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
    parts: Sequence[Series | None] = study.series or [None]
    for part in parts:
        each = study.each | (part.each if part else {})
        fixed = SETTLED | study.set | (part.set if part else {})
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


def run_study(name: str, config: Config, runs: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs what is left of a study, and writes its table and figure into runs/study-NAME-RECIPE.

    Args:
        name: a shipped study, or a YAML file.
        tell: is told what happens, one line at a time.

    Returns:
        The question, the sentence that answers it, the rows of the table and the lines of the figure.

    Raises:
        VitfrontError: wrong input; or another process runs the same study.
    """
    study = load_study(name)
    name = Path(name).stem
    clean = _changed_noise(config)
    inputs = load_inputs(clean, runs)
    anatomy = examine(inputs.model)
    variants = expand(study, config, anatomy)
    torch.set_num_threads(config.resources.cpus_per_trial)  # as in a sweep: more are slower where cores are busy
    folder = runs / f"study-{name}-{config.name}"
    with Ledger(folder / "outcomes.jsonl") as book:
        found = {outcome.id: outcome for outcome in book.found}

        def record_outcome(outcome: Outcome, series: str) -> None:
            book.append(outcome)
            found[outcome.id] = outcome
            tell(f"{series}: {_described(outcome)}")

        for bench_id in dict.fromkeys(variant.bench_id for variant in variants):
            group = [variant for variant in variants if variant.bench_id == bench_id]
            left = [variant for variant in group if not _is_done(variant, found)]
            if not left:
                continue
            tell(f"preparing the dense model for {len(left)} of {len(variants)} variants")
            bench, dense = _prepared(left, runs)
            if f"dense-{bench_id}" not in found:
                record_outcome(_dense_outcome(bench, dense, f"dense-{bench_id}"), "dense")
            for variant in left:
                for outcome in _outcomes(replace(bench, config=variant.config), variant, found):
                    record_outcome(outcome, variant.series)
    rows = [
        _row(variant, outcome, found[f"dense-{variant.bench_id}"])
        for variant in variants
        for outcome in _outcomes_of(variant, found)
    ]
    record = _record(name, study, config, rows, found, variants, len(inputs.splits.val))
    write_atomically(folder / "table.csv", _csv(rows))
    write_atomically(folder / "table.md", _markdown(record))
    write_atomically(folder / "figure.html", study_html(record))
    return record


def _changed_noise(config: Config) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"noise": 0.0})})


def _outcomes_of(variant: Variant, found: Mapping[str, Outcome]) -> list[Outcome]:
    """What there is of a variant so far."""
    if variant.trials is None:
        return [found[variant.id]] if variant.id in found else []
    return [outcome for key, outcome in found.items() if key.startswith(f"{variant.id}-")][: variant.trials]


def _is_done(variant: Variant, found: Mapping[str, Outcome]) -> bool:
    return len(_outcomes_of(variant, found)) >= (variant.trials or 1)


def _prepared(variants: Sequence[Variant], runs: Path) -> tuple[Bench, Measurement]:
    """The bench of variants that share one, with all that any of them needs, and what its dense model does."""
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
    bench, dense = prepare(
        _changed(config, union, anatomy), inputs.model.to("cuda" if torch.cuda.is_available() else "cpu"),
        inputs.splits, exits, trained=inputs.trained,
    )  # fmt: skip
    if not inputs.trained:
        save_weights(bench.model.state_dict(), inputs.cache)
    return bench, dense


def _dense_outcome(bench: Bench, dense: Measurement, name: str) -> Outcome:
    """The dense model as an outcome, so that a study that is done needs no bench to be told again."""
    anatomy = examine(bench.model)
    candidate = Candidate(
        cutoff_channel=0.1, cutoff_token=0.85, drop_budget=(0.0,) * anatomy.depth, token_share=0.0, target_ratio=1.0,
        exit_block=anatomy.depth, token_reduction="none",
    )  # fmt: skip
    return Outcome(id=name, state=State.MEASURED, candidate=candidate, plan=keep_all_plan(anatomy), measurement=dense)


def _outcomes(bench: Bench, variant: Variant, found: Mapping[str, Outcome]) -> Iterator[Outcome]:
    """What is left of a variant, run now."""
    anatomy = examine(bench.model)
    if variant.trials is None:
        yield run_to_end(bench, only_candidate(variant, anatomy), variant.id).outcomes[0]
        return
    known = [replace(outcome, id=outcome.id.rsplit("-", 1)[1]) for outcome in _outcomes_of(variant, found)]
    searcher = StudySearcher(
        _space(variant.config, anatomy), known=known, sampler=variant.config.search.sampler,
        seed=variant.config.search.seed,
    )  # fmt: skip
    for _ in range(variant.trials - len(known)):
        asked = searcher.suggest("the one")
        assert isinstance(asked, dict), "there is no deadline"
        outcome = run_to_end(bench, Candidate.from_json(asked["candidate"]), asked["id"]).outcomes[0]
        searcher.on_trial_complete("the one", {"outcomes": json.dumps([outcome.to_json()])})
        yield replace(outcome, id=f"{variant.id}-{outcome.id}")


def _described(outcome: Outcome) -> str:
    if outcome.measurement is None:
        return f"{outcome.state.value}: {outcome.reason}"
    found = outcome.measurement
    return f"top-1 {found.top1:.3f}, {found.speedup:.2f} x as fast, {found.macs:,} MACs, {outcome.seconds:.1f} s"


def _row(variant: Variant, outcome: Outcome, dense: Outcome) -> dict[str, Any]:
    """One row of the table; figures are None where nothing was measured."""
    found, whole = outcome.measurement, dense.measurement
    assert whole is not None
    names = ("top1", "top1_low", "top1_high", "speedup", "speedup_low", "speedup_high", "throughput_img_s", "macs")
    return {
        "id": outcome.id,
        "series": variant.series,
        **variant.values,
        SHARE: None if found is None else found.macs / whole.macs,
        **{name: None if found is None else getattr(found, name) for name in (*names, "params")},
        "target_ratio": outcome.candidate.target_ratio,
        "exit_block": outcome.candidate.exit_block,
        "forward_passes": outcome.forward_passes,
        "seconds": outcome.seconds,
        "state": outcome.state.value,
        "reason": outcome.reason,
    }


def lines_of(study: Study, rows: Sequence[Mapping[str, Any]], metric: str) -> list[StudyLine]:
    """The measured rows as lines of one metric, in the order of the table."""
    measured = [row for row in rows if row["state"] == State.MEASURED.value]
    lines = []
    for name in dict.fromkeys(row["series"] for row in measured):
        own = [row for row in measured if row["series"] == name]
        if study.front_only:
            own = [own[place] for place in non_dominated(np.array([[-row[study.x], row[metric]] for row in own]))]
        at: dict[float, list[float]] = {}
        for row in sorted(own, key=lambda row: float(row[study.x])):
            at.setdefault(float(row[study.x]), []).append(float(row[metric]))
        lines.append(
            StudyLine(
                name=name,
                x=tuple(at),
                y=tuple(sum(values) / len(values) for values in at.values()),
                low=tuple(map(min, at.values())),
                high=tuple(map(max, at.values())),
            )
        )
    return lines


def best_x(lines: Sequence[StudyLine], x_label: str, series_label: str) -> str:
    """Which x is best in most of the lines; of x that tie for most, the one of the largest mean y (top-1)."""
    if not lines:
        return "nothing was measured."
    wins = Counter(x for line in lines for x, y in zip(line.x, line.y, strict=True) if y == max(line.y))
    means = {x: _mean([dict(zip(line.x, line.y, strict=True)).get(x, np.nan) for line in lines]) for x in wins}
    best = max(wins, key=lambda x: (wins[x], means[x]))
    spans = ", ".join(f"{100 * min(line.y):.1f} to {100 * max(line.y):.1f} % at {line.name}" for line in lines)
    what = f"{series_label}s" if series_label else "series"
    return f"best {x_label} {best:g} at {wins[best]} of {len(lines)} {what}; top-1 over all tried {spans}."


def best_series(lines: Sequence[StudyLine], x_label: str, metric: str) -> str:
    """Which line is highest at most x, compared where all have values, on straight lines between their points."""
    if not lines:
        return "nothing was measured."
    low, high = max(line.x[0] for line in lines), min(line.x[-1] for line in lines)
    grid = sorted({x for line in lines for x in line.x if low <= x <= high})
    if not grid:
        return f"the lines share no {x_label}, so {METRICS[metric]} does not compare."
    values = {line.name: np.interp(grid, line.x, line.y) for line in lines}
    highest = np.max(list(values.values()), axis=0)
    wins = {name: int((own >= highest - 1e-9).sum()) for name, own in values.items()}
    order = sorted(values, key=lambda name: (-wins[name], -values[name].mean()))
    shown = [f"{name} {wins[name]} ({_shown(metric, float(values[name].mean()))})" for name in order]
    return (
        f"at equal {x_label}, {order[0]} has the highest {METRICS[metric]} at {wins[order[0]]} of {len(grid)} places "
        f"(best at, and mean: {', '.join(shown)})."
    )


METRICS = {"top1": "top-1", "speedup": "speed-up"}


def _shown(metric: str, value: float) -> str:
    return f"{100 * value:.1f} %" if metric == "top1" else f"{value:.2f}"


def _mean(values: Sequence[float]) -> float:
    return float(np.nanmean(values))


def _record(
    name: str, study: Study, config: Config, rows: Sequence[dict[str, Any]], found: Mapping[str, Outcome],
    variants: Sequence[Variant], num_val: int,
) -> dict[str, Any]:  # fmt: skip
    lines = {metric: lines_of(study, rows, metric) for metric in study.y}
    told = [
        best_x(of, study.x_label, study.series_label)
        if study.answer == "best-x"
        else best_series(of, study.x_label, metric)
        for metric, of in lines.items()
    ]
    if study.front_only:
        told.append(f"hypervolume {_hypervolumes(variants, found)}.")
    told += _warnings(study, rows)
    dense = found[f"dense-{variants[0].bench_id}"].measurement
    assert dense is not None
    return {
        "name": name,
        "recipe": config.name,
        "question": study.question,
        "source": study.source,
        "remark": study.remark,
        "sentence": " ".join(text[0].upper() + text[1:] for text in told),
        "x": study.x,
        "x_label": study.x_label,
        "log_x": study.log_x,
        "dense": {metric: getattr(dense, metric) for metric in study.y} | {"top1": dense.top1},
        "val_images": num_val,
        "rows": list(rows),
        "lines": {metric: [vars(line) for line in of] for metric, of in lines.items()},
    }


def _hypervolumes(variants: Sequence[Variant], found: Mapping[str, Outcome]) -> str:
    volumes = {}
    for name in dict.fromkeys(variant.series for variant in variants):
        own = [variant for variant in variants if variant.series == name]
        dense = found[f"dense-{own[0].bench_id}"].measurement
        assert dense is not None
        volumes[name] = hypervolume_of([outcome for each in own for outcome in _outcomes_of(each, found)], dense)
    return ", ".join(f"{name} {volume:.4f}" for name, volume in volumes.items())


def _warnings(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the sentence has to know: trials that broke, and targets that were not reached."""
    broken = [row for row in rows if row[SHARE] is None]
    told = [f"{len(broken)} of {len(rows)} variants gave no model, e.g.: {broken[0]['reason']}."] if broken else []
    if study.x != SHARE:  # else the line shows where they are
        missed = [row for row in rows if row[SHARE] is not None and row[SHARE] > row["target_ratio"] + MISSED]
        told += [f"{len(missed)} of {len(rows)} spent their budgets above the target."] if missed else []
    return told


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(record: Mapping[str, Any]) -> str:
    """The table for readers."""
    rows = record["rows"]
    lines = [
        f"# {record['question']}", "",
        f"{record['source']}; asked of the recipe {record['recipe']}. {record['remark']}", "",
        f"**{record['sentence']}**", "",
        f"Dense top-1 {100 * record['dense']['top1']:.1f} % of {record['val_images']} val images; one image is "
        f"{100 / record['val_images']:.2f} points. Speed-ups are paired with the dense model, 95 % in brackets.", "",
        "| " + " | ".join(TABLE_COLUMNS) + " |", "|---" * len(TABLE_COLUMNS) + "|",
    ]  # fmt: skip
    lines += ["| " + " | ".join(table_cells(record["x"], row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


TABLE_COLUMNS = ("series", "x", "top-1 %", "speed-up", "MACs", "seconds")


def table_cells(x: str, row: Mapping[str, Any]) -> list[str]:
    """A row for people, in the order of `TABLE_COLUMNS`; where nothing was measured, why."""
    if row[SHARE] is None:
        return [row["series"], str(row.get(x, "")), row["reason"], "", "", f"{row['seconds']:.1f}"]
    return [
        row["series"],
        f"{row[x]:.3f}" if x == SHARE else f"{row[x]:g}",
        f"{100 * row['top1']:.1f} ({100 * row['top1_low']:.1f}-{100 * row['top1_high']:.1f})",
        f"{row['speedup']:.2f} ({row['speedup_low']:.2f}-{row['speedup_high']:.2f})",
        f"{row[SHARE]:.1%}",
        f"{row['seconds']:.1f}",
    ]
