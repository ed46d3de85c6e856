"""Asking and telling: what is suggested first, what comes again, what a resumed search knows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from optuna.trial import TrialState

from search.method import Method
from search.outcome import Candidate, Outcome, State
from search.space import Space
from search.suggest.ask import CandidateSearch, History
from search.suggest.samplers import DISCARDED, Sampler, SamplerSettings
from search.suggest.surrogate import Surrogate
from tests.search_tests.builders import papers_space
from tests.search_tests.suggest.searches import (
    CHOICES,
    FIRST,
    SPACE,
    SWIN,
    ask,
    ask_many,
    candidates_of,
    failed,
    first_candidates,
    measured,
    new_search,
    tell,
)

FINISHED = {TrialState.COMPLETE, TrialState.FAIL}


def told_states(search: CandidateSearch) -> list[TrialState]:
    """States of the trials that the sampler knows; a candidate that was given to it is known once it has ended."""
    return [trial.state for trial in search.learner.study.trials]


def told_candidates(search: CandidateSearch, space: Space = SPACE) -> list[Candidate]:
    """Candidates of the trials that the sampler knows: the first are as they are, the sampler's on the grid."""
    exact = [space.of_values(trial.params) for trial in search.learner.study.trials]
    snapped = [space.of_values(space.snap(trial.params)) for trial in search.learner.study.trials]
    first = first_candidates(space)
    return [one if one in first else other for one, other in zip(exact, snapped, strict=True)]


def test_first_candidates_are_suggested_first_in_their_order_and_once() -> None:
    suggested = candidates_of(ask_many(new_search(), 20))
    assert suggested[: len(FIRST)] == FIRST
    assert suggested[0].drop_budget == (0.0, 0.0, 0.0)
    assert suggested[0].target_ratio == 1.0
    assert all(suggested.count(candidate) == 1 for candidate in FIRST)


def test_other_first_candidates_may_be_given_or_none() -> None:
    drawn = candidates_of(ask_many(new_search(sampler="random"), len(FIRST) + 3))[-3:]
    assert candidates_of(ask_many(new_search(first_candidates=drawn), 3)) == drawn
    assert candidates_of(ask_many(new_search(sampler="random", first_candidates=()), 3)) == drawn


def test_ids_count_the_suggestions() -> None:
    suggestions = ask_many(new_search(), 3)
    assert [suggestion.id for suggestion in suggestions] == ["t000", "t001", "t002"]
    assert not any(suggestion.is_resumed for suggestion in suggestions)


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "random"])
def test_suggestions_lie_within_the_space_and_are_all_different(sampler: Sampler) -> None:
    search, seen = new_search(sampler=sampler), set[Candidate]()
    for _ in range(15):
        suggestion = ask(search)
        ratio = suggestion.candidate.target_ratio
        assert SPACE.clip(suggestion.candidate) == suggestion.candidate
        seen.add(suggestion.candidate)
        tell(search, suggestion, top1=ratio, speedup=1 / ratio)
    assert len(seen) == 15


def test_same_seed_gives_the_same_suggestions_and_another_gives_others() -> None:
    one, same, other = (candidates_of(ask_many(new_search(seed=seed), 12)) for seed in (3, 3, 4))
    assert one == same
    assert one[: len(FIRST)] == other[: len(FIRST)]
    assert set(one[len(FIRST) :]).isdisjoint(other[len(FIRST) :])


def test_trials_end_in_any_order_each_with_its_own_values() -> None:
    search = new_search()
    suggestions = ask_many(search, 4)
    for number in (2, 0, 3, 1):
        tell(search, suggestions[number], top1=number / 10)
    values = [trial.values[0] for trial in search.learner.study.trials]
    top1_of = dict(zip(told_candidates(search), values, strict=True))
    assert [top1_of[suggestion.candidate] for suggestion in suggestions] == [0.0, 0.1, 0.2, 0.3]


def test_drawn_trial_that_breaks_is_told_as_failed_while_another_runs() -> None:
    search = new_search()
    broken, _ = ask_many(search, len(FIRST) + 2)[len(FIRST) :]
    search.tell(broken.id, None)
    assert told_states(search) == [TrialState.FAIL, TrialState.RUNNING]


def test_candidate_whose_trial_broke_without_an_outcome_is_not_suggested_again() -> None:
    search = new_search(first_candidates=[FIRST[0], FIRST[0], FIRST[1]])
    search.tell(ask(search).id, None)
    assert ask(search).candidate == FIRST[1]


def test_every_trial_has_all_parameters_so_that_a_model_can_be_fitted() -> None:
    search = new_search()
    suggestions = ask_many(search, 12)
    assert {suggestion.candidate.exit_block for suggestion in suggestions} == {2, 3}
    for suggestion in suggestions:
        tell(search, suggestion)
    assert set(candidates_of(suggestions)) == set(told_candidates(search))
    assert all(trial.params.keys() == SPACE.parameters().keys() for trial in search.learner.study.trials)


@pytest.mark.parametrize(("sampler", "num_drawn"), [("gp", 24), ("tpe", 20), ("random", 20)])
def test_space_of_choices_is_searched_in_all_of_them(sampler: Sampler, num_drawn: int) -> None:
    search, first, suggested = new_search(CHOICES, sampler=sampler), first_candidates(CHOICES), list[Candidate]()
    for _ in range(len(first) + num_drawn):
        suggestion = ask(search)
        ratio = suggestion.candidate.target_ratio
        suggested.append(suggestion.candidate)
        tell(search, suggestion, top1=ratio, speedup=1 / ratio)
    assert suggested[: len(first)] == first
    assert all(CHOICES.clip(candidate) == candidate for candidate in suggested)
    assert len(set(suggested)) == len(suggested)
    drawn = suggested[len(first) :]
    assert {candidate.method for candidate in drawn} == {"cascade", "global"}
    assert len({candidate.token_reduction for candidate in drawn}) > 1
    assert len({candidate.criterion for candidate in drawn if candidate.method == "cascade"}) > 1
    assert set(told_states(search)) == {TrialState.COMPLETE}
    assert told_candidates(search, CHOICES) == suggested


def test_values_of_a_cascade_lie_on_a_grid_but_for_its_target() -> None:
    drawn = candidates_of(ask_many(new_search(sampler="random"), len(FIRST) + 40))[len(FIRST) :]
    assert {points for candidate in drawn for points in candidate.drop_budget} == {n / 4 for n in range(9)}
    assert {candidate.token_share for candidate in drawn} == {n / 8 for n in range(9)}
    assert {round(candidate.cutoff_token, 6) for candidate in drawn} <= {round(0.05 + 0.1125 * n, 6) for n in range(9)}
    cutoffs = sorted({candidate.cutoff_channel for candidate in drawn})
    assert 5 <= len(cutoffs) <= 9
    assert all(0.02 <= cutoff <= 0.5 + 1e-9 for cutoff in cutoffs)
    assert len({candidate.target_ratio for candidate in drawn}) == 40


def test_nearest_allowed_candidate_is_tried_in_the_place_of_each() -> None:
    allowed = candidates_of(ask_many(new_search(sampler="random", first_candidates=()), 3))

    def nearest(candidate: Candidate) -> Candidate:
        return min(allowed, key=lambda one: abs(one.target_ratio - candidate.target_ratio))

    settings = SamplerSettings(sampler="random", seed=5)
    search = CandidateSearch(SPACE, settings, History(first_candidates=FIRST), nearest_allowed=nearest)
    suggested = list[Candidate]()
    while suggestion := search.ask():
        suggested.append(suggestion.candidate)
    assert len(suggested) == 3
    assert set(suggested) == set(allowed)


# Resuming


@pytest.mark.parametrize("kind", [measured, failed])
def test_resume_knows_what_was_tried_and_counts_on(kind: Callable[[str, Candidate], Outcome]) -> None:
    outcomes = [kind(f"t{number:03d}", candidate) for number, candidate in enumerate(FIRST[:3])]
    search = new_search(outcomes=outcomes)
    assert told_states(search) == [TrialState.COMPLETE if kind is measured else TrialState.FAIL] * 3
    suggestions = ask_many(search, len(FIRST))
    assert [suggestion.id for suggestion in suggestions][:2] == ["t003", "t004"]
    assert candidates_of(suggestions)[: len(FIRST) - 3] == FIRST[3:]
    assert set(candidates_of(suggestions)).isdisjoint(FIRST[:3])


def test_resume_after_a_kill_counts_on_from_the_highest_id_and_suggests_what_was_lost() -> None:
    outcomes = [measured("t002", FIRST[2]), measured("t000", FIRST[0])]  # t001 ran when the driver was killed
    suggestion = ask(new_search(outcomes=outcomes))
    assert (suggestion.id, suggestion.candidate) == ("t003", FIRST[1])


def test_unfinished_trials_come_first_as_they_were_and_are_suggested_once() -> None:
    unfinished = [("t001", FIRST[1]), ("t004", FIRST[4])]
    search = new_search(outcomes=[measured("t000", FIRST[0])], unfinished=unfinished)
    resumed = ask_many(search, 2)
    assert [(suggestion.id, suggestion.candidate) for suggestion in resumed] == unfinished
    assert all(suggestion.is_resumed for suggestion in resumed)
    new = ask_many(search, 2)
    assert [(suggestion.id, suggestion.candidate) for suggestion in new] == [("t005", FIRST[2]), ("t006", FIRST[3])]
    assert not any(suggestion.is_resumed for suggestion in new)
    tell(search, resumed[0])
    assert told_states(search) == [TrialState.COMPLETE] * 2


def test_resume_does_not_suggest_again_what_its_first_run_drew() -> None:
    drawn = ask_many(new_search(sampler="random"), len(FIRST) + 6)
    outcomes = [measured(suggestion.id, suggestion.candidate) for suggestion in drawn]
    resumed = ask_many(new_search(sampler="random", outcomes=outcomes), 6)
    assert set(candidates_of(resumed)).isdisjoint(candidates_of(drawn))


def test_resume_knows_choices_as_they_were_made() -> None:
    drawn = ask_many(new_search(CHOICES, sampler="random"), len(first_candidates(CHOICES)) + 12)
    search = new_search(CHOICES, outcomes=[measured(suggestion.id, suggestion.candidate) for suggestion in drawn])
    assert told_candidates(search, CHOICES) == candidates_of(drawn)
    assert {suggestion.candidate.method for suggestion in drawn[-12:]} == {"cascade", "global"}
    suggestion = ask(search)
    assert suggestion.id == f"t{len(drawn):03d}"
    assert suggestion.candidate not in candidates_of(drawn)


def test_exits_after_stages_are_a_choice_and_known_again_on_resume() -> None:
    first = first_candidates(SWIN)
    drawn = ask_many(new_search(SWIN), len(first) + 12)
    assert candidates_of(drawn)[: len(first)] == first
    assert {suggestion.candidate.exit_block for suggestion in drawn} == {2, 4, 6}
    assert {suggestion.candidate.round_to for suggestion in drawn} == {"auto", 8}
    assert "token_share" not in SWIN.parameters()
    resumed = new_search(SWIN, outcomes=[measured(suggestion.id, suggestion.candidate) for suggestion in drawn])
    assert told_candidates(resumed, SWIN) == candidates_of(drawn)
    assert set(candidates_of(ask_many(resumed, 6))).isdisjoint(candidates_of(drawn))


def test_outcomes_at_earlier_exits_are_no_trials_of_their_own() -> None:
    own = measured("t000", FIRST[0])
    search = new_search(outcomes=[own, replace(own, id="t000.2")])
    assert told_states(search) == [TrialState.COMPLETE]
    assert ask(search).id == "t001"


def test_known_outcome_outside_the_space_is_taken_at_its_nearest_point() -> None:
    outside = replace(FIRST[0], cutoff_token=0.99, exit_block=1)
    search = new_search(outcomes=[measured("t000", outside)])
    assert [SPACE.of_values(trial.params) for trial in search.learner.study.trials] == [SPACE.clip(outside)]


def test_outcomes_of_other_sweeps_are_told_but_their_candidates_may_be_tried_here() -> None:
    prior = [measured(f"t{number:03d}", candidate, top1=0.5) for number, candidate in enumerate(FIRST)]
    search = new_search(prior_outcomes=prior)
    assert [trial.values for trial in search.learner.study.trials] == [[0.5, 1.5]] * len(FIRST)
    suggestions = ask_many(search, len(FIRST))
    assert [suggestion.id for suggestion in suggestions] == [f"t{number:03d}" for number in range(len(FIRST))]
    assert candidates_of(suggestions) == FIRST


def test_nothing_is_left_running_once_all_have_ended() -> None:
    search = new_search(outcomes=[measured("t000", FIRST[0]), failed("t001", FIRST[1])])
    for number, suggestion in enumerate(ask_many(search, 4)):
        kind = failed if number % 2 else measured
        search.tell(suggestion.id, kind(suggestion.id, suggestion.candidate))
    assert set(told_states(search)) <= FINISHED


def test_closed_search_is_still_told_what_runs() -> None:
    search = new_search()
    suggestion = ask(search)
    search.close()
    tell(search, suggestion)
    assert told_states(search) == [TrialState.COMPLETE]


def test_suggestions_are_made_ready_while_trials_run() -> None:
    search = new_search(sampler="random", num_ahead=2)
    suggestions = ask_many(search, len(FIRST) + 1)
    while len(search.learner.study.trials) < 3:  # one that runs, and two more than were asked for
        time.sleep(0.01)
    suggestions += ask_many(search, 2)
    assert [suggestion.id for suggestion in suggestions] == [f"t{number:03d}" for number in range(len(suggestions))]
    assert told_candidates(search)[:3] == candidates_of(suggestions)[len(FIRST) :]
    search.close()


# Repeats


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2"])
def test_space_without_a_choice_gives_its_one_candidate_and_ends(sampler: Sampler) -> None:
    fixed = papers_space(cutoff_channel=0.1, cutoff_token=0.5, drop_budget=1, token_share=0, target_ratio=0.5)
    space = Space(fixed, depth=3)
    search = new_search(space, sampler=sampler)
    suggestion = ask(search)
    assert [suggestion.candidate] == first_candidates(space)
    tell(search, suggestion)
    assert search.ask() is None


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "random"])
def test_no_candidate_runs_twice_and_a_space_that_is_exhausted_ends_the_search(sampler: Sampler) -> None:
    config = papers_space(
        method="decreasing", token_reduction=("merge", "lfe-merge"), target_ratio=0.5, cutoff_token=0.5
    )
    space = Space(config.model_copy(update={"exit_block": (1, 3)}), depth=3)
    search, seen = new_search(space, sampler=sampler), list[Candidate]()
    while suggestion := search.ask():
        tell(search, suggestion, top1=1 / suggestion.candidate.exit_block)
        seen.append(suggestion.candidate)
    assert 4 <= len(set(seen)) == len(seen) <= 6  # the last may be missed: all draws were repeats
    measured_trials = [trial for trial in search.learner.study.trials if trial.state == TrialState.COMPLETE]
    assert len(measured_trials) > len(seen)  # a repeat is told the outcome of the first try
    for trial in measured_trials:
        assert trial.values[0] == pytest.approx(1 / space.of_values(trial.params).exit_block)


def test_repeat_of_a_trial_that_runs_is_not_told_as_measured() -> None:
    space = Space(
        papers_space(method="decreasing", token_reduction="merge", target_ratio=0.5, exit_block=(1, 2)), depth=2
    )
    search = new_search(space, sampler="random")
    ask_many(search, 2)
    assert search.ask() is None
    assert {state for state in told_states(search) if state.is_finished()} == {TrialState.FAIL}


def test_grid_has_all_ends_in_random_order_and_ends() -> None:
    space = Space(papers_space(method="global", token_reduction="merge", target_ratio=(0.25, 1.0)), depth=3)

    def asked(seed: int) -> list[Candidate]:
        search, candidates = (
            new_search(space, sampler="grid", num_trials=20, first_candidates=(), seed=seed),
            list[Candidate](),
        )
        while suggestion := search.ask():
            candidates.append(suggestion.candidate)
        return candidates

    one, other = asked(0), asked(1)
    levels = [0.0, 1 / 3, 2 / 3, 1.0]  # 4 x 4 is what 20 trials have room for
    expected = {(share, 0.25 + 0.75 * part) for share in levels for part in levels}
    assert len(one) == 16
    assert {(round(c.token_share, 9), c.target_ratio) for c in one} == {(round(s, 9), t) for s, t in expected}
    assert other != one
    assert set(other) == set(one)


@pytest.mark.parametrize("sampler", ["gp", "random"])
def test_gp_may_try_again_what_was_stopped_then_without_rungs(sampler: Sampler) -> None:
    few = papers_space(
        cutoff_channel=0.1, cutoff_token=0.8, drop_budget=1.0, token_share=0.5, target_ratio=0.5, exit_block=3,
        criterion=("lfs", "taylor", "obs"), token_reduction=("lfe", "merge"), round_to=(1, 8),
    )  # fmt: skip
    search = new_search(Space(few, depth=3), sampler=sampler, has_rungs=True, first_candidates=())
    tried, again = list[Candidate](), list[Candidate]()
    while suggestion := search.ask():
        candidate = suggestion.candidate
        is_again = candidate in tried
        assert suggestion.has_rungs is not is_again
        again += [candidate] if is_again else []
        stopped = replace(failed(suggestion.id, candidate, State.STOPPED), rungs=((0.9, 2.0),))
        is_good = candidate.round_to == 1 or is_again
        search.tell(suggestion.id, measured(suggestion.id, candidate) if is_good else stopped)
        tried.append(candidate)
    assert [candidate.round_to for candidate in again] == ([8] * 6 if sampler == "gp" else [])
    assert len(tried) == 12 + len(again)


def test_only_a_search_with_rungs_suggests_trials_that_pass_them() -> None:
    assert [suggestion.has_rungs for suggestion in ask_many(new_search(has_rungs=True), 3)] == [True] * 3
    assert [suggestion.has_rungs for suggestion in ask_many(new_search(), 3)] == [False] * 3


def test_resumed_search_tries_again_without_rungs_what_its_first_run_stopped() -> None:
    few = papers_space(
        cutoff_channel=0.1, cutoff_token=0.8, drop_budget=1.0, token_share=0.5, target_ratio=0.5, exit_block=3,
        criterion=("lfs", "taylor"), token_reduction=("lfe", "merge"), round_to=(1, 8),
    )  # fmt: skip
    space = Space(few, depth=3)
    candidates = candidates_of(ask_many(new_search(space, sampler="random", first_candidates=()), 8))
    stopped = replace(failed("t000", candidates[0], State.STOPPED), rungs=((0.99, 3.0),))
    rest = [measured(f"t{number:03d}", candidate) for number, candidate in enumerate(candidates[1:], start=1)]
    search = new_search(space, sampler="gp", has_rungs=True, first_candidates=(), outcomes=[stopped, *rest])
    suggestion = ask(search)
    assert (suggestion.id, suggestion.candidate, suggestion.has_rungs) == ("t008", candidates[0], False)
    assert search.ask() is None


# Methods that can run now, first candidates that come later, seconds


def of_method(method: Method, count: int, space: Space = CHOICES) -> list[Candidate]:
    """Candidates of one method, at different targets."""
    drawn = [Surrogate(space, space.of_values, None, seed).sample_uniform([method]) for seed in range(count)]
    assert {candidate.method for candidate in drawn} == {method}
    return drawn


CASCADES, GLOBALS = of_method("cascade", 3), of_method("global", 3)


def test_first_candidates_that_cannot_run_yet_wait_in_their_order() -> None:
    first = [CASCADES[0], GLOBALS[0], CASCADES[1], GLOBALS[1]]
    search = new_search(CHOICES, sampler="random", first_candidates=first)
    now = [search.ask(["global"]), search.ask(["global"])]
    later = ask_many(search, 2)
    assert [one.candidate for one in now if one] == GLOBALS[:2]
    assert candidates_of(later) == CASCADES[:2]
    assert [one.id for one in (*now, *later) if one] == ["t000", "t001", "t002", "t003"]


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "random"])
def test_the_sampler_draws_what_can_run(sampler: Sampler) -> None:
    search = new_search(CHOICES, sampler=sampler, first_candidates=[CASCADES[0]], num_ahead=1)
    for number in range(12):
        suggestion = search.ask(["global"])
        assert suggestion is not None
        assert suggestion.candidate.method == "global"
        tell(search, suggestion, top1=0.5 + number / 100, speedup=1 + number / 100)
    assert ask(search).candidate == CASCADES[0]  # it waited
    drawn = {ask(search).candidate.method for _ in range(8)}
    assert "cascade" in drawn
    search.close()


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_where_all_methods_can_run_the_sampler_draws_as_ever(sampler: Sampler) -> None:
    searches = [new_search(CHOICES, sampler=sampler, first_candidates=()) for _ in range(2)]
    for number in range(12):
        one, other = searches[0].ask(), searches[1].ask(["global", "cascade", "constant"])
        assert one == other
        assert one is not None
        for search in searches:
            tell(search, one, top1=0.5 + number % 5 / 10, speedup=1 + number % 3)


@pytest.mark.parametrize("sampler", ["gp", "random", "grid"])
def test_a_search_that_waits_is_told_from_one_that_is_exhausted(sampler: Sampler) -> None:
    few = papers_space(
        cutoff_channel=0.1, cutoff_token=0.8, drop_budget=1.0, token_share=0.5, target_ratio=0.5, exit_block=3,
        method=("cascade", "global"), criterion="obs", token_reduction="merge", round_to=(1, 8),
    )  # fmt: skip
    search = new_search(Space(few, depth=3), sampler=sampler, first_candidates=(), num_trials=4)
    assert search.ask([]) is None
    assert search.is_waiting
    tried = list[Candidate]()
    while suggestion := search.ask(["global"]):
        assert not search.is_waiting
        tried.append(suggestion.candidate)
        tell(search, suggestion)
    assert search.is_waiting
    while suggestion := search.ask():
        tried.append(suggestion.candidate)
        tell(search, suggestion)
    assert not search.is_waiting
    assert [candidate.method for candidate in tried] == ["global"] * 2 + ["cascade"] * 2
    assert search.ask(["cascade", "global"]) is None
    assert not search.is_waiting


def test_unfinished_trials_that_cannot_run_yet_wait_too() -> None:
    unfinished = [("t000", CASCADES[0]), ("t001", GLOBALS[0])]
    search = new_search(CHOICES, sampler="random", unfinished=unfinished, first_candidates=[])
    first = search.ask(["global"])
    assert first is not None
    assert (first.id, first.candidate, first.is_resumed) == ("t001", GLOBALS[0], True)
    assert search.ask([]) is None
    assert search.is_waiting
    assert (ask(search).id, ask(search).id) == ("t000", "t002")


def test_a_draw_that_was_made_ready_for_other_methods_is_no_failure() -> None:
    search = new_search(CHOICES, sampler="gp", first_candidates=(), num_ahead=2)
    for number in range(10):
        suggestion = search.ask(["cascade"] if number < 9 else ["global"])
        assert suggestion is not None
        tell(search, suggestion, top1=0.9 - number / 100)
    assert suggestion.candidate.method == "global"
    discarded = [trial for trial in search.learner.study.trials if DISCARDED in trial.user_attrs]
    assert len(discarded) == 2
    assert {trial.state for trial in discarded} == {TrialState.FAIL}
    search.close()


def test_first_candidates_may_be_added_after_the_first_and_before_the_samplers() -> None:
    search = new_search(CHOICES, sampler="random", first_candidates=[CASCADES[0]])
    search.add_first([CASCADES[1], CASCADES[0]])
    assert candidates_of(ask_many(search, 2)) == CASCADES[:2]
    drawn = ask(search).candidate
    assert drawn not in CASCADES
    search.add_first([drawn, CASCADES[2]])
    assert ask(search).candidate == CASCADES[2]


def test_added_candidates_come_before_the_grid() -> None:
    search = new_search(CHOICES, sampler="grid", num_trials=10, first_candidates=())
    ask_many(search, 2)
    search.add_first(CASCADES[:1])
    assert ask(search).candidate == CASCADES[0]


def test_seconds_are_the_mean_of_the_method_until_processes_are_fitted() -> None:
    known = [(CASCADES[0], 4.0), (CASCADES[1], 8.0), (GLOBALS[0], 0.0)]
    outcomes = [replace(measured(f"t{n:03d}", one), seconds=s) for n, (one, s) in enumerate(known)]
    failed_early = replace(failed("t003", CASCADES[2]), seconds=99.0)
    prior = [replace(measured("t000", GLOBALS[1]), seconds=50.0)]
    search = new_search(CHOICES, outcomes=[*outcomes, failed_early], prior_outcomes=prior)
    assert search.predicted_seconds(CASCADES[2]) == 6.0
    assert search.predicted_seconds(GLOBALS[2]) is None


def test_processes_predict_the_seconds_of_a_candidate() -> None:
    space = Space(papers_space(exit_block=3), depth=3)
    search = new_search(space, sampler="gp", first_candidates=())
    for _ in range(12):
        suggestion = ask(search)
        ratio = suggestion.candidate.target_ratio
        outcome = replace(measured(suggestion.id, suggestion.candidate, ratio, 1 / ratio), seconds=20 * ratio)
        search.tell(suggestion.id, outcome)
    for ratio in (0.3, 0.9):
        predicted = search.predicted_seconds(replace(suggestion.candidate, target_ratio=ratio))
        assert predicted == pytest.approx(20 * ratio, rel=0.25)
    search.close()
