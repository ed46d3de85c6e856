"""Learned gates: straight-through gradients by hand, and how many units a ratio keeps."""

from __future__ import annotations

import pytest
import torch

from pruning.methods.learned_gates import RatioGradient, TopShare


@pytest.mark.parametrize(
    ("ratio_gradient", "expected"),
    [
        pytest.param("edge", 4 * ((3 + 4) / 2 + (8 + 5) / 2), id="of the last open and the first closed"),
        pytest.param("open", 2 + 3 + 7 + 8, id="of all that are open"),
    ],
)
def test_gradients_go_straight_through_the_mask(ratio_gradient: RatioGradient, expected: float) -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.4, 0.2, 0.8, 0.6]], requires_grad=True)
    ratio = torch.tensor(0.5, requires_grad=True)
    mask = TopShare.apply(scores, ratio, ratio_gradient)
    assert mask.tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    (mask * weights).sum().backward()
    assert scores.grad is not None and ratio.grad is not None
    assert torch.equal(scores.grad, weights)  # as if the mask were the scores
    assert ratio.grad.item() == expected


def test_the_gradient_at_the_edge_is_what_one_unit_more_or_less_does_to_the_loss() -> None:
    scores, weights = torch.arange(64.0), torch.randn(64, generator=torch.Generator().manual_seed(0))
    ratio = torch.tensor(0.5, requires_grad=True)
    (TopShare.apply(scores, ratio, "edge") * weights).sum().backward()

    def loss(count: int) -> float:
        return float((TopShare.apply(scores, torch.tensor(count / 64), "edge") * weights).sum())

    assert ratio.grad is not None
    reach = 4  # a sixteenth of the units, each way
    assert ratio.grad.item() == pytest.approx((loss(32 + reach) - loss(32 - reach)) / (2 * reach / 64), rel=1e-5)


@pytest.mark.parametrize(("ratio", "edge"), [(1.0, [3.0]), (0.25, [1.0, 2.0])])
def test_at_the_end_of_a_row_the_edge_has_one_side(ratio: float, edge: list[float]) -> None:
    at = torch.tensor(ratio, requires_grad=True)
    gradients = torch.tensor([1.0, 2.0, 3.0, 3.0])
    (TopShare.apply(torch.tensor([4.0, 3.0, 2.0, 1.0]), at, "edge") * gradients).sum().backward()
    assert at.grad is not None and at.grad.item() == 4 * sum(edge) / len(edge)


@pytest.mark.parametrize(("ratio", "kept"), [(1e-9, 1), (0.25, 1), (0.2501, 2), (1.0, 4)])
def test_a_layer_keeps_as_many_units_as_its_ratio_rounded_up(ratio: float, kept: int) -> None:
    mask = TopShare.apply(torch.tensor([3.0, 3.0, 1.0, 2.0]), torch.tensor(ratio), "edge")
    assert mask.sum() == kept
    assert mask[0] == 1  # of equal scores the first
