"""The end of a sweep by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def calling_on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls a function within this; the second one raises KeyboardInterrupt.

    In another than the main thread, which alone may handle signals, Ctrl-C is left as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not as before: a job in the background ignores it
        call()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
