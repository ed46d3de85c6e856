"""candidate -> outcome. Knows no Ray: a function of a bench, which holds what all trials of a sweep share."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pruning.accuracy import predict, top1, wilson_interval
from pruning.allocation import Profile, allocate, measure_profile, scheduled
from pruning.anatomy import blocks_of, examine
from pruning.cascade import CascadeResult, CascadeSettings, cascade
from pruning.compensation import REPAIR_PASSES, RepairedModel, repaired_model
from pruning.cost import count_macs, count_params
from pruning.data import Images, Splits
from pruning.errors import VitfrontError
from pruning.exits import ExitHead, fit_exits, truncate
from pruning.pace import Pace, measure_paces, multiples
from pruning.plan import Plan, TokenReduction
from pruning.precision import Precision, fastest_precision
from pruning.stopwatch import Timing, device_name, race
from pruning.surgery import keep_all_plan
from pruning.training import train
from search.config import Config
from search.outcome import Candidate, Measurement, Outcome, State
from search.space import Space


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
        train(model, _all_training_images(splits), config.model.training.settings())
    model.eval().requires_grad_(False)
    precision = config.measure.precision
    chosen: Precision = fastest_precision(model, batch) if precision == "auto" else precision
    heads = fit_exits(
        model, _all_training_images(splits), exit_blocks,
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
        for kind in (space.token_reduction if "auto" in space.round_to else ())
    }
    bench = Bench(
        config=config, model=model, heads=heads, splits=splits, precision=chosen, profiles=profiles, paces=paces
    )
    timing, _ = _race(bench, [])
    return bench, _measurement(bench, model, _dense_plan(bench), timing)


def run_trial(bench: Bench, candidate: Candidate, trial_id: str) -> Outcome:
    """The outcome of one candidate; whatever goes wrong is in it."""
    start = time.monotonic()
    try:
        outcome = _prune_and_measure(bench, candidate, trial_id)
    except Exception as error:
        outcome = Outcome(id=trial_id, state=State.FAILED, candidate=candidate, reason=_reason(error))
    return replace(outcome, seconds=time.monotonic() - start)


def _prune_and_measure(bench: Bench, candidate: Candidate, trial_id: str) -> Outcome:
    pruned = _prune_by_cascade(bench, candidate) if candidate.method == "cascade" else _prune_at_once(bench, candidate)
    return Outcome(
        id=trial_id,
        state=State.MEASURED,
        candidate=candidate,
        plan=pruned.plan,
        measurement=measure(bench, pruned.model, pruned.plan),
        block_drops=pruned.block_drops,
        notes=pruned.notes,
        forward_passes=pruned.forward_passes * candidate.exit_block / len(blocks_of(bench.model)),
    )


def _prune_by_cascade(bench: Bench, candidate: Candidate) -> CascadeResult:
    shorter = truncate(bench.model, candidate.exit_block, bench.heads[candidate.exit_block])
    fixed = bench.config.cascade
    return cascade(
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
            batch_size=fixed.batch_size,
            precision=bench.precision,
            seed=bench.config.data.seed,
        ),
    )


def _prune_at_once(bench: Bench, candidate: Candidate) -> CascadeResult:
    """By a plan that is made before anything is pruned."""
    shorter = truncate(bench.model, candidate.exit_block, bench.heads[candidate.exit_block])
    anatomy, target = examine(shorter), int(candidate.target_ratio * bench.dense_macs)
    if candidate.method == "constant" or candidate.method == "decreasing":
        plan = scheduled(anatomy, target, candidate.method, candidate.token_reduction, candidate.cutoff_token)
    else:
        profile = replace(bench.profiles[candidate.token_reduction], cutoff_token=candidate.cutoff_token)
        plan = allocate(profile, anatomy, target, candidate.token_share, _paces(bench, candidate))
    repaired = _repaired(bench, shorter, plan)
    share = len(bench.splits.calibration) / len(bench.splits.probe)
    return CascadeResult(
        plan=plan,
        model=repaired.model,
        block_drops=(),
        forward_passes=REPAIR_PASSES * share,
        notes=repaired.notes,
    )


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


def confirm(bench: Bench, plans: Sequence[Plan]) -> Confirmation:
    """Builds the models of several plans and measures them and the dense one again, in one run, and on `test`."""
    models = [build(bench, plan) for plan in plans]
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


def build(bench: Bench, plan: Plan) -> nn.Module:
    """The model of a plan, as its trial made it: cut, pruned and repaired."""
    return _repaired(bench, truncate(bench.model, plan.exit_block, bench.heads[plan.exit_block]), plan).model


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
    )


def _top1(bench: Bench, model: nn.Module, images: Images) -> float:
    logits = predict(model, images, batch_size=bench.config.cascade.batch_size, precision=bench.precision)
    if not logits.isfinite().all():
        raise VitfrontError("the model's logits are not finite")
    return top1(logits, images.labels)


def _all_training_images(splits: Splits) -> Images:
    parts = (splits.calibration, splits.probe)
    return replace(
        splits.probe,
        pixels=torch.cat([part.pixels for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
    )


def _reason(error: Exception) -> str:
    """One line: what went wrong, and where for what is not the user's doing."""
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, VitfrontError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{message} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
