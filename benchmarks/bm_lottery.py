"""Lottery tickets on digits: rewound weights against weights drawn anew, under one mask, at sparsity 0.8.

    python benchmarks/bm_lottery.py [--quick] [--json] [--out benchmarks/results]

The recipe `digits`, three seeds, but smaller: 3 blocks instead of 6, 20 epochs instead of 70 (in every arm) and two
rounds of pruning, so that it takes minutes. Nothing is chosen by val.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm

from search.commands.lottery import run_lottery_seeds
from search.recipe import load_config

SPARSITY, ROUNDS, SEEDS, EPOCHS, DEPTH = 0.8, 2, 3, 20, 3
COLOURS = {"dense": "#222222", "ticket": "#1f5fa8", "random": "#d1495b", "sparse-aware": "#2a9d6f"}


def measure(quick: bool) -> dict[str, Any]:
    """Runs the lottery; returns the record of `search.commands.lottery.run_lottery_seeds`, and the seconds it took."""
    epochs = 4 if quick else EPOCHS
    sets = (f"model.training.epochs={epochs}", f"model.args.depth={DEPTH}", f"space.exit_block={DEPTH}")
    start = time.monotonic()

    def print_stage(stage: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s {stage}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as runs:
        record = run_lottery_seeds(
            load_config("digits", sets=sets), Path(runs), sparsity=SPARSITY, rounds=ROUNDS, rewind_step=0,
            seeds=1 if quick else SEEDS, on_stage=print_stage,
        )  # fmt: skip
    return record | {"seconds": time.monotonic() - start}


def top1_by_seed(record: dict[str, Any], arm: str) -> list[float]:
    """Returns the accuracies of an arm's last round, one a seed."""
    last = max(row["round"] for row in record["rows"] if row["arm"] == arm)
    return [row["top1"] for row in record["rows"] if (row["arm"], row["round"]) == (arm, last)]


def comparison(record: dict[str, Any]) -> str:
    """Compares the ticket with the other arms, seed by seed, in points."""
    parts = []
    for arm in ("random", "sparse-aware", "dense"):
        pairs = zip(top1_by_seed(record, "ticket"), top1_by_seed(record, arm), strict=True)
        gaps = [100 * (ticket - other) for ticket, other in pairs]
        verdict = "ahead in every seed" if min(gaps) > 0 else "behind in every seed" if max(gaps) < 0 else "unclear"
        spread = f"{min(gaps):+.1f} to {max(gaps):+.1f}"
        parts.append(f"{sum(gaps) / len(gaps):+.1f} points against {arm} ({spread}, {verdict})")
    return (
        f"The ticket, paired by seed: {', '.join(parts)}. {record['seeds']} seeds of a short training with Muon, where "
        "the papers train long with SGD or Adam."
    )


def write(record: dict[str, Any], folder: Path) -> None:
    """Writes the table as Markdown, and the picture."""
    here, recipe = record["conditions"], record["config"]
    epochs, depth = recipe["model"]["training"]["epochs"], recipe["model"]["args"]["depth"]
    lines = [
        "# Lottery tickets: digits, 80 % of the blocks' weights gone",
        "",
        f"    python benchmarks/bm_lottery.py --out {folder}",
        "",
        f"{here['device']}, {here['threads']} thread, torch {here['torch']}, timm {timm.__version__}, "
        f"{here['precision']}; {record['seconds']:.0f} s.",
        f"The recipe's model with {depth} blocks, {epochs} epochs ({record['steps']} steps) in every arm, "
        f"{record['rounds']} rounds, rewound to the start,",
        f"{record['seeds']} seeds. One of the {record['val_images']} images of val is "
        f"{100 / record['val_images']:.2f} points. The gradient norm is that of the blocks' weights that stay:",
        "in the first step, before any weight has moved, and as a mean over all steps.",
        "",
        "| arm | round | sparsity | top-1, mean | seeds | first gradient | mean gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in record["arms"]:
        rows = [row for row in record["rows"] if (row["arm"], row["round"]) == (arm["arm"], arm["round"])]
        lines.append(
            f"| {arm['arm']} | {arm['round']} | {arm['sparsity']:.3f} | {arm['top1']:.4f} "
            f"| {', '.join(format(row['top1'], '.4f') for row in rows)} "
            f"| {arm['gradient_norm_first']:.3f} | {arm['gradient_norm_mean']:.3f} |"
        )
    lines += ["", comparison(record), "", "![top-1 and gradient norm of every arm](lottery.png)"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lottery.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(record, folder / "lottery.png")


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(ncols=2, figsize=(11, 4.5))
    for place, arm in enumerate(record["arms"]):
        rows = [row for row in record["rows"] if (row["arm"], row["round"]) == (arm["arm"], arm["round"])]
        colour = COLOURS[arm["arm"]]
        left.scatter([place] * len(rows), [row["top1"] for row in rows], color=colour, alpha=0.5)
        left.hlines(arm["top1"], place - 0.3, place + 0.3, color=colour)
        if arm["arm"] != "ticket" or arm["round"] == record["rounds"]:
            norms = [sum(step) / len(step) for step in zip(*(row["gradient_norms"] for row in rows), strict=True)]
            right.plot(range(1, len(norms) + 1), norms, color=colour, label=arm["arm"], linewidth=1)
    names = [f"{arm['arm']}\n{arm['sparsity']:.0%} gone" for arm in record["arms"]]
    left.set_xticks(range(len(names)), names)
    left.set(ylabel="top-1 on val (line: mean of the seeds)", title="Digits")
    right.set(xlabel="step", ylabel="gradient norm of the weights that stay", yscale="log", title="Last round")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs")
    parser.add_argument("--json", action="store_true", help="print the record and nothing else")
    parser.add_argument("--out", type=Path, help="folder for the table and the picture")
    arguments = parser.parse_args()
    record = measure(arguments.quick)
    if arguments.json:
        print(json.dumps(record))
    if arguments.out is not None:
        write(record, arguments.out)


if __name__ == "__main__":
    main()
