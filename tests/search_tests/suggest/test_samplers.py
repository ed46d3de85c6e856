"""The samplers: what TPE is told, against a study of Optuna's, and where each goes once it has learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
from optuna import create_study
from optuna.samplers import TPESampler
from optuna.trial import create_trial

from search.goal import Goal
from search.outcome import State
from search.space import Space
from search.suggest.samplers import NUM_RANDOM, Sampler, SamplerSettings, distributions_of
from tests.search_tests import builders
from tests.search_tests.builders import papers_space
from tests.search_tests.suggest.searches import (
    CHOICES,
    SPACE,
    ask,
    failed,
    first_candidates,
    measured,
    new_search,
    tell,
)


def test_auto_is_gp_however_many_trials_there_are() -> None:
    assert {SamplerSettings(sampler="auto", seed=0, num_trials=count).chosen for count in (0, 50, 1000)} == {"gp"}
    assert SamplerSettings(sampler="nsga2", seed=0, num_trials=10).chosen == "nsga2"


@pytest.mark.parametrize(
    ("sampler", "name"),
    [("gp", "GaussianSampler"), ("tpe", "TPESampler"), ("nsga2", "NSGAIISampler"), ("random", "RandomSampler")],
)
def test_a_study_has_the_sampler_that_was_chosen(sampler: Sampler, name: str) -> None:
    assert type(new_search(sampler=sampler).learner.study.sampler).__name__ == name


@pytest.mark.parametrize("space", [SPACE, CHOICES], ids=["numbers", "choices"])
def test_tpe_suggests_what_optunas_own_does(space: Space) -> None:
    goal = Goal.of(builders.DENSE, "top1", ["top1 >= 0.5"])
    search = new_search(space, goal, seed=3)
    distributions, num_first = distributions_of(space), len(first_candidates(space))
    optunas = TPESampler(seed=3, n_startup_trials=NUM_RANDOM, constant_liar=True)
    study = create_study(directions=["maximize", "maximize"], sampler=optunas)
    for number in range(num_first + 20):
        suggestion = ask(search)
        candidate = suggestion.candidate
        top1, speedup = candidate.target_ratio, 2 - candidate.token_share
        excesses = goal.excesses(builders.measurement(top1, speedup))
        if number < num_first:
            params = space.values_of(candidate)
            given = create_trial(
                params=params, distributions=distributions, values=[top1, speedup], constraints=excesses
            )
            study.add_trial(given)
        else:
            trial = study.ask(distributions)
            assert space.of_values(space.snap(trial.params)) == candidate
            if number % 7 == 0:
                continue  # it runs on
            for text, excess in excesses.items():
                trial.set_constraint(text, excess)
            study.tell(trial, [top1, speedup])
        tell(search, suggestion, top1=top1, speedup=speedup)


def test_tpe_goes_where_it_was_good() -> None:
    search, distances = new_search(Space(papers_space(exit_block=3), depth=3)), list[float]()
    for _ in range(80):
        suggestion = ask(search)
        distances.append(abs(suggestion.candidate.cutoff_token - 0.275))
        tell(search, suggestion, top1=1 - distances[-1], speedup=1 - distances[-1])
    assert sum(distances[-20:]) < 0.5 * sum(distances[:20])


def test_tpe_learns_which_choice_is_better() -> None:
    search, is_good = new_search(CHOICES), list[bool]()
    for _ in range(60):
        suggestion = ask(search)
        candidate = suggestion.candidate
        value = (candidate.method == "global") + (candidate.token_reduction == "merge") / 2 + candidate.target_ratio / 9
        tell(search, suggestion, top1=value, speedup=value)
        is_good.append(candidate.method == "global" and candidate.token_reduction == "merge")
    assert sum(is_good[-20:]) > 12  # blind choice: 1 of 6, so 3


def test_tpe_leaves_where_trials_are_stopped() -> None:
    """They are stopped because others had more at the same rung; at that rung all have more than in the end."""
    search, cutoffs = new_search(Space(papers_space(exit_block=3), depth=3), has_rungs=True), list[float]()
    for number in range(60):
        suggestion = ask(search)
        cutoffs.append(suggestion.candidate.cutoff_token)
        noise = number * 7 % 11 / 110
        stopped = failed(suggestion.id, suggestion.candidate, State.STOPPED)
        stopped = replace(stopped, rungs=((0.8 + noise, 2.4 + noise),))
        ended = measured(suggestion.id, suggestion.candidate, top1=0.7 + noise, speedup=2 + noise)
        ended = replace(ended, rungs=((0.9 + noise, 3 + noise),))
        search.tell(suggestion.id, ended if cutoffs[-1] < 0.5 else stopped)
    assert sum(cutoff > 0.5 for cutoff in cutoffs[-30:]) < 8  # 15 at random


@pytest.mark.parametrize(("sampler", "num_trials"), [("gp", 20), ("tpe", 60)])
def test_the_search_keeps_limits(sampler: Sampler, num_trials: int) -> None:
    """Accuracy falls with speed; slower than 2 x is of no use, so that is not where to look."""
    space = Space(papers_space(drop_budget=1.0, cutoff_channel=0.1, cutoff_token=0.5, token_share=0.5), depth=3)
    goal = Goal.of(builders.measurement(1.0, 1.0), "top1", ["speedup >= 2"])
    search, speedups = new_search(space, goal, sampler=sampler), list[float]()
    for _ in range(num_trials):
        suggestion = ask(search)
        speedups.append(1 / suggestion.candidate.target_ratio)
        tell(search, suggestion, top1=suggestion.candidate.target_ratio, speedup=speedups[-1])
    excesses = [trial.constraints["speedup >= 2"] for trial in search.learner.study.trials]
    assert excesses == pytest.approx([2 - speedup for speedup in speedups])
    last = speedups[num_trials // 2 :]
    assert sum(speedup >= 2 for speedup in last) / len(last) > 0.6  # blind choice: 0.375
