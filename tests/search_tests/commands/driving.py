"""A sweep in memory whose work is done by fakes, for tests of its driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from pruning.measure.stopwatch import Timing
from search.commands.run_driver import SweepDriver
from search.commands.run_state import Sweep
from search.outcome import Candidate, Outcome
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.suggest.ask import Suggestion
from search.trial.context import ContextPart
from search.trial.first_look import FirstLook
from search.trial.jobs import DENSE, LOOK, Job, Looked, Timed
from search.trial.prepare import Step
from tests.search_tests import builders, tiny


@dataclass
class Watcher:
    """Remembers what a sweep tells, in one list of events."""

    events: list[tuple[Any, ...]] = field(default_factory=list)

    def stage(self, text: str) -> None:
        self.events.append(("stage", text))

    def note(self, text: str) -> None:
        self.events.append(("note", text))

    def start_trials(self, num_done: int, num_trials: int, deadline: float | None) -> None:
        self.events.append(("start", num_done, num_trials, deadline))

    def prepared(self, seconds: float) -> None:
        self.events.append(("prepared", seconds))

    def started(self, trial_id: str, candidate: Candidate) -> None:
        self.events.append(("started", trial_id))

    def epoch(self, trial_id: str, progress: Mapping[str, float]) -> None:
        self.events.append(("epoch", trial_id, dict(progress)))

    def finished(self, outcome: Outcome, hypervolume: float) -> None:
        self.events.append(("finished", outcome.id))

    def interrupted(self) -> None:
        self.events.append(("interrupted",))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        """The events of one kind, without it."""
        return [rest for name, *rest in self.events if name == kind]  # type: ignore[misc]


@dataclass
class Log:
    """Remembers the outcomes that MLflow would get."""

    synced: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)

    def sync(self, outcomes: Sequence[Outcome], hypervolumes: Sequence[float]) -> None:
        self.synced += [outcome.id for outcome in outcomes]

    def log(self, outcome: Outcome, hypervolume: float, number: int) -> None:
        self.logged.append(outcome.id)


SPACE: dict[str, Any] = {
    "method": ["cascade", "global"], "exit_block": [2, 3], "token_reduction": "lfe", "round_to": [8, "auto"]
}  # fmt: skip


def sweep_in(
    folder: Path, *, num_slots: int = 1, began: float = 0.0, splits: Any = None, observer: Any = None, **changes: Any
) -> Sweep:
    """A sweep of the tiny model; `changes` are of its recipe. Its ledger is open until its process ends."""
    config = tiny.config(**{"space": SPACE} | changes)
    own = Folder(folder, "tiny")
    return Sweep(
        config=config, inputs=tiny.inputs(config, **{} if splits is None else {"splits": splits}), folder=own,
        ledger=Ledger(own.ledger), observer=observer or Watcher(), num_slots=num_slots, began=began,
    )  # fmt: skip


@dataclass
class Piece:
    """A piece of work that a slot did."""

    name: str
    slot: int
    begin: float
    """Second at which the slot got it."""
    end: float
    work: Any


@dataclass
class Parts:
    """Remembers the parts that the cache would get."""

    written: list[str] = field(default_factory=list)

    def write(self, step: Step, part: ContextPart) -> None:
        self.written.append(step.id)


class Run:
    """A driver with slots whose work takes as long as it is told, on a clock that jumps from end to end."""

    def __init__(
        self, folder: Path, *, num_slots: int = 1, known: Sequence[str] = (),
        seconds: Mapping[str, float] | None = None, prior_outcomes: Sequence[Outcome] = (), **changes: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            known: ids of the steps that were measured before.
            seconds: kind of a job, `trial`, or the id of either -> seconds that it takes; by default 1.
            changes: of the sweep; see `sweep_in`.
        """
        self.now, self.seconds = 0.0, seconds or {}
        self.watcher, self.log, self.parts = Watcher(), Log(), Parts()
        settings = {"search__sampler": "random", "search__trials": 5}
        self.sweep = sweep_in(folder, num_slots=num_slots, observer=self.watcher, **settings | changes)
        self.known = dict.fromkeys(known, ContextPart())
        self.driver = SweepDriver(
            self.sweep, self.known, lambda looked: (self.log, self.parts), prior_outcomes, lambda: self.now  # type: ignore[arg-type, return-value]
        )  # fmt: skip
        self.pieces: list[Piece] = []
        self.products: dict[str, Any] = {}
        """Products that take the place of those made up here, by job."""
        self.broken: set[str] = set()
        """Ids of the trials whose workers break."""
        self.at: dict[str, Callable[[], None]] = {}
        """Id of a piece of work -> what happens as soon as it has ended."""
        self._ready: dict[str, float] = dict.fromkeys(known, 0.0)
        """Second at which each product that was ordered is there."""

    @property
    def names(self) -> list[str]:
        """The names of all work in the order in which slots got it."""
        return [piece.name for piece in self.pieces]

    @property
    def trials(self) -> list[Suggestion]:
        return [piece.work[0] for piece in self.pieces if not isinstance(piece.work, Job)]

    def piece(self, name: str) -> Piece:
        [piece] = [piece for piece in self.pieces if piece.name == name]
        return piece

    def to_the_end(self) -> Run:
        """Does all the work, as Ray would: a slot that is free asks, and waits while there is none."""
        running: list[Piece] = []
        free = list(range(self.sweep.num_slots))
        while True:
            while free and (work := self.driver.next()) is not None:
                running.append(self._begin(work, free.pop(0)))
            if not running:
                assert self.driver.is_done, "it waits for ever"
                return self
            ended = min(running, key=lambda piece: (piece.end, piece.begin))
            running.remove(ended)
            free = sorted([*free, ended.slot])
            self.now = max(self.now, ended.end)
            self._end(ended)
            self.at.pop(ended.name, lambda: None)()

    def _begin(self, work: Any, slot: int) -> Piece:
        if isinstance(work, Job):
            name, kind, needs = work.id, work.kind, work.needs
        else:
            name, kind, needs = work[0].id, "trial", work[1]
        assert set(needs) <= self._ready.keys(), f"{name} waits for what nobody does"
        took_s = self.seconds.get(name, self.seconds.get(kind, 1.0))
        end = max([self.now, *(self._ready[need] for need in needs)]) + took_s
        self._ready[name] = end
        if name == LOOK:
            self._ready[DENSE] = self.now + took_s / 2
        self.pieces.append(Piece(name, slot, self.now, end, work))
        return self.pieces[-1]

    def _end(self, piece: Piece) -> None:
        if isinstance(piece.work, Job):
            product = self.products.get(piece.name, self._product(piece.work))
            if isinstance(product, Exception):
                self.driver.give_up()
            else:
                self.driver.job_ended(piece.name, product)
            return
        suggestion, _ = piece.work
        outcome = self.outcome_of(suggestion, piece.end - piece.begin)
        self.driver.trial_ended([outcome], {})
        self.driver.told(piece.name, None if piece.name in self.broken else outcome)

    def outcome_of(self, suggestion: Suggestion, seconds: float) -> Outcome:
        """What a trial comes to: each is faster and less accurate than the ones before."""
        if suggestion.id in self.broken:
            return replace(builders.failed(suggestion.id), candidate=suggestion.candidate)
        number = int(suggestion.id[1:])
        outcome = builders.outcome(suggestion.id, 0.89 - number / 100, 1.5 + number)
        assert outcome.plan is not None
        plan = replace(outcome.plan, blocks=(replace(outcome.plan.blocks[0], num_tokens=100 - number),))
        return replace(outcome, candidate=suggestion.candidate, seconds=seconds, plan=plan)

    def _product(self, job: Job) -> Any:
        if job.kind == "look":
            first = FirstLook(precision="float32", top1=0.9, num_images=24)
            return Looked(first=first, dense=builders.DENSE, device="cpu")
        if job.kind == "step":
            return ContextPart()
        if job.kind == "time":
            plans, num_rounds = job.subject
            speeds = [1.0 + 0.5 * (101 - plan.blocks[0].num_tokens) for plan in plans]
            return Timed(
                dense=timing(1.0, num_rounds), timings=[timing(speed, num_rounds) for speed in speeds],
                conditions={"device": "cpu"},
            )  # fmt: skip
        return job.subject.measured, nn.Identity()


def timing(speedup: float, num_rounds: int = 18) -> Timing:
    return Timing(
        speedup=speedup, speedup_low=0.99 * speedup, speedup_high=1.01 * speedup, latency_ms_p50=90.0 / speedup,
        throughput_img_s=111.0 * speedup, batch_size=8, num_rounds=num_rounds,
    )  # fmt: skip
