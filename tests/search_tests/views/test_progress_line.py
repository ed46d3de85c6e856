"""The live line on a terminal, and the lines elsewhere."""

from __future__ import annotations

import io
import time
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
        self.line = ProgressLine(self.console)

    @property
    def text(self) -> str:
        return self._file.getvalue()

    def live(self) -> str:
        """The line as it stands."""
        return self.line._render().plain


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
    screen.line._trials_since -= 7200  # two hours ago
    started(screen, "t004", "t005")
    screen.line.finished(builders.outcome("t004", 0.9, 1.5), 0.1)
    screen.line.finished(builders.outcome("t005", 0.9, 1.5), 0.1)
    assert screen.live().endswith("2:00:00 gone, 4:00:00 left")


def test_time_left_ends_at_the_deadline() -> None:
    screen = Screen(terminal=True)
    screen.line.start_trials(0, 100, time.monotonic() + 90.4)
    screen.line._trials_since -= 60
    started(screen, "t000")
    screen.line.finished(builders.outcome("t000", 0.9, 1.5), 0.1)
    assert screen.live().endswith("1:00 gone, 1:30 left")
    screen.line.start_trials(0, 100, time.monotonic() - 5)
    screen.line.finished(builders.outcome("t001", 0.9, 1.5), 0.1)
    assert screen.live().endswith("0:00 left")


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
