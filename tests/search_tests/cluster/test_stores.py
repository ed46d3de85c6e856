"""A store of the exchange as another process uses it, with a fake handle in the place of Ray's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from search.cluster.exchange import Exchange
from search.cluster.stores import SharedStore


class FakeHandle:
    """Calls an object's methods by `remote`, but not before their result is waited for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: lambda: getattr(self._target, name)(*args))


def wait(call: Callable[[], Any]) -> Any:
    return call()


def test_processes_share_a_store() -> None:
    handle = FakeHandle(Exchange(states={"t000": {"epoch": 1}}))
    one, other = (SharedStore[Any](handle, "states", wait) for _ in range(2))
    assert one.get("t000") == {"epoch": 1}
    one["t001"] = {"epoch": 2}
    assert other.take("t001") == {"epoch": 2}
    assert one.take("t001") is one.get("t001") is None


def test_stores_of_other_names_are_apart() -> None:
    handle = FakeHandle(Exchange())
    states, weights = SharedStore[Any](handle, "states", wait), SharedStore[Any](handle, "weights", wait)
    weights["t000"] = {"t000": {}}
    assert states.get("t000") is None
    assert weights.take("t000") == {"t000": {}}
