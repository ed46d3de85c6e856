"""A recorded sweep searched again: nearest answers, the simulated clock, what is left in the folder."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.cluster.scheduler import NonDominatedHalving
from search.cluster.searcher import StudySearcher
from search.commands.replay import Recorded, replay, replay_sweep
from search.config import Config, SpaceConfig, load_config
from search.errors import SweepError
from search.front import front_record, hypervolume_of, running_hypervolume
from search.outcome import Candidate, Outcome, State
from search.records import ledger
from search.records.folder import Folder
from search.space import Space
from search.suggest.samplers import Sampler
from tests.search_tests import builders, tiny
from tests.search_tests.test_space import Chooser

OPEN = SpaceConfig(drop_budget=(0.0, 2.0), exit_block=(2, 3))
SPACE = Space(OPEN, depth=3)
DENSE = builders.measurement(1.0, 1.0)


def outcome(number: int, candidate: Candidate, seconds: float = 2.0) -> Outcome:
    """More accurate with more multiply-adds; the cut-off 0.1 is best."""
    lost = 0.3 * (1 - candidate.target_ratio) + abs(candidate.cutoff_channel - 0.1)
    measured = builders.outcome(f"t{number:03d}", max(0.0, 1 - lost), 1 / candidate.target_ratio)
    return replace(measured, candidate=candidate, seconds=seconds)


OUTCOMES = [outcome(number, SPACE.choose(Chooser(seed=number))) for number in range(80)]


def searcher(recorded: Recorded, **other: Any) -> StudySearcher:
    settings: dict[str, Any] = {"known": (), "sampler": "random", "seed": 0, "dense": recorded.dense}
    return StudySearcher(recorded.space, **settings | {"nearest_allowed": recorded.nearest} | other)


def searched(recorded: Recorded, num_trials: int, num_workers: int = 2, **other: Any) -> list[Outcome]:
    source = searcher(recorded, num_trials=num_trials, **other)
    outcomes = [each for some in replay(recorded, source, num_trials, num_workers) for each in some]
    source.finish()
    return outcomes


def test_a_recorded_candidate_is_answered_with_its_own_outcome() -> None:
    recorded = Recorded(OUTCOMES, DENSE, SPACE)
    for each in random.Random(0).sample(OUTCOMES, 10):
        [answer] = recorded.answer(each.candidate, "t900")
        assert answer == replace(each, id="t900")


def test_what_was_not_recorded_has_no_answer() -> None:
    with pytest.raises(KeyError):
        Recorded(OUTCOMES[1:], DENSE, SPACE).answer(OUTCOMES[0].candidate, "t900")


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


def test_of_two_outcomes_of_a_candidate_the_first_is_the_answer() -> None:
    once, twice = outcome(0, OUTCOMES[0].candidate), outcome(1, OUTCOMES[0].candidate, seconds=9.0)
    [answer] = Recorded([once, twice], DENSE, SPACE).answer(OUTCOMES[0].candidate, "t003")
    assert answer.seconds == once.seconds


def test_what_was_recorded_outside_of_the_space_is_left_out() -> None:
    deeper = Space(SpaceConfig(drop_budget=(0.0, 2.0), exit_block=3), depth=3)
    within = [each for each in OUTCOMES if each.candidate.exit_block == 3]
    assert 0 < len(within) < len(OUTCOMES)
    assert Recorded(OUTCOMES, DENSE, deeper).outcomes == tuple(within)
    with pytest.raises(SweepError, match="nothing was recorded within the recipe's search space"):
        Recorded(OUTCOMES, DENSE, Space(SpaceConfig(drop_budget=7.0), depth=3))


def test_a_trial_of_several_exits_is_answered_whole() -> None:
    first = outcome(4, OUTCOMES[0].candidate)
    recorded = Recorded([first, replace(first, id="t004.2", measurement=DENSE)], DENSE, SPACE)
    assert [each.id for each in recorded.answer(first.candidate, "t011")] == ["t011", "t011.2"]


def test_trials_end_in_the_order_of_the_simulated_clock() -> None:
    table = [replace(each, seconds=3.0 + 7.0 * (number % 2)) for number, each in enumerate(OUTCOMES)]
    ended = searched(Recorded(table, DENSE, SPACE), 30)
    assert len({each.id for each in ended}) == 30
    assert [each.ended_s for each in ended] == sorted(each.ended_s for each in ended)
    assert [each.id for each in ended] != sorted(each.id for each in ended)  # a quick one overtakes a slow one
    busy = sum(each.seconds for each in ended)
    assert busy / 2 <= ended[-1].ended_s <= busy / 2 + 10.0


def test_one_worker_takes_the_sum_of_the_seconds() -> None:
    ended = searched(Recorded(OUTCOMES, DENSE, SPACE), 12, num_workers=1)
    assert [each.ended_s for each in ended] == [2.0 * count for count in range(1, 13)]
    assert [each.id for each in ended] == [f"t{number:03d}" for number in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a finished sweep."""
    made_at = Folder(tmp_path / "runs", "table")
    with ledger.Ledger(made_at.ledger) as book:
        book.append(*OUTCOMES)
    made_at.config.write_text("name: table\n")
    made_at.front.write_text(json.dumps(front_record("table", OUTCOMES, DENSE) | {"trials": len(OUTCOMES)}))
    return made_at.path


def config(name: str, **search: Any) -> Config:
    return tiny.config(name=name, space=OPEN.model_dump(mode="json"), search={"trials": 30} | search)


def test_a_replayed_sweep_leaves_its_ledger_and_its_front(folder: Path) -> None:
    again = config("again", sampler="tpe")
    record = replay_sweep(again, folder.parent, Recorded.read(folder, again))
    place = Folder(folder.parent, "again")
    outcomes = ledger.read(place.ledger)
    assert place.read_front() == json.loads(json.dumps(record))
    assert len(outcomes) == record["trials"] == 30
    assert record["hypervolume"] == pytest.approx(running_hypervolume(outcomes, DENSE)[-1])
    assert place.read_config() == again
    with pytest.raises(SweepError, match="exists; take another --name"):
        replay_sweep(again, folder.parent, Recorded.read(folder, again))


def test_the_same_seed_replays_the_same(folder: Path) -> None:
    fronts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        asked = config(name, seed=seed, sampler="random")
        points = replay_sweep(asked, folder.parent, Recorded.read(folder, asked))["points"]
        fronts.append([point["candidate"] for point in points])
    assert fronts[0] == fronts[1] != fronts[2]


def test_limits_hold_in_a_replay(folder: Path) -> None:
    asked = config("limited", sampler="tpe", limits=["top1 >= 0.9"])
    record = replay_sweep(asked, folder.parent, Recorded.read(folder, asked))
    assert record["limits"] == ["top1 >= 0.9"]
    assert record["points"]
    assert all(point["top1"] >= 0.9 for point in record["points"])


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="no sweep 'nothing'"):
        Recorded.read(tmp_path / "nothing", config("x"))


# Rungs


SPANS = ((0.0, 1.0), (2.5, 3.0))
WITH_RUNGS = [
    replace(each, rungs=((each.measurement.top1, each.measurement.speedup),) * 2, rung_spans=SPANS, seconds=10.0)
    for each in OUTCOMES
    if each.measurement is not None
]


class Until(NonDominatedHalving):
    """All go on from the rungs before one."""

    def __init__(self, last: int) -> None:
        super().__init__(3)
        self.last = last

    def promotes(self, rung: int, values: tuple[float, float]) -> bool:
        return rung < self.last


def replayed(table: list[Outcome], scheduler: NonDominatedHalving | None, **other: Any) -> list[Outcome]:
    recorded, count = Recorded(table, DENSE, SPACE), 12
    source = searcher(recorded, has_rungs=scheduler is not None, **other)
    outcomes = [each for some in replay(recorded, source, count, 1, scheduler) for each in some]
    source.finish()
    return outcomes


@pytest.mark.parametrize(("last", "seconds"), [(0, 1.0), (1, 3.0), (2, 10.0)])
def test_trials_end_at_the_rung_where_they_are_stopped(last: int, seconds: float) -> None:
    ended = replayed(WITH_RUNGS, Until(last))
    assert [each.ended_s for each in ended] == pytest.approx([seconds * count for count in range(1, 13)])
    recorded = {each.candidate: each for each in WITH_RUNGS}
    for each in ended:
        whole = recorded[each.candidate]
        assert (each.rungs, each.rung_spans) == (whole.rungs[: last + 1], SPANS[: last + 1])
        assert each.measurement == (whole.measurement if last == 2 else None)
        assert each.state is (State.MEASURED if last == 2 else State.STOPPED)


def test_a_search_without_rungs_does_not_spend_their_time() -> None:
    ended = replayed(WITH_RUNGS, None)
    assert [each.ended_s for each in ended] == pytest.approx([8.5 * count for count in range(1, 13)])
    assert all(each.state is State.MEASURED and each.rungs == () for each in ended)


def test_what_the_recorded_sweep_stopped_ends_there() -> None:
    stopped = [
        replace(each, state=State.STOPPED, reason="worse", measurement=None, plan=None, seconds=3.0)
        for each in WITH_RUNGS
    ]
    for scheduler in (Until(2), None):
        ended = replayed(stopped, scheduler)
        assert len(ended) == 12
        assert all(each.state is State.STOPPED for each in ended)
    assert replayed(stopped, Until(2))[-1].ended_s == pytest.approx(36.0)


def test_trials_of_several_workers_come_to_their_rungs_in_the_order_of_the_clock() -> None:
    seen: list[tuple[int, float]] = []

    class Watching(Until):
        def promotes(self, rung: int, values: tuple[float, float]) -> bool:
            seen.append((rung, values[0]))
            return True

    slow, quick = WITH_RUNGS[0], replace(WITH_RUNGS[1], rung_spans=((0.0, 0.5), (0.5, 0.8)), seconds=9.0)
    recorded = Recorded([slow, quick], DENSE, SPACE)
    source = searcher(recorded, first=[slow.candidate, quick.candidate], has_rungs=True)
    ended = [each.candidate for some in replay(recorded, source, 2, 2, Watching(2)) for each in some]
    source.finish()
    assert [values for _, values in seen] == [quick.rungs[0][0]] * 2 + [slow.rungs[0][0]] * 2
    assert [rung for rung, _ in seen] == [0, 1, 0, 1]
    assert ended == [quick.candidate, slow.candidate]


def test_who_is_tried_again_runs_to_its_end_and_answers_then() -> None:
    class FewAtFirst(Until):
        def promotes(self, rung: int, values: tuple[float, float]) -> bool:
            return values[0] < 0.8

    ended = replayed(WITH_RUNGS[:8], FewAtFirst(0), sampler="gp", num_trials=12)
    again = [each for number, each in enumerate(ended) if each.candidate in {e.candidate for e in ended[:number]}]
    stopped = {each.candidate for each in ended if each.state is State.STOPPED}
    assert again and {each.candidate for each in again} == stopped
    assert all(each.state is State.MEASURED and (each.rungs, each.seconds) == ((), 8.5) for each in again)
    assert len(ended) == 8 + len(again)

    both = Recorded(ended, DENSE, SPACE)
    assert all(both.answer(each.candidate, "t900")[0].state is State.MEASURED for each in ended)


def test_a_replayed_sweep_stops_trials_if_the_recipe_says_so(tmp_path: Path) -> None:
    asked = config("halved", reduction_factor=3, sampler="random")
    record = replay_sweep(asked, tmp_path, Recorded(WITH_RUNGS, DENSE, SPACE))
    outcomes = ledger.read(Folder(tmp_path, "halved").ledger)
    states = {each.id: each.state for each in outcomes}
    assert {State.STOPPED, State.MEASURED} == set(states.values())
    assert all(states[point["id"]] is State.MEASURED for point in record["points"])
    assert outcomes[-1].ended_s < 30 * 8.5 / 2  # what all of them would take on two workers without rungs


def test_rungs_that_were_not_recorded_cannot_be_replayed(tmp_path: Path) -> None:
    asked = config("halved", reduction_factor=3)
    with pytest.raises(SweepError, match="passed no rungs"):
        replay_sweep(asked, tmp_path, Recorded(OUTCOMES, DENSE, SPACE))
    assert not list(tmp_path.iterdir())


# The table of digits


TABLE = Path(__file__).parents[2] / "data" / "digits_table"


@pytest.fixture(scope="module")
def table() -> Recorded:
    return Recorded.read(TABLE, load_config("digits"))


def test_the_recorded_table_is_of_real_digits_trials(table: Recorded) -> None:
    assert len({outcome.candidate for outcome in table.outcomes}) >= 300
    assert {outcome.candidate.exit_block for outcome in table.outcomes} == {3, 4, 5, 6}
    assert all(table.space.holds(outcome.candidate) for outcome in table.outcomes)


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "random", "grid"])
def test_every_sampler_searches_the_table(table: Recorded, sampler: Sampler) -> None:
    recorded = {each.candidate: each.measurement for each in reversed(table.outcomes)}  # of several the first
    volumes = []
    for count in (12, 40):
        outcomes = searched(table, count, sampler=sampler, seed=1)
        assert len({each.candidate for each in outcomes}) == len(outcomes)
        assert len(outcomes) == count or (sampler == "grid" and count / 2 < len(outcomes) < count)  # two at one place
        assert all(recorded[each.candidate] == each.measurement for each in outcomes)
        volumes.append(hypervolume_of(outcomes, table.dense))
    assert 0 < volumes[0] <= volumes[1] <= hypervolume_of(table.outcomes, table.dense)


def test_a_search_of_the_table_finds_more_in_less_trials_than_chance(table: Recorded) -> None:
    best = hypervolume_of(table.outcomes, table.dense)
    learned = hypervolume_of(searched(table, 40, sampler="auto", seed=0), table.dense)
    drawn = hypervolume_of(searched(table, 80, sampler="random", seed=0), table.dense)
    assert learned > drawn
    assert learned > 0.95 * best


def test_the_table_with_rungs_tells_when_each_trial_was_measured_at_them() -> None:
    config = load_config("digits", sets=["space.recovery=distill", "distill.epochs=48"])
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
        outcomes = searched(recorded, 50, sampler=sampler, first=[])
        assert {each.candidate for each in outcomes} == {each.candidate for each in OUTCOMES[:9]}
        assert len(outcomes) == 9
