"""Measures what the checks of a sweep's inputs cost, against the preparation of the sweep that they guard.

    python benchmarks/bm_inputs.py [--quick] [--json] [--out benchmarks/results]

The sweep is `benchmarks/imagenet_mini.yaml`: ViT-Tiny, 384 training and 650 val images. Its checks are the hashes of
all images and weights, the search for images that splits share, and the verdict on the answers to val; the pass over
val that gives these answers is the dense model's measurement. Memory is what the peak of the process rises by.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pruning.dataset.sharing import check_shared
from pruning.fingerprints import fingerprint_of_weights, image_hashes
from pruning.measure.accuracy import predict
from pruning.measure.relabelling import Answers
from pruning.measure.stopwatch import device_name
from search.recipe import load_config
from search.trial.fingerprinting import fingerprints_of, hash_splits
from search.trial.first_look import judge, look
from search.trial.inputs import load_inputs
from search.trial.prepare import prepare

REPEATS = 7
LIMIT = 0.02
"""The share of the preparation that the checks may take."""


def measure(quick: bool) -> list[dict[str, Any]]:
    config, runs = load_config("benchmarks/imagenet_mini.yaml"), Path("runs")
    start = time.perf_counter()
    inputs = load_inputs(config, runs)
    loading_s = time.perf_counter() - start
    splits, model = inputs.splits, inputs.model
    logits = predict(model, splits.val, batch_size=config.cascade.batch_size)
    answers = Answers(predicted=logits.argmax(dim=1), labels=splits.val.labels)
    hashes = hash_splits(splits)
    many = torch.randint(256, (1000 if quick else 10_000, 3, 224, 224), dtype=torch.uint8)
    checks: dict[str, Callable[[], Any]] = {
        f"hashes of {len(splits.training) + len(splits.val):,} images": lambda: hash_splits(splits),
        "fingerprints of images and weights": lambda: fingerprints_of(config, model, inputs.spec, splits, hashes),
        "images that splits share": lambda: check_shared(hashes),
        "verdict on the answers to val": lambda: judge(config, answers, lambda: answers, logits.shape[1]),
        f"for scale: hashes of {len(many):,} images": lambda: image_hashes(many),
        "for scale: fingerprint of the weights": lambda: fingerprint_of_weights(model.state_dict()),
    }
    rows = []
    for name, check in checks.items():
        seconds = [timed(check) for _ in range(REPEATS)]
        rows.append({
            "check": name, "seconds": median(seconds), "least": min(seconds), "most": max(seconds),
            "peak_mb": peak_growth_mb(check),
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    start, before = time.perf_counter(), status_mb("VmRSS")
    first = look(config, inputs)
    prepare(config, inputs, first, proposes=not quick)
    preparation_s = time.perf_counter() - start
    spent = [row for row in rows if not row["check"].startswith("for scale")]
    total = sum(row["seconds"] for row in spent)
    rows.append({
        "check": "all checks of the sweep", "seconds": total, "least": sum(row["least"] for row in spent),
        "most": sum(row["most"] for row in spent), "peak_mb": max(row["peak_mb"] for row in spent),
        "loading_s": loading_s, "preparation_s": preparation_s, "share": total / (loading_s + preparation_s),
        "held_mb": before, "preparation_peak_mb": status_mb("VmHWM") - before,
    })  # fmt: skip
    return rows


def timed(call: Callable[[], Any]) -> float:
    """Returns the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_growth_mb(call: Callable[[], Any]) -> float:
    """Returns by how much the peak memory of the process rises above what it held before a call, in MB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_mb("VmRSS")
    call()
    return max(0.0, status_mb("VmHWM") - before)


def status_mb(key: str) -> float:
    """Returns a figure of the process's memory in MB: `VmRSS`, what it holds; `VmHWM`, the most it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    total = rows[-1]
    lines = [
        "# What the checks of the inputs cost", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {torch.get_num_threads()} threads. Medians,",
        f"least and most of {REPEATS} repeats; MB: rise of the process's peak memory.", "",
        "| check | seconds | least | most | MB |", "|---|---|---|---|---|",
        *(
            f"| {row['check']} | {row['seconds']:.4f} | {row['least']:.4f} | {row['most']:.4f} | {row['peak_mb']:.1f} |"
            for row in rows
        ),
        "",
        f"The sweep's images and weights are loaded in {total['loading_s']:.1f} s and prepared in "
        f"{total['preparation_s']:.1f} s, whose peak rises by",
        f"{total['preparation_peak_mb']:.0f} MB. The checks take {total['share']:.2%} of these seconds (at most "
        f"{LIMIT:.0%} was wanted) and {total['peak_mb'] / max(total['preparation_peak_mb'], 1):.2%} of the memory.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without profiles, 1,000 images for scale")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for inputs.{md,json}")
    args = parser.parse_args()
    rows = measure(args.quick)
    text = text_of(rows, " ".join(["python", *sys.argv]))
    if args.out is not None:
        (args.out / "inputs.md").write_text(text)
        (args.out / "inputs.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
