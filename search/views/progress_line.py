"""The live line of a running sweep: done, running, failed, best hypervolume, time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from search.goal import ACCURACIES
from search.outcome import Candidate, Outcome, State


class ProgressLine:
    """An observer of a sweep that keeps one line of the terminal up to date; elsewhere it prints one a stage.

    Not for the first stage, in which wrong input shows: that is one line of its own.

    with ProgressLine(Console(stderr=True)) as line:
        run_sweep(config, runs, line)
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._since = self._trials_since = time.monotonic()
        self._num_trials = self._num_before = self._num_done = self._num_failed = self._num_started = 0
        self._hypervolume = 0.0
        self._training: dict[str, str] = {}
        self._deadline: float | None = None
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> ProgressLine:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def stage(self, text: str) -> None:
        is_first = not self._stage
        self._stage, self._num_trials = text, 0
        self._since = time.monotonic()
        if not self._console.is_terminal and not is_first:
            self._console.print(f"{text} ...", highlight=False)

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None:
        self.stage(f"{num_trials - num_done} trials")
        self._num_trials, self._num_before, self._num_done = num_trials, num_done, num_done
        self._trials_since, self._deadline = time.monotonic(), deadline

    def started(self, trial_id: str, candidate: Candidate) -> None:
        self._num_started += 1

    def epoch(self, trial_id: str, progress: Mapping[str, float]) -> None:
        epoch, *others = progress.items()
        told = ", ".join(f"{name} {value:.4g}" for name, value in others)
        self._training[trial_id] = f"{trial_id} epoch {epoch[1]}"
        if not self._console.is_terminal:
            self._console.print(f"{trial_id} epoch {epoch[1]}: {told}", highlight=False)

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        is_own = outcome.id == outcome.trial
        self._num_done += is_own
        self._training.pop(outcome.trial, None)
        self._num_failed += outcome.state is State.FAILED
        self._hypervolume = hypervolume
        if not self._console.is_terminal or outcome.state is State.FAILED:
            self._console.print(f"{self._num_done}/{self._num_trials} {describe(outcome)}", highlight=False)

    def interrupted(self) -> None:
        told = "no further trial starts; waiting for those that run (Ctrl-C again leaves at once)"
        self._console.print(told, highlight=False, soft_wrap=True)

    def _render(self) -> Text:
        if not self._num_trials:
            return Text(f"{self._stage} ... {_clock(time.monotonic() - self._since)}")
        finished_here = self._num_done - self._num_before
        running = self._num_started - finished_here
        return Text(
            f"{self._num_done}/{self._num_trials} done, {running} running, {self._num_failed} failed, "
            f"hypervolume {self._hypervolume:.4f}, {_clock(time.monotonic() - self._trials_since)} gone, "
            f"{self._left(finished_here)} left{''.join(f'; {each}' for each in self._training.values())}"
        )

    def _left(self, finished_here: int) -> str:
        if not finished_here:
            return "?"
        now = time.monotonic()
        left = (now - self._trials_since) / finished_here * (self._num_trials - self._num_done)
        return _clock(left if self._deadline is None else min(left, max(0.0, self._deadline - now)))


def describe(outcome: Outcome) -> str:
    """One line about an outcome."""
    if outcome.measurement is None:
        return f"{outcome.id} {outcome.state.value}: {outcome.reason}"
    found = outcome.measurement
    taken = {called: getattr(found, name) for name, called in ACCURACIES.items()}
    accuracies = ", ".join(f"{called} {value:.3f}" for called, value in taken.items() if value is not None)
    return (
        f"{outcome.id} {accuracies}, {found.speedup:.2f} x as fast as dense, "
        f"{found.macs / 1e6:.4g} M MACs, {outcome.seconds:.0f} s"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
