"""The share of a cluster that a trial takes, and how a cluster shows that is not there; without Ray running."""

from __future__ import annotations

import pytest

from search.cluster.session import TrialResources, ray_running
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


def test_address_at_which_nobody_answers_is_one_line() -> None:
    with (
        pytest.raises(SweepError, match=r"^no Ray cluster at '127\.0\.0\.1:9': ") as raised,
        ray_running("127.0.0.1:9"),
    ):
        raise AssertionError("it does not get here")
    assert "\n" not in str(raised.value)
