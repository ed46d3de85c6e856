"""Measures the spread of a speed-up from process to process, with freed memory kept and without.

    python benchmarks/bm_memory.py [--quick] [--json] [--out benchmarks/results]

Fresh processes, of both kinds in turn, time the same pruned model of digits against the dense one, on one thread.
Before, each allocates and frees pieces of random sizes, as a trial's other work would: up to another size in each,
since the largest piece that was ever freed tells glibc from which size on it gives memory back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from pictures import drawn

from pruning.measure.cost import count_macs
from pruning.measure.stopwatch import device_name, time_against_dense
from pruning.methods.schedule import scheduled_plan
from pruning.model.anatomy import examine
from pruning.model.surgery import apply_plan, keep_all_plan
from search.recipe import load_config
from search.trial.inputs import load_inputs

KINDS = ("freed memory kept", "as glibc does")
NUM_ROUNDS = 21
TARGET = 0.3
MOST_MIB = (0, 1, 2, 4, 8, 16)
"""Largest sizes of the pieces that a process frees before it measures, in MiB."""


def time_once(is_kept: bool, seed: int, results: Connection) -> None:
    """Sends speed-up, milliseconds of a dense batch, and page faults a forward pass; runs in a fresh process."""
    torch.set_num_threads(1)
    inputs = load_inputs(load_config("digits"), Path("runs"))
    model = inputs.model.eval().requires_grad_(False)  # speed does not depend on the weights
    anatomy = examine(model)
    target = int(TARGET * count_macs(anatomy, keep_all_plan(anatomy)))
    pruned = apply_plan(model, scheduled_plan(anatomy, target, "constant", "lfe", 0.85))
    batch = inputs.splits.val.normalized(slice(0, 256), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for size in torch.randint(1, (MOST_MIB[seed % len(MOST_MIB)] << 20) + 2, (40,), generator=generator).tolist():
        torch.zeros(size, dtype=torch.uint8)
    with nullcontext() if is_kept else patch("pruning.measure.stopwatch.keep_freed_memory", lambda: None):
        before = getrusage(RUSAGE_SELF).ru_minflt
        dense, (timing,) = time_against_dense(model, [pruned], batch, num_rounds=NUM_ROUNDS)
        faults = getrusage(RUSAGE_SELF).ru_minflt - before
    results.send((timing.speedup, dense.latency_ms_p50, faults / (2 * NUM_ROUNDS)))


def measure(num_processes: int) -> list[dict[str, Any]]:
    """Measures both kinds, a row each."""
    context = multiprocessing.get_context("spawn")
    results: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    for seed in range(num_processes):
        for kind in KINDS:
            receiver, sender = context.Pipe()
            process = context.Process(target=time_once, args=(kind == KINDS[0], seed, sender))
            process.start()
            results[kind].append(receiver.recv())
            process.join()
            print(kind, results[kind][-1], file=sys.stderr, flush=True)
    rows = []
    for kind, figures in results.items():
        speedups, dense_ms, faults = zip(*figures, strict=True)
        rows.append({
            "memory": kind, "processes": num_processes, "speedup": median(speedups), "least": min(speedups),
            "most": max(speedups), "dense_ms": median(dense_ms), "faults": median(faults), "most_faults": max(faults),
            "speedups": speedups,
        })  # fmt: skip
    return rows


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Memory of forward passes", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}. A batch of 256 digits on one thread, a model",
        f"of {TARGET:g} of the multiply-adds against the dense one, in {rows[0]['processes']} fresh processes of each.",
        "Medians over the processes; faults: page faults a forward pass.", "", "![speed-ups](memory.png)", "",
        "| memory | speed-up | least | most | dense ms | faults | most faults |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['memory']} | {row['speedup']:.2f} | {row['least']:.2f} | {row['most']:.2f} | {row['dense_ms']:.1f} "
        f"| {row['faults']:,.0f} | {row['most_faults']:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    with drawn(path) as (axes,):
        for row in rows:
            axes.plot(sorted(row["speedups"]), "o-", label=row["memory"])
        title = "One pruned model in fresh processes"
        axes.set(xlabel="process, by its speed-up", ylabel="speed-up", title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three processes of each kind")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for memory.{md,json,png}")
    args = parser.parse_args()
    rows = measure(3 if args.quick else 2 * len(MOST_MIB))
    text = text_of(rows, " ".join(["python", *sys.argv]))
    if args.out is not None:
        (args.out / "memory.md").write_text(text)
        draw(rows, args.out / "memory.png")
        (args.out / "memory.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
