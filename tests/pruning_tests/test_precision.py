"""bfloat16 is for the matrix products alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning.precision import Precision, autocast


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_run_in_the_precision_and_weights_stay_in_float32(precision: Precision, dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 3)
    with autocast(torch.device("cpu"), precision):
        assert layer(torch.ones(1, 3)).dtype == dtype
    assert layer.weight.dtype == torch.float32
    assert layer(torch.ones(1, 3)).dtype == torch.float32
