"""Ray for a sweep: started or joined, what a trial takes of it, and single tasks."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from pruning.errors import first_line_of
from search.config import Config
from search.errors import ConfigError, SweepError

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # no CSV and JSON file a trial
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables are printed whatever `verbose` says
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it takes Ctrl-C for the end of the trials
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")  # all trials so far, every ten seconds; see tune.run_trials
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

CONNECT_S = 10.0
"""Time in which a cluster's head has to answer."""


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    """The part of the cluster that a task or a trial takes."""

    cpus: int
    """Number of cores, and of torch threads."""
    gpus: float
    """Number of GPUs; less than 1 for a part of one."""

    @classmethod
    def of(cls, config: Config, available: Mapping[str, float]) -> TrialResources:
        """The part that the recipe gives a trial; by default one GPU where the cluster has any.

        Args:
            available: Ray's name of a resource -> amount that there is, now: nodes with GPUs may come later.
        """
        gpus = config.resources.gpus_per_trial
        if gpus is None:
            gpus = 1.0 if available.get("GPU", 0) > 0 else 0.0
        return cls(cpus=config.resources.cpus_per_trial, gpus=gpus)

    def check(self, available: Mapping[str, float]) -> None:
        """Checks that this machine has as much; a trial that is larger would wait for ever.

        A cluster is not checked: nodes may still come to it.

        Args:
            available: Ray's name of a resource -> amount that there is.

        Raises:
            ConfigError: names the key of the recipe and what there is.
        """
        for key, wanted, kind in (("cpus_per_trial", self.cpus, "CPU"), ("gpus_per_trial", self.gpus, "GPU")):
            amount = available.get(kind, 0)
            if wanted > amount:
                raise ConfigError(f"resources.{key}: {wanted:g} is more than this machine has, {amount:g}")

    def num_slots(self, available: Mapping[str, float]) -> int:
        """Returns the number of trials that fit at once, at least 1."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return max(1, min(int(available.get(kind, 0) // amount) for kind, amount in wanted.items() if amount))


def cluster_resources() -> Mapping[str, float]:
    """Returns the resources of all nodes that there are now, by Ray's names."""
    resources: Mapping[str, float] = ray.cluster_resources()
    return resources


@contextmanager
def ray_running(address: str | None) -> Iterator[None]:
    """Runs Ray, quietly; it is started for this sweep unless an address is given or it runs already.

    Raises:
        SweepError: Ray cannot be started, or no cluster answers at the address.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            _reach(address)
            ray.init(
                address=address or "local",  # else Ray joins whatever cluster it finds on this machine
                logging_level=logging.ERROR,
                log_to_driver=False,
                include_dashboard=None if address else False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            where = "Ray cannot be started" if address is None else f"no Ray cluster at {address!r}"
            hint = "; it wants a token: RAY_AUTH_MODE=token, and the head's ~/.ray/auth_token here"
            is_locked = "AuthToken" in str(error.__cause__)  # as `ray start` has it, and --address auto knows it
            raise SweepError(f"{where}: {first_line_of(error)}{hint if is_locked else ''}") from error
    try:
        yield
    finally:
        if is_ours:
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Raises OSError if nobody answers at host:port; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
