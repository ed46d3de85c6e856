"""Turns on a device that several processes share: between two batches, a loop lets others go first.

Who times a model wants the device alone, and who works on it meanwhile can stop between two batches: there the loops of
this library call `yield_device`. What that does is up to who runs them; by default nothing. No timed lap calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_asked: list[Callable[[], None]] = []


def yield_device() -> None:
    """Whoever waits for the device may have it now; returns once it is ours again."""
    if _asked:
        _asked[-1]()


def yielding_between(batches: Iterable[T]) -> Iterator[T]:
    """The same batches; gives way before each."""
    for batch in batches:
        yield_device()
        yield batch


@contextmanager
def calling_on_yield(ask: Callable[[], None]) -> Iterator[None]:
    """Within this, `yield_device` calls `ask`; of several, the innermost."""
    _asked.append(ask)
    try:
        yield
    finally:
        _asked.pop()
