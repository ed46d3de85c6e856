"""The input of a channel criterion, and the scores it returns.

B images, N tokens, C model width, H heads, D head width, h hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pruning.errors import VitfrontError
from pruning.model.anatomy import BlockAnatomy
from pruning.precision import Precision
from pruning.repair.compensation import BlockRepair


@dataclass(frozen=True, kw_only=True)
class ScoringInput:
    """The input of a criterion that scores one block. Activations are run through blocks, never indexed."""

    model: nn.Module
    """The model whose tail (norm and classifier) comes after the last block."""
    anatomy: BlockAnatomy
    """The anatomy of the block that is scored."""
    index: int
    """The place of the block that is scored in the model, counted from 0."""
    blocks: Sequence[nn.Module]
    """The block that is scored, at its dense widths, and all after it."""
    x: Tensor
    """(B, N, C), the block's input for the calibration images as they are; (B, N, C + 1) with token sizes."""
    x_low: Tensor
    """(B, N, C), the block's input for the low-pass filtered calibration images; (B, N, C + 1) with token sizes."""
    targets: Tensor
    """(B, C), the dense model's summary token after the block for the images as they are (the T of LFS)."""
    labels: Tensor
    """(B,), class indices of the calibration images."""
    alpha: float
    """The weight of the cross-entropy in LFS, in [0, 1]."""
    batch_size: int
    precision: Precision
    seed: int
    """The seed of the random criterion."""
    repair: BlockRepair
    """The repair of the block that is scored: the closed-form criterion is fitted on its calibration stream."""


@dataclass(frozen=True, kw_only=True)
class ChannelScores:
    """The scores of one block's channels; larger = keep. All come from one formula and compare with each other."""

    qk: Tensor
    """(H, D), of query/key pairs: query and key channels of one index go together."""
    v: Tensor
    """(H, D), of value channels."""
    hidden: Tensor
    """(h,), of the MLP's hidden units."""

    def checked(self, index: int) -> ChannelScores:
        """Returns these scores once they are known to be finite.

        Args:
            index: of the block they are of, for the error.

        Raises:
            VitfrontError: a score is not finite.
        """
        check_finite(index, {"qk": self.qk, "v": self.v, "hidden": self.hidden})
        return self


def check_finite(index: int, scores: Mapping[str, Tensor]) -> None:
    """Raises VitfrontError if scores of block `index`, or moments that they are computed from, are not finite."""
    for name, values in scores.items():
        if not values.isfinite().all():
            raise VitfrontError(
                f"block {index}: the {name} scores are not finite; "
                "a weight of the model or what enters the block is not either"
            )
