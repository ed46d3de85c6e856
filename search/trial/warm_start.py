"""The first candidates of a search: the dense model, then what a profile proposes, or else the papers' settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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

SHARES = (1 / 2, 1.0, 3 / 4, 1 / 4, 7 / 8, 5 / 8, 3 / 8, 1 / 8)
"""The places of the first targets, in their order, on the way from the largest (0) to the least (1) by their logarithm,
so that they are even in speed-up. The middle and the least span most of the front, the others halve the gaps. Share of
the hypervolume of all targets that the first 2, 4, 8 find, for `global` on digits and on a ViT-Tiny: 0.97, 0.98, 0.99
and 0.71, 0.86, 0.93. Tried and lost: four at 3/4, 1/2, 1, 1/4, which end at 0.98 and 0.86 and have 0.58 and 0.63 after
two; half, a quarter and three quarters of the range, which end at 0.38 and 0.41."""

GLOBAL_TOKEN_SHARE = 0.4
"""The weight of tokens against channels in the proposals for `global`: 0.35 and 0.5 diverge alike from the dense
ViT-Tiny at 0.57 to 0.30 of the MACs (384 training images), 0.65 by a quarter more."""

NUM_FEW = 4
"""The number of these targets for a method that has budgets, whose trials take many times as long as others."""

SCHEDULE_TARGETS = (0.6, 0.47, 0.75, 0.53)
"""The first targets of a schedule, in their order: with tokens alone, hardly any accuracy is left below."""

BETWEEN_TARGETS = (0.67, 0.85, 0.42)
"""The next targets of a schedule."""


def first_candidates(space: Space, proposed: Sequence[Candidate] = ()) -> list[Candidate]:
    """Gives the candidates that a search begins with, all within the space, none twice.

    The dense model comes first, where a method of the space can leave it as it is. Then come, method by method, the
    candidates that were proposed for it or its first targets, and the papers' settings: `global` first, whose trials
    are cheap and good, then the schedules, then the cascade, then methods that train.

    Args:
        proposed: candidates of `propose`. They take the place of all of VTC-LFC's settings but the middle target, and
            of all targets of `global`.
    """
    first = _dense(space)
    for name in sorted(space.method, key=_rank):
        method = METHODS[name]
        proposals = [candidate for candidate in proposed if candidate.method == name]
        if method.has_budgets:
            first += proposals + _vtc_lfc(space, name, is_short=bool(proposed))
        elif method.needs_profile and proposals:
            first += proposals
        elif method.repairs:
            steps = [_target_and_exit(space, share) for share in _shares(name)]
            if method.is_schedule:
                steps = [(target, space.depth) for target in SCHEDULE_TARGETS]
            first += [_paper_setting(space, name, target, exit_block=exit_block) for target, exit_block in steps]
        else:
            targets = _targets(space)[: None if method.serves_every_exit else 1]
            first += [_paper_setting(space, name, target) for target in targets]
    return list(dict.fromkeys(first))


def early_candidates(space: Space) -> list[Candidate]:
    """Gives the candidates that need no profile and no widths of the dense model, all within the space, none twice.

    The dense model comes first; then a schedule of tokens at a few targets, which is the whole front of ToMe; then the
    exits with nothing else pruned.
    """
    early = [*_dense(space), *_scheduled(space, SCHEDULE_TARGETS)]
    early += [replace(dense, exit_block=block) for dense in early[:1] for block in reversed(space.exit_blocks)]
    return list(dict.fromkeys(early))


def candidates_between(space: Space) -> list[Candidate]:
    """Gives candidates for slots that have nothing else to do while others prepare: more targets of the schedule."""
    return list(dict.fromkeys(_scheduled(space, BETWEEN_TARGETS)))


def _scheduled(space: Space, targets: Sequence[float]) -> list[Candidate]:
    """Gives the first schedule of the space at these targets; nothing where it has none."""
    schedules = [name for name in space.method if METHODS[name].is_schedule]
    return [_paper_setting(space, name, target) for name in schedules[:1] for target in targets]


def _dense(space: Space) -> list[Candidate]:
    """Gives the dense model, by the method that needs least for it; none if every method changes it."""
    names = [name for name in space.method if METHODS[name].repairs]
    names.sort(key=lambda name: (METHODS[name].needs_profile, METHODS[name].has_budgets))
    whole = [_paper_setting(space, name, 1.0) for name in names]
    return [candidate for candidate in whole if candidate.target_ratio == 1][:1]


def _rank(name: Method) -> int:
    """Ranks a method by what its trials cost; those of equal rank stay in the recipe's order."""
    method = METHODS[name]
    return 3 if method.trains else 2 if method.has_budgets else 0 if method.needs_profile else 1


def _shares(name: Method) -> tuple[float, ...]:
    """Gives the places of a method's first targets."""
    return SHARES if METHODS[name].needs_profile else SHARES[:NUM_FEW]


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
            token_share=PAPER_TOKEN_SHARE if METHODS[name].has_budgets else GLOBAL_TOKEN_SHARE,
            target_ratio=target_ratio,
            exit_block=exit_block or space.depth,
        )
    )


def propose(context: TrialContext, space: Space) -> list[Candidate]:
    """Proposes candidates along the front that the dense model's profile predicts, all within the space.

    They are in the order of `SHARES`. The largest target gets the last exit, the least the first. `global` follows the
    profile by itself; the cascade gets VTC-LFC's 9.5 points, dealt to blocks and tokens as the profile's plan for that
    target pays there. Other methods get none, and none is proposed without a profile.
    """
    profile = context.profiles.get(space.token_reduction[0])
    if profile is None:
        return []
    proposals: list[Candidate] = []
    for share in SHARES:
        target_ratio, exit_block = _target_and_exit(space, share)
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
            if share not in _shares(name):
                continue
            if METHODS[name].has_budgets:
                proposals.append(Candidate(method=name, drop_budget=padded, token_share=token_share, **common))
            elif METHODS[name].needs_profile:
                proposals.append(Candidate(method=name, drop_budget=zeros, token_share=GLOBAL_TOKEN_SHARE, **common))
    return list(dict.fromkeys(space.clip(candidate) for candidate in proposals))


def _target_and_exit(space: Space, share: float) -> tuple[float, int]:
    """Gives the target ratio at a place of `SHARES`, and an exit: the last up to a quarter of the way, then earlier."""
    (low, high), exits = space.target_ratio, space.exit_blocks
    earlier = max(0.0, (share - 1 / 4) / (3 / 4))
    return low**share * high ** (1 - share), exits[round((1 - earlier) * (len(exits) - 1))]


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
