"""Throughput beside a neighbour on the same device, measured with and without a lease.

    python benchmarks/bm_lease.py [--quick] [--json] [--out benchmarks/results] [--threads 1 2]

One process times a pruned model of digits against the dense one, as a trial does, while another prunes without end on
the same device. Three conditions in turn, again and again: the neighbour is stopped (alone), it works and shares the
device by the lease, it works and knows no lease. All figures are medians over the turns with their 95 % interval;
`of_alone` is the ratio within a turn. On a CPU the device is the machine, so its own idleness is part of the result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from contextlib import nullcontext
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import drawn

from pruning.device_sharing import yield_device
from pruning.measure.cost import count_macs
from pruning.measure.stopwatch import Timing, device_name, median_interval, time_against_dense
from pruning.methods.cascade import CascadeSettings, cascade
from pruning.methods.schedule import scheduled_plan
from pruning.model.anatomy import examine
from pruning.model.surgery import apply_plan, keep_all_plan
from search.recipe import load_config
from search.trial.context import lease_on
from search.trial.inputs import Inputs, load_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONDITIONS = ("alone", "shared with lease", "shared without lease")
TARGET = 0.5


def load() -> Inputs:
    """Loads digits, with its model as it is before training: speed does not depend on the weights."""
    inputs = load_inputs(load_config("digits"), Path("runs"))
    inputs.model.to(DEVICE).eval().requires_grad_(False)
    return inputs


def prune_for_ever(with_lease: bool, threads: int, started: Event) -> None:
    """Prunes as the neighbour does, as long as there is somebody to disturb."""
    torch.set_num_threads(threads)
    inputs = load()
    settings = CascadeSettings(
        drop_budget=(5.0,) * examine(inputs.model).depth, target_macs=1, criterion="lfs", batch_size=256
    )
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        with lease_on(DEVICE).shared() if with_lease else nullcontext():
            started.set()
            cascade(inputs.model, inputs.splits.probe, inputs.splits.calibration, settings)


class Neighbour:
    """A process that prunes while it is awake."""

    def __init__(self, with_lease: bool, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        started = context.Event()
        self.process = context.Process(target=prune_for_ever, args=(with_lease, threads, started), daemon=True)
        self.process.start()
        started.wait()
        self.stop()

    def stop(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGSTOP)

    def wake(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def measure(threads: int, turns: int, num_rounds: int) -> list[dict[str, Any]]:
    """Measures a row for each condition."""
    torch.set_num_threads(threads)
    inputs, lease = load(), lease_on(DEVICE)
    anatomy = examine(inputs.model)
    target = int(TARGET * count_macs(anatomy, keep_all_plan(anatomy)))
    pruned = apply_plan(inputs.model, scheduled_plan(anatomy, target, "constant", "lfe", 0.85))
    batch = inputs.splits.val.normalized(slice(0, 256), DEVICE)

    def timed() -> Timing:
        return time_against_dense(inputs.model, [pruned], batch, num_rounds=num_rounds)[1][0]

    timings_of: dict[str, list[Timing]] = {condition: [] for condition in CONDITIONS}
    waits = []
    neighbours = {condition: Neighbour("with lease" in condition, threads) for condition in CONDITIONS[1:]}
    try:
        for turn in range(turns):
            for condition in CONDITIONS[turn % 3 :] + CONDITIONS[: turn % 3]:
                if condition == "alone":
                    timings_of[condition].append(timed())
                    continue
                neighbours[condition].wake()
                if "with lease" in condition:
                    start = time.perf_counter()
                    with lease.exclusive():
                        waits.append(time.perf_counter() - start)
                        timings_of[condition].append(timed())
                else:
                    timings_of[condition].append(timed())
                neighbours[condition].stop()
    finally:
        for neighbour in neighbours.values():
            neighbour.end()
    rows = []
    for condition, timings in timings_of.items():
        alone = [one.throughput_img_s / other.throughput_img_s
                 for one, other in zip(timings, timings_of["alone"], strict=True)]  # fmt: skip
        rows.append({
            "threads": threads, "condition": condition,
            **spread("throughput_img_s", [timing.throughput_img_s for timing in timings]),
            **spread("of_alone", alone),
            **spread("speedup", [timing.speedup for timing in timings]),
            "widest_interval": max((timing.speedup_high - timing.speedup_low) / timing.speedup for timing in timings),
            "wait_s_p50": statistics.median(waits) if "with lease" in condition else 0.0,
            "wait_s_max": max(waits) if "with lease" in condition else 0.0,
            "turns": turns,
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def spread(name: str, values: list[float]) -> dict[str, float]:
    low, high = median_interval(values)
    return {name: statistics.median(values), f"{name}_low": low, f"{name}_high": high}


def yield_us(calls: int = 100_000) -> float:
    """Measures the microseconds of `yield_device` while nobody waits."""
    with lease_on(DEVICE).shared():
        start = time.perf_counter()
        for _ in range(calls):
            yield_device()
        return (time.perf_counter() - start) / calls * 1e6


def text_of(rows: list[dict[str, Any]], command: str, turn_us: float) -> str:
    def cell(row: dict[str, Any], name: str, form: str) -> str:
        middle, low, high = (format(row[key], form) for key in (name, f"{name}_low", f"{name}_high"))
        return f"{middle} ({low} to {high})"

    lines = [
        "# A neighbour on the device, with and without a lease", "", f"    {command}", "",
        f"{device_name(DEVICE)}, torch {torch.__version__}. A batch of 256 digits, a model of {TARGET:g} of the",
        "multiply-adds against the dense one, while another process prunes by cascade. Threads are those of each of",
        f"the two. Medians over {rows[0]['turns']} turns with 95 % intervals; of alone: throughput in units of",
        "that of the same turn without a neighbour; wait: from asking for the device to having it, median and most.",
        f"A turn that nobody wants costs the neighbour {turn_us:.1f} µs.", "",
        "![throughput, of alone](lease.png)", "",
        "| threads | condition | images/s | of alone | speed-up | wait |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['threads']} | {row['condition']} | {cell(row, 'throughput_img_s', ',.0f')} "
        f"| {cell(row, 'of_alone', '.3f')} | {cell(row, 'speedup', '.2f')} "
        f"| {row['wait_s_p50'] * 1e3:.0f} ms, {row['wait_s_max'] * 1e3:.0f} ms |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the throughput in units of that alone, with its interval."""
    with drawn(path) as (axes,):
        for index, threads in enumerate(dict.fromkeys(row["threads"] for row in rows)):
            some = [row for row in rows if row["threads"] == threads]
            middle, low, high = ([row[f"of_alone{end}"] for row in some] for end in ("", "_low", "_high"))
            errors = [np.subtract(middle, low), np.subtract(high, middle)]
            places = np.arange(len(some)) + 0.3 * index
            axes.bar(places, middle, width=0.28, yerr=errors, capsize=4, label=f"{threads} threads each")
        axes.axhspan(0.95, 1.05, color="grey", alpha=0.3, label="5 % of alone")
        axes.set_xticks(np.arange(len(CONDITIONS)) + 0.15, CONDITIONS)
        axes.set(ylabel="throughput, of alone", title="A model is timed beside a neighbour that prunes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewest turns and rounds, one thread")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for lease.{md,json,png}")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="of each process, as in a recipe")
    args = parser.parse_args()
    turns, num_rounds = (6, 7) if args.quick else (21, 15)
    rows = [row for threads in (args.threads[:1] if args.quick else args.threads)
            for row in measure(threads, turns, num_rounds)]  # fmt: skip
    turn_us = yield_us()
    text = text_of(rows, " ".join(["python", *sys.argv]), turn_us)
    if args.out is not None:
        (args.out / "lease.md").write_text(text)
        draw(rows, args.out / "lease.png")
        (args.out / "lease.json").write_text(json.dumps({"rows": rows, "give_way_us": turn_us}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
