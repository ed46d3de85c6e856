"""Trials of the tiny model: their recipe, their candidates, and how they are run to their outcomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pruning.data import Images
from search.config import Config
from search.outcome import Candidate, Measurement, Outcome, State
from search.trial.context import TrialContext
from search.trial.reuse import WorkerCache
from search.trial.trial import run_to_end
from tests.search_tests import tiny

EXITS = [2, 3]
EPOCHS = 3
TRAINING: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 16, "max_shift": 0.0}


def config(**changes: Any) -> Config:
    """A recipe in whose space all methods are that need to be prepared for; trainings have `EPOCHS` epochs."""
    space: dict[str, Any] = {
        "method": ["cascade", "global", "learned", "soft-mask", "unstructured"], "exit_block": EXITS,
        "token_reduction": ["lfe", "attention-merge", "none"], "round_to": [8, "auto"],
    }  # fmt: skip
    trainings = {section: dict(TRAINING) for section in ("learned", "soft_mask", "distill")}
    return tiny.config(space=space, **trainings | changes)


def new_candidate(method: str = "cascade", **changes: Any) -> Candidate:
    """The dense model, and `changes`; without tokens for the methods that train."""
    fields: dict[str, Any] = {
        "method": method, "cutoff_channel": 0.1, "cutoff_token": 0.85, "drop_budget": (0.0,) * tiny.DEPTH,
        "token_share": 0.5, "target_ratio": 1.0, "exit_block": tiny.DEPTH,
    }  # fmt: skip
    if method in ("learned", "soft-mask", "unstructured"):
        fields["token_reduction"] = "none"
    return Candidate(**fields | changes)


def run(
    context: TrialContext, candidate: Candidate, trial_id: str = "t000", cache: WorkerCache | None = None
) -> Outcome:
    """Runs a candidate and gives its only outcome."""
    (outcome,) = run_to_end(context, candidate, trial_id, cache).outcomes
    return outcome


def measured(outcome: Outcome) -> Measurement:
    assert outcome.state is State.MEASURED, outcome.reason
    assert outcome.measurement is not None
    return outcome.measurement


def accuracy(model: nn.Module, images: Images) -> float:
    """Counts correct answers, by the definition."""
    with torch.no_grad():
        logits = model(images.normalized(slice(None)))
    return float((logits.argmax(dim=1) == images.labels).double().mean())


def with_known(context: TrialContext, **changes: Any) -> TrialContext:
    """The context of which other things are known; `changes` are fields of a `ContextPart`."""
    return replace(context, known=replace(context.known, **changes))


def with_search(context: TrialContext, **changes: Any) -> TrialContext:
    """The context with other settings of the search."""
    search = context.config.search.model_copy(update=changes)
    return replace(context, config=context.config.model_copy(update={"search": search}))
