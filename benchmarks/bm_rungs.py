"""Compares sweeps with and without rungs: the seconds that each takes to the same hypervolume, live.

    python benchmarks/bm_rungs.py [--quick] [--json] [--out benchmarks/results] [--runs runs]

Sweeps of digits in which every pruned model is distilled, as `vitfront run` starts them: without rungs, and for half
the seconds with rungs, with the same seeds, in turn. Hypervolume is on val, by the sweeps' own measurements, of the
trials that ran to their end. A sweep that is there already goes on to its seconds, or is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bm_fidelities import SETS, SearchTrace, finite
from pictures import band, drawn

from pruning.measure.stopwatch import device_name
from search.commands.run import run_sweep
from search.outcome import Candidate, Outcome
from search.recipe import load_config
from search.records import ledger
from search.records.folder import Folder

REDUCTION_FACTOR = 2
SECONDS = 840
"""Seconds of searching without rungs."""

NUM_SEEDS = 2
PARTS = (0.9, 0.95, 0.99, 1.0)
"""Shares of the final hypervolume of the search without rungs that are looked for."""

COLUMNS = {"seconds": 0, "with_rungs": 0, "shares": 2}
"""Columns of the table -> their decimals."""

NUM_TIMES = 200
"""Number of points of a curve in the picture."""


class Quiet:
    """An observer that tells what a sweep does, but not what its trials do."""

    def stage(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None: ...

    def started(self, trial_id: str, candidate: Candidate) -> None: ...

    def epoch(self, trial_id: str, progress: Mapping[str, float]) -> None: ...

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        print(f"  {outcome.id} {outcome.state.value} {hypervolume:.3f}", file=sys.stderr, flush=True)

    def prepared(self, seconds: float) -> None: ...

    def interrupted(self) -> None: ...


def swept(runs: Path, seed: int, factor: float, seconds: float) -> SearchTrace:
    name = f"rungs-{seed}-{factor:g}"
    folder = Folder(runs, name)
    left_s = seconds - max((outcome.ended_s for outcome in ledger.read(folder.ledger)), default=0.0)
    if left_s > 0 or not folder.front.is_file():
        print(name, file=sys.stderr, flush=True)
        sets = [
            *SETS, f"name={name}", "search.trials=200", "search.patience=0", f"search.seed={seed}",
            f"search.time_budget={max(left_s, 1):.0f}s", f"search.reduction_factor={factor}",
        ]  # fmt: skip
        run_sweep(load_config("digits", sets=sets), runs, Quiet())
    outcomes = [outcome for outcome in ledger.read(folder.ledger) if outcome.ended_s <= seconds]
    return SearchTrace(outcomes, folder.read_front().goal.dense)


def rows_of(pairs: list[tuple[SearchTrace, SearchTrace]]) -> list[dict[str, Any]]:
    rows = []
    for part in PARTS:
        wanted = [(part * float(full.hypervolumes[-1]), full, halved) for full, halved in pairs]
        without = [full.first(volume) for volume, full, _ in wanted]
        with_rungs = [halved.first(volume) for volume, _, halved in wanted]
        shares = [then / first for first, then in zip(without, with_rungs, strict=True)]
        rows.append({"part": part, "seconds": without, "with_rungs": with_rungs, "shares": shares})
    return rows


def text_of(
    rows: list[dict[str, Any]], pairs: list[tuple[SearchTrace, SearchTrace]], command: str, seconds: float
) -> str:
    lines = [
        "# Rungs, live", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}. Sweeps of digits, {', '.join(SETS)}, sampler auto, {seconds:g}",
        f"seconds of searching, half as many with rungs, where one of {REDUCTION_FACTOR} goes on. Seconds until there",
        "was so much of the hypervolume that the search without rungs of the same seed had in the end, of each seed;",
        "median of their ratios; inf: not within its seconds. Again: tried once more, to the end, after a stop.",
        "", "![hypervolume over seconds](rungs.png)", "",
        "| hypervolume | seconds | with rungs | share | median |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        cells = [", ".join(f"{value:.{digits}f}" for value in row[name]) for name, digits in COLUMNS.items()]
        lines.append(f"| {row['part']:.0%} | {' | '.join(cells)} | {median(row['shares']):.2f} |")
    lines += ["", "| seed | rungs | hypervolume | measured | stopped | again |", "|---|---|---|---|---|---|"]
    for seed, pair in enumerate(pairs):
        for name, trace in zip(("no", "yes"), pair, strict=True):
            counts = f"{trace.num_measured} | {trace.num_stopped} | {trace.num_again}"
            lines.append(f"| {seed} | {name} | {trace.hypervolumes[-1]:.3f} | {counts} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 120 seconds")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for rungs.{md,json,png}")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the sweeps are kept")
    args = parser.parse_args()
    num_seeds, seconds = (1, 120) if args.quick else (NUM_SEEDS, SECONDS)
    pairs = []
    for seed in range(num_seeds):
        in_turn = (1, REDUCTION_FACTOR) if seed % 2 == 0 else (REDUCTION_FACTOR, 1)
        traces = {factor: swept(args.runs, seed, factor, seconds / factor) for factor in in_turn}
        pairs.append((traces[1], traces[REDUCTION_FACTOR]))
    rows = rows_of(pairs)
    text = text_of(rows, pairs, " ".join(["python", *sys.argv]), seconds)
    if args.out is not None:
        (args.out / "rungs.md").write_text(text)
        (args.out / "rungs.json").write_text(json.dumps({"rows": finite(rows)}, indent=1) + "\n")
        with drawn(args.out / "rungs.png") as (axes,):
            for index, label in enumerate(("all run to their end", f"with rungs, one of {REDUCTION_FACTOR} goes on")):
                times = np.linspace(0, seconds / (1, REDUCTION_FACTOR)[index], NUM_TIMES)
                band(axes, times, [pair[index].at(times) for pair in pairs], label)
            title = f"sweeps of digits: mean and range of {num_seeds} seeds"
            axes.set(xlabel="seconds of searching", ylabel="hypervolume on val", title=title)
    print(json.dumps({"rows": finite(rows)}) if args.json else text, end="")


if __name__ == "__main__":
    main()
