"""Compares searches with and without rungs where trials do not train, on a recorded sweep with made-up rungs.

    python benchmarks/bm_short_rungs.py [--quick] [--json] [--out benchmarks/results]

Without training, the only rung is the candidate pruned and measured with a quarter of the images. The table
(`tests/data/digits_table`) has no rungs, so they are made up: speed-up as in the end, and accuracy with the noise of a
quarter of its 360 val images. A trial takes one second, and its rung a share of one more: 0.25 is what the images take,
0.4 what a rung took of a cascade and 0.5 of `global` on digits, where setting up is a part.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from search.commands.replay import Recorded, replay
from search.front import running_hypervolume
from search.goal import Goal
from search.outcome import Outcome
from search.recipe import load_config
from search.suggest.ask import CandidateSearch, History
from search.suggest.rungs import Rungs
from search.suggest.samplers import Sampler, SamplerSettings
from search.trial.warm_start import first_candidates

TABLE = Path(__file__).parents[1] / "tests" / "data" / "digits_table"
NUM_AT_RUNG = 90
"""Number of val images at the rung."""

RUNG_SHARES = (0.25, 0.4)
"""Seconds of a rung, as shares of the trial's."""

FACTORS = (1, 2, 4)
"""One trial in so many goes on; 1 is a search without rungs."""

SECONDS = (15, 30)
"""Seconds of searching with one worker after which hypervolume is read."""

NUM_SEEDS: dict[Sampler, int] = {"random": 20, "gp": 4}


def with_rungs(recorded: Recorded, share: float) -> Recorded:
    """Returns the table with made-up rungs."""
    rng = np.random.default_rng(0)

    def outcome_of(outcome: Outcome) -> Outcome:
        assert outcome.measurement is not None
        top1, speedup = outcome.measurement.top1, outcome.measurement.speedup
        at_rung = float(np.clip(top1 + rng.normal(0, np.sqrt(top1 * (1 - top1) / NUM_AT_RUNG)), 0, 1))
        return replace(outcome, rungs=((at_rung, speedup),), rung_spans=((0.0, share),), seconds=1.0 + share)

    return Recorded([outcome_of(outcome) for outcome in recorded.outcomes], recorded.dense, recorded.space)


def reached(recorded: Recorded, sampler: Sampler, factor: float, seed: int) -> list[float]:
    """Returns the hypervolume after `SECONDS`."""
    goal, num_trials = Goal(dense=recorded.dense), 4 * SECONDS[-1]
    search = CandidateSearch(
        recorded.space,
        SamplerSettings(sampler=sampler, seed=seed, num_trials=num_trials, has_rungs=factor > 1),
        History(first_candidates=first_candidates(recorded.space)),
        goal,
        nearest_allowed=recorded.nearest,
    )
    promotes = Rungs(factor).promotes if factor > 1 else None
    outcomes = list[Outcome]()
    for [outcome] in replay(recorded, search, num_trials, 1, promotes):
        if outcome.ended_s > SECONDS[-1]:
            break
        outcomes.append(outcome)
    search.close()
    volumes = [0.0, *running_hypervolume(outcomes, goal)]
    ends = [outcome.ended_s for outcome in outcomes]
    return [volumes[int(np.searchsorted(ends, seconds, side="right"))] for seconds in SECONDS]


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Rungs where trials do not train", "", f"    {command}", "",
        "A search of the recorded digits sweep; a trial takes one second, its rung (a quarter of the images) a share",
        "more. Mean hypervolume over the seeds and its 95 % interval. No clock is read: any machine gives the same.",
        "",
        "| sampler | rung takes | one goes on of | after | hypervolume | seeds |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['sampler']} | {row['rung_share']} | {row['factor']} | {row['seconds']} s "
        f"| {row['hypervolume']:.3f} ± {row['half_interval']:.3f} | {row['seeds']} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="random alone")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for short_rungs.{md,json}")
    args = parser.parse_args()
    table = Recorded.read(TABLE, load_config("digits", sets=["space=papers"]))
    rows = list[dict[str, Any]]()
    samplers: list[Sampler] = ["random"] if args.quick else ["random", "gp"]
    for sampler in samplers:
        for share in RUNG_SHARES:
            recorded = with_rungs(table, share)
            for factor in FACTORS:
                if factor == 1 and share != RUNG_SHARES[0]:
                    continue  # no rung is measured
                volumes = np.array([reached(recorded, sampler, factor, seed) for seed in range(NUM_SEEDS[sampler])])
                half = t.ppf(0.975, len(volumes) - 1) * volumes.std(axis=0, ddof=1) / np.sqrt(len(volumes))
                for seconds, mean, spread in zip(SECONDS, volumes.mean(axis=0), half, strict=True):
                    rows.append({
                        "sampler": sampler, "rung_share": share, "factor": factor, "seconds": seconds,
                        "hypervolume": float(mean), "half_interval": float(spread), "seeds": len(volumes),
                    })  # fmt: skip
                    print(rows[-1], file=sys.stderr, flush=True)
    text = text_of(rows, " ".join(["python", *sys.argv]))
    if args.out is not None:
        (args.out / "short_rungs.md").write_text(text)
        (args.out / "short_rungs.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
