"""Measures a profile: channels by removal curves, tokens by removing them from one block at a time.

Each prediction is then held against one pruned model, since the predictions of single removals do not add up exactly.

B images, L blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.device_sharing import yielding_between
from pruning.errors import TargetError
from pruning.losses import divergence
from pruning.measure.accuracy import predict
from pruning.measure.cost import count_macs
from pruning.methods.allocation import allocate
from pruning.methods.profile import REMOVED_SHARES, Profile, block_costs
from pruning.model.anatomy import Anatomy, blocks_of, classify, embed, examine
from pruning.model.surgery import as_slim, keep_all_block, keep_all_plan, slim_block
from pruning.plan import TokenReduction
from pruning.precision import Precision, autocast
from pruning.repair.compensation import BlockRepair, repaired_model
from pruning.repair.flow import CalibrationStream
from pruning.repair.sensitivity import BlockSensitivity, measure_sensitivity
from pruning.scores.curves import RemovalCurves, measure_curves

CHANNEL_TRIAL, TOKEN_TRIAL = 0.9, 0.65
"""Shares of the dense multiply-adds at which a model with fewer channels, and one with fewer tokens, is measured to
scale its prediction. Both lose little there: farther down, the errors are no longer small."""


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

    def predict(self, model: nn.Module) -> Tensor:
        """The logits of a model on the probe images."""
        return predict(model, self.probe, batch_size=self.batch_size, precision=self.precision)


def measure_profile(
    model: nn.Module, calibration: Images, probe: Images, *, token_reduction: TokenReduction,
    cutoff_token: float = 0.85, batch_size: int = 64, precision: Precision = "float32",
    sensitivity: list[BlockSensitivity] | None = None,
) -> Profile:  # fmt: skip
    """Measures the profile of a dense model in eval mode; its tensors are on the CPU.

    Args:
        calibration: for the channel curves.
        probe: images on which the cost of removing tokens is measured, and that of the pruned models.
        sensitivity: of the model on the calibration images; measured if it is not given.
    """
    if sensitivity is None:
        sensitivity = measure_sensitivity(model, calibration, batch_size=batch_size, precision=precision)
    subject = _Subject(
        model=model, anatomy=examine(model), sensitivity=sensitivity, calibration=calibration, probe=probe,
        token_reduction=token_reduction, cutoff_token=cutoff_token, batch_size=batch_size, precision=precision,
    )  # fmt: skip
    profile = Profile(
        channels=_channel_curves(subject), channel_scale=1.0, token_scale=1.0, tokens=_token_costs(subject),
        token_reduction=token_reduction, cutoff_token=cutoff_token, forward_passes=_forward_passes(subject),
    )  # fmt: skip
    dense_logits = subject.predict(model)
    channel_scale = token_scale = _scale(subject, profile, dense_logits, CHANNEL_TRIAL, token_share=0.0)
    if subject.reduces_tokens:
        token_scale = _scale(subject, profile, dense_logits, TOKEN_TRIAL, token_share=1.0)
    return replace(profile, channel_scale=channel_scale, token_scale=token_scale)


def _channel_curves(subject: _Subject) -> tuple[RemovalCurves, ...]:
    """The removal curves of every block, each as the dense model feeds it."""
    stream = CalibrationStream(
        subject.model, subject.calibration, subject.sensitivity,
        token_reduction=subject.token_reduction, cutoff_token=subject.cutoff_token,
        batch_size=subject.batch_size, precision=subject.precision,
    )  # fmt: skip
    curves = []
    for block in blocks_of(subject.model):
        curves.append(measure_curves(BlockRepair(stream)))
        stream.advance(block)
    return tuple(curves)


@torch.no_grad()
def _token_costs(subject: _Subject) -> tuple[tuple[float, ...], ...]:
    """The divergence when one block alone removes a share of its tokens, for every block and share."""
    model, blocks = subject.model, list(blocks_of(subject.model))
    if not subject.reduces_tokens:
        return ((),) * len(blocks)
    anatomies, device = subject.anatomy.blocks, next(model.parameters()).device
    slim = [
        as_slim(block, anatomy, is_last=block is blocks[-1]) for block, anatomy in zip(blocks, anatomies, strict=True)
    ]
    counts = [max(1, round(anatomies[0].num_patches * (1 - share))) for share in REMOVED_SHARES]
    costs = np.zeros((len(blocks), len(REMOVED_SHARES)))
    for pixels, _ in subject.probe.batches(subject.batch_size, device):
        with autocast(device, subject.precision):
            streams = [embed(model, pixels)]
            for block in blocks:
                streams.append(block(streams[-1]))
            dense_logits = classify(model, streams.pop()).float()
            for index, stream in enumerate(streams):
                for column, count in enumerate(yielding_between(counts)):
                    x = _reducing_block(subject, index, count)(stream)
                    for block in slim[index + 1 :]:
                        x = block(x)
                    cost = divergence(dense_logits, classify(model, x).float()).item()
                    costs[index, column] += cost * len(pixels) / len(subject.probe)
    return tuple(tuple(row) for row in np.maximum.accumulate(costs, axis=1).tolist())


def _reducing_block(subject: _Subject, index: int, num_tokens: int) -> nn.Module:
    """A block with all its channels that lets `num_tokens` patch tokens go on."""
    block = subject.anatomy.blocks[index]
    return slim_block(
        blocks_of(subject.model)[index], keep_all_block(block, num_tokens), block, num_tokens_in=block.num_patches,
        token_reduction=subject.token_reduction, cutoff_token=subject.cutoff_token,
        is_last=index == subject.anatomy.depth - 1,
    )  # fmt: skip


def _scale(
    subject: _Subject, profile: Profile, dense_logits: Tensor, share_of_macs: float, *, token_share: float
) -> float:
    """The measured cost of a pruned and repaired model over its predicted cost; 1 at least.

    Args:
        profile: unscaled.
        dense_logits: of the probe images.
        share_of_macs: multiply-adds of the pruned model / those of the dense model.
        token_share: 0 for a model with fewer channels, 1 for one with fewer tokens.
    """
    anatomy = subject.anatomy
    target_macs = int(share_of_macs * count_macs(anatomy, keep_all_plan(anatomy)))
    try:
        plan = allocate(profile, anatomy, target_macs, token_share)
    except TargetError:  # nearly all of the model is patch embedding and classifier
        return 1.0
    pruned = repaired_model(
        subject.model, plan, subject.calibration, subject.sensitivity,
        batch_size=subject.batch_size, precision=subject.precision,
    )  # fmt: skip
    measured = divergence(dense_logits, subject.predict(pruned.model)).item()
    predicted = sum(map(sum, block_costs(profile, anatomy, plan)))
    return max(1.0, measured / max(predicted, 1e-9))


def _forward_passes(subject: _Subject) -> float:
    """The cost of a profile, in forward passes over the calibration images."""
    num_trials = 2 if subject.reduces_tokens else 1
    # Each share of each block runs that block and the later ones: (depth + 1) / 2 of a pass on average.
    probed = len(REMOVED_SHARES) * (subject.anatomy.depth + 1) / 2 + 1 if subject.reduces_tokens else 0
    # Sensitivity 3, curves 1, the dense stream 1, a trial 3; on the probe images the answers of the models.
    probe_share = len(subject.probe) / len(subject.calibration)
    return 5 + 3 * num_trials + probe_share * (1 + num_trials + probed)
