"""One model pruned by one plan, without a search: what `vitfront prune` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pruning.artifact import Description, save
from pruning.errors import ArtifactError, VitfrontError
from pruning.measure.cost import block_macs
from pruning.model.anatomy import Anatomy, examine
from pruning.model.surgery import keep_all_block
from search.config import Config
from search.errors import ConfigError
from search.method import METHODS
from search.outcome import Candidate, Measurement, Outcome, State
from search.space import Space
from search.trial.context import TrialContext
from search.trial.inputs import load_inputs
from search.trial.prepare import prepare_locally
from search.trial.trial import Ended, run_to_end


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """The settings of the one candidate, which need not lie in the recipe's space."""

    target_ratio: float
    """Share of the dense MACs to keep."""
    budget: float
    """Accuracy points that each block may cost, for a method with budgets."""
    exit_block: int | None
    """The model answers after this many blocks; None for all."""
    cutoff_channel: float
    cutoff_token: float
    token_share: float
    method: str
    criterion: str
    token_reduction: str
    round_to: str
    """A whole number, or `auto`."""


def prune_once(
    config: Config,
    runs: Path,
    to: Path | None,
    settings: PruneSettings,
    say: Callable[[str], None],
    *,
    prepare: Callable[..., tuple[TrialContext, Measurement]] = prepare_locally,
    run: Callable[[TrialContext, Candidate, str], Ended] = run_to_end,
) -> tuple[Outcome, Measurement, list[dict[str, Any]]]:
    """Prunes one model by one candidate.

    Args:
        to: folder to save the pruned model in; None for not at all.
        say: called with each line on the dense model, before it is prepared.
        prepare: makes the context of a recipe and its inputs.
        run: runs the candidate.

    Returns:
        The outcome, the dense model's measurement, and `block_rows`.

    Raises:
        VitfrontError: wrong input, or the pruning failed.
    """
    if to is not None and to.exists():
        raise ArtifactError(f"{to} exists; give a folder that does not")
    config = _narrowed(config, settings)
    inputs = load_inputs(config, runs)
    if inputs.space.token_reduction[0] == "none" and settings.token_share == 1:
        raise ConfigError("token share 1 prunes tokens alone, but the token reduction is none; give less")
    torch.set_num_threads(config.resources.cpus_per_trial)  # as in a sweep: more are slower where cores are busy
    context, dense = prepare(config, inputs, say)
    ended = run(context, _candidate(settings, inputs.space), "t000")
    outcome = ended.outcomes[0]
    if outcome.state is not State.MEASURED or outcome.plan is None:
        raise VitfrontError(f"pruning failed: {outcome.reason}")
    if to is not None:
        description = Description(name=config.model.name, args=config.model.args, input=inputs.spec, plan=outcome.plan)
        save(ended.models[outcome.id], description, to)
    return outcome, dense, block_rows(outcome, examine(context.model))


def _narrowed(config: Config, settings: PruneSettings) -> Config:
    """Gives the recipe with the settings' choices as its space.

    Raises:
        ConfigError: a setting is out of range, or there is no such choice.
    """
    for name, share in (("target ratio", settings.target_ratio), ("token share", settings.token_share)):
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} {share} is out of range; give 0 to 1")
    choices = {
        "method": settings.method,
        "criterion": settings.criterion,
        "token_reduction": settings.token_reduction,
        "round_to": int(settings.round_to) if settings.round_to.isdecimal() else settings.round_to,
        "exit_block": settings.exit_block,
    }
    record = config.model_dump(mode="json")
    return Config.from_dict(record | {"space": record["space"] | choices})


def _candidate(settings: PruneSettings, space: Space) -> Candidate:
    """Gives the candidate of the settings, with the choices of the narrowed space."""
    has_budgets = METHODS[space.method[0]].has_budgets
    return Candidate(
        cutoff_channel=settings.cutoff_channel,
        cutoff_token=settings.cutoff_token,
        drop_budget=(settings.budget if has_budgets else 0.0,) * space.depth,
        token_share=settings.token_share,
        target_ratio=settings.target_ratio,
        exit_block=space.exit_blocks[0],
        method=space.method[0],
        criterion=space.criterion[0],
        token_reduction=space.token_reduction[0],
        round_to=space.round_to[0],
    )


def block_rows(outcome: Outcome, anatomy: Anatomy) -> list[dict[str, Any]]:
    """Tabulates what each block keeps of the dense block, and what that costs.

    Returns:
        One row a block: `heads`, `qk`, `v`, `hidden` and `tokens` as kept/dense, `drop` in accuracy points where
        it was measured, `MACs` as a share of the dense block's.
    """
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
