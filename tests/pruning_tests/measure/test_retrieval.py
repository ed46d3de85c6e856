"""Recall and average precision against brute force."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from pruning.measure.retrieval import QUERIES_AT_ONCE, features, mean_average_precision, recall_at_1
from pruning.model.anatomy import examine
from pruning.model.surgery import apply_plan
from tests.pruning_tests import builders
from tests.pruning_tests.model.test_families import model_of, plan_of


def slow(
    queries: list[list[float]], query_labels: list[int], gallery: list[list[float]], gallery_labels: list[int]
) -> tuple[float, float]:
    """Recall at 1 and mean average precision, by their definitions."""
    hits, precisions = 0, []
    for query, label in zip(queries, query_labels, strict=True):
        similarity = [sum(a * b for a, b in zip(query, other, strict=True)) for other in gallery]
        order = sorted(range(len(gallery)), key=lambda n: (-similarity[n], n))
        hits += gallery_labels[order[0]] == label
        ranks = [rank for rank, n in enumerate(order, start=1) if gallery_labels[n] == label]
        if ranks:
            precisions.append(sum(place / rank for place, rank in enumerate(ranks, start=1)) / len(ranks))
    return hits / len(queries), sum(precisions) / len(precisions) if precisions else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_recall_and_average_precision_are_those_of_brute_force(seed: int) -> None:
    generator = random.Random(seed)
    # Small whole numbers: many similarities are equal.
    queries, gallery = ([[float(generator.randint(-2, 2)) for _ in range(4)] for _ in range(n)] for n in (9, 23))
    query_labels, gallery_labels = ([generator.randrange(4) for _ in range(n)] for n in (9, 23))
    given = torch.tensor(queries), torch.tensor(query_labels), torch.tensor(gallery), torch.tensor(gallery_labels)
    recall, precision = slow(queries, query_labels, gallery, gallery_labels)
    assert recall_at_1(*given) == pytest.approx(recall)
    assert mean_average_precision(*given) == pytest.approx(precision)


def test_many_queries_are_ranked_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    count = QUERIES_AT_ONCE + 3
    queries, gallery = (torch.randint(-2, 3, (n, 4), generator=generator).float() for n in (count, 50))
    query_labels, gallery_labels = (torch.randint(0, 6, (n,), generator=generator) for n in (count, 50))
    gallery_labels[gallery_labels == 5] = 4  # nobody in the gallery is of the queries' class 5
    alone = [
        slow([query.tolist()], [int(label)], gallery.tolist(), gallery_labels.tolist())
        for query, label in zip(queries, query_labels, strict=True)
    ]
    recall = sum(hit for hit, _ in alone) / count
    counted = [precision for (_, precision), label in zip(alone, query_labels, strict=True) if label != 5]
    given = queries, query_labels, gallery, gallery_labels
    assert recall_at_1(*given) == pytest.approx(recall)
    assert mean_average_precision(*given) == pytest.approx(sum(counted) / len(counted))


def test_a_perfect_ranking_has_1_and_a_class_nobody_has_does_not_count() -> None:
    x, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert (recall_at_1(x, labels, x, labels), mean_average_precision(x, labels, x, labels)) == (1, 1)
    unknown = torch.tensor([0, 1, 9])
    assert recall_at_1(x, unknown, x, labels) == pytest.approx(2 / 3)
    assert mean_average_precision(x, unknown, x, labels) == 1
    assert mean_average_precision(x, unknown + 10, x, labels) == 0


@pytest.mark.parametrize("family", ["vit", "average_pooling", "swin"])
def test_features_are_of_unit_length_and_what_the_classifier_reads(family: str) -> None:
    model = model_of(family)
    anatomy = examine(model)
    images = builders.images(6, size=anatomy.image_size)
    unit_features = features(model, images, batch_size=4)
    torch.testing.assert_close(unit_features.norm(dim=1), torch.ones(6))
    x = images.normalized(slice(None), torch.device("cpu"))
    expected = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(unit_features, F.normalize(expected.detach(), dim=1))
    assert features(apply_plan(model, plan_of(anatomy)), images).shape == unit_features.shape
