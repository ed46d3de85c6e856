"""One model, one plan, no search: what `vitfront prune` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pruning.artifact import Description, save, save_weights
from pruning.errors import ArtifactError, VitfrontError
from pruning.measure.cost import block_macs
from pruning.model.anatomy import Anatomy, examine
from pruning.model.surgery import keep_all_block
from search.config import Config
from search.errors import ConfigError
from search.outcome import Candidate, Measurement, Outcome, State
from search.trial.context import prepare
from search.trial.inputs import load_inputs
from search.trial.trial import run_to_end


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
    method: str,
    criterion: str,
    token_reduction: str,
    round_to: str,
) -> tuple[Outcome, Measurement, list[dict[str, Any]]]:
    """The outcome of one candidate, which need not lie in the recipe's space, the dense measurement, and `block_rows`.

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
    choices = {
        "method": method,
        "criterion": criterion,
        "token_reduction": token_reduction,
        "round_to": int(round_to) if round_to.isdecimal() else round_to,
    }
    space = config.model_dump(mode="json")["space"] | choices | {"exit_block": exit_block}
    config = Config.from_dict(config.model_dump(mode="json") | {"space": space})  # checks the choices
    inputs = load_inputs(config, runs)
    if inputs.space.token_reduction[0] == "none" and token_share == 1:
        raise ConfigError("token share 1 prunes tokens alone, but the token reduction is none; give less")
    torch.set_num_threads(config.resources.cpus_per_trial)  # as in a sweep: more are slower where cores are busy
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exits = list(inputs.space.exit_blocks)
    context, dense = prepare(config, inputs.model.to(device), inputs.splits, exits, trained=inputs.trained)
    if not inputs.trained:
        save_weights(context.model.state_dict(), inputs.cache)
    candidate = Candidate(
        cutoff_channel=cutoff_channel,
        cutoff_token=cutoff_token,
        drop_budget=(budget if method == "cascade" else 0.0,) * inputs.space.depth,
        token_share=token_share,
        target_ratio=target_ratio,
        exit_block=exits[0],
        method=inputs.space.method[0],
        criterion=inputs.space.criterion[0],
        token_reduction=inputs.space.token_reduction[0],
        round_to=inputs.space.round_to[0],
    )
    ended = run_to_end(context, candidate, "t000")
    outcome = ended.outcomes[0]
    if outcome.state is not State.MEASURED or outcome.plan is None:
        raise VitfrontError(f"pruning failed: {outcome.reason}")
    if to is not None:
        description = Description(name=config.model.name, args=config.model.args, input=inputs.spec, plan=outcome.plan)
        save(ended.models[outcome.id], description, to)
    return outcome, dense, block_rows(outcome, examine(context.model))


def block_rows(outcome: Outcome, anatomy: Anatomy) -> list[dict[str, Any]]:
    """What each block keeps, of what there was; what that cost in accuracy, where it was measured; its MACs."""
    assert outcome.plan is not None
    rows, entering = [], anatomy.blocks[0].num_patches
    drops = [f"{drop:+.2f}" for drop in outcome.block_drops] or ["-"] * outcome.plan.exit_block
    for index, (dense, block) in enumerate(zip(anatomy.blocks, outcome.plan.blocks, strict=False)):
        dense_macs = block_macs(dense, keep_all_block(dense).shape, dense.num_patches).total
        macs = block_macs(dense, block.shape, min(entering, dense.num_patches), outcome.plan.token_reduction).total
        shape, entering = block.shape, block.num_tokens
        rows.append({
            "block": index,
            "heads": f"{shape.num_heads}/{dense.num_heads}",
            "qk": f"{shape.qk_width}/{dense.head_dim}",
            "v": f"{shape.v_width}/{dense.head_dim}",
            "hidden": f"{shape.num_hidden}/{dense.num_hidden}",
            "tokens": f"{shape.num_tokens}/{dense.num_patches}",
            "drop": drops[index],
            "MACs": f"{macs / dense_macs:.0%}",
        })  # fmt: skip
    return rows
