"""Results of earlier trials that later ones reuse: measurements, fine-tunes and pruned prefixes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from pruning.methods.cascade import CascadeState
from pruning.methods.prefix_cache import PrefixCache
from pruning.model.anatomy import Anatomy
from pruning.model.surgery import keep_all_plan
from pruning.plan import Plan
from search.method import METHODS
from search.outcome import Measurement, Outcome
from search.trial.rivals import Rival, RivalStore

Value = TypeVar("Value")

PREFIX_CACHE_BYTES = 512 * 2**20
"""The size of a worker's cache of cascade states: some forty states of digits, a handful of a ViT-Tiny at 224 pixels
with 256 probe images."""


class Cache(Protocol[Value]):
    """A mapping from a key to a value: a dict, or one that several workers share."""

    def get(self, key: str, /) -> Value | None: ...

    def __setitem__(self, key: str, value: Value, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class WorkerCache:
    """The caches of a worker, in which earlier trials with the same context leave what later ones would do again.

    No result depends on them, but for the noise of a timing. Workers may share all but the first.
    """

    prefix_cache: PrefixCache[CascadeState] = field(default_factory=lambda: PrefixCache(PREFIX_CACHE_BYTES))
    measured_cache: Cache[Measurement] = field(default_factory=dict[str, Measurement])
    """Measurements by `plan_key`, and by `shape_key` for their timing."""
    rivals: RivalStore = field(default_factory=dict[str, Rival])
    """Models that were measured on all val images."""
    finetune_cache: Cache[Outcome] = field(default_factory=dict[str, Outcome])
    """Outcomes of fine-tuned models by `finetune_key`."""

    @classmethod
    def empty(cls) -> WorkerCache:
        """Gives a cache for a single trial, which keeps no cascade states."""
        return cls(prefix_cache=PrefixCache(0))


def shape_key(anatomy: Anatomy, plan: Plan) -> str:
    """Gives the key of the shape that a plan leaves, on which the speed depends.

    Args:
        anatomy: of the uncut dense model.
    """
    return _by_effect(anatomy, plan).shape_hash


def plan_key(anatomy: Anatomy, plan: Plan) -> str:
    """Gives the key of a plan, on which all figures of a model depend whose weights follow from it.

    Args:
        anatomy: of the uncut dense model.
    """
    text = json.dumps(_by_effect(anatomy, plan).to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def finetune_key(anatomy: Anatomy, plan: Plan) -> str:
    """Gives the key of a fine-tune of the model whose weights follow from a plan.

    Args:
        anatomy: of the uncut dense model.
    """
    return f"trained {plan_key(anatomy, plan)}"


def _by_effect(anatomy: Anatomy, plan: Plan) -> Plan:
    """Gives the plan without its token reduction if that reduces nothing: whatever its name, the model is the same."""
    num_tokens = [block.num_tokens for block in plan.blocks]
    if num_tokens == [block.num_patches for block in anatomy.blocks[: plan.exit_block]]:
        return replace(plan, token_reduction="none", cutoff_token=1.0)
    return plan


def measured_before(anatomy: Anatomy, dense: Measurement | None, outcomes: Sequence[Outcome]) -> dict[str, Measurement]:
    """Gives the measurements that `measure` need not take again: of the dense model and of an earlier run's outcomes.

    Args:
        anatomy: of the uncut dense model.
        dense: None if the dense model is not measured yet.
    """
    measured_cache: dict[str, Measurement] = {}
    if dense is not None:
        dense_plan = keep_all_plan(anatomy)
        measured_cache = {shape_key(anatomy, dense_plan): dense, plan_key(anatomy, dense_plan): dense}
    for outcome in outcomes:
        if outcome.plan is not None and outcome.measurement is not None:
            measured_cache.setdefault(shape_key(anatomy, outcome.plan), outcome.measurement)
            if not outcome.has_weights:
                measured_cache.setdefault(plan_key(anatomy, outcome.plan), outcome.measurement)
    return measured_cache


def finetuned_before(anatomy: Anatomy, outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    """Gives the outcomes of an earlier run whose fine-tunes need not be run again, by `finetune_key`.

    Args:
        anatomy: of the uncut dense model.
    """
    return {
        finetune_key(anatomy, outcome.plan): outcome
        for outcome in outcomes
        if outcome.plan is not None
        and outcome.candidate.recovery == "distill"
        and METHODS[outcome.candidate.method].repairs
        and outcome.same_as is None
    }
