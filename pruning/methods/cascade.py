"""The bottom-up cascade (VTC-LFC): block after block, tokens then channels, within a budget of accuracy a block.

Blocks go from the first to the last, because what an earlier block passes on decides what a later one is worth.
The activations that enter the current block are kept, so a probe runs that block and the later ones alone; a probed
block is really built and repaired, so what is measured is what will be delivered.

The other way round, from the last to the first, is there to be compared with, as VTC-LFC does: `order: top-down`.

B images, N tokens, C model width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pruning.data import Images
from pruning.device_sharing import yield_device, yielding_between
from pruning.errors import SettingError
from pruning.measure.cost import count_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.prefix_cache import PrefixCache, Threshold
from pruning.methods.ranking import Ranking
from pruning.model.anatomy import Anatomy, blocks_of, classify, embed, examine, summary_token, with_blocks
from pruning.model.surgery import as_slim, keep_all_block, keep_all_from, slim_block
from pruning.model.tokens import merges
from pruning.plan import BlockPlan, Plan, TokenReduction
from pruning.precision import Precision, autocast
from pruning.repair.compensation import REPAIR_PASSES, BlockRepair, RepairedBlock, RepairedModel, repaired_model
from pruning.repair.flow import CalibrationStream
from pruning.repair.sensitivity import BlockSensitivity, measure_sensitivity
from pruning.scores.channel import ChannelScores, ScoringInput
from pruning.scores.criteria import CRITERIA
from pruning.spectrum import low_pass

Order = Literal["bottom-up", "top-down"]

SENSITIVITY_PASSES = 3
"""One forward and one backward pass."""


@dataclass(frozen=True, kw_only=True)
class CascadeSettings:
    """What the cascade may spend, and how it scores."""

    drop_budget: tuple[float, ...]
    """Accuracy points (1 = one percent of the probe images) that each block may cost, one entry a block."""
    target_macs: int
    """The cascade stops as soon as the model needs no more multiply-adds than this."""
    cutoff_channel: float = 0.1
    """Of the image filter of the channel score, in (0, 1]."""
    cutoff_token: float = 0.85
    """Of the token filter of the token score, in (0, 1]."""
    criterion: str = "lfs"
    """Of the channels: a key of `pruning.scores.criteria.CRITERIA`."""
    token_reduction: TokenReduction = "lfe"
    allowed_widths: tuple[AllowedWidths, ...] | None = None
    """The widths that each block may be given; None for any."""
    token_share: float = 0.56
    """Share of a block's budget that tokens may spend, in [0, 1]; channels get what they leave."""
    alpha: float = 0.1
    """Weight of the cross-entropy in the channel score, in [0, 1]."""
    num_levels: int = 15
    """Counts that are tried for tokens, and for channels, between none and all that may go."""
    batch_size: int = 64
    precision: Precision = "float32"
    seed: int = 0
    """Of the random criterion."""
    order: Order = "bottom-up"
    """From the first block to the last, or, for channels alone, from the last to the first."""


@dataclass(frozen=True, kw_only=True)
class CascadeResult:
    """What the cascade made."""

    plan: Plan
    model: nn.Module
    """The pruned and repaired model."""
    block_drops: tuple[float, ...]
    """Accuracy points that each block cost on the probe images, at most its budget; below 0 where it gained."""
    forward_passes: float
    """Cost, in forward passes of the given model over the probe images (a backward pass counts as two)."""
    notes: tuple[str, ...]
    """Layers of which only the bias could be repaired, for want of calibration images."""


def cascade(
    model: nn.Module,
    probe: Images,
    calibration: Images,
    settings: CascadeSettings,
    *,
    sensitivity: list[BlockSensitivity] | None = None,
    prefix_cache: PrefixCache[CascadeState] | None = None,
) -> CascadeResult:
    """Prunes a dense model block by block; the model is left as it was.

    Top-down, the blocks before the current one are dense, and those after it are pruned already: they were repaired on
    a stream that the blocks before them no longer give. So the whole plan is repaired once more at the end, from the
    first block to the last, which the bottom-up walk does on its way: by either order the model is the one that
    `repaired_model` makes of the plan, and only the plans differ. The drops, and their budgets, are those of the walk.

    Args:
        model: dense, in eval mode, on the device to work on.
        probe: images whose accuracy the budgets are about.
        calibration: images for the scores and the repair.
        sensitivity: of the dense model on the calibration images; measured if it is not given.
        prefix_cache: of earlier calls with this model, cut at any exit, and these images; a call that begins as
            one of them goes on from there. The result is the same, and its cost counts as if nothing had been known.

    Raises:
        SettingError: not one budget a block, or a negative one; or a token reduction top-down.
    """
    anatomy = examine(model)
    budgets, is_down = settings.drop_budget, settings.order == "top-down"
    if len(budgets) != anatomy.depth or not all(0 <= budget < math.inf for budget in budgets):
        raise SettingError(f"drop budgets {budgets} for {anatomy.depth} blocks; give one of at least 0 for each")
    if settings.criterion not in CRITERIA:
        raise SettingError(f"no channel criterion {settings.criterion!r}; there are {', '.join(CRITERIA)}")
    if is_down and settings.token_reduction != "none":
        raise SettingError(f"top-down takes channels alone, not tokens by {settings.token_reduction}; give none")
    dense = _plan(settings, [keep_all_block(block) for block in anatomy.blocks])
    if count_macs(anatomy, dense) <= settings.target_macs:  # small enough as it is: costs no pass at all
        return CascadeResult(
            plan=dense, model=copy.deepcopy(model), block_drops=(0.0,) * anatomy.depth, forward_passes=0.0, notes=()
        )
    spending = _Spending(settings, len(probe))
    key = anatomy, replace(settings, drop_budget=(), target_macs=0, token_share=0.0)
    prefix_cache = PrefixCache(0) if prefix_cache is None else prefix_cache
    known = prefix_cache.farthest(key, spending.thresholds)
    if known is None:
        work = (_WorkDown if is_down else _Work)(model, anatomy, probe, calibration, settings, sensitivity)
        walk = CascadeState(work=work, plans=dense.blocks, drops=(0.0,) * anatomy.depth)
        _keep(prefix_cache, key, spending, walk)
    else:
        walk = known.copy()
    while not walk.is_done(spending.target):
        walk = _prune_block(walk, spending)
        _keep(prefix_cache, key, spending, walk)
    plan, work = _plan(settings, walk.plans), walk.work
    if isinstance(work, _WorkDown):
        again = work.repair_all(plan)
        made, notes = again.model, again.notes
    else:
        built = copy.deepcopy(walk.built)  # those of the walk may be kept
        made, notes = with_blocks(model, [*built, *_whole_blocks(model, anatomy, plan, len(built))]), walk.notes
    return CascadeResult(
        plan=plan,
        model=made,
        block_drops=walk.drops,
        forward_passes=work.block_images / (anatomy.depth * len(probe)),
        notes=notes,
    )


class _Spending:
    """What a walk may spend, as the numbers that it asks."""

    def __init__(self, settings: CascadeSettings, num_probe: int) -> None:
        allowed = [budget / 100 * num_probe for budget in settings.drop_budget]
        self.target = Threshold(settings.target_macs)
        self.tokens = [Threshold(_whole(settings.token_share * images)) for images in allowed]
        """Probe images that each block's tokens may cost."""
        self.channels = [Threshold(_whole(images)) for images in allowed]
        """The same for its tokens and channels together."""

    @property
    def thresholds(self) -> list[Threshold]:
        return [self.target, *self.tokens, *self.channels]


@dataclass(frozen=True, kw_only=True)
class CascadeState:
    """A cascade between two blocks."""

    work: _Work
    plans: tuple[BlockPlan, ...]
    built: tuple[nn.Module, ...] = ()
    """The blocks that are done, in the order of the walk."""
    drops: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def is_done(self, target: Threshold) -> bool:
        """All blocks are, or the model is small enough."""
        anatomy, plan = self.work.anatomy, _plan(self.work.settings, self.plans)
        return len(self.built) == anatomy.depth or target.reaches(count_macs(anatomy, plan))

    def copy(self) -> CascadeState:
        """The same walk, to go on from without changing this one."""
        return replace(self, work=self.work.copy())


def _keep(prefix_cache: PrefixCache[CascadeState], key: Hashable, spending: _Spending, walk: CascadeState) -> None:
    prefix_cache.keep(key, spending.thresholds, len(walk.built), walk.copy(), walk.work.num_bytes)


def _whole_blocks(model: nn.Module, anatomy: Anatomy, plan: Plan, start: int) -> list[nn.Module]:
    """The blocks from `start` on, of which everything stays; they take the tokens that are left."""
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


def _prune_block(walk: CascadeState, spending: _Spending) -> CascadeState:
    """The walk with the next block pruned as far as its budget and the target allow; its work goes on."""
    work, plans = walk.work, list(walk.plans)
    index, before = work.index, work.correct
    anatomy, settings, block = work.anatomy, work.settings, work.anatomy.blocks[index]
    num_tokens = plans[index].num_tokens
    best = RepairedBlock(block=work.flow.slim(plans[index]))

    def with_block(plan: BlockPlan) -> list[BlockPlan]:
        is_down = settings.order == "top-down"  # the later blocks are pruned; else dense, with the tokens that are left
        later = plans[index + 1 :] if is_down else keep_all_from(anatomy, index + 1, plan.num_tokens)
        return [*plans[:index], plan, *later]

    def reaches_target(plan: BlockPlan) -> bool:
        return spending.target.reaches(count_macs(anatomy, _plan(settings, with_block(plan))))

    def search(kind: str, most: int, make: Callable[[int], BlockPlan], budget: Threshold) -> BlockPlan | None:
        """The plan that removes most of what is within budget; None if nothing is."""
        nonlocal best
        probes: dict[BlockPlan, _Probe] = {}

        def probe_of(removed: int) -> _Probe:
            plan = make(removed)
            if plan not in probes:  # rounding makes one plan of several counts
                probes[plan] = _Probe(work.repair(plan), lambda num_right: budget.reaches(before - num_right))
            return probes[plan]

        levels = _levels(most, settings.num_levels, lambda n: reaches_target(make(n)))
        guess = sum(level <= work.guesses[kind] * most for level in levels) - 1
        found = _most_within(levels, lambda n: work.is_within(probe_of(n), surely=False), guess)
        if found >= 0 and not work.is_within(probe_of(levels[found]), surely=True):  # decided too early
            found = _most_within(levels[:found], lambda n: work.is_within(probe_of(n), surely=True), found - 1)
        work.guesses[kind] = levels[found] / most if found >= 0 else 0.0
        if found < 0:
            return None
        chosen = probe_of(levels[found])
        work.accept(chosen)
        best = chosen.repaired
        return make(levels[found])

    def fewer_tokens(removed: int) -> BlockPlan:
        return keep_all_block(block, num_tokens - removed)

    plan = plans[index]
    if settings.token_reduction != "none":
        plan = search("tokens", num_tokens - 1, fewer_tokens, spending.tokens[index]) or plan
    if not reaches_target(plan):
        tokens_left = plan.num_tokens
        ranking = Ranking(
            work.score(work.flow.slim(plan)), block, num_tokens + block.num_prefix_tokens,
            tokens_left + block.num_prefix_tokens, work.allowed_widths[index],
        )  # fmt: skip

        def fewer_channels(removed: int) -> BlockPlan:
            return ranking.plan(removed, tokens_left)

        plan = search("channels", ranking.max_removed, fewer_channels, spending.channels[index]) or plan
    plans, drops = with_block(plan), list(walk.drops)
    drops[index] = (before - work.correct) / work.num_probe * 100
    work.advance(best.block)
    return CascadeState(
        work=work, plans=tuple(plans), built=(*walk.built, best.block), drops=tuple(drops),
        notes=(*walk.notes, *best.notes),
    )  # fmt: skip


@dataclass
class _Probe:
    """A block that is being tried: the probe images that it has run on so far, in their order."""

    repaired: RepairedBlock
    is_enough: Callable[[int], bool]
    """Whether so many images that come out right are within budget."""
    is_right: list[Tensor] = field(default_factory=list)
    margins: list[Tensor] = field(default_factory=list)
    num_seen: int = 0
    num_right: int = 0


class _Work:
    """The state of a walk through the blocks: what enters the current one, and what the walk has cost so far."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, probe: Images, calibration: Images, settings: CascadeSettings,
        sensitivity: list[BlockSensitivity] | None,
    ) -> None:  # fmt: skip
        self.model, self.anatomy, self.settings = model, anatomy, settings
        self.allowed_widths = settings.allowed_widths or [multiples(block, 1) for block in anatomy.blocks]
        self.probe, self.calibration = probe, calibration
        self.num_probe = len(probe)
        self.block_images = float(SENSITIVITY_PASSES * anatomy.depth * len(calibration))
        """Blocks run, times images; a backward pass counts as two forward passes."""
        if sensitivity is None:
            sensitivity = measure_sensitivity(
                model, calibration, batch_size=settings.batch_size, precision=settings.precision
            )
        self.flow = CalibrationStream(
            model, calibration, sensitivity,
            token_reduction=settings.token_reduction, cutoff_token=settings.cutoff_token,
            batch_size=settings.batch_size, precision=settings.precision,
        )  # fmt: skip
        self.guesses = {"tokens": 0.25, "channels": 0.25}
        """Share of what may go that went from the block before."""
        self._embed()
        self.order = torch.arange(self.num_probe, device=self.x.device)
        """(B,): what `accept` made of the order of the probe images."""
        self._begin()
        dense = _Probe(RepairedBlock(block=self.dense), lambda num_right: True)
        self.is_right = torch.zeros(self.num_probe, dtype=torch.bool, device=self.x.device)
        """(B,): probe images that come out right as the model is now."""
        self.is_within(dense, surely=True)
        self.accept(dense)

    def copy(self) -> _Work:
        """The same state, between two blocks, to go on from; they share the tensors, which nobody changes."""
        made = copy.copy(self)
        made.flow, made.guesses = self.flow.copy(), dict(self.guesses)
        made.block_repair = BlockRepair(made.flow)
        return made

    @property
    def num_bytes(self) -> int:
        """Of the activations."""
        leaves = tree_leaves([vars(self), vars(self.flow)])
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))

    def _begin(self) -> None:
        self._turn_to(0)

    def _turn_to(self, index: int) -> None:
        self.index, self.block_repair = index, BlockRepair(self.flow)
        self.dense, *self.later = blocks_of(self.model)[index:]
        if merges(self.settings.token_reduction):
            last = len(self.later) - 1
            anatomies = self.anatomy.blocks[index:]
            self.later = [as_slim(each, anatomies[1 + n], is_last=n == last) for n, each in enumerate(self.later)]
            self.dense = as_slim(self.dense, anatomies[0], is_last=not self.later)

    @torch.no_grad()
    def _embed(self) -> None:
        device = next(self.model.parameters()).device
        settings, size = self.settings, self.settings.batch_size
        self.labels = self.probe.labels.to(device)
        self.calibration_labels = self.calibration.labels.to(device)
        with autocast(device, settings.precision):
            self.x = _cat(embed(self.model, batch) for batch, _ in self.probe.batches(size, device))
            self.x_low, self.summaries = self.flow.x, [torch.empty(0)] * self.anatomy.depth
            if settings.criterion != "lfs":  # the only one that looks at them
                return
            self.x_low = _cat(
                embed(self.model, low_pass(batch, settings.cutoff_channel))
                for batch, _ in self.calibration.batches(size, device)
            )
        # T of the channel score: the dense model's summary token after every block, images as they are.
        x = self.flow.x
        for index, block in enumerate(blocks_of(self.model)):
            x = self._run(block, x)
            self.summaries[index] = summary_token(self.anatomy.blocks[index], x)

    @torch.no_grad()
    def repair(self, plan: BlockPlan) -> RepairedBlock:
        """The current block by a plan, repaired: it runs over the calibration images once for each of its halves."""
        self.block_images += (1 if self.block_repair.has_attention(plan) else 2) * len(self.calibration)
        return self.block_repair.repair(plan)

    @property
    def correct(self) -> int:
        """Probe images that come out right as the model is now."""
        return int(self.is_right.sum())

    def is_within(self, probe: _Probe, *, surely: bool) -> bool:
        """Whether enough probe images come out right with this block; goes on where the probe stopped before.

        The images come by their margin so far, the wrong and the nearly wrong first. So what costs too much is refused
        after a part of the pass, and never wrongly: all that were not run yet are taken to come out right. And unless
        it has to be sure, once a whole batch comes out as before, so do those of larger margin behind it.
        """
        while True:
            left = self.num_probe - probe.num_seen
            if not probe.is_enough(probe.num_right + left):
                return False
            if not left:
                return True
            yield_device()
            before = self.is_right[probe.num_seen :][: self.settings.batch_size]
            self._run_batch(probe)
            likely = probe.num_right + int(self.is_right[probe.num_seen :].sum())
            if not surely and probe.is_enough(likely) and bool((probe.is_right[-1] == before).all()):
                return True

    @torch.no_grad()
    def _run_batch(self, probe: _Probe) -> None:
        chosen = slice(probe.num_seen, probe.num_seen + self.settings.batch_size)
        x, labels = self.x[chosen], self.labels[chosen]
        with autocast(x.device, self.settings.precision):
            for block in (probe.repaired.block, *self.later):
                x = block(x)
            logits = classify(self.model, x).float()
        self.block_images += (1 + len(self.later)) * len(labels)
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        probe.margins.append(logits.gather(1, labels[:, None])[:, 0] - others)
        probe.is_right.append(logits.argmax(dim=1) == labels)
        probe.num_seen += len(labels)
        probe.num_right += int(probe.is_right[-1].sum())

    def accept(self, probe: _Probe) -> None:
        """Takes the outcome of a probe of all images as what the model does now, and orders them by their margins."""
        order = torch.cat(probe.margins).argsort()
        self.is_right = torch.cat(probe.is_right)[order]
        self.x, self.labels, self.order = self.x[order], self.labels[order], self.order[order]

    def score(self, block: nn.Module) -> ChannelScores:
        """Channel scores of the current block, whose tokens may be reduced already."""
        settings = self.settings
        if settings.criterion in ("lfs", "taylor"):
            self.block_images += 3 * (1 + len(self.later)) * len(self.calibration)
        elif settings.criterion != "random":
            self.block_images += len(self.calibration)
        scene = ScoringInput(
            model=self.model, anatomy=self.anatomy.blocks[self.index], index=self.index,
            blocks=[block, *self.later], x=self.flow.x, x_low=self.x_low, targets=self.summaries[self.index],
            labels=self.calibration_labels, alpha=settings.alpha, batch_size=settings.batch_size,
            precision=settings.precision, seed=settings.seed, repair=self.block_repair,
        )  # fmt: skip
        return CRITERIA[settings.criterion](scene)

    def advance(self, block: nn.Module) -> None:
        """Takes all activations through the finished block, on to the next."""
        self.block_images += 2 * len(self.calibration)  # pruned so far, and dense
        self.flow.advance(block)
        self.x = self._run(block, self.x)
        self.x_low = self._run(block, self.x_low) if self.settings.criterion == "lfs" else self.flow.x
        if self.later:
            self._turn_to(self.index + 1)

    @torch.no_grad()
    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        self.block_images += len(x)
        with autocast(x.device, self.settings.precision):
            return _cat(block(batch) for batch in yielding_between(x.split(self.settings.batch_size)))


class _WorkDown(_Work):
    """The same from the last block to the first. What enters a block is dense, and run anew for each: to keep it for
    all blocks would take the memory of all their activations."""

    def _begin(self) -> None:
        self.starts = self.x, self.x_low, self.flow.x
        """What the embedding gives, images in their own order."""
        self.built: list[nn.Module] = []
        self._turn_to(self.anatomy.depth - 1)

    def _turn_to(self, index: int) -> None:
        self.index, self.dense, self.later = index, blocks_of(self.model)[index], self.built
        x, x_low, calibration = self.starts
        self.x = self._up_to(index, x)[self.order]
        self.flow.turn_to(index, self._up_to(index, calibration))
        self.block_repair = BlockRepair(self.flow)
        self.x_low = self._up_to(index, x_low) if self.settings.criterion == "lfs" else self.flow.x

    def _up_to(self, index: int, x: Tensor) -> Tensor:
        for block in blocks_of(self.model)[:index]:
            x = self._run(block, x)
        return x

    def advance(self, block: nn.Module) -> None:
        """Puts the finished block behind all that come, and goes back by one."""
        self.built = [block, *self.built]
        if self.index:
            self._turn_to(self.index - 1)

    def repair_all(self, plan: Plan) -> RepairedModel:
        """The model of the whole plan."""
        passes = REPAIR_PASSES - SENSITIVITY_PASSES
        self.block_images += passes * self.anatomy.depth * len(self.calibration)
        return repaired_model(
            self.model, plan, self.calibration, self.flow.sensitivity,
            batch_size=self.settings.batch_size, precision=self.settings.precision,
        )  # fmt: skip


def _levels(most: int, count: int, reaches_target: Callable[[int], bool]) -> list[int]:
    """Up to `count` removals, ascending and even, from 1 to the first that reaches the target, or to `most`."""
    low, high = 0, most
    if most and reaches_target(most):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches_target(middle) else (middle, high)
    return sorted({math.ceil(high * level / count) for level in range(1, count + 1)} - {0})


def _most_within(levels: Sequence[int], within: Callable[[int], bool], guess: int) -> int:
    """The index of the largest level within budget, or -1: a larger removal is taken to cost more.

    Starts at the guess and goes away from it in doubling steps until it has passed the budget, then by bisection: a
    good guess takes two probes, where bisection alone takes log2(levels).
    """
    low, high = 0, len(levels) - 1  # the answer is in [low - 1, high]
    place, step = min(max(guess, 0), high), 1
    while low <= high:
        if within(levels[place]):
            low, place = place + 1, place + step
        else:
            high, place = place - 1, place - step
        step *= 2
        if not low <= place <= high:
            place = (low + high) // 2
    return high


def _whole(images: float) -> int:
    """Whole images in a budget; a hair above, so that 1 % of 500 is 5 in floating point too."""
    return math.floor(images + 1e-9)


def _cat(batches: Iterable[Tensor]) -> Tensor:
    return torch.cat([batch.float() for batch in batches])
