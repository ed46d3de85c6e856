"""The first candidates of a search: the dense model, then what a profile proposes, or else the papers' settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pruning.errors import TargetError
from pruning.methods.allocation import allocate
from pruning.methods.profile import Profile, block_costs
from pruning.model.anatomy import Anatomy, examine
from pruning.model.exits import truncate
from search.method import METHODS, Method
from search.outcome import Candidate
from search.space import PAPER_CUTOFF_CHANNEL, PAPER_CUTOFF_TOKEN, Space
from search.trial.context import TrialContext

PAPER_POINTS = 9.5
"""The accuracy points that VTC-LFC's blocks may cost together."""

PAPER_TOKEN_SHARE = 0.56
"""The share of a block's points that VTC-LFC gives to tokens."""

NUM_TARGETS = 4
"""The number of target ratios that are proposed. Each is the same multiple of the one before: even in speed-up."""

ORDER = (2, 1, 3, 0)
"""The order of the proposed targets, the largest being 0: from the middle on, so that a short search sees it."""


def first_candidates(space: Space, proposed: Sequence[Candidate] = ()) -> list[Candidate]:
    """Gives the candidates that a search begins with, all within the space, none twice.

    The dense model comes first, where a method of the space can leave it as it is. Then come, method by method, the
    cascade first and `global` second, the candidates that were proposed for it and the papers' settings.

    Args:
        proposed: candidates of `propose`. They take the place of all of VTC-LFC's settings but the middle target, and
            of all targets of `global`.
    """
    first: list[Candidate] = []
    for name in sorted(space.method, key=_rank):
        method = METHODS[name]
        proposals = [candidate for candidate in proposed if candidate.method == name]
        if method.repairs and not first:
            first.append(_paper_setting(space, name, 1.0))
        if method.has_budgets:
            first += proposals + _vtc_lfc(space, name, is_short=bool(proposed))
        elif method.needs_profile and proposals:
            first += proposals
        else:
            several = method.needs_profile or method.serves_every_exit
            first += [_paper_setting(space, name, target) for target in _targets(space)[: None if several else 1]]
    return list(dict.fromkeys(first))


EARLY_TARGETS = (0.6, 0.35, 0.75, 0.47)
"""The target ratios of the schedules of tokens that come first."""


def early_candidates(space: Space) -> list[Candidate]:
    """Gives the candidates that need no profile and no widths of the dense model, all within the space, none twice.

    The dense model comes first; then the schedules of tokens at a few targets, which are the whole front of ToMe; then
    the exits with nothing else pruned.
    """
    repairing = [name for name in sorted(space.method, key=_rank) if METHODS[name].repairs]
    if not repairing:
        return []
    early = [_paper_setting(space, repairing[0], 1.0)]
    schedules = [name for name in space.method if METHODS[name].is_schedule]
    early += [_paper_setting(space, name, target) for name in schedules[:1] for target in EARLY_TARGETS]
    early += [_paper_setting(space, repairing[0], 1.0, exit_block=block) for block in reversed(space.exit_blocks)]
    return list(dict.fromkeys(early))


def _rank(name: Method) -> int:
    """Ranks a method: with budgets 0, with a need of a profile 1, all others 2, which stay in the recipe's order."""
    method = METHODS[name]
    return 0 if method.has_budgets else 1 if method.needs_profile else 2


def _vtc_lfc(space: Space, name: Method, *, is_short: bool) -> list[Candidate]:
    """Gives VTC-LFC's setting with 9.5 points spread evenly over the blocks, at each target, the middle one first.

    After the middle one come WDPruning's depths: an exit at 10 of 12 blocks, and the first exit there is, with nothing
    else pruned.

    Args:
        is_short: the middle target alone.
    """
    middle, *others = (_paper_setting(space, name, target, points=PAPER_POINTS) for target in _targets(space))
    exits = (round(space.depth * 10 / 12), space.exit_blocks[0])
    depths = [_paper_setting(space, name, 1.0, exit_block=exit_block) for exit_block in exits]
    return [middle] if is_short else [middle, *depths, *others]


def _targets(space: Space) -> list[float]:
    """Gives the target ratios at half, a quarter and three quarters of their range."""
    low, high = space.target_ratio
    return [low + part * (high - low) for part in (0.5, 0.25, 0.75)]


def _paper_setting(
    space: Space, name: Method, target_ratio: float, *, points: float = 0.0, exit_block: int | None = None
) -> Candidate:
    """Gives the nearest candidate within the space to VTC-LFC's cut-offs, with this target and these points."""
    return space.clip(
        Candidate(
            method=name,
            cutoff_channel=PAPER_CUTOFF_CHANNEL,
            cutoff_token=PAPER_CUTOFF_TOKEN,
            drop_budget=(points / space.depth,) * space.depth,
            token_share=PAPER_TOKEN_SHARE if METHODS[name].has_budgets else 0.5,
            target_ratio=target_ratio,
            exit_block=exit_block or space.depth,
        )
    )


def propose(context: TrialContext, space: Space) -> list[Candidate]:
    """Proposes candidates along the front that the dense model's profile predicts, all within the space.

    The middle targets come first. The largest target gets the last exit, the least one the first. `global` follows the
    profile by itself; the cascade gets VTC-LFC's 9.5 points, dealt to blocks and tokens as the profile's plan for that
    target pays there. Other methods get none, and none is proposed without a profile.
    """
    profile = context.profiles.get(space.token_reduction[0])
    if profile is None:
        return []
    proposals: list[Candidate] = []
    for step in ORDER:
        target_ratio, exit_block = _target_and_exit(space, step)
        truncated = examine(truncate(context.model, exit_block, context.exit_heads[exit_block]))
        dealt = _deal(profile, truncated, int(target_ratio * context.dense_macs))
        if dealt is None:
            continue
        points, token_share = dealt
        common: dict[str, Any] = {
            "target_ratio": target_ratio, "exit_block": exit_block, "token_reduction": space.token_reduction[0],
            "cutoff_channel": PAPER_CUTOFF_CHANNEL, "cutoff_token": PAPER_CUTOFF_TOKEN,
        }  # fmt: skip
        padded, zeros = (*points, *[0.0] * (space.depth - exit_block)), (0.0,) * space.depth
        for name in sorted(space.method, key=_rank):
            if METHODS[name].has_budgets:
                proposals.append(Candidate(method=name, drop_budget=padded, token_share=token_share, **common))
            elif METHODS[name].needs_profile:
                proposals.append(Candidate(method=name, drop_budget=zeros, token_share=0.5, **common))
    return list(dict.fromkeys(space.clip(candidate) for candidate in proposals))


def _target_and_exit(space: Space, step: int) -> tuple[float, int]:
    """Gives the target ratio of a step, 0 to NUM_TARGETS - 1, and the exit as far along the exits as the step."""
    (low, high), exits = space.target_ratio, space.exit_blocks
    target_ratio = low ** ((step + 1) / NUM_TARGETS) * high ** (1 - (step + 1) / NUM_TARGETS)
    return target_ratio, exits[round((1 - step / (NUM_TARGETS - 1)) * (len(exits) - 1))]


def _deal(profile: Profile, anatomy: Anatomy, target_macs: int) -> tuple[list[float], float] | None:
    """Deals the paper's points to blocks, and gives the share of them for tokens; None if no plan is so small."""
    try:
        plan = allocate(profile, anatomy, target_macs)
    except TargetError:  # most of the model is patch embedding and classifier
        return None
    costs = block_costs(profile, anatomy, plan)
    channel_cost, token_cost = (sum(part) for part in zip(*costs, strict=True))
    total = channel_cost + token_cost
    if total == 0:  # the exit alone is small enough
        return [0.0] * len(costs), 0.0
    return [PAPER_POINTS * sum(cost) / total for cost in costs], token_cost / total
