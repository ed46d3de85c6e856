"""Rungs against none: how long a search of trained models takes to the same hypervolume.

    python benchmarks/bm_fidelities.py [--quick] [--json] [--out benchmarks/results] [--table FOLDER]

The table (`tests/data/digits_rungs`, not recorded yet: give another by --table) is of sweeps of digits in which every
pruned model was distilled to the end, and measured at each of its rungs on the way (tests/data/record_rungs.py). It is
searched once to the end of every trial, without the time that the rungs' measurements took, and once with rungs, from
which the best third goes on. Both begin with the same candidates, have the same sampler and two simulated workers, busy
for the recorded seconds. Hypervolume is on val, of the trials that ran to their end.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pictures import band, drawn

from search.config import load_config
from search.front import hypervolume_of, running_hypervolume
from search.outcome import State
from search.replay import Recorded, replay
from search.scheduler import NonDominatedHalving
from search.searcher import StudySearcher

TABLE = Path(__file__).parents[1] / "tests" / "data" / "digits_rungs"
SETS = ("space.recovery=distill", "distill.epochs=48")
"""Of the recorded sweeps, as far as they matter to a replay."""

REDUCTION_FACTOR = 3
MILESTONES = (10, 20, 40)
"""Trials to their end, whose hypervolume is then looked for with rungs."""

NUM_TIMES = 200
"""In the picture."""


class Course:
    """A search, by the simulated clock."""

    def __init__(self, recorded: Recorded, seed: int, num_trials: int, factor: float | None) -> None:
        searcher = StudySearcher(
            recorded.space, known=(), sampler="auto", seed=seed, num_trials=num_trials, has_rungs=factor is not None,
            dense=recorded.dense, settle=recorded.nearest,
        )  # fmt: skip
        scheduler = None if factor is None else NonDominatedHalving(factor)
        outcomes = [each for some in replay(recorded, searcher, num_trials, 2, scheduler) for each in some]
        searcher.finish()
        self.num_stopped = sum(each.state is State.STOPPED for each in outcomes)
        self.ends = np.array([each.ended_s for each in outcomes])
        self.hypervolumes = np.array(running_hypervolume(outcomes, recorded.dense))

    def at(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """The hypervolume by then."""
        return np.append(0.0, self.hypervolumes)[np.searchsorted(self.ends, seconds, side="right")]

    def first(self, hypervolume: float) -> float:
        """When there was so much; infinite if there never was."""
        (reached,) = np.nonzero(self.hypervolumes >= hypervolume)
        return float(self.ends[reached[0]]) if len(reached) else float("inf")


def measure(
    recorded: Recorded, num_seeds: int, milestones: tuple[int, ...]
) -> tuple[list[dict[str, Any]], list[tuple[Course, Course]]]:
    """A row for each milestone, and the courses of each seed, without rungs and with."""
    courses = [
        (Course(recorded, seed, milestones[-1], None), Course(recorded, seed, len(recorded.outcomes), REDUCTION_FACTOR))
        for seed in range(num_seeds)
    ]
    rows = []
    for count in milestones:
        found = [float(whole.hypervolumes[count - 1]) for whole, _ in courses]
        pairs = list(zip(found, courses, strict=True))
        without = [whole.first(volume) for volume, (whole, _) in pairs]
        with_rungs = [halved.first(volume) for volume, (_, halved) in pairs]
        shares = sorted(then / first for first, then in zip(without, with_rungs, strict=True))
        rows.append({
            "trials": count, "hypervolume": float(np.mean(found)), "seeds": num_seeds, "seconds": median(without),
            "seconds_with_rungs": median(with_rungs), "share": median(shares), "least_share": shares[0],
            "most_share": shares[-1],
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows, courses


def draw(courses: list[tuple[Course, Course]], path: Path) -> None:
    with drawn(path) as (axes,):
        times = np.linspace(0, min(whole.ends[-1] for whole, _ in courses), NUM_TIMES)
        for index, label in enumerate(("all run to their end", f"with rungs, one of {REDUCTION_FACTOR} goes on")):
            band(axes, times, [pair[index].at(times) for pair in courses], label)
        title = "digits recorded, each model distilled: mean and range of the seeds"
        axes.set(xlabel="simulated seconds of searching", ylabel="hypervolume on val", title=title)


def text_of(rows: list[dict[str, Any]], command: str, recorded: Recorded, courses: list[tuple[Course, Course]]) -> str:
    stopped = np.mean([halved.num_stopped for _, halved in courses])
    lines = [
        "# Rungs", "", f"    {command}", "",
        f"{len(recorded.outcomes)} recorded trials of digits, {', '.join(SETS)}, whose own hypervolume is "
        f"{hypervolume_of(recorded.outcomes, recorded.dense):.4f}.",
        f"With rungs one of {REDUCTION_FACTOR} goes on; over all of the table {stopped:.0f} trials were stopped.",
        "Hypervolume after so many trials to their end, mean of the seeds; simulated seconds until then, and until the",
        "search with rungs had as much of the same seed: medians. Share: median, least and most of the seeds.",
        "", "![hypervolume over seconds](fidelities.png)", "",
        "| trials | hypervolume | seeds | seconds | seconds with rungs | share | least | most |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['trials']} | {row['hypervolume']:.4f} | {row['seeds']} | {row['seconds']:.0f} "
        f"| {row['seconds_with_rungs']:.0f} | {row['share']:.2f} | {row['least_share']:.2f} | {row['most_share']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three seeds, fewer trials")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for fidelities.{md,json,png}")
    parser.add_argument("--table", type=Path, default=TABLE, help="folder of a sweep that passed rungs")
    args = parser.parse_args()
    recorded = Recorded.read(args.table, load_config("digits", sets=SETS))
    rows, courses = measure(recorded, 3, MILESTONES[:1]) if args.quick else measure(recorded, 10, MILESTONES)
    text = text_of(rows, " ".join(["python", *sys.argv]), recorded, courses)
    if args.out is not None:
        (args.out / "fidelities.md").write_text(text)
        draw(courses, args.out / "fidelities.png")
        (args.out / "fidelities.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
