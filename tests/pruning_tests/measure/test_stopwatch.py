"""Speed-ups of a known amount of work, and the interval of a median by counting coins."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise, product
from resource import RUSAGE_SELF, getrusage

import pytest
import torch
from torch import Tensor, nn

from pruning.errors import SettingError
from pruning.measure.stopwatch import (
    Timing,
    device_name,
    fastest_precision,
    median_interval,
    median_rank,
    ranks_at_any_stop,
    time_against_dense,
    time_in_turn,
)
from pruning.precision import Precision


class Work(nn.Module):
    """So many matrix products one after the other; counts its calls."""

    def __init__(self, amount: int) -> None:
        super().__init__()
        self.amount, self.calls = amount, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for _ in range(self.amount):
            x = x @ x * 0
        return x


BATCH = torch.ones(4, 160, 160)


@pytest.mark.alone
def test_a_model_of_a_third_of_the_work_is_three_times_faster() -> None:
    # Laps far longer than a time slice: with short ones a busy machine interrupts the slower model alone.
    dense, (third, double) = time_against_dense(Work(12), [Work(4), Work(24)], BATCH, num_rounds=6, min_lap_s=0.04)
    assert 2.0 < third.speedup < 4.5
    assert 0.33 < double.speedup < 0.75
    assert dense.speedup == 1


def test_a_timings_figures_agree_with_each_other() -> None:
    dense, timings = time_against_dense(Work(4), [Work(1), Work(2)], BATCH, num_rounds=7, min_lap_s=0.001)
    for timing in (dense, *timings):
        assert timing.speedup_low <= timing.speedup <= timing.speedup_high
        assert (timing.batch_size, timing.num_rounds) == (4, 7)
        assert timing.throughput_img_s == pytest.approx(4 / (timing.latency_ms_p50 / 1e3))
        assert timing.latency_ms_p50 == pytest.approx(dense.latency_ms_p50 / timing.speedup)


def test_the_dense_model_has_a_speedup_of_exactly_one() -> None:
    model = Work(1)
    dense, (again,) = time_against_dense(model, [model], BATCH, num_rounds=6, min_lap_s=0.0)
    assert (dense.speedup, dense.speedup_low, dense.speedup_high) == (1.0, 1.0, 1.0)
    assert again.speedup > 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_after_a_timing_freed_memory_is_used_again() -> None:
    time_against_dense(Work(1), [], BATCH, num_rounds=6, min_lap_s=0.0)
    faults = [getrusage(RUSAGE_SELF).ru_minflt]
    for _ in range(40):
        torch.ones(16, 1024, 1024)  # of new pages it would be 16384 faults
        faults.append(getrusage(RUSAGE_SELF).ru_minflt)
    assert statistics.median(after - before for before, after in pairwise(faults)) < 100


def test_the_dense_model_can_run_alone() -> None:
    dense, timings = time_against_dense(Work(1), [], BATCH, num_rounds=6, min_lap_s=0.0)
    assert isinstance(dense, Timing) and timings == []


def test_all_models_run_equally_often_and_again_until_the_lap_is_long_enough() -> None:
    short, other = Work(1), Work(2)
    time_against_dense(short, [other], BATCH, num_rounds=6, min_lap_s=0.0)
    assert (short.calls, other.calls) == (1 + 1 + 6, 1 + 6)  # a warm-up, the one that is timed, 6 rounds
    long, other = Work(1), Work(2)
    time_against_dense(long, [other], BATCH, num_rounds=6, min_lap_s=0.005)
    assert other.calls > 1 + 6 and (other.calls - 1) % 6 == 0
    assert long.calls == other.calls + 1


def test_rounds_end_as_soon_as_the_intervals_are_narrow_enough() -> None:
    model = Work(1)
    for narrow_enough, num_rounds in ((0.0, 12), (1e-9, 12), (1e9, 6)):
        model.calls, other = 0, Work(2)
        dense, (timing,) = time_against_dense(
            model, [other], BATCH, num_rounds=12, min_lap_s=0.0, narrow_enough=narrow_enough
        )
        assert timing.num_rounds == dense.num_rounds == num_rounds
        assert other.calls == 1 + num_rounds and model.calls == 2 + num_rounds


def test_rounds_end_where_every_model_is_told_apart() -> None:
    """The dense model itself has an interval of no width; the other one's decides."""
    dense = Work(1)
    _, timings = time_against_dense(dense, [dense, Work(3)], BATCH, num_rounds=7, min_lap_s=0.0, narrow_enough=1e-12)
    assert {timing.num_rounds for timing in timings} == {7}
    _, timings = time_against_dense(dense, [], BATCH, num_rounds=7, min_lap_s=0.0, narrow_enough=1e-12)
    assert timings == []


@pytest.mark.parametrize("num_rounds", [-1, 0, 5])
def test_too_few_rounds_for_an_interval_are_refused(num_rounds: int) -> None:
    with pytest.raises(SettingError, match=f"{num_rounds} rounds give no 95 % interval; give 6 at least"):
        time_against_dense(Work(1), [], BATCH, num_rounds=num_rounds)


# The timing loop


class Clock:
    """A clock that calls put forward."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        durations = iter(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += next(durations)

        return run


def test_calls_are_timed_in_turn_after_a_round_to_warm_up() -> None:
    clock = Clock()
    calls = [clock.call("a", 0.25, 5.0, 3.0, 4.0), clock.call("b", 9.0, 1.0, 2.0, 0.5)]
    assert time_in_turn(calls, torch.device("cpu"), 3, clock=clock) == [[5.0, 1.0], [3.0, 2.0], [4.0, 0.5]]
    assert clock.log == ["a", "b"] * 4  # in turn, so that what disturbs one disturbs all


def test_a_call_that_is_repeated_within_its_lap_has_the_mean_of_its_times() -> None:
    clock = Clock()
    calls = [clock.call("a", 1, 1, 1, 2, 3, 7), clock.call("b", 0, 0, 0, 5, 5, 5)]
    assert time_in_turn(calls, torch.device("cpu"), 1, num_repeats=3, clock=clock) == [[4.0, 5.0]]
    assert clock.log == ["a", "a", "a", "b", "b", "b"] * 2


# The faster precision


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


@pytest.mark.alone
@pytest.mark.parametrize(("slow", "fast"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_faster_precision_is_found(slow: Precision, fast: Precision) -> None:
    assert fastest_precision(SlowIn(slow), torch.ones(100, 1000)) == fast


@pytest.mark.parametrize(
    ("laps", "fast", "num_rounds"),
    [
        ([(2.0, 9.0)], "float32", 1),  # clear after one round
        ([(1.3, 1.0)], "bfloat16", 1),
        ([(1.25, 1.0), (1.0, 1.5), (1.0, 1.0)], "float32", 3),  # the least time of each counts, and float32 if they tie
        ([(1.25, 1.0), (1.0, 1.5), (1.0, 0.9)], "bfloat16", 3),
        ([(1.0, 1.0), (9.0, 1.5), (9.0, 1.5)], "float32", 3),
    ],
)
def test_the_least_time_of_each_precision_decides_unless_one_round_is_clear(
    laps: list[tuple[float, float]], fast: Precision, num_rounds: int
) -> None:
    left = iter(laps)

    def timer(calls: Sequence[Callable[[], object]], device: torch.device, num_rounds: int) -> list[list[float]]:
        assert (len(calls), device) == (2, BATCH.device)
        return [list(next(left)) for _ in range(num_rounds)]

    assert fastest_precision(Work(1), BATCH, 3, timer=timer) == fast
    assert len(list(left)) == len(laps) - num_rounds == 0


def test_one_repeat_is_one_round() -> None:
    def timer(calls: Sequence[Callable[[], object]], device: torch.device, num_rounds: int) -> list[list[float]]:
        asked.append(num_rounds)
        return [[1.0, 0.9]]

    asked: list[int] = []
    assert fastest_precision(Work(1), BATCH, 1, timer=timer) == "bfloat16"
    assert asked == [1]


# The interval of the median


def brute_force_rank(count: int) -> int:
    """The largest rank whose two order statistics miss the median in at most 5 % of all 2^n ways to fall about it."""
    below = [sum(coins) for coins in product((0, 1), repeat=count)]
    missed = [sum(n <= rank or n >= count - rank for n in below) / len(below) for rank in range(count // 2)]
    return max(rank for rank, share in enumerate(missed) if share <= 0.05)


@pytest.mark.parametrize("count", range(6, 16))
def test_the_interval_is_the_narrowest_pair_of_order_statistics_that_holds_95_percent(count: int) -> None:
    rank = brute_force_rank(count)
    values = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    assert median_interval(values) == (rank, count - 1 - rank)


def test_ranks_at_any_stop_hold_95_percent_for_whoever_stops_where_it_misses() -> None:
    """All ways for 13 draws to fall about the median, one after the other; the ranks are the largest that hold."""
    most = 13
    ranks = ranks_at_any_stop(most)
    assert list(ranks) == list(range(6, most + 1))

    def missed(ranks: dict[int, int]) -> float:
        """The share of ways in which some number of draws has too many on one side of the median."""
        count = 0
        for sides in product((0, 1), repeat=most):
            below = list(accumulate(sides))
            count += any(below[n - 1] <= rank or n - below[n - 1] <= rank for n, rank in ranks.items())
        return count / 2**most

    assert missed(ranks) <= 0.05
    for n in ranks:  # none may be larger, whatever comes after it
        assert missed({m: rank + (m == n) for m, rank in ranks.items() if m <= n}) > 0.05
    assert all(rank <= median_rank(n) for n, rank in ranks.items())
    assert ranks[most] > 0


def test_ranks_at_any_stop_do_not_depend_on_how_far_it_may_go() -> None:
    long = ranks_at_any_stop(45)
    assert ranks_at_any_stop(6) == {6: 0}
    assert ranks_at_any_stop(15) == {n: long[n] for n in range(6, 16)}
    assert all(long[n] <= long[n + 1] <= long[n] + 1 for n in range(6, 45))


@pytest.mark.parametrize(
    "values",
    [[3.0] * 6, [1.0, 1.0, 1.0, 2.0, 9.0, 9.0, 9.0], list(range(100)), [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]],
)
def test_the_interval_holds_the_median(values: Sequence[float]) -> None:
    low, high = median_interval(values)
    assert min(values) <= low <= statistics.median(values) <= high <= max(values)


def test_the_device_is_named_with_its_cores() -> None:
    assert device_name(torch.device("cpu")).endswith(" cores")
