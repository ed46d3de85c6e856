"""The work of a sweep other than its trials, as jobs that any worker can do: look, prepare, rebuild, time.

Each job leaves a product under its id, which other jobs and trials need.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pruning.artifact import Weights
from pruning.data import Images
from pruning.errors import VitfrontError
from pruning.measure.stopwatch import Timing, device_name, time_against_dense
from pruning.measure.widths import measure_allowed_widths
from pruning.plan import Plan
from pruning.precision import Precision
from search.config import Config
from search.outcome import Measurement
from search.trial.context import ContextPart, ModelTimer, TrialContext, lease_on
from search.trial.first_look import FirstLook, look
from search.trial.inputs import Inputs
from search.trial.lease import Lease
from search.trial.measure import finite_logits, rebuild, time_shapes
from search.trial.prepare import Step, WidthTimer, first_context, measure_dense, run_step
from search.trial.progress import on_cpu
from search.trial.reuse import Cache, measured_before

POLL_S = 0.1
"""Time between two looks at whether a product is there."""

DENSE, LOOK = "dense", "look"
"""Ids of the products of the first job: the model once it is final, and then its first look."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of a sweep, for one worker."""

    id: str
    """Id of the job, and of its product."""
    kind: Literal["look", "answers", "step", "rebuild", "time"]
    """Work to do: look at the dense model, answer a part of val for that look, run a step of the preparation, build a
    model of the front once more, or time the shapes of several."""
    needs: tuple[str, ...] = ()
    """Ids of the products that it waits for."""
    subject: Any = None
    """The number of parts of val for a look, the number of a part, a `Step`, a `Rebuild`, or the plans to time with the
    number of rounds."""


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """The order to build a model once more."""

    plan: Plan
    measured: Measurement
    """Measurement of its trial."""
    weights: Weights | None = None
    """Weights of a model whose weights do not follow from its plan."""
    trial_s: float = 0.0
    """Seconds that its trial took."""
    on_all_images: bool = True
    """Repair it on all training images; else on those for calibration alone."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """The dense model once it is final, for the other workers."""

    precision: Precision
    weights: Weights | None
    """Weights if they were trained just now; those of the inputs are final else."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """The product of the job that looks at the dense model."""

    first: FirstLook
    dense: Measurement | None
    """Measurement of the dense model; None if it is not to be pruned."""
    device: str
    """Name of the device that the model is measured on."""
    weights: Weights | None = None
    """Weights of the dense model if they were trained just now."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """The product of the job that times shapes."""

    dense: Timing
    timings: Sequence[Timing]
    """One timing a plan, in their order."""
    conditions: dict[str, str | int]
    """The conditions that the figures hold for: device, precision, threads, batch size, torch."""


class Jobs(Protocol):
    """Jobs by id, each of which one worker takes."""

    def take(self, key: str, /) -> Job | None: ...


class Products(Protocol):
    """Products of jobs by id, which all workers share."""

    def get(self, key: str, /) -> Any: ...

    def __setitem__(self, key: str, product: Any, /) -> None: ...


class NeedFailedError(VitfrontError):
    """A job that this one needs has failed."""


@dataclass(kw_only=True)
class Workplace:
    """The dense model, the images and what is known of both, on one worker; it learns from the products of all."""

    config: Config
    inputs: Inputs
    """Inputs whose model is on the worker's device."""
    products: Products
    jobs: Jobs
    measured_cache: Cache[Measurement] = field(default_factory=dict[str, Measurement])
    """Measurements that no trial need repeat; see `search.trial.reuse.measured_before`."""
    timer: ModelTimer = time_against_dense
    time_widths: WidthTimer = measure_allowed_widths
    sleep: Callable[[float], None] = time.sleep
    _context: TrialContext | None = None
    _added: set[str] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        return next(self.inputs.model.parameters()).device

    @property
    def lease(self) -> Lease:
        """This process's lease of the worker's device."""
        return lease_on(self.device)

    def context(self, needs: Sequence[str] = ()) -> TrialContext:
        """Gives the context of the worker, once the products that are needed are there.

        Raises:
            NeedFailedError: a job that is needed has failed.
        """
        if self._context is None:
            self._context = self._first_context(self.wait_for(DENSE))
        for job_id in needs:
            if job_id not in self._added:
                product = self.wait_for(job_id)
                if isinstance(product, ContextPart):
                    self._context = self._context.extended(product)
                self._added.add(job_id)
        return self._context

    def wait_for(self, job_id: str) -> Any:
        """Waits for a product.

        Raises:
            NeedFailedError: its job has failed.
        """
        while (product := self.products.get(job_id)) is None:
            self.sleep(POLL_S)
        if isinstance(product, VitfrontError):
            raise NeedFailedError(str(product))
        return product

    def _first_context(self, dense: Dense) -> TrialContext:
        model = self.inputs.model
        if dense.weights is not None:
            model.load_state_dict(dict(dense.weights))
        return first_context(self.config, model, self.inputs.splits, dense.precision, self.timer)


def run_job(job: Job, workplace: Workplace) -> Any:
    """Does a job.

    Returns:
        Its product, on the CPU.

    Raises:
        VitfrontError: what is wrong with the model or the images.
    """
    return _JOBS[job.kind](job, workplace)


def _look(job: Job, workplace: Workplace) -> Looked:
    config, inputs = workplace.config, workplace.inputs

    def publish(precision: Precision) -> None:
        workplace.products[DENSE] = Dense(precision=precision, weights=trained_weights())

    def trained_weights() -> Weights | None:
        return None if inputs.trained else on_cpu(inputs.model.state_dict())

    def answer(config: Config, model: nn.Module, images: Images, precision: Precision) -> Tensor:
        if images is not inputs.splits.val or job.subject is None:
            return finite_logits(config, model, images, precision)
        return torch.cat([_answers_of_part(workplace, part, job.subject, precision) for part in range(job.subject)])

    try:
        first = look(config, inputs, device=workplace.device, when_trained=publish, answer=answer)
    except VitfrontError as error:
        workplace.products[DENSE] = error  # nobody waits for it in vain
        raise
    if first.fault is not None:
        return Looked(first=first, dense=None, device=device_name(workplace.device), weights=trained_weights())
    context = workplace.context()
    dense = measure_dense(context, first)
    for key, measurement in measured_before(context.anatomy, dense, []).items():
        workplace.measured_cache[key] = measurement
    return Looked(first=first, dense=dense, device=device_name(workplace.device), weights=trained_weights())


def answers_id(part: int) -> str:
    """Gives the id of the job that answers a part of val."""
    return f"answers-{part}"


def _answers_of_part(workplace: Workplace, part: int, num_parts: int, precision: Precision) -> Tensor:
    """Gives the answers to a part of val: from the worker that has begun with it, or, if nobody has, of this one."""
    job_id = answers_id(part)
    if part > 0 and workplace.products.get(job_id) is None and workplace.jobs.take(job_id) is None:
        return workplace.wait_for(job_id).to(workplace.device)
    known = workplace.products.get(job_id) if part > 0 else None
    if isinstance(known, Tensor):
        return known.to(workplace.device)
    images = workplace.inputs.splits.val
    return finite_logits(workplace.config, workplace.inputs.model, _part_of(images, part, num_parts), precision)


def _part_of(images: Images, part: int, num_parts: int) -> Images:
    ends = [round(len(images) * end / num_parts) for end in (part, part + 1)]
    return images.take(slice(*ends))


def _answer(job: Job, workplace: Workplace) -> Tensor:
    part, num_parts = job.subject
    context = workplace.context(job.needs)
    images = _part_of(context.splits.val, part, num_parts)
    return finite_logits(context.config, context.model, images, context.precision).cpu()


def _run_step(job: Job, workplace: Workplace) -> ContextPart:
    assert isinstance(job.subject, Step)
    context = workplace.context(job.needs)
    curves_id = Step(kind="curves").id
    return run_step(
        context, job.subject, workplace.inputs.space, time_widths=workplace.time_widths,
        curves=lambda: workplace.context([curves_id]).known.channel_curves,
    )  # fmt: skip


def _rebuild(job: Job, workplace: Workplace) -> tuple[Measurement, nn.Module]:
    order = job.subject
    assert isinstance(order, Rebuild)
    context = workplace.context(job.needs)
    measurement, model = rebuild(context, order.plan, order.measured, order.weights, on_all_images=order.on_all_images)
    return measurement, model.cpu()


def _time(job: Job, workplace: Workplace) -> Timed:
    plans, num_rounds = job.subject
    context = workplace.context(job.needs)
    dense, timings = time_shapes(context, plans, num_rounds)
    return Timed(
        dense=dense, timings=timings,
        conditions={
            "device": device_name(context.device), "precision": context.precision,
            "threads": torch.get_num_threads(), "batch_size": context.config.measure.batch_size,
            "torch": torch.__version__,
        },
    )  # fmt: skip


_JOBS: dict[str, Callable[[Job, Workplace], Any]] = {
    "look": _look, "answers": _answer, "step": _run_step, "rebuild": _rebuild, "time": _time
}  # fmt: skip
