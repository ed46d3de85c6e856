"""Prunes ViT-Tiny without any training to seven sizes, beside Torch-Pruning and ToMe.

    python benchmarks/bm_no_training.py [--quick] [--json] [--out benchmarks/results]

Everything is chosen on training images: 256 for the profile and to calibrate, 384 others to probe. Of a few weights of
tokens against channels the plan whose answers diverge least from the dense model's on the probe images is taken, and
repaired on all 616 images that are not probes; widths are those that this machine is faster with (`round_to: auto`).
`val` is looked at once a row. Speed-ups are paired with the dense model on this machine, by batches of 16, for which
the plans are made, and of 1. All runs in the precision that is faster here.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruning.data import Images, InputSpec
from pruning.dataset.splits import load_split, open_dataset
from pruning.losses import divergence
from pruning.measure.accuracy import predict, top1
from pruning.measure.cost import count_macs
from pruning.measure.stopwatch import device_name, fastest_precision, time_against_dense
from pruning.measure.widths import AllowedWidths, measure_allowed_widths
from pruning.methods.allocation import allocate
from pruning.methods.profile import Profile
from pruning.methods.profiling import measure_profile
from pruning.methods.schedule import token_counts
from pruning.model.anatomy import blocks_of, examine
from pruning.model.loading import create_model
from pruning.model.surgery import apply_plan, keep_all_block, keep_all_plan
from pruning.model.weights import load_checkpoint
from pruning.plan import Plan
from pruning.precision import Precision
from pruning.repair.compensation import repaired_model
from pruning.repair.sensitivity import measure_sensitivity

DATA = Path(__file__).parents[2] / "shared" / "data" / "imagenet-mini"
SPEC = InputSpec(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)

LIMITS = (
    (0.80, False, 0.805),
    (0.65, False, 0.75),
    (0.73, True, 0.82),
    (0.57, True, 0.82),
    (0.48, True, 0.815),
    (0.38, True, 0.80),
    (0.30, True, 0.76),
)
"""Largest share of the dense multiply-adds, True if tokens may be reduced, and the top-1 aimed at."""

TOKEN_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
WANTED_SPEED, WANTED_SPEED_ALONE = 0.85, 0.75
"""Speed-up times share of the multiply-adds that is aimed at, by batches of 16 and of 1."""

TOME = {0.73: 8, 0.57: 13, 0.48: 16, 0.38: 20}
"""Largest share of the dense multiply-adds -> tokens that ToMe merges in every block."""


def images(split: str) -> Images:
    dataset = open_dataset("folder", num_classes=1000, root=DATA, class_map=DATA / "class_map.txt")
    return load_split(dataset, split, SPEC, limit=10_000).images


def vitfront(
    model: nn.Module, profile: Profile, allowed_widths: tuple[AllowedWidths, ...], limit: float, tokens: bool,
    calibration: Images, probe: Images, rest: Images, precision: Precision,
) -> tuple[nn.Module, Plan, float]:  # fmt: skip
    """Prunes by vitfront, with the weight of tokens that is best on the probe images.

    Returns:
        The pruned model, its plan, and the seconds that it took.
    """
    start, anatomy = time.monotonic(), examine(model)
    target = int(limit * count_macs(anatomy, keep_all_plan(anatomy)))
    dense, best = predict(model, probe, precision=precision), None
    sensitivity = measure_sensitivity(model, calibration, precision=precision)
    plans = [
        allocate(profile, anatomy, target, share, allowed_widths) for share in (TOKEN_SHARES if tokens else (0.0,))
    ]
    for plan in dict.fromkeys(plans):
        pruned = repaired_model(model, plan, calibration, sensitivity, precision=precision).model
        lost = divergence(dense, predict(pruned, probe, precision=precision)).item()
        if best is None or lost < best[0]:
            best = lost, plan
    assert best is not None
    return repaired_model(model, best[1], rest, precision=precision).model, best[1], time.monotonic() - start


def tome(model: nn.Module, removed: int) -> tuple[nn.Module, Plan]:
    anatomy = examine(model)
    counts = token_counts("constant", anatomy.blocks[0].num_patches, anatomy.depth, removed)
    plan = Plan(blocks=tuple(keep_all_block(anatomy.blocks[0], count) for count in counts), token_reduction="merge")
    return apply_plan(model, plan), plan


def torch_pruning(model: nn.Module, limit: float, calibration: Images) -> tuple[nn.Module, float]:
    """Prunes hidden units and head widths by Torch-Pruning's global Taylor, set up as in its ViT example.

    Returns:
        The pruned model, and its share of the multiply-adds by Torch-Pruning's counter.
    """
    import torch_pruning as tp

    pruned: Any = copy.deepcopy(model).requires_grad_(True)
    example = torch.zeros(1, 3, 224, 224)
    heads = {}
    for block in blocks_of(pruned):
        block.attn.fused_attn = False
        heads[block.attn.qkv] = block.attn.num_heads
    dense_macs, _ = tp.utils.count_ops_and_params(pruned, example)
    steps = 25
    pruner = tp.pruner.BasePruner(
        pruned, example, importance=tp.importance.GroupTaylorImportance(), global_pruning=True, isomorphic=False,
        pruning_ratio=0.9, iterative_steps=steps, ignored_layers=[pruned.head, pruned.patch_embed.proj],
        num_heads=heads, prune_head_dims=True, prune_num_heads=False, root_module_types=[nn.Linear],
    )  # fmt: skip
    for _ in range(steps):
        pruned.zero_grad()
        for batch, labels in calibration.batches(64):
            torch.nn.functional.cross_entropy(pruned(batch), labels).backward()
        pruner.step()
        for block in blocks_of(pruned):
            block.attn.head_dim = block.attn.qkv.out_features // (3 * block.attn.num_heads)
            block.attn.attn_dim = block.attn.num_heads * block.attn.head_dim
        macs, _ = tp.utils.count_ops_and_params(pruned, example)
        if macs <= limit * dense_macs:
            break
    return pruned.requires_grad_(False).eval(), macs / dense_macs


def timed(
    model: nn.Module, pruned: nn.Module, batch: Tensor, rounds: int, precision: Precision
) -> dict[str, float]:  # fmt: skip
    """Times a model by whole batches, and by batches of one image."""
    found = {}
    for name, images in (("speedup", batch), ("speedup_alone", batch[:1])):
        _, (timing,) = time_against_dense(model, [pruned], images, num_rounds=rounds, precision=precision)
        found |= {name: timing.speedup, f"{name}_low": timing.speedup_low, f"{name}_high": timing.speedup_high}
    return found


def measure(quick: bool) -> list[dict[str, Any]]:
    model = create_model("vit_tiny_patch16_224")
    load_checkpoint(model, DATA / "vit_tiny_patch16_224.safetensors")
    model.requires_grad_(False)
    anatomy = examine(model)
    dense_macs = count_macs(anatomy, keep_all_plan(anatomy))
    train, val = images("train"), images("val")
    num_calibration, num_probe = (96, 48) if quick else (256, 384)
    calibration = train.take(slice(0, num_calibration))
    probe = train.take(slice(num_calibration, num_calibration + num_probe))
    last = num_calibration + num_probe + (0 if quick else 360)
    rest = train.take(torch.cat([torch.arange(num_calibration), torch.arange(num_calibration + num_probe, last)]))
    val = val.take(slice(0, 100 if quick else None))
    batch, rounds = val.normalized(slice(0, 16)), 7 if quick else 15
    precision = fastest_precision(model, batch)
    rows: list[dict[str, Any]] = []

    def add(method: str, limit: float, tokens: bool, share: float, pruned: nn.Module, **more: Any) -> None:
        accuracy = top1(predict(pruned, val, precision=precision), val.labels)
        row = {"method": method, "limit": limit, "tokens": tokens, "share": share, "top1": accuracy}
        rows.append(row | timed(model, pruned, batch, rounds, precision) | more)
        shown = {key: value for key, value in rows[-1].items() if key != "plan_shapes"}
        print(shown, file=sys.stderr, flush=True)

    add("dense", 1.0, False, 1.0, model, precision=precision)
    start = time.monotonic()
    profile = measure_profile(
        model, calibration, probe.take(slice(0, 64)), token_reduction="attention-merge", precision=precision
    )
    profile_s, start = time.monotonic() - start, time.monotonic()
    allowed_widths = measure_allowed_widths(model, len(batch), token_reduction="attention-merge", precision=precision)
    widths_s = time.monotonic() - start
    for limit, tokens, wanted in LIMITS[1:4:2] if quick else LIMITS:
        pruned, plan, seconds = vitfront(
            model, profile, allowed_widths, limit, tokens, calibration, probe, rest, precision
        )  # fmt: skip
        add(
            "vitfront", limit, tokens, count_macs(anatomy, plan) / dense_macs, pruned, wanted=wanted, seconds=seconds,
            profile_seconds=profile_s, widths_seconds=widths_s,
            plan_shapes=[list(vars(block.shape).values()) for block in plan.blocks],
        )  # fmt: skip
    for limit, removed in [(0.57, 13)] if quick else TOME.items():
        pruned, plan = tome(model, removed)
        add("tome", limit, True, count_macs(anatomy, plan) / dense_macs, pruned, removed=removed)
    for limit in (0.65,) if quick else (0.80, 0.65):
        pruned, share = torch_pruning(model, limit, calibration.take(slice(0, 96)))
        add("torch-pruning", limit, False, share, pruned)
    return rows


def write(rows: list[dict[str, Any]], folder: Path, command: str) -> None:
    """Writes the table as Markdown, and the picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines = [
        "# Without any training: ViT-Tiny on ImageNet images", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{rows[0]['precision']}, "
        "650 images of val. Chosen on training images alone: 256 to calibrate, 384 to probe, 616 for the last repair. "
        "Torch-Pruning 1.6.1; ToMe is our own.", "",
        "| method | MACs at most | tokens reduced | share of MACs | top-1 | asked | speed-up, batch 16 (95 %) "
        "| asked | batch 1 (95 %) | asked |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        wanted = f"{row['wanted']:.2f}" if "wanted" in row else ""
        by_batch, alone = (
            f"{row[name]:.2f} ({row[f'{name}_low']:.2f}-{row[f'{name}_high']:.2f})"
            for name in ("speedup", "speedup_alone")
        )
        wanted_speed, wanted_alone = (
            f"{wanted_share / row['share']:.2f}" if "wanted" in row else ""
            for wanted_share in (WANTED_SPEED, WANTED_SPEED_ALONE)
        )
        lines.append(
            f"| {row['method']} | {row['limit']:.2f} | {'yes' if row['tokens'] else 'no'} | {row['share']:.3f} "
            f"| {row['top1']:.4f} | {wanted} | {by_batch} | {wanted_speed} | {alone} | {wanted_alone} |"
        )
    vitfront_rows = [row for row in rows if row["method"] == "vitfront"]
    if vitfront_rows:
        seconds = ", ".join(f"{row['seconds']:.0f}" for row in vitfront_rows)
        profile_s, widths_s = vitfront_rows[0]["profile_seconds"], vitfront_rows[0]["widths_seconds"]
        once = f"Profile {profile_s:.0f} s and widths {widths_s:.0f} s, once"
        lines += ["", f"{once}; then {seconds} s a row of vitfront."]
    lines += ["", "![top-1 against share of MACs](no_training.png)"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "no_training.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "no_training.json").write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
    figure, axes = plt.subplots(figsize=(7, 4.5))
    kinds = (
        ("vitfront", True, "vitfront"),
        ("vitfront", False, "vitfront, channels only"),
        ("tome", True, "ToMe"),
        ("torch-pruning", False, "Torch-Pruning, Taylor"),
    )
    for (method, tokens, label), marker in zip(kinds, "osv^", strict=True):
        points = sorted(
            (row["share"], row["top1"]) for row in rows if (row["method"], row["tokens"]) == (method, tokens)
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=label)
    axes.axhline(rows[0]["top1"], color="grey", linestyle=":", label="dense")
    axes.set(xlabel="share of the dense multiply-adds", ylabel="top-1 on val", title="ViT-Tiny, no training")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "no_training.png", dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, few rows; writes nothing by itself")
    parser.add_argument("--json", action="store_true", help="print the rows and nothing else")
    parser.add_argument("--out", type=Path, help="folder for the table and the picture")
    arguments = parser.parse_args()
    rows = measure(arguments.quick)
    if arguments.json:
        print(json.dumps({"rows": rows}))
    if arguments.out is not None:
        write(rows, arguments.out, f"python benchmarks/bm_no_training.py --out {arguments.out}")


if __name__ == "__main__":
    main()
