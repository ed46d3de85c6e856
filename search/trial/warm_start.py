"""Where a search begins: candidates along the front that the profile of the dense model predicts."""

from __future__ import annotations

from pruning.errors import TargetError
from pruning.methods.allocation import allocate
from pruning.methods.profile import Profile, block_costs
from pruning.model.anatomy import Anatomy, examine
from pruning.model.exits import truncate
from search.outcome import Candidate
from search.space import PAPER_CUTOFF_CHANNEL, PAPER_CUTOFF_TOKEN, PAPER_POINTS, Space
from search.trial.context import TrialContext

NUM_TARGETS = 4
"""From the least on, each as many times the one before: even in the speed-up that they promise."""

ORDER = (2, 1, 3, 0)
"""Of the targets, the largest is 0: from the middle on, so that a short search sees it."""


def propose(context: TrialContext, space: Space) -> list[Candidate]:
    """Candidates of the methods `cascade` and `global`, all within the space, those in the middle first.

    The largest target gets the last exit, the least one the first. `global` follows the profile by itself; the cascade
    gets VTC-LFC's 9.5 points, dealt to blocks and tokens as the profile's plan for that target pays there.
    """
    profile, found = context.profiles.get(space.token_reduction[0]), list[Candidate]()
    if profile is None:
        return found
    low, high = space.target_ratio
    for step in ORDER:
        target_ratio = low ** ((step + 1) / NUM_TARGETS) * high ** (1 - (step + 1) / NUM_TARGETS)
        exit_block = space.exit_blocks[round((1 - step / (NUM_TARGETS - 1)) * (len(space.exit_blocks) - 1))]
        shorter = examine(truncate(context.model, exit_block, context.exit_heads[exit_block]))
        dealt = _deal(profile, shorter, int(target_ratio * context.dense_macs))
        if dealt is None:
            continue
        budgets, tokens = dealt
        common = {"target_ratio": target_ratio, "exit_block": exit_block, "token_reduction": space.token_reduction[0]}
        common |= {"cutoff_channel": PAPER_CUTOFF_CHANNEL, "cutoff_token": PAPER_CUTOFF_TOKEN}
        padded = (*budgets, *[0.0] * (space.depth - exit_block))
        if "cascade" in space.method:
            found.append(Candidate(method="cascade", drop_budget=padded, token_share=tokens, **common))
        if "global" in space.method:
            found.append(Candidate(method="global", drop_budget=(0.0,) * space.depth, token_share=0.5, **common))
    return list(dict.fromkeys(space.clip(candidate) for candidate in found))


def _deal(profile: Profile, anatomy: Anatomy, target_macs: int) -> tuple[list[float], float] | None:
    """Points for each block, and the share of them for tokens; None if no plan is so small."""
    try:
        plan = allocate(profile, anatomy, target_macs)
    except TargetError:  # most of the model is patch embedding and classifier
        return None
    costs = block_costs(profile, anatomy, plan)
    of_channels, of_tokens = (sum(each) for each in zip(*costs, strict=True))
    total = of_channels + of_tokens
    if total == 0:  # the exit alone is small enough
        return [0.0] * len(costs), 0.0
    return [PAPER_POINTS * sum(cost) / total for cost in costs], of_tokens / total
