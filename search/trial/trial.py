"""A trial: from a candidate to its outcomes, in a context. Knows no Ray.

A trial is an iterator. One that trains gives an `Epoch` after each, from whose state another process can go on. Where
trials may be stopped (`search.reduction_factor`), it gives a `Rung` at every place where that can be. If it is not, it
ends with an `Ended`.
"""

from __future__ import annotations

import traceback
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from pruning.artifact import Weights
from pruning.errors import TargetError, VitfrontError
from search.method import METHODS
from search.outcome import Candidate, Measurement, Outcome, State
from search.trial.context import TrialContext
from search.trial.measure import measure
from search.trial.methods import PRUNERS, TRAINERS, Pruned, PruningJob, distill
from search.trial.progress import Event, TrialProgress, on_cpu
from search.trial.reuse import WorkerCache, finetune_key


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The event at the end of a trial, with all that came of it."""

    outcomes: list[Outcome]
    """The trial's own outcome; a learned width adds one for each earlier exit, the latest first."""
    models: dict[str, nn.Module]
    """The models of the outcomes that were measured here, by their ids."""
    finetunes: dict[str, Outcome] = field(default_factory=dict)
    """The fine-tuned outcomes by `finetune_key`; other trials need not train them again once their weights are kept."""

    @property
    def weights(self) -> dict[str, Weights]:
        """The weights that do not follow from their plans, by the outcomes' ids; on the CPU."""
        trained = [outcome.id for outcome in self.outcomes if outcome.has_weights and outcome.same_as is None]
        return {name: on_cpu(self.models[name].state_dict()) for name in trained}


def start_trial(
    context: TrialContext,
    candidate: Candidate,
    trial_id: str,
    state: Mapping[str, Any] | None = None,
    cache: WorkerCache | None = None,
) -> Iterator[Event | Ended]:
    """Runs one candidate, epoch by epoch; an error becomes an outcome that tells it.

    Args:
        state: of an `Epoch` of the same trial, to go on from.
        cache: what earlier trials left; the outcome does not depend on it, but for the noise of a timing.
    """
    progress = TrialProgress(state)
    try:
        ended = yield from _run(context, candidate, trial_id, progress, cache or WorkerCache.empty())
    except Exception as error:
        outcome = Outcome(
            id=trial_id,
            state=State.INFEASIBLE if isinstance(error, TargetError) else State.FAILED,
            candidate=candidate,
            reason=_reason(error),
            **progress.record(),
        )
        ended = Ended(outcomes=[outcome], models={})
    yield ended


def run_to_end(context: TrialContext, candidate: Candidate, trial_id: str, cache: WorkerCache | None = None) -> Ended:
    """Runs one candidate to its end, past all rungs, and adds its fine-tunes to the cache."""
    with context.lease.shared():
        *_, ended = start_trial(context, candidate, trial_id, cache=cache)
    assert isinstance(ended, Ended)
    if cache is not None:
        for key, outcome in ended.finetunes.items():
            cache.finetune_cache[key] = outcome
    return ended


def _run(
    context: TrialContext, candidate: Candidate, trial_id: str, progress: TrialProgress, cache: WorkerCache
) -> Generator[Event, None, Ended]:
    """Prunes and measures; whatever is wrong raises."""
    job = PruningJob.of(context, candidate, cache.prefix_cache)
    ended = Ended(outcomes=[], models={})
    for pruned in (yield from _prune(job, progress, cache)):
        is_first = not ended.outcomes
        outcome_id = trial_id if is_first else f"{trial_id}.{pruned.plan.exit_block}"
        if pruned.finetuned is None:
            ended.models[outcome_id] = pruned.model
            measurement = measure(
                context, pruned.model, pruned.plan, cache.measured_cache, cache.rivals, has_weights=pruned.has_weights
            )
        else:
            assert pruned.finetuned.measurement is not None
            measurement = pruned.finetuned.measurement
        outcome = _outcome_of(job, pruned, outcome_id, measurement)
        if is_first:
            outcome = replace(outcome, **progress.record())
        ended.outcomes.append(outcome)
        if pruned.finetune_key is not None and pruned.finetuned is None:
            ended.finetunes[pruned.finetune_key] = outcome
    return ended


def _outcome_of(job: PruningJob, pruned: Pruned, outcome_id: str, measurement: Measurement) -> Outcome:
    """Gives the outcome of a model, without the trial's progress."""
    return Outcome(
        id=outcome_id,
        state=State.MEASURED,
        candidate=job.candidate,
        plan=pruned.plan,
        measurement=measurement,
        block_drops=pruned.block_drops,
        notes=pruned.notes,
        forward_passes=pruned.forward_passes * job.candidate.exit_block / job.context.anatomy.depth,
        has_weights=pruned.has_weights,
        same_as=None if pruned.finetuned is None else pruned.finetuned.id,
    )


def _prune(job: PruningJob, progress: TrialProgress, cache: WorkerCache) -> Generator[Event, None, list[Pruned]]:
    """Gives the models of a candidate: one, or one for each exit."""
    context, candidate, method = job.context, job.candidate, METHODS[job.candidate.method]
    stopped_at = progress.before("distill")
    has_rungs = context.config.search.reduction_factor > 1 and method.has_rungs and stopped_at is None
    if has_rungs:
        yield progress.rung(lambda: _first_rung_values(job))
    if stopped_at is not None:
        pruned = Pruned.from_state(stopped_at, job.truncated)
    elif method.trains:
        models = yield from TRAINERS[candidate.method](job, progress)
        if method.serves_every_exit:
            return models
        (pruned,) = models
    else:
        pruned = PRUNERS[candidate.method](job)
    if candidate.recovery == "none":
        return [pruned]
    key = finetune_key(context.anatomy, pruned.plan) if method.repairs else None
    finetuned = None if key is None else cache.finetune_cache.get(key)
    if finetuned is not None:
        return [replace(pruned, has_weights=True, finetune_key=key, finetuned=finetuned)]
    if has_rungs:
        yield progress.rung(lambda: _values(context, measure(context, pruned.model, pruned.plan, cache.measured_cache)))
    distilled = yield from distill(job, pruned, progress)
    return [replace(distilled, finetune_key=key)]


def _first_rung_values(job: PruningJob) -> tuple[float, float]:
    """Prunes on a part of the images, and gives accuracy and speed-up there."""
    context = job.context.subsampled()
    pruned = PRUNERS[job.candidate.method](replace(job, context=context, prefix_cache=None))
    return _values(context, measure(context, pruned.model, pruned.plan))


def _values(context: TrialContext, measurement: Measurement) -> tuple[float, float]:
    """Gives the values of the objectives."""
    return getattr(measurement, context.config.search.accuracy), measurement.speedup


def _reason(error: Exception) -> str:
    """Gives one line: what went wrong, and where it did unless the user is to blame."""
    if isinstance(error, VitfrontError):
        return str(error)
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{message} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
