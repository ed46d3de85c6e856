"""What a channel criterion is given, and what it gives back.

B images, N tokens, C model width, H heads, D head width, h hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pruning.errors import VitfrontError
from pruning.model.anatomy import BlockAnatomy
from pruning.precision import Precision

if TYPE_CHECKING:
    from pruning.repair.compensation import CalibrationStream


@dataclass(frozen=True, kw_only=True)
class ScoringInput:
    """What a criterion may look at when a block is scored. Activations are run through blocks, never indexed."""

    model: nn.Module
    """Gives the tail after the last block."""
    anatomy: BlockAnatomy
    """Of the block that is scored."""
    index: int
    """Of the block that is scored, in the model; counted from 0."""
    blocks: Sequence[nn.Module]
    """The block that is scored, at its dense widths, and all after it."""
    x: Tensor
    """(B, N, C) what enters the block for the calibration images as they are; (B, N, C + 1) with token sizes."""
    x_low: Tensor
    """The same for the low-pass filtered images."""
    targets: Tensor
    """(B, C) the dense model's summary token after the block, images as they are (the T of LFS)."""
    labels: Tensor
    """(B,)."""
    alpha: float
    """Weight of the cross-entropy in LFS, in [0, 1]."""
    batch_size: int
    precision: Precision
    seed: int
    flow: CalibrationStream
    """Gives the closed-form criterion what it is fitted on: the calibration images, at the block that is scored."""


@dataclass(frozen=True, kw_only=True)
class ChannelScores:
    """The scores of one block's channels; larger = keep. All come from one formula and compare with each other."""

    qk: Tensor
    """(H, D): query and key channels of one index go together."""
    v: Tensor
    """(H, D)."""
    hidden: Tensor
    """(h,)."""

    def checked(self, index: int) -> ChannelScores:
        """These scores, which are those of block `index`.

        Raises:
            VitfrontError: a score is not finite.
        """
        check_finite(index, {"qk": self.qk, "v": self.v, "hidden": self.hidden})
        return self


def check_finite(index: int, scores: Mapping[str, Tensor]) -> None:
    """Raises VitfrontError where scores of block `index`, or what they are made of, are not finite."""
    for name, values in scores.items():
        if not values.isfinite().all():
            raise VitfrontError(
                f"block {index}: the {name} scores are not finite; "
                "a weight of the model or what enters the block is not either"
            )
