"""One function a method: from a candidate to a smaller model, and the fine-tune that may follow."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pruning.measure.cost import count_macs, count_params
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.allocation import allocate
from pruning.methods.cascade import CascadeSettings, CascadeState, cascade
from pruning.methods.finetune import FinetuneSettings, Finetuning
from pruning.methods.prefix_cache import PrefixCache
from pruning.methods.schedule import Schedule, scheduled_plan
from pruning.methods.softmask import SoftMaskSettings, SoftMaskTraining
from pruning.methods.sparsity import GradualMagnitude, MaskSchedule, Pattern, apply_masks, pattern_masks
from pruning.methods.width import WidthSettings, WidthTraining
from pruning.model.anatomy import Anatomy, examine
from pruning.model.exits import truncate
from pruning.model.surgery import apply_plan, keep_all_plan
from pruning.plan import Plan
from pruning.repair.compensation import REPAIR_PASSES
from search.method import METHODS, Method
from search.outcome import Candidate, Outcome
from search.trial.context import TrialContext
from search.trial.measure import accuracy, repaired
from search.trial.prepare import is_whole
from search.trial.progress import Event, TrialProgress

LAST_RUNG = 1 / 3
"""The share of a fine-tune's epochs after which its last rung comes."""


@dataclass(frozen=True, kw_only=True)
class PruningJob:
    """A candidate and what it is to be pruned from."""

    context: TrialContext
    candidate: Candidate
    truncated: nn.Module
    """The dense model, cut at the candidate's exit."""
    prefix_cache: PrefixCache[CascadeState] | None = None
    """States of earlier cascades in the same context."""

    @classmethod
    def of(
        cls, context: TrialContext, candidate: Candidate, prefix_cache: PrefixCache[CascadeState] | None = None
    ) -> PruningJob:
        """Cuts the context's model at the candidate's exit."""
        truncated = truncate(context.model, candidate.exit_block, context.exit_heads[candidate.exit_block])
        return cls(context=context, candidate=candidate, truncated=truncated, prefix_cache=prefix_cache)

    @property
    def anatomy(self) -> Anatomy:
        """The anatomy of the cut model."""
        return examine(self.truncated)

    @property
    def target_macs(self) -> int:
        """The multiply-adds to keep, for one image."""
        return int(self.candidate.target_ratio * self.context.dense_macs)

    @property
    def allowed_widths(self) -> tuple[AllowedWidths, ...]:
        """The widths that each block up to the exit may be given."""
        context, candidate = self.context, self.candidate
        if candidate.round_to == "auto":
            return context.allowed_widths[candidate.token_reduction][: candidate.exit_block]
        blocks = context.anatomy.blocks[: candidate.exit_block]
        return tuple(multiples(block, candidate.round_to) for block in blocks)

    def target_ratio_within(self, size: Callable[[nn.Module], int]) -> float:
        """Gives the share of the cut model's size to keep; the target is a share of the dense model's."""
        return min(1.0, self.candidate.target_ratio / (size(self.truncated) / size(self.context.model)))


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A smaller model, before it is measured."""

    plan: Plan
    model: nn.Module
    has_weights: bool = False
    """The weights do not follow from the plan."""
    block_drops: tuple[float, ...] = ()
    forward_passes: float = 0.0
    notes: tuple[str, ...] = ()
    finetune_key: str | None = None
    """The key of the model's fine-tune, if it followed from its plan before."""
    finetuned: Outcome | None = None
    """The earlier outcome with this key; the model is not trained then."""

    def to_state(self) -> dict[str, Any]:
        """Gives all but the model, for the state of a trial."""
        return {
            "plan": self.plan.to_json(),
            "block_drops": list(self.block_drops),
            "forward_passes": self.forward_passes,
            "notes": list(self.notes),
        }

    @classmethod
    def from_state(cls, state: Any, truncated: nn.Module) -> Pruned:
        """Gives a model with the right shapes alone: the training that goes on brings the weights."""
        plan = Plan.from_json(state["plan"])
        return cls(
            plan=plan, model=apply_plan(truncated, plan), block_drops=tuple(state["block_drops"]),
            forward_passes=state["forward_passes"], notes=tuple(state["notes"]),
        )  # fmt: skip


def prune_by_cascade(job: PruningJob) -> Pruned:
    """Prunes block by block within the budgets (`pruning.methods.cascade`)."""
    context, candidate, fixed = job.context, job.candidate, job.context.config.cascade
    if is_whole(candidate):  # before widths are measured
        return Pruned(plan=_whole_plan(job), model=job.truncated, block_drops=(0.0,) * job.anatomy.depth)
    pruned = cascade(
        job.truncated,
        context.splits.probe,
        context.splits.calibration,
        CascadeSettings(
            drop_budget=candidate.drop_budget[: candidate.exit_block],
            target_macs=job.target_macs,
            cutoff_channel=candidate.cutoff_channel,
            cutoff_token=candidate.cutoff_token,
            criterion=candidate.criterion,
            token_reduction=candidate.token_reduction,
            allowed_widths=job.allowed_widths,
            token_share=candidate.token_share,
            alpha=fixed.alpha,
            num_levels=fixed.num_levels,
            order=fixed.order,
            batch_size=fixed.batch_size,
            precision=context.precision,
            seed=context.config.data.seed,
        ),
        sensitivity=context.sensitivities[candidate.exit_block],
        dense=context.dense_stream,
        prefix_cache=job.prefix_cache,
    )
    return Pruned(
        plan=pruned.plan, model=pruned.model, block_drops=pruned.block_drops, forward_passes=pruned.forward_passes,
        notes=pruned.notes,
    )  # fmt: skip


def prune_globally(job: PruningJob) -> Pruned:
    """Prunes all blocks at once by the profile of the dense model (`pruning.methods.allocation`)."""
    candidate = job.candidate
    if is_whole(candidate):  # before the dense model is profiled
        return Pruned(plan=_whole_plan(job), model=job.truncated)
    profile = replace(job.context.profiles[candidate.token_reduction], cutoff_token=candidate.cutoff_token)
    plan = allocate(profile, job.anatomy, job.target_macs, candidate.token_share, job.allowed_widths)
    return _repaired(job, plan)


def prune_by_schedule(schedule: Schedule) -> Callable[[PruningJob], Pruned]:
    """Gives the function that takes tokens alone, as many from each block as the schedule says."""

    def prune(job: PruningJob) -> Pruned:
        candidate = job.candidate
        if is_whole(candidate):
            return Pruned(plan=_whole_plan(job), model=job.truncated)
        plan = scheduled_plan(job.anatomy, job.target_macs, schedule, candidate.token_reduction, candidate.cutoff_token)
        return _repaired(job, plan)

    return prune


def _whole_plan(job: PruningJob) -> Plan:
    """Gives the plan that keeps all of the cut model."""
    candidate = job.candidate
    return replace(
        keep_all_plan(job.anatomy), token_reduction=candidate.token_reduction, cutoff_token=candidate.cutoff_token
    )


def _repaired(job: PruningJob, plan: Plan) -> Pruned:
    """Prunes by a plan that was made before anything is pruned."""
    repaired_model = repaired(job.context, job.truncated, plan)
    share = len(job.context.splits.calibration) / len(job.context.splits.probe)
    return Pruned(
        plan=plan, model=repaired_model.model, forward_passes=REPAIR_PASSES * share, notes=repaired_model.notes
    )


def prune_to_sparsity(job: PruningJob) -> Pruned:
    """Sets single weights of the job's own model to 0, unless a fine-tune follows, which sets them little by little."""
    plan = replace(keep_all_plan(job.anatomy), token_reduction="none")
    if job.candidate.recovery == "none":
        masks = _masks(job.candidate)(job.truncated, 0, 1)
        assert masks is not None
        apply_masks(job.truncated, masks)
    return Pruned(plan=plan, model=job.truncated, has_weights=True)


def _masks(candidate: Candidate) -> MaskSchedule:
    """Gives the schedule that chooses the weights to keep, step by step of a fine-tune."""
    if candidate.pattern == "any":
        return GradualMagnitude(sparsity=1 - candidate.target_ratio)
    pattern = Pattern(*map(int, candidate.pattern.split(":")))
    return lambda model, step, total_steps: pattern_masks(model, pattern) if step == 0 else None


def learn_widths(job: PruningJob, progress: TrialProgress) -> Generator[Event, None, list[Pruned]]:
    """Trains widths with the weights (`pruning.methods.width`); a model for each exit, the candidate's own first."""
    context, settings = job.context, job.context.config.learned
    training = WidthTraining(
        job.truncated, context.splits.training,
        WidthSettings(
            target_ratio=job.target_ratio_within(_macs if settings.count == "macs" else count_params),
            seed=context.config.data.seed, **settings.common(),
        ),
        exit_heads=context.exit_heads, allowed_widths=job.allowed_widths, precision=context.precision,
    )  # fmt: skip
    yield from progress.train("learned", training, {})
    return [Pruned(plan=point.plan, model=point.model, has_weights=True) for point in reversed(training.finish())]


def train_soft_masks(job: PruningJob, progress: TrialProgress) -> Generator[Event, None, list[Pruned]]:
    """Trains gates under an L1 penalty and cuts what they close (`pruning.methods.softmask`)."""
    context = job.context
    training = SoftMaskTraining(
        job.truncated, context.splits.training,
        SoftMaskSettings(
            target_ratio=job.target_ratio_within(_macs), seed=context.config.data.seed,
            **context.config.soft_mask.common(),
        ),
        allowed_widths=job.allowed_widths, precision=context.precision,
    )  # fmt: skip
    yield from progress.train("soft-mask", training, {})
    masked = training.finish()
    return [Pruned(plan=masked.plan, model=masked.model, has_weights=True)]


def _macs(model: nn.Module) -> int:
    return count_macs(examine(model), keep_all_plan(examine(model)))


def distill(job: PruningJob, pruned: Pruned, progress: TrialProgress) -> Generator[Event, None, Pruned]:
    """Fine-tunes a pruned model, which learns from the dense one as well (`pruning.methods.finetune`)."""
    context, candidate = job.context, job.candidate
    training = Finetuning(
        pruned.model, context.model, context.splits.training,
        FinetuneSettings(seed=context.config.data.seed, **context.config.distill.common()),
        masks=_masks(candidate) if METHODS[candidate.method].is_sparse else None, precision=context.precision,
    )  # fmt: skip
    last_rung = round(context.config.distill.epochs * LAST_RUNG) if progress.rungs else None
    speedup = progress.rungs[-1][1] if progress.rungs else 0.0  # training changes no shape
    for epoch in progress.train("distill", training, pruned.to_state()):
        yield epoch
        if epoch.progress["epoch"] == last_rung:
            yield progress.rung(lambda: (accuracy(context, training.trained), speedup))
    return replace(pruned, model=training.finish(), has_weights=True)


PRUNERS: dict[Method, Callable[[PruningJob], Pruned]] = {
    "cascade": prune_by_cascade,
    "global": prune_globally,
    "constant": prune_by_schedule("constant"),
    "decreasing": prune_by_schedule("decreasing"),
    "unstructured": prune_to_sparsity,
}
"""The methods that prune without training."""

TRAINERS: dict[Method, Callable[[PruningJob, TrialProgress], Generator[Event, None, list[Pruned]]]] = {
    "learned": learn_widths,
    "soft-mask": train_soft_masks,
}
"""The methods that train while they prune, epoch by epoch."""
