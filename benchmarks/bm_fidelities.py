"""Rungs against none: how long a search of trained models takes to the same hypervolume.

    python benchmarks/bm_fidelities.py [--quick] [--json] [--out benchmarks/results]

Real sweeps of digits, in which every model is distilled after it was pruned; once all trials run to their end, once the
best third of those at a rung goes on. Both begin with the same candidates and have the same sampler. Seconds are those
of searching, from the start of the trials; hypervolume is on val, of the trials that ran to their end.

Seed 0 is not reported: who goes on from a rung was chosen on it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import band, drawn

from pruning.stopwatch import device_name
from search import ledger
from search.compare import Course, dense_of, read_course
from search.config import load_config
from search.folder import Folder
from search.outcome import State
from search.progress import ProgressLine
from search.sweep import run_sweep

RUNS = Path("runs")
REDUCTION_FACTOR = 3
NUM_TIMES = 200
"""In the picture."""
SETS = (
    "space.recovery=distill",
    "distill.epochs=18",
    "search.patience=0",
    "measure.num_rounds=11",
)


def run(runs: Path, factor: int, seed: int, seconds: float) -> tuple[Course, dict[str, int]]:
    """The course of a sweep, and how many trials ended in which state."""
    from rich.console import Console

    name = f"factor-{factor}-seed-{seed}"
    sets = [*SETS, f"search.reduction_factor={factor}", f"search.seed={seed}"]
    config = load_config("digits", name=name, trials=500, time_budget=f"{seconds:g}", sets=sets)
    with ProgressLine(Console(stderr=True)) as line:
        run_sweep(config, runs, line)
    dense = dense_of(Folder(runs, f"factor-1-seed-{seed}").read_front())
    states = Counter(outcome.state.value for outcome in ledger.read(Folder(runs, name).ledger))
    return read_course(runs, name, dense), dict(states)


def seconds_to(course: Course, hypervolume: float) -> float | None:
    """When the search had found so much; None if it never did."""
    pairs = zip(course.hypervolumes, course.seconds, strict=True)
    return min((end for volume, end in pairs if volume >= hypervolume), default=None)


def measure(seeds: range, seconds: float) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        if (RUNS / ".cache").is_dir():  # of the trained dense model
            shutil.copytree(RUNS / ".cache", runs / ".cache")
        for seed in seeds:
            whole, states = run(runs, 1, seed, seconds)
            halved, halved_states = run(runs, REDUCTION_FACTOR, seed, seconds)
            reached = whole.after(seconds)  # what ends later does not count
            first = seconds_to(whole, reached)
            then = seconds_to(halved, reached)
            rows.append({
                "seed": seed, "hypervolume": reached, "seconds": first, "seconds_with_rungs": then,
                "share": None if then is None or not first else then / first,
                "hypervolume_with_rungs": halved.after(seconds), "budget_s": seconds,
                "trials": sum(states.values()), "trials_with_rungs": sum(halved_states.values()),
                "stopped": halved_states.get(State.STOPPED.value, 0),
                "courses": [[each.after(at) for at in np.linspace(0, seconds, NUM_TIMES)] for each in (whole, halved)],
            })  # fmt: skip
            print({name: value for name, value in rows[-1].items() if name != "courses"}, file=sys.stderr, flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    with drawn(path) as (axes,):
        times = np.linspace(0, rows[0]["budget_s"], NUM_TIMES)
        for index, label in enumerate(("all run to their end", f"with rungs, one of {REDUCTION_FACTOR} goes on")):
            band(axes, times, [row["courses"][index] for row in rows], label)
        title = "digits, each model distilled: mean and range of the seeds"
        axes.set(xlabel="seconds of searching", ylabel="hypervolume on val", title=title)


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    shares = [row["share"] for row in rows if row["share"] is not None]
    mean = f"{np.exp(np.mean(np.log(shares))):.2f}" if shares else "-"
    lines = [
        "# Rungs", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}, 2 workers, torch {torch.__version__}.", f"digits, {', '.join(SETS)}.",
        f"With rungs one of {REDUCTION_FACTOR} goes on. Seconds: when the search without them had found what it had in",
        "its budget, and when the one with rungs had found as much.",
        f"Geometric mean of their shares: {mean}, over the {len(shares)} of {len(rows)} seeds that came there.",
        "", "![hypervolume over seconds](fidelities.png)", "",
        "| seed | hypervolume | seconds | seconds with rungs | share | trials | with rungs | stopped | in the end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        then = "-" if row["seconds_with_rungs"] is None else f"{row['seconds_with_rungs']:.0f}"
        share = "-" if row["share"] is None else f"{row['share']:.2f}"
        lines.append(
            f"| {row['seed']} | {row['hypervolume']:.4f} | {row['seconds']:.0f} | {then} | {share} | {row['trials']} "
            f"| {row['trials_with_rungs']} | {row['stopped']} | {row['hypervolume_with_rungs']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a minute each")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for fidelities.{md,json,png}")
    parser.add_argument("--seconds", type=float, default=240, help="of each search")
    args = parser.parse_args()
    rows = measure(range(1), 60) if args.quick else measure(range(1, 4), args.seconds)
    text = text_of(rows, " ".join(["python", *sys.argv]))
    if args.out is not None:
        (args.out / "fidelities.md").write_text(text)
        draw(rows, args.out / "fidelities.png")
        (args.out / "fidelities.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
