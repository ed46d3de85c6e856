"""Ctrl-C in a sweep."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from search.commands.run_search import calling_on_interrupt


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])  # the latter in the background
def test_first_interrupt_calls_and_the_second_interrupts(before: Any) -> None:
    called, own_handler = list[int](), signal.signal(signal.SIGINT, before)
    with calling_on_interrupt(lambda: called.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert called == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert called == [1]
    assert signal.signal(signal.SIGINT, own_handler) is before


def test_afterwards_an_interrupt_is_as_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with calling_on_interrupt(lambda: None):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_nothing_changes() -> None:
    seen = []

    def work() -> None:
        with calling_on_interrupt(lambda: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
