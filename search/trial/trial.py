"""candidate -> outcomes. Knows no Ray: a function of a context, which holds what all trials of a sweep share.

A trial is an iterator. One that trains gives an `Epoch` after each, from whose state another process can go on. Where
trials may be stopped (`search.reduction_factor`), it gives a `Rung` at every place where that can be. If it is not, it
ends with an `Ended`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pruning.artifact import Weights
from pruning.errors import TargetError, VitfrontError
from pruning.measure.cost import count_macs, count_params
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.allocation import allocate
from pruning.methods.cascade import CascadeSettings, CascadeState, cascade
from pruning.methods.finetune import FinetuneSettings, Finetuning
from pruning.methods.prefix_cache import PrefixCache
from pruning.methods.schedule import scheduled_plan
from pruning.methods.softmask import SoftMaskSettings, SoftMaskTraining
from pruning.methods.sparsity import GradualMagnitude, MaskSchedule, Pattern, apply_masks, pattern_masks
from pruning.methods.width import WidthSettings, WidthTraining
from pruning.model.anatomy import blocks_of, examine
from pruning.model.exits import truncate
from pruning.model.surgery import apply_plan, keep_all_plan
from pruning.plan import Plan
from pruning.repair.compensation import REPAIR_PASSES
from search.outcome import TOKENLESS, Candidate, Measurement, Outcome, State
from search.trial.context import Known, TrialContext, accuracy, measure, repaired, trained_key


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Where a trial that trains is."""

    progress: dict[str, float]
    """`epoch`, `epochs`, `loss`, ..."""
    state: Callable[[], dict[str, Any]]
    """All that the trial needs to go on from here, on the CPU; `torch.save` writes it, without pickled classes."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """What a trial has shown so far: whoever runs it may stop it here."""

    values: tuple[tuple[float, float], ...]
    """Accuracy and speed-up at every rung up to this one: the first on a part of the images, others on all."""
    spans: tuple[tuple[float, float], ...]
    """When each was begun to be measured, and when it had been; in seconds since the trial began."""


Event = Epoch | Rung
"""What may come before the end of a trial."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What came of a trial."""

    outcomes: list[Outcome]
    """The trial's own; of a learned width then one for each earlier exit, the latest first."""
    models: dict[str, nn.Module]
    """Of the outcomes that were measured here, by their ids."""
    trained: dict[str, Outcome] = field(default_factory=dict)
    """By `trained_key`, what other trials need not train again once its weights are kept."""

    @property
    def weights(self) -> dict[str, Weights]:
        """Of the models that do not follow from their plans, by the outcomes' ids; on the CPU."""
        kept = [each.id for each in self.outcomes if each.has_weights and each.same_as is None]
        return {name: _on_cpu(self.models[name].state_dict()) for name in kept}


LAST_RUNG = 1 / 3
"""Of a training's epochs."""

PREFIX_CACHE_BYTES = 512 * 2**20
"""Of the activations of earlier cascades that a worker keeps: of digits some forty states, of a ViT-Tiny at 224 pixels
with 256 probe images a handful."""


@dataclass(frozen=True, kw_only=True)
class WorkerCache:
    """What a worker remembers of earlier trials with the same context, so that nothing is done twice."""

    prefix_cache: PrefixCache[CascadeState] = field(default_factory=lambda: PrefixCache(PREFIX_CACHE_BYTES))
    known: Known[Measurement] = field(default_factory=dict[str, Measurement])
    trained: Known[Outcome] = field(default_factory=dict[str, Outcome])
    """By `trained_key`. Workers may share both."""


def start_trial(
    context: TrialContext,
    candidate: Candidate,
    trial_id: str,
    state: Mapping[str, Any] | None = None,
    memory: WorkerCache | None = None,
) -> Iterator[Event | Ended]:
    """Runs one candidate, epoch by epoch; whatever goes wrong is in its outcome.

    Args:
        state: of an `Epoch` of the same trial, to go on from.
        memory: what comes of the candidate does not depend on it, but for the noise of a timing.
    """
    memory = memory or WorkerCache(prefix_cache=PrefixCache(0))
    course = _TrialProgress(state or {})
    models: dict[str, nn.Module] = {}
    trained: dict[str, Outcome] = {}
    try:
        outcomes: list[Outcome] = []
        for pruned in (yield from _prune(context, candidate, course, memory)):
            is_own = not outcomes
            name = trial_id if is_own else f"{trial_id}.{pruned.plan.exit_block}"
            if pruned.same is None:
                models[name] = pruned.model
                found = measure(context, pruned.model, pruned.plan, memory.known, has_weights=pruned.has_weights)
            else:
                assert pruned.same.measurement is not None
                found = pruned.same.measurement
            outcomes.append(
                Outcome(
                    id=name,
                    state=State.MEASURED,
                    candidate=candidate,
                    plan=pruned.plan,
                    measurement=found,
                    block_drops=pruned.block_drops,
                    notes=pruned.notes,
                    forward_passes=pruned.forward_passes * candidate.exit_block / len(blocks_of(context.model)),
                    seconds=course.seconds if is_own else 0.0,
                    rungs=tuple(course.rungs) if is_own else (),
                    rung_spans=tuple(course.spans) if is_own else (),
                    history=tuple(course.history) if is_own else (),
                    has_weights=pruned.has_weights,
                    same_as=None if pruned.same is None else pruned.same.id,
                )
            )
            if pruned.key is not None and pruned.same is None:
                trained[pruned.key] = outcomes[-1]
    except Exception as error:
        is_infeasible = isinstance(error, TargetError)
        outcomes = [
            Outcome(
                id=trial_id,
                state=State.INFEASIBLE if is_infeasible else State.FAILED,
                candidate=candidate,
                reason=_reason(error),
                seconds=course.seconds,
                rungs=tuple(course.rungs),
                rung_spans=tuple(course.spans),
                history=tuple(course.history),
            )
        ]
    yield Ended(outcomes=outcomes, models=models, trained=trained)


def run_to_end(context: TrialContext, candidate: Candidate, trial_id: str, memory: WorkerCache | None = None) -> Ended:
    """What comes of one candidate."""
    with context.lease.shared():
        *_, ended = start_trial(context, candidate, trial_id, memory=memory)
    assert isinstance(ended, Ended)
    if memory is not None:
        for key, outcome in ended.trained.items():
            memory.trained[key] = outcome
    return ended


class _Training(Protocol):
    """What `pruning` trains epoch by epoch."""

    @property
    def is_done(self) -> bool: ...

    def run_epoch(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class _TrialProgress:
    """What a trial has done so far, in this process or in an earlier one."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state
        self._start = time.monotonic() - state.get("seconds", 0.0)
        self.history: list[dict[str, float]] = list(state.get("history", ()))
        self.rungs: list[tuple[float, float]] = list(map(tuple, state.get("rungs", ())))
        self.spans: list[tuple[float, float]] = list(map(tuple, state.get("rung_spans", ())))

    @property
    def seconds(self) -> float:
        """Wall-clock time, without what lay between the processes."""
        return time.monotonic() - self._start

    def rung(self, measure: Callable[[], tuple[float, float]]) -> Rung:
        """The next, which is measured now: accuracy and speed-up."""
        began = self.seconds
        self.rungs.append(measure())
        self.spans.append((began, self.seconds))
        return Rung(values=tuple(self.rungs), spans=tuple(self.spans))

    def before(self, stage: str) -> Mapping[str, Any] | None:
        """What an earlier process knew before its training of this stage, if that is where it stopped."""
        return self._state["before"] if self._state.get("stage") == stage else None

    def train(self, stage: str, training: _Training, before: Mapping[str, Any]) -> Iterator[Epoch]:
        """Trains to the end, from where an earlier process stopped."""
        if self.before(stage) is not None:
            training.load(self._state["training"])
        while not training.is_done:
            self.history.append(training.run_epoch())
            yield Epoch(
                progress={"epoch": len(self.history), **self.history[-1]},
                state=lambda: {
                    "stage": stage,
                    "before": dict(before),
                    "training": _on_cpu(training.state()),
                    "history": list(self.history),
                    "rungs": list(self.rungs),
                    "rung_spans": list(self.spans),
                    "seconds": self.seconds,
                },
            )


@dataclass(frozen=True, kw_only=True)
class _Pruned:
    """A smaller model, before it is measured."""

    plan: Plan
    model: nn.Module
    has_weights: bool = False
    """They do not follow from the plan."""
    block_drops: tuple[float, ...] = ()
    forward_passes: float = 0.0
    notes: tuple[str, ...] = ()
    key: str | None = None
    """`trained_key`, if the model was fine-tuned and followed from its plan before."""
    same: Outcome | None = None
    """What an earlier trial found with this key; the model is not trained then."""

    def to_state(self) -> dict[str, Any]:
        """All but the model."""
        return {
            "plan": self.plan.to_json(),
            "block_drops": list(self.block_drops),
            "forward_passes": self.forward_passes,
            "notes": list(self.notes),
        }


def _prune(
    context: TrialContext, candidate: Candidate, course: _TrialProgress, memory: WorkerCache
) -> Generator[Event, None, list[_Pruned]]:
    """The models of a candidate: one, or one for each exit."""
    shorter = truncate(context.model, candidate.exit_block, context.exit_heads[candidate.exit_block])
    if candidate.method == "learned":
        return (yield from _learn_width(context, candidate, shorter, course))
    before = course.before("distill")
    has_rungs = context.config.search.reduction_factor > 1 and candidate.method not in TOKENLESS
    if has_rungs and before is None:
        yield course.rung(lambda: _first_rung_values(context.subsampled(), candidate, shorter))
    if before is not None:  # only the shapes: the training brings the weights
        plan = Plan.from_json(before["plan"])
        pruned = _Pruned(
            plan=plan, model=apply_plan(shorter, plan), block_drops=tuple(before["block_drops"]),
            forward_passes=before["forward_passes"], notes=tuple(before["notes"]),
        )  # fmt: skip
    elif candidate.method == "soft-mask":
        pruned = yield from _prune_by_soft_mask(context, candidate, shorter, course)
    elif candidate.method == "unstructured":
        pruned = _sparse(candidate, shorter)
    else:
        pruned = _prune_without_training(context, candidate, shorter, memory.prefix_cache)
    if candidate.recovery == "none":
        return [pruned]
    key = None if candidate.method in TOKENLESS else trained_key(context.anatomy, pruned.plan)
    same = None if key is None else memory.trained.get(key)
    if same is not None:
        return [replace(pruned, has_weights=True, key=key, same=same)]
    if has_rungs and before is None:
        yield course.rung(lambda: _values(context, measure(context, pruned.model, pruned.plan, memory.known)))
    trained = yield from _distill(context, candidate, pruned, course)
    return [replace(trained, key=key)]


def _first_rung_values(subsampled: TrialContext, candidate: Candidate, shorter: nn.Module) -> tuple[float, float]:
    """What a part of the images tells."""
    pruned = _prune_without_training(subsampled, candidate, shorter)
    return _values(subsampled, measure(subsampled, pruned.model, pruned.plan))


def _values(context: TrialContext, measurement: Measurement) -> tuple[float, float]:
    """Of the objectives."""
    return getattr(measurement, context.config.search.accuracy), measurement.speedup


def _learn_width(
    context: TrialContext, candidate: Candidate, shorter: nn.Module, course: _TrialProgress
) -> Generator[Event, None, list[_Pruned]]:
    """One model for each exit, the candidate's own first."""
    settings = context.config.learned
    size = {"macs": lambda model: count_macs(examine(model), keep_all_plan(examine(model))), "params": count_params}
    left = size[settings.count](shorter) / size[settings.count](context.model)
    training = WidthTraining(
        shorter, context.splits.training,
        WidthSettings(
            target_ratio=min(1.0, candidate.target_ratio / left), seed=context.config.data.seed, **settings.common()
        ),
        heads=context.exit_heads, allowed_widths=_allowed_widths(context, candidate), precision=context.precision,
    )  # fmt: skip
    yield from course.train("learned", training, {})
    return [_Pruned(plan=each.plan, model=each.model, has_weights=True) for each in reversed(training.finish())]


def _prune_by_soft_mask(
    context: TrialContext, candidate: Candidate, shorter: nn.Module, course: _TrialProgress
) -> Generator[Event, None, _Pruned]:
    left = count_macs(examine(shorter), keep_all_plan(examine(shorter))) / context.dense_macs
    training = SoftMaskTraining(
        shorter, context.splits.training,
        SoftMaskSettings(
            target_ratio=min(1.0, candidate.target_ratio / left), seed=context.config.data.seed,
            **context.config.soft_mask.common(),
        ),
        allowed_widths=_allowed_widths(context, candidate), precision=context.precision,
    )  # fmt: skip
    yield from course.train("soft-mask", training, {})
    found = training.finish()
    return _Pruned(plan=found.plan, model=found.model, has_weights=True)


def _sparse(candidate: Candidate, shorter: nn.Module) -> _Pruned:
    plan = replace(keep_all_plan(examine(shorter)), token_reduction="none")
    if candidate.recovery == "none":  # else the fine-tune makes it sparse, little by little
        masks = _masks(candidate)(shorter, 0, 1)
        assert masks is not None
        apply_masks(shorter, masks)
    return _Pruned(plan=plan, model=shorter, has_weights=True)


def _masks(candidate: Candidate) -> MaskSchedule:
    """Who chooses the weights that stay, step by step of a fine-tune."""
    if candidate.pattern == "any":
        return GradualMagnitude(sparsity=1 - candidate.target_ratio)
    pattern = Pattern(*map(int, candidate.pattern.split(":")))
    return lambda model, step, total_steps: pattern_masks(model, pattern) if step == 0 else None


def _distill(
    context: TrialContext, candidate: Candidate, pruned: _Pruned, course: _TrialProgress
) -> Generator[Event, None, _Pruned]:
    training = Finetuning(
        pruned.model, context.model, context.splits.training,
        FinetuneSettings(seed=context.config.data.seed, **context.config.distill.common()),
        masks=_masks(candidate) if candidate.method == "unstructured" else None, precision=context.precision,
    )  # fmt: skip
    last_rung = round(context.config.distill.epochs * LAST_RUNG) if course.rungs else None
    for epoch in course.train("distill", training, pruned.to_state()):
        yield epoch
        if epoch.progress["epoch"] == last_rung:  # as fast as before
            yield course.rung(lambda: (accuracy(context, training.trained), course.rungs[-1][1]))
    return replace(pruned, model=training.finish(), has_weights=True)


def _prune_without_training(
    context: TrialContext,
    candidate: Candidate,
    shorter: nn.Module,
    prefix_cache: PrefixCache[CascadeState] | None = None,
) -> _Pruned:
    if candidate.method == "cascade":
        return _prune_by_cascade(context, candidate, shorter, prefix_cache)
    return _prune_at_once(context, candidate, shorter)


def _prune_by_cascade(
    context: TrialContext, candidate: Candidate, shorter: nn.Module, prefix_cache: PrefixCache[CascadeState] | None
) -> _Pruned:
    fixed = context.config.cascade
    found = cascade(
        shorter,
        context.splits.probe,
        context.splits.calibration,
        CascadeSettings(
            drop_budget=candidate.drop_budget[: candidate.exit_block],
            target_macs=int(candidate.target_ratio * context.dense_macs),
            cutoff_channel=candidate.cutoff_channel,
            cutoff_token=candidate.cutoff_token,
            criterion=candidate.criterion,
            token_reduction=candidate.token_reduction,
            allowed_widths=_allowed_widths(context, candidate),
            token_share=candidate.token_share,
            alpha=fixed.alpha,
            num_levels=fixed.num_levels,
            order=fixed.order,
            batch_size=fixed.batch_size,
            precision=context.precision,
            seed=context.config.data.seed,
        ),
        sensitivity=context.sensitivities[candidate.exit_block],
        prefix_cache=prefix_cache,
    )
    return _Pruned(
        plan=found.plan, model=found.model, block_drops=found.block_drops, forward_passes=found.forward_passes,
        notes=found.notes,
    )  # fmt: skip


def _prune_at_once(context: TrialContext, candidate: Candidate, shorter: nn.Module) -> _Pruned:
    """By a plan that is made before anything is pruned."""
    anatomy, target = examine(shorter), int(candidate.target_ratio * context.dense_macs)
    if candidate.method == "constant" or candidate.method == "decreasing":
        plan = scheduled_plan(anatomy, target, candidate.method, candidate.token_reduction, candidate.cutoff_token)
    else:
        profile = replace(context.profiles[candidate.token_reduction], cutoff_token=candidate.cutoff_token)
        plan = allocate(profile, anatomy, target, candidate.token_share, _allowed_widths(context, candidate))
    found = repaired(context, shorter, plan)
    share = len(context.splits.calibration) / len(context.splits.probe)
    return _Pruned(plan=plan, model=found.model, forward_passes=REPAIR_PASSES * share, notes=found.notes)


def _allowed_widths(context: TrialContext, candidate: Candidate) -> tuple[AllowedWidths, ...]:
    """The widths that each block up to the exit may be given."""
    if candidate.round_to == "auto":
        return context.allowed_widths[candidate.token_reduction][: candidate.exit_block]
    anatomy = examine(context.model)
    return tuple(multiples(block, candidate.round_to) for block in anatomy.blocks[: candidate.exit_block])


def _on_cpu(tree: Any) -> Any:
    """Tensors in dicts and lists, copied."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), tree)


def _reason(error: Exception) -> str:
    """One line: what went wrong, and where for what is not the user's doing."""
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, VitfrontError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{message} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
