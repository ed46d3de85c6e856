"""A recorded sweep searched again: nearest candidates, the simulated clock, what is left in the folder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.commands.replay import Recorded, replay, replay_sweep
from search.config import Config
from search.errors import SweepError
from search.front import Front, hypervolume_of, running_hypervolume
from search.goal import Goal
from search.outcome import Candidate, Outcome, State
from search.recipe import load_config
from search.records import ledger
from search.records.folder import Folder
from search.space import Space
from search.suggest.ask import CandidateSearch, History
from search.suggest.rungs import Promotion
from search.suggest.samplers import Sampler, SamplerSettings
from search.trial import warm_start
from tests.search_tests import builders, tiny
from tests.search_tests.builders import papers_space
from tests.search_tests.test_space import Chooser

OPEN = papers_space(drop_budget=(0.0, 2.0), exit_block=(2, 3))
SPACE = Space(OPEN, depth=3)
DENSE = builders.measurement(1.0, 1.0)
GOAL = Goal(dense=DENSE)


def outcome(number: int, candidate: Candidate, seconds: float = 2.0) -> Outcome:
    """More accurate with more multiply-adds; the cut-off 0.1 is best."""
    lost = 0.3 * (1 - candidate.target_ratio) + abs(candidate.cutoff_channel - 0.1)
    measured = builders.outcome(f"t{number:03d}", max(0.0, 1 - lost), 1 / candidate.target_ratio)
    return replace(measured, candidate=candidate, seconds=seconds)


OUTCOMES = [outcome(number, SPACE.choose(Chooser(seed=number))) for number in range(80)]


def new_search(
    recorded: Recorded, first_candidates: Sequence[Candidate] | None = None, **settings: Any
) -> CandidateSearch:
    """A random search, seed 0, that begins with the space's first candidates."""
    if first_candidates is None:
        first_candidates = warm_start.first_candidates(recorded.space)
    return CandidateSearch(
        recorded.space,
        SamplerSettings(**{"sampler": "random", "seed": 0} | settings),
        History(first_candidates=first_candidates),
        Goal(dense=recorded.dense),
        nearest_allowed=recorded.nearest,
    )


def replayed(
    recorded: Recorded, num_trials: int, num_workers: int = 2, promotes: Promotion | None = None, **changes: Any
) -> list[Outcome]:
    """All outcomes of a search, in the order in which its trials end; `changes` are of `new_search`."""
    search = new_search(recorded, num_trials=num_trials, has_rungs=promotes is not None, **changes)
    outcomes = [one for outcomes in replay(recorded, search, num_trials, num_workers, promotes) for one in outcomes]
    search.close()
    return outcomes


def test_a_recorded_candidate_has_its_own_outcome() -> None:
    recorded = Recorded(OUTCOMES, DENSE, SPACE)
    for one in random.Random(0).sample(OUTCOMES, 10):
        [looked_up] = recorded.lookup(one.candidate, "t900")
        assert looked_up == replace(one, id="t900")


def test_what_was_not_recorded_has_no_outcome() -> None:
    with pytest.raises(KeyError):
        Recorded(OUTCOMES[1:], DENSE, SPACE).lookup(OUTCOMES[0].candidate, "t900")


def test_nearest_is_by_shares_of_the_ranges() -> None:
    near, far = (SPACE.clip(replace(OUTCOMES[0].candidate, target_ratio=ratio)) for ratio in (0.5, 0.9))
    recorded = Recorded([outcome(0, far), outcome(1, near)], DENSE, SPACE)
    assert recorded.nearest(replace(near, target_ratio=0.6)) == near
    assert recorded.nearest(replace(near, target_ratio=0.8)) == far
    # 0.05 of the target's range is 0.04, but much of the logarithm of the cut-off's range from 0.02 to 0.5 is as little
    lower, higher = (replace(near, cutoff_channel=cutoff) for cutoff in (0.02, 0.24))
    recorded = Recorded([outcome(0, lower), outcome(1, higher)], DENSE, SPACE)
    assert recorded.nearest(replace(near, cutoff_channel=0.1)) == higher
    assert recorded.nearest(replace(near, cutoff_channel=0.05)) == lower


def test_what_has_no_effect_is_no_distance() -> None:
    plain = replace(OUTCOMES[0].candidate, exit_block=2, drop_budget=(1.0, 1.0, 0.0))
    deep = replace(plain, exit_block=3, drop_budget=(1.0, 1.0, 1.0))
    recorded = Recorded([outcome(0, deep), outcome(1, plain)], DENSE, SPACE)
    assert recorded.nearest(replace(plain, target_ratio=0.3)) == plain


def test_of_two_outcomes_of_a_candidate_the_first_counts() -> None:
    once, twice = outcome(0, OUTCOMES[0].candidate), outcome(1, OUTCOMES[0].candidate, seconds=9.0)
    [looked_up] = Recorded([once, twice], DENSE, SPACE).lookup(OUTCOMES[0].candidate, "t003")
    assert looked_up.seconds == once.seconds


def test_what_was_recorded_outside_of_the_space_is_left_out() -> None:
    deeper = Space(papers_space(drop_budget=(0.0, 2.0), exit_block=3), depth=3)
    within = [one for one in OUTCOMES if one.candidate.exit_block == 3]
    assert 0 < len(within) < len(OUTCOMES)
    assert Recorded(OUTCOMES, DENSE, deeper).outcomes == tuple(within)
    with pytest.raises(SweepError, match="nothing was recorded within the recipe's search space"):
        Recorded(OUTCOMES, DENSE, Space(papers_space(drop_budget=7.0), depth=3))


def test_a_trial_of_several_exits_has_the_outcomes_of_all() -> None:
    first = outcome(4, OUTCOMES[0].candidate)
    recorded = Recorded([first, replace(first, id="t004.2", measurement=DENSE)], DENSE, SPACE)
    assert [one.id for one in recorded.lookup(first.candidate, "t011")] == ["t011", "t011.2"]


def test_trials_end_in_the_order_of_the_simulated_clock() -> None:
    table = [replace(one, seconds=3.0 + 7.0 * (number % 2)) for number, one in enumerate(OUTCOMES)]
    ended = replayed(Recorded(table, DENSE, SPACE), 30)
    assert len({one.id for one in ended}) == 30
    assert [one.ended_s for one in ended] == sorted(one.ended_s for one in ended)
    assert [one.id for one in ended] != sorted(one.id for one in ended)  # a quick one overtakes a slow one
    busy = sum(one.seconds for one in ended)
    assert busy / 2 <= ended[-1].ended_s <= busy / 2 + 10.0


def test_one_worker_takes_the_sum_of_the_seconds() -> None:
    ended = replayed(Recorded(OUTCOMES, DENSE, SPACE), 12, num_workers=1)
    assert [one.ended_s for one in ended] == [2.0 * count for count in range(1, 13)]
    assert [one.id for one in ended] == [f"t{number:03d}" for number in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a finished sweep."""
    place = Folder(tmp_path / "runs", "table")
    with ledger.Ledger(place.ledger) as book:
        book.append(*OUTCOMES)
    place.config.write_text("name: table\n")
    place.write_front(Front.of("table", OUTCOMES, GOAL, trials=len(OUTCOMES)))
    return place.path


def config(name: str, **search: Any) -> Config:
    return tiny.config(name=name, space=OPEN.model_dump(mode="json"), search={"trials": 30} | search)


def test_a_replayed_sweep_leaves_its_ledger_and_its_front(folder: Path) -> None:
    again = config("again", sampler="tpe")
    front = replay_sweep(again, folder.parent, Recorded.read(folder, again))
    place = Folder(folder.parent, "again")
    outcomes = ledger.read(place.ledger)
    assert place.read_front().to_json() == front.to_json()
    assert len(outcomes) == front.trials == 30
    assert front.hypervolume == pytest.approx(running_hypervolume(outcomes, GOAL)[-1])
    assert place.read_config() == again
    with pytest.raises(SweepError, match="exists; take another --name"):
        replay_sweep(again, folder.parent, Recorded.read(folder, again))


def test_the_same_seed_replays_the_same(folder: Path) -> None:
    fronts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        recipe = config(name, seed=seed, sampler="random")
        front = replay_sweep(recipe, folder.parent, Recorded.read(folder, recipe))
        fronts.append([point.candidate for point in front.points])
    assert fronts[0] == fronts[1] != fronts[2]


def test_limits_hold_in_a_replay(folder: Path) -> None:
    recipe = config("limited", sampler="tpe", limits=["top1 >= 0.9"])
    front = replay_sweep(recipe, folder.parent, Recorded.read(folder, recipe))
    assert [limit.text for limit in front.goal.limits] == ["top1 >= 0.9"]
    assert front.points
    assert all(point.measurement is not None and point.measurement.top1 >= 0.9 for point in front.points)


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="no sweep 'nothing'"):
        Recorded.read(tmp_path / "nothing", config("x"))


# Rungs


SPANS = ((0.0, 1.0), (2.5, 3.0))
WITH_RUNGS = [
    replace(one, rungs=((one.measurement.top1, one.measurement.speedup),) * 2, rung_spans=SPANS, seconds=10.0)
    for one in OUTCOMES
    if one.measurement is not None
]


def up_to(last: int) -> Promotion:
    """All go on from the rungs before one."""
    return lambda rung, values: rung < last


@pytest.mark.parametrize(("last", "seconds"), [(0, 1.0), (1, 3.0), (2, 10.0)])
def test_trials_end_at_the_rung_where_they_are_stopped(last: int, seconds: float) -> None:
    ended = replayed(Recorded(WITH_RUNGS, DENSE, SPACE), 12, 1, up_to(last))
    assert [one.ended_s for one in ended] == pytest.approx([seconds * count for count in range(1, 13)])
    recorded = {one.candidate: one for one in WITH_RUNGS}
    for one in ended:
        original = recorded[one.candidate]
        assert (one.rungs, one.rung_spans) == (original.rungs[: last + 1], SPANS[: last + 1])
        assert one.measurement == (original.measurement if last == 2 else None)
        assert one.state is (State.MEASURED if last == 2 else State.STOPPED)


def test_a_search_without_rungs_does_not_spend_their_time() -> None:
    ended = replayed(Recorded(WITH_RUNGS, DENSE, SPACE), 12, 1)
    assert [one.ended_s for one in ended] == pytest.approx([8.5 * count for count in range(1, 13)])
    assert all(one.state is State.MEASURED and one.rungs == () for one in ended)


def test_what_the_recorded_sweep_stopped_ends_there() -> None:
    stopped = [
        replace(one, state=State.STOPPED, reason="worse", measurement=None, plan=None, seconds=3.0)
        for one in WITH_RUNGS
    ]
    recorded = Recorded(stopped, DENSE, SPACE)
    with_rungs, without = replayed(recorded, 12, 1, up_to(2)), replayed(recorded, 12, 1)
    for ended in (with_rungs, without):
        assert len(ended) == 12
        assert all(one.state is State.STOPPED for one in ended)
    assert with_rungs[-1].ended_s == pytest.approx(36.0)


def test_trials_of_several_workers_come_to_their_rungs_in_the_order_of_the_clock() -> None:
    seen: list[tuple[int, float]] = []

    def promotes(rung: int, values: tuple[float, float]) -> bool:
        seen.append((rung, values[0]))
        return True

    slow, quick = WITH_RUNGS[0], replace(WITH_RUNGS[1], rung_spans=((0.0, 0.5), (0.5, 0.8)), seconds=9.0)
    recorded = Recorded([slow, quick], DENSE, SPACE)
    ended = replayed(recorded, 2, 2, promotes, first_candidates=[slow.candidate, quick.candidate])
    assert [accuracy for _, accuracy in seen] == [quick.rungs[0][0]] * 2 + [slow.rungs[0][0]] * 2
    assert [rung for rung, _ in seen] == [0, 1, 0, 1]
    assert [one.candidate for one in ended] == [quick.candidate, slow.candidate]


def test_a_stopped_candidate_that_is_tried_again_runs_to_its_end_and_is_looked_up_then() -> None:
    recorded = Recorded(WITH_RUNGS[:8], DENSE, SPACE)
    ended = replayed(recorded, 12, 1, lambda rung, values: values[0] < 0.8, sampler="gp")
    again = [one for number, one in enumerate(ended) if one.candidate in {e.candidate for e in ended[:number]}]
    stopped = {one.candidate for one in ended if one.state is State.STOPPED}
    assert again and {one.candidate for one in again} == stopped
    assert all(one.state is State.MEASURED and (one.rungs, one.seconds) == ((), 8.5) for one in again)
    assert len(ended) == 8 + len(again)

    both = Recorded(ended, DENSE, SPACE)
    assert all(both.lookup(one.candidate, "t900")[0].state is State.MEASURED for one in ended)


def test_a_replayed_sweep_stops_trials_if_the_recipe_says_so(tmp_path: Path) -> None:
    recipe = config("halved", reduction_factor=3, sampler="random")
    front = replay_sweep(recipe, tmp_path, Recorded(WITH_RUNGS, DENSE, SPACE))
    outcomes = ledger.read(Folder(tmp_path, "halved").ledger)
    states = {one.id: one.state for one in outcomes}
    assert {State.STOPPED, State.MEASURED} == set(states.values())
    assert all(states[point.id] is State.MEASURED for point in front.points)
    assert outcomes[-1].ended_s < 30 * 8.5 / 2  # what all of them would take on two workers without rungs


def test_rungs_that_were_not_recorded_cannot_be_replayed(tmp_path: Path) -> None:
    recipe = config("halved", reduction_factor=3)
    with pytest.raises(SweepError, match="passed no rungs"):
        replay_sweep(recipe, tmp_path, Recorded(OUTCOMES, DENSE, SPACE))
    assert not list(tmp_path.iterdir())


# The table of digits


TABLE = Path(__file__).parents[2] / "data" / "digits_table"


@pytest.fixture(scope="module")
def table() -> Recorded:
    return Recorded.read(TABLE, load_config("digits", sets=["space=papers"]))


def test_the_recorded_table_is_of_real_digits_trials(table: Recorded) -> None:
    assert len({outcome.candidate for outcome in table.outcomes}) >= 300
    assert {outcome.candidate.exit_block for outcome in table.outcomes} == {3, 4, 5, 6}
    assert all(table.space.holds(outcome.candidate) for outcome in table.outcomes)


@pytest.fixture(scope="module")
def learned(table: Recorded) -> list[Outcome]:
    """The trials of the sampler that learns fastest, and takes longest for it."""
    return replayed(table, 30, sampler="auto")


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "random", "grid"])
def test_every_sampler_searches_the_table(table: Recorded, learned: list[Outcome], sampler: Sampler) -> None:
    recorded = {one.candidate: one.measurement for one in reversed(table.outcomes)}  # of several the first
    outcomes = learned if sampler == "gp" else replayed(table, 30, sampler=sampler, seed=1)
    assert len({one.candidate for one in outcomes}) == len(outcomes)
    assert len(outcomes) == 30 or (sampler == "grid" and 15 < len(outcomes) < 30)  # two at one place
    assert all(recorded[one.candidate] == one.measurement for one in outcomes)
    goal = Goal(dense=table.dense)
    after_first, after_all = hypervolume_of(outcomes[:12], goal), hypervolume_of(outcomes, goal)
    assert 0 < after_first <= after_all <= hypervolume_of(table.outcomes, goal)


@pytest.mark.slow
def test_a_search_of_the_table_finds_more_in_less_seconds_than_chance(table: Recorded) -> None:
    goal = Goal(dense=table.dense)
    learned, at_random = replayed(table, 60, sampler="auto"), replayed(table, 80, seed=0)
    assert learned[-1].ended_s < 0.6 * at_random[-1].ended_s
    assert hypervolume_of(learned, goal) > hypervolume_of(at_random, goal)
    assert hypervolume_of(learned, goal) > 0.95 * hypervolume_of(table.outcomes, goal)


def test_the_table_with_rungs_tells_when_each_trial_was_measured_at_them() -> None:
    config = load_config("digits", sets=["space=papers", "space.recovery=distill", "distill.epochs=48"])
    recorded = Recorded.read(TABLE.with_name("digits_rungs"), config)
    assert len({outcome.candidate for outcome in recorded.outcomes}) >= 90
    for outcome in recorded.outcomes:
        assert outcome.state is State.MEASURED
        assert len(outcome.rungs) == len(outcome.rung_spans) == 3
        times = [0.0, *(time for span in outcome.rung_spans for time in span), outcome.seconds]
        assert times == sorted(times)


def test_a_table_is_exhausted_once_each_of_its_candidates_was_tried() -> None:
    recorded = Recorded(OUTCOMES[:9], DENSE, SPACE)
    for sampler in ("random", "gp"):
        outcomes = replayed(recorded, 50, sampler=sampler, first_candidates=[])
        assert {one.candidate for one in outcomes} == {one.candidate for one in OUTCOMES[:9]}
        assert len(outcomes) == 9
