"""Retrieval: the quality of the features for finding images of the same class.

G gallery images, Q queries, C feature width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.data import Images
from pruning.precision import Precision, autocast

QUERIES_AT_ONCE = 128  # 128 rankings of 10,000 images take 80 MB


@torch.inference_mode()
def features(model: nn.Module, images: Images, *, batch_size: int = 64, precision: Precision = "float32") -> Tensor:
    """Returns the features that the classifier reads: class token or pooled patches after the final norm.

    Returns:
        (B, C), float32, of unit length.
    """
    device = next(model.parameters()).device
    model.eval()
    features_of_batches = []
    with autocast(device, precision):
        for batch, _ in images.batches(batch_size, device):
            pooled: Tensor = model.forward_head(model.forward_features(batch), pre_logits=True)  # type: ignore[operator]
            features_of_batches.append(F.normalize(pooled.float(), dim=1))
    return torch.cat(features_of_batches)


@torch.inference_mode()
def recall_at_1(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """Returns the share of queries whose nearest gallery image (cosine, the first of equals) is of their class.

    Args:
        queries: (Q, C), of unit length, Q >= 1.
        query_labels: (Q,), class indices.
        gallery: (G, C), of unit length, G >= 1, on the queries' device.
        gallery_labels: (G,).

    Returns:
        A share in [0, 1].
    """
    nearest = torch.cat([(part @ gallery.T).argmax(dim=1).cpu() for part in queries.split(QUERIES_AT_ONCE)])
    return (gallery_labels.cpu()[nearest] == query_labels.cpu()).double().mean().item()


@torch.inference_mode()
def mean_average_precision(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """Returns the mean over the queries of the average precision of their ranking of the gallery, in [0, 1].

    A query's average precision is the mean, over the gallery images of its class, of the share of its class among all
    that rank as high or higher. Queries without any such image do not count; equals rank in the gallery's order.

    The arguments are those of `recall_at_1`.
    """
    labels = gallery_labels.to(queries.device)
    ranks = torch.arange(1, len(labels) + 1, dtype=torch.float64, device=queries.device)
    precisions = []
    for part, part_labels in zip(queries.split(QUERIES_AT_ONCE), query_labels.split(QUERIES_AT_ONCE), strict=True):
        order = (part @ gallery.T).argsort(dim=1, descending=True, stable=True)
        is_same = labels[order] == part_labels.to(queries.device)[:, None]
        counts = is_same.sum(dim=1)
        precision = (is_same.cumsum(dim=1) / ranks * is_same).sum(dim=1) / counts
        precisions.append(precision[counts > 0])
    all_precisions = torch.cat(precisions)
    return all_precisions.mean().item() if len(all_precisions) else 0.0
