"""The first candidates of a search: the dense model, what a profile proposes, and the papers' settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pruning.methods.allocation import allocate
from pruning.methods.profile import block_costs
from pruning.model.anatomy import examine
from search.config import Config, SpaceConfig
from search.outcome import Candidate
from search.space import Space
from search.trial.context import TrialContext
from search.trial.prepare import steps_for
from search.trial.warm_start import (
    GLOBAL_TOKEN_SHARE,
    NUM_FEW,
    SCHEDULE_TARGETS,
    SHARES,
    early_candidates,
    first_candidates,
    propose,
)
from tests.search_tests import tiny
from tests.search_tests.builders import papers_space
from tests.search_tests.test_space import BOTH, CONFIGS, DEPTH, FIXED, GLOBAL, WIDE, is_within, swin_space
from tests.search_tests.trial import trials

# By the papers


@pytest.mark.parametrize("method", ["cascade", "global", ("cascade", "global")])
def test_first_candidates_of_a_swin_answer_after_its_stages(method: Any) -> None:
    space = swin_space((1, 12), method=method, round_to="auto")
    candidates = first_candidates(space)
    assert len(set(candidates)) == len(candidates)
    assert {candidate.exit_block for candidate in candidates} == (
        {2, 10, 12} if method == "cascade" else {2, 4, 10, 12}
    )
    assert {(candidate.token_reduction, candidate.round_to) for candidate in candidates} == {("none", "auto")}
    assert all(space.clip(candidate) == candidate for candidate in candidates)
    assert candidates[0].target_ratio == 1.0


def test_dense_model_is_tried_first_then_the_papers_settings() -> None:
    first, paper, *others = first_candidates(Space(WIDE, DEPTH))
    assert (first.target_ratio, first.drop_budget, first.exit_block) == (1.0, (0.0,) * DEPTH, DEPTH)
    assert (paper.cutoff_channel, paper.cutoff_token, paper.token_share) == (0.1, 0.85, 0.56)
    assert sum(paper.drop_budget) == pytest.approx(9.5)
    assert paper.target_ratio == pytest.approx(0.6)
    assert any(
        (candidate.exit_block, candidate.target_ratio, set(candidate.drop_budget)) == (10, 1.0, {0.0})
        for candidate in others
    )
    assert {round(candidate.target_ratio, 9) for candidate in (paper, *others) if any(candidate.drop_budget)} == {
        0.4,
        0.6,
        0.8,
    }


def shares_of(candidates: list[Candidate], low: float, high: float = 1.0) -> list[float]:
    """Places of targets on the way from the largest to the least, by their logarithm."""
    return [round(math.log(candidate.target_ratio / high) / math.log(low / high), 6) for candidate in candidates]


def test_where_both_methods_are_searched_cheap_global_candidates_come_before_those_of_the_cascade() -> None:
    dense, *candidates = first_candidates(Space(BOTH, DEPTH))
    assert dense.method == "cascade"  # it needs no profile
    assert [candidate.method for candidate in candidates[: len(SHARES)]] == ["global"] * len(SHARES)
    assert [dense, *candidates[len(SHARES) :]] == first_candidates(Space(WIDE, DEPTH))


def test_targets_span_the_range_first_and_halve_its_gaps_then() -> None:
    dense, *candidates = first_candidates(Space(GLOBAL, DEPTH))
    low, high = GLOBAL.target_ratio if isinstance(GLOBAL.target_ratio, tuple) else (0.2, 1.0)
    assert dense.target_ratio == 1.0
    shares = shares_of(candidates, low, high)
    assert shares == [0.5, 1.0, 0.75, 0.25, 0.875, 0.625, 0.375, 0.125] == list(SHARES)
    assert {(candidate.method, candidate.token_share, candidate.round_to) for candidate in candidates} == {
        ("global", GLOBAL_TOKEN_SHARE, 8)
    }


def test_schedules_get_targets_of_their_own_and_the_dense_model_which_need_no_profile() -> None:
    config = papers_space(
        method=("cascade", "global", "constant", "decreasing"), token_reduction="merge", target_ratio=(0.25, 1.0),
        exit_block=(9, DEPTH),
    )  # fmt: skip
    candidates = first_candidates(Space(config, DEPTH))
    assert (candidates[0].method, candidates[0].target_ratio) == ("constant", 1.0)
    methods = list(dict.fromkeys(candidate.method for candidate in candidates[1:]))
    assert methods == ["global", "constant", "decreasing", "cascade"]
    for schedule in ("constant", "decreasing"):
        of_schedule = [candidate for candidate in candidates[1:] if candidate.method == schedule]
        assert [candidate.target_ratio for candidate in of_schedule] == list(SCHEDULE_TARGETS)
        assert {candidate.exit_block for candidate in of_schedule} == {DEPTH}


def test_early_candidates_need_no_profile_and_no_widths() -> None:
    config = papers_space(
        method=("global", "constant", "decreasing"), token_reduction="merge", round_to="auto", exit_block=(9, DEPTH)
    )
    space = Space(config, DEPTH)
    early = early_candidates(space)
    assert [(one.method, one.target_ratio, one.exit_block) for one in early] == [
        ("constant", 1.0, DEPTH),
        *(("constant", target, DEPTH) for target in SCHEDULE_TARGETS),
        *(("constant", 1.0, block) for block in (11, 10, 9)),
    ]
    kinds = {step.kind for candidate in early for step in steps_for(candidate, space)}
    assert kinds == {"sensitivity", "exits"}
    assert steps_for(early[0], space) == []


@pytest.mark.parametrize(("space", "count"), [({"method": "learned"}, 0), ({"target_ratio": (0.2, 0.5)}, 0)])
def test_without_the_dense_model_in_the_space_nothing_comes_early(space: dict[str, Any], count: int) -> None:
    assert len(early_candidates(Space(papers_space(**space), DEPTH))) == count


def test_earlier_exits_go_with_smaller_targets() -> None:
    _, *candidates = first_candidates(Space(papers_space(method="global", exit_block=(9, 12)), 12))
    # From the last eighth to the least.
    exits = {share: candidate.exit_block for share, candidate in zip(SHARES, candidates, strict=True)}
    assert [exits[share] for share in sorted(SHARES)] == [
        12, 12, 11, 11, 11, 10, 9, 9
    ]  # fmt: skip


@pytest.mark.parametrize(
    "config", [*CONFIGS, papers_space(), papers_space(exit_block=1), papers_space(method="global")]
)
def test_first_candidates_lie_within_the_space_none_twice(config: SpaceConfig) -> None:
    candidates = first_candidates(Space(config, DEPTH))
    assert candidates
    assert all(is_within(candidate, config) for candidate in candidates)
    assert len(set(candidates)) == len(candidates)


def test_where_all_is_fixed_there_is_one_candidate() -> None:
    assert len(first_candidates(Space(FIXED, DEPTH))) == 1


def test_space_of_one_block_has_candidates_too() -> None:
    config = papers_space(exit_block=1)
    assert all(is_within(candidate, config, depth=1) for candidate in first_candidates(Space(config, 1)))


# By a profile


def config(**space: Any) -> Config:
    return tiny.config(space={"exit_block": [2, 3], "token_reduction": "lfe"} | space)


def space_of(config: Config, **other: Any) -> Space:
    return Space(config.space, tiny.DEPTH, **other)


def test_proposals_lie_along_the_front_and_within_the_space(context: TrialContext) -> None:
    space = space_of(config(method=["cascade", "global"]))
    proposed = propose(context, space)
    assert all(space.holds(candidate) for candidate in proposed)
    assert len(set(proposed)) == len(proposed)
    for method, count in (("cascade", NUM_FEW), ("global", len(SHARES))):
        of_method = [candidate for candidate in proposed if candidate.method == method]
        assert shares_of(of_method, 0.2) == list(SHARES[:count])
        of_method.sort(key=lambda candidate: -candidate.target_ratio)
        exits = [candidate.exit_block for candidate in of_method]
        assert exits == sorted(exits, reverse=True)
        assert set(exits) == {2, 3}


def test_what_is_proposed_for_global_is_what_comes_first_without_a_profile(context: TrialContext) -> None:
    space = space_of(config(method="global"))
    assert first_candidates(space, propose(context, space)) == first_candidates(space)


def test_budgets_are_dealt_as_the_profile_pays(context: TrialContext) -> None:
    space = space_of(config(exit_block=3, drop_budget=[0.0, 100.0]))
    profile, anatomy = context.profiles["lfe"], examine(context.model)
    for candidate in propose(context, space):
        plan = allocate(profile, anatomy, int(candidate.target_ratio * context.dense_macs))
        costs = block_costs(profile, anatomy, plan)
        total = sum(map(sum, costs))
        assert total > 0
        assert candidate.drop_budget == pytest.approx([9.5 * sum(cost) / total for cost in costs])
        assert candidate.token_share == pytest.approx(sum(tokens for _, tokens in costs) / total)


def test_no_profile_and_targets_that_nothing_reaches_propose_nothing(context: TrialContext) -> None:
    assert propose(trials.with_known(context, profiles={}), space_of(config())) == []
    assert propose(context, space_of(config(target_ratio=0.001))) == []


def test_first_candidates_are_the_dense_model_then_what_is_proposed(context: TrialContext) -> None:
    space = space_of(config())
    proposed = propose(context, space)
    dense, *later = first_candidates(space, proposed)
    assert (dense.target_ratio, dense.exit_block) == (1.0, 3)
    assert later[: len(proposed)] == proposed
    assert len(later) == len(proposed) + 1  # and the paper's


# Recorded


RECORDED = json.loads((Path(__file__).parents[2] / "data" / "first_candidates.json").read_text())
"""The first candidates of a search, recorded when `global` came first, with eight targets: a list of candidates, then
for each combination, with and without proposals, the places in that list."""
RECORDED_DEPTH = 6


def recorded_space(methods: list[str]) -> Space:
    config = papers_space(
        method=tuple(methods), token_reduction=("merge", "lfe"), exit_block=(2, RECORDED_DEPTH),
        recovery=("none", "distill"),
    )  # fmt: skip
    return Space(config, RECORDED_DEPTH)


def some_proposals(space: Space) -> list[Candidate]:
    """Three of the cascade and three of global, in turn, as far as the space has these methods."""
    proposals = []
    for step in range(3):
        common: dict[str, Any] = {
            "target_ratio": 0.3 + 0.2 * step, "exit_block": 3 + step, "token_reduction": "merge",
            "cutoff_channel": 0.1, "cutoff_token": 0.85,
        }  # fmt: skip
        budgets, zeros = (1.5,) * RECORDED_DEPTH, (0.0,) * RECORDED_DEPTH
        proposals += [
            Candidate(method="cascade", drop_budget=budgets, token_share=0.25 * step, **common),
            Candidate(method="global", drop_budget=zeros, token_share=0.5, **common),
        ]
    return [space.clip(candidate) for candidate in proposals if candidate.method in space.method]


def test_first_candidates_of_every_combination_of_methods_are_those_recorded() -> None:
    for name, places in RECORDED["first"].items():
        methods = name.removesuffix(" proposed").split()
        space = recorded_space(methods)
        proposed = some_proposals(space) if name.endswith(" proposed") else []
        expected = [Candidate.from_json(RECORDED["candidates"][place]) for place in places]
        assert first_candidates(space, proposed) == expected, name
