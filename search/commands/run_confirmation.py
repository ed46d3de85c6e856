"""The confirmation of a sweep's front as jobs for its slots: all that may be on it is timed, what is on it is rebuilt.

The models that are kept are repaired on all training images, as far as the time budget goes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from pruning.measure.stopwatch import MIN_LAP_S, MIN_ROUNDS, Timing
from pruning.model.anatomy import examine
from pruning.model.loading import read_weights
from pruning.model.surgery import keep_all_plan
from search.commands.run_state import Sweep
from search.front import contenders, distinct, front_of
from search.goal import Goal
from search.outcome import Measurement, Outcome
from search.trial.jobs import LOOK, Job, Rebuild, Timed
from search.trial.measure import speed_of
from search.trial.prepare import steps_for

CONFIRMING = 3
"""The front is timed for up to so many times the rounds of a trial."""

BUDGET_SHARE = 0.15
"""The largest share of the time budget that goes into repairs on all images, and again into the last timing."""

REPAIR_SHARE = 0.5
"""The share of a trial's seconds that a repair takes, about; the rest goes into its timing and its accuracy."""

DENSE_ID = "dense"
"""Name of the dense model among those that are rebuilt."""


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """The front of a sweep as it was measured in the end."""

    dense: Measurement
    outcomes: Sequence[Outcome]
    """The outcomes on the front, with their last measurements."""
    models: Mapping[str, nn.Module]
    """The model of each, by its id."""
    conditions: Mapping[str, str | int]
    """The conditions that the figures hold for."""


class Confirmation:
    """Times what may be on the front of a sweep, then builds what is on it."""

    def __init__(self, sweep: Sweep, goal: Goal) -> None:
        self._sweep, self._goal = sweep, goal
        self._timing_job: Job | None = None
        self._candidates: list[Outcome] = []
        self._timed: Timed | None = None
        self._dense = goal.dense
        self._front: list[Outcome] = []
        self._orders: list[Job] = []
        self._num_orders = 0
        self._rebuilt: dict[str, tuple[Measurement, nn.Module]] = {}

    @property
    def is_handed_out(self) -> bool:
        """True once no job is left to hand out."""
        return self._timed is not None and not self._orders

    def seconds(self, outcomes: Sequence[Outcome]) -> float:
        """Estimates the seconds that the confirmation of these outcomes takes at least, on all slots."""
        front = self._worthwhile(outcomes, self._goal)
        round_s = sum(map(_batch_s, [self._goal.dense, *(point.measurement for point in front if point.measurement)]))
        return (MIN_ROUNDS + 2) * round_s + self._rebuilds_s(outcomes)

    def _worthwhile(self, outcomes: Sequence[Outcome], goal: Goal) -> Sequence[Outcome]:
        """Returns the points of the front that are worth anything (`Goal.reference`), or all where none is."""
        front = front_of(goal.acceptable(outcomes), goal)
        values, reference = goal.values(front), np.array(goal.reference)
        worth = [front[row] for row in np.flatnonzero((values > reference).all(axis=1))]
        return worth or front

    def _rebuilds_s(self, outcomes: Sequence[Outcome]) -> float:
        """Estimates the seconds in which the front is built once more, as its trials made it."""
        front = self._worthwhile(outcomes, self._goal)
        num_turns = -(-len(front) // self._sweep.num_slots)
        return num_turns * REPAIR_SHARE * statistics.fmean([point.seconds for point in front] or [0.0])

    def next(self, outcomes: Sequence[Outcome], left_s: float | None) -> Job | None:
        """Returns the next job; None if there is none now.

        Args:
            outcomes: all outcomes of the sweep.
            left_s: seconds to the end of the time budget; None without a budget.
        """
        if self._timing_job is None:
            self._timing_job = self._timing(outcomes, left_s)
            return self._timing_job
        if not self._orders:
            return None
        job = self._orders.pop(0)
        order: Rebuild = job.subject
        return replace(job, subject=replace(order, on_all_images=order.on_all_images and self._has_time(order, left_s)))

    def timed(self, product: Timed) -> None:
        """Takes the timings, and chooses the front by them."""
        self._timed = product
        self._dense = _with_timing(self._dense, product.dense)
        timed = [
            replace(outcome, measurement=_with_timing(outcome.measurement, timing))
            for outcome, timing in zip(self._candidates, product.timings, strict=True)
            if outcome.measurement is not None
        ]
        goal = replace(self._goal, dense=self._dense)
        self._front = list(distinct(self._worthwhile(timed, goal), goal))
        self._orders = [self._order(outcome) for outcome in self._front]
        splits = self._sweep.inputs.splits
        if splits.test is not None or splits.confirm is not None:
            plan = keep_all_plan(examine(self._sweep.inputs.model))
            order = Rebuild(plan=plan, measured=self._dense, on_all_images=False)  # nothing of it is repaired
            self._orders.append(Job(id=_id_of(DENSE_ID), kind="rebuild", needs=(LOOK,), subject=order))

    def rebuilt(self, job_id: str, measurement: Measurement, model: nn.Module) -> None:
        """Takes a model that was built once more."""
        self._rebuilt[job_id] = measurement, model

    def result(self) -> Confirmed:
        """Returns the front, once all jobs are done."""
        assert self._timed is not None
        dense, _ = self._rebuilt.get(_id_of(DENSE_ID), (self._dense, None))
        rebuilt = {outcome.id: self._rebuilt[_id_of(outcome.id)] for outcome in self._front}
        return Confirmed(
            dense=dense,
            outcomes=[replace(outcome, measurement=rebuilt[outcome.id][0]) for outcome in self._front],
            models={outcome_id: model for outcome_id, (_, model) in rebuilt.items()},
            conditions=self._timed.conditions,
        )

    def _timing(self, outcomes: Sequence[Outcome], left_s: float | None) -> Job:
        """Returns the job that times all that may be on the front: in as many rounds as time allows."""
        goal = self._goal
        different = [outcome for outcome in outcomes if outcome.same_as is None]
        self._candidates = list(contenders(goal.acceptable(different), goal))
        num_rounds = CONFIRMING * self._sweep.config.measure.num_rounds
        if left_s is not None:
            measurements = [goal.dense, *(one.measurement for one in self._candidates if one.measurement)]
            round_s = sum(map(_batch_s, measurements))
            time_s = min(self._allowance_s, left_s - self._rebuilds_s(outcomes))
            num_rounds = max(MIN_ROUNDS, min(num_rounds, int(time_s / round_s) - 1))
        plans = [outcome.plan for outcome in self._candidates]
        return Job(id="timing", kind="time", needs=(LOOK, *self._needs(self._candidates)), subject=(plans, num_rounds))

    def _order(self, outcome: Outcome) -> Job:
        assert outcome.plan is not None
        assert outcome.measurement is not None
        weights = read_weights(self._sweep.folder.weights_of(outcome.weights_id)) if outcome.has_weights else None
        order = Rebuild(plan=outcome.plan, measured=outcome.measurement, weights=weights, trial_s=outcome.seconds)
        return Job(id=_id_of(outcome.id), kind="rebuild", needs=(LOOK, *self._needs([outcome])), subject=order)

    def _needs(self, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
        """Returns the ids of the steps that building these models needs."""
        steps = [step for outcome in outcomes for step in steps_for(outcome.candidate, self._sweep.space)]
        return tuple(dict.fromkeys(step.id for step in steps if step.kind in ("exits", "sensitivity")))

    @property
    def _allowance_s(self) -> float:
        return BUDGET_SHARE * (self._sweep.config.search.time_budget_s or 0.0)

    def _has_time(self, order: Rebuild, left_s: float | None) -> bool:
        """Tells whether a repair on all images leaves enough time for the models that are still to be built."""
        if left_s is None:
            return True
        splits = self._sweep.inputs.splits
        factor = len(splits.training) / len(splits.calibration)
        others_s = sum(REPAIR_SHARE * job.subject.trial_s for job in self._orders) / self._sweep.num_slots
        return REPAIR_SHARE * (1 + factor) * order.trial_s + others_s < left_s


def _batch_s(measurement: Measurement) -> float:
    return max(MIN_LAP_S, measurement.latency_ms_p50 / 1000)


def _id_of(outcome_id: str) -> str:
    return f"rebuild-{outcome_id}"


def _with_timing(measurement: Measurement, timing: Timing) -> Measurement:
    return replace(measurement, **speed_of(timing))
