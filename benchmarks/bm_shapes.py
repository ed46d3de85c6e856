"""Times the shapes of `results/no_training.json` again, alone on the machine: speed depends on the shape only.

python benchmarks/bm_shapes.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bm_no_training import DATA, images

from pruning.measure.stopwatch import fastest_precision, time_against_dense
from pruning.model.anatomy import examine
from pruning.model.loading import create_model
from pruning.model.surgery import apply_plan
from pruning.model.weights import load_checkpoint
from pruning.plan import BlockPlan, Plan

RESULTS = Path(__file__).parent / "results" / "no_training.json"


def block(shape: list[int]) -> BlockPlan:
    heads, qk, v, hidden, tokens = shape
    return BlockPlan(
        keep_heads=tuple(range(heads)),
        keep_qk=(tuple(range(qk)),) * heads,
        keep_v=(tuple(range(v)),) * heads,
        keep_hidden=tuple(range(hidden)),
        num_tokens=tokens,
    )


def measure(quick: bool) -> list[dict[str, Any]]:
    model = create_model("vit_tiny_patch16_224")
    load_checkpoint(model, DATA / "vit_tiny_patch16_224.safetensors")
    assert examine(model).blocks[0].num_heads == 3
    rows = [row for row in json.loads(RESULTS.read_text())["rows"] if row["method"] == "vitfront"]
    plans = [Plan(blocks=tuple(map(block, row["plan_shapes"])), token_reduction="attention-merge") for row in rows]
    batch = images("val").normalized(slice(0, 16))
    precision = fastest_precision(model, batch)
    _, timings = time_against_dense(
        model, [apply_plan(model, plan) for plan in plans], batch,
        num_rounds=7 if quick else 21, precision=precision,
    )  # fmt: skip
    return [
        {"limit": row["limit"], "tokens": row["tokens"], "share": row["share"], "precision": precision,
         "speedup": timing.speedup, "speedup_low": timing.speedup_low, "speedup_high": timing.speedup_high}
        for row, timing in zip(rows, timings, strict=True)
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments.quick)
    print(json.dumps({"rows": rows}) if arguments.json else "\n".join(map(str, rows)))
