"""Measures how soon a sweep has something to show: its first trial, five points, and all that it prepares.

    python benchmarks/bm_first_front.py [--quick] [--json] [--out benchmarks/results]

Each row is one `vitfront run` in a process of its own with an empty folder for runs, timed from its start (imports,
Ray, MLflow and the reading of images included) by the lines that it prints. A point is a measured model that none of
those measured so far dominates. The dense model of digits is trained before, by another sweep, since the seconds after
the training are asked for: its row begins with the weights in `runs/.cache`, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from commands import ROOT, run_command

from pruning.measure.stopwatch import device_name
from search.pareto import non_dominated

NUM_POINTS = 5
TIME_BUDGET = "300s"

TASKS = {"digits": ["digits"], "imagenet-mini": [str(Path(__file__).with_name("imagenet_mini.yaml"))]}
"""Name of a task -> the first arguments of `vitfront run`."""

LIMITS = {
    "digits": {"seconds_to_5_points": 20.0},
    "imagenet-mini": {"seconds_to_first": 20.0, "seconds_to_5_points": 90.0, "prepared_s": 120.0},
}
"""Name of a task -> the most seconds that are asked for; those of digits count from its first line."""


def run(task: str, seed: int, folder: Path) -> dict[str, Any]:
    """Runs the command, and tells what was there when."""
    done = run_command([
        *TASKS[task], "--name", f"first-{seed}", "--runs", str(folder), "--time-budget", TIME_BUDGET,
        "--set", f"search.seed={seed}",
    ])  # fmt: skip
    values = np.array([(point.top1, point.speedup) for point in done.points])
    sizes = [len(non_dominated(values[: count + 1])) for count in range(len(values))]
    seconds = [point.ended_s for point in done.points]
    front = json.loads((folder / f"first-{seed}" / "front.json").read_text(encoding="utf-8"))
    return {
        "task": task, "seed": seed, "first_line_s": done.first_line_s, "seconds_to_first": seconds[0],
        "seconds_to_5_points": next(
            (when for when, size in zip(seconds, sizes, strict=True) if size >= NUM_POINTS), None
        ),
        "prepared_s": done.prepared_s, "command_s": done.command_s, "busy_share": front["busy_share"],
        "trials": front["trials"], "points": list(zip(seconds, sizes, strict=True)),
    }  # fmt: skip


def measure(tasks: Sequence[str], num_runs: int) -> list[dict[str, Any]]:
    rows = []
    for task in tasks:
        for seed in range(num_runs):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch, "runs")
                if task == "digits":  # trained once, and copied
                    train_digits(folder)
                rows.append(run(task, seed, folder))
            print({key: value for key, value in rows[-1].items() if key != "points"}, file=sys.stderr, flush=True)
    return rows


def train_digits(folder: Path) -> None:
    """Leaves the trained weights in a new folder of runs, and nothing else."""
    kept = ROOT / "runs" / ".cache"
    command = [sys.executable, "-m", "search.cli", "run", "digits", "--name", "first-front", "--trials", "1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (folder / ".cache").mkdir(parents=True)
    for weights in kept.glob("*.safetensors"):
        shutil.copy(weights, folder / ".cache")


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# The first front", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}, Ray {ray.__version__}, torch {torch.__version__}; seconds from the start",
        "of the command. Points are measured models that no other dominates. In brackets: the most that is asked for;",
        "that of digits counts from the first line, when the model is there.", "",
        "![points over seconds](first_front.png)", "",
        "| task | run | first line | first trial | 5 points | all prepared | command | trials | slots busy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        cells = [seconds_of(row[key]) for key in KEYS]
        busy = f"{100 * row['busy_share']:.0f} %"
        lines.append(f"| {row['task']} | {row['seed']} | {' | '.join(cells)} | {row['trials']} | {busy} |")
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task, limits = [row for row in rows if row["task"] == task], LIMITS[task]
        cells = []
        for key in KEYS:
            asked = f" ({limits[key]:.0f})" if key in limits else ""
            known = [row[key] for row in of_task if row[key] is not None]
            cells.append(f"{seconds_of(median(known) if known else None)}{asked}")
        busy = median(row["busy_share"] for row in of_task)
        lines.append(f"| {task} | median | {' | '.join(cells)} | | {100 * busy:.0f} % |")
    return "\n".join(lines) + "\n"


def seconds_of(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


KEYS = ("first_line_s", "seconds_to_first", "seconds_to_5_points", "prepared_s", "command_s")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the points over seconds, a panel a task."""
    from pictures import drawn

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    with drawn(path, len(tasks)) as panels:
        for axes, task in zip(panels, tasks, strict=True):
            for row in rows:
                if row["task"] == task and row["points"]:
                    axes.step(*zip(*row["points"], strict=True), where="post", label=f"run {row['seed']}")
            axes.axhline(NUM_POINTS, color="grey", linestyle=":")
            axes.set(xlabel="seconds since the command began", ylabel="points of the front", title=task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits, once")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for first_front.{md,json,png}")
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--num-runs", type=int, default=3)
    args = parser.parse_args()
    rows = measure(["digits"], 1) if args.quick else measure(args.tasks, args.num_runs)
    command = " ".join(["python", *sys.argv])
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "first_front.md").write_text(text_of(rows, command), encoding="utf-8")
        (args.out / "first_front.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
        draw(rows, args.out / "first_front.png")
    print(json.dumps({"rows": rows}) if args.json else text_of(rows, command), end="")


if __name__ == "__main__":
    main()
