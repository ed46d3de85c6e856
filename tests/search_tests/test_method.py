"""The table of methods: a line for each name, and what one trait says of another."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from pruning.methods.schedule import Schedule
from search.method import METHODS, Method

NAMES: tuple[Method, ...] = get_args(Method)


def test_every_name_has_its_line_in_their_order() -> None:
    assert tuple(METHODS) == NAMES


def test_methods_are_told_apart_by_their_traits() -> None:
    traits = [{**vars(method), "summary": ""} for name, method in METHODS.items() if name not in get_args(Schedule)]
    assert all(traits.count(one) == 1 for one in traits)
    assert len({method.summary for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_traits_of_a_method_agree(name: Method) -> None:
    method = METHODS[name]
    assert method.takes_channels or method.takes_tokens or method.is_sparse
    assert method.summary and "\n" not in method.summary
    assert not (method.has_budgets or method.needs_profile) or (method.takes_channels and method.takes_tokens)
    assert not (method.trains and method.repairs)
    assert method.trains or not method.serves_every_exit
    assert not method.takes_tokens or method.repairs


def test_methods_that_take_tokens_alone_are_the_schedules() -> None:
    alone = {name for name, method in METHODS.items() if method.takes_tokens and not method.takes_channels}
    assert alone == set(get_args(Schedule))


def test_table_is_read_without_torch() -> None:
    look = "import sys, search.method; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
