"""The cascade (VTC-LFC): block after block, tokens then channels, within a budget of accuracy a block.

Blocks go from the first to the last, because what an earlier block passes on decides what a later one is worth. Each
removal is probed as it will be delivered: built, repaired and run on the probe images (`pruning.methods.probing`).

The opposite order, from the last block to the first, is there to be compared with, as VTC-LFC does: `order: top-down`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from pruning.data import Images
from pruning.errors import SettingError
from pruning.measure.cost import count_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.bisection import bisect_whole
from pruning.methods.prefix_cache import PrefixCache, Threshold
from pruning.methods.probing import Probe, Prober, ProbingSettings, TopDownProber
from pruning.methods.ranking import Ranking
from pruning.model.anatomy import Anatomy, blocks_of, examine, with_blocks
from pruning.model.surgery import keep_all_block, keep_all_from, slim_block
from pruning.plan import BlockPlan, Plan
from pruning.repair.compensation import RepairedBlock
from pruning.repair.flow import DenseStream
from pruning.repair.sensitivity import BlockSensitivity
from pruning.scores.channel import ChannelScores
from pruning.scores.criteria import CRITERIA

Order = Literal["bottom-up", "top-down"]

Kind = Literal["tokens", "channels"]

FIRST_GUESS = 0.25
"""Share of what may go from a block at which the first block's search begins."""


@dataclass(frozen=True, kw_only=True)
class CascadeSettings(ProbingSettings):
    """Settings of a cascade: its budgets, and how it scores and probes blocks."""

    drop_budget: tuple[float, ...]
    """Accuracy points (1 = one percent of the probe images) that each block may cost, one entry a block."""
    target_macs: int
    """Multiply-adds of the model at which the cascade stops."""
    allowed_widths: tuple[AllowedWidths, ...] | None = None
    """The widths that each block may be given; None for any."""
    token_share: float = 0.56
    """Share of a block's budget that tokens may spend, in [0, 1], by those probe images that were run; channels get
    what they leave."""
    num_levels: int = 15
    """Number of counts that are tried for tokens, and for channels, between none and all that may go."""
    order: Order = "bottom-up"
    """Order of the blocks: from the first to the last, or, for channels alone, from the last to the first."""


@dataclass(frozen=True, kw_only=True)
class CascadeResult:
    """The outcome of a cascade: the pruned model, its plan and the cost of finding it."""

    plan: Plan
    model: nn.Module
    """The pruned and repaired model."""
    block_drops: tuple[float, ...]
    """Accuracy points that each block cost on the probe images, at most its budget; below 0 where it gained."""
    forward_passes: float
    """Cost, in forward passes of the given model over the probe images.

    A block that runs on fewer tokens counts as much less; a gradient of weights counts as two passes, one of a stream
    as one.
    """
    notes: tuple[str, ...]
    """Layers of which only the bias could be repaired, for want of calibration images."""


def cascade(
    model: nn.Module,
    probe: Images,
    calibration: Images,
    settings: CascadeSettings,
    *,
    sensitivity: list[BlockSensitivity] | None = None,
    dense: DenseStream | None = None,
    prefix_cache: PrefixCache[CascadeState] | None = None,
) -> CascadeResult:
    """Prunes a dense model block by block; the model is left as it was.

    Top-down, the blocks before the current one are dense, and those after it are pruned already: they were repaired on
    a stream that changes once the blocks before them are pruned. So all blocks are repaired once more at the end, from
    the first to the last, as bottom-up does on its way: by either order the model is the one that `repaired_model`
    makes of the plan, and only the plans differ. The drops, and their budgets, are those measured on the way.

    Args:
        model: dense, in eval mode, on the device to work on.
        probe: images whose accuracy the budgets are about.
        calibration: images for the scores and the repair.
        sensitivity: of the dense model on the calibration images; measured if it is not given.
        dense: of these images, to share between cascades; by default their own pass through the dense model.
        prefix_cache: states of earlier calls with this model, cut at any exit, and these images; a call that begins
            as one of them did goes on from its state. The result is the same, and its cost counts as if it had begun
            anew.

    Raises:
        SettingError: not one budget a block, or a negative one; or a token reduction top-down.
    """
    anatomy = examine(model)
    _check(settings, anatomy)
    whole = _plan(settings, [keep_all_block(block) for block in anatomy.blocks])
    if count_macs(anatomy, whole) <= settings.target_macs:  # small enough as it is: costs no pass at all
        return CascadeResult(
            plan=whole, model=copy.deepcopy(model), block_drops=(0.0,) * anatomy.depth, forward_passes=0.0, notes=()
        )
    spending = _Spending(settings, len(probe))
    key = anatomy, replace(settings, drop_budget=(), target_macs=0, token_share=0.0)
    prefix_cache = PrefixCache(0) if prefix_cache is None else prefix_cache
    cached = prefix_cache.farthest(key, spending.thresholds)
    if cached is None:
        prober_class = TopDownProber if settings.order == "top-down" else Prober
        prober = prober_class(model, anatomy, probe, calibration, settings, sensitivity, dense)
        state = CascadeState(settings=settings, prober=prober, plans=whole.blocks, drops=(0.0,) * anatomy.depth)
        _keep(prefix_cache, key, spending, state)
    else:
        state = replace(cached.copy(), settings=settings)
    while not state.is_done(spending.target):
        state = _prune_block(state, spending)
        _keep(prefix_cache, key, spending, state)
    plan, prober = _plan(settings, state.plans), state.prober
    if settings.order == "top-down":
        repaired = prober.repair_all(plan)
        pruned, notes = repaired.model, repaired.notes
    else:
        built = copy.deepcopy(state.built)  # those of the state may be kept
        pruned, notes = with_blocks(model, [*built, *_dense_blocks(model, anatomy, plan, len(built))]), state.notes
    return CascadeResult(
        plan=plan,
        model=pruned,
        block_drops=state.drops,
        forward_passes=prober.block_images / (anatomy.depth * len(probe)),
        notes=notes,
    )


def _check(settings: CascadeSettings, anatomy: Anatomy) -> None:
    budgets = settings.drop_budget
    if len(budgets) != anatomy.depth or not all(0 <= budget < math.inf for budget in budgets):
        raise SettingError(f"drop budgets {budgets} for {anatomy.depth} blocks; give one of at least 0 for each")
    if settings.criterion not in CRITERIA:
        raise SettingError(f"no channel criterion {settings.criterion!r}; there are {', '.join(CRITERIA)}")
    if settings.order == "top-down" and settings.token_reduction != "none":
        raise SettingError(f"top-down takes channels alone, not tokens by {settings.token_reduction}; give none")


class _Spending:
    """The budgets of a cascade, as thresholds that remember what they were compared with."""

    def __init__(self, settings: CascadeSettings, num_probe: int) -> None:
        allowed = [budget / 100 * num_probe for budget in settings.drop_budget]
        self.target = Threshold(settings.target_macs)
        self.tokens = [Threshold(_whole_images(settings.token_share * images)) for images in allowed]
        """Probe images that each block's tokens may cost."""
        self.channels = [Threshold(_whole_images(images)) for images in allowed]
        """Probe images that each block's tokens and channels together may cost."""

    @property
    def thresholds(self) -> list[Threshold]:
        return [self.target, *self.tokens, *self.channels]


@dataclass(frozen=True, kw_only=True)
class CascadeState:
    """A cascade between two blocks."""

    settings: CascadeSettings
    prober: Prober
    plans: tuple[BlockPlan, ...]
    """The plans of all blocks; those to come have all their channels."""
    built: tuple[nn.Module, ...] = ()
    """The blocks that are done, in the order in which they were pruned."""
    drops: tuple[float, ...]
    """Accuracy points that each block cost; 0 for those to come."""
    notes: tuple[str, ...] = ()
    guesses: Mapping[Kind, float] = field(default_factory=lambda: {"tokens": FIRST_GUESS, "channels": FIRST_GUESS})
    """Share of what may go that went from the block before."""

    def is_done(self, target: Threshold) -> bool:
        """Tells whether all blocks are done, or the model is small enough."""
        anatomy, plan = self.prober.anatomy, _plan(self.settings, self.plans)
        return len(self.built) == anatomy.depth or target.reaches(count_macs(anatomy, plan))

    def plans_with(self, plan: BlockPlan) -> tuple[BlockPlan, ...]:
        """The plans of all blocks, once the next to be pruned has this one."""
        anatomy, index = self.prober.anatomy, self.prober.index
        if self.settings.order == "top-down":
            return (*self.plans[:index], plan, *self.plans[index + 1 :])
        return (*self.plans[:index], plan, *keep_all_from(anatomy, index + 1, plan.num_tokens))

    def reaches(self, target: Threshold, plan: BlockPlan) -> bool:
        """Tells whether the model is small enough, once the next block has this plan."""
        return target.reaches(count_macs(self.prober.anatomy, _plan(self.settings, self.plans_with(plan))))

    def copy(self) -> CascadeState:
        """A copy to go on from without changing this state."""
        return replace(self, prober=self.prober.copy())


def _keep(prefix_cache: PrefixCache[CascadeState], key: Hashable, spending: _Spending, state: CascadeState) -> None:
    prefix_cache.keep(key, spending.thresholds, len(state.built), state.copy(), state.prober.num_bytes)


def _dense_blocks(model: nn.Module, anatomy: Anatomy, plan: Plan, start: int) -> list[nn.Module]:
    """The blocks from `start` on, with all their channels; they take the tokens that are left."""
    return [
        slim_block(
            blocks_of(model)[index], plan.blocks[index], anatomy.blocks[index],
            num_tokens_in=plan.blocks[index].num_tokens, token_reduction=plan.token_reduction,
            cutoff_token=plan.cutoff_token, is_last=index == anatomy.depth - 1,
        )
        for index in range(start, anatomy.depth)
    ]  # fmt: skip


def _plan(settings: CascadeSettings, blocks: Sequence[BlockPlan]) -> Plan:
    return Plan(blocks=tuple(blocks), cutoff_token=settings.cutoff_token, token_reduction=settings.token_reduction)


class _Removal:
    """Removals of one kind (tokens or channels) from the current block, by the number of units that go."""

    def __init__(
        self, state: CascadeState, most: int, plan_without: Callable[[int], BlockPlan], budget: Threshold,
        target: Threshold,
    ) -> None:  # fmt: skip
        """
        Args:
            most: units that may go.
            plan_without: gives the plan of the block without so many units.
            budget: probe images that this block may cost.
            target: multiply-adds at which no more need go.
        """
        self.most, self.plan_without = most, plan_without
        self._prober, self._budget = state.prober, budget
        self._levels = _levels(most, state.settings.num_levels, lambda n: state.reaches(target, plan_without(n)))
        self._probes: dict[BlockPlan, Probe] = {}

    def most_within(self, guess: float) -> int:
        """The most units that may go by what a part of the probe images shows; 0 for none. guess: share of `most`."""
        place = sum(level <= guess * self.most for level in self._levels) - 1
        return self._removed(_most_within(self._levels, lambda n: self._is_within(n, surely=False), place))

    def most_surely_within(self, removed: int) -> int:
        """The most units, of no more than so many, that may go by what all probe images show; 0 for none."""
        levels = [level for level in self._levels if level <= removed]
        if not levels or self._is_within(levels[-1], surely=True):
            return removed
        return self._removed(_most_within(levels[:-1], lambda n: self._is_within(n, surely=True), len(levels) - 2))

    def probe(self, removed: int) -> Probe:
        """The probe of so many units; rounding makes one plan, and one probe, of several counts."""
        plan = self.plan_without(removed)
        if plan not in self._probes:
            repaired = self._prober.repair(plan)
            self._probes[plan] = Probe(repaired, self._budget, correct_before=self._prober.num_correct)
        return self._probes[plan]

    def _is_within(self, removed: int, *, surely: bool) -> bool:
        return self._prober.is_within(self.probe(removed), surely=surely)

    def _removed(self, place: int) -> int:
        return self._levels[place] if place >= 0 else 0


def _prune_block(state: CascadeState, spending: _Spending) -> CascadeState:
    """Prunes the next block as far as its budget and the target allow; the state's prober goes on with the result.

    Only the last choice is run on all probe images: with channels gone too, these show what the block costs in all.
    """
    prober, index, correct_before = state.prober, state.prober.index, state.prober.num_correct
    tokens, channels, scores = _token_removal(state, spending), None, None
    num_tokens = num_channels = 0  # that go
    if tokens is not None:
        num_tokens = tokens.most_within(state.guesses["tokens"])
    while True:
        left = state.plans[index] if tokens is None else tokens.plan_without(num_tokens)
        if not state.reaches(spending.target, left):
            scores = prober.score(prober.stream.slim(left)) if scores is None else scores
            channels = _channel_removal(state, spending, left, scores)
            num_channels = channels.most_surely_within(channels.most_within(state.guesses["channels"]))
        if num_channels or tokens is None:
            break
        num_surely = tokens.most_surely_within(num_tokens)
        if num_surely == num_tokens:
            break
        num_tokens = num_surely  # decided too early
    plan, repaired = left, RepairedBlock(block=prober.stream.slim(left))
    for removal, removed in ((channels, num_channels), (tokens, num_tokens)):
        if removal is not None and removed:
            plan, probe = removal.plan_without(removed), removal.probe(removed)
            repaired = probe.repaired
            prober.accept(probe)
            break
    guesses, drops, plans = dict(state.guesses), list(state.drops), state.plans_with(plan)
    if tokens is not None:
        guesses["tokens"] = num_tokens / max(1, tokens.most)
    if channels is not None:
        guesses["channels"] = num_channels / max(1, channels.most)
    drops[index] = (correct_before - prober.num_correct) / prober.num_probe * 100
    prober.advance(repaired.block)
    return replace(
        state,
        plans=plans,
        built=(*state.built, repaired.block),
        drops=tuple(drops),
        notes=(*state.notes, *repaired.notes),
        guesses=guesses,
    )


def _token_removal(state: CascadeState, spending: _Spending) -> _Removal | None:
    """The removals of tokens from the next block; None where the cascade leaves them all."""
    if state.settings.token_reduction == "none":
        return None
    index = state.prober.index
    block, num_tokens = state.prober.anatomy.blocks[index], state.plans[index].num_tokens
    return _Removal(
        state, num_tokens - 1, lambda removed: keep_all_block(block, num_tokens - removed), spending.tokens[index],
        spending.target,
    )  # fmt: skip


def _channel_removal(state: CascadeState, spending: _Spending, left: BlockPlan, scores: ChannelScores) -> _Removal:
    """The removals of channels from the next block, whose tokens are reduced as `left` says."""
    prober, settings, index = state.prober, state.settings, state.prober.index
    block, num_prefix = prober.anatomy.blocks[index], prober.anatomy.blocks[index].num_prefix_tokens
    allowed = settings.allowed_widths[index] if settings.allowed_widths else multiples(block, 1)
    ranking = Ranking(
        scores, block, state.plans[index].num_tokens + num_prefix, left.num_tokens + num_prefix, allowed
    )  # fmt: skip
    return _Removal(
        state, ranking.max_removed, lambda removed: ranking.plan(removed, left.num_tokens), spending.channels[index],
        spending.target,
    )  # fmt: skip


def _levels(most: int, count: int, reaches_target: Callable[[int], bool]) -> list[int]:
    """Up to `count` removals, ascending and even, from 1 to the first that reaches the target, or to `most`."""
    if most and reaches_target(most):
        most = bisect_whole(reaches_target, 0, most)
    return sorted({math.ceil(most * level / count) for level in range(1, count + 1)} - {0})


def _most_within(levels: Sequence[int], is_within: Callable[[int], bool], guess: int) -> int:
    """The index of the largest level within budget, or -1: a larger removal is taken to cost more.

    Starts at the guess and goes away from it in doubling steps until it has passed the budget, then by bisection: a
    good guess takes two probes, where bisection alone takes log2(levels).
    """
    low, high = 0, len(levels) - 1  # the answer is in [low - 1, high]
    place, step = min(max(guess, 0), high), 1
    while low <= high:
        if is_within(levels[place]):
            low, place = place + 1, place + step
        else:
            high, place = place - 1, place - step
        step *= 2
        if not low <= place <= high:
            place = (low + high) // 2
    return high


def _whole_images(images: float) -> int:
    """Whole images in a budget; a hair above, so that 1 % of 500 is 5 in floating point too."""
    return math.floor(images + 1e-9)
