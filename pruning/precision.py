"""The number format of matrix products: float32, or bfloat16 where the device is faster with it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Returns a context in which matrix products run in the given precision; weights stay in float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all the work it was given, so that a clock times the work, not its queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
