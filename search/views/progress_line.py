"""The live line of a running sweep: trials done, running and failed, hypervolume, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from search.goal import ACCURACIES
from search.outcome import Candidate, Outcome, State


class ProgressLine:
    """An observer of a sweep that keeps one line of the terminal up to date; elsewhere it prints a line an event.

    The first stage has no line: wrong input shows in it, which is one line of its own.

    with ProgressLine(Console(stderr=True)) as line:
        run_sweep(config, runs, line)
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: gives seconds from any start; deadlines are told by it.
        """
        self._console, self._clock = console, clock
        self._stage = ""
        self._since = self._trials_since = clock()
        self._num_trials = self._num_before = self._num_done = self._num_failed = self._num_started = 0
        self._hypervolume = 0.0
        self._training: dict[str, str] = {}
        self._deadline: float | None = None
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

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
        self._since = self._clock()
        if not self._console.is_terminal and not is_first:
            self._print(f"{text} ...")

    def note(self, text: str) -> None:
        self._print(text, soft_wrap=True)

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None:
        self.stage(f"{num_trials - num_done} trials")
        self._num_trials, self._num_before, self._num_done = num_trials, num_done, num_done
        self._trials_since, self._deadline = self._clock(), deadline

    def prepared(self, seconds: float) -> None:
        if not self._console.is_terminal:
            self._print(f"all prepared after {_minutes(seconds)}")

    def started(self, trial_id: str, candidate: Candidate) -> None:
        self._num_started += 1

    def epoch(self, trial_id: str, progress: Mapping[str, float]) -> None:
        (_, epoch), *figures = progress.items()
        self._training[trial_id] = f"{trial_id} epoch {epoch}"
        if not self._console.is_terminal:
            texts = ", ".join(f"{name} {value:.4g}" for name, value in figures)
            self._print(f"{trial_id} epoch {epoch}: {texts}")

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        is_trial = outcome.id == outcome.trial  # not one of a trial's earlier exits
        self._num_done += is_trial
        self._training.pop(outcome.trial, None)
        self._num_failed += outcome.state is State.FAILED
        self._hypervolume = hypervolume
        if not self._console.is_terminal or outcome.state is State.FAILED:
            self._print(f"{self._num_done}/{self._num_trials} {describe(outcome)}")

    def interrupted(self) -> None:
        self._print("no further trial starts; waiting for those that run (Ctrl-C again leaves at once)", soft_wrap=True)

    def render(self) -> Text:
        """Returns the line as it stands."""
        if not self._num_trials:
            return Text(f"{self._stage} ... {_minutes(self._clock() - self._since)}")
        finished_here = self._num_done - self._num_before
        running = self._num_started - finished_here
        return Text(
            f"{self._num_done}/{self._num_trials} done, {running} running, {self._num_failed} failed, "
            f"hypervolume {self._hypervolume:.4f}, {_minutes(self._clock() - self._trials_since)} gone, "
            f"{self._left(finished_here)} left{''.join(f'; {training}' for training in self._training.values())}"
        )

    def _left(self, finished_here: int) -> str:
        """Estimates the time left from the trials finished in this run; ? before the first."""
        if not finished_here:
            return "?"
        now = self._clock()
        left = (now - self._trials_since) / finished_here * (self._num_trials - self._num_done)
        return _minutes(left if self._deadline is None else min(left, max(0.0, self._deadline - now)))

    def _print(self, text: str, *, soft_wrap: bool = False) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=soft_wrap)


def describe(outcome: Outcome) -> str:
    """Tells an outcome in one line."""
    if outcome.measurement is None:
        return f"{outcome.id} {outcome.state.value}: {outcome.reason}"
    model = outcome.measurement
    values = {title: getattr(model, metric) for metric, title in ACCURACIES.items()}
    accuracies = ", ".join(f"{title} {value:.3f}" for title, value in values.items() if value is not None)
    return (
        f"{outcome.id} {accuracies}, {model.speedup:.2f} x as fast as dense, "
        f"{model.macs / 1e6:.4g} M MACs, {outcome.seconds:.0f} s"
    )


def _minutes(seconds: float) -> str:
    """Formats a time as 1:05, or 2:01:05 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
