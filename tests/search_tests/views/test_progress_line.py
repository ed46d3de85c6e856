"""The live line on a terminal, and the lines elsewhere."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from search.outcome import State
from search.views.progress_line import ProgressLine, describe
from tests.search_tests import builders


class Screen:
    """A progress line and what it printed."""

    def __init__(self, terminal: bool) -> None:
        self._file = io.StringIO()
        self.console = Console(file=self._file, force_terminal=terminal, width=200, color_system=None)
        self.now = 1000.0
        self.line = ProgressLine(self.console, clock=lambda: self.now)

    @property
    def text(self) -> str:
        return self._file.getvalue()

    def live(self) -> str:
        """The line as it stands."""
        return self.line.render().plain


def started(screen: Screen, *ids: str) -> None:
    for id in ids:
        screen.line.started(id, builders.candidate())


def test_elsewhere_every_stage_but_the_first_is_a_line() -> None:
    screen = Screen(terminal=False)
    with screen.line as line:
        line.stage("loading")
        assert screen.text == ""
        line.stage("training")
        line.start_trials(0, 2, None)
        line.stage("measuring")
    assert screen.text.splitlines() == ["training ...", "2 trials ...", "measuring ..."]


def test_dense_accuracy_is_the_first_line_where_nothing_is_trained() -> None:
    screen = Screen(terminal=False)
    screen.line.stage("loading")
    screen.line.note("dense top-1 on val 0.773 (0.723 to 0.817, 300 images)")
    screen.line.stage("preparing")
    assert screen.text.splitlines() == ["dense top-1 on val 0.773 (0.723 to 0.817, 300 images)", "preparing ..."]


def test_long_note_is_one_line_that_a_terminal_keeps() -> None:
    for terminal in (False, True):
        screen = Screen(terminal=terminal)
        screen.line.note("note: " + "word " * 100)
        assert screen.text == "note: " + "word " * 100 + "\n"


def test_elsewhere_every_outcome_is_a_line() -> None:
    screen = Screen(terminal=False)
    screen.line.stage("loading")
    screen.line.start_trials(3, 5, None)
    screen.line.finished(builders.outcome("t003", 0.9, 1.5), 0.2)
    screen.line.finished(builders.failed("t004"), 0.2)
    assert screen.text.splitlines() == [
        "2 trials ...",
        f"4/5 {describe(builders.outcome('t003', 0.9, 1.5))}",
        "5/5 t004 failed: RuntimeError: out of memory",
    ]


def test_terminal_keeps_no_line_but_those_of_failures() -> None:
    screen = Screen(terminal=True)
    screen.line.stage("loading")
    screen.line.start_trials(0, 2, None)
    screen.line.finished(builders.outcome("t000", 0.9, 1.5), 0.2)
    assert screen.text == ""
    screen.line.finished(builders.failed("t001"), 0.2)
    assert screen.text == "2/2 t001 failed: RuntimeError: out of memory\n"


def test_live_line_shows_the_stage_and_how_long_it_takes() -> None:
    screen = Screen(terminal=True)
    screen.line.stage("loading")
    assert screen.live() == "loading ... 0:00"


def test_live_line_counts_done_running_and_failed() -> None:
    screen = Screen(terminal=True)
    screen.line.start_trials(4, 10, None)
    assert screen.live() == "4/10 done, 0 running, 0 failed, hypervolume 0.0000, 0:00 gone, ? left"
    started(screen, "t004", "t005", "t006")
    screen.line.finished(builders.outcome("t004", 0.9, 1.5), 0.125)
    screen.line.finished(builders.failed("t005"), 0.125)
    screen.line.finished(builders.failed("t006", State.INFEASIBLE), 0.25)
    started(screen, "t007")
    assert screen.live().startswith("7/10 done, 1 running, 1 failed, hypervolume 0.2500, ")


def test_time_left_is_what_the_other_trials_take_at_this_pace() -> None:
    screen = Screen(terminal=True)
    screen.line.start_trials(4, 10, None)
    screen.now += 7200
    started(screen, "t004", "t005")
    screen.line.finished(builders.outcome("t004", 0.9, 1.5), 0.1)
    screen.line.finished(builders.outcome("t005", 0.9, 1.5), 0.1)
    assert screen.live().endswith("2:00:00 gone, 4:00:00 left")


def test_time_left_ends_at_the_deadline() -> None:
    screen = Screen(terminal=True)
    screen.line.start_trials(0, 100, screen.now + 150)
    screen.now += 60
    started(screen, "t000")
    screen.line.finished(builders.outcome("t000", 0.9, 1.5), 0.1)
    assert screen.live().endswith("1:00 gone, 1:30 left")
    screen.line.start_trials(0, 100, screen.now - 5)
    screen.line.finished(builders.outcome("t001", 0.9, 1.5), 0.1)
    assert screen.live().endswith("0:00 left")


def test_trials_that_train_are_told_by_epoch_until_they_end() -> None:
    screen = Screen(terminal=True)
    screen.line.start_trials(0, 4, None)
    started(screen, "t000", "t001")
    screen.line.epoch("t000", {"epoch": 3, "loss": 0.12345})
    screen.line.epoch("t001", {"epoch": 1, "loss": 0.5})
    assert screen.live().endswith(" left; t000 epoch 3; t001 epoch 1")
    screen.line.finished(builders.outcome("t000", 0.9, 1.5), 0.1)
    assert screen.live().endswith(" left; t001 epoch 1")
    assert screen.text == ""


def test_elsewhere_every_epoch_is_a_line() -> None:
    screen = Screen(terminal=False)
    screen.line.epoch("t000", {"epoch": 3, "loss": 0.12345, "share": 0.5})
    assert screen.text == "t000 epoch 3: loss 0.1235, share 0.5\n"


def test_earlier_exits_of_a_trial_are_told_but_not_counted() -> None:
    screen = Screen(terminal=False)
    screen.line.stage("loading")
    screen.line.start_trials(0, 2, None)
    screen.line.finished(builders.outcome("t000", 0.9, 1.5), 0.1)
    screen.line.finished(builders.outcome("t000.2", 0.8, 2.5), 0.1)
    assert [line.split()[:2] for line in screen.text.splitlines()[1:]] == [["1/2", "t000"], ["1/2", "t000.2"]]


def test_interrupt_is_one_line_on_a_terminal_as_well() -> None:
    screen = Screen(terminal=True)
    screen.line.interrupted()
    assert screen.text.startswith("no further trial starts; ") and screen.text.count("\n") == 1


def test_brackets_in_a_reason_are_text() -> None:
    screen = Screen(terminal=False)
    screen.line.finished(builders.failed("t004", reason="[enforce fail] at [b]"), 0.2)
    assert screen.text.endswith("t004 failed: [enforce fail] at [b]\n")


def test_stage_after_the_trials_is_shown_again() -> None:
    screen = Screen(terminal=True)
    screen.line.start_trials(0, 1, None)
    screen.line.finished(builders.outcome("t000", 0.9, 1.5), 0.1)
    screen.line.stage("measuring")
    assert screen.live() == "measuring ... 0:00"


def test_live_line_is_drawn_and_taken_away() -> None:
    screen = Screen(terminal=True)
    with screen.line as line:
        line.stage("loading")
        line._live.refresh()
    assert "loading ... 0:00" in screen.text
    assert screen.text.endswith("\x1b[2K")  # the line is cleared


def test_outcome_in_one_line() -> None:
    outcome = replace(builders.outcome("t001", 0.876, 1.5), seconds=61.4)
    assert describe(outcome) == "t001 top-1 0.876, 1.50 x as fast as dense, 0.823 M MACs, 61 s"
    retrieved = builders.outcome("t003", 0.876, 1.5, recall_at_1=0.75, mean_average_precision=0.5)
    assert describe(retrieved).startswith("t003 top-1 0.876, recall@1 0.750, mAP 0.500, 1.50 x as fast")
    assert describe(builders.failed("t002", State.STOPPED, "too slow")) == "t002 stopped: too slow"
