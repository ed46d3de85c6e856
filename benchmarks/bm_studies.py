"""The source papers' questions (`vitfront study`), asked of a small ViT on CIFAR-10.

    python benchmarks/bm_studies.py [--quick] [--json] [--out benchmarks/results]

The recipe is `cifar10_mini.yaml` beside this file. Few images, and fewer values than the shipped studies have
(`VALUES`), keep the time down. What is done is kept in `runs/`, and the same command goes on with it. All is chosen on
training images; `val` is looked at once a variant. Speed-ups are paired with the dense model on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

from pruning.measure.stopwatch import device_name
from search.commands.study import Study, load_study, run_study
from search.config import Config
from search.recipe import load_config
from search.views.study_plot import StudyInfo, study_info

RECIPE = Path(__file__).with_name("cifar10_mini.yaml")
NAMES = ("cutoff", "noise", "tokens", "order", "width-or-depth", "budgets")

VALUES: dict[str, dict[str, list[Any]]] = {
    "cutoff": {"space.target_ratio": [0.8, 0.6], "space.cutoff_channel": [0.05, 0.1, 0.2, 0.8]},
    "noise": {"data.noise": [0.0, 0.1, 0.4]},
    "order": {"space.drop_budget": [0.5, 1.0, 2.0]},
    "budgets": {"space.drop_budget": [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0]},
}
"""Study -> key -> values that replace those of the shipped study."""

QUICK = {"cutoff": {"space.target_ratio": [0.7], "space.cutoff_channel": [0.1, 0.8]}}
QUICK_SETS = ("data.calibration_images=64", "data.probe_images=64", "data.val_images=100")


def thinned(study: Study, values: dict[str, list[Any]]) -> Study:
    """Returns a study with fewer values."""

    def fewer(lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {key: values.get(key, shipped) for key, shipped in lists.items()}

    num_trials = len(values.get("space.drop_budget", ()))  # as many searched as uniform ones, of one seed
    series = [
        one.model_copy(update={"each": fewer(one.each), "trials": one.trials and (num_trials or one.trials)})
        for one in study.series[:2]
    ]
    return study.model_copy(update={"each": fewer(study.each), "series": series})


def measure(config: Config, values: dict[str, dict[str, list[Any]]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Runs the studies; returns the record of each, with the seconds it took here."""
    records = []
    for name in names:
        start = time.monotonic()
        study = thinned(load_study(name), values.get(name, {}))
        record = run_study(name, config, Path("runs"), lambda text: print(text, file=sys.stderr, flush=True), study)
        trials = sum(row["seconds"] for row in record["rows"])
        records.append(record | {"seconds": time.monotonic() - start, "trial_seconds": trials})
        print(f"{name}: {record['sentence']}", file=sys.stderr, flush=True)
    return records


def write(records: list[dict[str, Any]], folder: Path, command: str, config: Config) -> None:
    """Writes the sentences as Markdown, and a picture with a panel a metric of each study."""
    data, dense_top1, num_val = config.data, records[0]["dense"]["top1"], records[0]["val_images"]
    threads = torch.get_num_threads()
    lines = [
        "# The papers' questions: a small ViT on CIFAR-10, no training", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {threads} thread. 8 blocks, 65 tokens;",
        f"dense top-1 {100 * dense_top1:.1f} % of {num_val} val images, of which one is {100 / num_val:.2f} points.",
        f"{data.calibration_images} training images to calibrate, {data.probe_images} to probe; the dense model has",
        f"seen them. Speed-ups are paired with the dense model, batch {config.measure.batch_size}; other work ran",
        "beside, which ratios survive and images a second do not. The sentences are computed from the rows. One choice",
        "of images, one seed: a difference of a few images tells nothing.",
        "", "![the studies](studies.png)",
    ]  # fmt: skip
    for record in records:
        # The share of the multiply-adds is told in any case.
        x = {} if record["x"] == "share" else {record["x"]: record["x_label"]}
        lines += [
            "", f"## {record['question']}", "",
            f"`vitfront study {record['name']}`, after {record['source']}. {record['remark']}", "",
            f"**{record['sentence']}** ({len(record['rows'])} trials, {record['trial_seconds']:.0f} s)", "",
            "| series | " + " | ".join([*record["lines"], "MACs", *x.values()]) + " |",
            "|---" * (2 + len(record["lines"]) + len(x)) + "|",
        ]  # fmt: skip
        for row in record["rows"]:
            if row["top1"] is not None:
                shown = {"top1": f"{100 * row['top1']:.1f} %", "speedup": f"{row['speedup']:.2f}"}
                cells = [*(shown[metric] for metric in record["lines"]), f"{row['share']:.1%}"]
                cells += [f"{float(row[key]):.3g}" for key in x]
                lines.append(f"| {row['series']} | {' | '.join(cells)} |")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "studies.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw([study_info(record) for record in records], folder / "studies.png")


def draw(infos: list[StudyInfo], path: Path) -> None:
    """Draws a panel a metric, in columns of three."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(info, panel) for info in infos for panel in info.panels]
    num_rows = -(-len(panels) // 3)
    figure, grid = plt.subplots(num_rows, 3, figsize=(16, 4.6 * num_rows), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (info, panel) in zip(grid.flat, panels, strict=False):
        for line, marker in zip(panel.lines, "osv^Dx" * len(panel.lines), strict=False):
            axes.plot(line.x, line.y, marker=marker, label=line.name)
            if line.low != line.high:
                axes.fill_between(line.x, line.low, line.high, alpha=0.2)
        axes.axhline(panel.dense, color="grey", linestyle=":", label="dense")
        axes.set(xlabel=info.x_label, ylabel=panel.y_label, xscale="log" if info.log_x else "linear")
        if info.log_x:
            tried = sorted({x for line in panel.lines for x in line.x})
            axes.set_xticks(tried, [f"{x:g}" for x in tried])
            axes.minorticks_off()
        axes.set_title("\n".join(wrap(info.title, 50)), fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one study, few images")
    parser.add_argument("--json", action="store_true", help="print the rows and nothing else")
    parser.add_argument("--out", type=Path, help="folder for the table and the picture")
    arguments = parser.parse_args()
    config = load_config(str(RECIPE), sets=QUICK_SETS if arguments.quick else ())
    values, names = (QUICK, tuple(QUICK)) if arguments.quick else (VALUES, NAMES)
    records = measure(config, values, names)
    if arguments.json:
        rows = [{"study": record["name"], **row} for record in records for row in record["rows"]]
        print(json.dumps({"rows": rows}))
    if arguments.out is not None:
        write(records, arguments.out, f"python benchmarks/bm_studies.py --out {arguments.out}", config)


if __name__ == "__main__":
    main()
