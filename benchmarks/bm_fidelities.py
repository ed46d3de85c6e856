"""Compares searches with and without rungs: the seconds that each takes to the same hypervolume, replayed.

    python benchmarks/bm_fidelities.py [--quick] [--json] [--out benchmarks/results]

The table (`tests/data/digits_rungs`) is of sweeps of digits in which every pruned model was distilled to the end, and
measured at each of its rungs on the way (tests/data/record_rungs.py). It is searched once to the end of every trial,
without the time that the rungs' measurements took, and once with rungs. Both searches begin with the same candidates
and have the same sampler and two simulated workers, busy for the recorded seconds. Hypervolume is on val, of the trials
that ran to their end. A table has each model once: where the search without rungs has found the best of it, the other
can get there only by the very same models; so the seconds until 99 % of that hypervolume are reported as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pictures import band, drawn

from search.commands.replay import Recorded, replay
from search.front import GrowingFront, hypervolume_of, running_hypervolume
from search.goal import Goal
from search.outcome import Measurement, Outcome, State
from search.recipe import load_config
from search.suggest.ask import CandidateSearch, History
from search.suggest.rungs import Rungs
from search.suggest.samplers import Sampler, SamplerSettings
from search.trial.warm_start import first_candidates

TABLE = Path(__file__).parents[1] / "tests" / "data" / "digits_rungs"
SETS = ("space=papers", "space.recovery=distill", "distill.epochs=48")
"""Settings of the recorded sweeps that matter to a replay."""

REDUCTION_FACTOR = 2
MILESTONES = (10, 20, 40)
"""Numbers of trials to their end, whose hypervolume is then looked for with rungs."""

NEARLY = 0.99
"""Share of the hypervolume that is looked for as well."""
SAMPLERS: tuple[Sampler, ...] = ("auto", "random")
COUNTED = ("measured", "stopped", "again")
"""Kinds of trials that are counted: run to their end, stopped at a rung, tried once more after that."""

MAX_TRIALS = 200
"""The most trials of a search with rungs."""

MAX_TIMES = 2
"""Multiple of the seconds of the search without rungs in which the other may find as much."""

NUM_TIMES = 200
"""Number of points of a curve in the picture."""


class SearchTrace:
    """The hypervolume of a search over its seconds."""

    def __init__(self, outcomes: Sequence[Outcome], dense: Measurement) -> None:
        self.ends = np.array([outcome.ended_s for outcome in outcomes])
        self.hypervolumes = np.array(running_hypervolume(outcomes, Goal(dense=dense)))
        self.num_stopped = sum(outcome.state is State.STOPPED for outcome in outcomes)
        self.num_measured = len(outcomes) - self.num_stopped
        self.num_again = len(outcomes) - len({outcome.candidate for outcome in outcomes})

    def at(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the hypervolume by then."""
        return np.append(0.0, self.hypervolumes)[np.searchsorted(self.ends, seconds, side="right")]

    def first(self, hypervolume: float) -> float:
        """Returns the seconds until there was so much hypervolume; infinite if there never was."""
        (reached,) = np.nonzero(self.hypervolumes >= hypervolume)
        return float(self.ends[reached[0]]) if len(reached) else float("inf")


def replayed(
    recorded: Recorded, sampler: Sampler, seed: int, num_trials: int, full: SearchTrace | None = None
) -> SearchTrace:
    """Searches the table by the simulated clock.

    Args:
        full: trace of a search without rungs; the search then has rungs, and ends once it compares with all of it.
    """
    search = CandidateSearch(
        recorded.space,
        SamplerSettings(sampler=sampler, seed=seed, num_trials=num_trials, has_rungs=full is not None),
        History(first_candidates=first_candidates(recorded.space)),
        Goal(dense=recorded.dense),
        nearest_allowed=recorded.nearest,
    )
    promotes = None if full is None else Rungs(REDUCTION_FACTOR).promotes
    outcomes, growing = list[Outcome](), GrowingFront(Goal(dense=recorded.dense))
    for [outcome] in replay(recorded, search, num_trials, 2, promotes):
        outcomes.append(outcome)
        volume = growing.add(outcome)
        if full is not None and outcome.ended_s > full.ends[-1] and volume >= full.hypervolumes[-1]:
            break
        if full is not None and outcome.ended_s > MAX_TIMES * full.ends[-1]:
            break
    search.close()
    return SearchTrace(outcomes, recorded.dense)


def measure(
    recorded: Recorded, sampler: Sampler, num_seeds: int, milestones: tuple[int, ...]
) -> tuple[list[dict[str, Any]], list[tuple[SearchTrace, SearchTrace]]]:
    """Returns a row for each milestone, and the traces of each seed, without rungs and with."""
    traces = []
    for seed in range(num_seeds):
        full = replayed(recorded, sampler, seed, milestones[-1])
        traces.append((full, replayed(recorded, sampler, seed, MAX_TRIALS, full)))
        print(f"{sampler}, seed {seed}", file=sys.stderr, flush=True)
    rows = []
    for count in milestones:
        volumes = [float(full.hypervolumes[count - 1]) for full, _ in traces]
        row: dict[str, Any] = {
            "sampler": sampler, "trials": count, "hypervolume": float(np.mean(volumes)), "seeds": num_seeds,
            **{kind: fmean(getattr(halved, f"num_{kind}") for _, halved in traces) for kind in COUNTED},
        }  # fmt: skip
        for name, part in (("", 1.0), ("_nearly", NEARLY)):
            wanted = [(part * volume, *pair) for volume, pair in zip(volumes, traces, strict=True)]
            without = [full.first(volume) for volume, full, _ in wanted]
            with_rungs = [halved.first(volume) for volume, _, halved in wanted]
            shares = sorted(then / first for first, then in zip(without, with_rungs, strict=True))
            row |= {
                f"seconds{name}": median(without), f"seconds_with_rungs{name}": median(with_rungs),
                f"share{name}": median(shares), f"least_share{name}": shares[0], f"most_share{name}": shares[-1],
                f"never{name}": shares.count(float("inf")),
            }  # fmt: skip
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows, traces


def draw(traces: dict[Sampler, list[tuple[SearchTrace, SearchTrace]]], path: Path) -> None:
    with drawn(path, len(traces)) as panels:
        for axes, (sampler, pairs) in zip(panels, traces.items(), strict=True):
            times = np.linspace(0, min(full.ends[-1] for full, _ in pairs), NUM_TIMES)
            for index, label in enumerate(("all run to their end", f"with rungs, one of {REDUCTION_FACTOR} goes on")):
                band(axes, times, [pair[index].at(times) for pair in pairs], label)
            title = f"sampler {sampler}: mean and range of {len(pairs)} seeds"
            axes.set(xlabel="simulated seconds of searching", ylabel="hypervolume on val", title=title)


def text_of(rows: list[dict[str, Any]], command: str, recorded: Recorded) -> str:
    measured = [outcome.measurement for outcome in recorded.outcomes if outcome.measurement is not None]
    noise = median((one.speedup_high - one.speedup_low) / 2 / one.speedup for one in measured)
    counts = {row["sampler"]: [f"{row[kind]:.0f} {kind}" for kind in COUNTED] for row in rows}
    lines = [
        "# Rungs", "", f"    {command}", "",
        f"{len(recorded.outcomes)} recorded trials of digits, {', '.join(SETS)}, whose own hypervolume is "
        f"{hypervolume_of(recorded.outcomes, Goal(dense=recorded.dense)):.4f}.",
        f"With rungs one of {REDUCTION_FACTOR} goes on. Trials of these searches, mean of the seeds:",
        "; ".join(f"{sampler}: {', '.join(each)}" for sampler, each in counts.items()) + ".",
        "Hypervolume after so many trials to their end, mean of the seeds; simulated seconds until then, and until the",
        "search with rungs had as much of the same seed: medians. Share: median (least to most of the seeds); never:",
        f"in so many seeds not within {MAX_TIMES} times the seconds of the last milestone. The same",
        f"for {NEARLY:.0%} of that hypervolume (half a speed-up's 95 % interval is {noise:.1%} of it, in the middle).",
        "", "![hypervolume over seconds](fidelities.png)", "",
        "| sampler | trials | hypervolume | seeds | seconds | with rungs | share | never "
        f"| {NEARLY:.0%}: seconds | with rungs | share | never |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['sampler']} | {row['trials']} | {row['hypervolume']:.4f} | {row['seeds']} "
        f"| {_cells(row, '')} | {_cells(row, '_nearly')} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], name: str) -> str:
    share, least, most = (row[f"{kind}{name}"] for kind in ("share", "least_share", "most_share"))
    spread = f"{share:.2f} ({least:.2f} to {most:.2f})"
    return f"{row[f'seconds{name}']:.0f} | {row[f'seconds_with_rungs{name}']:.0f} | {spread} | {row[f'never{name}']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three seeds, fewer trials")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for fidelities.{md,json,png}")
    args = parser.parse_args()
    recorded = Recorded.read(TABLE, load_config("digits", sets=SETS))
    num_seeds, milestones = (3, MILESTONES[:1]) if args.quick else (10, MILESTONES)
    rows, traces = list[dict[str, Any]](), dict[Sampler, list[tuple[SearchTrace, SearchTrace]]]()
    for sampler in SAMPLERS:
        sampler_rows, traces[sampler] = measure(recorded, sampler, num_seeds, milestones)
        rows += sampler_rows
    text = text_of(rows, " ".join(["python", *sys.argv]), recorded)
    if args.out is not None:
        (args.out / "fidelities.md").write_text(text)
        draw(traces, args.out / "fidelities.png")
        (args.out / "fidelities.json").write_text(json.dumps({"rows": finite(rows)}, indent=1) + "\n")
    print(json.dumps({"rows": finite(rows)}) if args.json else text, end="")


def finite(rows: Any) -> Any:
    """Replaces infinity, which JSON lacks, by None, in rows of numbers and of lists of them."""
    if isinstance(rows, list):
        return [finite(row) for row in rows]
    if isinstance(rows, dict):
        return {name: finite(value) for name, value in rows.items()}
    return None if rows == float("inf") else rows


if __name__ == "__main__":
    main()
