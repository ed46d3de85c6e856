"""One model, one plan, no search: what `vitfront prune` does."""

from __future__ import annotations

from pathlib import Path

import torch

from pruning.artifact import Description, save, save_weights
from pruning.errors import ArtifactError, VitfrontError
from search.config import Config
from search.errors import ConfigError
from search.inputs import load_inputs
from search.outcome import Candidate, Measurement, Outcome, State
from search.trial import build, prepare, run_trial


def prune_once(
    config: Config,
    runs: Path,
    to: Path | None,
    *,
    target_ratio: float,
    budget: float,
    exit_block: int | None,
    cutoff_channel: float,
    cutoff_token: float,
    token_share: float,
) -> tuple[Outcome, Measurement]:
    """The outcome of one candidate, which need not lie in the recipe's space, and the dense model's measurement.

    Args:
        budget: accuracy points that each block may cost.
        exit_block: the model answers after this many blocks; None for all.
        to: folder to save the pruned model in; None for not at all.

    Raises:
        VitfrontError: wrong input, or the pruning failed.
    """
    if to is not None and to.exists():
        raise ArtifactError(f"{to} exists; give a folder that does not")
    for name, share in (("target ratio", target_ratio), ("token share", token_share)):
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} {share} is out of range; give 0 to 1")
    fixed = config.space.model_copy(update={"exit_block": exit_block})
    inputs = load_inputs(config.model_copy(update={"space": fixed}), runs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exits = list(inputs.space.exit_blocks)
    bench, dense = prepare(config, inputs.model.to(device), inputs.splits, exits, trained=inputs.trained)
    if not inputs.trained:
        save_weights(bench.model, inputs.cache)
    candidate = Candidate(
        cutoff_channel=cutoff_channel,
        cutoff_token=cutoff_token,
        drop_budget=(budget,) * inputs.space.depth,
        token_share=token_share,
        target_ratio=target_ratio,
        exit_block=exits[0],
    )
    outcome = run_trial(bench, candidate, "t000")
    if outcome.state is not State.MEASURED or outcome.plan is None:
        raise VitfrontError(f"pruning failed: {outcome.reason}")
    if to is not None:
        description = Description(name=config.model.name, args=config.model.args, input=inputs.spec, plan=outcome.plan)
        save(build(bench, outcome.plan), description, to)
    return outcome, dense
