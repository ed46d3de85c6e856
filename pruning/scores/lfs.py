"""Low-frequency sensitivity: which channels serve the low frequencies (VTC-LFC, eq. 3-5).

B images, N tokens, C model width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pruning.model.anatomy import summary_token
from pruning.scores.channel import ChannelScores, ScoringInput
from pruning.scores.taylor import taylor_scores


def score(scene: ScoringInput) -> ChannelScores:
    """The Taylor score of alpha * cross-entropy + (1 - alpha) * KL(softmax T || softmax T'), on filtered images.

    T is the summary token after the block in the dense model on the image as it is, T' that of the filtered image here.
    """

    def loss(after: Tensor, logits: Tensor, batch: slice) -> Tensor:
        summary = summary_token(scene.anatomy, after[..., : scene.anatomy.width]).log_softmax(dim=1)
        target = scene.targets[batch].float().log_softmax(dim=1)
        drift = F.kl_div(summary, target, reduction="sum", log_target=True)
        cross_entropy = F.cross_entropy(logits, scene.labels[batch], reduction="sum")
        return scene.alpha * cross_entropy + (1 - scene.alpha) * drift

    return taylor_scores(scene, scene.x_low, loss)
