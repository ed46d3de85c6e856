"""A recorded sweep searched again: nearest answers, the simulated clock, what is left in the folder."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search import ledger
from search.config import Config, SpaceConfig, load_config
from search.errors import SweepError
from search.folder import Folder
from search.front import front_record, hypervolume_of, running_hypervolume
from search.outcome import Candidate, Outcome
from search.replay import Recorded, replay, replay_sweep
from search.searcher import Sampler, StudySearcher
from search.space import Space
from tests.search_tests import made, tiny
from tests.search_tests.test_space import Chooser

OPEN = SpaceConfig(drop_budget=(0.0, 2.0), exit_block=(2, 3))
SPACE = Space(OPEN, depth=3)
DENSE = made.measurement(1.0, 1.0)


def outcome(number: int, candidate: Candidate, seconds: float = 2.0) -> Outcome:
    """More accurate with more multiply-adds; the cut-off 0.1 is best."""
    lost = 0.3 * (1 - candidate.target_ratio) + abs(candidate.cutoff_channel - 0.1)
    measured = made.outcome(f"t{number:03d}", max(0.0, 1 - lost), 1 / candidate.target_ratio)
    return replace(measured, candidate=candidate, seconds=seconds)


OUTCOMES = [outcome(number, SPACE.choose(Chooser(seed=number))) for number in range(80)]


def searcher(**other: Any) -> StudySearcher:
    return StudySearcher(SPACE, **{"known": (), "sampler": "random", "seed": 0} | other)


def test_a_recorded_candidate_is_answered_with_its_own_outcome() -> None:
    recorded = Recorded(OUTCOMES, DENSE, SPACE)
    for each in random.Random(0).sample(OUTCOMES, 10):
        [answer] = recorded.answer(each.candidate, "t900")
        assert answer == replace(each, id="t900")


def test_another_is_answered_with_the_nearest_in_shares_of_the_ranges() -> None:
    near, far = (SPACE.clip(replace(OUTCOMES[0].candidate, target_ratio=ratio)) for ratio in (0.5, 0.9))
    recorded = Recorded([outcome(0, far), outcome(1, near)], DENSE, SPACE)
    asked = replace(near, target_ratio=0.6)
    [answer] = recorded.answer(asked, "t007")
    assert answer.candidate == asked
    assert answer.measurement == outcome(1, near).measurement
    # 0.05 of the target's range is 0.04, but much of the logarithm of the cut-off's range from 0.02 to 0.5 is as little
    lower, higher = (replace(near, cutoff_channel=cutoff) for cutoff in (0.02, 0.24))
    recorded = Recorded([outcome(0, lower), outcome(1, higher)], DENSE, SPACE)
    assert recorded.answer(replace(near, cutoff_channel=0.1), "t007")[0].measurement == outcome(1, higher).measurement
    assert recorded.answer(replace(near, cutoff_channel=0.05), "t007")[0].measurement == outcome(0, lower).measurement


def test_what_has_no_effect_is_no_distance() -> None:
    plain = replace(OUTCOMES[0].candidate, exit_block=2, drop_budget=(1.0, 1.0, 0.0))
    deep = replace(plain, exit_block=3, drop_budget=(1.0, 1.0, 1.0))
    recorded = Recorded([outcome(0, deep), outcome(1, plain)], DENSE, SPACE)
    assert recorded.answer(replace(plain, target_ratio=0.3), "t000")[0].measurement == outcome(1, plain).measurement


def test_a_trial_of_several_exits_is_answered_whole() -> None:
    first = outcome(4, OUTCOMES[0].candidate)
    recorded = Recorded([first, replace(first, id="t004.2", measurement=DENSE)], DENSE, SPACE)
    assert [each.id for each in recorded.answer(first.candidate, "t011")] == ["t011", "t011.2"]


def test_trials_end_in_the_order_of_the_simulated_clock() -> None:
    slow, quick = (SPACE.clip(replace(OUTCOMES[0].candidate, target_ratio=ratio)) for ratio in (1.0, 0.2))
    recorded = Recorded([outcome(0, slow, seconds=10.0), outcome(1, quick, seconds=3.0)], DENSE, SPACE)
    ended = [outcomes[0] for outcomes in replay(recorded, searcher(), 30, num_workers=2)]
    assert len({each.id for each in ended}) == 30
    assert [each.ended_s for each in ended] == sorted(each.ended_s for each in ended)
    assert [each.id for each in ended] != sorted(each.id for each in ended)  # a quick one overtakes a slow one
    busy = sum(each.seconds for each in ended)
    assert busy / 2 <= ended[-1].ended_s <= busy / 2 + 10.0


def test_one_worker_takes_the_sum_of_the_seconds() -> None:
    ended = list(replay(Recorded(OUTCOMES, DENSE, SPACE), searcher(), 12, num_workers=1))
    assert [outcomes[0].ended_s for outcomes in ended] == [2.0 * count for count in range(1, 13)]
    assert [outcomes[0].id for outcomes in ended] == [f"t{number:03d}" for number in range(12)]


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


# The table of digits


TABLE = Path(__file__).parents[1] / "data" / "digits_table"


@pytest.fixture(scope="module")
def table() -> Recorded:
    return Recorded.read(TABLE, load_config("digits"))


def test_the_recorded_table_is_of_real_digits_trials(table: Recorded) -> None:
    assert len({outcome.candidate for outcome in table.outcomes}) >= 300
    assert {outcome.candidate.exit_block for outcome in table.outcomes} == {3, 4, 5, 6}
    assert all(table.space.holds(outcome.candidate) for outcome in table.outcomes)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "grid"])
def test_every_sampler_searches_the_table(table: Recorded, sampler: Sampler) -> None:
    volumes = []
    for count in (12, 60):
        searcher = StudySearcher(
            table.space, known=(), sampler=sampler, seed=1, num_trials=count, dense=table.dense
        )  # fmt: skip
        outcomes = [each for some in replay(table, searcher, count, num_workers=2) for each in some]
        searcher.finish()
        assert len(outcomes) == count
        assert len({outcome.candidate for outcome in outcomes}) == count
        volumes.append(hypervolume_of(outcomes, table.dense))
    assert 0 < volumes[0] <= volumes[1] < hypervolume_of(table.outcomes, table.dense)


def test_a_search_of_the_table_learns(table: Recorded) -> None:
    """TPE's last trials are better than the first that it drew at random: they dominate more on average."""
    searcher = StudySearcher(table.space, known=(), sampler="tpe", seed=0, num_trials=100, dense=table.dense)
    outcomes = [each for some in replay(table, searcher, 100, num_workers=2) for each in some]
    searcher.finish()
    alone = [hypervolume_of([outcome], table.dense) for outcome in outcomes]
    assert sum(alone[-30:]) > 1.2 * sum(alone[10:40])


def test_a_search_that_runs_out_of_candidates_ends(table: Recorded) -> None:
    fixed = {"cutoff_channel": 0.1, "cutoff_token": 0.8, "drop_budget": 1.0, "token_share": 0.5, "target_ratio": 0.5}
    space = Space(SpaceConfig(**fixed, exit_block=(4, 5)), 6)
    searcher = StudySearcher(space, known=(), sampler="random", seed=0, first=[])
    outcomes = [each for some in replay(table, searcher, 50, num_workers=2) for each in some]
    assert sorted(outcome.candidate.exit_block for outcome in outcomes) == [4, 5]
