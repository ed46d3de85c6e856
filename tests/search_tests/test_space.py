"""The search space against choosers that take the lowest, the highest or any value."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pruning.plan import TOKEN_REDUCTIONS
from search.config import SpaceConfig
from search.errors import ConfigError
from search.outcome import Candidate
from search.space import Space

DEPTH = 12
SEARCHED = {"cutoff_channel", "cutoff_token", "token_share", "target_ratio"}
WIDE = SpaceConfig(exit_block=(9, DEPTH))
NARROW = SpaceConfig(
    cutoff_channel=(0.2, 0.3),
    cutoff_token=(0.1, 0.2),
    drop_budget=(1.0, 1.25),
    token_share=(0.7, 0.8),
    target_ratio=(0.5, 0.6),
    exit_block=(10, 11),
)
FIXED = SpaceConfig(
    cutoff_channel=0.2, cutoff_token=0.3, drop_budget=1.0, token_share=0.4, target_ratio=0.5, exit_block=11
)
BOTH = SpaceConfig(
    exit_block=(9, DEPTH),
    method=("cascade", "global"),
    criterion=("lfs", "taylor", "obs"),
    token_reduction=TOKEN_REDUCTIONS,
    round_to=(1, 8),
)
GLOBAL = SpaceConfig(
    exit_block=(9, DEPTH), method="global", criterion=("obs", "taylor"), token_reduction=("merge", "lfe"), round_to=8
)
CONFIGS = [WIDE, NARROW, FIXED, BOTH, GLOBAL]


class Chooser:
    """Chooses the point `part` of every range, or a random one, and remembers what it was asked for."""

    def __init__(self, part: float | None = None, seed: int = 0, **choices: Any) -> None:
        """`choices` are the answers to what they name."""
        self.asked: dict[str, tuple[Any, ...]] = {}
        self._choices = choices
        self.on_log_scale: set[str] = set()
        self._part, self._random = part, random.Random(seed)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self._remember(name, low, high)
        if log:
            self.on_log_scale.add(name)
        return low + (high - low) * (self._random.random() if self._part is None else self._part)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self._remember(name, low, high)
        return self._random.randint(low, high) if self._part is None else low + round((high - low) * self._part)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        assert name not in self.asked, f"{name} was asked for twice"
        assert len(choices) > 1
        self.asked[name] = tuple(choices)
        if name in self._choices:
            return self._choices[name]
        return self._random.choice(choices) if self._part is None else choices[round((len(choices) - 1) * self._part)]

    def _remember(self, name: str, low: float, high: float) -> None:
        assert name not in self.asked, f"{name} was asked for twice"
        assert low < high
        self.asked[name] = (low, high)


def is_within(candidate: Candidate, config: SpaceConfig, depth: int = DEPTH) -> bool:
    """By the definition, field by field."""

    def fits(value: float, bounds: float | tuple[float, float]) -> bool:
        low, high = bounds if isinstance(bounds, tuple) else (bounds, bounds)
        return low <= value <= high

    def allows(choices: Any, value: Any) -> bool:
        return value in choices if isinstance(choices, tuple) else value == choices

    exit_block = candidate.exit_block
    num_budgets = exit_block if candidate.method == "cascade" else 0
    return (
        allows(config.method, candidate.method)
        and allows(config.criterion, candidate.criterion)
        and allows(config.token_reduction, candidate.token_reduction)
        and allows(config.round_to, candidate.round_to)
        and fits(exit_block, config.exit_block if config.exit_block is not None else depth)
        and fits(candidate.cutoff_channel, config.cutoff_channel)
        and fits(candidate.cutoff_token, config.cutoff_token)
        and fits(candidate.token_share, config.token_share)
        and fits(candidate.target_ratio, config.target_ratio)
        and all(fits(points, config.drop_budget) for points in candidate.drop_budget[:num_budgets])
        and candidate.drop_budget[num_budgets:] == (0.0,) * (depth - num_budgets)
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_chosen_candidate_lies_within_the_space(config: SpaceConfig) -> None:
    space = Space(config, DEPTH)
    parts = [0.0, 1.0, *[None] * 20]
    for seed, part in enumerate(parts):
        assert is_within(space.choose(Chooser(part, seed)), config)


def test_both_ends_of_every_range_can_be_chosen() -> None:
    space = Space(NARROW, DEPTH)
    assert space.choose(Chooser(0.0)) == Candidate(
        cutoff_channel=0.2,
        cutoff_token=0.1,
        drop_budget=(1.0,) * 10 + (0.0, 0.0),
        token_share=0.7,
        target_ratio=0.5,
        exit_block=10,
    )
    assert space.choose(Chooser(1.0)) == Candidate(
        cutoff_channel=0.3,
        cutoff_token=0.2,
        drop_budget=(1.25,) * 11 + (0.0,),
        token_share=0.8,
        target_ratio=0.6,
        exit_block=11,
    )


def test_every_parameter_is_asked_for_in_its_range() -> None:
    chooser = Chooser(0.0)
    Space(NARROW, DEPTH).choose(chooser)
    budgets = {f"drop_budget.{block}": (1.0, 1.25) for block in range(10)}
    assert chooser.asked == budgets | {
        "cutoff_channel": (0.2, 0.3),
        "cutoff_token": (0.1, 0.2),
        "token_share": (0.7, 0.8),
        "target_ratio": (0.5, 0.6),
        "exit_block": (10, 11),
    }
    assert chooser.on_log_scale == {"cutoff_channel"}


def test_budgets_past_the_exit_are_not_asked_for() -> None:
    chooser = Chooser(0.0)
    candidate = Space(WIDE, DEPTH).choose(chooser)
    assert candidate.exit_block == 9
    assert {name for name in chooser.asked if name.startswith("drop_budget.")} == {f"drop_budget.{b}" for b in range(9)}


def test_fixed_parameters_are_not_asked_for() -> None:
    chooser = Chooser()
    candidate = Space(FIXED, DEPTH).choose(chooser)
    assert chooser.asked == {}
    assert candidate == Candidate(
        cutoff_channel=0.2,
        cutoff_token=0.3,
        drop_budget=(1.0,) * 11 + (0.0,),
        token_share=0.4,
        target_ratio=0.5,
        exit_block=11,
    )


def test_range_of_equal_ends_is_fixed() -> None:
    chooser = Chooser()
    Space(SpaceConfig(target_ratio=(0.5, 0.5), exit_block=(12, 12)), DEPTH).choose(chooser)
    assert {"target_ratio", "exit_block"}.isdisjoint(chooser.asked)
    assert chooser.asked.keys() >= SEARCHED - {"target_ratio"}


def test_without_exits_every_candidate_has_all_blocks() -> None:
    space = Space(SpaceConfig(), DEPTH)
    assert list(space.exit_blocks) == [DEPTH]
    assert space.choose(Chooser()).exit_block == DEPTH


@pytest.mark.parametrize(("given", "exits"), [((9, 12), [9, 10, 11, 12]), ((1, 1), [1]), (12, [12])])
def test_exits_are_all_of_the_range(given: int | tuple[int, int], exits: list[int]) -> None:
    assert list(Space(SpaceConfig(exit_block=given), DEPTH).exit_blocks) == exits


@pytest.mark.parametrize(("given", "wrong"), [(0, 0), (13, 13), ((0, 12), 0), ((9, 13), 13), (-1, -1)])
def test_exit_that_the_model_has_not_is_named_with_the_depth(given: int | tuple[int, int], wrong: int) -> None:
    expected = f"^space.exit_block: {wrong} is no exit of a model with 12 blocks; give 1 to 12$"
    with pytest.raises(ConfigError, match=expected):
        Space(SpaceConfig(exit_block=given), DEPTH)


@pytest.mark.parametrize("config", CONFIGS)
def test_clip_leaves_what_is_within_alone(config: SpaceConfig) -> None:
    space = Space(config, DEPTH)
    for seed in range(10):
        candidate = space.choose(Chooser(seed=seed))
        assert space.clip(candidate) == candidate


@pytest.mark.parametrize("config", CONFIGS)
def test_clip_brings_anything_within(config: SpaceConfig) -> None:
    space = Space(config, DEPTH)
    everywhere = Space(BOTH.model_copy(update={"drop_budget": (0, 100), "exit_block": (1, DEPTH)}), DEPTH)
    for seed in range(20):
        assert is_within(space.clip(everywhere.choose(Chooser(seed=seed))), config)


def test_clip_moves_each_value_to_its_nearest_bound_and_no_other() -> None:
    space = Space(NARROW, DEPTH)
    inside = space.choose(Chooser(0.5))
    assert space.clip(replace(inside, cutoff_channel=0.9)) == replace(inside, cutoff_channel=0.3)
    assert space.clip(replace(inside, cutoff_token=0.05)) == replace(inside, cutoff_token=0.1)
    assert space.clip(replace(inside, token_share=1.0)) == replace(inside, token_share=0.8)
    assert space.clip(replace(inside, target_ratio=0.1)) == replace(inside, target_ratio=0.5)
    budgets = (0.0, 9.0, *inside.drop_budget[2:])
    clipped = space.clip(replace(inside, drop_budget=budgets))
    assert clipped == replace(inside, drop_budget=(1.0, 1.25, *inside.drop_budget[2:]))


def test_every_choice_is_asked_for_with_its_values() -> None:
    chooser = Chooser(0.0)
    Space(BOTH, DEPTH).choose(chooser)
    assert chooser.asked["method"] == ("cascade", "global")
    assert chooser.asked["criterion"] == ("lfs", "taylor", "obs")
    assert chooser.asked["token_reduction"] == TOKEN_REDUCTIONS
    assert chooser.asked["round_to"] == (1, 8)


def test_every_choice_can_be_chosen() -> None:
    chosen = [Space(BOTH, DEPTH).choose(Chooser(seed=seed)) for seed in range(60)]
    assert {each.method for each in chosen} == {"cascade", "global"}
    assert {each.criterion for each in chosen} == {"lfs", "taylor", "obs"}
    assert {each.token_reduction for each in chosen} == set(TOKEN_REDUCTIONS)
    assert {each.round_to for each in chosen} == {1, 8}


def test_list_of_one_choice_fixes_it() -> None:
    chooser = Chooser()
    config = SpaceConfig(method=("global",), criterion=("obs",), token_reduction=("merge",), round_to=(8,))
    candidate = Space(config, DEPTH).choose(chooser)
    assert chooser.asked.keys() == {"token_share", "target_ratio"}
    assert (candidate.method, candidate.token_reduction, candidate.round_to) == ("global", "merge", 8)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_asked_for_is_what_has_an_effect(seed: int) -> None:
    chooser = Chooser(seed=seed)
    candidate = Space(BOTH, DEPTH).choose(chooser)
    assert chooser.asked.keys() == candidate.to_params().keys()


@pytest.mark.parametrize(
    ("choices", "not_asked"),
    [
        ({"method": "cascade", "criterion": "lfs", "token_reduction": "lfe-merge"}, set()),
        ({"method": "cascade", "criterion": "obs", "token_reduction": "lfe"}, {"cutoff_channel"}),
        ({"method": "cascade", "criterion": "lfs", "token_reduction": "merge"}, {"cutoff_token"}),
        (
            {"method": "global", "token_reduction": "lfe"},
            {"criterion", "cutoff_channel", *(f"drop_budget.{block}" for block in range(9))},
        ),
    ],
)
def test_what_has_no_effect_under_a_choice_is_not_asked_for(choices: dict[str, Any], not_asked: set[str]) -> None:
    everything = {f"drop_budget.{block}" for block in range(9)} | SEARCHED
    everything |= {"exit_block", "method", "criterion", "token_reduction", "round_to"}
    chooser = Chooser(0.0, **choices)
    Space(BOTH, DEPTH).choose(chooser)
    assert chooser.asked.keys() == everything - not_asked


def test_what_has_no_effect_is_the_papers_value_or_the_nearest_to_it_in_the_space() -> None:
    candidate = Space(BOTH, DEPTH).choose(Chooser(method="global", token_reduction="merge"))
    assert (candidate.cutoff_channel, candidate.cutoff_token, candidate.criterion) == (0.1, 0.85, "lfs")
    assert candidate.drop_budget == (0.0,) * DEPTH
    narrow = NARROW.model_copy(
        update={"method": "global", "token_reduction": "attention", "criterion": ("obs", "taylor")}
    )
    candidate = Space(narrow, DEPTH).choose(Chooser())
    assert (candidate.cutoff_channel, candidate.cutoff_token, candidate.criterion) == (0.2, 0.2, "obs")
    assert candidate.drop_budget == (0.0,) * DEPTH


def test_clip_makes_candidates_that_do_the_same_equal() -> None:
    space = Space(BOTH, DEPTH)
    one = space.choose(Chooser(seed=1, method="global", token_reduction="merge"))
    noise = replace(one, criterion="obs", cutoff_channel=0.3, cutoff_token=0.4, drop_budget=(1.0,) * DEPTH)
    assert noise.to_params() == one.to_params()
    assert space.clip(noise) == one
    assert space.clip(replace(one, token_share=one.token_share / 2)) != one


def test_clip_keeps_a_choice_that_is_allowed_and_else_takes_the_first() -> None:
    config = BOTH.model_copy(update={"criterion": ("obs", "lfs"), "token_reduction": ("merge", "lfe")})
    space = Space(config.model_copy(update={"round_to": (8, 4)}), DEPTH)
    inside = space.choose(Chooser(0.5, method="cascade", criterion="lfs", token_reduction="lfe", round_to=4))
    assert (inside.criterion, inside.token_reduction, inside.round_to) == ("lfs", "lfe", 4)
    assert space.clip(inside) == inside
    assert space.clip(replace(inside, round_to=5)) == replace(inside, round_to=8)
    assert space.clip(replace(inside, criterion="taylor")) == replace(inside, criterion="obs", cutoff_channel=0.1)
    assert space.clip(replace(inside, token_reduction="attention")) == replace(
        inside, token_reduction="merge", cutoff_token=0.85
    )


def test_clip_of_a_cascade_into_a_space_of_global_candidates_takes_its_budgets() -> None:
    cascade = Space(WIDE, DEPTH).choose(Chooser(0.5))
    clipped = Space(GLOBAL, DEPTH).clip(cascade)
    assert clipped == replace(
        cascade, method="global", criterion="obs", round_to=8, cutoff_channel=0.1, drop_budget=(0.0,) * DEPTH
    )


def test_dense_model_is_tried_first_then_the_papers_settings() -> None:
    first, paper, *others = Space(WIDE, DEPTH).first_candidates()
    assert (first.target_ratio, first.drop_budget, first.exit_block) == (1.0, (0.0,) * DEPTH, DEPTH)
    assert (paper.cutoff_channel, paper.cutoff_token, paper.token_share) == (0.1, 0.85, 0.56)
    assert sum(paper.drop_budget) == pytest.approx(9.5)
    assert paper.target_ratio == pytest.approx(0.6)
    assert any((each.exit_block, each.target_ratio, set(each.drop_budget)) == (10, 1.0, {0.0}) for each in others)
    assert {round(each.target_ratio, 9) for each in (paper, *others) if any(each.drop_budget)} == {0.4, 0.6, 0.8}


def test_where_both_methods_are_searched_global_candidates_come_after_those_of_the_cascade() -> None:
    candidates = Space(BOTH, DEPTH).first_candidates()
    cascade = Space(WIDE, DEPTH).first_candidates()
    assert candidates[: len(cascade)] == cascade
    others = candidates[len(cascade) :]
    assert [round(each.target_ratio, 9) for each in others] == [0.6, 0.4, 0.8]
    assert {(each.method, each.token_share, each.exit_block) for each in others} == {("global", 0.5, DEPTH)}


def test_where_all_is_global_the_dense_model_and_three_targets_are_tried_first() -> None:
    candidates = Space(GLOBAL, DEPTH).first_candidates()
    assert [round(each.target_ratio, 9) for each in candidates] == [1.0, 0.6, 0.4, 0.8]
    assert {(each.method, each.token_share, each.exit_block, each.round_to) for each in candidates} == {
        ("global", 0.5, DEPTH, 8)
    }


@pytest.mark.parametrize("config", [*CONFIGS, SpaceConfig(), SpaceConfig(exit_block=1), SpaceConfig(method="global")])
def test_first_candidates_lie_within_the_space_none_twice(config: SpaceConfig) -> None:
    candidates = Space(config, DEPTH).first_candidates()
    assert candidates
    assert all(is_within(candidate, config) for candidate in candidates)
    assert len(set(candidates)) == len(candidates)


def test_where_all_is_fixed_there_is_one_candidate() -> None:
    assert len(Space(FIXED, DEPTH).first_candidates()) == 1


def test_space_of_one_block_has_candidates_too() -> None:
    config = SpaceConfig(exit_block=1)
    assert all(is_within(candidate, config, depth=1) for candidate in Space(config, 1).first_candidates())
