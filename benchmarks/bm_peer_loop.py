"""The whole command against what a user could run instead, in equal time, on the same images.

    python benchmarks/bm_peer_loop.py [--quick] [--json] [--out benchmarks/results] [--resume] [--old CHECKOUT]

vitfront is `vitfront run --time-budget SECONDS` in a process of its own: what counts is the hypervolume of the front
that it has written in the end, with the speed-ups of its last timing. The command has to end in time: imports, Ray,
MLflow, preparation, trials and confirmation are in it. Its peers:

- `tome`: the front of ToMe alone, the strongest method that needs no training and no preparation: merges of the same
  number of tokens in every block, from weak to strong, measured by two processes.
- `papers`: vitfront with the settings of VTC-LFC (`--set space=papers`), ended after the seconds.
- `old`: the defaults of an earlier commit, whose checkout `--old` names, ended after the seconds.
- `torch-pruning`: a loop written by hand. Optuna's default sampler chooses for every block the width of its heads and
  its hidden units, Torch-Pruning takes the channels with the smallest Taylor importance (gradients on vitfront's
  calibration images), two worker processes share the study. The dense model comes first, then nine of Torch-Pruning's
  own global rankings, from light to heavy. It does what Torch-Pruning's ViT example does with `--bottleneck`; tokens
  and depth are beyond it.

All measure accuracy on val and speed-up against the dense model with the same calls, batch, rounds and precision;
hypervolume is above half the dense accuracy and speed-up 1. Seconds of a peer run from the start of its search and
hold all that it does but imports; trials that end later do not count. The dense model is trained before.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
import torch
import torch_pruning as tp
from commands import ROOT, Point, run_command
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import Tensor, nn

from pruning.data import Images
from pruning.measure.accuracy import predict, top1
from pruning.measure.stopwatch import device_name, fastest_precision, time_against_dense
from pruning.methods.schedule import token_counts
from pruning.model.anatomy import blocks_of, examine
from pruning.model.surgery import apply_plan, keep_all_block
from pruning.plan import Plan
from pruning.precision import Precision
from search.config import Config
from search.pareto import hypervolume, non_dominated
from search.recipe import load_config
from search.records.folder import Folder
from search.trial.context import lease_on
from search.trial.inputs import load_inputs

RUNS = ROOT / "runs"

# ---------------------------------------------------------------------------------------------------------- the tasks


@dataclass(frozen=True, kw_only=True)
class Task:
    """A recipe, with the seconds after which it is looked at."""

    recipe: str
    seconds: tuple[float, ...]
    """Times of each search."""
    heaviest: float
    """Share of all channels that the last ranking of `torch-pruning` removes: about half the accuracy is lost."""


TASKS = {
    "digits": Task(recipe="digits", seconds=(120,), heaviest=0.9),
    "imagenet-mini": Task(
        recipe=str(Path(__file__).with_name("imagenet_mini.yaml")), seconds=(300, 900), heaviest=0.36
    ),
}


# ------------------------------------------------------------------------------------------------------------ vitfront


def vitfront(recipe: str, seed: int, seconds: float) -> tuple[list[Point], float]:
    """Runs the command.

    Returns:
        The points of its front, as if all of them had come at its end, and the share of the seconds that slots worked.
    """
    name = f"peer-loop-{Path(recipe).stem}-{seed}"
    forget(name)
    done = run_command([*arguments_of(recipe, name, seed), "--time-budget", f"{seconds:g}"])
    print(f"  the command took {done.command_s:.0f} s of {seconds:g}", file=sys.stderr, flush=True)
    front = Folder(RUNS, name).read_front()
    measurements = [point.measurement for point in front.points]
    points = [Point(done.command_s, one.top1, one.speedup) for one in measurements if one is not None]
    assert front.busy_share is not None
    return points, front.busy_share


def papers(recipe: str, seed: int, seconds: float) -> list[Point]:
    """Runs vitfront with the papers' settings, and returns the trials that ended in time."""
    name = f"peer-loop-papers-{seed}"
    forget(name)
    arguments = [*arguments_of(recipe, name, seed), "--set", "space=papers"]
    return run_command(arguments, kill_after_s=seconds).points


def old(recipe: str, seed: int, seconds: float, checkout: Path) -> list[Point]:
    """Runs the defaults of an earlier commit, and returns the trials that ended in time."""
    name = f"peer-loop-old-{seed}"
    shutil.rmtree(checkout / "runs", ignore_errors=True)
    own = str(checkout / "benchmarks" / Path(recipe).name) if recipe.endswith(".yaml") else recipe
    return run_command(arguments_of(own, name, seed), checkout=checkout, cwd=checkout, kill_after_s=seconds).points


def arguments_of(recipe: str, name: str, seed: int) -> list[str]:
    sets = [f"search.seed={seed}", "search.patience=0"]
    return [recipe, "--name", name, "--trials", "500", *(part for one in sets for part in ("--set", one))]


def forget(name: str) -> None:
    """Removes a sweep, and all that was measured of dense models: it is part of the preparation."""
    shutil.rmtree(RUNS / name, ignore_errors=True)
    for part in (RUNS / ".cache").glob("*.pt"):
        part.unlink()


def train_dense() -> None:
    """Runs a sweep of one trial of digits: afterwards their dense model is trained, and MLflow has its database."""
    run_command(["digits", "--name", "peer-loop-dense", "--trials", "1"])


# ---------------------------------------------------------------------------------------------------------------- ToMe

TOME = (8, 13, 16, 11, 4, 20, 24, 28, 2, 18, 22, 26, 32)
"""Tokens that ToMe merges in every block of a model of 196 patches, in the order in which they are tried."""


def tome(config: Config, seconds: float) -> list[Point]:
    """Measures ToMe's models, with as many processes as Ray has room for trials."""
    start = time.time()
    num_workers = (os.cpu_count() or 1) // config.resources.cpus_per_trial
    context = torch.multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    workers = [
        context.Process(target=measure_tome, args=(config, TOME[index::num_workers], start + seconds, results))
        for index in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    points = []
    for _ in workers:
        points += results.get()
    for worker in workers:
        worker.join()
    return sorted(Point(ended - start, *values) for ended, values in points)


def measure_tome(config: Config, strengths: Sequence[int], deadline: float, results: Any) -> None:
    """Measures some of ToMe's models until the wall clock says `deadline`, in a process of its own."""
    os.nice(15)
    torch.set_num_threads(config.resources.cpus_per_trial)
    inputs = load_inputs(config, RUNS)
    model, val, anatomy = inputs.model.requires_grad_(False), inputs.splits.val, examine(inputs.model)
    size = config.measure.batch_size
    batch = val.normalized(torch.arange(size) % len(val))
    precision = fastest_precision(model, batch)
    lease = lease_on(batch.device)
    points = []
    num_patches = anatomy.blocks[0].num_patches
    for strength in strengths:
        removed = strength * num_patches / 196
        if time.time() > deadline or removed * anatomy.depth >= num_patches * 2:
            continue
        counts = token_counts("constant", num_patches, anatomy.depth, removed)
        blocks = tuple(keep_all_block(block, count) for block, count in zip(anatomy.blocks, counts, strict=True))
        pruned = apply_plan(model, Plan(blocks=blocks, token_reduction="merge"))
        with lease.exclusive():
            _, (timing,) = time_against_dense(
                model, [pruned], batch, num_rounds=config.measure.num_rounds, precision=precision
            )
        with lease.shared():
            logits = predict(pruned, val, batch_size=config.cascade.batch_size, precision=precision)
        points.append((time.time(), (top1(logits, val.labels), timing.speedup)))
    results.put(points)


# ------------------------------------------------------------------------------------------------------- Torch-Pruning

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


def torch_pruning(config: Config, seconds: float, seed: int, heaviest: float) -> list[Point]:
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
    return sorted(Point(ended_s, *values) for ended_s, values in ended)


# ------------------------------------------------------------------------------------------------------------ the rows


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


Rows = dict[tuple[str, int, float, str], dict[str, Any]]
"""Rows by task, seed, seconds and the name of the peer."""


def measure(name: str, seed: int, peers: Sequence[str], checkout: Path | None, rows: Rows) -> None:
    """Runs vitfront for each of a task's times and every peer once, as far as the rows lack them, and adds the rows."""
    task = TASKS[name]
    config = load_config(task.recipe, name="peer", sets=[f"search.seed={seed}"])
    wanted = [(seconds, peer) for seconds in task.seconds for peer in peers if (name, seed, seconds, peer) not in rows]
    if not wanted:
        return
    inputs = load_inputs(config, RUNS)
    logits = predict(inputs.model, inputs.splits.val, batch_size=config.cascade.batch_size)
    dense_top1 = top1(logits, inputs.splits.val.labels)
    most = max(task.seconds)
    runs: dict[str, Callable[[], list[Point]]] = {
        "tome": lambda: tome(config, most),
        "papers": lambda: papers(task.recipe, seed, most),
        "old": lambda: old(task.recipe, seed, most, checkout or Path()),
        "torch-pruning": lambda: torch_pruning(config, most, seed, task.heaviest),
    }
    fronts = {seconds: vitfront(task.recipe, seed, seconds) for seconds in dict(wanted)}
    for peer in dict.fromkeys(peer for _, peer in wanted):
        points = runs[peer]()
        for seconds, _ in filter(lambda pair: pair[1] == peer, wanted):
            own, busy_share = fronts[seconds]
            ours, theirs = volume(own, dense_top1, math.inf), volume(points, dense_top1, seconds)
            rows[name, seed, seconds, peer] = {
                "task": name, "seed": seed, "seconds": seconds, "name": peer, "vitfront": ours, "peer": theirs,
                "ratio": ours / theirs if theirs else None, "command_s": own[0].ended_s,
                "busy_share": busy_share,
                "peer_trials": sum(point.ended_s <= seconds for point in points), "dense_top1": dense_top1,
                "points": {"vitfront": own, "peer": points},
            }  # fmt: skip
            print({key: value for key, value in rows[name, seed, seconds, peer].items() if key != "points"},
                  file=sys.stderr, flush=True)  # fmt: skip


def read_rows(folder: Path | None) -> Rows:
    """Reads the rows of an earlier run."""
    file = folder and folder / "peer_loop.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file and file.exists() else []
    return {(row["task"], row["seed"], row["seconds"], row["name"]): row for row in rows if "name" in row}


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    versions = f"torch {torch.__version__}, Torch-Pruning {version('torch-pruning')}, Optuna {optuna.__version__}"
    lines = [
        "# The whole command and what could be run instead, in equal time", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}, two trials at a time on each side, {versions}.", "",
        "Hypervolume above half the dense accuracy and speed-up 1: of vitfront's final front, whose command took the",
        "seconds in brackets, and of the peer's trials that ended within the seconds. Speed-up: the largest that costs",
        "at most 0.02 of val top-1. Busy: share of the command's seconds in which vitfront's slots worked. What counts",
        "is in the docstring of the benchmark.", "",
        "| task | seed | seconds | peer | vitfront | peer's | ratio | peer's trials | speed-up at -0.02 | busy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        seconds, least, points = row["seconds"], row["dense_top1"] - 0.02, row["points"]
        speedups = fastest(points["vitfront"], math.inf, least), fastest(points["peer"], seconds, least)
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['task']} | {row['seed']} | {seconds:g} ({row['command_s']:.0f}) | {row['name']} "
            f"| {row['vitfront']:.4f} | {row['peer']:.4f} | {ratio} | {row['peer_trials']} "
            f"| {' / '.join(f'{one:.2f}' for one in speedups)} | {100 * row['busy_share']:.0f} % |"
        )
    for task, seconds, peer in dict.fromkeys((row["task"], row["seconds"], row["name"]) for row in rows):
        alike = [row for row in rows if (row["task"], row["seconds"], row["name"]) == (task, seconds, peer)]
        ours, theirs = fmean(row["vitfront"] for row in alike), fmean(row["peer"] for row in alike)
        ratio = f"{ours / theirs:.2f}" if theirs else ""
        lines.append(f"| {task} | mean | {seconds:g} | {peer} | {ours:.4f} | {theirs:.4f} | {ratio} | | | |")
    return "\n".join([*lines, "", "![hypervolume over seconds](peer_loop.png)"]) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws hypervolume over seconds, a panel a task: of peers mean and range of the seeds, of vitfront its fronts."""
    from pictures import band, drawn  # not at the top: the peers' processes need no matplotlib

    names = list(dict.fromkeys(row["task"] for row in rows))
    with drawn(path, len(names)) as panels:
        for axes, name in zip(panels, names, strict=True):
            of_task = [row for row in rows if row["task"] == name]
            most = max(row["seconds"] for row in of_task)
            seconds = np.linspace(0, most, 200)
            for peer in dict.fromkeys(row["name"] for row in of_task):
                alike = [row for row in of_task if row["name"] == peer and row["seconds"] == most]
                curves = [[volume(row["points"]["peer"], row["dense_top1"], at) for at in seconds] for row in alike]
                band(axes, seconds, curves, peer)
            ours = {(row["seconds"], row["seed"]): row["vitfront"] for row in of_task}
            axes.plot([at for at, _ in ours], list(ours.values()), "k*", label="vitfront, the final front")
            axes.set(xlabel="seconds", ylabel="hypervolume on val", title=name)


def write(rows: list[dict[str, Any]], folder: Path, command: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peer_loop.md").write_text(text_of(rows, command), encoding="utf-8")
    (folder / "peer_loop.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    draw(rows, folder / "peer_loop.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits, one seed, 60 seconds, against ToMe")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for peer_loop.{md,json,png}; written anew after every row")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run in --out")
    parser.add_argument("--old", type=Path, help="checkout of an earlier commit, for the peer of that name")
    parser.add_argument("--peers", nargs="*", default=["tome", "papers", "torch-pruning"])
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", nargs="*", type=float, help="times of each search; by default those of the task")
    args = parser.parse_args()
    tasks, seeds, peers = (["digits"], [0], ["tome"]) if args.quick else (args.tasks, args.seeds, args.peers)
    if args.quick:
        TASKS["digits"] = replace(TASKS["digits"], seconds=(60,))
    if args.old is not None and "old" not in peers:
        peers = [*peers, "old"]
    if args.seconds:
        TASKS.update({name: replace(TASKS[name], seconds=tuple(args.seconds)) for name in tasks})
    command, rows = " ".join(["python", *sys.argv]), read_rows(args.out) if args.resume else {}
    if "digits" in tasks:
        train_dense()
    for seed in seeds:
        for name in tasks:
            measure(name, seed, peers, args.old, rows)
            if args.out is not None:
                write(list(rows.values()), args.out, command)
    print(json.dumps({"rows": [*rows.values()]}) if args.json else text_of(list(rows.values()), command), end="")


if __name__ == "__main__":
    main()
