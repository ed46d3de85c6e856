"""Throughput and latency, measured on this device, in pairs with the dense model.

A shared machine slows down and speeds up by the second. Models are therefore timed in turn (dense, A, B, dense, A,
B, ...): what disturbs one round disturbs all of it, and the ratio within a round survives.

Earlier work of the process must not count either. By the order of all earlier allocations, glibc keeps large pieces of
freed memory or gives them back to the system; given back, they are fetched page by page in the next forward pass.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol, get_args

import torch
from torch import Tensor, nn

from pruning.errors import SettingError
from pruning.precision import Precision, autocast, synchronize

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of glibc's `mallopt`."""

MIN_ROUNDS = 6
"""Fewer rounds give no 95 % interval of their median."""

MIN_LAP_S = 0.05
"""A model is run again within its lap until the dense one would take so long, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The speed of a model, against the dense one and in absolute numbers."""

    speedup: float
    """The median over the rounds of dense time / model time."""
    speedup_low: float
    """The lower end of the 95 % interval of `speedup`, from the order of the rounds alone."""
    speedup_high: float
    """The upper end of the 95 % interval of `speedup`, from the order of the rounds alone."""
    latency_ms_p50: float
    """The time of one batch in milliseconds: the median dense time of this run over `speedup`."""
    throughput_img_s: float
    """Images a second: batch size / latency."""
    batch_size: int
    num_rounds: int


class Timer(Protocol):
    """Times calls in turn, as `time_in_turn` does; a test passes one that takes no time."""

    def __call__(
        self, calls: Sequence[Callable[[], object]], device: torch.device, num_rounds: int
    ) -> list[list[float]]:
        """Returns the seconds of every call, in their order, for each of the rounds."""
        ...


def time_in_turn(
    calls: Sequence[Callable[[], object]], device: torch.device, num_rounds: int,
    *, num_repeats: int = 1, clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:  # fmt: skip
    """Times calls one after the other, round after round; the device is waited for at every stop of the clock.

    Args:
        num_rounds: rounds that count; one more goes before as a warm-up.
        num_repeats: how often a call runs within its lap.
        clock: seconds; only differences count.

    Returns:
        The seconds of one run of every call, in their order, for each of the rounds.
    """
    return [[_lap(call, device, num_repeats, clock) for call in calls] for _ in range(num_rounds + 1)][1:]


def _lap(call: Callable[[], object], device: torch.device, num_repeats: int, clock: Callable[[], float]) -> float:
    """Returns the seconds that one run of the call takes, the mean of several in a row."""
    synchronize(device)
    start = clock()
    for _ in range(num_repeats):
        call()
    synchronize(device)
    return (clock() - start) / num_repeats


@torch.inference_mode()
def fastest_precision(model: nn.Module, batch: Tensor, repeats: int = 5, *, timer: Timer = time_in_turn) -> Precision:
    """Finds the precision in which this device runs the model faster, by timing both in turn.

    A CPU with AMX runs bfloat16 three times faster than float32, one without it two times slower.

    Args:
        batch: (B, channels, height, width), on the model's device.
        repeats: rounds, the fastest of which counts.
    """

    def run(precision: Precision) -> None:
        with autocast(batch.device, precision):
            model(batch)

    precisions: tuple[Precision, ...] = get_args(Precision)
    rounds = timer([partial(run, precision) for precision in precisions], batch.device, repeats)
    least = [min(laps) for laps in zip(*rounds, strict=True)]
    return precisions[least.index(min(least))]


@torch.inference_mode()
def time_against_dense(
    dense: nn.Module,
    models: Sequence[nn.Module],
    batch: Tensor,
    *,
    num_rounds: int = 15,
    min_lap_s: float = MIN_LAP_S,
    precision: Precision = "float32",
) -> tuple[Timing, list[Timing]]:
    """Times several models against the dense one, on one batch.

    Args:
        batch: (B, channels, height, width), on the models' device.
        num_rounds: rounds that count, at least `MIN_ROUNDS`; one more goes before as a warm-up.
        min_lap_s: a model is run again within its lap until the dense one would take so long, in seconds.

    Returns:
        The dense model's timing (its speed-up is 1 by definition), and one for each model, in their order.

    Raises:
        SettingError: fewer than `MIN_ROUNDS` rounds.
    """
    if num_rounds < MIN_ROUNDS:
        raise SettingError(f"{num_rounds} rounds give no 95 % interval; give {MIN_ROUNDS} at least")
    if batch.device.type == "cpu":
        keep_freed_memory()
    calls = [partial(model, batch) for model in (dense, *models)]
    with autocast(batch.device, precision):
        for call in calls:
            call()
        dense_lap_s = _lap(calls[0], batch.device, 1, time.perf_counter)
        num_repeats = max(1, math.ceil(min_lap_s / dense_lap_s))
        rounds = time_in_turn(calls, batch.device, num_rounds, num_repeats=num_repeats)
    dense_s = statistics.median(laps[0] for laps in rounds)
    timings = [_timing([laps[0] / laps[i] for laps in rounds], dense_s, len(batch)) for i in range(len(models) + 1)]
    return timings[0], timings[1:]


@cache
def keep_freed_memory() -> None:
    """Has this process keep the memory that it frees, for its next allocations; does nothing without glibc.

    All that runs on the CPU is then faster by what fetching the pages costs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)  # never given back
        mallopt(M_MMAP_MAX, 0)  # and no large piece is mapped on its own


def device_name(device: torch.device) -> str:
    """Returns the maker's name of the device; of a CPU, what the system knows, and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def device_id(device: torch.device) -> str:
    """Returns a name that tells the device from all others of this machine: a GPU's UUID; the CPUs are one device."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"cuda-{getattr(properties, 'uuid', properties.name)}".replace("/", "-")  # no UUID before torch 2.4


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
    """Returns the 95 % interval of the median of `MIN_ROUNDS` draws or more: two order statistics.

    It holds for any distribution: the median lies below the k-th smallest of n draws with probability
    P(Binomial(n, 1/2) < k).
    """
    count = len(values)
    assert count >= MIN_ROUNDS
    ordered = sorted(values)
    rank, below = 0, 0.5**count
    while below + math.comb(count, rank + 1) * 0.5**count <= 0.025:
        rank += 1
        below += math.comb(count, rank) * 0.5**count
    return ordered[rank], ordered[count - 1 - rank]
