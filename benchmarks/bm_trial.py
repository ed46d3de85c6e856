"""Seconds of a trial alone, and of the same trial after others, with what they found out.

    python benchmarks/bm_trial.py [--quick] [--json] [--out benchmarks/results]

The first candidates of a sweep, then some that share their beginning, or their shape, with one of them: each is run
with everything done anew (before), then with the memory of a worker that ran those before it (after), in one process.
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
from search.method import Method
from search.outcome import Candidate, Outcome
from search.recipe import load_config
from search.space import Space
from search.trial.context import TrialContext, keys_of, known_from, prepare
from search.trial.inputs import load_inputs
from search.trial.trial import WorkerCache, run_to_end
from search.trial.warm_start import first_candidates

RECIPES = {"digits": "digits", "imagenet-mini": str(Path(__file__).with_name("imagenet_mini.yaml"))}
METHODS: tuple[Method, ...] = ("cascade", "global")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def candidates(space: Space, method: Method) -> list[Candidate]:
    """The first of a sweep; then, for the cascade, the first pruned one with other budgets or another target."""
    first = first_candidates(space)
    pruned = next(each for each in first if each.target_ratio < 1)
    if method == "global":
        return [*first, pruned, replace(pruned, target_ratio=pruned.target_ratio * 0.99)]
    budgets, half = pruned.drop_budget, space.depth // 2
    return [
        *first,
        replace(pruned, drop_budget=(*budgets[:-1], 0.0)),
        replace(pruned, drop_budget=(*budgets[:half], *[0.5] * (space.depth - half))),
        replace(pruned, drop_budget=(0.25, *budgets[1:])),
        replace(pruned, target_ratio=0.95 * pruned.target_ratio),
    ]


class Anew(dict[int, list[BlockSensitivity]]):
    """The sensitivities of a context, measured whenever one is asked for."""

    def __init__(self, context: TrialContext) -> None:
        super().__init__()
        self._bench = context

    def __missing__(self, exit_block: int) -> list[BlockSensitivity]:
        context = self._bench
        return measure_sensitivity(
            truncate(context.model, exit_block, context.exit_heads[exit_block]), context.splits.calibration,
            batch_size=context.config.cascade.batch_size, precision=context.precision,
        )  # fmt: skip


def row(task: str, method: str, what: str, before: list[float], after: list[float]) -> dict[str, Any]:
    """Seconds: mean and spread."""
    spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in (before, after)]
    made = {
        "task": task, "method": method, "what": what, "count": len(before),
        "seconds_before": statistics.mean(before), "before_spread": spread[0],
        "seconds_after": statistics.mean(after), "after_spread": spread[1],
    }  # fmt: skip
    print(made, file=sys.stderr, flush=True)
    return made


def of_what(candidate: Candidate, had_shape: bool) -> str:
    if had_shape:
        return "shape was timed before"
    return "pruned" if candidate.target_ratio < 1 else "depth alone"


def same(one: Outcome, other: Outcome) -> bool:
    """All but the timing."""
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
    context, dense = prepare(config, inputs.model, inputs.splits, inputs.space.exit_blocks, trained=inputs.trained)
    memory = WorkerCache(known=known_from(context.anatomy, dense, []))
    asked = candidates(inputs.space, method)
    if task == "imagenet-mini":
        asked = [*asked[1:2], *asked[-3 if method == "cascade" else -1 :][:2]]
    elif quick:
        asked = [*asked[:2], *asked[-2:]]
    seconds: dict[str, tuple[list[float], list[float]]] = {}
    for number, candidate in enumerate(asked):
        name = f"t{number:03d}"
        # What needs no pruning never asked for the sensitivity.
        cold = replace(context, sensitivities=Anew(context)) if candidate.target_ratio < 1 else context
        alone_s, alone = timed(lambda: run_to_end(cold, candidate, name).outcomes[0])  # noqa: B023
        assert alone.plan is not None, alone.reason
        what = of_what(candidate, memory.known.get(keys_of(context.anatomy, alone.plan)[0]) is not None)
        after_s, after = timed(lambda: run_to_end(context, candidate, name, memory).outcomes[0])  # noqa: B023
        assert same(alone, after), f"{candidate} gives another model after others"
        for kind in ("all", what):
            before_all, after_all = seconds.setdefault(kind, ([], []))
            before_all.append(alone_s)
            after_all.append(after_s)
    return [row(task, method, what, *both) for what, both in seconds.items()]


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Seconds of a trial, alone and after others", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}; torch {torch.__version__}, one thread.",
        "Before: everything anew. After: what earlier trials found out is used. Mean ± standard deviation.", "",
        "| task | method | what | candidates | seconds before | seconds after |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {each['task']} | {each['method']} | {each['what']} | {each['count']} "
        f"| {each['seconds_before']:.2f} ± {each['before_spread']:.2f} "
        f"| {each['seconds_after']:.2f} ± {each['after_spread']:.2f} |"
        for each in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits alone, four candidates")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for trial.{md,json}")
    args = parser.parse_args()
    tasks = ["digits"] if args.quick else list(RECIPES)
    rows = [each for task in tasks for method in METHODS for each in measure(task, method, args.quick)]
    text = text_of(rows, " ".join(["python", *sys.argv]))
    if args.out is not None:
        (args.out / "trial.md").write_text(text)
        (args.out / "trial.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
