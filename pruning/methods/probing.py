"""Probing: tries a pruned block in the place of a dense one, and counts the probe images that still come out right.

The activations that enter the current block are kept, so a probe runs that block and the later ones alone; a probed
block is really built and repaired, so what is measured is what will be delivered.

B images, N tokens, C model width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.device_sharing import yield_device, yielding_between
from pruning.methods.prefix_cache import Threshold
from pruning.model.anatomy import Anatomy, blocks_of, classify, embed, summary_token
from pruning.model.surgery import as_slim
from pruning.model.tokens import merges
from pruning.plan import BlockPlan, Plan, TokenReduction
from pruning.precision import Precision, autocast
from pruning.repair.compensation import REPAIR_PASSES, BlockRepair, RepairedBlock, RepairedModel, repaired_model
from pruning.repair.flow import CalibrationStream, DenseStream
from pruning.repair.sensitivity import BlockSensitivity, measure_sensitivity
from pruning.scores.channel import ChannelScores, ScoringInput
from pruning.scores.criteria import CRITERIA
from pruning.spectrum import low_pass

SENSITIVITY_PASSES = 3
"""Cost of the sensitivity: one forward and one backward pass, in forward passes."""

BATCHES = 12
"""The fewest batches in which the probe images come to a block that is tried: most are decided by the first two."""

GRADIENT_IMAGES = 64
"""The most calibration images whose gradients score channels."""

SMALLEST_BATCH = 16
"""The fewest images a batch, where that takes fewer batches."""


@dataclass(frozen=True, kw_only=True)
class ProbingSettings:
    """Settings by which blocks are scored, pruned and run."""

    cutoff_channel: float = 0.1
    """Cutoff of the image filter of the channel score, in (0, 1]."""
    cutoff_token: float = 0.85
    """Cutoff of the token filter of the token score, in (0, 1]."""
    criterion: str = "lfs"
    """Score of the channels: a key of `pruning.scores.criteria.CRITERIA`."""
    token_reduction: TokenReduction = "lfe"
    alpha: float = 0.1
    """Weight of the cross-entropy in the channel score, in [0, 1]."""
    batch_size: int = 64
    precision: Precision = "float32"
    seed: int = 0
    """Seed of the random criterion."""


@dataclass
class Probe:
    """A block that is being tried, and what came of the probe images that it has run on so far, in their order."""

    repaired: RepairedBlock
    budget: Threshold
    """Probe images that the block may cost."""
    correct_before: int
    """Probe images that came out right before anything of this block was removed."""
    margins: list[Tensor] = field(default_factory=list)
    """(batch,) for every batch: logit of the label - largest other logit; above 0 where it comes out right."""
    after: list[Tensor] = field(default_factory=list)
    """(batch, N', C) for every batch, or (batch, N', C + 1) with sizes: output of the block."""
    num_seen: int = 0
    num_right: int = 0
    num_changed: int = 0
    """Images that came out otherwise than before the block was tried."""
    is_changing: bool = True
    """True if some of the last batch did."""

    def is_enough(self, num_right: int) -> bool:
        """Tells whether so many images that come out right are within budget."""
        return self.budget.reaches(self.correct_before - num_right)

    def take(self, margins: Tensor, is_right_before: Tensor) -> None:
        """Takes the margins of the next batch. Both (batch,)."""
        is_right = margins > 0
        num_changed = int((is_right != is_right_before).sum())
        self.margins.append(margins)
        self.num_seen += len(margins)
        self.num_right += int(is_right.sum())
        self.num_changed += num_changed
        self.is_changing = num_changed > 0


class Prober:
    """The images on their way through the blocks, from the first to the last, and what that has cost so far."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, probe: Images, calibration: Images, settings: ProbingSettings,
        sensitivity: list[BlockSensitivity] | None, dense: DenseStream | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            model: dense, in eval mode, on the device to work on.
            sensitivity: of the model on the calibration images; measured if it is not given.
            dense: of the model and the calibration images; made for this prober alone if it is not given.
        """
        self.model, self.anatomy, self.settings = model, anatomy, settings
        self.probe, self.calibration = probe, calibration
        self.num_probe = len(probe)
        self.probe_batch_size = min(settings.batch_size, max(SMALLEST_BATCH, self.num_probe // BATCHES))
        self.block_images = 0.0
        """Blocks run, times images, times the share of their tokens that is left."""
        if sensitivity is None:
            self.block_images += SENSITIVITY_PASSES * anatomy.depth * len(calibration)
            sensitivity = measure_sensitivity(
                model, calibration, batch_size=settings.batch_size, precision=settings.precision
            )
        if dense is None:
            self.block_images += anatomy.depth * len(calibration)
            dense = DenseStream(model, calibration, batch_size=settings.batch_size, precision=settings.precision)
        self.stream = CalibrationStream(
            model, calibration, sensitivity,
            token_reduction=settings.token_reduction, cutoff_token=settings.cutoff_token,
            batch_size=settings.batch_size, precision=settings.precision, dense=dense,
        )  # fmt: skip
        self._embed_probe()
        self._embed_calibration()
        self.order = torch.arange(self.num_probe, device=self.x_probe.device)
        """(B,): the order that `accept` gave the probe images."""
        self.accepted: tuple[nn.Module, Tensor] | None = None
        """Block that was accepted last, and its output for the probe images."""
        self._enter_first()
        self._probe_dense()

    def copy(self) -> Prober:
        """A copy between two blocks, to go on from; both share the tensors, which nobody changes."""
        other = copy.copy(self)
        other.stream = self.stream.copy()
        other.block_repair = BlockRepair(other.stream)
        return other

    def _count(self, num_blocks: float, num_images: int, num_tokens: int) -> None:
        block = self.anatomy.blocks[self.index]
        self.block_images += (
            num_blocks * num_images * min(1.0, num_tokens / (block.num_patches + block.num_prefix_tokens))
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the activations."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors_in([vars(self), vars(self.stream)]))

    @property
    def num_correct(self) -> int:
        """Probe images that come out right as the model is now."""
        return int(self.is_right.sum())

    @torch.no_grad()
    def _embed_probe(self) -> None:
        device, size = next(self.model.parameters()).device, self.settings.batch_size
        self.labels = self.probe.labels.to(device)
        with autocast(device, self.settings.precision):
            self.x_probe = _cat(embed(self.model, pixels) for pixels, _ in self.probe.batches(size, device))
        """(B, N, C), or (B, N, C + 1) with sizes: tokens of the probe images that enter the current block."""

    @torch.no_grad()
    def _embed_calibration(self) -> None:
        """Prepares the inputs of the channel score beside the stream; the filtered images are for lfs alone."""
        settings, device = self.settings, self.stream.x.device
        self.calibration_labels = self.calibration.labels.to(device)
        self.x_low, self.summaries = self.stream.x, [torch.empty(0)] * self.anatomy.depth
        if settings.criterion != "lfs":
            return
        with autocast(device, settings.precision):
            self.x_low = _cat(
                embed(self.model, low_pass(pixels, settings.cutoff_channel))
                for pixels, _ in self.calibration.batches(settings.batch_size, device)
            )
        # T of the channel score: the dense model's summary token after every block, images as they are.
        stream = self.stream.copy()
        for index, block in enumerate(blocks_of(self.model)):
            self.summaries[index] = summary_token(self.anatomy.blocks[index], stream.dense_out)
            stream.advance(block)

    def _enter_first(self) -> None:
        """Puts the images before the block that is probed first."""
        self._enter(0)

    def _enter(self, index: int) -> None:
        self.index, self.block_repair = index, BlockRepair(self.stream)
        self.dense, *self.later = blocks_of(self.model)[index:]
        if merges(self.settings.token_reduction):
            last = len(self.later) - 1
            anatomies = self.anatomy.blocks[index:]
            self.later = [as_slim(block, anatomies[1 + n], is_last=n == last) for n, block in enumerate(self.later)]
            self.dense = as_slim(self.dense, anatomies[0], is_last=not self.later)

    def _probe_dense(self) -> None:
        self.is_right = torch.zeros(self.num_probe, dtype=torch.bool, device=self.x_probe.device)
        """(B,): probe images that come out right as the model is now."""
        dense = Probe(RepairedBlock(block=self.dense), budget=Threshold(math.inf), correct_before=0)
        self.is_within(dense, surely=True)
        self.accept(dense)

    @torch.no_grad()
    def repair(self, plan: BlockPlan) -> RepairedBlock:
        """Repairs the current block under a plan.

        The calibration images run through the block, and before that their sampled tokens through its attention; from
        the second plan with the same attention on, through the first layer of the MLP alone.
        """
        num_blocks = 0.5 if self.block_repair.has_attention(plan) else 1.5
        self._count(num_blocks, len(self.calibration), self.stream.num_all_tokens)
        return self.block_repair.repair(plan)

    def is_within(self, probe: Probe, *, surely: bool) -> bool:
        """Tells whether enough probe images come out right with a block; goes on where its probe stopped before.

        The images come by the size of their margin so far, those that are nearly right or nearly wrong first.

        Args:
            surely: accepts a block only after all images. Otherwise those that were not run yet are taken to come out
                as before, once a whole batch does so, or as soon as those that were run cost more than the budget by
                the square root of how many of them came out otherwise.
        """
        while True:
            num_left = self.num_probe - probe.num_seen
            if not probe.is_enough(probe.num_right + num_left):
                return False
            if not num_left:
                return True
            yield_device()
            self._run_batch(probe)
            if surely:
                continue
            num_likely = probe.num_right + int(self.is_right[probe.num_seen :].sum())
            if not probe.is_enough(num_likely + math.isqrt(probe.num_changed)):
                return False
            if not probe.is_changing:
                return probe.is_enough(num_likely)

    @torch.no_grad()
    def _run_batch(self, probe: Probe) -> None:
        batch = slice(probe.num_seen, probe.num_seen + self.probe_batch_size)
        x, labels = self.x_probe[batch], self.labels[batch]
        with autocast(x.device, self.settings.precision):
            self._count(1, len(labels), x.shape[1])
            x = probe.repaired.block(x)
            probe.after.append(x)
            self._count(len(self.later), len(labels), x.shape[1])
            for block in self.later:
                x = block(x)
            logits = classify(self.model, x).float()
        largest_other = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        probe.take(logits.gather(1, labels[:, None])[:, 0] - largest_other, self.is_right[batch])

    def accept(self, probe: Probe) -> None:
        """Takes the outcome of a probe of all images as what the model does now, and orders them by their margins."""
        margins = torch.cat(probe.margins)
        order = margins.abs().argsort(stable=True)
        self.is_right = (margins > 0)[order]
        self.x_probe, self.labels, self.order = self.x_probe[order], self.labels[order], self.order[order]
        self.accepted = probe.repaired.block, torch.cat(probe.after).float()[order]

    def score(self, block: nn.Module) -> ChannelScores:
        """Scores the channels of the current block, whose tokens may be reduced already."""
        settings, images = self.settings, slice(None)
        num_tokens = self.stream.num_all_tokens
        if settings.criterion in ("lfs", "taylor"):
            # Of this block's weights a gradient is taken, which costs as much as two passes; through later ones, one.
            images = slice(0, GRADIENT_IMAGES)
            self._count(3 + 2 * len(self.later), min(GRADIENT_IMAGES, len(self.calibration)), num_tokens)
        elif settings.criterion != "random":
            self._count(1, len(self.calibration), num_tokens)
        scoring_input = ScoringInput(
            model=self.model, anatomy=self.anatomy.blocks[self.index], index=self.index,
            blocks=[block, *self.later], x=self.stream.x[images], x_low=self.x_low[images],
            targets=self.summaries[self.index][images], labels=self.calibration_labels[images], alpha=settings.alpha,
            batch_size=settings.batch_size, precision=settings.precision, seed=settings.seed, repair=self.block_repair,
        )  # fmt: skip
        return CRITERIA[settings.criterion](scoring_input)

    def advance(self, block: nn.Module) -> None:
        """Takes all activations through the finished block, on to the next."""
        self._count(1, len(self.calibration), self.stream.num_all_tokens)
        self.stream.advance(block)
        if self.accepted is not None and self.accepted[0] is block:
            self.x_probe = self.accepted[1]
        else:
            self.x_probe = self._run(block, self.x_probe)
        self.accepted = None
        self.x_low = self._run(block, self.x_low) if self.settings.criterion == "lfs" else self.stream.x
        if self.later:
            self._enter(self.index + 1)

    def repair_all(self, plan: Plan) -> RepairedModel:
        """Repairs the dense model under a plan of all blocks, from the first to the last."""
        passes = REPAIR_PASSES - SENSITIVITY_PASSES
        self.block_images += passes * self.anatomy.depth * len(self.calibration)
        return repaired_model(
            self.model, plan, self.calibration, self.stream.sensitivity,
            batch_size=self.settings.batch_size, precision=self.settings.precision,
        )  # fmt: skip

    @torch.no_grad()
    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        self._count(1, len(x), x.shape[1])
        with autocast(x.device, self.settings.precision):
            return _cat(block(batch) for batch in yielding_between(x.split(self.settings.batch_size)))


class TopDownProber(Prober):
    """The images on their way through the blocks, from the last to the first.

    The input of a block comes from dense blocks, and is computed anew for each block: to keep it for all blocks would
    take the memory of all their activations.
    """

    def _enter_first(self) -> None:
        self.embedded = self.x_probe, self.x_low, self.stream.x
        """(x_probe, x_low, calibration stream) after the embedding, images in their own order."""
        self.built: list[nn.Module] = []
        self._enter(self.anatomy.depth - 1)

    def _enter(self, index: int) -> None:
        self.index, self.dense, self.later = index, blocks_of(self.model)[index], self.built
        x_probe, x_low, x_calibration = self.embedded
        self.x_probe = self._run_up_to(index, x_probe)[self.order]
        self.stream.turn_to(index, self._run_up_to(index, x_calibration))
        self.block_repair = BlockRepair(self.stream)
        self.x_low = self._run_up_to(index, x_low) if self.settings.criterion == "lfs" else self.stream.x

    def _run_up_to(self, index: int, x: Tensor) -> Tensor:
        for block in blocks_of(self.model)[:index]:
            x = self._run(block, x)
        return x

    def advance(self, block: nn.Module) -> None:
        """Puts the finished block behind all that come, and goes back by one."""
        self.built = [block, *self.built]
        if self.index:
            self._enter(self.index - 1)


def _cat(batches: Iterable[Tensor]) -> Tensor:
    return torch.cat([batch.float() for batch in batches])


def _tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors_in(part)
