"""candidate -> outcomes. Knows no Ray: a function of a bench, which holds what all trials of a sweep share.

A trial is an iterator: one that trains gives an `Epoch` after each, from whose state another process can go on, and
every one ends with an `Ended`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pruning.accuracy import predict, top1, wilson_interval
from pruning.allocation import Profile, allocate, measure_profile, scheduled
from pruning.anatomy import blocks_of, examine
from pruning.cascade import CascadeSettings, cascade
from pruning.compensation import REPAIR_PASSES, RepairedModel, repaired_model
from pruning.cost import count_macs, count_params
from pruning.data import Images, Splits
from pruning.errors import TargetError, VitfrontError
from pruning.exits import ExitHead, fit_exits, truncate
from pruning.finetune import FinetuneSettings, Finetuning
from pruning.pace import Pace, measure_paces, multiples
from pruning.plan import Plan, TokenReduction
from pruning.precision import Precision, fastest_precision
from pruning.retrieval import features, mean_average_precision, recall_at_1
from pruning.softmask import SoftMaskSettings, SoftMaskTraining
from pruning.sparsity import GradualMagnitude, MaskSchedule, Pattern, apply_masks, pattern_masks, sparsity_of
from pruning.stopwatch import Timing, device_name, race
from pruning.surgery import apply_plan, keep_all_plan
from pruning.training import train
from pruning.width import WidthSettings, WidthTraining
from search.config import Config
from search.outcome import TOKENLESS, Candidate, Measurement, Outcome, State
from search.space import Space

Weights = Mapping[str, Tensor]
"""Of a model, by their names in it."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all trials of a sweep share, ready to prune and measure."""

    config: Config
    model: nn.Module
    """Dense, in eval mode."""
    heads: dict[int, ExitHead]
    """The classifier of every exit."""
    splits: Splits
    precision: Precision
    profiles: dict[TokenReduction, Profile]
    """Of the whole dense model, for `method: global`; one for each token reduction that the space allows."""

    paces: dict[TokenReduction, tuple[Pace, ...]]
    """Of every block of the dense model on this device, for `round_to: auto`; likewise."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dense_macs(self) -> int:
        return count_macs(examine(self.model), keep_all_plan(examine(self.model)))

    def to(self, device: torch.device | str) -> Bench:
        heads = {block: {name: t.to(device) for name, t in head.items()} for block, head in self.heads.items()}
        return replace(self, model=self.model.to(device), heads=heads)

    def timing_batch(self) -> Tensor:
        """The images that models are timed on: (batch size, ...); the val images over and over if there are few."""
        size = self.config.measure.batch_size
        return self.splits.val.normalized(torch.arange(size) % len(self.splits.val), self.device)


def prepare(
    config: Config, model: nn.Module, splits: Splits, exit_blocks: Sequence[int], *, trained: bool
) -> tuple[Bench, Measurement]:
    """Trains the dense model if the recipe says so, fits the exits and measures the dense model: once a sweep.

    Args:
        model: on the device to work on.
        trained: its weights are final; else the recipe's training is done here, in place.

    Returns:
        The bench, and what the dense model does.

    Raises:
        VitfrontError: the training diverged, or the dense model's logits are not finite.
    """
    batch = splits.val.normalized(slice(0, config.measure.batch_size), next(model.parameters()).device)
    if config.model.training is not None and not trained:
        train(model, splits.training, config.model.training.settings())
    model.eval().requires_grad_(False)
    precision = config.measure.precision
    chosen: Precision = fastest_precision(model, batch) if precision == "auto" else precision
    heads = fit_exits(
        model, splits.training, exit_blocks,
        epochs=config.exits.epochs, learning_rate=config.exits.learning_rate,
        distillation=config.exits.distillation, precision=chosen, seed=config.data.seed,
    )  # fmt: skip
    anatomy = examine(model)
    space = Space(config.space, anatomy.depth, anatomy.exits, has_windows=anatomy.has_windows)
    profiles = {
        kind: measure_profile(
            model, splits.calibration, splits.probe, token_reduction=kind, batch_size=config.cascade.batch_size,
            precision=chosen,
        )
        for kind in (space.token_reduction if "global" in space.method else ())
    }  # fmt: skip
    paces = {
        kind: measure_paces(model, config.measure.batch_size, token_reduction=kind, precision=chosen)
        for kind in (_reductions(space) if "auto" in space.round_to else ())
    }
    bench = Bench(
        config=config, model=model, heads=heads, splits=splits, precision=chosen, profiles=profiles, paces=paces
    )
    timing, _ = _race(bench, [])
    return bench, _measurement(bench, model, _dense_plan(bench), timing)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Where a trial that trains is."""

    progress: dict[str, float]
    """`epoch`, `epochs`, `loss`, ..."""
    state: Callable[[], dict[str, Any]]
    """All that the trial needs to go on from here, on the CPU; `torch.save` writes it, without pickled classes."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What came of a trial."""

    outcomes: list[Outcome]
    """The trial's own; of a learned width then one for each earlier exit, the latest first."""
    models: dict[str, nn.Module]
    """Of the outcomes that were measured, by their ids."""

    @property
    def weights(self) -> dict[str, Weights]:
        """Of the models that do not follow from their plans, by the outcomes' ids; on the CPU."""
        kept = [outcome.id for outcome in self.outcomes if outcome.has_weights]
        return {name: _on_cpu(self.models[name].state_dict()) for name in kept}


def start_trial(
    bench: Bench, candidate: Candidate, trial_id: str, state: Mapping[str, Any] | None = None
) -> Iterator[Epoch | Ended]:
    """Runs one candidate, epoch by epoch; whatever goes wrong is in its outcome.

    Args:
        state: of an `Epoch` of the same trial, to go on from.
    """
    course = _Course(state or {})
    models: dict[str, nn.Module] = {}
    try:
        outcomes: list[Outcome] = []
        for pruned in (yield from _prune(bench, candidate, course)):
            is_own = not outcomes
            name = trial_id if is_own else f"{trial_id}.{pruned.plan.exit_block}"
            models[name] = pruned.model
            outcomes.append(
                Outcome(
                    id=name,
                    state=State.MEASURED,
                    candidate=candidate,
                    plan=pruned.plan,
                    measurement=measure(bench, pruned.model, pruned.plan),
                    block_drops=pruned.block_drops,
                    notes=pruned.notes,
                    forward_passes=pruned.forward_passes * candidate.exit_block / len(blocks_of(bench.model)),
                    seconds=course.seconds if is_own else 0.0,
                    history=tuple(course.history) if is_own else (),
                    has_weights=pruned.has_weights,
                )
            )
    except Exception as error:
        is_infeasible = isinstance(error, TargetError)
        outcomes = [
            Outcome(
                id=trial_id,
                state=State.INFEASIBLE if is_infeasible else State.FAILED,
                candidate=candidate,
                reason=_reason(error),
                seconds=course.seconds,
                history=tuple(course.history),
            )
        ]
    yield Ended(outcomes=outcomes, models=models)


def _reductions(space: Space) -> tuple[TokenReduction, ...]:
    """All that a candidate may have."""
    tokenless: tuple[TokenReduction, ...] = ("none",) if TOKENLESS & set(space.method) else ()
    return tuple(dict.fromkeys(space.token_reduction + tokenless))


def run_to_end(bench: Bench, candidate: Candidate, trial_id: str) -> Ended:
    """What comes of one candidate."""
    *_, ended = start_trial(bench, candidate, trial_id)
    assert isinstance(ended, Ended)
    return ended


class _Training(Protocol):
    """What `pruning` trains epoch by epoch."""

    @property
    def is_done(self) -> bool: ...

    def run_epoch(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class _Course:
    """What a trial has done so far, in this process or in an earlier one."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state
        self._start = time.monotonic() - state.get("seconds", 0.0)
        self.history: list[dict[str, float]] = list(state.get("history", ()))

    @property
    def seconds(self) -> float:
        """Wall-clock time, without what lay between the processes."""
        return time.monotonic() - self._start

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

    def to_state(self) -> dict[str, Any]:
        """All but the model."""
        return {
            "plan": self.plan.to_json(),
            "block_drops": list(self.block_drops),
            "forward_passes": self.forward_passes,
            "notes": list(self.notes),
        }


def _prune(bench: Bench, candidate: Candidate, course: _Course) -> Generator[Epoch, None, list[_Pruned]]:
    """The models of a candidate: one, or one for each exit."""
    shorter = truncate(bench.model, candidate.exit_block, bench.heads[candidate.exit_block])
    if candidate.method == "learned":
        return (yield from _learn_width(bench, candidate, shorter, course))
    before = course.before("distill")
    if before is not None:  # only the shapes: the training brings the weights
        plan = Plan.from_json(before["plan"])
        pruned = _Pruned(
            plan=plan, model=apply_plan(shorter, plan), block_drops=tuple(before["block_drops"]),
            forward_passes=before["forward_passes"], notes=tuple(before["notes"]),
        )  # fmt: skip
    elif candidate.method == "soft-mask":
        pruned = yield from _prune_by_soft_mask(bench, candidate, shorter, course)
    elif candidate.method == "unstructured":
        pruned = _sparse(candidate, shorter)
    elif candidate.method == "cascade":
        pruned = _prune_by_cascade(bench, candidate, shorter)
    else:
        pruned = _prune_at_once(bench, candidate, shorter)
    if candidate.recovery == "distill":
        pruned = yield from _distill(bench, candidate, pruned, course)
    return [pruned]


def _learn_width(
    bench: Bench, candidate: Candidate, shorter: nn.Module, course: _Course
) -> Generator[Epoch, None, list[_Pruned]]:
    """One model for each exit, the candidate's own first."""
    settings = bench.config.learned
    size = {"macs": lambda model: count_macs(examine(model), keep_all_plan(examine(model))), "params": count_params}
    left = size[settings.count](shorter) / size[settings.count](bench.model)
    training = WidthTraining(
        shorter, bench.splits.training,
        WidthSettings(
            target_ratio=min(1.0, candidate.target_ratio / left), seed=bench.config.data.seed, **settings.common()
        ),
        heads=bench.heads, paces=_paces(bench, candidate), precision=bench.precision,
    )  # fmt: skip
    yield from course.train("learned", training, {})
    return [_Pruned(plan=each.plan, model=each.model, has_weights=True) for each in reversed(training.finish())]


def _prune_by_soft_mask(
    bench: Bench, candidate: Candidate, shorter: nn.Module, course: _Course
) -> Generator[Epoch, None, _Pruned]:
    left = count_macs(examine(shorter), keep_all_plan(examine(shorter))) / bench.dense_macs
    training = SoftMaskTraining(
        shorter, bench.splits.training,
        SoftMaskSettings(
            target_ratio=min(1.0, candidate.target_ratio / left), seed=bench.config.data.seed,
            **bench.config.soft_mask.common(),
        ),
        paces=_paces(bench, candidate), precision=bench.precision,
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


def _distill(bench: Bench, candidate: Candidate, pruned: _Pruned, course: _Course) -> Generator[Epoch, None, _Pruned]:
    training = Finetuning(
        pruned.model, bench.model, bench.splits.training,
        FinetuneSettings(seed=bench.config.data.seed, **bench.config.distill.common()),
        masks=_masks(candidate) if candidate.method == "unstructured" else None, precision=bench.precision,
    )  # fmt: skip
    yield from course.train("distill", training, pruned.to_state())
    return replace(pruned, model=training.finish(), has_weights=True)


def _prune_by_cascade(bench: Bench, candidate: Candidate, shorter: nn.Module) -> _Pruned:
    fixed = bench.config.cascade
    found = cascade(
        shorter,
        bench.splits.probe,
        bench.splits.calibration,
        CascadeSettings(
            drop_budget=candidate.drop_budget[: candidate.exit_block],
            target_macs=int(candidate.target_ratio * bench.dense_macs),
            cutoff_channel=candidate.cutoff_channel,
            cutoff_token=candidate.cutoff_token,
            criterion=candidate.criterion,
            token_reduction=candidate.token_reduction,
            paces=_paces(bench, candidate),
            token_share=candidate.token_share,
            alpha=fixed.alpha,
            num_levels=fixed.num_levels,
            order=fixed.order,
            batch_size=fixed.batch_size,
            precision=bench.precision,
            seed=bench.config.data.seed,
        ),
    )
    return _Pruned(
        plan=found.plan, model=found.model, block_drops=found.block_drops, forward_passes=found.forward_passes,
        notes=found.notes,
    )  # fmt: skip


def _prune_at_once(bench: Bench, candidate: Candidate, shorter: nn.Module) -> _Pruned:
    """By a plan that is made before anything is pruned."""
    anatomy, target = examine(shorter), int(candidate.target_ratio * bench.dense_macs)
    if candidate.method == "constant" or candidate.method == "decreasing":
        plan = scheduled(anatomy, target, candidate.method, candidate.token_reduction, candidate.cutoff_token)
    else:
        profile = replace(bench.profiles[candidate.token_reduction], cutoff_token=candidate.cutoff_token)
        plan = allocate(profile, anatomy, target, candidate.token_share, _paces(bench, candidate))
    repaired = _repaired(bench, shorter, plan)
    share = len(bench.splits.calibration) / len(bench.splits.probe)
    return _Pruned(plan=plan, model=repaired.model, forward_passes=REPAIR_PASSES * share, notes=repaired.notes)


def _paces(bench: Bench, candidate: Candidate) -> tuple[Pace, ...]:
    """The widths that each block up to the exit may be given."""
    if candidate.round_to == "auto":
        return bench.paces[candidate.token_reduction][: candidate.exit_block]
    anatomy = examine(bench.model)
    return tuple(multiples(block, candidate.round_to) for block in anatomy.blocks[: candidate.exit_block])


def measure(bench: Bench, model: nn.Module, plan: Plan) -> Measurement:
    """Accuracy on val, throughput against dense, and cost of one model."""
    _, (timing,) = _race(bench, [model])
    return _measurement(bench, model, plan, timing)


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The models that may be on the front, measured once more."""

    dense: Measurement
    measured: list[Measurement]
    """In the order of the plans; with accuracy on `test`, where there is one."""
    models: list[nn.Module]
    conditions: dict[str, str | int]
    """What the figures hold for: device, precision, threads, batch size, torch."""


def confirm(bench: Bench, plans: Sequence[Plan], weights: Sequence[Weights | None] = ()) -> Confirmation:
    """Builds the models of several plans and measures them and the dense one again, in one run, and on `test`.

    Args:
        weights: of each model whose weights do not follow from its plan; by default of none.
    """
    known = weights or [None] * len(plans)
    models = [build(bench, plan, each) for plan, each in zip(plans, known, strict=True)]
    dense_timing, timings = _race(bench, models)
    measured = [_measurement(bench, bench.model, _dense_plan(bench), dense_timing)]
    measured += [_measurement(bench, *each) for each in zip(models, plans, timings, strict=True)]
    if bench.splits.test is not None:
        tested = [_top1(bench, model, bench.splits.test) for model in (bench.model, *models)]
        measured = [replace(old, top1_test=share) for old, share in zip(measured, tested, strict=True)]
    conditions: dict[str, str | int] = {
        "device": device_name(bench.device),
        "precision": bench.precision,
        "threads": torch.get_num_threads(),
        "batch_size": bench.config.measure.batch_size,
        "torch": torch.__version__,
    }
    return Confirmation(dense=measured[0], measured=measured[1:], models=models, conditions=conditions)


def build(bench: Bench, plan: Plan, weights: Weights | None = None) -> nn.Module:
    """The model of a plan, as its trial made it: cut, pruned, and repaired or with the weights that it had."""
    shorter = truncate(bench.model, plan.exit_block, bench.heads[plan.exit_block])
    if weights is None:
        return _repaired(bench, shorter, plan).model
    model = apply_plan(shorter, plan)
    model.load_state_dict(dict(weights))
    return model


def _repaired(bench: Bench, shorter: nn.Module, plan: Plan) -> RepairedModel:
    return repaired_model(
        shorter, plan, bench.splits.calibration, batch_size=bench.config.cascade.batch_size, precision=bench.precision
    )


def _dense_plan(bench: Bench) -> Plan:
    return keep_all_plan(examine(bench.model))


def _race(bench: Bench, models: Sequence[nn.Module]) -> tuple[Timing, list[Timing]]:
    rounds = bench.config.measure.num_rounds
    return race(bench.model, models, bench.timing_batch(), num_rounds=rounds, precision=bench.precision)


def _measurement(bench: Bench, model: nn.Module, plan: Plan, timing: Timing) -> Measurement:
    accuracy = _top1(bench, model, bench.splits.val)
    low, high = wilson_interval(accuracy, len(bench.splits.val))
    return Measurement(
        top1=accuracy,
        top1_low=low,
        top1_high=high,
        throughput_img_s=timing.throughput_img_s,
        speedup=timing.speedup,
        speedup_low=timing.speedup_low,
        speedup_high=timing.speedup_high,
        latency_ms_p50=timing.latency_ms_p50,
        macs=count_macs(examine(bench.model), plan),
        params=count_params(model),
        sparsity=sparsity_of(model),
        **_retrieval(bench, model),
    )


def _retrieval(bench: Bench, model: nn.Module) -> dict[str, float]:
    """How well the val images find training images of their class, if the recipe searches by that; else nothing."""
    if bench.config.search.accuracy == "top1":
        return {}
    shown = (bench.splits.val, bench.splits.calibration, bench.splits.probe)
    queries, *gallery = (_features(bench, model, images) for images in shown)
    labels = torch.cat([bench.splits.calibration.labels, bench.splits.probe.labels])
    both = queries, bench.splits.val.labels, torch.cat(gallery), labels
    return {"recall_at_1": recall_at_1(*both), "mean_average_precision": mean_average_precision(*both)}


def _features(bench: Bench, model: nn.Module, images: Images) -> Tensor:
    found = features(model, images, batch_size=bench.config.cascade.batch_size, precision=bench.precision)
    if not found.isfinite().all():
        raise VitfrontError("the model's features are not finite")
    return found


def _top1(bench: Bench, model: nn.Module, images: Images) -> float:
    logits = predict(model, images, batch_size=bench.config.cascade.batch_size, precision=bench.precision)
    if not logits.isfinite().all():
        raise VitfrontError("the model's logits are not finite")
    return top1(logits, images.labels)


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
