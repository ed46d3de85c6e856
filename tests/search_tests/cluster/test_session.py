"""The share of a cluster that a trial takes, and how broken workers and clusters show; without Ray running."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import RaySystemError, RayTaskError, WorkerCrashedError

from pruning.errors import TargetError
from search.cluster.session import TrialResources, fetch, ray_running
from search.errors import ConfigError, SweepError
from tests.search_tests import tiny

ONE_CORE = TrialResources(cpus=1, gpus=0.0)


@pytest.mark.parametrize(
    ("cpus", "gpus", "available", "num_slots"),
    [
        (1, 0.0, {"CPU": 4.0}, 4),
        (2, 0.0, {"CPU": 5.0, "GPU": 1.0}, 2),
        (1, 1.0, {"CPU": 16.0, "GPU": 2.0}, 2),
        (4, 0.5, {"CPU": 8.0, "GPU": 4.0}, 2),
        (1, 0.5, {"CPU": 8.0, "GPU": 1.0}, 2),
        (4, 0.0, {"CPU": 2.0}, 1),  # nodes may still come
        (1, 1.0, {"CPU": 2.0}, 1),
    ],
)
def test_as_many_trials_fit_as_the_scarcest_resource_has_room_for(
    cpus: int, gpus: float, available: dict[str, float], num_slots: int
) -> None:
    assert TrialResources(cpus=cpus, gpus=gpus).num_slots(available) == num_slots


@pytest.mark.parametrize(
    ("gpus_per_trial", "available", "gpus"),
    [
        (None, {"CPU": 2.0}, 0.0),
        (None, {"CPU": 2.0, "GPU": 0.0}, 0.0),
        (None, {"CPU": 2.0, "GPU": 4.0}, 1.0),
        (0.25, {"CPU": 2.0}, 0.25),
        (0.25, {"CPU": 2.0, "GPU": 4.0}, 0.25),
    ],
)
def test_a_trial_gets_a_gpu_where_there_is_any_unless_the_recipe_says_otherwise(
    gpus_per_trial: float | None, available: dict[str, float], gpus: float
) -> None:
    config = tiny.config(resources={"cpus_per_trial": 3, "gpus_per_trial": gpus_per_trial})
    assert TrialResources.of(config, available) == TrialResources(cpus=3, gpus=gpus)


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (TrialResources(cpus=9, gpus=0.0), r"^resources\.cpus_per_trial: 9 is more than this machine has, 2$"),
        (TrialResources(cpus=1, gpus=0.5), r"^resources\.gpus_per_trial: 0\.5 is more than this machine has, 0$"),
    ],
)
def test_trial_that_is_larger_than_the_machine_is_refused(resources: TrialResources, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resources.check({"CPU": 2.0})


def test_trial_as_large_as_the_machine_is_accepted() -> None:
    TrialResources(cpus=2, gpus=1.0).check({"CPU": 2.0, "GPU": 1.0})
    ONE_CORE.check({"CPU": 1.0})


def raising(error: Exception) -> Any:
    def get(reference: Any) -> Any:
        raise error

    return get


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("run_task", "Traceback ...", cause)


def test_result_of_a_task_is_fetched() -> None:
    assert fetch("reference", lambda reference: f"result of {reference}") == "result of reference"


def test_error_of_the_user_comes_as_it_was_raised() -> None:
    cause = TargetError("no plan is so small")
    with pytest.raises(TargetError) as raised:
        fetch(None, raising(task_error(cause)))
    assert raised.value is cause


def test_error_of_ours_comes_with_the_workers_traceback() -> None:
    with pytest.raises(RayTaskError):
        fetch(None, raising(task_error(ZeroDivisionError("division by zero"))))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (task_error(RaySystemError("No module named 'timm'\nTraceback")), "^a worker has not what it needs: .*timm'$"),
        (WorkerCrashedError(), "^a worker broke: The worker died unexpectedly while executing this task.*$"),
    ],
)
def test_broken_worker_is_one_line(error: Exception, message: str) -> None:
    with pytest.raises(SweepError, match=message) as raised:
        fetch(None, raising(error))
    assert "\n" not in str(raised.value)


def test_address_at_which_nobody_answers_is_one_line() -> None:
    with (
        pytest.raises(SweepError, match=r"^no Ray cluster at '127\.0\.0\.1:9': ") as raised,
        ray_running("127.0.0.1:9"),
    ):
        raise AssertionError("it does not get here")
    assert "\n" not in str(raised.value)
