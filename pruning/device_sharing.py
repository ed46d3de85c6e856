"""Sharing of a device between processes: a loop can let others have it between two batches.

A process that times a model needs the device alone, and one that works on it meanwhile can stop between two batches:
there the loops of this library call `yield_device`. It does nothing unless the program that runs the loops sets a
callback by `calling_on_yield`. No timed lap calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_callbacks: list[Callable[[], None]] = []


def yield_device() -> None:
    """Releases the device if another process waits for it; blocks until it is held again."""
    if _callbacks:
        _callbacks[-1]()


def yielding_between(batches: Iterable[T]) -> Iterator[T]:
    """Yields the batches, and calls `yield_device` before each."""
    for batch in batches:
        yield_device()
        yield batch


@contextmanager
def calling_on_yield(callback: Callable[[], None]) -> Iterator[None]:
    """Has `yield_device` call `callback` within the context; where contexts are nested, the innermost one's."""
    _callbacks.append(callback)
    try:
        yield
    finally:
        _callbacks.pop()
