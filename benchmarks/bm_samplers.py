"""Compares samplers on a recorded sweep: hypervolume after so many trials, over seeds.

    python benchmarks/bm_samplers.py [--quick] [--json] [--out benchmarks/results] [--table FOLDER]

The table (`tests/data/digits_table`) is of finished sweeps of digits, by random candidates and two samplers of Optuna
(tests/data/record_table.py). Every sampler searches it with the same first candidates, on two simulated workers. Its
suggestions are moved to the nearest recorded candidate, none twice, which favours the random sampler less where they
lie dense. Hypervolume is that of the search (val), as in `vitfront run`. A grid ends once nothing new of it is left.

The table is not fresh to `auto`: 900 candidates a suggestion, instead of 1,800, were chosen on six seeds of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pictures import band, drawn
from scipy.stats import t

from search.commands.replay import Recorded, replay
from search.front import hypervolume_of, running_hypervolume
from search.goal import Goal
from search.recipe import load_config
from search.suggest.ask import CandidateSearch, History
from search.suggest.samplers import Sampler, SamplerSettings
from search.trial.warm_start import first_candidates

TABLE = Path(__file__).parents[1] / "tests" / "data" / "digits_table"
RUNS: dict[Sampler, tuple[int, ...]] = {
    "auto": (20, 40), "tpe": (20, 40, 120), "nsga2": (20, 40, 120), "random": (20, 40, 120), "grid": (20, 40, 120),
}  # fmt: skip
"""Sampler -> the numbers of trials after which its hypervolume is read."""


Curves = dict[Sampler, NDArray[np.float64]]
"""Sampler -> (seeds, trials) hypervolume after each trial."""


def measure(
    recorded: Recorded, num_seeds: int, runs: dict[Sampler, tuple[int, ...]]
) -> tuple[list[dict[str, Any]], Curves]:
    rows, curves, goal = list[dict[str, Any]](), Curves(), Goal(dense=recorded.dense)
    for sampler, milestones in runs.items():
        start = time.monotonic()
        volumes = np.empty((num_seeds, milestones[-1]))
        for seed in range(num_seeds):
            search = CandidateSearch(
                recorded.space,
                SamplerSettings(sampler=sampler, seed=seed, num_trials=milestones[-1]),
                History(first_candidates=first_candidates(recorded.space)),
                goal,
                nearest_allowed=recorded.nearest,
            )
            trials = replay(recorded, search, milestones[-1], num_workers=2)
            outcomes = [outcome for outcomes in trials for outcome in outcomes]
            search.close()
            reached = running_hypervolume(outcomes, goal)
            volumes[seed, : len(reached)], volumes[seed, len(reached) :] = reached, reached[-1]
        curves[sampler] = volumes
        seconds = (time.monotonic() - start) / num_seeds / milestones[-1]
        values = volumes[:, np.array(milestones) - 1]
        half = t.ppf(0.975, num_seeds - 1) * values.std(axis=0, ddof=1) / np.sqrt(num_seeds)
        for count, mean, spread in zip(milestones, values.mean(axis=0), half, strict=True):
            rows.append({
                "sampler": sampler, "trials": count, "hypervolume": float(mean), "half_interval": float(spread),
                "seeds": num_seeds, "seconds_a_suggestion": seconds,
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows, curves


def draw(curves: Curves, best: float, path: Path) -> None:
    with drawn(path) as (axes,):
        for sampler, volumes in curves.items():
            band(axes, np.arange(1, volumes.shape[1] + 1), volumes, sampler)
        axes.axhline(best, color="grey", linestyle=":", label="the whole table")
        axes.set(xlabel="trials", ylabel="hypervolume on val", title="digits recorded: mean and range of the seeds")


def text_of(rows: list[dict[str, Any]], command: str, num_rows: int, best: float) -> str:
    lines = [
        "# Samplers on a recorded sweep", "", f"    {command}", "",
        f"{num_rows} recorded trials of digits, whose own hypervolume is {best:.4f}.",
        "Mean over the seeds and its 95 % interval.", "", "![hypervolume over trials](samplers.png)",
        "", "| sampler | trials | hypervolume | seeds | seconds a suggestion |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['sampler']} | {row['trials']} | {row['hypervolume']:.4f} ± {row['half_interval']:.4f} "
        f"| {row['seeds']} | {row['seconds_a_suggestion']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three seeds, fewer trials")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for samplers.{md,json,png}")
    parser.add_argument("--table", type=Path, default=TABLE, help="folder of a finished sweep")
    args = parser.parse_args()
    runs = {name: counts[:1] for name, counts in RUNS.items()} if args.quick else RUNS
    recorded = Recorded.read(args.table, load_config("digits"))
    rows, curves = measure(recorded, 3 if args.quick else 10, runs)
    best = hypervolume_of(recorded.outcomes, Goal(dense=recorded.dense))
    text = text_of(rows, " ".join(["python", *sys.argv]), len(recorded.outcomes), best)
    if args.out is not None:
        (args.out / "samplers.md").write_text(text)
        draw(curves, best, args.out / "samplers.png")
        (args.out / "samplers.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
