"""Measures learned width (WDPruning): how well it hits the target, and the accuracy that it keeps without fine-tuning.

    python benchmarks/bm_learned_width.py [--quick] [--json] [--out benchmarks/results]

digits, trained here first, and ../shared/data/cifar10-mini with the ViT that lies beside it; targets in multiply-adds.
Trained on the training images; accuracies are those on val, dense ones too. `exit_top1` is that of the earlier exit,
which is trained along. `ratio_gradient` open is the paper's, compared on digits. `loss`: of the last epoch, on train.
Every row is kept in `runs/` once it is there, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pruning.data import Images, InputSpec
from pruning.dataset.splits import load_split, open_dataset
from pruning.measure.accuracy import predict, top1
from pruning.measure.cost import count_macs
from pruning.measure.stopwatch import device_name, time_against_dense
from pruning.methods.learned_gates import RatioGradient
from pruning.methods.width import WidthSettings, WidthTraining
from pruning.model.anatomy import examine
from pruning.model.exits import fit_exits
from pruning.model.loading import create_model
from pruning.model.surgery import keep_all_plan
from pruning.model.weights import load_checkpoint
from pruning.training import Jitter, TrainSettings, train

DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10-mini"
TARGETS = (0.4, 0.6, 0.8)
DIGITS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 6, "num_heads": 4}


def digits(quick: bool) -> tuple[torch.nn.Module, Images, Images, dict[str, Any]]:
    spec = InputSpec(size=(8, 8), mean=(0.3,), std=(0.38,))
    dataset = open_dataset("digits", num_classes=10)
    images = {split: load_split(dataset, split, spec).images for split in ("train", "val")}
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", args=DIGITS)
    train(model, images["train"], TrainSettings(epochs=5 if quick else 70))
    settings = {"epochs": 4 if quick else 30, "batch_size": 64, "jitter": Jitter(max_shift=1.0, max_turn=0.15)}
    return model, images["train"], images["val"], settings


def cifar10(quick: bool) -> tuple[torch.nn.Module, Images, Images, dict[str, Any]]:
    description = json.loads((DATA / "vit_cifar10.json").read_text())
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    spec = InputSpec(size=(32, 32), mean=tuple(description["mean"]), std=tuple(description["std"]), crop_pct=1.0)
    limits = (256, 200) if quick else (None, None)
    dataset = open_dataset("folder", num_classes=10, root=DATA)
    images = {
        split: load_split(dataset, split, spec, limit=limit).images
        for split, limit in zip(("train", "val"), limits, strict=True)
    }
    model = create_model(description["model"], args={name: description[name] for name in names})
    load_checkpoint(model, DATA / "vit_cifar10.safetensors")
    settings = {"epochs": 1 if quick else 10, "jitter": Jitter(max_shift=2.0, flip=True)}
    return model.eval(), images["train"], images["val"], settings


TASKS = {"digits": digits, "cifar10-mini": cifar10}
GRADIENTS: dict[str, tuple[RatioGradient, ...]] = {"digits": ("edge", "open"), "cifar10-mini": ("edge",)}


def row_file(task: str, target: float, gradient: str, quick: bool) -> Path:
    return Path("runs", "bm_learned_width" + "-quick" * quick, f"{task}-{target}-{gradient}.json")


def measure(task: str, targets: Sequence[float], quick: bool) -> list[dict[str, Any]]:
    wanted = list(itertools.product(targets, GRADIENTS[task]))
    missing = [variant for variant in wanted if not row_file(task, *variant, quick).exists()]
    if missing:
        train_rows(task, missing, quick)
    return [json.loads(row_file(task, *variant, quick).read_text()) for variant in wanted]


def train_rows(task: str, wanted: Sequence[tuple[float, RatioGradient]], quick: bool) -> None:
    """Trains the wanted variants, and writes a row for each."""
    model, training, val, settings = TASKS[task](quick)
    model.requires_grad_(False)
    anatomy = examine(model)
    dense_macs = count_macs(anatomy, keep_all_plan(anatomy))
    dense_top1 = top1(predict(model, val), val.labels)
    heads = fit_exits(model, training, [round(anatomy.depth * 10 / 12)])
    batch = val.normalized(slice(0, 64))
    for target, gradient in wanted:
        start = time.monotonic()
        run = WidthTraining(
            model, training, WidthSettings(target_ratio=target, ratio_gradient=gradient, **settings), exit_heads=heads
        )
        while not run.is_done:
            progress = run.run_epoch()
            epoch = {"epoch": run.loop.epoch} | {key: round(value, 4) for key, value in progress.items()}
            print(task, target, gradient, epoch, f"{time.monotonic() - start:.0f} s", file=sys.stderr)
        seconds = time.monotonic() - start
        *earlier, full = run.finish()
        _, timings = time_against_dense(model, [full.model, *(early.model for early in earlier)], batch, num_rounds=15)
        exits = [top1(predict(early.model, val), val.labels) for early in earlier]
        row = {
            "task": task, "target": target, "ratio_gradient": gradient,
            "reached": count_macs(anatomy, full.plan) / dense_macs,
            "top1": top1(predict(full.model, val), val.labels), "dense_top1": dense_top1,
            "loss": progress["loss"], "speedup": timings[0].speedup,
            "exit_block": earlier[0].plan.exit_block, "exit_top1": exits[0],
            "exit_reached": count_macs(anatomy, earlier[0].plan) / dense_macs, "exit_speedup": timings[1].speedup,
            "epochs": settings["epochs"], "seconds": seconds,
        }  # fmt: skip
        print(row, file=sys.stderr)
        file = row_file(task, target, gradient, quick)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))


def table(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Learned width", "", f"`{command}`", "",
        f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}", "",
        "Target and reached: share of the dense multiply-adds. Speed-up: batch of 64, float32, in turn with dense.",
        "Top-1: on val. Loss: on train, mean of the last epoch, of both exits together. Seconds: of the training.", "",
        "| data | ratio_gradient | target | reached | top1 | dense_top1 | speed-up | loss "
        "| exit | its share | its top1 | its speed-up | epochs | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['task']} | {row['ratio_gradient']} | {row['target']} | {row['reached']:.4f} | {row['top1']:.4f} "
        f"| {row['dense_top1']:.4f} | {row['speedup']:.2f} | {row['loss']:.3f} | {row['exit_block']} "
        f"| {row['exit_reached']:.4f} | {row['exit_top1']:.4f} | {row['exit_speedup']:.2f} | {row['epochs']} "
        f"| {row['seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute: one target, few images and epochs")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for learned_width.{md,json}")
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--targets", nargs="*", type=float, default=TARGETS)
    args = parser.parse_args()
    tasks = [task for task in args.tasks if task == "digits" or DATA.is_dir()]
    rows = [row for task in tasks for row in measure(task, TARGETS[:1] if args.quick else args.targets, args.quick)]
    text = table(rows, " ".join(["python", *sys.argv]))
    if args.out is not None:
        (args.out / "learned_width.md").write_text(text)
        (args.out / "learned_width.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
