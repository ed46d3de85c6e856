"""The work of a sweep before and after its trials, as tasks on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
import torch
from torch import nn

from pruning.artifact import Weights
from pruning.measure.stopwatch import Timing
from pruning.methods.profile import Profile
from pruning.plan import Plan, TokenReduction
from search.config import Config
from search.outcome import Candidate, Measurement
from search.trial.context import TrialContext, lease_on
from search.trial.first_look import FirstLook, look
from search.trial.inputs import Inputs
from search.trial.measure import Confirmation, confirm, time_shapes
from search.trial.prepare import prepare
from search.trial.warm_start import propose


def look_remotely(config: Config, inputs: Inputs) -> tuple[FirstLook, nn.Module | None]:
    """Runs `look` on a worker's device.

    Returns:
        The first look; and the dense model on the CPU if it was trained, else None: that of the inputs is as good.
    """
    first = look(config, inputs, device=worker_device())
    return first, None if inputs.trained else inputs.model.cpu()


def prepare_remotely(
    config: Config, inputs: Inputs, trained: nn.Module | None, first: FirstLook,
    profiles: Mapping[TokenReduction, Profile],
) -> tuple[TrialContext, Measurement, list[Candidate]]:  # fmt: skip
    """Runs `prepare` on a worker's device, then `propose`.

    Args:
        trained: the dense model if it was trained, to take in the place of that of the inputs.

    Returns:
        The context, on the CPU, from where every worker can take it; the dense model's measurement; the candidates.
    """
    inputs = inputs if trained is None else replace(inputs, model=trained, trained=True)
    context, dense = prepare(config, inputs, first, device=worker_device(), profiles=profiles)
    proposed = propose(context, inputs.space)
    return context.to("cpu"), dense, proposed


def time_remotely(context: TrialContext, plans: list[Plan]) -> list[Timing]:
    """Runs `time_shapes` on a worker's device."""
    return time_shapes(context.to(worker_device()), plans)


def confirm_remotely(context: TrialContext, plans: list[Plan], weights: list[Weights | None]) -> Confirmation:
    """Runs `confirm` on a worker's device; the models come back on the CPU."""
    confirmation = confirm(context.to(worker_device()), plans, weights)
    return replace(confirmation, models=[model.cpu() for model in confirmation.models])


def run_task(function: Callable[..., Any], cpus: int, *args: Any) -> Any:
    """Returns a function's result, computed with that many torch threads under a shared lease of the device."""
    torch.set_num_threads(cpus)
    with lease_on(worker_device()).shared():
        return function(*args)


def worker_device() -> torch.device:
    """Returns the device that Ray gave this worker."""
    return torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
