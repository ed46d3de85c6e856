"""The search space against choosers that take the lowest, the highest or any value."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pruning.plan import TOKEN_REDUCTIONS
from search.config import SpaceConfig
from search.errors import ConfigError
from search.outcome import Candidate
from search.parameter import Choice, Numbers
from search.space import Space
from search.trial.warm_start import SCHEDULE_TARGETS, first_candidates
from tests.search_tests.builders import papers_space

DEPTH = 12
SEARCHED = {"cutoff_channel", "cutoff_token", "token_share", "target_ratio"}
WIDE = papers_space(exit_block=(9, DEPTH))
NARROW = papers_space(
    cutoff_channel=(0.2, 0.3),
    cutoff_token=(0.1, 0.2),
    drop_budget=(1.0, 1.25),
    token_share=(0.7, 0.8),
    target_ratio=(0.5, 0.6),
    exit_block=(10, 11),
)
FIXED = papers_space(
    cutoff_channel=0.2, cutoff_token=0.3, drop_budget=1.0, token_share=0.4, target_ratio=0.5, exit_block=11
)
BOTH = papers_space(
    exit_block=(9, DEPTH),
    method=("cascade", "global"),
    criterion=("lfs", "taylor", "obs"),
    token_reduction=(*TOKEN_REDUCTIONS, "none"),
    round_to=(1, 8, "auto"),
)
GLOBAL = papers_space(
    exit_block=(9, DEPTH), method="global", criterion=("obs", "taylor"), token_reduction=("merge", "lfe"), round_to=8
)
WHOLE = papers_space(exit_block=(9, DEPTH), token_reduction="none", round_to="auto", token_share=(0.2, 0.4))
CONFIGS = [WIDE, NARROW, FIXED, BOTH, GLOBAL, WHOLE]
SWIN_EXITS = (2, 4, 10, 12)
"""The exits of a Swin, at the ends of its four stages."""


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
    """Checks the definition, field by field."""

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
    Space(papers_space(target_ratio=(0.5, 0.5), exit_block=(12, 12)), DEPTH).choose(chooser)
    assert {"target_ratio", "exit_block"}.isdisjoint(chooser.asked)
    assert chooser.asked.keys() >= SEARCHED - {"target_ratio"}


def test_without_exits_every_candidate_has_all_blocks() -> None:
    space = Space(papers_space(), DEPTH)
    assert list(space.exit_blocks) == [DEPTH]
    assert space.choose(Chooser()).exit_block == DEPTH


@pytest.mark.parametrize(("given", "exits"), [((9, 12), [9, 10, 11, 12]), ((1, 1), [1]), (12, [12])])
def test_exits_are_all_of_the_range(given: int | tuple[int, int], exits: list[int]) -> None:
    assert list(Space(papers_space(exit_block=given), DEPTH).exit_blocks) == exits


@pytest.mark.parametrize(("given", "wrong"), [(0, 0), (13, 13), ((0, 12), 0), ((9, 13), 13), (-1, -1)])
def test_exit_that_the_model_has_not_is_named_with_the_depth(given: int | tuple[int, int], wrong: int) -> None:
    expected = f"^space.exit_block: {wrong} is no exit of a model with 12 blocks; give 1 to 12$"
    with pytest.raises(ConfigError, match=expected):
        Space(papers_space(exit_block=given), DEPTH)


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
    assert chooser.asked["token_reduction"] == (*TOKEN_REDUCTIONS, "none")
    assert chooser.asked["round_to"] == (1, 8, "auto")


def test_every_choice_can_be_chosen() -> None:
    chosen = [Space(BOTH, DEPTH).choose(Chooser(seed=seed)) for seed in range(60)]
    assert {candidate.method for candidate in chosen} == {"cascade", "global"}
    assert {candidate.criterion for candidate in chosen} == {"lfs", "taylor", "obs"}
    assert {candidate.token_reduction for candidate in chosen} == {*TOKEN_REDUCTIONS, "none"}
    assert {candidate.round_to for candidate in chosen} == {1, 8, "auto"}


def test_list_of_one_choice_fixes_it() -> None:
    chooser = Chooser()
    config = papers_space(method=("global",), criterion=("obs",), token_reduction=("merge",), round_to=(8,))
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
        ({"method": "cascade", "criterion": "lfs", "token_reduction": "none"}, {"cutoff_token", "token_share"}),
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


def test_clip_of_a_rounding_that_is_not_allowed_takes_the_first() -> None:
    space = Space(BOTH.model_copy(update={"round_to": ("auto", 8)}), DEPTH)
    inside = space.choose(Chooser(0.5, round_to=8))
    assert space.clip(inside) == inside
    assert space.clip(replace(inside, round_to=1)).round_to == "auto"
    assert Space(WIDE, DEPTH).clip(replace(inside, round_to="auto")).round_to == 1


def test_candidates_without_a_token_reduction_differ_in_nothing_about_tokens() -> None:
    space = Space(BOTH.model_copy(update={"token_share": (0.3, 0.8)}), DEPTH)
    one, other = (space.choose(Chooser(part, token_reduction="none", method="global")) for part in (0.0, 1.0))
    assert (one.token_share, one.cutoff_token) == (other.token_share, other.cutoff_token) == (0.3, 0.85)
    reduced = space.choose(Chooser(1.0, token_reduction="lfe", method="global"))
    assert reduced.token_share == 0.8
    assert space.clip(replace(reduced, token_reduction="none")) == replace(
        reduced, token_reduction="none", token_share=0.3, cutoff_token=0.85
    )


@pytest.mark.parametrize(("has_windows", "kind"), [(False, "attention-merge"), (True, "none")])
def test_token_reduction_auto_is_the_best_that_the_model_can_have(has_windows: bool, kind: str) -> None:
    space = Space(papers_space(token_reduction="auto"), DEPTH, has_windows=has_windows)
    assert space.token_reduction == (kind,)
    assert {space.choose(Chooser(seed=seed)).token_reduction for seed in range(5)} == {kind}
    assert {candidate.token_reduction for candidate in first_candidates(space)} == {kind}


@pytest.mark.parametrize("given", [*TOKEN_REDUCTIONS, ("none", "merge"), ("lfe",)])
def test_token_reduction_of_a_model_with_windows_is_refused_by_its_name(given: Any) -> None:
    names = given if isinstance(given, str) else ", ".join(given)
    expected = f"^space.token_reduction: {names} cannot be done to this model: .*windows.*; give none or auto$"
    with pytest.raises(ConfigError, match=expected):
        Space(papers_space(token_reduction=given), DEPTH, has_windows=True)
    Space(papers_space(token_reduction=given), DEPTH)


@pytest.mark.parametrize("given", ["none", ("none",), "auto"])
def test_model_with_windows_keeps_its_tokens(given: Any) -> None:
    space = Space(papers_space(token_reduction=given, method=("cascade", "global")), DEPTH, has_windows=True)
    chooser = Chooser(0.5)
    assert space.choose(chooser).token_reduction == "none"
    assert {"token_reduction", "token_share", "cutoff_token"}.isdisjoint(chooser.asked)


def swin_space(exit_block: Any, **other: Any) -> Space:
    config = papers_space(exit_block=exit_block, token_reduction="none", **other)
    return Space(config, DEPTH, SWIN_EXITS, has_windows=True)


@pytest.mark.parametrize(
    ("given", "exits"),
    [((1, 12), [2, 4, 10, 12]), ((3, 11), [4, 10]), ((4, 10), [4, 10]), (None, [12]), (2, [2]), ((11, 12), [12])],
)
def test_exits_of_stages_are_those_within_the_range(given: Any, exits: list[int]) -> None:
    space = swin_space(given)
    assert space.exit_blocks == exits
    assert {space.choose(Chooser(seed=seed)).exit_block for seed in range(40)} == set(exits)


@pytest.mark.parametrize(("given", "shown"), [(3, "3"), ((5, 9), "(5, 9)"), ((11, 11), "(11, 11)")])
def test_range_without_an_exit_is_answered_with_those_there_are(given: Any, shown: str) -> None:
    expected = f"space.exit_block: {shown} has no exit; the model may answer after blocks 2, 4, 10, 12"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        swin_space(given)


def test_exits_with_gaps_are_a_choice_and_those_without_a_range() -> None:
    chooser = Chooser(1.0)
    assert swin_space((1, 12)).choose(chooser).exit_block == 12
    assert chooser.asked["exit_block"] == SWIN_EXITS
    chooser = Chooser(1.0)
    space = Space(papers_space(exit_block=(2, 5), token_reduction="none"), DEPTH, (1, 2, 3, 4, 12), has_windows=True)
    assert space.choose(chooser).exit_block == 4
    assert chooser.asked["exit_block"] == (2, 4)
    assert space.exit_blocks == [2, 3, 4]


def test_budgets_end_at_the_exit_of_the_stage() -> None:
    chooser = Chooser(0.5, exit_block=4)
    candidate = swin_space((1, 12)).choose(chooser)
    assert {name for name in chooser.asked if name.startswith("drop_budget.")} == {f"drop_budget.{b}" for b in range(4)}
    assert candidate.drop_budget[4:] == (0.0,) * 8
    assert chooser.asked.keys() == candidate.to_params().keys() - {"method", "criterion", "token_reduction", "round_to"}


@pytest.mark.parametrize(
    ("given", "nearest"), [(1, 2), (2, 2), (4, 4), (5, 4), (6, 4), (8, 10), (9, 10), (11, 10), (12, 12)]
)
def test_clip_of_an_exit_takes_the_nearest_that_there_is(given: int, nearest: int) -> None:
    space = swin_space((1, 12), method="global")
    inside = space.choose(Chooser(1.0))
    assert space.clip(replace(inside, exit_block=given)) == replace(inside, exit_block=nearest)


def test_clip_of_a_cascade_into_a_space_of_global_candidates_takes_its_budgets() -> None:
    cascade = Space(WIDE, DEPTH).choose(Chooser(0.5))
    clipped = Space(GLOBAL, DEPTH).clip(cascade)
    assert clipped == replace(
        cascade, method="global", criterion="obs", round_to=8, cutoff_channel=0.1, drop_budget=(0.0,) * DEPTH
    )


@pytest.mark.parametrize("method", ["constant", "decreasing"])
def test_a_schedule_is_asked_for_nothing_but_target_exit_and_reduction(method: Any) -> None:
    chooser = Chooser(seed=3, method=method, token_reduction="merge")
    config = BOTH.model_copy(update={"method": (method, "cascade"), "token_reduction": ("merge", "lfe")})
    candidate = Space(config, DEPTH).choose(chooser)
    assert set(chooser.asked) == {"method", "token_reduction", "exit_block", "target_ratio"}
    assert set(candidate.to_params()) == set(chooser.asked)
    assert candidate.drop_budget == (0.0,) * DEPTH


def test_a_schedule_has_first_candidates_and_needs_tokens_to_take() -> None:
    config = papers_space(method=("constant", "decreasing"), token_reduction="merge", target_ratio=(0.2, 1.0))
    first = first_candidates(Space(config, DEPTH))
    assert [candidate.method for candidate in first] == ["constant"] * 5 + ["decreasing"] * 4
    assert [candidate.target_ratio for candidate in first] == [1.0, *SCHEDULE_TARGETS, *SCHEDULE_TARGETS]
    with pytest.raises(ConfigError, match="a schedule takes tokens alone"):
        Space(config.model_copy(update={"token_reduction": ("none", "merge")}), DEPTH)
    with pytest.raises(ConfigError, match="a schedule takes tokens alone"):
        Space(config.model_copy(update={"token_reduction": "auto"}), DEPTH, SWIN_EXITS, has_windows=True)


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_are_all_that_a_chooser_may_be_asked_for(config: SpaceConfig) -> None:
    space = Space(config, DEPTH)
    asked: set[str] = set()
    for seed in range(200):
        chooser = Chooser(seed=seed)
        space.choose(chooser)
        asked |= chooser.asked.keys()
    assert space.parameters().keys() >= asked
    unreached = space.parameters().keys() - asked
    assert not unreached, "200 draws reach every parameter of these spaces"


@pytest.mark.parametrize("config", CONFIGS)
def test_values_of_a_candidate_give_it_back(config: SpaceConfig) -> None:
    space = Space(config, DEPTH)
    for seed in range(20):
        candidate = space.choose(Chooser(seed=seed))
        values = space.values_of(candidate)
        assert values.keys() == space.parameters().keys()
        assert space.of_values(values) == candidate


def test_what_has_no_effect_in_a_candidate_does_not_count() -> None:
    space = Space(BOTH, DEPTH)
    values = space.values_of(space.choose(Chooser(seed=1, method="global", token_reduction="none")))
    other = values | {"drop_budget.3": 1.75, "cutoff_channel": 0.03, "criterion": "obs", "token_share": 0.9}
    assert space.of_values(other) == space.of_values(values)


def test_exits_of_a_swin_are_a_choice_among_its_stages() -> None:
    space = Space(papers_space(exit_block=(3, 12), token_reduction="none"), DEPTH, SWIN_EXITS, has_windows=True)
    assert space.parameters()["exit_block"] == Choice(values=(4, 10, 12))
    assert space.parameters()["target_ratio"] == Numbers(low=0.2, high=1.0)
    assert space.parameters()["cutoff_channel"].is_log  # type: ignore[union-attr]


def test_snap_rounds_numbers_to_eighths_of_their_range_and_leaves_the_rest() -> None:
    space = Space(BOTH, DEPTH)
    values = space.values_of(space.choose(Chooser(0.9, method="cascade", criterion="lfs", token_reduction="lfe")))
    snapped = space.snap(values)
    kept = {"method", "criterion", "token_reduction", "round_to", "target_ratio", "exit_block"}
    assert {name for name in values if snapped[name] == values[name]} == kept
    for name, parameter in space.parameters().items():
        if isinstance(parameter, Numbers) and name not in kept:
            assert parameter.share(snapped[name]) * 8 == pytest.approx(round(parameter.share(values[name]) * 8))
    assert space.snap(snapped) == pytest.approx(snapped)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_grid_has_as_many_candidates_of_the_space_as_are_wanted_none_twice(count: int) -> None:
    space = Space(BOTH, DEPTH)
    candidates = space.full_grid(count, seed=0)
    assert len(candidates) == len(set(candidates)) == count
    assert all(space.holds(candidate) for candidate in candidates)
    assert space.full_grid(count, seed=0) == candidates
    assert count < 7 or space.full_grid(count, seed=1) != candidates


def test_grid_of_a_small_space_is_all_of_it_as_fine_as_the_count_allows() -> None:
    config = papers_space(method="global", token_reduction=("merge", "none"), target_ratio=(0.2, 1.0), token_share=0.5)
    candidates = Space(config, DEPTH).full_grid(11, seed=0)
    grid = {(candidate.token_reduction, round(candidate.target_ratio, 9)) for candidate in candidates}
    assert grid == {(reduction, target) for reduction in ("merge", "none") for target in (0.2, 0.4, 0.6, 0.8, 1.0)}


def test_points_of_a_grid_that_differ_in_what_has_no_effect_are_one_candidate() -> None:
    config = papers_space(method="global", token_reduction=("merge", "none"), target_ratio=0.5, token_share=(0.0, 1.0))
    candidates = Space(config, DEPTH).full_grid(4, seed=0)
    assert [candidate.token_reduction for candidate in candidates].count("none") == 1
    assert len(candidates) == 3
