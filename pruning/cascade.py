"""The bottom-up cascade (VTC-LFC): block after block, tokens then channels, within a budget of accuracy a block.

Blocks go from the first to the last, because what an earlier block passes on decides what a later one is worth.
The activations that enter the current block are kept, so a probe runs that block and the later ones alone; a probed
block is really built and repaired, so what is measured is what will be delivered.

B images, N tokens, C model width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.anatomy import Anatomy, blocks_of, classify, embed, examine, summary_token, with_blocks
from pruning.compensation import RIDGE, BlockMoments, block_moments, repair_block
from pruning.cost import count_macs
from pruning.data import Images
from pruning.errors import SettingError
from pruning.plan import BlockPlan, Plan
from pruning.precision import Precision, autocast
from pruning.ranking import Ranking
from pruning.scores.lfs import ChannelScores, score_channels
from pruning.spectrum import low_pass
from pruning.surgery import keep_all_block, slim_block


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
    token_share: float = 0.56
    """Share of a block's budget that tokens may spend, in [0, 1]; channels get what they leave."""
    alpha: float = 0.1
    """Weight of the cross-entropy in the channel score, in [0, 1]."""
    ridge: float = RIDGE
    """Of the compensation, as a share of the mean variance."""
    num_levels: int = 15
    """Counts that are tried for tokens, and for channels, between none and all that may go."""
    batch_size: int = 64
    precision: Precision = "float32"


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


def cascade(model: nn.Module, probe: Images, calibration: Images, settings: CascadeSettings) -> CascadeResult:
    """Prunes a dense model from the bottom up; the model is left as it was.

    Args:
        model: dense, in eval mode, on the device to work on.
        probe: images whose accuracy the budgets are about.
        calibration: images for the scores and the repair.

    Raises:
        SettingError: not one budget a block, or a negative one.
    """
    anatomy = examine(model)
    budgets = settings.drop_budget
    if len(budgets) != anatomy.depth or not all(0 <= budget < math.inf for budget in budgets):
        raise SettingError(f"drop budgets {budgets} for {anatomy.depth} blocks; give one of at least 0 for each")
    plans = [keep_all_block(anatomy)] * anatomy.depth
    built: list[nn.Module] = []
    drops = [0.0] * anatomy.depth
    work: _Work | None = None  # a model that is small enough as it is costs no pass at all
    while len(built) < anatomy.depth and count_macs(anatomy, Plan(blocks=tuple(plans))) > settings.target_macs:
        work = _Work(model, anatomy, probe, calibration, settings) if work is None else work
        index, before = len(built), work.correct
        plans, block = _prune_block(work, plans, index, budgets[index])
        built.append(block)
        drops[index] = (before - work.correct) / len(probe) * 100
        work.advance(block)
    built += [copy.deepcopy(block) for block in blocks_of(model)[len(built) :]]
    return CascadeResult(
        plan=Plan(blocks=tuple(plans), cutoff_token=settings.cutoff_token),
        model=with_blocks(model, built),
        block_drops=tuple(drops),
        forward_passes=0.0 if work is None else work.block_images / (anatomy.depth * len(probe)),
    )


def _prune_block(work: _Work, plans: list[BlockPlan], index: int, budget: float) -> tuple[list[BlockPlan], nn.Module]:
    """The plans with block `index` pruned as far as its budget and the target allow, and that block, built."""
    anatomy, settings = work.anatomy, work.settings
    before = work.correct
    allowed = budget / 100 * work.num_probe
    num_tokens = plans[index].num_tokens

    def with_block(plan: BlockPlan) -> list[BlockPlan]:
        later = [keep_all_block(anatomy, plan.num_tokens)] * (anatomy.depth - index - 1)
        return [*plans[:index], plan, *later]

    def reaches_target(plan: BlockPlan) -> bool:
        return count_macs(anatomy, Plan(blocks=tuple(with_block(plan)))) <= settings.target_macs

    def fewer_tokens(removed: int) -> BlockPlan:
        return keep_all_block(anatomy, num_tokens - removed)

    def within_tokens(removed: int) -> bool:
        return work.try_block(work.build(fewer_tokens(removed)), before - _whole(settings.token_share * allowed))

    levels = _levels(num_tokens - 1, settings.num_levels, lambda removed: reaches_target(fewer_tokens(removed)))
    plan = fewer_tokens(_most_within(levels, within_tokens))
    block = work.build(plan)
    if not reaches_target(plan):
        ranking = Ranking(work.score(block), anatomy)
        moments = work.moments(block)
        tokens_left = plan.num_tokens

        def fewer_channels(removed: int) -> BlockPlan:
            return ranking.plan(removed, tokens_left)

        def within_channels(removed: int) -> bool:
            return work.try_block(work.build(fewer_channels(removed), moments), before - _whole(allowed))

        levels = _levels(
            ranking.max_removed, settings.num_levels, lambda removed: reaches_target(fewer_channels(removed))
        )
        removed = _most_within(levels, within_channels)
        if removed:
            plan = fewer_channels(removed)
            block = work.build(plan, moments)
    return with_block(plan), block


class _Work:
    """The state of a walk through the blocks: what enters the current one, and what the walk has cost so far."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, probe: Images, calibration: Images, settings: CascadeSettings
    ) -> None:
        self.model, self.anatomy, self.settings = model, anatomy, settings
        self.probe, self.calibration = probe, calibration
        self.num_probe = len(probe)
        self.block_images = 0.0
        """Blocks run, times images; a backward pass counts as two forward passes."""
        self._embed()
        self._turn_to(0)
        self.correct = self._sort_by_margin()
        """Probe images that the model classifies correctly as it is now."""

    def _turn_to(self, index: int) -> None:
        self.index = index
        self.dense, *self.later = blocks_of(self.model)[index:]

    @torch.no_grad()
    def _embed(self) -> None:
        device = next(self.model.parameters()).device
        settings, size = self.settings, self.settings.batch_size
        self.labels = self.probe.labels.to(device)
        self.calibration_labels = self.calibration.labels.to(device)
        with autocast(device, settings.precision):
            self.x = _cat(embed(self.model, batch) for batch, _ in self.probe.batches(size, device))
            self.x_clean = _cat(embed(self.model, batch) for batch, _ in self.calibration.batches(size, device))
            self.x_low = _cat(
                embed(self.model, low_pass(batch, settings.cutoff_channel))
                for batch, _ in self.calibration.batches(size, device)
            )
        # T of the channel score: the dense model's summary token after every block, images as they are.
        self.summaries = []
        x = self.x_clean
        for block in blocks_of(self.model):
            x = self._run(block, x)
            self.summaries.append(summary_token(self.anatomy, x))

    def build(self, plan: BlockPlan, moments: BlockMoments | None = None) -> nn.Module:
        """The current block by a plan, repaired where moments are given."""
        num_tokens_in = self.x.shape[1] - self.anatomy.num_prefix_tokens
        slim = slim_block(self.dense, plan, self.anatomy, num_tokens_in, self.settings.cutoff_token)
        if moments is not None:
            repair_block(slim, self.dense, plan, self.anatomy, moments, self.settings.ridge)
        return slim

    def try_block(self, block: nn.Module, at_least: int) -> bool:
        """Whether at least so many probe images stay correct with this block; keeps the count if so."""
        correct = self._count_correct([block, *self.later], at_least)
        if correct is None:
            return False
        self.correct = correct
        return True

    def score(self, block: nn.Module) -> ChannelScores:
        """Channel scores of the current block, whose tokens may be reduced already."""
        self.block_images += 3 * (1 + len(self.later)) * len(self.x_low)
        return score_channels(
            self.model, self.anatomy, [block, *self.later], self.x_low, self.summaries[self.index],
            self.calibration_labels, alpha=self.settings.alpha, batch_size=self.settings.batch_size,
            precision=self.settings.precision,
        )  # fmt: skip

    def moments(self, block: nn.Module) -> BlockMoments:
        self.block_images += len(self.x_clean)
        return block_moments(
            block, self.x_clean, batch_size=self.settings.batch_size, precision=self.settings.precision
        )

    def advance(self, block: nn.Module) -> None:
        """Takes all activations through the finished block, on to the next."""
        self.x, self.x_clean, self.x_low = (self._run(block, x) for x in (self.x, self.x_clean, self.x_low))
        if self.later:
            self._turn_to(self.index + 1)

    @torch.no_grad()
    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        self.block_images += len(x)
        with autocast(x.device, self.settings.precision):
            return _cat(block(batch) for batch in x.split(self.settings.batch_size))

    @torch.no_grad()
    def _sort_by_margin(self) -> int:
        """Puts the probe images that are wrong, then those that are nearly so, first; gives how many are right.

        A pruning step that costs too much loses the images of small margin. With these in front, and all others
        taken to come out right, it is refused after a part of the pass, and never wrongly.
        """
        batches = []
        for x in self.x.split(self.settings.batch_size):
            with autocast(x.device, self.settings.precision):
                for block in (self.dense, *self.later):
                    x = block(x)
                batches.append(classify(self.model, x).float())
        self.block_images += (1 + len(self.later)) * self.num_probe
        logits, labels = torch.cat(batches), self.labels[:, None]
        margin = logits.gather(1, labels)[:, 0] - logits.scatter(1, labels, -torch.inf).amax(dim=1)
        correct = int((logits.argmax(dim=1) == self.labels).sum())
        order = margin.argsort()
        self.x, self.labels = self.x[order], self.labels[order]
        return correct

    @torch.no_grad()
    def _count_correct(self, blocks: Sequence[nn.Module], at_least: int) -> int | None:
        """Probe images that come out right; None as soon as fewer than `at_least` is certain."""
        correct, size = 0, self.settings.batch_size
        for start in range(0, self.num_probe, size):
            x, labels = self.x[start : start + size], self.labels[start : start + size]
            with autocast(x.device, self.settings.precision):
                for block in blocks:
                    x = block(x)
                logits = classify(self.model, x)
            self.block_images += len(blocks) * len(labels)
            correct += int((logits.argmax(dim=1) == labels).sum())
            if correct + self.num_probe - start - len(labels) < at_least:
                return None
        return correct


def _levels(most: int, count: int, reaches_target: Callable[[int], bool]) -> list[int]:
    """Up to `count` removals, ascending and even, from 1 to the first that reaches the target, or to `most`."""
    low, high = 0, most
    if most and reaches_target(most):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches_target(middle) else (middle, high)
    return sorted({math.ceil(high * level / count) for level in range(1, count + 1)} - {0})


def _most_within(levels: Sequence[int], within: Callable[[int], bool]) -> int:
    """The largest level that is within budget, by bisection: a larger removal is taken to cost more. 0 if none is."""
    best, low, high = 0, 0, len(levels) - 1
    while low <= high:
        middle = (low + high) // 2
        if within(levels[middle]):
            best, low = levels[middle], middle + 1
        else:
            high = middle - 1
    return best


def _whole(images: float) -> int:
    """Whole images in a budget; a hair above, so that 1 % of 500 is 5 in floating point too."""
    return math.floor(images + 1e-9)


def _cat(batches: Iterable[Tensor]) -> Tensor:
    return torch.cat([batch.float() for batch in batches])
