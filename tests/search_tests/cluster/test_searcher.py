"""The searcher over a real Optuna study: what is suggested first, what is told, and what a resume knows."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from optuna import create_study
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from ray import cloudpickle
from ray.tune.search import Searcher

from search.cluster.searcher import LIMIT_KEEPERS, STOPPED, StudySearcher
from search.config import SpaceConfig
from search.limits import parse_limit
from search.outcome import Candidate, Outcome, State
from search.space import Space
from search.suggest.samplers import MOST_GP_TRIALS, NUM_RANDOM
from tests.search_tests import builders

SPACE = Space(SpaceConfig(exit_block=(2, 3)), depth=3)
FIRST = SPACE.first_candidates()
BOTH = Space(
    SpaceConfig(
        exit_block=(2, 3),
        method=("cascade", "global"),
        criterion=("lfs", "taylor", "obs"),
        token_reduction=("lfe", "merge", "none"),
        round_to=(1, 8, "auto"),
    ),
    depth=3,
)
SWIN = Space(
    SpaceConfig(exit_block=(1, 6), method=("cascade", "global"), token_reduction="none", round_to=("auto", 8)),
    depth=6,
    exits=(2, 4, 6),
    has_windows=True,
)
FINISHED = {TrialState.COMPLETE, TrialState.FAIL}


class Counting(StudySearcher):
    """Ray's id of a trial is `ray-` and the number of its suggestion."""

    num_suggested = 0


def searcher(space: Space = SPACE, **other: Any) -> Counting:
    settings: dict[str, Any] = {"known": [], "sampler": "tpe", "seed": 0}
    return Counting(space, **settings | other)


def suggest(source: Counting, count: int) -> list[tuple[str, Candidate]]:
    """Ids and candidates, all asked for before any is told."""
    suggested = []
    for _ in range(count):
        config = source.suggest(f"ray-{source.num_suggested}")
        source.num_suggested += 1
        assert isinstance(config, dict)
        suggested.append((config["id"], Candidate.from_json(json.loads(json.dumps(config["candidate"])))))
    return suggested


def trials(source: StudySearcher) -> list[FrozenTrial]:
    """What the study holds; a candidate that was given to it only once it has ended."""
    return source._study.trials


def candidates(source: StudySearcher, space: Space = SPACE) -> list[Candidate]:
    """Those of the study's trials: the first are as they are, the sampler's on the grid."""
    first, exact = space.first_candidates(), [space.of_values(trial.params) for trial in trials(source)]
    return [each if each in first else sampled(trial, space) for each, trial in zip(exact, trials(source), strict=True)]


def sampled(trial: FrozenTrial | Trial, space: Space) -> Candidate:
    return space.of_values(space.snap(trial.params))


def tell(source: StudySearcher, number: int, outcome: Outcome) -> None:
    """As Ray does: by the number of the suggestion."""
    source.on_trial_complete(f"ray-{number}", {"outcomes": json.dumps([outcome.to_json()])})


def measured(id: str, candidate: Candidate, top1: float = 0.9, speedup: float = 1.5) -> Outcome:
    return replace(builders.outcome(id, top1, speedup), candidate=candidate)


def failed(id: str, candidate: Candidate, state: State = State.FAILED) -> Outcome:
    return replace(builders.failed(id, state), candidate=candidate)


def test_first_candidates_are_suggested_first_in_their_order_and_once() -> None:
    suggested = [candidate for _, candidate in suggest(searcher(), 20)]
    assert suggested[: len(FIRST)] == FIRST
    assert suggested[0].drop_budget == (0.0, 0.0, 0.0)
    assert suggested[0].target_ratio == 1.0
    assert all(suggested.count(candidate) == 1 for candidate in FIRST)


def test_ids_count_the_suggestions() -> None:
    assert [id for id, _ in suggest(searcher(), 3)] == ["t000", "t001", "t002"]


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "random"])
def test_suggestions_lie_within_the_space_and_are_all_different(sampler: str) -> None:
    source = searcher(sampler=sampler)
    seen = set()
    for number in range(20):
        [(id, candidate)] = suggest(source, 1)
        assert SPACE.clip(candidate) == candidate
        seen.add(candidate)
        tell(source, number, measured(id, candidate, top1=candidate.target_ratio, speedup=1 / candidate.target_ratio))
    assert len(seen) == 20


def test_tpe_goes_where_it_was_good() -> None:
    source = searcher(Space(SpaceConfig(exit_block=3), depth=3))
    tried = []
    for number in range(80):
        [(id, candidate)] = suggest(source, 1)
        good = 1 - abs(candidate.cutoff_token - 0.275)
        tell(source, number, measured(id, candidate, top1=good, speedup=good))
        tried.append(abs(candidate.cutoff_token - 0.275))
    assert sum(tried[-20:]) / 20 < 0.5 * sum(tried[:20]) / 20


@pytest.mark.parametrize("space", [SPACE, BOTH], ids=["numbers", "choices"])
def test_tpe_suggests_what_optunas_own_does(space: Space) -> None:
    limit = parse_limit("top1 >= 0.5")
    source = searcher(space, limits=[limit], dense=builders.DENSE, seed=3)
    theirs = TPESampler(seed=3, n_startup_trials=NUM_RANDOM, constant_liar=True)
    study = create_study(directions=["maximize", "maximize"], sampler=theirs)
    num_first = len(space.first_candidates())
    for number in range(num_first + 30):
        [(id, candidate)] = suggest(source, 1)
        top1, speedup = candidate.target_ratio, 2 - candidate.token_share
        excess = limit.excess(builders.measurement(top1, speedup), builders.DENSE)
        if number < num_first:
            params, distributions = space.values_of(candidate), source._distributions
            constraints = {limit.text: excess}
            given = create_trial(
                params=params, distributions=distributions, values=[top1, speedup], constraints=constraints
            )
            study.add_trial(given)
        else:
            trial = study.ask(source._distributions)
            assert sampled(trial, space) == candidate
            if number % 7 == 0:
                continue  # it runs on
            trial.set_constraint(limit.text, excess)
            study.tell(trial, [top1, speedup])
        tell(source, number, measured(id, candidate, top1=top1, speedup=speedup))


def test_same_seed_gives_the_same_suggestions_and_another_gives_others() -> None:
    one, same, other = (suggest(searcher(seed=seed), 12) for seed in (3, 3, 4))
    assert one == same
    assert one[: len(FIRST)] == other[: len(FIRST)]
    assert {c for _, c in one[len(FIRST) :]}.isdisjoint(c for _, c in other[len(FIRST) :])


def test_measured_outcome_is_told_with_both_objectives() -> None:
    source = searcher()
    [(id, candidate)] = suggest(source, 1)
    tell(source, 0, measured(id, candidate, top1=0.75, speedup=2.5))
    [trial] = trials(source)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.75, 2.5])
    assert source._study.directions == source._study.directions[:1] * 2
    assert source._study.directions[0].name == "MAXIMIZE"


@pytest.mark.parametrize("accuracy", ["recall_at_1", "mean_average_precision"])
def test_the_accuracy_of_the_recipe_is_told_also_on_resume(accuracy: str) -> None:
    source = searcher(accuracy=accuracy)
    [(id, candidate)] = suggest(source, 1)
    outcome = replace(builders.outcome(id, 0.75, 2.5, **{accuracy: 0.25}), candidate=candidate)
    tell(source, 0, outcome)
    for each in (source, searcher(accuracy=accuracy, known=[outcome])):
        [trial] = trials(each)
        assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.25, 2.5])


def test_outcome_without_the_accuracy_of_the_recipe_is_told_as_failed() -> None:
    source = searcher(accuracy="recall_at_1")
    [(id, candidate)] = suggest(source, 1)
    tell(source, 0, measured(id, candidate))
    assert [trial.state for trial in trials(source)] == [TrialState.FAIL]


@pytest.mark.parametrize("state", [State.FAILED, State.INFEASIBLE, State.STOPPED])
def test_outcome_without_a_measurement_is_told_as_failed(state: State) -> None:
    source = searcher()
    [(id, candidate)] = suggest(source, 1)
    tell(source, 0, failed(id, candidate, state))
    assert [trial.state for trial in trials(source)] == [TrialState.FAIL]


@pytest.mark.parametrize("values", [{"top1": float("nan")}, {"speedup": float("inf")}])
def test_measurement_that_is_no_number_is_told_as_failed(values: dict[str, float]) -> None:
    source = searcher()
    [(id, candidate)] = suggest(source, 1)
    tell(source, 0, measured(id, candidate, **values))
    assert [trial.state for trial in trials(source)] == [TrialState.FAIL]


@pytest.mark.parametrize(("result", "error"), [(None, True), (None, False), ({}, False), ({"outcome": "{"}, True)])
def test_trial_whose_worker_broke_is_told_as_failed(result: dict[str, Any] | None, error: bool) -> None:
    source = searcher()
    suggest(source, 2)
    source.on_trial_complete("ray-0", result, error)
    assert [trial.state for trial in trials(source)] == [TrialState.FAIL]


def test_sampled_trial_whose_worker_broke_is_told_as_failed() -> None:
    source = searcher()
    suggest(source, len(FIRST) + 2)
    source.on_trial_complete(f"ray-{len(FIRST)}", None, error=True)
    assert [trial.state for trial in trials(source)] == [TrialState.FAIL, TrialState.RUNNING]


def test_trials_end_in_any_order_each_with_its_own_values() -> None:
    source = searcher()
    suggested = suggest(source, 4)
    for number in (2, 0, 3, 1):
        tell(source, number, measured(*suggested[number], top1=number / 10))
    told = dict(zip(candidates(source), (trial.values[0] for trial in trials(source)), strict=True))
    assert [told[candidate] for _, candidate in suggested] == [0.0, 0.1, 0.2, 0.3]


def test_every_trial_of_the_study_has_all_parameters_so_that_a_model_can_be_fitted() -> None:
    source = searcher()
    suggested = suggest(source, 12)
    assert {candidate.exit_block for _, candidate in suggested} == {2, 3}
    for number, each in enumerate(suggested):
        tell(source, number, measured(*each))
    assert {candidate for _, candidate in suggested} == set(candidates(source))
    assert all(trial.params.keys() == SPACE.parameters().keys() for trial in trials(source))


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_space_of_choices_is_searched_in_all_of_them(sampler: str) -> None:
    source = searcher(BOTH, sampler=sampler)
    first = BOTH.first_candidates()
    suggested = []
    for number in range(len(first) + 20):
        [(id, candidate)] = suggest(source, 1)
        suggested.append(candidate)
        tell(source, number, measured(id, candidate, top1=candidate.target_ratio, speedup=1 / candidate.target_ratio))
    assert suggested[: len(first)] == first
    assert all(BOTH.clip(candidate) == candidate for candidate in suggested)
    assert len(set(suggested)) == len(suggested)
    drawn = suggested[len(first) :]
    assert {candidate.method for candidate in drawn} == {"cascade", "global"}
    assert len({candidate.token_reduction for candidate in drawn}) > 1
    assert len({candidate.criterion for candidate in drawn if candidate.method == "cascade"}) > 1
    assert {trial.state for trial in trials(source)} == {TrialState.COMPLETE}
    assert candidates(source, BOTH) == suggested


def test_exits_after_stages_are_a_choice_of_the_study_and_known_again_on_resume() -> None:
    source = searcher(SWIN)
    first = SWIN.first_candidates()
    drawn = suggest(source, len(first) + 12)
    assert [candidate for _, candidate in drawn][: len(first)] == first
    assert {candidate.exit_block for _, candidate in drawn} == {2, 4, 6}
    assert {candidate.round_to for _, candidate in drawn} == {"auto", 8}
    assert "token_share" not in SWIN.parameters()
    resumed = searcher(SWIN, known=[measured(*each) for each in drawn])
    assert candidates(resumed, SWIN) == [candidate for _, candidate in drawn]
    again = {candidate for _, candidate in suggest(resumed, 6)}
    assert again.isdisjoint(candidate for _, candidate in drawn)


def test_resume_knows_choices_as_they_were_made() -> None:
    drawn = suggest(searcher(BOTH, sampler="random"), len(BOTH.first_candidates()) + 12)
    source = searcher(BOTH, known=[measured(*each) for each in drawn])
    assert candidates(source, BOTH) == [candidate for _, candidate in drawn]
    assert {candidate.method for _, candidate in drawn[-12:]} == {"cascade", "global"}
    [(id, candidate)] = suggest(source, 1)
    assert id == f"t{len(drawn):03d}"
    assert candidate not in {known for _, known in drawn}


def test_tpe_learns_which_choice_is_better() -> None:
    source = searcher(BOTH)
    good = []
    for number in range(60):
        [(id, candidate)] = suggest(source, 1)
        value = (candidate.method == "global") + (candidate.token_reduction == "merge") / 2 + candidate.target_ratio / 9
        tell(source, number, measured(id, candidate, top1=value, speedup=value))
        good.append(candidate.method == "global" and candidate.token_reduction == "merge")
    assert sum(good[-20:]) > 12  # blind choice: 1 of 6, so 3


def test_who_watches_is_told_of_every_suggestion_before_it_starts() -> None:
    told: list[tuple[str, Candidate]] = []
    source = searcher(on_suggest=lambda id, candidate: told.append((id, candidate)))
    assert suggest(source, 3) == told


@pytest.mark.parametrize("kind", [measured, failed])
def test_resume_knows_what_was_tried_and_counts_on(kind: Any) -> None:
    known = [kind(f"t{number:03d}", candidate) for number, candidate in enumerate(FIRST[:3])]
    source = searcher(known=known)
    state = TrialState.COMPLETE if kind is measured else TrialState.FAIL
    assert [trial.state for trial in trials(source)] == [state] * 3
    suggested = suggest(source, len(FIRST))
    assert [id for id, _ in suggested][:2] == ["t003", "t004"]
    assert [candidate for _, candidate in suggested][: len(FIRST) - 3] == FIRST[3:]
    assert {candidate for _, candidate in suggested}.isdisjoint(FIRST[:3])


def test_resume_after_a_kill_counts_on_from_the_highest_id_and_suggests_what_was_lost() -> None:
    known = [measured("t002", FIRST[2]), measured("t000", FIRST[0])]  # t001 ran when the driver was killed
    id, candidate = suggest(searcher(known=known), 1)[0]
    assert (id, candidate) == ("t003", FIRST[1])


def test_resume_does_not_suggest_again_what_its_first_run_drew() -> None:
    drawn = suggest(searcher(sampler="random"), len(FIRST) + 6)
    known = [measured(*each) for each in drawn]
    resumed = suggest(searcher(sampler="random", known=known), 6)
    assert {candidate for _, candidate in resumed}.isdisjoint(candidate for _, candidate in drawn)


def test_known_outcome_outside_the_space_is_taken_at_its_nearest_point() -> None:
    outside = replace(FIRST[0], cutoff_token=0.99, exit_block=1)
    source = searcher(known=[measured("t000", outside)])
    assert [SPACE.of_values(trial.params) for trial in trials(source)] == [SPACE.clip(outside)]


def test_nothing_is_left_running_once_all_have_ended() -> None:
    source = searcher(known=[measured("t000", FIRST[0]), failed("t001", FIRST[1])])
    for number, (id, candidate) in enumerate(suggest(source, 4)):
        tell(source, number, failed(id, candidate) if number % 2 else measured(id, candidate))
    assert {trial.state for trial in trials(source)} <= FINISHED


def test_after_the_deadline_nothing_is_suggested() -> None:
    told: list[str] = []
    source = searcher(deadline=time.monotonic(), on_suggest=lambda id, candidate: told.append(id))
    assert source.suggest("ray-0") == Searcher.FINISHED
    assert trials(source) == told == []


def test_once_finished_nothing_is_suggested_but_what_runs_is_told() -> None:
    source = searcher(deadline=time.monotonic() + 3600)
    [(id, candidate)] = suggest(source, 1)
    source.finish()
    assert source.suggest("ray-1") == Searcher.FINISHED
    tell(source, 0, measured(id, candidate))
    assert [trial.state for trial in trials(source)] == [TrialState.COMPLETE]


def test_before_the_deadline_trials_are_suggested() -> None:
    assert len(suggest(searcher(deadline=time.monotonic() + 3600), 2)) == 2


def test_suggestions_are_made_ready_while_trials_run() -> None:
    source = searcher(sampler="random", ahead=2)
    suggested = suggest(source, len(FIRST) + 1)
    while len(trials(source)) < 3:  # one that runs, and two more than were asked for
        time.sleep(0.01)
    suggested += suggest(source, 2)
    assert [id for id, _ in suggested] == [f"t{number:03d}" for number in range(len(suggested))]
    assert candidates(source)[:3] == [candidate for _, candidate in suggested[len(FIRST) :]]
    source.finish()


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2"])
def test_space_without_a_choice_gives_its_one_candidate_and_ends(sampler: str) -> None:
    fixed = SpaceConfig(cutoff_channel=0.1, cutoff_token=0.5, drop_budget=1, token_share=0, target_ratio=0.5)
    space = Space(fixed, depth=3)
    source = searcher(space, sampler=sampler)
    [(id, candidate)] = suggest(source, 1)
    assert [candidate] == space.first_candidates()
    tell(source, 0, measured(id, candidate))
    assert source.suggest("another") == Searcher.FINISHED


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "random"])
def test_no_candidate_runs_twice_and_a_space_that_is_exhausted_ends_the_search(sampler: str) -> None:
    config = SpaceConfig(
        method="decreasing", token_reduction=("merge", "lfe-merge"), target_ratio=0.5, cutoff_token=0.5
    )
    space = Space(config.model_copy(update={"exit_block": (1, 3)}), depth=3)
    source, seen = searcher(space, sampler=sampler), list[Candidate]()
    while isinstance(asked := source.suggest(f"ray-{len(seen)}"), dict):
        candidate = Candidate.from_json(asked["candidate"])
        tell(source, len(seen), measured(asked["id"], candidate, top1=1 / candidate.exit_block))
        seen.append(candidate)
    assert 4 <= len(set(seen)) == len(seen) <= 6  # the last may be missed: all draws were repeats
    told = [trial for trial in trials(source) if trial.state == TrialState.COMPLETE]
    assert len(told) > len(seen)  # repeats are told what came of the first of them
    for trial in told:
        assert trial.values[0] == pytest.approx(1 / space.of_values(trial.params).exit_block)


def test_repeat_of_a_trial_that_runs_is_not_told_as_measured() -> None:
    space = Space(
        SpaceConfig(method="decreasing", token_reduction="merge", target_ratio=0.5, exit_block=(1, 2)), depth=2
    )
    source = searcher(space, sampler="random")
    suggest(source, 2)
    assert source.suggest("another") == Searcher.FINISHED
    assert {trial.state for trial in trials(source) if trial.state.is_finished()} == {TrialState.FAIL}


def test_what_a_cascade_begins_with_is_suggested_on_a_grid() -> None:
    drawn = [candidate for _, candidate in suggest(searcher(sampler="random"), len(FIRST) + 40)][len(FIRST) :]
    assert {points for candidate in drawn for points in candidate.drop_budget} == {n / 4 for n in range(9)}
    assert {candidate.token_share for candidate in drawn} == {n / 8 for n in range(9)}
    assert {round(candidate.cutoff_token, 6) for candidate in drawn} <= {round(0.05 + 0.1125 * n, 6) for n in range(9)}
    ratios = sorted({candidate.cutoff_channel for candidate in drawn})
    assert 5 <= len(ratios) <= 9
    assert all(0.02 <= ratio <= 0.5 + 1e-9 for ratio in ratios)
    assert len({candidate.target_ratio for candidate in drawn}) == 40


def test_candidates_to_begin_with_may_be_given() -> None:
    drawn = [candidate for _, candidate in suggest(searcher(sampler="random"), len(FIRST) + 3)][-3:]
    assert [candidate for _, candidate in suggest(searcher(first=drawn), 3)] == drawn


def test_what_is_learned_from_other_sweeps_is_told_but_may_be_tried_here() -> None:
    learned = [measured(f"t{number:03d}", candidate, top1=0.5) for number, candidate in enumerate(FIRST)]
    source = searcher(learned=learned)
    assert [trial.values for trial in trials(source)] == [[0.5, 1.5]] * len(FIRST)
    assert suggest(source, len(FIRST)) == [(f"t{number:03d}", each) for number, each in enumerate(FIRST)]


def test_grid_has_all_ends_in_random_order_and_ends() -> None:
    space = Space(SpaceConfig(method="global", token_reduction="merge", target_ratio=(0.25, 1.0)), depth=3)
    source = searcher(space, sampler="grid", num_trials=20, first=[])
    found = []
    while isinstance(asked := source.suggest(f"ray-{len(found)}"), dict):
        found.append(Candidate.from_json(asked["candidate"]))
    levels = [0.0, 1 / 3, 2 / 3, 1.0]  # 4 x 4 is what 20 trials have room for
    expected = {(share, 0.25 + 0.75 * part) for share in levels for part in levels}
    assert len(found) == 16
    assert {(round(c.token_share, 9), c.target_ratio) for c in found} == {(round(s, 9), t) for s, t in expected}
    other = searcher(space, sampler="grid", num_trials=20, first=[], seed=1)
    assert [each for _, each in suggest(other, 16)] != found
    assert set(found) == {each for _, each in suggest(searcher(space, sampler="grid", num_trials=20, first=[]), 16)}


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "gp"])
def test_what_was_stopped_is_no_final_value(sampler: str) -> None:
    source = searcher(sampler=sampler, has_rungs=True)
    (good, bad) = suggest(source, 2)
    tell(source, 0, measured(*good))
    stopped = replace(failed(*bad, State.STOPPED), rungs=((0.5, 1.1), (0.6, 1.2)))
    tell(source, 1, stopped)
    for each in (source, searcher(sampler=sampler, has_rungs=True, known=[measured(*good), stopped])):
        first, second = trials(each)
        keeps_limits = sampler in LIMIT_KEEPERS
        assert (first.state, first.constraints) == (TrialState.COMPLETE, {STOPPED: 0.0} if keeps_limits else {})
        if sampler in ("tpe", "nsga2"):  # beyond a limit: of use, but not compared with the others
            assert (second.state, second.values, second.constraints) == (
                TrialState.COMPLETE,
                [0.6, 1.2],
                {STOPPED: 1.0},
            )
            assert [best.number for best in each._study.best_trials] == [0]
        else:
            assert second.state is TrialState.FAIL


@pytest.mark.parametrize("sampler", ["gp", "random"])
def test_gp_may_try_again_what_was_stopped_then_without_rungs(sampler: str) -> None:
    few = SpaceConfig(
        cutoff_channel=0.1, cutoff_token=0.8, drop_budget=1.0, token_share=0.5, target_ratio=0.5, exit_block=3,
        criterion=("lfs", "taylor", "obs"), token_reduction=("lfe", "merge"), round_to=(1, 8),
    )  # fmt: skip
    source = searcher(Space(few, depth=3), sampler=sampler, has_rungs=True, first=[])
    asked, again = list[tuple[str, Candidate]](), list[Candidate]()
    while isinstance(config := source.suggest(f"ray-{len(asked)}"), dict):
        candidate = Candidate.from_json(config["candidate"])
        tried_before = candidate in [each for _, each in asked]
        assert config["has_rungs"] is not tried_before
        again += [candidate] if tried_before else []
        stopped = replace(failed(config["id"], candidate, State.STOPPED), rungs=((0.9, 2.0),))
        is_good = candidate.round_to == 1 or tried_before
        tell(source, len(asked), measured(config["id"], candidate) if is_good else stopped)
        asked.append((config["id"], candidate))
    assert [each.round_to for each in again] == ([8] * 6 if sampler == "gp" else [])
    assert len(asked) == 12 + len(again)


def test_tpe_leaves_where_trials_are_stopped() -> None:
    """They are stopped because others had more at the same rung; at that rung all have more than in the end."""
    source = searcher(Space(SpaceConfig(exit_block=3), depth=3), has_rungs=True)
    tried = []
    for number in range(60):
        [(id, candidate)] = suggest(source, 1)
        value = candidate.cutoff_token
        noise = number * 7 % 11 / 110
        stopped = replace(failed(id, candidate, State.STOPPED), rungs=((0.8 + noise, 2.4 + noise),))
        ended = measured(id, candidate, top1=0.7 + noise, speedup=2 + noise)
        tell(source, number, replace(ended, rungs=((0.9 + noise, 3 + noise),)) if value < 0.5 else stopped)
        tried.append(value)
    assert sum(value > 0.5 for value in tried[-30:]) < 8  # 15 at random


def test_auto_takes_processes_until_there_are_many_trials() -> None:
    counts = (MOST_GP_TRIALS, MOST_GP_TRIALS + 1)
    sources = [searcher(space, sampler="auto", num_trials=count) for space in (SPACE, BOTH) for count in counts]
    assert [type(source._study.sampler).__name__ for source in sources] == ["_GPSampler", "_TPESampler"] * 2


def test_tune_may_pickle_it() -> None:
    """Tune saves its searcher to resume by."""
    source = searcher(on_suggest=lambda id, candidate: None)
    assert isinstance(cloudpickle.loads(cloudpickle.dumps(source)), StudySearcher)


@pytest.mark.parametrize(("sampler", "num_trials"), [("gp", 20), ("tpe", 60)])
def test_limits_are_told_as_constraints_and_the_search_keeps_them(sampler: str, num_trials: int) -> None:
    """Accuracy falls with speed; slower than 2 x is of no use, so that is not where to look."""
    space = Space(SpaceConfig(drop_budget=1.0, cutoff_channel=0.1, cutoff_token=0.5, token_share=0.5), depth=3)
    limits, dense = [parse_limit("speedup >= 2")], builders.measurement(1.0, 1.0)
    source = searcher(space, sampler=sampler, limits=limits, dense=dense)
    speedups, outcomes = [], []
    for number in range(num_trials):
        [(id, candidate)] = suggest(source, 1)
        speedups.append(1 / candidate.target_ratio)
        outcomes.append(measured(id, candidate, top1=candidate.target_ratio, speedup=speedups[-1]))
        tell(source, number, outcomes[-1])
    for each in (source, searcher(space, known=outcomes, limits=limits, dense=dense)):
        told = [trial.constraints["speedup >= 2"] for trial in trials(each)]
        assert told == pytest.approx([2 - speedup for speedup in speedups])
    last = speedups[num_trials // 2 :]
    assert sum(speedup >= 2 for speedup in last) / len(last) > 0.6  # blind choice: 0.375
