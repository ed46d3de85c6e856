"""Retrieval: how well the features find images of the same class.

G gallery images, Q queries, C feature width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.data import Images
from pruning.precision import Precision, autocast


@torch.inference_mode()
def features(model: nn.Module, images: Images, *, batch_size: int = 64, precision: Precision = "float32") -> Tensor:
    """What the classifier reads, of unit length: class token or pooled patches after the final norm.

    Returns:
        (B, C), float32.
    """
    device = next(model.parameters()).device
    found = []
    with autocast(device, precision):
        for batch, _ in images.batches(batch_size, device):
            before: Tensor = model.forward_head(model.forward_features(batch), pre_logits=True)  # type: ignore[operator]
            found.append(F.normalize(before.float(), dim=1))
    return torch.cat(found)


def recall_at_1(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """Share of the queries whose nearest gallery image (cosine; the first of equals) is of their class, in [0, 1]."""
    nearest = (queries @ gallery.T).argmax(dim=1)
    return (gallery_labels[nearest] == query_labels).float().mean().item()


def mean_average_precision(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """Mean over the queries of the average precision of their ranking of the gallery, in [0, 1].

    A query's average precision is the mean, over the gallery images of its class, of the share of its class among all
    that rank as high or higher. Queries without any such image do not count; equals rank in the gallery's order.
    """
    precisions = []
    for similarity, label in zip(queries @ gallery.T, query_labels, strict=True):
        order = similarity.argsort(descending=True, stable=True)
        is_same = (gallery_labels[order] == label).double()
        if is_same.any():
            ranks = torch.arange(1, len(order) + 1, device=order.device)
            precisions.append(float((is_same.cumsum(0) / ranks * is_same).sum() / is_same.sum()))
    return sum(precisions) / len(precisions) if precisions else 0.0
