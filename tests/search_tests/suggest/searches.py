"""Spaces and outcomes that the tests of the search share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from search.goal import Goal
from search.outcome import Candidate, Outcome, State
from search.space import Space
from search.suggest.ask import CandidateSearch, History, Suggestion
from search.suggest.samplers import SamplerSettings
from search.trial.warm_start import first_candidates
from tests.search_tests import builders
from tests.search_tests.builders import papers_space

SPACE = Space(papers_space(exit_block=(2, 3)), depth=3)
FIRST = first_candidates(SPACE)
CHOICES = Space(
    papers_space(
        exit_block=(2, 3),
        method=("cascade", "global"),
        criterion=("lfs", "taylor", "obs"),
        token_reduction=("lfe", "merge", "none"),
        round_to=(1, 8, "auto"),
    ),
    depth=3,
)
SWIN = Space(
    papers_space(exit_block=(1, 6), method=("cascade", "global"), token_reduction="none", round_to=("auto", 8)),
    depth=6,
    exits=(2, 4, 6),
    has_windows=True,
)


def new_search(space: Space = SPACE, goal: Goal | None = None, **changes: Any) -> CandidateSearch:
    """A search of tpe, seed 0, that begins with the space's first candidates.

    Args:
        changes: fields of `SamplerSettings` and of `History`.
    """
    settings: dict[str, Any] = {"sampler": "tpe", "seed": 0}
    history: dict[str, Any] = {"first_candidates": first_candidates(space)}
    for name, value in changes.items():
        (history if name in History.__dataclass_fields__ else settings)[name] = value
    return CandidateSearch(space, SamplerSettings(**settings), History(**history), goal)


def ask(search: CandidateSearch) -> Suggestion:
    """The next suggestion, which there must be."""
    suggestion = search.ask()
    assert suggestion is not None
    return suggestion


def ask_many(search: CandidateSearch, count: int) -> list[Suggestion]:
    """Suggestions that are asked for before any is told."""
    return [ask(search) for _ in range(count)]


def candidates_of(suggestions: Sequence[Suggestion]) -> list[Candidate]:
    return [suggestion.candidate for suggestion in suggestions]


def measured(trial_id: str, candidate: Candidate, top1: float = 0.9, speedup: float = 1.5) -> Outcome:
    return replace(builders.outcome(trial_id, top1, speedup), candidate=candidate)


def failed(trial_id: str, candidate: Candidate, state: State = State.FAILED) -> Outcome:
    return replace(builders.failed(trial_id, state), candidate=candidate)


def tell(search: CandidateSearch, suggestion: Suggestion, top1: float = 0.9, speedup: float = 1.5) -> None:
    """Tells of a measured outcome."""
    search.tell(suggestion.id, measured(suggestion.id, suggestion.candidate, top1, speedup))
