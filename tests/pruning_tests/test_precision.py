"""bfloat16 for the matrix products alone, and only where it is faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pruning.precision import Precision, autocast, fastest_precision


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_run_in_the_precision_and_weights_stay_in_float32(precision: Precision, dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 3)
    with autocast(torch.device("cpu"), precision):
        assert layer(torch.ones(1, 3)).dtype == dtype
    assert layer.weight.dtype == torch.float32
    assert layer(torch.ones(1, 3)).dtype == torch.float32


class SlowIn(nn.Module):
    """Does fifty times the work in one precision."""

    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        is_half = torch.is_autocast_enabled("cpu")
        for _ in range(50 if is_half == (self.precision == "bfloat16") else 1):
            x = x * 0.5
        return x


@pytest.mark.parametrize(("slow", "fast"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_faster_precision_is_found(slow: Precision, fast: Precision) -> None:
    assert fastest_precision(SlowIn(slow), torch.ones(100, 1000)) == fast
