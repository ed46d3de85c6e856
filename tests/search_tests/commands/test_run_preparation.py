"""The steps of the preparation as jobs: their order, what each waits for, and what goes beside the first look."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from search.commands.run_preparation import Preparation
from search.space import Space
from search.trial.context import ContextPart
from search.trial.jobs import DENSE, Job
from search.trial.prepare import steps_before
from tests.search_tests import tiny

ALL: dict[str, Any] = {
    "method": ["cascade", "global"], "exit_block": [2, 3], "token_reduction": "lfe", "round_to": [8, "auto"]
}  # fmt: skip
IDS = ["sensitivity-3", "exits", "widths-lfe", "curves", "profile-lfe", "sensitivity-2"]
NEEDS = {
    "sensitivity-3": (DENSE,), "exits": (DENSE,), "widths-lfe": (DENSE,), "curves": (DENSE, "sensitivity-3"),
    "profile-lfe": (DENSE, "sensitivity-3"), "sensitivity-2": (DENSE, "exits"),
}  # fmt: skip


def space_of(**space: Any) -> Space:
    return Space(tiny.config(space=ALL | space).space, tiny.DEPTH)


def preparation(*known: str, **space: Any) -> Preparation:
    return Preparation(space_of(**space), dict.fromkeys(known, ContextPart()))


def ids_of(jobs: list[Job | None]) -> list[str | None]:
    return [None if job is None else job.id for job in jobs]


def test_every_step_is_handed_out_once_after_those_that_it_needs() -> None:
    steps = preparation()
    jobs = [steps.next() for _ in range(8)]
    assert ids_of(jobs) == [*IDS, None, None]
    for job in jobs[:6]:
        assert job is not None
        assert (job.kind, job.needs) == ("step", NEEDS[job.id])
        assert job.subject == steps.steps[job.id]
        assert set(job.needs) - {DENSE} == {step.id for step in steps_before(job.subject, space_of())}


def test_handed_out_is_not_measured() -> None:
    steps = preparation()
    for _ in IDS:
        assert not steps.is_handed_out
        steps.next()
    assert steps.is_handed_out
    for number, step_id in enumerate(reversed(IDS)):  # in any order
        assert not steps.is_done
        steps.measured(step_id, ContextPart(exit_heads={number: {}}))
    assert steps.is_done
    assert sorted(steps.known.exit_heads) == [0, 1, 2, 3, 4, 5]


def test_known_steps_are_not_handed_out_and_count_as_measured() -> None:
    part = ContextPart(exit_heads={2: {"head.bias": torch.zeros(4)}})
    steps = Preparation(space_of(), {"exits": part, "curves": ContextPart(), "profile-lfe": ContextPart()})
    assert steps.known.exit_heads == part.exit_heads
    jobs = [steps.next() for _ in range(4)]
    assert ids_of(jobs) == ["sensitivity-3", "widths-lfe", "sensitivity-2", None]
    assert jobs[2] is not None
    assert jobs[2].needs == (DENSE, "exits")  # a product that is there from the start
    for step_id in ("sensitivity-3", "widths-lfe", "sensitivity-2"):
        assert not steps.is_done
        steps.measured(step_id, ContextPart())
    assert steps.is_done


def test_where_all_is_known_nothing_is_left() -> None:
    steps = preparation(*IDS)
    assert steps.is_done and steps.is_handed_out
    assert steps.next() is steps.next_beside_look() is steps.missing(IDS) is None


def test_where_nothing_is_to_be_prepared_all_is_done() -> None:
    steps = preparation(method="unstructured", exit_block=3, round_to=8)
    assert steps.is_done and steps.is_handed_out
    assert steps.next() is None


@pytest.mark.parametrize(
    ("known", "space", "expected"),
    [
        ((), {}, ["sensitivity-3", None]),  # the exits come next, which the first trials do without
        ((), {"exit_block": 3}, ["sensitivity-3", "widths-lfe", None]),
        (("exits",), {}, ["sensitivity-3", "widths-lfe", None]),
        (("sensitivity-3",), {}, [None]),
        ((), {"method": "learned", "token_reduction": "none"}, [None]),
        (tuple(IDS), {}, [None]),
    ],
)
def test_steps_that_most_trials_need_go_beside_the_look(
    known: tuple[str, ...], space: dict[str, Any], expected: list[str | None]
) -> None:
    steps = preparation(*known, **space)
    assert ids_of([steps.next_beside_look() for _ in expected]) == expected
    assert ids_of([steps.next_beside_look()]) == [None]


def test_a_step_that_is_needed_now_comes_before_its_turn() -> None:
    steps = preparation()
    needs = ("look", "sensitivity-2", "curves", "profile-lfe")
    jobs = [steps.missing(needs) for _ in range(6)]
    # In the order of the steps, each with what it needs itself.
    assert ids_of(jobs) == ["sensitivity-3", "curves", "profile-lfe", "exits", "sensitivity-2", None]
    assert ids_of([steps.next(), steps.next()]) == ["widths-lfe", None]


def test_steps_that_run_or_are_known_are_not_missing() -> None:
    steps = preparation("exits")
    steps.next()
    assert steps.missing(("look", "sensitivity-3", "exits")) is None
    assert steps.missing(()) is None
    assert not steps.is_handed_out
