"""Throughput and latency, measured on this device, in pairs with the dense model.

A shared machine slows down and speeds up by the second. Models are therefore timed in turn (dense, A, B, dense, A,
B, ...): what disturbs one round disturbs all of it, and the ratio within a round survives.

What a process did before must not count either. glibc gives large pieces of freed memory back to the system or keeps
them, by the order of all earlier allocations; where it does, the next forward pass gets them anew, page by page.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from pruning.errors import SettingError
from pruning.precision import Precision, autocast, synchronize

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of glibc's mallopt."""

MIN_ROUNDS = 6
"""Fewer rounds give no 95 % interval of their median."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How fast a model is."""

    speedup: float
    """Median over the rounds of dense time / model time."""
    speedup_low: float
    speedup_high: float
    """The 95 % interval of that median, from the order of the rounds alone."""
    latency_ms_p50: float
    """Time of one batch in milliseconds: the median dense time of this run over `speedup`."""
    throughput_img_s: float
    """Images a second: batch size / latency."""
    batch_size: int
    num_rounds: int


@torch.inference_mode()
def time_against_dense(
    dense: nn.Module,
    models: Sequence[nn.Module],
    batch: Tensor,
    *,
    num_rounds: int = 15,
    min_lap_s: float = 0.05,
    precision: Precision = "float32",
) -> tuple[Timing, list[Timing]]:
    """Times several models against the dense one, on one batch; the device is waited for at every stop of the clock.

    Args:
        batch: (B, channels, height, width), on the models' device.
        num_rounds: rounds that count, at least `MIN_ROUNDS`; one more goes before as a warm-up.
        min_lap_s: a model is run again within its lap until the dense one would take so long, in seconds.

    Returns:
        The dense model's timing (its speed-up is 1 by definition), and one a model, in their order.

    Raises:
        SettingError: fewer than `MIN_ROUNDS` rounds.
    """
    if num_rounds < MIN_ROUNDS:
        raise SettingError(f"{num_rounds} rounds give no 95 % interval; give {MIN_ROUNDS} at least")
    if batch.device.type == "cpu":
        keep_freed_memory()
    with autocast(batch.device, precision):
        for model in (dense, *models):
            _lap(model, batch, 1)
        num_calls = max(1, math.ceil(min_lap_s / _lap(dense, batch, 1)))
        rounds = [[_lap(model, batch, num_calls) for model in (dense, *models)] for _ in range(num_rounds + 1)][1:]
    dense_s = statistics.median(laps[0] for laps in rounds)
    timings = [_timing([laps[0] / laps[i] for laps in rounds], dense_s, len(batch)) for i in range(len(models) + 1)]
    return timings[0], timings[1:]


@cache
def keep_freed_memory() -> None:
    """From now on this process keeps the memory that it frees, for its next allocations; a no-op without glibc.

    All that runs on the CPU is faster by what the pages cost.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)  # never given back
        mallopt(M_MMAP_MAX, 0)  # nor borrowed for one piece alone


def device_name(device: torch.device) -> str:
    """What the maker calls it; for a CPU as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def device_id(device: torch.device) -> str:
    """Tells a device from all others of this machine, in any process: a GPU by its UUID; the CPUs are one."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"cuda-{getattr(properties, 'uuid', properties.name)}".replace("/", "-")  # no UUID before torch 2.4


def _lap(model: nn.Module, batch: Tensor, num_calls: int) -> float:
    """Seconds a call."""
    synchronize(batch.device)
    start = time.perf_counter()
    for _ in range(num_calls):
        model(batch)
    synchronize(batch.device)
    return (time.perf_counter() - start) / num_calls


def _timing(ratios: Sequence[float], dense_s: float, batch_size: int) -> Timing:
    low, high = median_interval(ratios)
    speedup = statistics.median(ratios)
    return Timing(
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        latency_ms_p50=dense_s / speedup * 1e3,
        throughput_img_s=batch_size * speedup / dense_s,
        batch_size=batch_size,
        num_rounds=len(ratios),
    )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median of `MIN_ROUNDS` draws or more, whatever their distribution: two order statistics.

    The median lies below the k-th smallest of n draws with probability P(Binomial(n, 1/2) < k).
    """
    count = len(values)
    assert count >= MIN_ROUNDS
    ordered = sorted(values)
    rank, below = 0, 0.5**count
    while below + math.comb(count, rank + 1) * 0.5**count <= 0.025:
        rank += 1
        below += math.comb(count, rank) * 0.5**count
    return ordered[rank], ordered[count - 1 - rank]
