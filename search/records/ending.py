"""When a sweep ends: what it found grows no more, or the user has seen enough."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


def is_saturated(hypervolumes: Sequence[float], patience: int, min_gain: float) -> bool:
    """Whether the last trials found too little.

    Args:
        hypervolumes: after each measured trial.
        patience: so many trials count as the last ones; 0: never.
        min_gain: share of the hypervolume, below which their gain is too little.
    """
    if not 0 < patience < len(hypervolumes):
        return False
    return hypervolumes[-1] - hypervolumes[-1 - patience] < min_gain * hypervolumes[-1]


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
