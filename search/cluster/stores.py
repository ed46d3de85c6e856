"""The stores of a sweep's exchange, as its other processes use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import ray

from search.cluster.exchange import StoreName

Content = TypeVar("Content")


class Store(Protocol[Content]):
    """Contents by key."""

    def get(self, key: str, /) -> Content | None:
        """Returns the content of a key, which stays; None if it has none."""

    def take(self, key: str, /) -> Content | None:
        """Removes and returns the content of a key; None if it has none."""

    def __setitem__(self, key: str, content: Content, /) -> None:
        """Stores a content in the place of any that had the key; returns once it is there."""


class SharedStore(Store[Content]):
    """A store of the exchange, in another process."""

    def __init__(self, exchange: Any, name: StoreName, wait: Callable[[Any], Any] = ray.get) -> None:
        """
        Args:
            exchange: Ray's handle of the `Exchange`.
            wait: waits for the result of a call of the exchange, and returns it.
        """
        self._exchange, self._name, self._wait = exchange, name, wait

    def get(self, key: str, /) -> Content | None:
        content: Content | None = self._wait(self._exchange.peek.remote(self._name, key))
        return content

    def values(self) -> list[Content]:
        """Returns all contents."""
        contents: list[Content] = self._wait(self._exchange.contents.remote(self._name))
        return contents

    def take(self, key: str, /) -> Content | None:
        content: Content | None = self._wait(self._exchange.take.remote(self._name, key))
        return content

    def __setitem__(self, key: str, content: Content, /) -> None:
        self._wait(self._exchange.put.remote(self._name, key, content))
