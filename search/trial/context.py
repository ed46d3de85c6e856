"""The trial context: the dense model, its exits, the images, and all that was measured once for every trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pruning.data import Splits
from pruning.measure.cost import count_macs
from pruning.measure.stopwatch import MIN_ROUNDS, Timing, device_id, time_against_dense
from pruning.measure.widths import AllowedWidths
from pruning.methods.profile import Profile
from pruning.model.anatomy import Anatomy, examine
from pruning.model.exits import ExitHead
from pruning.model.surgery import keep_all_plan
from pruning.plan import Plan, TokenReduction
from pruning.precision import Precision, synchronize
from pruning.repair.flow import DenseStream
from pruning.repair.sensitivity import BlockSensitivity
from pruning.scores.curves import RemovalCurves
from search.config import Config
from search.trial.lease import Lease, lease_of

ModelTimer = Callable[..., tuple[Timing, list[Timing]]]
"""`pruning.measure.stopwatch.time_against_dense`, or a test's fake."""

SUBSAMPLE = 4
"""The first look at a candidate, and profiles that only propose, take one image in so many."""


@dataclass(frozen=True, kw_only=True)
class ContextPart:
    """A part of a context, as one step of the preparation measures it; its tensors are on the CPU."""

    exit_heads: Mapping[int, ExitHead] = field(default_factory=dict[int, ExitHead])
    """The classifier of every exit."""
    sensitivities: Mapping[int, list[BlockSensitivity]] = field(default_factory=dict[int, list[BlockSensitivity]])
    """The sensitivities of the dense model cut at every exit, for the methods that repair in closed form. Two float64
    matrices a block: at 12 blocks 7 MB for a ViT-Tiny, 113 MB for a ViT-Base."""
    channel_curves: tuple[RemovalCurves, ...] = ()
    """The part of all profiles that is about channels; empty while it is not measured."""
    profiles: Mapping[TokenReduction, Profile] = field(default_factory=dict[TokenReduction, Profile])
    """Profiles of the uncut dense model by token reduction, for methods that allocate by one and for proposals."""
    allowed_widths: Mapping[TokenReduction, tuple[AllowedWidths, ...]] = field(
        default_factory=dict[TokenReduction, tuple[AllowedWidths, ...]]
    )
    """The allowed widths of every block of the dense model on this device by token reduction, for `round_to: auto`."""

    def to(self, device: torch.device | str) -> ContextPart:
        """Gives the part with its tensors on a device."""
        exit_heads = {
            block: {name: tensor.to(device) for name, tensor in head.items()} for block, head in self.exit_heads.items()
        }
        sensitivities = {
            exit_block: [sensitivity.to(device) for sensitivity in blocks]
            for exit_block, blocks in self.sensitivities.items()
        }
        return replace(self, exit_heads=exit_heads, sensitivities=sensitivities)

    def joined(self, other: ContextPart) -> ContextPart:
        """Gives the part with all of another one added."""
        return ContextPart(
            exit_heads={**self.exit_heads, **other.exit_heads},
            sensitivities={**self.sensitivities, **other.sensitivities},
            channel_curves=other.channel_curves or self.channel_curves,
            profiles={**self.profiles, **other.profiles},
            allowed_widths={**self.allowed_widths, **other.allowed_widths},
        )


@dataclass(frozen=True, kw_only=True)
class TrialContext:
    """The record that all trials of a sweep share: the dense model, the images, and what is known of both."""

    config: Config
    model: nn.Module
    """The dense model, in eval mode."""
    splits: Splits
    precision: Precision
    known: ContextPart
    """All that the steps of the preparation have measured so far, on the model's device."""
    timer: ModelTimer = time_against_dense
    """The function that times models against the dense one."""
    _dense_streams: dict[tuple[Any, ...], DenseStream] = field(default_factory=dict, repr=False, compare=False)
    """The calibration images on their way through the dense model, which all repairs on them share."""

    @property
    def dense_stream(self) -> DenseStream:
        """The calibration images on their way through the dense model; what is computed of it is kept, up to 1 GiB."""
        splits = self.splits
        key = splits.training.pixels.data_ptr(), splits.num_calibration, splits.every, self.precision
        if key not in self._dense_streams:
            self._dense_streams[key] = DenseStream(
                self.model, splits.calibration, batch_size=self.config.cascade.batch_size, precision=self.precision
            )
        return self._dense_streams[key]

    @property
    def exit_heads(self) -> Mapping[int, ExitHead]:
        """The classifier of every exit."""
        return self.known.exit_heads

    @property
    def sensitivities(self) -> Mapping[int, list[BlockSensitivity]]:
        """The sensitivities of the dense model cut at every exit."""
        return self.known.sensitivities

    @property
    def profiles(self) -> Mapping[TokenReduction, Profile]:
        """Profiles of the uncut dense model by token reduction."""
        return self.known.profiles

    @property
    def allowed_widths(self) -> Mapping[TokenReduction, tuple[AllowedWidths, ...]]:
        """The allowed widths of every block of the dense model on this device by token reduction."""
        return self.known.allowed_widths

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def lease(self) -> Lease:
        """This process's lease of the device that the context is on now."""
        return lease_on(self.device)

    @property
    def anatomy(self) -> Anatomy:
        """The anatomy of the dense model."""
        return examine(self.model)

    @property
    def dense_plan(self) -> Plan:
        """The plan that keeps all of the dense model."""
        return keep_all_plan(self.anatomy)

    @property
    def dense_macs(self) -> int:
        """The multiply-adds of the dense model, for one image."""
        return count_macs(self.anatomy, self.dense_plan)

    def extended(self, part: ContextPart) -> TrialContext:
        """Gives the context with a part that was measured, moved to the model's device."""
        return replace(self, known=self.known.joined(part.to(self.device)))

    def to(self, device: torch.device | str) -> TrialContext:
        """Gives the context with its model and all that is known on a device."""
        return replace(self, model=self.model.to(device), known=self.known.to(device), _dense_streams={})

    def subsampled(self) -> TrialContext:
        """Gives the context with a part of the images and the shortest timings, for a cheap look at a candidate."""
        timing = self.config.measure.model_copy(update={"num_rounds": MIN_ROUNDS})
        return replace(
            self, splits=self.splits.thinned(SUBSAMPLE), config=self.config.model_copy(update={"measure": timing})
        )

    def without_rungs(self) -> TrialContext:
        """Gives the context for trials that are not to be stopped."""
        search = self.config.search.model_copy(update={"reduction_factor": 1.0})
        return replace(self, config=self.config.model_copy(update={"search": search}))

    def timing_batch(self) -> Tensor:
        """Gives the images that models are timed on, (batch size, ...); val images repeat if there are too few."""
        size = self.config.measure.batch_size
        return self.splits.val.normalized(torch.arange(size) % len(self.splits.val), self.device)


def lease_on(device: torch.device) -> Lease:
    """Gives this process's lease of a device."""
    return lease_of(device_id(device), partial(synchronize, device))
