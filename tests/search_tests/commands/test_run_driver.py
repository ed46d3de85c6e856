"""The order in which a sweep hands out its work, and what it does with what comes of it; and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pruning.errors import ModelError
from pruning.methods.profile import Profile
from search.commands.run_driver import SweepDriver, calling_on_interrupt
from search.method import METHODS
from search.outcome import Candidate, State
from search.records import ledger
from search.records.checkpoints import Checkpoint, Checkpoints
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.space import Space
from search.trial.context import ContextPart, TrialContext
from search.trial.first_look import FirstLook
from search.trial.jobs import LOOK, Looked
from search.trial.prepare import is_whole
from search.trial.warm_start import candidates_between, early_candidates, first_candidates, propose
from tests.search_tests import builders, tiny
from tests.search_tests.commands.driving import SPACE, Run

STEPS = ["sensitivity-3", "exits", "widths-lfe", "curves", "profile-lfe", "sensitivity-2"]
EARLY = early_candidates(Space(tiny.config(space=SPACE).space, tiny.DEPTH))
"""The dense model, and the model cut at block 2."""


def trial_ids(count: int, first: int = 0) -> list[str]:
    return [f"t{number:03d}" for number in range(first, first + count)]


def rebuilds(*ids: str) -> list[str]:
    """The names of the jobs that build these and the dense model, which has a test accuracy."""
    return [f"rebuild-{trial_id}" for trial_id in (*ids, "dense")]


# The order of the work


def test_one_slot_looks_tries_what_needs_no_profile_prepares_searches_and_confirms(tmp_path: Path) -> None:
    run = Run(tmp_path).to_the_end()
    assert run.names == [
        LOOK, "t000", "exits", "t001", "sensitivity-3", "widths-lfe", "curves", "profile-lfe", "sensitivity-2",
        "t002", "t003", "t004", "timing", *rebuilds(*trial_ids(5)),
    ]  # fmt: skip
    assert [suggestion.candidate for suggestion in run.trials[:2]] == EARLY
    assert all(map(is_whole, EARLY))
    assert run.watcher.of("prepared") == [[9.0]]
    assert run.driver.prepared_s == 9.0
    assert sorted(run.parts.written) == sorted(STEPS)
    assert run.driver.ended_by == "trials"


def test_two_slots_prepare_beside_the_look_and_after_the_first_trials(tmp_path: Path) -> None:
    run = Run(tmp_path, num_slots=2).to_the_end()
    assert run.names[:2] == [LOOK, "sensitivity-3"]
    assert run.piece("sensitivity-3").begin == 0.0
    assert run.names[2:9] == ["t000", "exits", "t001", *STEPS[2:]]
    assert run.names[9:12] == trial_ids(3, first=2)
    assert sorted(run.parts.written) == sorted(STEPS)  # also the part that was there before the cache was
    assert len({piece.slot for piece in run.pieces if piece.name in rebuilds(*trial_ids(5))}) == 2


def test_eight_slots_do_all_that_there_is_at_once_and_nothing_twice(tmp_path: Path) -> None:
    run = Run(tmp_path, num_slots=8).to_the_end()
    assert len(set(run.names)) == len(run.names)
    at_look = [piece.name for piece in run.pieces if piece.begin == 0.0]
    assert at_look == [LOOK, "sensitivity-3"]  # the rest is not known to be of use, or waits for the exits
    after_look = [piece.name for piece in run.pieces if piece.begin == 1.0]
    assert set(after_look) == {*STEPS[1:], *trial_ids(2)}
    assert sorted(suggestion.id for suggestion in run.trials) == trial_ids(5)
    timing = run.piece("timing")
    assert timing.begin >= max(piece.end for piece in run.pieces if piece.name.startswith("t0"))
    assert {run.piece(name).begin for name in rebuilds(*trial_ids(5))} == {timing.end}


@pytest.mark.parametrize("num_slots", [1, 2])
def test_where_all_is_cached_nothing_is_prepared(tmp_path: Path, num_slots: int) -> None:
    run = Run(tmp_path, num_slots=num_slots, known=STEPS).to_the_end()
    assert run.names[:6] == [LOOK, *trial_ids(5)]
    assert run.watcher.of("prepared") == [[1.0]]  # with the look
    assert run.parts.written == []


def test_a_step_that_is_known_is_not_measured_again(tmp_path: Path) -> None:
    run = Run(tmp_path, known=["exits", "curves", "profile-lfe"]).to_the_end()
    assert [name for name in run.names if name in STEPS] == ["sensitivity-3", "widths-lfe", "sensitivity-2"]
    assert "exits" in run.pieces[-1].work.needs or run.piece("t001").work[1] == (LOOK, "exits")


@pytest.mark.parametrize("num_slots", [1, 2, 3, 8])
@pytest.mark.parametrize("trials", [1, 2, 7])
def test_as_many_trials_start_as_are_wanted(tmp_path: Path, num_slots: int, trials: int) -> None:
    run = Run(tmp_path, num_slots=num_slots, search__trials=trials).to_the_end()
    assert sorted(suggestion.id for suggestion in run.trials) == trial_ids(trials)
    assert run.watcher.of("started") == [[suggestion.id] for suggestion in run.trials]
    assert len(run.driver.outcomes) == len(ledger.read(run.sweep.folder.ledger)) == trials
    run.driver.close()
    assert sorted(run.log.logged) == trial_ids(trials)
    assert run.watcher.of("start") == [[0, trials, None]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_slots", [1, 3])
def test_sweeps_of_every_method_come_to_their_end(tmp_path: Path, method: str, num_slots: int) -> None:
    reductions = "merge" if METHODS[method].is_schedule else ["lfe", "none"]  # type: ignore[index]
    space = {"method": method, "exit_block": [2, 3], "token_reduction": reductions, "round_to": [8, "auto"]}
    run = Run(tmp_path, num_slots=num_slots, space=space, search__trials=9).to_the_end()
    assert len(run.driver.outcomes) == 9
    assert len(run.watcher.of("prepared")) <= 1


@pytest.mark.parametrize("slow", [LOOK, *STEPS, "trial", "time", "rebuild"])
def test_work_that_takes_long_holds_up_only_what_needs_it(tmp_path: Path, slow: str) -> None:
    run = Run(tmp_path, num_slots=2, seconds={slow: 50.0}, search__trials=12).to_the_end()
    assert len(run.driver.outcomes) == 12
    others = [piece for piece in run.pieces if slow not in (piece.name, getattr(piece.work, "kind", "trial"))]
    assert others


def test_candidates_that_the_profile_proposes_come_once_all_is_prepared(tmp_path: Path, context: TrialContext) -> None:
    run = Run(tmp_path, search__trials=7, space=SPACE | {"round_to": 8})
    profile = context.profiles["lfe"]
    assert isinstance(profile, Profile)
    run.products = {
        "profile-lfe": ContextPart(profiles={"lfe": profile}),
        "exits": ContextPart(exit_heads={2: context.exit_heads[2]}),
    }
    run.to_the_end()
    proposed = propose(context, run.sweep.space)
    expected = [one for one in first_candidates(run.sweep.space, proposed) if one not in EARLY]
    assert len(proposed) >= 4 and expected[0] == proposed[0]
    assert [suggestion.candidate for suggestion in run.trials[2:]] == expected[:5]


def test_a_slot_that_waits_for_the_profile_tries_more_targets_of_the_schedule(tmp_path: Path) -> None:
    space = SPACE | {"method": ["global", "constant"], "token_reduction": "merge", "exit_block": tiny.DEPTH}
    run = Run(tmp_path, num_slots=2, space=space, seconds={"profile-merge": 2.5}, search__trials=12).to_the_end()
    between = candidates_between(run.sweep.space)
    early = early_candidates(run.sweep.space)
    candidates = [suggestion.candidate for suggestion in run.trials]
    assert candidates[: len(early)] == early
    tried = [one for one in candidates if one in between]
    assert 0 < len(tried) < len(between)
    assert candidates[len(early) : len(early) + len(tried)] == tried == between[: len(tried)]
    prepared_s = run.driver.prepared_s
    assert prepared_s is not None
    assert all(piece.begin < prepared_s for piece in run.pieces if getattr(piece.work, "kind", None) == "step")


def test_the_front_of_earlier_sweeps_comes_after_what_needs_no_profile(tmp_path: Path) -> None:
    space = Space(tiny.config(space=SPACE).space, tiny.DEPTH)
    candidates = [space.clip(builders.candidate(target_ratio=0.3 + number / 10)) for number in range(3)]
    prior = [
        replace(builders.outcome(f"t{number:03d}", 0.8 - top1_lost, 1.5 + number), candidate=candidate)
        for number, (candidate, top1_lost) in enumerate(zip(candidates, (0.0, 0.3, 0.1), strict=True))
    ]
    run = Run(tmp_path, prior_outcomes=prior).to_the_end()
    assert [suggestion.candidate for suggestion in run.trials[:4]] == [*EARLY, candidates[0], candidates[2]]


# Resumed


def resumed(folder: Path, num_done: int, *unfinished: Candidate, **changes: Any) -> Run:
    """A run of a sweep that has trials already, and some that were begun."""
    own = Folder(folder, "tiny")
    earlier = Run(folder, search__trials=num_done).to_the_end()
    earlier.sweep.ledger.close()
    for number, candidate in enumerate(unfinished):
        Checkpoints(own.checkpoints).write(
            Checkpoint(id=f"t{num_done + number:03d}", candidate=candidate, state={"epoch": 3})
        )
    return Run(folder, **changes)


def test_a_resumed_sweep_goes_on_with_what_it_had_begun(tmp_path: Path) -> None:
    begun = [replace(EARLY[0], target_ratio=0.5), replace(EARLY[0], target_ratio=0.4)]
    run = resumed(tmp_path, 2, *begun, search__trials=6).to_the_end()
    assert [suggestion.candidate for suggestion in run.trials[:2]] == begun
    assert [suggestion.is_resumed for suggestion in run.trials] == [True, True, False, False]
    assert [suggestion.id for suggestion in run.trials] == trial_ids(4, first=2)
    assert run.watcher.of("start") == [[2, 6, None]]
    assert [outcome.id for outcome in run.driver.outcomes] == trial_ids(6)
    assert not set(EARLY) & {suggestion.candidate for suggestion in run.trials}  # tried before


def test_a_trial_that_was_begun_is_not_tried_twice_and_no_sampler_is_asked_before_all_is_prepared(
    tmp_path: Path,
) -> None:
    run = resumed(tmp_path, 1, EARLY[1], search__trials=5).to_the_end()
    assert run.trials[0].candidate == EARLY[1]
    assert len({suggestion.candidate for suggestion in run.trials}) == len(run.trials)
    assert run.names[:3] == [LOOK, "exits", "t001"]
    events = run.watcher.events
    assert events.index(("started", "t002")) > events.index(("prepared", 8.0))


def test_a_resumed_sweep_that_has_all_its_trials_only_confirms(tmp_path: Path) -> None:
    run = resumed(tmp_path, 3, search__trials=3).to_the_end()
    # Two candidates of the front need parts that are not cached.
    assert run.trials == []
    assert run.names[0] == LOOK
    assert "timing" in run.names
    needed = {need for piece in run.pieces if piece.name not in STEPS for need in getattr(piece.work, "needs", ())}
    assert {name for name in run.names if name in STEPS} - {"sensitivity-3"} <= needed
    assert run.driver.ended_by == "trials"
    assert len(run.driver.confirmation.result().outcomes) == 3


# The end


def test_from_the_deadline_on_no_trial_starts_and_the_confirmation_has_its_time(tmp_path: Path) -> None:
    run = Run(tmp_path, known=STEPS, search__trials=500, search__time_budget=30.0).to_the_end()
    assert run.driver.ended_by == "time"
    assert 3 < len(run.trials) < 29
    assert run.now < 40.0
    assert run.watcher.of("start") == [[0, 500, 30.0]]
    last = run.trials[-1].id
    begin = run.piece(last).begin
    before = [outcome for outcome in run.driver.outcomes if outcome.id < last]
    assert begin + 1.0 + run.driver.confirmation.seconds(before) <= 30.0


@pytest.mark.parametrize("budget_s", [0.5, 1.0])
def test_a_deadline_before_the_first_trial_leaves_a_dense_model_and_no_front(tmp_path: Path, budget_s: float) -> None:
    run = Run(tmp_path, search__time_budget=budget_s, seconds={LOOK: 2.0}).to_the_end()
    assert run.names == [LOOK, "timing", "rebuild-dense"]
    assert run.driver.ended_by == "time"
    confirmed = run.driver.confirmation.result()
    assert (confirmed.outcomes, confirmed.models) == ([], {})
    assert run.watcher.of("prepared") == []


def test_a_deadline_during_the_preparation_ends_it(tmp_path: Path) -> None:
    run = Run(tmp_path, search__time_budget=20.0, seconds={"sensitivity-3": 20.0}).to_the_end()
    assert run.names == [LOOK, "t000", "exits", "t001", "sensitivity-3", "timing", *rebuilds("t000", "t001")]
    assert run.driver.ended_by == "time"


def test_ctrl_c_lets_running_trials_end_and_confirms(tmp_path: Path) -> None:
    run = Run(tmp_path, num_slots=2, known=STEPS, search__trials=500, seconds={"t003": 5.0})
    run.at["t002"] = run.driver.interrupt
    run.to_the_end()
    assert run.driver.ended_by == "interrupt"
    assert [suggestion.id for suggestion in run.trials] == trial_ids(4)
    assert run.piece("timing").begin == run.piece("t003").end
    assert len(run.driver.confirmation.result().outcomes) == 4
    assert run.watcher.of("interrupted") == [[]]


def test_ctrl_c_before_the_look_has_ended_tries_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, num_slots=2)
    run.driver.interrupt()
    run.to_the_end()
    assert run.names == [LOOK, "timing", "rebuild-dense"]
    assert run.driver.ended_by == "interrupt"


def test_ctrl_c_while_a_step_runs_ends_the_preparation(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.at["exits"] = run.driver.interrupt
    run.to_the_end()
    # t001 was chosen, and told, before the exits were measured that it needs.
    assert run.names == [LOOK, "t000", "exits", "t001", "timing", *rebuilds("t000", "t001")]


def test_a_saturated_search_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, known=STEPS, search__trials=500, search__patience=2, search__min_gain=0.5).to_the_end()
    assert run.driver.ended_by == "saturation"
    assert 3 <= len(run.trials) < 20


def test_a_space_that_is_exhausted_ends_the_search(tmp_path: Path) -> None:
    space = {
        "method": "constant", "exit_block": 3, "token_reduction": "merge", "target_ratio": 0.6, "cutoff_token": 0.8,
        "cutoff_channel": 0.1, "drop_budget": 0.0, "token_share": 0.5, "round_to": 8, "criterion": "lfs",
    }  # fmt: skip
    run = Run(tmp_path, num_slots=2, search__trials=50, space=space).to_the_end()
    assert run.driver.ended_by == "exhaustion"
    assert len({suggestion.candidate for suggestion in run.trials}) == len(run.trials) < 10


def test_a_sweep_with_all_ways_to_end_at_once_says_one(tmp_path: Path) -> None:
    run = Run(tmp_path, known=STEPS, search__trials=2)
    run.at["t001"] = run.driver.interrupt
    assert run.to_the_end().driver.ended_by in ("trials", "interrupt")


# What goes wrong


def test_a_trial_whose_worker_breaks_counts_and_the_search_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, num_slots=2)
    run.broken = {"t001", "t003"}
    run.to_the_end()
    states = {outcome.id: outcome.state for outcome in run.driver.outcomes}
    assert states.pop("t001") is states.pop("t003") is State.FAILED
    assert states == dict.fromkeys(["t000", "t002", "t004"], State.MEASURED)
    assert [one.id for one in run.driver.confirmation.result().outcomes] == ["t000", "t002", "t004"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("num_slots", [1, 3])
def test_after_a_step_that_fails_nothing_is_handed_out(tmp_path: Path, step: str, num_slots: int) -> None:
    run = Run(tmp_path, num_slots=num_slots)
    run.products[step] = ModelError("the features are not finite")
    run.to_the_end()
    assert run.driver.is_done
    assert run.driver.next() is None
    assert max(piece.begin for piece in run.pieces) <= run.piece(step).end
    assert "timing" not in run.names
    run.driver.close()


def test_a_model_that_is_wrong_is_told_by_who_keeps_the_records(tmp_path: Path) -> None:
    """`Bookkeeper` gives up on what the driver raises."""
    fault = ModelError("dense top-1 on val is 0.1, below model.expected_top1, 0.9")
    run = Run(tmp_path)

    def when_looked(looked: Looked) -> Any:
        assert looked.first.fault is not None
        raise looked.first.fault

    driver = SweepDriver(run.sweep, {}, when_looked)
    job = driver.next()
    assert job is not None
    first = FirstLook(precision="float32", top1=0.1, num_images=24, fault=fault)
    with pytest.raises(ModelError, match=r"below model\.expected_top1"):
        driver.job_ended(LOOK, Looked(first=first, dense=None, device="cpu"))
    driver.give_up()
    assert driver.is_done and driver.next() is None
    driver.close()  # no search has begun
    assert run.watcher.of("start") == []


# Epochs and rungs


def test_an_epoch_is_kept_and_removed_with_the_end_of_its_trial(tmp_path: Path) -> None:
    run = Run(tmp_path)
    folder = run.sweep.folder

    def train() -> None:
        checkpoint = Checkpoint(id="t001", candidate=EARLY[1], state={"epoch": 1})
        run.driver.epoch(checkpoint, {"epoch": 1.0})
        assert [one.id for one in Checkpoints(folder.checkpoints).read(done=())] == ["t001"]

    run.at["exits"] = train
    run.to_the_end()
    assert run.watcher.of("epoch") == [["t001", {"epoch": 1.0}]]
    assert not any(folder.checkpoints.iterdir())


def test_rungs_remember_the_trials_of_an_earlier_run(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "tiny")
    good = replace(builders.outcome("t000", 0.9, 1.5), rungs=((0.9, 2.0),), rung_spans=((0.0, 1.0),))
    with Ledger(folder.ledger) as book:
        book.append(good)
    driver = Run(tmp_path, search__reduction_factor=2.0).driver
    assert not driver.promotes(0, (0.5, 1.5))
    fresh = Run(tmp_path / "other", search__reduction_factor=2.0).driver
    assert fresh.promotes(0, (0.5, 1.5))


# Ctrl-C


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])  # the latter in the background
def test_first_interrupt_calls_and_the_second_interrupts(before: Any) -> None:
    called, own_handler = list[int](), signal.signal(signal.SIGINT, before)
    with calling_on_interrupt(lambda: called.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert called == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert called == [1]
    assert signal.signal(signal.SIGINT, own_handler) is before


def test_afterwards_an_interrupt_is_as_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with calling_on_interrupt(lambda: None):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_nothing_changes() -> None:
    seen = []

    def work() -> None:
        with calling_on_interrupt(lambda: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
