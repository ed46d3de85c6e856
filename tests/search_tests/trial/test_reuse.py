"""Results of earlier trials that later ones reuse: keys of plans, caches of measurements, fine-tunes and prefixes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pruning.model.surgery import keep_all_block
from search.outcome import Candidate, Measurement, Outcome
from search.trial.context import TrialContext
from search.trial.progress import Epoch
from search.trial.reuse import WorkerCache, finetuned_before, measured_before, plan_key, shape_key
from search.trial.trial import Ended, run_to_end, start_trial
from tests.search_tests import builders
from tests.search_tests.trial.trials import EPOCHS, measured, new_candidate, run


def test_what_reduces_no_tokens_is_as_fast_whatever_the_reduction_is_called(context: TrialContext) -> None:
    anatomy, dense_plan = context.anatomy, context.dense_plan
    fewer = replace(dense_plan, blocks=(dense_plan.blocks[0], *[keep_all_block(anatomy.blocks[0], 9)] * 2))
    reductions: tuple[Any, ...] = ("lfe", "merge", "none")
    alike = [replace(dense_plan, token_reduction=reduction) for reduction in reductions]
    assert len({shape_key(anatomy, plan) for plan in alike}) == len({plan_key(anatomy, plan) for plan in alike}) == 1
    different = [replace(fewer, token_reduction=reduction) for reduction in reductions[:2]]
    assert len({shape_key(anatomy, plan) for plan in different}) == 2


def test_plans_of_one_shape_differ_in_their_own_key_alone(context: TrialContext) -> None:
    first, *later = context.dense_plan.blocks
    one, other = (
        replace(context.dense_plan, blocks=(replace(first, keep_hidden=kept), *later))
        for kept in (first.keep_hidden[:-1], first.keep_hidden[1:])
    )
    assert shape_key(context.anatomy, one) == shape_key(context.anatomy, other)
    assert plan_key(context.anatomy, one) != plan_key(context.anatomy, other)


def test_trials_that_remember_others_give_what_they_give_alone(context: TrialContext) -> None:
    cache = WorkerCache()
    tokens: dict[str, Any] = {"token_reduction": "attention-merge", "round_to": 8}
    candidates = [
        new_candidate(drop_budget=(10.0, 10.0, 10.0), target_ratio=0.5, **tokens),
        new_candidate(drop_budget=(10.0, 10.0, 40.0), target_ratio=0.5, **tokens),
        new_candidate(drop_budget=(10.0, 10.0, 10.0), target_ratio=0.4, **tokens),
        new_candidate(drop_budget=(10.0, 10.0, 0.0), target_ratio=0.5, exit_block=2, **tokens),
        new_candidate("global", target_ratio=0.5, **tokens),
        new_candidate(exit_block=2),
        new_candidate(exit_block=2, token_reduction="none"),
    ]
    for candidate in [*candidates, candidates[0]]:
        alone, ended = run_to_end(context, candidate, "t"), run_to_end(context, candidate, "t", cache)
        one, other = alone.outcomes[0], ended.outcomes[0]
        assert (one.plan, one.block_drops, one.forward_passes) == (other.plan, other.block_drops, other.forward_passes)
        for name in ("top1", "macs", "params", "sparsity"):
            assert getattr(measured(one), name) == getattr(measured(other), name)
        state = ended.models["t"].state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in alone.models["t"].state_dict().items())
    assert cache.prefix_cache.num_bytes > 0


def test_cache_of_a_single_trial_keeps_no_prefix(context: TrialContext) -> None:
    cache = WorkerCache.empty()
    run(context, new_candidate(drop_budget=(10.0,) * 3, target_ratio=0.5), cache=cache)
    assert cache.prefix_cache.num_bytes == 0


def test_an_earlier_run_and_the_dense_model_need_not_be_measured_again(
    context: TrialContext, dense: Measurement
) -> None:
    candidate = new_candidate(exit_block=2)
    earlier = run(context, candidate)
    measured_cache = measured_before(context.anatomy, dense, [earlier, builders.failed("t001")])
    cache = WorkerCache(measured_cache=dict(measured_cache))
    assert measured(run(context, candidate, "t002", cache)) == earlier.measurement
    assert measured(run(context, new_candidate(), "t003", cache)) == dense
    with_weights = measured_before(context.anatomy, dense, [replace(earlier, has_weights=True)])
    assert len(measured_cache) == 4 and len(with_weights) == 3


# Fine-tunes


def distilled(**changes: Any) -> Candidate:
    return new_candidate(drop_budget=(100.0,) * 3, recovery="distill", **changes)


def test_a_pruned_model_is_fine_tuned_once(context: TrialContext) -> None:
    cache = WorkerCache()
    first = distilled(target_ratio=0.5, token_reduction="none")
    other = replace(first, token_share=0.25)  # it takes no tokens anyway
    before = run_to_end(context, first, "t000", cache)
    *repeated, after = start_trial(context, other, "t001", cache=cache)
    assert isinstance(after, Ended)
    (tuned,), (same,) = before.outcomes, after.outcomes
    assert (len(tuned.history), repeated) == (EPOCHS, [])
    assert same == replace(tuned, id="t001", candidate=other, same_as="t000", history=(), seconds=same.seconds)
    assert (tuned.weights_id, same.weights_id) == ("t000", "t000")
    assert (set(before.weights), set(after.weights)) == ({"t000"}, set())
    *third, _ = start_trial(context, first, "t002", cache=cache)
    assert third == [] and run(context, first, "t003", cache).same_as == "t000"
    *smaller, _ = start_trial(context, replace(first, target_ratio=0.4), "t004", cache=cache)
    assert len(smaller) == EPOCHS


def test_who_keeps_the_weights_says_when_others_may_have_them(context: TrialContext) -> None:
    finetune_cache: dict[str, Outcome] = {}
    for trial_id in ("t000", "t001"):
        cache = WorkerCache(finetune_cache=finetune_cache)
        *epochs, ended = start_trial(context, distilled(), trial_id, cache=cache)
        assert isinstance(ended, Ended) and len(epochs) == EPOCHS
        assert list(ended.finetunes.values()) == ended.outcomes and finetune_cache == {}


@pytest.mark.parametrize("method", ["soft-mask", "unstructured"])
def test_model_whose_weights_were_trained_before_is_fine_tuned_each_time(context: TrialContext, method: str) -> None:
    finetune_cache: dict[str, Outcome] = {}
    cache = WorkerCache(finetune_cache=finetune_cache)
    candidate = new_candidate(method, target_ratio=0.6, recovery="distill")
    outcomes = [run(context, candidate, trial_id, cache) for trial_id in ("t000", "t001")]
    assert [outcome.same_as for outcome in outcomes] == [None, None]
    assert len({len(outcome.history) for outcome in outcomes}) == 1 and outcomes[0].history
    assert finetune_cache == {}


def test_what_an_earlier_run_fine_tuned_need_not_be_again(context: TrialContext) -> None:
    cache = WorkerCache()
    tuned, same = [run(context, distilled(), trial_id, cache) for trial_id in ("t000", "t001")]
    plain = run(context, replace(distilled(), recovery="none"), "t002")
    sparse = run(context, new_candidate("unstructured", target_ratio=0.6, recovery="distill"), "t003")
    read = [Outcome.from_json(outcome.to_json()) for outcome in (tuned, same, plain, sparse)]
    finetune_cache = finetuned_before(context.anatomy, read)
    assert list(finetune_cache.values()) == [tuned]
    outcome = run(context, distilled(), "t004", WorkerCache(finetune_cache=finetune_cache))
    assert outcome.same_as == "t000" and outcome.measurement == tuned.measurement


def test_a_resumed_training_ends_where_another_trial_was_sooner(context: TrialContext) -> None:
    cache = WorkerCache()
    epoch, *_ = start_trial(context, distilled(), "t000")
    assert isinstance(epoch, Epoch)
    run(context, distilled(), "t001", cache)
    (ended,) = start_trial(context, distilled(), "t000", epoch.state(), cache)
    assert isinstance(ended, Ended) and ended.outcomes[0].same_as == "t001"
