"""Runs the lottery of a recipe, seed by seed, and keeps its record: `vitfront lottery`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from pruning.data import Splits
from pruning.fingerprints import fingerprint_of_weights
from pruning.measure.stopwatch import device_name
from pruning.methods.lottery import Arm, LotteryRow, LotterySettings, run_lottery
from pruning.model.loading import create_model
from pruning.precision import Precision
from search.config import Config, Fingerprints
from search.errors import ConfigError
from search.records.files import write_atomically
from search.trial.context import lease_on
from search.trial.dense import load_dense
from search.trial.fingerprinting import check_unchanged
from search.trial.inputs import load_inputs
from search.views.lottery_plot import lottery_html


def run_lottery_seeds(
    config: Config,
    runs: Path,
    *,
    sparsity: float,
    rounds: int,
    rewind_step: int,
    seeds: int,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Runs a lottery for every seed, and writes table.csv, result.json and lottery.html into `lottery_folder`.

    Args:
        sparsity: share of the blocks' weights to remove.
        rounds: number of rounds of training and pruning in which they are removed.
        rewind_step: training step whose weights a ticket is rewound to.
        seeds: number of seeds, counted up from the seed of the recipe's training.
        on_stage: called before each training with a text that tells which.

    Returns:
        The content of result.json.

    Raises:
        VitfrontError: wrong input, or a training diverged.
    """
    training = config.model.training
    if training is None:
        raise ConfigError(
            f"recipe {config.name!r} has no model.training, and a lottery is about training; "
            "add it: --set model.training={}"
        )
    if seeds < 1:
        raise ConfigError(f"{seeds} seeds are none; give 1 at least")
    settings = LotterySettings(training=training.settings(), sparsity=sparsity, rounds=rounds, rewind_step=rewind_step)
    inputs = load_inputs(config, runs)  # its model may be trained already
    splits, config = inputs.splits, config.model_copy(update={"fingerprints": inputs.fingerprints})
    num_steps = settings.num_steps(len(splits.training))  # checks the rewind step
    torch.set_num_threads(config.resources.cpus_per_trial)  # as in a sweep
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # As a sweep trains: what runs this device's inference faster is not what to train with.
    precision: Precision = "float32" if config.measure.precision == "auto" else config.measure.precision
    folder = lottery_folder(runs, config.name)
    folder.mkdir(parents=True, exist_ok=True)  # a file in its way shows now, not after the trainings
    rows: list[LotteryRow] = []
    for index in range(seeds):
        seed = replace(settings, training=replace(settings.training, seed=training.seed + index))
        rows += _run_seed(config, splits, seed, device, precision, _for_seed(on_stage, index, seeds, rounds))
    conditions = {
        "device": device_name(device), "precision": precision, "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip
    record = {
        "name": config.name, "sparsity": sparsity, "rounds": rounds, "rewind_step": rewind_step, "seeds": seeds,
        "steps": num_steps, "training_images": len(splits.training), "val_images": len(splits.val),
        "conditions": conditions, "config": config.model_dump(mode="json"), "arms": summaries(rows),
        "rows": [_plain(row) for row in rows],
    }  # fmt: skip
    write_atomically(folder / "table.csv", lottery_csv(rows))
    write_atomically(folder / "lottery.html", lottery_html(record))
    write_atomically(folder / "result.json", json.dumps(record))
    return record


def _run_seed(
    config: Config, splits: Splits, settings: LotterySettings, device: torch.device, precision: Precision,
    on_stage: Callable[[Arm, int, nn.Module], None] | None,
) -> Sequence[LotteryRow]:  # fmt: skip
    """Runs the lottery of one seed, which stands in the settings of its training."""
    with lease_on(device).shared():  # nothing is timed here, but a sweep on this device may be timing
        return run_lottery(
            seeded_model(config, settings.training.seed).to(device),
            splits.training,
            splits.val,
            settings,
            fresh=lambda seed: seeded_model(config, seed, untouched=True),
            precision=precision,
            on_stage=on_stage,
        ).rows


def lottery_folder(runs: Path, name: str) -> Path:
    """Returns the folder of a recipe's lottery; the next lottery of that name takes its place."""
    return runs / f"lottery-{name}"


def seeded_model(config: Config, seed: int, *, untouched: bool = False) -> nn.Module:
    """Creates the recipe's model with the weights from which its training starts.

    Args:
        seed: draws the weights that the recipe does not give.
        untouched: draws all weights by the seed, even where the recipe starts from given ones.

    Raises:
        SweepError: the recipe has fingerprints, and its checkpoint was overwritten since.
    """
    torch.manual_seed(seed)
    if untouched:
        return create_model(config.model.name, args=config.model.args)
    model, _ = load_dense(config.model)
    if config.fingerprints is not None and config.model.checkpoint is not None:  # which gives all weights
        first_weights = fingerprint_of_weights(model.state_dict())
        check_unchanged(
            config.fingerprints,
            Fingerprints(first_weights=first_weights),
            "the lottery was begun with other inputs",
            "begin again",
        )
    return model


def summaries(rows: Sequence[LotteryRow]) -> list[dict[str, Any]]:
    """Averages accuracy and gradient norm over the seeds, for each arm and round in the order in which they come.

    `gradient_norm_first` is the norm in the first step, before any weight has moved; `gradient_norm_mean` is the mean
    over all steps.
    """
    by_arm_and_round: dict[tuple[Arm, int], list[LotteryRow]] = {}
    for row in rows:
        by_arm_and_round.setdefault((row.arm, row.round), []).append(row)
    return [
        {
            "arm": arm,
            "round": number,
            "sparsity": seeds[0].sparsity,
            "top1": fmean(row.top1 for row in seeds),
            "top1_low": min(row.top1 for row in seeds),
            "top1_high": max(row.top1 for row in seeds),
            "gradient_norm_first": fmean(row.gradient_norms[0] for row in seeds),
            "gradient_norm_mean": fmean(fmean(row.gradient_norms) for row in seeds),
        }
        for (arm, number), seeds in by_arm_and_round.items()
    ]


def _plain(row: LotteryRow) -> dict[str, Any]:
    """Returns a row as plain values; gradient norms keep four digits."""
    return asdict(row) | {"gradient_norms": [float(f"{norm:.4g}") for norm in row.gradient_norms]}


def lottery_csv(rows: Sequence[LotteryRow]) -> str:
    """Writes the table of a lottery, a line for each training."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "round", "sparsity", "seed", "top1", "gradient_norm_first", "gradient_norm_mean"))
    for row in rows:
        norms = (row.gradient_norms[0], fmean(row.gradient_norms))
        writer.writerow((row.arm, row.round, row.sparsity, row.seed, row.top1, *(f"{norm:.4g}" for norm in norms)))
    return text.getvalue()


def _for_seed(
    on_stage: Callable[[str], None] | None, index: int, seeds: int, rounds: int
) -> Callable[[Arm, int, nn.Module], None] | None:
    """Makes the callback of one seed's lottery from the callback of all seeds."""
    if on_stage is None:
        return None
    return lambda arm, number, model: on_stage(f"seed {index + 1} of {seeds}: {arm}, pruned {number} of {rounds} times")
