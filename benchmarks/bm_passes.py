"""Counts the cost of a 12-block cascade, in forward passes of ViT-Tiny over its probe images (a backward pass is two).

    python benchmarks/bm_passes.py [--quick] [--json] [--save FILE] [--before FILE] [--out benchmarks/results]

128 training images to calibrate, 256 others to probe, one accuracy point a block, at most 0.6 of the multiply-adds; the
accuracy is that of the probe images, on which the budgets hold. What a sweep measures once of the dense model for all
trials, its sensitivity and its stream, is known. VTC-LFC's released loop needs about 300.

`--save` writes which probe images came out right, `--before` compares with those of an earlier commit, on whose
checkout (`PYTHONPATH`) this file was run with `--save`: McNemar's exact test of the images that one of both has right.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bm_no_training import DATA, images

from pruning.measure.accuracy import predict, top1
from pruning.measure.cost import count_macs
from pruning.measure.stopwatch import device_name, fastest_precision
from pruning.methods.cascade import CascadeSettings, cascade
from pruning.model.anatomy import examine
from pruning.model.loading import create_model
from pruning.model.surgery import keep_all_plan
from pruning.model.weights import load_checkpoint
from pruning.plan import TokenReduction
from pruning.repair.sensitivity import measure_sensitivity

BUDGET, TARGET = 1.0, 0.6
KINDS: tuple[tuple[str, TokenReduction], ...] = (("lfs", "lfe"), ("taylor", "merge"), ("obs", "attention-merge"))


def measure(quick: bool, right: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """Measures the rows; `right` gets which probe images came out right, by the row's name."""
    model = create_model("vit_tiny_patch16_224")
    load_checkpoint(model, DATA / "vit_tiny_patch16_224.safetensors")
    model.requires_grad_(False)
    anatomy, train = examine(model), images("train")
    dense_macs = count_macs(anatomy, keep_all_plan(anatomy))
    num_calibration, num_probe = (24, 48) if quick else (128, 256)
    calibration = train.take(slice(0, num_calibration))
    probe = train.take(slice(num_calibration, num_calibration + num_probe))
    precision = fastest_precision(model, probe.normalized(slice(0, 16)))
    before = top1(predict(model, probe, precision=precision), probe.labels)
    known = {}
    if "dense" in inspect.signature(cascade).parameters:  # an earlier commit has none
        from pruning.repair.flow import DenseStream

        known["dense"] = DenseStream(model, calibration, precision=precision)
    sensitivity = measure_sensitivity(model, calibration, precision=precision)
    rows = []
    for criterion, token_reduction in KINDS[-1:] if quick else KINDS:
        start = time.monotonic()
        result = cascade(
            model, probe, calibration,
            CascadeSettings(
                drop_budget=(BUDGET,) * anatomy.depth, target_macs=int(TARGET * dense_macs), criterion=criterion,
                token_reduction=token_reduction, precision=precision,
            ),
            sensitivity=sensitivity, **known,
        )  # fmt: skip
        seconds = time.monotonic() - start
        logits = predict(result.model, probe, precision=precision)
        right[f"{criterion} {token_reduction}"] = (logits.argmax(dim=1) == probe.labels).tolist()
        rows.append({
            "criterion": criterion, "token_reduction": token_reduction, "forward_passes": result.forward_passes,
            "most_spent_points": max(result.block_drops), "share": count_macs(anatomy, result.plan) / dense_macs,
            "probe_top1_before": before,
            "probe_top1": top1(logits, probe.labels), "seconds": seconds,
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def compare(rows: list[dict[str, Any]], right: dict[str, list[bool]], before: dict[str, Any]) -> None:
    """Adds to every row what an earlier commit made of the same, and how likely chance alone makes both differ so."""
    for row in rows:
        name = f"{row['criterion']} {row['token_reduction']}"
        pairs = list(zip(right[name], before["right"][name], strict=True))
        gained, lost = pairs.count((True, False)), pairs.count((False, True))
        least, most = min(gained, lost), gained + lost
        p_value = min(1.0, 2 * sum(math.comb(most, n) for n in range(least + 1)) / 2**most)
        row.update(gained=gained, lost=lost, p_value=p_value)
        row["before"] = next(one for one in before["rows"] if one["criterion"] == row["criterion"])


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Writes the table as Markdown."""
    lines = [
        "# What a cascade costs: ViT-Tiny, 12 blocks",
        "",
        f"    python benchmarks/bm_passes.py --out {folder}",
        "",
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {torch.get_num_threads()} threads.",
        f"128 training images to calibrate, 256 to probe, {BUDGET:g} point a block, at most {TARGET:g} of the",
        "multiply-adds. Passes are forward passes over the probe images, of a trial in a sweep, which has the dense",
        "model's sensitivity and stream; a block on fewer tokens counts as much less, a gradient of weights as two",
        "passes, one of a stream as one. Before: as that commit counted, with the sensitivity (1.5), each block as if",
        "it had all tokens, and gradients of a stream as two. The released VTC-LFC needs about 300 by our count of its",
        "loop.",
        "",
        "| criterion | tokens | passes | most points a block | share of MACs | top-1 of the probes | seconds "
        "| before: passes | share | top-1 | seconds | images gained, lost (p) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy = f"{row['probe_top1_before']:.4f} -> {row['probe_top1']:.4f}"
        line = (
            f"| {row['criterion']} | {row['token_reduction']} | {row['forward_passes']:.1f} "
            f"| {row['most_spent_points']:.2f} | {row['share']:.3f} | {accuracy} | {row['seconds']:.0f} |"
        )
        if old := row.get("before"):
            line += (
                f" {old['forward_passes']:.1f} | {old['share']:.3f} | {old['probe_top1']:.4f} | {old['seconds']:.0f} "
                f"| {row['gained']}, {row['lost']} ({row['p_value']:.2f}) |"
            )
        lines.append(line)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "passes.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, one row")
    parser.add_argument("--json", action="store_true", help="print the rows and nothing else")
    parser.add_argument("--save", type=Path, help="file for what came out right")
    parser.add_argument("--before", type=Path, help="such a file of an earlier commit")
    parser.add_argument("--out", type=Path, help="folder for the table")
    arguments = parser.parse_args()
    right: dict[str, list[bool]] = {}
    rows = measure(arguments.quick, right)
    if arguments.save is not None:
        arguments.save.write_text(json.dumps({"rows": rows, "right": right}), encoding="utf-8")
    if arguments.before is not None:
        compare(rows, right, json.loads(arguments.before.read_text(encoding="utf-8")))
    if arguments.json:
        print(json.dumps({"rows": rows}))
    if arguments.out is not None:
        write(rows, arguments.out)


if __name__ == "__main__":
    main()
