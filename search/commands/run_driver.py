"""The driver of a sweep: decides what every slot does next, from the first look to the last model.

A slot that is free gets the first piece of work that there is: the look at the dense model, the candidates that need
hardly anything else, the steps of the preparation, trials, and in the end the confirmation of the front.
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pruning.artifact import Weights
from search.commands.run_cache import PartCache
from search.commands.run_confirmation import Confirmation
from search.commands.run_preparation import Preparation
from search.commands.run_state import Sweep
from search.front import front_of
from search.goal import Goal
from search.outcome import Candidate, Outcome, num_trials
from search.records.checkpoints import Checkpoint
from search.records.recorder import OutcomeLog, Recorder
from search.suggest.ask import CandidateSearch, History, Suggestion
from search.suggest.rungs import Rungs
from search.suggest.samplers import SamplerSettings
from search.trial.context import ContextPart
from search.trial.jobs import DENSE, LOOK, Job, Looked, Timed, answers_id
from search.trial.prepare import first_context, profiled_reductions, steps_for
from search.trial.warm_start import candidates_between, early_candidates, first_candidates, propose

PART_IMAGES = 256
"""Number of val images, at least, that a worker answers for the look at the dense model."""

NUM_RECENT = 4
"""Number of trials, the last ones, from whose seconds those of the next are estimated."""

Work = Job | tuple[Suggestion, tuple[str, ...]]
"""A job, or a trial with the ids of the products that it needs."""

WhenLooked = Callable[[Looked], tuple[OutcomeLog, PartCache]]
"""Called once the dense model is known; returns who is told of outcomes, and the cache for what is measured of it."""


class SweepDriver:
    """Hands out the work of one sweep, and keeps what comes of it."""

    def __init__(
        self, sweep: Sweep, known: Mapping[str, ContextPart], when_looked: WhenLooked,
        prior_outcomes: Sequence[Outcome] = (), clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """
        Args:
            known: parts of the preparation that were measured before, by the ids of their steps.
            prior_outcomes: outcomes of other sweeps; the search begins with their front.
            clock: gives seconds from any start.
        """
        self._sweep, self._when_looked, self._prior_outcomes, self._clock = sweep, when_looked, prior_outcomes, clock
        self._settings = sweep.config.search
        self._preparation = Preparation(sweep.space, known)
        self._rungs = Rungs(self._settings.reduction_factor, sweep.ledger.found)
        self._unwritten: list[tuple[str, ContextPart]] = []
        """Parts that were measured before the cache was known."""
        self._has_look = self._gave_up = self._is_interrupted = False
        self._num_parts = max(1, min(sweep.num_slots, len(sweep.inputs.splits.val) // PART_IMAGES))
        self._parts = list(range(1, self._num_parts))
        """Parts of val that no worker was given yet, for the look at the dense model."""
        self._looked: Looked | None = None
        self._held: Work | None = None
        """Work that was chosen, and is handed out once the steps that it needs are."""
        self._running: dict[str, float] = {}
        """Times at which the trials that run were handed out, by id."""
        self.ended_by: str | None = None
        """Reason why no further trial starts: `trials`, `time`, `saturation` of the hypervolume, `interrupt`, or
        `exhaustion` of the candidates; None while trials start."""
        self.prepared_s: float | None = None
        """Seconds from the start of the command to the end of the preparation."""

    # ----------------------------------------------------------------------------------------------------- what is next

    @property
    def is_done(self) -> bool:
        """True if nothing is left to hand out."""
        return self._gave_up or (self.ended_by is not None and self._held is None and self.confirmation.is_handed_out)

    def next(self) -> Work | None:
        """Returns the next piece of work; None if there is none now."""
        if self._gave_up:
            return None
        if not self._has_look:
            self._has_look = True
            return Job(id=LOOK, kind="look", subject=self._num_parts)
        if self._looked is None:
            if self._is_interrupted:
                return None
            if self._parts:
                part = self._parts.pop(0)
                return Job(id=answers_id(part), kind="answers", needs=(DENSE,), subject=(part, self._num_parts))
            return self._preparation.next_beside_look()
        work, self._held = self._held, None
        work = work or self._next_of_search() or self._next_of_confirmation()
        missing = None if work is None else self._preparation.missing(needs_of(work))
        if missing is not None:
            self._held = work
            return missing
        return work

    def _next_of_search(self) -> Work | None:
        """Returns a trial or a step of the preparation; None if the search has ended."""
        if self.ended_by is None:
            self.ended_by = self._why_it_ends()
        if self.ended_by is None:
            # The first candidates need hardly anything: a front is there before all slots prepare.
            if self._num_early == 0 and not self._preparation.is_handed_out:
                return self._preparation.next()
            suggestion = self._ask()
            if suggestion is not None and not self._fits(suggestion.candidate):
                self._search.tell(suggestion.id, None)
                suggestion, self.ended_by = None, "time"
            if suggestion is not None:
                self._running[suggestion.id] = self._clock() + self._delay_s
                self._sweep.observer.started(suggestion.id, suggestion.candidate)
                steps = steps_for(suggestion.candidate, self._sweep.space)
                return suggestion, (LOOK, *(step.id for step in steps))
            self.ended_by = self.ended_by or "exhaustion"
        self._search.close()
        return None

    def _ask(self) -> Suggestion | None:
        """Returns the next trial: one that can run now, if there is any."""
        if self._num_early > 0:
            self._num_early -= 1
            return self._search.ask()
        ready = self._preparation.ready_methods()
        if not self._has_proposed and self._between and self._between[0].method in ready:
            self._search.add_first([self._between.pop(0)])
        suggestion = self._search.ask(ready)
        return self._search.ask() if suggestion is None and self._search.is_waiting else suggestion

    def _fits(self, candidate: Candidate) -> bool:
        """Tells whether a trial of the candidate, and the confirmation after it, end within the time budget."""
        trial_s, left_s = self._search.predicted_seconds(candidate), self._left_s
        return left_s is None or trial_s is None or trial_s + self.confirmation.seconds(self.outcomes) <= left_s

    def _why_it_ends(self) -> str | None:
        """Returns the reason why no further trial starts, as `ended_by`; None if one does."""
        if self._is_interrupted:
            return "interrupt"
        if num_trials(self.outcomes) + len(self._running) >= self._settings.trials:
            return "trials"
        if self._recorder.is_saturated():
            return "saturation"
        left_s = self._left_s
        if left_s is not None and self._trial_s + self.confirmation.seconds(self.outcomes) > left_s:
            return "time"
        return None

    def _next_of_confirmation(self) -> Work | None:
        """Returns a job of the confirmation; None if there is none now."""
        if self._running or self.confirmation.is_handed_out:
            return None
        return self.confirmation.next(self.outcomes, self._left_s)

    @property
    def _left_s(self) -> float | None:
        """Seconds from the start of the next work to the end of the time budget; None without one."""
        deadline = self._sweep.deadline
        return None if deadline is None else deadline - self._clock() - self._delay_s

    @property
    def _delay_s(self) -> float:
        """Seconds until a slot is free for the next work, if trials take as long as the last ones did."""
        if len(self._running) < self._sweep.num_slots:
            return 0.0
        return max(0.0, min(self._running.values()) + self._trial_s - self._clock())

    @property
    def _trial_s(self) -> float:
        """Seconds that a trial takes, as the last ones did."""
        seconds = [outcome.seconds for outcome in self.outcomes if outcome.seconds > 0]
        return statistics.fmean(seconds[-NUM_RECENT:]) if seconds else 0.0

    # ------------------------------------------------------------------------------------------------ what came of work

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """All outcomes of the sweep, those of earlier runs first."""
        return self._recorder.outcomes

    def job_ended(self, job_id: str, product: Any) -> None:
        """Takes the product of a job."""
        if isinstance(product, Looked):
            self._begin_search(product)
        elif isinstance(product, ContextPart):
            self._preparation.measured(job_id, product)
            self._unwritten.append((job_id, product))
        elif isinstance(product, Timed):
            self.confirmation.timed(product)
        elif isinstance(product, tuple):
            self.confirmation.rebuilt(job_id, *product)
        if self._looked is not None:
            self._recorder.check()
            self._write_parts()
            self._propose_once()

    def epoch(self, checkpoint: Checkpoint, progress: Mapping[str, float]) -> None:
        """Keeps the state of a trial that has trained one more epoch."""
        self._recorder.epoch(checkpoint, progress)

    def trial_ended(self, outcomes: Sequence[Outcome], weights: Mapping[str, Weights]) -> None:
        """Keeps the outcomes of a trial that has ended or was stopped."""
        self._recorder.ended(outcomes, weights)

    def told(self, trial_id: str, outcome: Outcome | None) -> None:
        """Tells the search the own outcome of a trial; None if it left none."""
        self._search.tell(trial_id, outcome)
        del self._running[trial_id]

    def promotes(self, rung: int, values: tuple[float, float]) -> bool:
        """Tells whether a trial goes on from a rung."""
        return self._rungs.promotes(rung, values)

    def interrupt(self) -> None:
        """Starts no trial from now on; a signal handler may call it."""
        self._is_interrupted = True
        self._sweep.observer.interrupted()

    def give_up(self) -> None:
        """Hands out no more work."""
        self._gave_up = True

    def close(self) -> None:
        """Waits until all records have all outcomes."""
        if self._looked is not None:
            self._search.close()
            self._recorder.close()

    def _begin_search(self, looked: Looked) -> None:
        """Begins to record and to search, now that the dense model is measured."""
        sweep, settings = self._sweep, self._settings
        log, self._cache = self._when_looked(looked)
        assert looked.dense is not None, "what is not to be pruned was told"
        self.goal = Goal.of(looked.dense, settings.accuracy, settings.limits)
        self.confirmation = Confirmation(sweep, self.goal)
        self._recorder = Recorder(settings, self.goal, sweep.folder, sweep.ledger, log, sweep.observer)
        unfinished = self._recorder.checkpoints.read(done={outcome.trial for outcome in self.outcomes})
        tried = {outcome.candidate for outcome in self.outcomes} | {checkpoint.candidate for checkpoint in unfinished}
        early = [candidate for candidate in early_candidates(sweep.space) if candidate not in tried]
        prior_front = [outcome.candidate for outcome in front_of(self._prior_outcomes, self.goal)]
        self._num_early = len(unfinished) + len(early)
        self._between = [candidate for candidate in candidates_between(sweep.space) if candidate not in tried]
        self._search = CandidateSearch(
            sweep.space,
            SamplerSettings(
                sampler=settings.sampler, seed=settings.seed, num_trials=settings.trials,
                has_rungs=settings.reduction_factor > 1, num_ahead=1,
            ),
            History(
                outcomes=list(self.outcomes),
                unfinished=[(checkpoint.id, checkpoint.candidate) for checkpoint in unfinished],
                prior_outcomes=self._prior_outcomes,
                first_candidates=[*early, *prior_front],
            ),
            self.goal,
        )  # fmt: skip
        self._looked = looked
        self._has_proposed = False
        sweep.observer.start_trials(num_trials(self.outcomes), settings.trials, sweep.deadline)

    def _write_parts(self) -> None:
        """Writes what was measured of the dense model into the cache."""
        for step_id, part in self._unwritten:
            self._cache.write(self._preparation.steps[step_id], part)
        self._unwritten = []

    def _propose_once(self) -> None:
        """Proposes candidates by the profile as soon as all is prepared, and tells so."""
        if self._has_proposed or not self._preparation.is_done:
            return
        self._has_proposed = True
        sweep, known, proposed = self._sweep, self._preparation.known, list[Candidate]()
        if profiled_reductions(sweep.space):
            assert self._looked is not None
            model, precision = sweep.inputs.model, self._looked.first.precision
            context = first_context(sweep.config, model, sweep.inputs.splits, precision).extended(known)
            proposed = propose(context, sweep.space)
        self._search.add_first(first_candidates(sweep.space, proposed))
        self.prepared_s = self._clock() - sweep.began
        sweep.observer.prepared(self.prepared_s)


def needs_of(work: Work) -> tuple[str, ...]:
    """Returns the ids of the products that a piece of work needs."""
    return work.needs if isinstance(work, Job) else work[1]


@contextmanager
def calling_on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """Calls a function at the first Ctrl-C within this block; the second one raises KeyboardInterrupt.

    In another than the main thread, which alone may handle signals, Ctrl-C is left as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not as before: a job in the background ignores it
        call()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
