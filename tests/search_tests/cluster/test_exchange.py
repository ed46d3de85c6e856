"""The stores of the exchange, without Ray."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from search.cluster.exchange import Exchange, StoreName
from tests.search_tests import builders

STORES: tuple[StoreName, ...] = get_args(StoreName)


@pytest.mark.parametrize("store", STORES)
def test_content_is_taken_once_and_peeked_at_any_number_of_times(store: StoreName) -> None:
    exchange = Exchange()
    exchange.put(store, "t000", {"epoch": 1})
    assert [exchange.peek(store, "t000") for _ in range(2)] == [{"epoch": 1}] * 2
    assert exchange.take(store, "t000") == {"epoch": 1}
    assert exchange.take(store, "t000") is exchange.peek(store, "t000") is None


def test_later_content_replaces_the_earlier_one() -> None:
    exchange = Exchange()
    exchange.put("states", "t000", 1)
    exchange.put("states", "t000", 2)
    exchange.put("states", "t001", 3)
    assert exchange.take("states", "t000") == 2
    assert exchange.take("states", "t001") == 3


def test_a_key_means_something_else_in_each_store() -> None:
    exchange = Exchange()
    for number, store in enumerate(STORES):
        exchange.put(store, "t000", number)
    assert [exchange.take(store, "t000") for store in STORES] == list(range(len(STORES)))


def test_stores_may_have_a_first_content_that_stays_with_who_gave_it() -> None:
    states, outcome = {"t000": {"epoch": 3}}, builders.outcome("t001", 0.9, 1.5)
    exchange = Exchange({"look": "looked"}, states, {"key": builders.DENSE}, {"key": outcome})
    assert exchange.peek("products", "look") == "looked"
    assert exchange.take("states", "t000") == {"epoch": 3}
    assert exchange.take("weights", "t000") is None
    assert exchange.peek("measurements", "key") == builders.DENSE
    assert exchange.peek("finetunes", "key") == outcome
    assert states == {"t000": {"epoch": 3}}


def test_workers_that_are_ready_are_counted() -> None:
    exchange = Exchange()
    counts = [exchange.num_ready_workers()]
    for _ in range(2):
        exchange.worker_ready()
        counts.append(exchange.num_ready_workers())
    assert counts == [0, 1, 2]


def test_its_process_starts_without_torch_and_ray() -> None:
    code = "import sys, search.cluster.exchange; print(*{'torch', 'ray', 'optuna'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "\n"
