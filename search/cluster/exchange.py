"""The actor through which the processes of a sweep hand things to each other.

The file is small and imports little, so that the actor's process starts fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from search.outcome import Measurement, Outcome

StoreName = Literal["jobs", "products", "states", "weights", "measurements", "finetunes"]
"""Names of the stores. jobs: id of a job -> the job, from the driver to its worker. products: id of a job -> its
product, or the error that it ended with, from its worker to all others and to the driver. states: id of a trial ->
state of its training, from a worker to the driver after each epoch, or from the driver to a worker that resumes it.
weights: id of a trial -> its trained weights, from a worker to the driver. measurements: key of a plan or of its shape
-> a measurement that no worker need repeat. finetunes: key of a plan -> the outcome of a fine-tune that no worker need
repeat."""


class Exchange:
    """Named stores of contents by key, and the count of the workers that are ready."""

    def __init__(
        self,
        products: Mapping[str, Any] | None = None,
        states: Mapping[str, Mapping[str, Any]] | None = None,
        measurements: Mapping[str, Measurement] | None = None,
        finetunes: Mapping[str, Outcome] | None = None,
    ) -> None:
        """
        Args:
            products: first content of the store of that name, of jobs that need not be done.
            states: first content of the store of that name, of trials that an earlier run did not end.
            measurements: first content of the store of that name.
            finetunes: first content of the store of that name.
        """
        self._stores: dict[StoreName, dict[str, Any]] = {
            "jobs": {},
            "products": dict(products or {}),
            "states": dict(states or {}),
            "weights": {},
            "measurements": dict(measurements or {}),
            "finetunes": dict(finetunes or {}),
        }
        self._num_ready_workers = 0

    def put(self, store: StoreName, key: str, content: Any) -> None:
        """Stores a content in the place of any that had the key."""
        self._stores[store][key] = content

    def take(self, store: StoreName, key: str) -> Any:
        """Removes and returns the content of a key; None if it has none."""
        return self._stores[store].pop(key, None)

    def peek(self, store: StoreName, key: str) -> Any:
        """Returns the content of a key, which stays; None if it has none."""
        return self._stores[store].get(key)

    def worker_ready(self) -> None:
        """Counts one more worker that is ready."""
        self._num_ready_workers += 1

    def num_ready_workers(self) -> int:
        """Returns the number of workers that are ready."""
        return self._num_ready_workers
