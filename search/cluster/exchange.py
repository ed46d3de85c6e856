"""Where processes of a sweep leave things for each other. A file of its own, so that its process starts fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Mailbox:
    """An actor: what lies in it by key, mostly a trial, until it is taken."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        """content: what lies in it from the start."""
        self._content = dict(content)
        self._num_arrived = 0

    def put(self, trial_id: str, content: Any) -> None:
        """Replaces what lies there."""
        self._content[trial_id] = content

    def take(self, trial_id: str) -> Any:
        """None if nothing lies there."""
        return self._content.pop(trial_id, None)

    def arrive(self) -> None:
        """A worker is there."""
        self._num_arrived += 1

    def num_arrived(self) -> int:
        """Workers that are there."""
        return self._num_arrived

    def see(self, key: str) -> Any:
        """The same, but it stays there."""
        return self._content.get(key)
