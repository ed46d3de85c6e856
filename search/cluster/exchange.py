"""Where processes of a sweep leave things for each other. A file of its own, so that its process starts fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Exchange:
    """An actor: what lies in it by key, mostly a trial, until it is taken."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        """content: what lies in it from the start."""
        self._content = dict(content)
        self._num_ready_workers = 0

    def put(self, trial_id: str, content: Any) -> None:
        """Replaces what lies there."""
        self._content[trial_id] = content

    def take(self, trial_id: str) -> Any:
        """None if nothing lies there."""
        return self._content.pop(trial_id, None)

    def worker_ready(self) -> None:
        """A worker is there."""
        self._num_ready_workers += 1

    def num_ready_workers(self) -> int:
        """Workers that are there."""
        return self._num_ready_workers

    def peek(self, key: str) -> Any:
        """The same, but it stays there."""
        return self._content.get(key)
