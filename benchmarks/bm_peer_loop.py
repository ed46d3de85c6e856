"""vitfront against a loop written by hand: Optuna around Torch-Pruning, in equal time, on the same images.

    python benchmarks/bm_peer_loop.py [--quick] [--json] [--out benchmarks/results] [--resume]

The peer: Optuna's default sampler chooses for every block the width of its heads and its hidden units, Torch-Pruning
takes the channels with the smallest Taylor importance (gradients on vitfront's calibration images), two worker
processes share the study. The dense model comes first, then nine of Torch-Pruning's own global rankings, from light to
heavy. It does what Torch-Pruning's ViT example does with `--bottleneck`; tokens and depth are beyond it.

vitfront: a sweep with Ray, ledger and MLflow, as `vitfront run` starts it, with two trials at a time, until its time is
up; then it is ended, before its front is measured once more.

Both measure accuracy on val and speed-up against the dense model with the same calls, batch, rounds and precision, and
the search's own measurements count; hypervolume is above half the dense accuracy and speed-up 1.

Seconds run from the start of each search and hold all that it does: loading model and images, vitfront's start of Ray
and MLflow, exits, profile (never an earlier seed's) and widths, the peer's gradients, rankings and processes. Not
counted is the training of the dense model, which is there before, and what the command imports. Trials that end later
do not count.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
import torch_pruning as tp
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import Tensor, nn

from pruning.data import Images
from pruning.errors import VitfrontError
from pruning.measure.accuracy import predict, top1
from pruning.measure.stopwatch import device_name, fastest_precision, time_against_dense
from pruning.model.anatomy import blocks_of
from pruning.precision import Precision
from search.config import Config
from search.outcome import Candidate, Outcome
from search.pareto import hypervolume, non_dominated
from search.recipe import load_config
from search.records import ledger
from search.records.folder import Folder
from search.trial.inputs import load_inputs

RUNS = Path("runs")

# ---------------------------------------------------------------------------------------------------------- the tasks


@dataclass(frozen=True, kw_only=True)
class Task:
    """A recipe, with the settings of each side."""

    recipe: str
    seconds: float
    """Time of each search."""
    sets: tuple[str, ...]
    """vitfront's changes to the recipe; those of images and measurements are the peer's as well."""
    heaviest: float
    """Share of all channels that the peer's last ranking removes, by which about half the accuracy is lost."""


TASKS = {
    "digits": Task(
        recipe="digits",
        seconds=120,
        sets=("space.method=[global, cascade]", "space.token_reduction=auto", "space.round_to=auto"),
        heaviest=0.9,
    ),
    "imagenet-mini": Task(
        recipe=str(Path(__file__).with_name("imagenet_mini.yaml")),
        seconds=900,
        sets=("space.method=global", "space.token_reduction=auto", "space.round_to=auto", "data.probe_images=64"),
        heaviest=0.36,
    ),
}


class Point(NamedTuple):
    """A trial that was measured."""

    ended_s: float
    """Seconds from the beginning of the search to the end of the trial."""
    top1: float
    speedup: float


class SearchResult(NamedTuple):
    """The trials of a search."""

    prepared_s: float
    """Seconds from the beginning of the search to the time at which its first trial could start."""
    points: list[Point]
    """Measured trials, in the order in which they ended."""


# ------------------------------------------------------------------------------------------------------------ vitfront


class TimeIsUp(VitfrontError):
    """The first trial that ended too late."""


class Clock:
    """Watches a sweep for the start of its trials, and ends it when its time is up."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        """Time on the monotonic clock at which the sweep is ended."""
        self.searching = 0.0
        """Time on the monotonic clock at which trials could start."""

    def stage(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None:
        self.searching = time.monotonic()

    def started(self, trial_id: str, candidate: Candidate) -> None: ...

    def epoch(self, trial_id: str, progress: Mapping[str, float]) -> None: ...

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        if time.monotonic() > self.deadline:
            raise TimeIsUp

    def interrupted(self) -> None: ...


def vitfront(config: Config, seconds: float) -> SearchResult:
    """Runs a sweep until the first trial that ends too late."""
    from search.commands.run import run_sweep  # not at the top: the peer's processes need not import Ray and MLflow

    folder = Folder(RUNS, config.name)
    shutil.rmtree(folder.path, ignore_errors=True)
    for profile in (RUNS / ".cache").glob("profile-*"):
        profile.unlink()  # of the seed before: it is part of the preparation
    start = time.monotonic()
    clock = Clock(start + seconds)
    with suppress(TimeIsUp):
        run_sweep(config, RUNS, clock)
    prepared_s = clock.searching - start
    points = [
        Point(prepared_s + outcome.ended_s, outcome.measurement.top1, outcome.measurement.speedup)
        for outcome in ledger.read(folder.ledger)
        if outcome.measurement is not None
    ]
    return SearchResult(prepared_s, points)


def train_dense() -> None:
    """Runs a sweep of one trial of digits: afterwards their dense model is trained, and MLflow has its database."""
    from search.commands.run import run_sweep

    run_sweep(load_config("digits", name="peer-loop-dense", trials=1), RUNS, Clock(math.inf))


# ------------------------------------------------------------------------------------------------------------ the peer

LEVELS = {"head_dim": 8, "hidden": 32}
"""Kind of width that is chosen for every block -> number of widths in equal steps: of 8 and 24 channels in ViT-Tiny,
since odd widths are slow."""

NUM_RANKINGS = 9

Widths = list[tuple[int, ...]]
"""Width of each head and hidden units of every block, in steps, from 1 to `LEVELS`."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The settings that the peer's processes share."""

    config: Config
    model: nn.Module
    gradients: dict[str, Tensor]
    """Gradients of the loss on the calibration images, by the parameters' names."""
    val: Images
    precision: Precision

    @property
    def steps(self) -> list[int]:
        """The channels a step, of head widths and of hidden units."""
        widths = widths_of(blocks_of(self.model)[0])
        return [width // count for width, count in zip(widths, LEVELS.values(), strict=True)]

    def pruner(self, widths: Widths | None = None, **settings: Any) -> tuple[nn.Module, Any]:
        """Returns a copy of the model and Torch-Pruning's pruner of it, as its ViT example has it (`--bottleneck`).

        Chosen on training images, by the top-1 of ViT-Tiny (dense: 0.78 of 96 images, 0.81 of 128). Taylor keeps 0.56
        without 20 % of the hidden units and 0.72 without 10 % of the head widths, magnitude 0.40 and 0.21. Ranked
        together by raw scores, 0.59 is left without 20 % of all channels; by scores over their layer's mean, which is
        Torch-Pruning's default, 0.45; every layer alike, 0.29. One of three heads less in each block leaves 0.07, a
        quarter of each head's width less 0.48: so widths are searched, not heads. On digits magnitude does not differ
        from Taylor by more than 0.01 up to 40 %, and the rest is the same.
        """
        pruned: Any = copy.deepcopy(self.model).requires_grad_(True)
        for name, parameter in pruned.named_parameters():
            parameter.grad = self.gradients[name].clone()
        blocks = blocks_of(pruned)
        for block in blocks:
            block.attn.fused_attn = False  # the trace cannot follow the fused one
        ratios = {}
        for block, levels in zip(blocks, widths or (), strict=widths is not None):
            layers = block.attn.qkv, block.mlp.fc1
            for layer, width, level, step in zip(layers, widths_of(block), levels, self.steps, strict=True):
                ratios[layer] = 1 - (level * step + 0.5) / width  # it rounds down what is kept
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells that cls_token and pos_embed belong to no layer
            pruner = tp.pruner.BasePruner(
                pruned, self.val.normalized(slice(0, 1)),
                importance=tp.importance.GroupTaylorImportance(normalizer=None),
                ignored_layers=[pruned.head, pruned.patch_embed.proj, *(block.mlp.fc2 for block in blocks)],
                num_heads={block.attn.qkv: block.attn.num_heads for block in blocks},
                prune_num_heads=False, prune_head_dims=True, root_module_types=[nn.Linear],
                pruning_ratio_dict=ratios, **settings,
            )  # fmt: skip
        return pruned, pruner

    def rankings(self, heaviest: float) -> list[Widths]:
        """Returns the widths that Torch-Pruning leaves when it ranks all channels together, from light to heavy."""
        pruned, pruner = self.pruner(global_pruning=True, pruning_ratio=heaviest, iterative_steps=NUM_RANKINGS)
        rankings = []
        for _ in range(NUM_RANKINGS):
            pruner.step()
            rankings.append([
                tuple(max(1, round(width / step)) for width, step in zip(widths_of(block), self.steps, strict=True))
                for block in blocks_of(pruned)
            ])  # fmt: skip
        return rankings

    def prune(self, widths: Widths) -> nn.Module:
        """Makes a smaller model in eval mode, with fused attention if the dense one has it."""
        pruned, pruner = self.pruner(widths)
        pruner.step()
        for block, dense in zip(blocks_of(pruned), blocks_of(self.model), strict=True):
            attn = block.attn
            attn.head_dim, _ = widths_of(block)
            attn.attn_dim = attn.num_heads * attn.head_dim
            attn.fused_attn = dense.attn.fused_attn
            attn.scale = attn.head_dim**-0.5  # as the fused attention scales; the queries keep the dense model's scale
            for parameter in attn.qkv.parameters():
                parameter.data[: attn.attn_dim] *= dense.attn.scale / attn.scale
                parameter.grad = None
        return pruned.requires_grad_(False).eval()

    def objective(self, trial: optuna.Trial) -> tuple[float, float]:
        """Measures accuracy on val and speed-up of a trial's widths, as `search.trial.measure.measure` does."""
        pruned = self.prune([
            tuple(trial.suggest_int(f"{kind}.{block}", 1, most) for kind, most in LEVELS.items())
            for block in range(len(blocks_of(self.model)))
        ])  # fmt: skip
        size, rounds = self.config.measure.batch_size, self.config.measure.num_rounds
        batch = self.val.normalized(torch.arange(size) % len(self.val))
        logits = predict(pruned, self.val, batch_size=self.config.cascade.batch_size, precision=self.precision)
        _, (timing,) = time_against_dense(self.model, [pruned], batch, num_rounds=rounds, precision=self.precision)
        return top1(logits, self.val.labels), timing.speedup


def widths_of(block: Any) -> tuple[int, int]:
    """Returns the width of each head and the hidden units of a block, in channels."""
    return block.attn.qkv.out_features // (3 * block.attn.num_heads), block.mlp.fc1.out_features


def gradients_of(model: nn.Module, images: Images) -> dict[str, Tensor]:
    """Computes the gradients of the cross-entropy, summed over batches, by the parameters' names."""
    training = copy.deepcopy(model).requires_grad_(True)
    for batch, labels in images.batches(32):
        nn.functional.cross_entropy(training(batch), labels).backward()
    return {name: parameter.grad for name, parameter in training.named_parameters() if parameter.grad is not None}


def storage_of(journal: str) -> JournalStorage:
    return JournalStorage(JournalFileBackend(journal))


def work(peer: Peer, journal: str, seed: int, deadline: float) -> None:
    """Runs trial after trial until the wall clock says `deadline`, in one of the peer's processes."""
    os.nice(15)  # as Ray's workers, so that what else runs here hinders both sides alike
    torch.set_num_threads(peer.config.resources.cpus_per_trial)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed)  # the default, but seeded
    study = optuna.load_study(study_name="peer", storage=storage_of(journal), sampler=sampler)
    study.optimize(peer.objective, timeout=max(0.0, deadline - time.time()))


def peer_loop(config: Config, seconds: float, seed: int, heaviest: float) -> SearchResult:
    """Runs the peer's loop, with as many processes as Ray has room for trials."""
    start = time.time()
    num_workers = (os.cpu_count() or 1) // config.resources.cpus_per_trial
    # As vitfront prepares: two threads on cores that others use wait for each other.
    torch.set_num_threads(config.resources.cpus_per_trial)
    inputs = load_inputs(config, RUNS)
    model, val = inputs.model.requires_grad_(False), inputs.splits.val
    batch, precision = val.normalized(slice(0, config.measure.batch_size)), config.measure.precision
    peer = Peer(
        config=config, model=model, gradients=gradients_of(model, inputs.splits.calibration), val=val,
        precision=fastest_precision(model, batch) if precision == "auto" else precision,
    )  # fmt: skip
    dense: Widths = [tuple(LEVELS.values())] * len(blocks_of(model))
    with tempfile.TemporaryDirectory() as folder:
        journal = str(Path(folder, "journal"))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(study_name="peer", storage=storage_of(journal), directions=["maximize", "maximize"])
        for widths in (dense, *peer.rankings(heaviest)):
            study.enqueue_trial({
                f"{kind}.{block}": level
                for block, levels in enumerate(widths) for kind, level in zip(LEVELS, levels, strict=True)
            })  # fmt: skip
        prepared_s = time.time() - start
        seeds = range(seed * num_workers, (seed + 1) * num_workers)
        # Spawned, not forked: Ray, which ran in this process before, leaves threads behind.
        context = torch.multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=work, args=(peer, journal, process_seed, start + seconds)) for process_seed in seeds
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(worker.exitcode == 0 for worker in workers), "a process of the peer broke"
        trials = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    ended = [(trial.datetime_complete.timestamp() - start, trial.values) for trial in trials if trial.datetime_complete]
    return SearchResult(prepared_s, sorted(Point(ended_s, *values) for ended_s, values in ended))


# ------------------------------------------------------------------------------------------------------------ the rows

SIDES = "vitfront", "peer"


def volume(points: Sequence[Sequence[float]], dense_top1: float, at_s: float) -> float:
    """Computes the hypervolume of the trials that ended by then, above half the dense accuracy and speed-up 1."""
    values = np.array([point[1:] for point in points if point[0] <= at_s]).reshape(-1, 2)
    return hypervolume(values, np.array([dense_top1 / 2, 1.0]))


def front(points: Sequence[Sequence[float]], at_s: float) -> list[tuple[float, float]]:
    """Returns top-1 and speed-up of those trials that no other beats, the slowest first."""
    values = np.array([point[1:] for point in points if point[0] <= at_s]).reshape(-1, 2)
    return sorted(((float(top), float(speed)) for top, speed in values[non_dominated(values)]), key=lambda it: it[1])


def fastest(points: Sequence[Sequence[float]], at_s: float, least: float) -> float:
    """Returns the largest speed-up of a trial with at least so much accuracy; NaN without any."""
    return max((point[2] for point in points if point[0] <= at_s and point[1] >= least), default=float("nan"))


def measure(name: str, seed: int, seconds: float) -> dict[str, Any]:
    """Runs both searches of one task and seed, and returns their row."""
    task = TASKS[name]
    sets = [*task.sets, f"search.seed={seed}", "search.patience=0"]
    config = load_config(
        task.recipe, name=f"peer-loop-{name}-{seed}", trials=200, time_budget=f"{seconds:g}", sets=sets
    )
    inputs = load_inputs(config, RUNS)
    logits = predict(inputs.model, inputs.splits.val, batch_size=config.cascade.batch_size)
    dense_top1 = top1(logits, inputs.splits.val.labels)
    results = {"peer": peer_loop(config, seconds, seed, task.heaviest), "vitfront": vitfront(config, seconds)}
    volumes = {side: volume(results[side].points, dense_top1, seconds) for side in SIDES}
    row: dict[str, Any] = {"task": name, "seed": seed, "seconds": seconds, **volumes}
    row["ratio"] = volumes["vitfront"] / volumes["peer"] if volumes["peer"] else None
    for side in SIDES:
        row[f"{side}_trials"] = sum(point.ended_s <= seconds for point in results[side].points)
        row[f"{side}_prepared_s"] = results[side].prepared_s
    print(row, file=sys.stderr)
    for side in SIDES:
        print(f"  {side}: {front(results[side].points, seconds)}", file=sys.stderr, flush=True)
    return row | {"dense_top1": dense_top1, "points": {side: results[side].points for side in SIDES}}


def rows_of(folder: Path | None) -> dict[tuple[str, int, float], dict[str, Any]]:
    """Reads the rows of an earlier run, by task, seed and seconds."""
    file = folder and folder / "peer_loop.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file and file.exists() else []
    return {(row["task"], row["seed"], row["seconds"]): row for row in rows}


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    versions = f"torch {torch.__version__}, Torch-Pruning {version('torch-pruning')}, Optuna {optuna.__version__}"
    lines = [
        "# vitfront and a loop of Optuna and Torch-Pruning, in equal time", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}, two trials at a time on each side, {versions}.", "",
        "Hypervolume above half the dense accuracy and speed-up 1, of the trials that ended within the seconds, as the",
        "searches measured them. Ready: the seconds after which the first trial could start. Speed-up: the largest",
        "that costs at most 0.02 of val top-1. What counts is in the docstring of the benchmark.", "",
        "| task | seed | seconds | vitfront | peer | ratio | trials | ready | speed-up at -0.02 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        seconds, least = row["seconds"], row["dense_top1"] - 0.02
        speedups = [f"{fastest(row['points'][side], seconds, least):.2f}" for side in SIDES]
        trials = [str(row[f"{side}_trials"]) for side in SIDES]
        ready = [f"{row[f'{side}_prepared_s']:.0f}" for side in SIDES]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['task']} | {row['seed']} | {seconds:g} | {row['vitfront']:.4f} | {row['peer']:.4f} | {ratio} "
            f"| {' / '.join(trials)} | {' / '.join(ready)} | {' / '.join(speedups)} |"
        )
    for name in dict.fromkeys(row["task"] for row in rows):
        task_rows = [row for row in rows if row["task"] == name]
        means = {side: fmean(row[side] for row in task_rows) for side in SIDES}
        lines.append(f"| {name} | mean | | {means['vitfront']:.4f} | {means['peer']:.4f} | | | | |")
    return "\n".join([*lines, "", "![hypervolume over seconds](peer_loop.png)"]) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws hypervolume over seconds, a panel a task: mean of the seeds and their range."""
    from pictures import band, drawn  # not at the top: the peer's processes need no matplotlib

    names = list(dict.fromkeys(row["task"] for row in rows))
    labels = {"vitfront": "vitfront", "peer": "Optuna + Torch-Pruning"}
    with drawn(path, len(names)) as panels:
        for axes, name in zip(panels, names, strict=True):
            task_rows = [row for row in rows if row["task"] == name]
            seconds = np.linspace(0, min(row["seconds"] for row in task_rows), 200)
            for side in SIDES:
                curves = [[volume(row["points"][side], row["dense_top1"], at) for at in seconds] for row in task_rows]
                band(axes, seconds, curves, labels[side])
            title = f"{name}, mean and range of {len(task_rows)} seeds" if len(task_rows) > 1 else f"{name}, one seed"
            axes.set(xlabel="seconds since the search began", ylabel="hypervolume on val", title=title)


def write(rows: list[dict[str, Any]], folder: Path, command: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peer_loop.md").write_text(text_of(rows, command), encoding="utf-8")
    (folder / "peer_loop.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    draw(rows, folder / "peer_loop.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed of digits, 60 seconds a side")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for peer_loop.{md,json,png}; written anew after every row")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run in --out")
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, help="of each search; by default the task's")
    args = parser.parse_args()
    tasks, seeds, seconds = (["digits"], [0], 60.0) if args.quick else (args.tasks, args.seeds, args.seconds)
    command, rows = " ".join(["python", *sys.argv]), []
    earlier_rows = rows_of(args.out) if args.resume else {}
    train_dense()
    for name in tasks:
        for seed in seeds:
            wanted = name, seed, seconds or TASKS[name].seconds
            rows.append(earlier_rows[wanted] if wanted in earlier_rows else measure(*wanted))
            if args.out is not None:
                write(rows, args.out, command)
    print(json.dumps({"rows": rows}) if args.json else text_of(rows, command), end="")


if __name__ == "__main__":
    main()
