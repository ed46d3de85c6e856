"""Low-frequency sensitivity: keeps the channels that serve the low frequencies (VTC-LFC, eq. 3-5).

B images, N tokens, C model width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pruning.model.anatomy import summary_token
from pruning.scores.channel import ChannelScores, ScoringInput
from pruning.scores.taylor import taylor_scores


def score(inputs: ScoringInput) -> ChannelScores:
    """Returns the Taylor score of alpha * cross-entropy + (1 - alpha) * KL(softmax T || softmax T'), filtered images.

    T is the dense model's summary token after the block for the image as it is, T' this block's for the filtered image.
    """

    def loss(after: Tensor, logits: Tensor, batch: slice) -> Tensor:
        summary = summary_token(inputs.anatomy, after[..., : inputs.anatomy.width]).log_softmax(dim=1)
        target = inputs.targets[batch].float().log_softmax(dim=1)
        drift = F.kl_div(summary, target, reduction="sum", log_target=True)
        cross_entropy = F.cross_entropy(logits, inputs.labels[batch], reduction="sum")
        return inputs.alpha * cross_entropy + (1 - inputs.alpha) * drift

    return taylor_scores(inputs, inputs.x_low, loss)
