"""Seconds of a trial alone, and of the same trial after others, whose results it reuses.

    python benchmarks/bm_trial.py [--quick] [--json] [--out benchmarks/results]

The first candidates of a sweep, then some that share their beginning, or their shape, with one of them: each is run
with everything done anew (before), then with the cache of a worker that ran those before it (after), in one process.
Mean and standard deviation over the candidates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pruning.measure.stopwatch import device_name
from pruning.model.exits import truncate
from pruning.repair.sensitivity import BlockSensitivity, measure_sensitivity
from search.method import METHODS, Method
from search.outcome import Candidate, Outcome
from search.recipe import load_config
from search.space import Space
from search.trial.context import TrialContext
from search.trial.first_look import look
from search.trial.inputs import load_inputs
from search.trial.prepare import prepare
from search.trial.reuse import WorkerCache, measured_before, shape_key
from search.trial.trial import run_to_end
from search.trial.warm_start import first_candidates

RECIPES = {"digits": "digits", "imagenet-mini": str(Path(__file__).with_name("imagenet_mini.yaml"))}
PRUNING: tuple[Method, ...] = ("cascade", "global")
"""The methods that are timed."""


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Runs a function and gives its seconds and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def candidates(space: Space, method: Method) -> list[Candidate]:
    """Gives the first candidates of a sweep, then the first pruned one with other budgets or another target."""
    first = first_candidates(space)
    pruned = next(candidate for candidate in first if candidate.target_ratio < 1)
    if not METHODS[method].has_budgets:
        return [*first, pruned, replace(pruned, target_ratio=pruned.target_ratio * 0.99)]
    budgets, half = pruned.drop_budget, space.depth // 2
    return [
        *first,
        replace(pruned, drop_budget=(*budgets[:-1], 0.0)),
        replace(pruned, drop_budget=(*budgets[:half], *[0.5] * (space.depth - half))),
        replace(pruned, drop_budget=(0.25, *budgets[1:])),
        replace(pruned, target_ratio=0.95 * pruned.target_ratio),
    ]


class MeasuredAnew(dict[int, list[BlockSensitivity]]):
    """The sensitivities of a context, measured whenever one is looked up."""

    def __init__(self, context: TrialContext) -> None:
        super().__init__()
        self._context = context

    def __missing__(self, exit_block: int) -> list[BlockSensitivity]:
        context = self._context
        return measure_sensitivity(
            truncate(context.model, exit_block, context.exit_heads[exit_block]), context.splits.calibration,
            batch_size=context.config.cascade.batch_size, precision=context.precision,
        )  # fmt: skip


def row(task: str, method: str, what: str, before: list[float], after: list[float]) -> dict[str, Any]:
    """Gives mean and spread of the seconds."""
    spread = [statistics.stdev(seconds) if len(seconds) > 1 else 0.0 for seconds in (before, after)]
    record = {
        "task": task, "method": method, "what": what, "count": len(before),
        "seconds_before": statistics.mean(before), "before_spread": spread[0],
        "seconds_after": statistics.mean(after), "after_spread": spread[1],
    }  # fmt: skip
    print(record, file=sys.stderr, flush=True)
    return record


def kind_of(candidate: Candidate, had_shape: bool) -> str:
    """Names the kind of work that a candidate is."""
    if had_shape:
        return "shape was timed before"
    return "pruned" if candidate.target_ratio < 1 else "depth alone"


def is_same(one: Outcome, other: Outcome) -> bool:
    """Tells whether two outcomes differ in their timing alone."""
    assert one.measurement is not None and other.measurement is not None
    cost = (one.block_drops, one.forward_passes) == (other.block_drops, other.forward_passes)
    return one.plan == other.plan and one.measurement.top1 == other.measurement.top1 and cost


def measure(task: str, method: Method, quick: bool) -> list[dict[str, Any]]:
    sets = [f"space.method={method}"]
    if task == "imagenet-mini":
        sets += ["data.calibration_images=64", "data.probe_images=128", "data.val_images=200"] if quick else []
    config = load_config(RECIPES[task], sets=sets)
    torch.set_num_threads(1)
    inputs = load_inputs(config, Path("runs"))
    first = look(config, inputs, device=torch.device("cpu"))
    context, dense = prepare(config, inputs, first, device=torch.device("cpu"))
    measured_cache = measured_before(context.anatomy, dense, [])
    cache = WorkerCache(measured_cache=measured_cache)
    chosen = candidates(inputs.space, method)
    if task == "imagenet-mini":
        chosen = [*chosen[1:2], *chosen[-3 if method == "cascade" else -1 :][:2]]
    elif quick:
        chosen = [*chosen[:2], *chosen[-2:]]
    seconds: dict[str, tuple[list[float], list[float]]] = {}
    for number, candidate in enumerate(chosen):
        name = f"t{number:03d}"
        # A candidate that needs no pruning never asked for the sensitivity.
        known = replace(context.known, sensitivities=MeasuredAnew(context))
        cold = replace(context, known=known) if candidate.target_ratio < 1 else context
        alone_s, alone = timed(lambda: run_to_end(cold, candidate, name).outcomes[0])  # noqa: B023
        assert alone.plan is not None, alone.reason
        kind = kind_of(candidate, shape_key(context.anatomy, alone.plan) in measured_cache)
        after_s, after = timed(lambda: run_to_end(context, candidate, name, cache).outcomes[0])  # noqa: B023
        assert is_same(alone, after), f"{candidate} gives another model after others"
        for group in ("all", kind):
            before_all, after_all = seconds.setdefault(group, ([], []))
            before_all.append(alone_s)
            after_all.append(after_s)
    return [row(task, method, kind, *both) for kind, both in seconds.items()]


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Seconds of a trial, alone and after others", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}; torch {torch.__version__}, one thread.",
        "Before: everything anew. After: results of earlier trials are reused. Mean ± standard deviation.", "",
        "| task | method | what | candidates | seconds before | seconds after |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['task']} | {row['method']} | {row['what']} | {row['count']} "
        f"| {row['seconds_before']:.2f} ± {row['before_spread']:.2f} "
        f"| {row['seconds_after']:.2f} ± {row['after_spread']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits alone, four candidates")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for trial.{md,json}")
    args = parser.parse_args()
    tasks = ["digits"] if args.quick else list(RECIPES)
    rows = [each for task in tasks for method in PRUNING for each in measure(task, method, args.quick)]
    text = text_of(rows, " ".join(["python", *sys.argv]))
    if args.out is not None:
        (args.out / "trial.md").write_text(text)
        (args.out / "trial.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
