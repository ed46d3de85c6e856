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

MISSED = 0.05
"""The probability with which an interval may miss the median."""

CLEARLY_FASTER = 1.3
"""A precision that is faster by this factor in one round is not timed again."""


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

    A CPU with AMX runs bfloat16 three times faster than float32, one without it two times slower. Where one round,
    after a warm-up, tells them apart by `CLEARLY_FASTER`, no other is run.

    Args:
        batch: (B, channels, height, width), on the model's device.
        repeats: rounds at most, at least 1; the fastest of them counts.
    """

    def run(precision: Precision) -> None:
        with autocast(batch.device, precision):
            model(batch)

    precisions: tuple[Precision, ...] = get_args(Precision)
    calls = [partial(run, precision) for precision in precisions]
    rounds = timer(calls, batch.device, 1)
    if repeats > 1 and max(rounds[0]) < CLEARLY_FASTER * min(rounds[0]):
        rounds = rounds + timer(calls, batch.device, repeats - 1)
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
    narrow_enough: float = 0.0,
) -> tuple[Timing, list[Timing]]:
    """Times several models against the dense one, on one batch.

    Args:
        batch: (B, channels, height, width), on the models' device.
        num_rounds: rounds at most, at least `MIN_ROUNDS`; every model runs before, as a warm-up.
        min_lap_s: a model is run again within its lap until the dense one would take so long, in seconds.
        narrow_enough: ends after any round, from `MIN_ROUNDS` on, in which the intervals of all speed-ups are at most
            this share of the speed-up wide. The intervals then hold together for all rounds at which it could have
            ended, and are hardly wider for it (`ranks_at_any_stop`). With 0, all rounds are run.

    Returns:
        The dense model's timing (its speed-up is 1 by definition), and one for each model, in their order.

    Raises:
        SettingError: fewer than `MIN_ROUNDS` rounds.
    """
    if num_rounds < MIN_ROUNDS:
        raise SettingError(f"{num_rounds} rounds give no 95 % interval; give {MIN_ROUNDS} at least")
    if batch.device.type == "cpu":
        keep_freed_memory()
    ranks = ranks_at_any_stop(num_rounds) if narrow_enough > 0 else {num_rounds: median_rank(num_rounds)}
    calls = [partial(model, batch) for model in (dense, *models)]
    rounds: list[list[float]] = []
    with autocast(batch.device, precision):
        for call in calls:
            call()
        dense_lap_s = _lap(calls[0], batch.device, 1, time.perf_counter)
        num_repeats = max(1, math.ceil(min_lap_s / dense_lap_s))
        timings: list[Timing] = []
        while not timings or (len(rounds) < num_rounds and any(_width(timing) > narrow_enough for timing in timings)):
            rounds.append([_lap(call, batch.device, num_repeats, time.perf_counter) for call in calls])
            if len(rounds) in ranks:
                timings = _timings(rounds, ranks[len(rounds)], len(batch))
    return timings[0], timings[1:]


def _width(timing: Timing) -> float:
    """Returns the width of the interval, as a share of the speed-up."""
    return (timing.speedup_high - timing.speedup_low) / timing.speedup


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


def _timings(rounds: Sequence[Sequence[float]], rank: int, batch_size: int) -> list[Timing]:
    """Returns the timing of every model from its laps in all rounds, of which the dense model's are the first.

    Args:
        rank: of the interval's ends among the ratios, from either side, 0 for the outermost.
    """
    dense_s = statistics.median(laps[0] for laps in rounds)
    timings = []
    for laps_of_model in zip(*rounds, strict=True):
        ratios = sorted(laps[0] / lap for laps, lap in zip(rounds, laps_of_model, strict=True))
        speedup = statistics.median(ratios)
        timings.append(
            Timing(
                speedup=speedup,
                speedup_low=ratios[rank],
                speedup_high=ratios[-1 - rank],
                latency_ms_p50=dense_s / speedup * 1e3,
                throughput_img_s=batch_size * speedup / dense_s,
                batch_size=batch_size,
                num_rounds=len(rounds),
            )
        )
    return timings


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the median of `MIN_ROUNDS` draws or more: two order statistics (`median_rank`)."""
    rank, ordered = median_rank(len(values)), sorted(values)
    return ordered[rank], ordered[-1 - rank]


def median_rank(count: int) -> int:
    """Returns the rank, from either side, of the draws between which the median lies with 95 % probability.

    It holds for any distribution: the median lies below the k-th smallest of n draws with probability
    P(Binomial(n, 1/2) < k).

    Args:
        count: draws, `MIN_ROUNDS` at least.
    """
    assert count >= MIN_ROUNDS
    rank, below = 0, 0.5**count
    while below + math.comb(count, rank + 1) * 0.5**count <= MISSED / 2:
        rank += 1
        below += math.comb(count, rank) * 0.5**count
    return rank


def ranks_at_any_stop(most: int) -> dict[int, int]:
    """Returns ranks as `median_rank` does, for draws that may end after any number of them, whatever they show.

    How many draws lie below the median is a walk of coin tosses. The median is missed on one side at the first number
    of draws at which the walk is at the rank or below; the ranks are the largest, one number of draws after the other,
    that all walks together reach with a probability of 2.5 %.

    Args:
        most: draws at most, `MIN_ROUNDS` at least.

    Returns:
        A rank for every number of draws from `MIN_ROUNDS` to `most`.
    """
    ranks: dict[int, int] = {}
    walks, reached, rank = [1.0], 0.0, -1  # probability of every count below the median, of walks that missed nothing
    for count in range(1, most + 1):
        walks = [(stays + rises) / 2 for stays, rises in zip([*walks, 0.0], [0.0, *walks], strict=True)]
        if count < MIN_ROUNDS:
            continue
        while reached + sum(walks[: rank + 2]) <= MISSED / 2:
            rank += 1
        reached += sum(walks[: rank + 1])
        walks[: rank + 1] = [0.0] * (rank + 1)
        ranks[count] = rank
    return ranks
