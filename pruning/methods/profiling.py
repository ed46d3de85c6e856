"""Measures a profile: channels by removal curves, tokens by removing them from one block at a time.

Both predictions are then held against one pruned model each, since the costs of single removals do not add up exactly.

B images, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.device_sharing import yielding_between
from pruning.errors import TargetError
from pruning.losses import divergence
from pruning.measure.accuracy import predict
from pruning.measure.cost import count_macs
from pruning.methods.allocation import allocate, kept_channels, kept_units
from pruning.methods.profile import REMOVED_SHARES, Profile, block_costs
from pruning.model.anatomy import Anatomy, blocks_of, classify, embed, examine
from pruning.model.surgery import apply_plan, as_slim, keep_all_block, keep_all_plan, slim_block
from pruning.plan import Plan, TokenReduction
from pruning.precision import Precision, autocast
from pruning.repair.compensation import REPAIR_PASSES, BlockRepair, repaired_model
from pruning.repair.flow import CalibrationStream
from pruning.repair.sensitivity import BlockSensitivity, measure_sensitivity
from pruning.scores.curves import RemovalCurves, measure_curves

CHANNEL_TRIAL, TOKEN_TRIAL = 0.9, 0.65
"""Shares of the dense multiply-adds at which a model with fewer channels, and one with fewer tokens, is measured to
scale its prediction. Both lose little there: farther down, the errors are no longer small."""

TOKEN_IMAGES = 24
"""The probe images on which single removals are measured.

Divergence of repaired ViT-Tinys, beside plans of seven shares on 64 images: with 24 images -0.037 +- 0.026 and -0.016
+- 0.058 at 0.38 and 0.30 of the multiply-adds, with 16 +0.056 +- 0.032 and +0.111 +- 0.057, with 32 as with 24.
"""

CHANNEL_TRIALS = {"qk": 1 / 2, "v": 3 / 8, "hidden": 1 / 4}
"""Kind of channels -> the share of them that is removed from one block alone to scale its curve."""

NUM_TRIAL_BLOCKS = 6
"""Number of blocks, evenly from the first to the last, whose curves are scaled so; between two, the logarithms of the
scales are interpolated."""

MOST_SCALE = 100.0
"""The most that a curve is raised or lowered; a model that answers anything loses nothing by any removal."""

SCALE_IMAGES = 64
"""The calibration images that repair the model with fewer channels, and the probe images that measure both models."""


@dataclass(frozen=True, kw_only=True)
class _DenseAnswers:
    """Some images on their way through the dense model."""

    streams: list[Tensor]
    """(B, N, C) for every block: its input."""
    logits: Tensor
    """(B, K)."""


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A dense model that is profiled, with its images and how it runs."""

    model: nn.Module
    anatomy: Anatomy
    sensitivity: list[BlockSensitivity]
    calibration: Images
    probe: Images
    token_reduction: TokenReduction
    cutoff_token: float
    batch_size: int
    precision: Precision

    @property
    def reduces_tokens(self) -> bool:
        return self.token_reduction != "none"

    @property
    def trial_blocks(self) -> list[int]:
        """The blocks whose curves are scaled by removals that are measured."""
        last = self.anatomy.depth - 1
        return sorted({round(step * last / (NUM_TRIAL_BLOCKS - 1)) for step in range(NUM_TRIAL_BLOCKS)})

    @cached_property
    @torch.no_grad()
    def dense(self) -> _DenseAnswers:
        """The first `TOKEN_IMAGES` probe images on their way through the dense model."""
        probe, streams = self.probe.take(slice(0, TOKEN_IMAGES)), list[Tensor]()
        with autocast(device := next(self.model.parameters()).device, self.precision):
            streams.append(torch.cat([embed(self.model, x) for x, _ in probe.batches(self.batch_size, device)]))
        for block in blocks_of(self.model):
            streams.append(self.run([block], streams[-1]))
        return _DenseAnswers(logits=self.run([partial(classify, self.model)], streams.pop()), streams=streams)

    def run(self, layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """Runs images (B, N, C) through layers, in batches."""
        after = []
        with autocast(x.device, self.precision):
            for batch in yielding_between(x.split(self.batch_size)):
                for layer in layers:
                    batch = layer(batch)
                after.append(batch.float())
        return torch.cat(after)

    def divergence(self, blocks: Sequence[nn.Module], index: int) -> float:
        """Measures what it costs, in nats, to have these blocks in the place of all from `index` on."""
        logits = self.run([*blocks, partial(classify, self.model)], self.dense.streams[index])
        return divergence(self.dense.logits, logits).item()


def measure_profile(
    model: nn.Module, calibration: Images, probe: Images, *, token_reduction: TokenReduction,
    cutoff_token: float = 0.85, batch_size: int = 64, precision: Precision = "float32",
    sensitivity: list[BlockSensitivity] | None = None, channels: tuple[RemovalCurves, ...] | None = None,
    tokens: tuple[tuple[float, ...], ...] | None = None,
) -> Profile:  # fmt: skip
    """Measures the profile of a dense model in eval mode; its tensors are on the CPU.

    Args:
        calibration: for the channel curves; the first `SCALE_IMAGES` of them repair a pruned model.
        probe: the first `TOKEN_IMAGES` tell what single removals cost, the first `SCALE_IMAGES` what pruned models do.
        sensitivity: of the model on the calibration images; measured if it is not given.
        channels: of `measure_channel_curves`; they are the same for every token reduction.
        tokens: of `measure_token_costs`.
    """
    parts = _Known(sensitivity=sensitivity is not None, channels=channels is not None, tokens=tokens is not None)
    if sensitivity is None:
        sensitivity = measure_sensitivity(model, calibration, batch_size=batch_size, precision=precision)
    subject = _Subject(
        model=model, anatomy=examine(model), sensitivity=sensitivity, calibration=calibration, probe=probe,
        token_reduction=token_reduction, cutoff_token=cutoff_token, batch_size=batch_size, precision=precision,
    )  # fmt: skip
    profile = Profile(
        channels=_channel_curves(subject) if channels is None else channels, channel_scale=1.0, token_scale=1.0,
        tokens=_token_costs(subject) if tokens is None else tokens,
        token_reduction=token_reduction, cutoff_token=cutoff_token, forward_passes=_forward_passes(subject, parts),
    )  # fmt: skip
    channel_scale, token_scale = _scales(subject, profile)
    return replace(profile, channel_scale=channel_scale, token_scale=token_scale)


def measure_channel_curves(
    model: nn.Module, calibration: Images, probe: Images, sensitivity: list[BlockSensitivity], *,
    batch_size: int = 64, precision: Precision = "float32",
) -> tuple[RemovalCurves, ...]:  # fmt: skip
    """Measures the part of a profile that is about channels; the arguments are those of `measure_profile`."""
    return _channel_curves(_Subject(
        model=model, anatomy=examine(model), sensitivity=sensitivity, calibration=calibration, probe=probe,
        token_reduction="none", cutoff_token=1.0, batch_size=batch_size, precision=precision,
    ))  # fmt: skip


def measure_token_costs(
    model: nn.Module, probe: Images, *, token_reduction: TokenReduction, cutoff_token: float = 0.85,
    batch_size: int = 64, precision: Precision = "float32",
) -> tuple[tuple[float, ...], ...]:  # fmt: skip
    """Measures the part of a profile that is about tokens; the arguments are those of `measure_profile`."""
    return _token_costs(_Subject(
        model=model, anatomy=examine(model), sensitivity=[], calibration=probe, probe=probe,
        token_reduction=token_reduction, cutoff_token=cutoff_token, batch_size=batch_size, precision=precision,
    ))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Known:
    """Parts of a profile that were measured before."""

    sensitivity: bool
    channels: bool
    tokens: bool


def _channel_curves(subject: _Subject) -> tuple[RemovalCurves, ...]:
    """The removal curves of every block, each as the dense model feeds it, scaled by what removals cost in truth."""
    depth, trial_blocks = subject.anatomy.depth, subject.trial_blocks
    stream = CalibrationStream(
        subject.model, subject.calibration, subject.sensitivity,
        token_reduction=subject.token_reduction, cutoff_token=subject.cutoff_token,
        batch_size=subject.batch_size, precision=subject.precision,
    )  # fmt: skip
    curves, scales = list[RemovalCurves](), list[list[float]]()
    for index in range(depth):
        if index:
            stream.turn_to(index, stream.dense_out)
        repair = BlockRepair(stream)
        curves.append(measure_curves(repair))
        if index in trial_blocks:
            scales.append([_curve_scale(subject, repair, curves[-1], kind) for kind in CHANNEL_TRIALS])
    interpolated = [np.interp(range(depth), trial_blocks, np.log(of_kind)) for of_kind in zip(*scales, strict=True)]
    return tuple(
        replace(one, **{
            kind: float(np.exp(log_scales[index])) * getattr(one, kind)
            for kind, log_scales in zip(CHANNEL_TRIALS, interpolated, strict=True)
        })
        for index, one in enumerate(curves)
    )  # fmt: skip


@torch.no_grad()
def _curve_scale(subject: _Subject, repair: BlockRepair, curves: RemovalCurves, kind: str) -> float:
    """The measured cost of removing channels of one kind from one block, repaired, over the cost that its curve says.

    Curves know the error of images they were fitted on, and to second order; others lose more: ten times as much in
    the late blocks of ViT-Tiny, half as much in the first one.
    """
    index, order = repair.index, getattr(curves, f"{kind}_order")
    width = order.shape[-1]
    left = round(width * (1 - CHANNEL_TRIALS[kind]))
    predicted = float(getattr(curves, kind)[width - left])
    if predicted <= 0:
        return 1.0
    kept: Any = kept_units(order, left) if order.ndim == 1 else kept_channels(order, left)
    plan = replace(keep_all_block(subject.anatomy.blocks[index]), **{f"keep_{kind}": kept})
    later = blocks_of(subject.model)[index + 1 :]
    measured = subject.divergence([repair.repair(plan).block, *later], index)
    return min(max(measured / predicted, 1 / MOST_SCALE), MOST_SCALE)


@torch.no_grad()
def _token_costs(subject: _Subject) -> tuple[tuple[float, ...], ...]:
    """The divergence when one block alone removes a share of its tokens, for every block and share.

    Tried and lost on ViT-Tiny: predictions that run no later block. By the standard deviation of the difference of
    logarithms from the costs on 64 other images, where four measured shares on 16 images have 0.50 to 0.56: the metric
    of the error that the removal leaves in the stream has 0.9 to 1.7 at its best power; that of the error which the
    next attention makes of it 0.8 to 1.5; the gradient times the error, summed over an image's tokens before the
    square, 0.7 to 1.1; and each of these scaled by one or two measured shares of every block 0.6 to 1.1.
    """
    blocks = list(blocks_of(subject.model))
    if not subject.reduces_tokens:
        return ((),) * len(blocks)
    anatomies = subject.anatomy.blocks
    slim = [
        as_slim(block, anatomy, is_last=block is blocks[-1]) for block, anatomy in zip(blocks, anatomies, strict=True)
    ]
    costs = np.zeros((len(blocks), len(REMOVED_SHARES)))
    for index in range(len(blocks)):
        for column, count in enumerate(_tokens_left(subject)):
            costs[index, column] = subject.divergence(
                [_reducing_block(subject, index, count), *slim[index + 1 :]], index
            )  # fmt: skip
    return tuple(tuple(row) for row in np.maximum.accumulate(costs, axis=1).tolist())


def _tokens_left(subject: _Subject) -> list[int]:
    """The number of patch tokens that are left by each of the `REMOVED_SHARES`."""
    return [max(1, round(subject.anatomy.blocks[0].num_patches * (1 - share))) for share in REMOVED_SHARES]


def _reducing_block(subject: _Subject, index: int, num_tokens: int) -> nn.Module:
    """A block with all its channels that lets `num_tokens` patch tokens go on."""
    block = subject.anatomy.blocks[index]
    return slim_block(
        blocks_of(subject.model)[index], keep_all_block(block, num_tokens), block, num_tokens_in=block.num_patches,
        token_reduction=subject.token_reduction, cutoff_token=subject.cutoff_token,
        is_last=index == subject.anatomy.depth - 1,
    )  # fmt: skip


def _scales(subject: _Subject, profile: Profile) -> tuple[float, float]:
    """The measured costs of two pruned models over their predicted ones, 1 at least: of fewer channels, fewer tokens.

    The one with fewer channels is repaired. The other is not: removals were measured without a repair too.

    Args:
        profile: unscaled.
    """
    probe, calibration = subject.probe.take(slice(0, SCALE_IMAGES)), subject.calibration.take(slice(0, SCALE_IMAGES))
    batches: dict[str, Any] = {"batch_size": subject.batch_size, "precision": subject.precision}
    dense_logits = predict(subject.model, probe, **batches)

    def scale(plan: Plan, pruned: nn.Module) -> float:
        measured = divergence(dense_logits, predict(pruned, probe, **batches)).item()
        predicted = sum(map(sum, block_costs(profile, subject.anatomy, plan)))
        return max(1.0, measured / max(predicted, 1e-9))

    channel_scale = token_scale = 1.0
    if plan := _trial_plan(subject, profile, CHANNEL_TRIAL, token_share=0.0):
        repaired = repaired_model(subject.model, plan, calibration, subject.sensitivity, **batches)
        channel_scale = token_scale = scale(plan, repaired.model)
    if subject.reduces_tokens and (plan := _trial_plan(subject, profile, TOKEN_TRIAL, token_share=1.0)):
        token_scale = scale(plan, apply_plan(subject.model, plan))
    return channel_scale, token_scale


def _trial_plan(subject: _Subject, profile: Profile, share_of_macs: float, *, token_share: float) -> Plan | None:
    """The plan of a pruned model of so many of the dense multiply-adds; None where no plan is that small.

    Args:
        token_share: 0 for a model with fewer channels, 1 for one with fewer tokens.
    """
    anatomy = subject.anatomy
    try:
        return allocate(profile, anatomy, int(share_of_macs * count_macs(anatomy, keep_all_plan(anatomy))), token_share)
    except TargetError:  # nearly all of the model is patch embedding and classifier
        return None


def _forward_passes(subject: _Subject, known: _Known) -> float:
    """The cost of a profile, in forward passes over the calibration images."""
    calibration, probe, depth = len(subject.calibration), len(subject.probe), subject.anatomy.depth
    num_images = min(TOKEN_IMAGES, probe)
    passes = 0.0 if known.sensitivity else 3.0
    if not known.channels:
        passes += 2.0  # the dense stream, and every block once more for the moments
        for index in subject.trial_blocks:  # a repair of the block, which then runs with all later ones
            passes += len(CHANNEL_TRIALS) * (1.5 + (depth - index) * num_images / calibration) / depth
    measures_tokens = subject.reduces_tokens and not known.tokens
    if not known.channels or measures_tokens:
        passes += num_images / calibration
    # The model with fewer channels: its repair, its answers and those of the dense one.
    passes += (REPAIR_PASSES - 3) * min(SCALE_IMAGES, calibration) / calibration
    passes += 2 * min(SCALE_IMAGES, probe) / calibration
    if measures_tokens:
        num_patches = subject.anatomy.blocks[0].num_patches
        # A removal runs its own block and the later ones, (depth + 1) / 2 of them on average, with the tokens left.
        removals = (depth + 1) / 2 * sum(count / num_patches for count in _tokens_left(subject))
        passes += removals * num_images / calibration
    if subject.reduces_tokens:
        passes += TOKEN_TRIAL * min(SCALE_IMAGES, probe) / calibration
    return passes
