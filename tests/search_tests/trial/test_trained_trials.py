"""Trials that train: learned width, soft masks, sparse weights, distillation; epoch by epoch, and from a state."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch

from pruning.measure.accuracy import predict
from pruning.measure.cost import count_macs, count_params
from pruning.methods.sparsity import sparsity_of
from search.config import Config
from search.outcome import Candidate, Outcome, State
from search.trial.context import TrialContext, build, confirm, prepare, trained_from
from search.trial.trial import Ended, Epoch, WorkerCache, run_to_end, start_trial
from tests.search_tests import tiny

EXITS = [2, 3]
TRAINING = {"epochs": 3, "batch_size": 16, "max_shift": 0.0}


def config(**changes: Any) -> Config:
    return tiny.config(
        space={"method": ["learned", "soft-mask", "unstructured", "cascade"], "exit_block": EXITS},
        learned=TRAINING, soft_mask=TRAINING, distill=TRAINING, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def context() -> TrialContext:
    return prepare(config(), tiny.model(), tiny.splits(), EXITS, trained=True)[0]


def candidate(method: str, **changes: Any) -> Candidate:
    asked: dict[str, Any] = {
        "method": method, "token_reduction": "none", "cutoff_channel": 0.1, "cutoff_token": 0.85,
        "drop_budget": (0.0,) * tiny.DEPTH, "token_share": 0.5, "target_ratio": 0.6, "exit_block": tiny.DEPTH,
    }  # fmt: skip
    return Candidate(**asked | changes)


def share(context: TrialContext, outcome: Outcome) -> float:
    assert outcome.measurement is not None, outcome.reason
    return outcome.measurement.macs / context.dense_macs


def saved(state: dict[str, Any]) -> Any:
    """What another process reads of it: tensors and plain containers alone."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_learned_width_gives_a_point_for_each_exit_its_own_first(context: TrialContext) -> None:
    ended = run_to_end(context, candidate("learned"), "t004")
    own, earlier = ended.outcomes
    assert [own.id, earlier.id] == ["t004", "t004.2"]
    assert own.trial == earlier.trial == "t004"
    assert own.plan is not None and earlier.plan is not None
    assert (own.plan.exit_block, earlier.plan.exit_block) == (3, 2)
    assert earlier.plan.blocks == own.plan.blocks[:2]
    assert 0.58 < share(context, own) <= 0.6
    assert own.candidate == earlier.candidate == candidate("learned")
    assert [sorted(epoch) for epoch in own.history] == [["loss", "share"]] * 3
    assert earlier.history == () and earlier.seconds == 0.0


def test_learned_width_counts_its_target_in_what_the_recipe_says(context: TrialContext) -> None:
    by_params = replace(context, config=config().model_copy(
        update={"learned": config().learned.model_copy(update={"count": "params"})}
    ))  # fmt: skip
    outcome = run_to_end(by_params, candidate("learned"), "t000").outcomes[0]
    assert outcome.measurement is not None
    assert 0.57 < outcome.measurement.params / count_params(context.model) <= 0.6


def test_target_is_a_share_of_the_whole_model_before_an_exit_too(context: TrialContext) -> None:
    outcome = run_to_end(context, candidate("learned", exit_block=2, target_ratio=0.5), "t000").outcomes[0]
    assert 0.48 < share(context, outcome) <= 0.5


@pytest.mark.parametrize("method", ["learned", "soft-mask"])
def test_target_that_the_exit_alone_reaches_takes_nothing_more(context: TrialContext, method: str) -> None:
    outcome = run_to_end(context, candidate(method, exit_block=2, target_ratio=0.9), "t000").outcomes[0]
    assert outcome.plan is not None, outcome.reason
    assert all(len(block.keep_hidden) == 128 for block in outcome.plan.blocks)


@pytest.mark.parametrize("method", ["learned", "soft-mask"])
def test_target_out_of_reach_is_infeasible_and_says_what_is_within(context: TrialContext, method: str) -> None:
    (outcome,) = run_to_end(context, candidate(method, target_ratio=0.001), "t000").outcomes
    assert outcome.state is State.INFEASIBLE
    assert outcome.reason is not None and "cannot be reached; give 0." in outcome.reason


def test_soft_mask_hits_its_target(context: TrialContext) -> None:
    (outcome,) = run_to_end(context, candidate("soft-mask"), "t000").outcomes
    assert 0.55 < share(context, outcome) <= 0.6
    assert len(outcome.history) == 3


@pytest.mark.parametrize("recovery", ["none", "distill"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("any", 0.4), ("2:4", 0.5), ("1:4", 0.75)])
def test_sparse_model_has_the_sparsity_asked_for_and_the_dense_shapes(
    context: TrialContext, pattern: str, sparsity: float, recovery: str
) -> None:
    asked = candidate("unstructured", pattern=pattern, recovery=recovery)
    ended = run_to_end(context, asked, "t000")
    (outcome,) = ended.outcomes
    assert outcome.measurement is not None, outcome.reason
    assert outcome.measurement.sparsity == pytest.approx(sparsity, abs=1e-4)
    assert share(context, outcome) == 1.0
    assert outcome.measurement.params == count_params(context.model)
    assert sparsity_of(context.model) == 0.0  # the dense model is left as it was


def test_distillation_follows_the_cascade_and_keeps_its_plan(context: TrialContext) -> None:
    asked = candidate("cascade", drop_budget=(100.0,) * 3, target_ratio=0.5)
    (plain,) = run_to_end(context, asked, "t000").outcomes
    ended = run_to_end(context, replace(asked, recovery="distill"), "t001")
    (tuned,) = ended.outcomes
    assert tuned.plan == plain.plan
    assert (tuned.block_drops, tuned.forward_passes) == (plain.block_drops, plain.forward_passes)
    assert (plain.has_weights, tuned.has_weights) == (False, True)
    assert tuned.plan is not None
    assert count_macs_of(context, tuned) == count_macs_of(context, plain)
    logits = predict(ended.models["t001"], context.splits.val)
    assert not torch.equal(logits, predict(build(context, tuned.plan), context.splits.val))
    assert [list(epoch) for epoch in tuned.history] == [["loss"]] * 3


def distilled(**changes: Any) -> Candidate:
    return candidate("cascade", drop_budget=(100.0,) * 3, recovery="distill", **changes)


def test_a_pruned_model_is_fine_tuned_once(context: TrialContext) -> None:
    memory = WorkerCache()
    first, other = distilled(target_ratio=0.5), distilled(target_ratio=0.5, token_share=0.25)  # takes no tokens anyway
    before = run_to_end(context, first, "t000", memory)
    *repeated, after = start_trial(context, other, "t001", memory=memory)
    assert isinstance(after, Ended)
    (own,), (same,) = before.outcomes, after.outcomes
    assert (len(own.history), repeated) == (3, [])
    assert same == replace(own, id="t001", candidate=other, same_as="t000", history=(), seconds=same.seconds)
    assert (own.weights_id, same.weights_id) == ("t000", "t000")
    assert (set(before.weights), set(after.weights)) == ({"t000"}, set())
    *third, _ = start_trial(context, first, "t002", memory=memory)
    (again,) = run_to_end(context, first, "t003", memory).outcomes
    assert third == [] and again.same_as == "t000"
    *smaller, _ = start_trial(context, distilled(target_ratio=0.4), "t004", memory=memory)
    assert len(smaller) == 3


def test_who_keeps_the_weights_says_when_others_may_have_them(context: TrialContext) -> None:
    memory = WorkerCache()
    for name in ("t000", "t001"):
        *epochs, ended = start_trial(context, distilled(), name, memory=memory)
        assert isinstance(ended, Ended) and len(epochs) == 3
        assert list(ended.trained.values()) == ended.outcomes and memory.trained == {}


@pytest.mark.parametrize("method", ["soft-mask", "unstructured"])
def test_what_has_weights_of_its_own_is_fine_tuned_each_time(context: TrialContext, method: str) -> None:
    memory = WorkerCache()
    outcomes = [run_to_end(context, candidate(method, recovery="distill"), name, memory).outcomes[0] for name in "ab"]
    assert [outcome.same_as for outcome in outcomes] == [None, None]
    assert len({len(outcome.history) for outcome in outcomes}) == 1 and outcomes[0].history
    assert memory.trained == {}


def test_what_an_earlier_run_fine_tuned_need_not_be_again(context: TrialContext) -> None:
    memory = WorkerCache()
    own, same = [run_to_end(context, distilled(), name, memory).outcomes[0] for name in ("t000", "t001")]
    plain = run_to_end(context, replace(distilled(), recovery="none"), "t002").outcomes[0]
    sparse = run_to_end(context, candidate("unstructured", recovery="distill"), "t003").outcomes[0]
    found = trained_from(context.anatomy, [Outcome.from_json(o.to_json()) for o in (own, same, plain, sparse)])
    assert list(found.values()) == [own]
    (outcome,) = run_to_end(context, distilled(), "t004", WorkerCache(trained=found)).outcomes
    assert outcome.same_as == "t000" and outcome.measurement == own.measurement


def test_a_resumed_training_ends_where_another_trial_was_sooner(context: TrialContext) -> None:
    memory = WorkerCache()
    epoch, *_ = start_trial(context, distilled(), "t000")
    assert isinstance(epoch, Epoch)
    run_to_end(context, distilled(), "t001", memory)
    (ended,) = start_trial(context, distilled(), "t000", saved(epoch.state()), memory)
    assert isinstance(ended, Ended) and ended.outcomes[0].same_as == "t001"


def count_macs_of(context: TrialContext, outcome: Outcome) -> int:
    from pruning.model.anatomy import examine

    assert outcome.plan is not None
    return count_macs(examine(context.model), outcome.plan)


@pytest.mark.parametrize(
    "asked",
    [
        candidate("learned"),
        candidate("soft-mask"),
        candidate("soft-mask", recovery="distill"),
        candidate("unstructured", recovery="distill"),
        candidate("unstructured", recovery="distill", pattern="2:4"),
        candidate("cascade", drop_budget=(100.0,) * 3, recovery="distill"),
    ],
    ids=lambda asked: f"{asked.method}-{asked.recovery}-{asked.pattern}",
)
def test_trial_goes_on_from_any_epoch_as_if_it_had_not_stopped(context: TrialContext, asked: Candidate) -> None:
    *epochs, whole = start_trial(context, asked, "t000")
    assert isinstance(whole, Ended)
    states = [saved(epoch.state()) for epoch in _epochs_of(context, asked)]
    assert len(states) == len(epochs) == len(whole.outcomes[0].history)
    for number, state in enumerate(states, start=1):
        *left, ended = start_trial(context, asked, "t000", state)
        assert len(left) == len(states) - number
        assert isinstance(ended, Ended)
        for one, other in zip(ended.outcomes, whole.outcomes, strict=True):
            assert (one.id, one.plan, one.history, one.notes) == (other.id, other.plan, other.history, other.notes)
            mine, theirs = (each.models[one.id].state_dict() for each in (ended, whole))
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def _epochs_of(context: TrialContext, asked: Candidate) -> Any:
    """Each as it comes: a state is that of the moment."""
    return (event for event in start_trial(context, asked, "t000") if isinstance(event, Epoch))


def test_epochs_tell_their_number_and_their_loss(context: TrialContext) -> None:
    told = [epoch.progress for epoch in _epochs_of(context, candidate("learned"))]
    assert [epoch["epoch"] for epoch in told] == [1, 2, 3]
    assert all(epoch["loss"] > 0 for epoch in told)


def test_seconds_of_earlier_processes_count(context: TrialContext) -> None:
    state = next(iter(_epochs_of(context, candidate("learned")))).state()
    *_, ended = start_trial(context, candidate("learned"), "t000", {**state, "seconds": 1000.0})
    assert isinstance(ended, Ended)
    assert 1000 < ended.outcomes[0].seconds < 1100


def test_kept_weights_give_the_model_that_was_measured(context: TrialContext) -> None:
    ended = run_to_end(context, candidate("learned"), "t000")
    assert set(ended.weights) == {"t000", "t000.2"}
    plans = [outcome.plan for outcome in ended.outcomes if outcome.plan is not None]
    found = confirm(context, plans, [ended.weights[outcome.id] for outcome in ended.outcomes])
    for outcome, model, again in zip(ended.outcomes, found.models, found.measured, strict=True):
        assert outcome.measurement is not None
        assert again.top1 == outcome.measurement.top1
        logits = predict(model, context.splits.val)
        assert torch.equal(logits, predict(ended.models[outcome.id], context.splits.val))


def test_training_that_diverges_fails_with_step_and_learning_rate(context: TrialContext) -> None:
    wild = config().model_copy(update={"distill": config().distill.model_copy(update={"learning_rate": 1e30})})
    asked = candidate("unstructured", recovery="distill")
    (outcome,) = run_to_end(replace(context, config=wild), asked, "t000").outcomes
    assert outcome.state is State.FAILED
    assert outcome.reason is not None
    assert outcome.reason.startswith("training diverged in step ") and "(1e+30)" in outcome.reason


def test_widths_are_those_that_the_device_is_faster_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pruning.measure.widths._least_times", tiny.steady_times)
    paced = tiny.config(space={"method": "learned", "round_to": "auto"}, learned=TRAINING)
    context, _ = prepare(paced, tiny.model(), tiny.splits(), [tiny.DEPTH], trained=True)
    (outcome,) = run_to_end(context, candidate("learned", round_to="auto"), "t000").outcomes
    assert outcome.plan is not None, outcome.reason
    (allowed, *_) = context.allowed_widths["none"]
    assert all(allowed.least_hidden(len(block.keep_hidden)) == len(block.keep_hidden) for block in outcome.plan.blocks)
