"""Stores of an exchange without Ray."""

from __future__ import annotations

from typing import Any


class DictStore(dict[str, Any]):
    """A `search.cluster.stores.Store` in this process."""

    def take(self, key: str, /) -> Any:
        return self.pop(key, None)
