"""Measures the cost of a trial beside its pruning and measuring: sweeps on two workers whose trials are made up.

    python benchmarks/bm_orchestration.py [--quick] [--json] [--out benchmarks/results]

All but the trial is real: Ray Tune, the TPE sampler, the ledger, MLflow on SQLite, the progress line. A candidate is
answered at once, with a measurement and a plan of digits' size that follow from it. Timed from when the first trial is
in the ledger and in MLflow, so the workers are there, to when the last is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import ray
import torch
from pictures import drawn
from rich.console import Console

from pruning.measure.stopwatch import device_name
from pruning.plan import BlockPlan, Plan
from search.cluster.session import TrialResources, cluster_resources, ray_running
from search.cluster.tune import Work, run_work
from search.commands.run_driver import SweepDriver
from search.commands.run_driver import Work as Piece
from search.commands.run_state import Sweep
from search.config import flat
from search.outcome import Candidate, Measurement, Outcome, State
from search.recipe import load_config
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.records.store import default_uri
from search.records.tracking import Tracker
from search.trial.context import ContextPart, lease_on
from search.trial.first_look import FirstLook
from search.trial.inputs import load_inputs
from search.trial.jobs import LOOK, Job, Looked
from search.trial.lease import Lease
from search.trial.prepare import steps_of
from search.trial.trial import Ended
from search.views.progress_line import ProgressLine

DEPTH = 6
DENSE = Measurement(
    top1=0.97, top1_low=0.95, top1_high=0.98, throughput_img_s=5000.0, speedup=1.0, speedup_low=0.99, speedup_high=1.01,
    latency_ms_p50=50.0, macs=5_700_000, params=300_000,
)  # fmt: skip
WINDOW = 100


class TimedTracker(Tracker):
    """Remembers when each trial was in MLflow, which is the last place that it comes to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.written: list[float] = []

    def log(self, outcome: Outcome, hypervolume: float, number: int) -> None:
        super().log(outcome, hypervolume, number)
        self.written.append(time.monotonic())


class MadeUpWorkplace:
    """Stands in for a `Workplace` and for its context."""

    def __init__(self, **_: Any) -> None:
        pass

    @property
    def lease(self) -> Lease:
        return lease_on(torch.device("cpu"))

    def context(self, needs: Sequence[str]) -> MadeUpWorkplace:
        return self

    def without_rungs(self) -> MadeUpWorkplace:
        return self


class TrialsAlone(SweepDriver):
    """A driver that hands out no confirmation; the look is done, and all is prepared."""

    has_all = False

    def next(self) -> Piece | None:
        work = super().next()
        self.has_all = isinstance(work, Job)
        return None if self.has_all else work

    @property
    def is_done(self) -> bool:
        return self.has_all or super().is_done


def made_up_trial(context: Any, candidate: Candidate, trial_id: str, *_: Any) -> Iterator[Ended]:
    """Accuracy falls the faster, the more is pruned and the farther the other parameters are from the best."""
    kept = candidate.target_ratio * candidate.exit_block / DEPTH
    off = abs(candidate.token_share - 0.4) + abs(candidate.cutoff_token - 0.8) + sum(candidate.drop_budget) / 24
    top1, speedup = 0.97 - 0.3 * (1 - kept) ** 2 * (1 + off), (1 - 0.7 * (1 - kept)) ** -1
    count = round(256 * candidate.target_ratio)
    block = BlockPlan(
        keep_heads=(0, 1, 2, 3), keep_qk=(tuple(range(12)),) * 4, keep_v=(tuple(range(12)),) * 4,
        keep_hidden=tuple(range(count)), num_tokens=16,
    )  # fmt: skip
    measurement = Measurement(
        top1=top1, top1_low=top1 - 0.02, top1_high=top1 + 0.02, throughput_img_s=5000 * speedup, speedup=speedup,
        speedup_low=0.97 * speedup, speedup_high=1.03 * speedup, latency_ms_p50=50 / speedup,
        macs=round(kept * DENSE.macs), params=round(kept * DENSE.params),
    )  # fmt: skip
    outcome = Outcome(
        id=trial_id, state=State.MEASURED, candidate=candidate, plan=Plan(blocks=(block,) * candidate.exit_block),
        measurement=measurement, block_drops=candidate.drop_budget[: candidate.exit_block], notes=(str(os.getpid()),),
    )  # fmt: skip
    yield Ended(outcomes=[outcome], models={})


def run(runs: Path, num_trials: int) -> tuple[list[float], int]:
    """Runs a sweep; returns when each trial was done, and the number of workers that had any."""
    config = load_config(
        "digits", name=f"made-up-{num_trials}", trials=num_trials, sets=["search.sampler=tpe", "search.patience=0"]
    )
    folder = Folder(runs, config.name)
    with Path(os.devnull).open("w") as nowhere, Ledger(folder.ledger) as book:
        tracker = TimedTracker(
            default_uri(runs), runs / "mlartifacts", config.name, flat(config.model_dump(mode="json")),
            run_dir=folder.path, done=(),
        )  # fmt: skip
        with ProgressLine(Console(file=nowhere, force_terminal=True)) as line:
            available = cluster_resources()
            resources, inputs = TrialResources.of(config, available), load_inputs(config, runs)
            sweep = Sweep(
                config=config, inputs=inputs, folder=folder, ledger=book, observer=line,
                num_slots=resources.num_slots(available), began=time.monotonic(),
            )  # fmt: skip
            known = {step.id: ContextPart() for step in steps_of(inputs.space)}
            cache: Any = None  # nothing is measured
            driver = TrialsAlone(sweep, known, lambda looked: (tracker, cache))
            first = FirstLook(precision="float32", top1=DENSE.top1, num_images=500)
            look = SweepDriver.next(driver)
            assert isinstance(look, Job) and look.id == LOOK
            driver.job_ended(LOOK, Looked(first=first, dense=DENSE, device="cpu"))
            set_up: Any = MadeUpWorkplace
            work = Work(config=config, inputs=inputs, start=made_up_trial, set_up=set_up)
            run_work(work, driver, resources, num_trials)
            driver.close()
    return tracker.written, len({outcome.notes for outcome in driver.outcomes})


def measure(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    ray.init(num_cpus=2, address="local", log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    for count in counts:
        with tempfile.TemporaryDirectory() as runs, ray_running(None):
            start = time.process_time()
            written, num_workers = run(Path(runs), count)
            processor_s = time.process_time() - start
        done = np.array(written)
        rows.append({
            "trials": count, "workers": num_workers, "trials_per_s": (count - 1) / float(done[-1] - done[0]),
            "ms_per_trial": 1000 * float(np.diff(done).mean()),
            "ms_per_trial_last": 1000 * float(np.diff(done)[-WINDOW:].mean()),
            "driver_ms_per_trial": 1000 * processor_s / count, "done_s": (done - done[0]).round(3).tolist(),
        })  # fmt: skip
        print({name: value for name, value in rows[-1].items() if name != "done_s"}, file=sys.stderr, flush=True)
    ray.shutdown()
    return rows


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Orchestration", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}, 2 slots; ray {ray.__version__}, optuna {optuna.__version__}, "
        f"mlflow {mlflow.__version__}.",
        "Made-up trials that take no time, from when the first is in ledger and MLflow to when the last is. The last",
        "column is the processor time of the driver, the sweep's start and end included: it hardly depends on what",
        "else the machine does.",
        "", "![ms a trial](orchestration.png)", "",
        f"| trials | workers | trials/s | ms a trial | ms a trial, last {WINDOW} | driver, ms a trial |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['trials']} | {row['workers']} | {row['trials_per_s']:.1f} | {row['ms_per_trial']:.0f} "
        f"| {row['ms_per_trial_last']:.0f} | {row['driver_ms_per_trial']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds a trial, over the trials before it."""
    with drawn(path) as (axes,):
        for row in rows:
            done = np.array(row["done_s"])
            width = min(50, len(done) // 2)
            at = np.arange(width, len(done))
            axes.plot(at, 1000 * (done[at] - done[at - width]) / width, label=f"a sweep of {row['trials']}")
        axes.set(xlabel="trials done", ylabel="ms a trial, mean of the last 50", title="Trials that do nothing")
        axes.set_ylim(bottom=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 and 200 trials")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for orchestration.{md,json,png}")
    args = parser.parse_args()
    rows = measure((100, 200) if args.quick else (100, 1000))
    text = text_of(rows, " ".join(["python", *sys.argv]))
    if args.out is not None:
        (args.out / "orchestration.md").write_text(text)
        draw(rows, args.out / "orchestration.png")
        (args.out / "orchestration.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
