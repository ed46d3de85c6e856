"""`vitfront study`: asks a question of the source papers of a recipe.

The variants of the study run one after the other in this process. The ledger names them by all that their outcomes
depend on, so the same command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pruning.fingerprints import fingerprint_of_weights
from pruning.model.anatomy import examine
from pruning.model.surgery import keep_all_plan
from search.commands.study_report import best_series, best_x, caveats, csv_table, lines_of, markdown, row_of
from search.commands.study_variants import Study, Variant, expand, load_study, only_candidate, space_of, with_changes
from search.config import Config, Fingerprints
from search.errors import SweepError
from search.front import hypervolume_of
from search.goal import Goal
from search.outcome import Candidate, Measurement, Outcome, State
from search.records.files import write_atomically
from search.records.ledger import Ledger
from search.suggest.ask import CandidateSearch, History
from search.suggest.samplers import SamplerSettings
from search.trial.context import TrialContext
from search.trial.inputs import load_inputs
from search.trial.prepare import allocates_by_profile, prepare_locally
from search.trial.trial import run_to_end
from search.trial.warm_start import first_candidates
from search.views.study_plot import study_html


def run_study(
    name: str, config: Config, runs: Path, say: Callable[[str], None], study: Study | None = None
) -> dict[str, Any]:
    """Runs what is left of a study, and writes its table and figure into runs/study-NAME-RECIPE.

    Args:
        name: of a shipped study, or the path of a YAML file.
        say: called with one line of text whenever something happens.
        study: taken in the place of the one of that name, as one with other values.

    Returns:
        The question, the sentence that answers it, the rows of the table and the lines of the figure.

    Raises:
        VitfrontError: wrong input; or another process runs the same study.
    """
    study, name = study or load_study(name), Path(name).stem
    inputs = load_inputs(config, runs)
    config = _pinned(config, inputs.fingerprints)
    variants = expand(study, config, examine(inputs.model))
    torch.set_num_threads(config.resources.cpus_per_trial)  # as in a sweep: more are slower where cores are busy
    folder = runs / f"study-{name}-{config.name}"
    with Ledger(folder / "outcomes.jsonl") as book:
        outcomes = {outcome.id: outcome for outcome in book.found}
        num_others = len(outcomes) - len(_known(variants, outcomes))
        if num_others:
            say(f"{num_others} earlier outcomes are of other settings or other inputs, and are left out")
        for outcome, label in _run_variants(study, variants, config, runs, outcomes, say):
            book.append(outcome)
            outcomes[outcome.id] = outcome
            say(f"{label}: {_summary(outcome)}")
    record = _record(name, study, config, variants, outcomes, len(inputs.splits.val))
    write_atomically(folder / "table.csv", csv_table(record["rows"]))
    write_atomically(folder / "table.md", markdown(record))
    write_atomically(folder / "figure.html", study_html(record))
    return record


def _run_variants(
    study: Study, variants: Sequence[Variant], base: Config, runs: Path, outcomes: Mapping[str, Outcome],
    say: Callable[[str], None],
) -> Iterator[tuple[Outcome, str]]:  # fmt: skip
    """Yields the outcomes that are not there yet, each with a label; first that of the dense model they share.

    Args:
        base: the study's recipe, with the hashes of its inputs.
        outcomes: all so far by id; whoever iterates adds what comes.

    Raises:
        SweepError: the inputs changed while the study runs, or the dense model was trained anew with another result.
    """
    for context_id in dict.fromkeys(variant.context_id for variant in variants):
        group = [variant for variant in variants if variant.context_id == context_id]
        unfinished = [variant for variant in group if len(_outcomes_of(variant, outcomes)) < (variant.trials or 1)]
        if not unfinished:
            continue
        say(f"preparing the dense model for {len(unfinished)} of {len(variants)} variants")
        context, dense = _prepare_for(unfinished, base, runs, say)
        outcome = _dense_outcome(context, dense, f"dense-{context_id}")
        if outcome.id not in outcomes:
            yield outcome, "dense"
        elif outcomes[outcome.id].notes != outcome.notes:
            raise SweepError(
                "the dense model was trained anew since this study began, with other weights; "
                "run the study under another name of its recipe (--set name=...)"
            )
        for variant in unfinished:
            for outcome in _run_variant(replace(context, config=variant.config), variant, outcomes):
                yield outcome, _label(variant, study)


def _known(variants: Sequence[Variant], outcomes: Mapping[str, Outcome]) -> list[str]:
    """Returns the ids of those outcomes that belong to the variants or to their dense models."""
    ids = {variant.id for variant in variants} | {f"dense-{variant.context_id}" for variant in variants}
    return [key for key in outcomes if key in ids or key.rsplit("-", 1)[0] in ids]


def _outcomes_of(variant: Variant, outcomes: Mapping[str, Outcome]) -> list[Outcome]:
    """Returns the outcomes that there are of a variant so far."""
    if variant.trials is None:
        return [outcomes[variant.id]] if variant.id in outcomes else []
    return [outcome for key, outcome in outcomes.items() if key.startswith(f"{variant.id}-")][: variant.trials]


def _prepare_for(
    variants: Sequence[Variant], base: Config, runs: Path, say: Callable[[str], None]
) -> tuple[TrialContext, Measurement]:
    """Prepares the context that variants share, with all that any of them needs, and measures its dense model.

    Args:
        base: the study's recipe, with the hashes of its inputs.
        say: called with each line on the dense model.

    Raises:
        SweepError: the inputs changed while the study runs.
    """
    config = variants[0].config
    if not _has_inputs_of(config, base):
        config = config.model_copy(update={"fingerprints": None})
    inputs = load_inputs(config, runs)
    anatomy = examine(inputs.model)
    spaces = [space_of(variant.config, anatomy) for variant in variants]
    exits = sorted({block for space in spaces for block in space.exit_blocks})
    with_profile = [space for space in spaces if allocates_by_profile(space)]
    with_widths = [space for space in spaces if "auto" in space.round_to]
    reductions = [kind for space in with_profile + with_widths for kind in space.token_reduction]
    union = {
        "space.method": "global" if with_profile else "cascade",
        "space.round_to": "auto" if with_widths else 1,
        "space.token_reduction": list(dict.fromkeys(reductions)) or "none",
    }
    return prepare_locally(with_changes(config, union, anatomy), inputs, say, exit_blocks=exits)


def _pinned(config: Config, fingerprints: Fingerprints) -> Config:
    """Returns the recipe with the hashes of its inputs, which the ids of all variants then depend on.

    The weights of a model that the recipe trains follow from the other inputs; they are left out, as they are unknown
    until then.
    """
    if config.model.training is not None:
        fingerprints = fingerprints.model_copy(update={"weights": None})
    return config.model_copy(update={"fingerprints": fingerprints})


def _has_inputs_of(config: Config, base: Config) -> bool:
    """Tells whether a variant's recipe has the model and the images of the study's; noise is added to them later."""
    of_variant, of_study = (each.data.model_dump(exclude={"noise"}) for each in (config, base))
    return config.model == base.model and of_variant == of_study


def _dense_outcome(context: TrialContext, dense: Measurement, name: str) -> Outcome:
    """Returns the dense model as an outcome, so that the report of a study that is done needs no context."""
    anatomy = examine(context.model)
    candidate = Candidate(
        cutoff_channel=0.1, cutoff_token=0.85, drop_budget=(0.0,) * anatomy.depth, token_share=0.0, target_ratio=1.0,
        exit_block=anatomy.depth, token_reduction="none",
    )  # fmt: skip
    return Outcome(
        id=name, state=State.MEASURED, candidate=candidate, plan=keep_all_plan(anatomy), measurement=dense,
        notes=(f"weights {fingerprint_of_weights(context.model.state_dict())}",),
    )  # fmt: skip


def _run_variant(context: TrialContext, variant: Variant, outcomes: Mapping[str, Outcome]) -> Iterator[Outcome]:
    """Runs what is left of a variant, and yields its outcomes."""
    anatomy = examine(context.model)
    if variant.trials is None:
        yield run_to_end(context, only_candidate(variant, anatomy), variant.id).outcomes[0]
        return
    done = [replace(outcome, id=outcome.id.rsplit("-", 1)[1]) for outcome in _outcomes_of(variant, outcomes)]
    space, settings = space_of(variant.config, anatomy), variant.config.search
    search = CandidateSearch(
        space,
        SamplerSettings(sampler=settings.sampler, seed=settings.seed, num_trials=variant.trials),
        History(outcomes=done, first_candidates=first_candidates(space)),
    )
    for _ in range(variant.trials - len(done)):
        suggestion = search.ask()
        if suggestion is None:  # nothing new is left to try
            break
        outcome = run_to_end(context, suggestion.candidate, suggestion.id).outcomes[0]
        search.tell(suggestion.id, outcome)
        yield replace(outcome, id=f"{variant.id}-{outcome.id}")
    search.close()


def _label(variant: Variant, study: Study) -> str:
    """Returns the variant's line and the values that distinguish it from the others there."""
    distinguishing = [
        f"{key.split('.')[-1]} {value}" for key, value in variant.values.items() if key != study.series_by
    ]
    return ", ".join([variant.series, *distinguishing])


def _summary(outcome: Outcome) -> str:
    if outcome.measurement is None:
        return f"{outcome.state.value}: {outcome.reason}"
    measured = outcome.measurement
    return (
        f"top-1 {measured.top1:.3f}, {measured.speedup:.2f} x as fast, {measured.macs:,} MACs, {outcome.seconds:.1f} s"
    )


def _record(
    name: str, study: Study, config: Config, variants: Sequence[Variant], outcomes: Mapping[str, Outcome], num_val: int
) -> dict[str, Any]:
    """Returns all that the files of a study show."""
    dense = {variant.context_id: _measured(outcomes[f"dense-{variant.context_id}"]) for variant in variants}
    by_series: dict[str, list[Outcome]] = {}
    rows = []
    for variant in variants:
        variant_outcomes = _outcomes_of(variant, outcomes)
        by_series.setdefault(variant.series, []).extend(variant_outcomes)
        rows += [
            row_of(variant.series, variant.values, outcome, dense[variant.context_id]) for outcome in variant_outcomes
        ]
    first_dense = dense[variants[0].context_id]
    lines = {metric: lines_of(rows, study.x, metric, front_only=study.front_only) for metric in study.y}
    sentences = [
        best_x(metric_lines, metric, study.x_label, study.series_label)
        if study.answer == "best-x"
        else best_series(metric_lines, metric, study.x_label)
        for metric, metric_lines in lines.items()
    ]
    if study.front_only:
        goal = Goal(dense=first_dense)
        volumes = [f"{series} {hypervolume_of(of_series, goal):.4f}" for series, of_series in by_series.items()]
        sentences.append(f"hypervolume: {', '.join(volumes)}.")
    sentences += caveats(rows, study.x)
    return {
        "name": name,
        "recipe": config.name,
        "question": study.question,
        "source": study.source,
        "remark": study.remark,
        "sentence": " ".join(text[0].upper() + text[1:] for text in sentences),
        "x": study.x,
        "x_label": study.x_label,
        "x_unit": study.x_unit,
        "log_x": study.log_x,
        "dense": asdict(first_dense),
        "val_images": num_val,
        "rows": rows,
        "lines": {metric: [asdict(line) for line in metric_lines] for metric, metric_lines in lines.items()},
    }


def _measured(outcome: Outcome) -> Measurement:
    assert outcome.measurement is not None
    return outcome.measurement
