"""candidate -> outcomes on a tiny model: the dense one, pruned ones, those that break, rungs, and trials that go on."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch

from pruning.errors import VitfrontError
from pruning.measure.accuracy import predict, top1
from pruning.measure.cost import count_macs, count_params
from pruning.model.anatomy import blocks_of
from pruning.model.exits import truncate
from pruning.model.surgery import apply_plan
from search.outcome import Candidate, Measurement, State
from search.trial.context import TrialContext
from search.trial.measure import build, rebuild
from search.trial.progress import Epoch, Rung
from search.trial.reuse import WorkerCache
from search.trial.trial import Ended, run_to_end, start_trial
from tests.search_tests import tiny
from tests.search_tests.trial import trials
from tests.search_tests.trial.trials import EPOCHS, accuracy, measured, new_candidate, run


def breaking(context: TrialContext, error: Exception) -> TrialContext:
    """A context whose model breaks."""

    def fail(*_: Any) -> None:
        raise error

    model = tiny.model()
    model.patch_embed.register_forward_hook(fail)
    return replace(context, model=model)


def kinds(events: list[Any]) -> str:
    return " ".join(type(event).__name__ for event in events)


def reread(state: dict[str, Any]) -> Any:
    """Gives a state as another process reads it: tensors and plain containers alone."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


# Its outcome


def test_dense_candidate_gives_the_dense_model(context: TrialContext, dense: Measurement) -> None:
    outcome = run(context, new_candidate(), "t007")
    assert (outcome.id, outcome.candidate) == ("t007", new_candidate())
    assert outcome.plan == context.dense_plan
    assert outcome.block_drops == (0.0,) * tiny.DEPTH
    assert measured(outcome) == dense
    assert outcome.seconds > 0


def test_pruned_outcome_costs_each_block_no_more_than_its_budget_and_reaches_its_target(context: TrialContext) -> None:
    candidate = new_candidate(drop_budget=(5.0, 20.0, 100.0), target_ratio=0.2)
    outcome = run(context, candidate)
    measurement = measured(outcome)
    assert len(outcome.block_drops) == tiny.DEPTH
    assert all(drop <= budget for drop, budget in zip(outcome.block_drops, candidate.drop_budget, strict=True))
    assert outcome.plan is not None
    lost = accuracy(context.model, context.splits.probe) - accuracy(build(context, outcome.plan), context.splits.probe)
    assert sum(outcome.block_drops) == pytest.approx(100 * lost)
    assert measurement.macs == count_macs(context.anatomy, outcome.plan) <= 0.2 * context.dense_macs
    assert measurement.params < count_params(context.model)
    assert outcome.forward_passes > 1


def test_budget_of_nothing_loses_no_probe_image(context: TrialContext) -> None:
    outcome = run(context, new_candidate(target_ratio=0.2))
    measured(outcome)
    assert max(outcome.block_drops) <= 0
    assert outcome.plan is not None
    model = build(context, outcome.plan)
    assert accuracy(model, context.splits.probe) >= accuracy(context.model, context.splits.probe)


def test_exit_candidate_answers_with_the_classifier_of_its_exit(context: TrialContext) -> None:
    outcome = run(context, new_candidate(exit_block=2))
    assert outcome.plan is not None
    assert outcome.plan.exit_block == len(outcome.block_drops) == 2
    assert measured(outcome).macs < context.dense_macs
    model = build(context, outcome.plan)
    assert len(blocks_of(model)) == 2
    assert torch.equal(model.head.weight, context.exit_heads[2]["head.weight"])
    assert not torch.equal(model.head.weight, context.model.head.weight)


def test_forward_passes_count_in_those_of_the_dense_model(context: TrialContext) -> None:
    """Two of three blocks cost two thirds of a pass."""
    tokens: dict[str, Any] = {"token_reduction": "merge", "target_ratio": 0.6}
    all_blocks, two_blocks = (
        run(context, new_candidate("constant", exit_block=exit_block, **tokens)) for exit_block in (3, 2)
    )
    assert two_blocks.forward_passes == pytest.approx(2 / 3 * all_blocks.forward_passes)


def test_target_of_an_exit_counts_in_macs_of_the_dense_model(context: TrialContext) -> None:
    """Two of three blocks are two thirds of the multiply-adds already, so that a target of 0.8 takes nothing more."""
    outcome = run(context, new_candidate(exit_block=2, target_ratio=0.8, drop_budget=(100.0, 100.0, 0.0)))
    assert outcome.plan is not None
    assert outcome.plan.blocks == context.dense_plan.blocks[:2]


def test_trial_leaves_the_context_as_it_was_and_gives_the_same_again(context: TrialContext) -> None:
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    head = {name: tensor.clone() for name, tensor in context.exit_heads[2].items()}
    candidate = new_candidate(exit_block=2, drop_budget=(20.0, 20.0, 0.0), target_ratio=0.4)
    one, other = (run(context, candidate) for _ in range(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert all(torch.equal(tensor, head[name]) for name, tensor in context.exit_heads[2].items())
    assert one.plan == other.plan and one.plan is not None
    assert measured(one).top1 == measured(other).top1


def test_kept_weights_give_the_model_that_was_measured(context: TrialContext) -> None:
    ended = run_to_end(context, new_candidate("learned", target_ratio=0.6), "t000")
    assert set(ended.weights) == {"t000", "t000.2"}
    for outcome in ended.outcomes:
        assert outcome.plan is not None
        weights = ended.weights[outcome.id]
        again, model = rebuild(context, outcome.plan, measured(outcome), weights, on_all_images=True)
        assert again.top1 == accuracy(model, context.splits.val) == measured(outcome).top1
        logits = predict(model, context.splits.val)
        assert torch.equal(logits, predict(ended.models[outcome.id], context.splits.val))


# Errors


def test_error_inside_a_trial_is_a_failed_outcome_that_says_what_and_where(context: TrialContext) -> None:
    outcome = run(breaking(context, RuntimeError("out of memory\nmuch more of it")), new_candidate(), "t003")
    assert (outcome.id, outcome.state, outcome.candidate) == ("t003", State.FAILED, new_candidate())
    assert outcome.reason is not None
    assert outcome.reason.startswith("RuntimeError: out of memory (test_trial.py:")
    assert "\n" not in outcome.reason
    assert outcome.seconds > 0


def test_what_is_the_users_doing_is_told_in_its_own_words(context: TrialContext) -> None:
    outcome = run(breaking(context, VitfrontError("give more images")), new_candidate())
    assert (outcome.state, outcome.reason) == (State.FAILED, "give more images")


def test_candidate_without_a_fitted_exit_fails(context: TrialContext) -> None:
    outcome = run(context, new_candidate(exit_block=1))
    assert outcome.state is State.FAILED
    assert outcome.reason is not None
    assert outcome.reason.startswith("KeyError: 1 (methods.py:")


# Rungs


@pytest.fixture
def halving(context: TrialContext) -> TrialContext:
    """The context of a sweep that stops trials."""
    return trials.with_search(context, reduction_factor=2.0)


def pruned(method: str = "cascade", **changes: Any) -> Candidate:
    return new_candidate(method, drop_budget=(20.0,) * tiny.DEPTH, target_ratio=0.6, **changes)


@pytest.mark.parametrize("method", ["cascade", "global"])
def test_trial_without_training_shows_a_first_look_and_ends_as_it_would_without(
    context: TrialContext, halving: TrialContext, method: str
) -> None:
    rung, ended = list(start_trial(halving, pruned(method), "t000"))
    assert isinstance(rung, Rung) and isinstance(ended, Ended)
    ((accuracy, speedup),) = rung.values
    assert accuracy * 6 == pytest.approx(round(accuracy * 6))  # of 6 images
    assert speedup > 0
    (outcome,) = ended.outcomes
    assert (outcome.rungs, outcome.rung_spans) == (rung.values, rung.spans)
    alone = run(context, pruned(method))
    assert alone.rungs == ()
    assert (alone.plan, measured(alone)) == (outcome.plan, measured(outcome))
    assert 0 <= rung.spans[0][0] < rung.spans[0][1] <= outcome.seconds


def test_trial_that_trains_shows_the_model_before_and_after_a_part_of_its_epochs(
    context: TrialContext, halving: TrialContext
) -> None:
    events, states = list[Any](), list[dict[str, Any]]()
    for event in start_trial(halving, pruned(recovery="distill"), "t000"):
        events.append(event)
        states += [reread(event.state())] if isinstance(event, Epoch) else []
    assert kinds(events) == "Rung Rung Epoch Rung Epoch Epoch Ended"
    _, before, _, after_a_third, *_, ended = events
    untrained = run(context, pruned())
    assert untrained.plan is not None
    assert before.values[1][0] == measured(untrained).top1  # on all of val
    model, val = apply_plan(truncate(context.model, tiny.DEPTH), untrained.plan), context.splits.val
    model.load_state_dict(states[0]["training"]["weights"])
    assert after_a_third.values[-1][0] == top1(predict(model, val), val.labels)
    assert len({speedup for _, speedup in ended.outcomes[0].rungs[1:]}) == 1  # the same shape all along
    assert len(ended.outcomes[0].rungs) == 3


def test_trial_goes_on_from_a_state_behind_the_rungs_it_has_passed(halving: TrialContext) -> None:
    candidate, states = pruned(recovery="distill"), list[Any]()
    for event in start_trial(halving, candidate, "t000"):
        if isinstance(event, Epoch):
            states.append(reread(event.state()))  # a state is that of the moment
        ended: Any = event
    for state, expected, passed in zip(states, ("Epoch Epoch Ended", "Epoch Ended", "Ended"), (2, 3, 3), strict=True):
        rest: list[Any] = list(start_trial(halving, candidate, "t000", state))
        assert kinds(rest) == expected
        rungs = ended.outcomes[0].rungs[:passed]
        assert [accuracy for accuracy, _ in rest[-1].outcomes[0].rungs] == [accuracy for accuracy, _ in rungs]


def test_trial_that_nobody_stops_shows_nothing(halving: TrialContext) -> None:
    events = list(start_trial(halving.without_rungs(), pruned(recovery="distill"), "t000"))
    assert kinds(events) == " ".join(["Epoch"] * EPOCHS) + " Ended"


def test_what_was_fine_tuned_before_ends_at_its_first_rung(halving: TrialContext) -> None:
    cache = WorkerCache()
    run_to_end(halving, pruned(recovery="distill"), "t000", cache)
    events: list[Any] = list(start_trial(halving, pruned(recovery="distill"), "t001", cache=cache))
    assert kinds(events) == "Rung Ended" and events[-1].outcomes[0].same_as == "t000"


@pytest.mark.parametrize("method", ["learned", "soft-mask", "unstructured"])
def test_methods_whose_models_are_not_there_before_the_end_show_nothing(halving: TrialContext, method: Any) -> None:
    events: list[Any] = list(start_trial(halving, new_candidate(method, target_ratio=0.6, recovery="distill"), "t000"))
    assert "Rung" not in kinds(events)
    assert events[-1].outcomes[0].state is State.MEASURED


def test_what_breaks_at_the_first_look_is_an_outcome(halving: TrialContext) -> None:
    (ended,) = list(start_trial(halving, new_candidate("global", target_ratio=1e-6), "t000"))
    assert isinstance(ended, Ended)
    assert ended.outcomes[0].state is State.INFEASIBLE


# Trials that go on


@pytest.mark.parametrize(
    "candidate",
    [
        new_candidate("learned", target_ratio=0.6),
        new_candidate("soft-mask", target_ratio=0.6, recovery="distill"),
        new_candidate("unstructured", target_ratio=0.6, recovery="distill"),
        new_candidate("unstructured", target_ratio=0.6, recovery="distill", pattern="2:4"),
        new_candidate("cascade", target_ratio=0.6, drop_budget=(100.0,) * 3, recovery="distill"),
    ],
    ids=lambda candidate: f"{candidate.method}-{candidate.recovery}-{candidate.pattern}",
)
def test_trial_goes_on_from_any_epoch_as_if_it_had_not_stopped(context: TrialContext, candidate: Candidate) -> None:
    states: list[Any] = []
    for event in start_trial(context, candidate, "t000"):
        if isinstance(event, Epoch):
            states.append(reread(event.state()))  # a state is that of the moment
        else:
            uninterrupted = event
    assert isinstance(uninterrupted, Ended)
    assert len(states) == len(uninterrupted.outcomes[0].history) >= EPOCHS
    for number, state in enumerate(states, start=1):
        *left, ended = start_trial(context, candidate, "t000", state)
        assert len(left) == len(states) - number
        assert isinstance(ended, Ended)
        for one, other in zip(ended.outcomes, uninterrupted.outcomes, strict=True):
            assert (one.id, one.plan, one.history, one.notes) == (other.id, other.plan, other.history, other.notes)
            mine, theirs = (end.models[one.id].state_dict() for end in (ended, uninterrupted))
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_seconds_of_earlier_processes_count(context: TrialContext) -> None:
    candidate = new_candidate("learned", target_ratio=0.6)
    epoch = next(iter(start_trial(context, candidate, "t000")))
    assert isinstance(epoch, Epoch)
    *_, ended = start_trial(context, candidate, "t000", {**epoch.state(), "seconds": 1000.0})
    assert isinstance(ended, Ended)
    assert 1000 < ended.outcomes[0].seconds < 1100
