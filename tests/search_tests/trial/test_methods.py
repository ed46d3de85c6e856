"""One function a method: the table of them, and what each makes of a candidate on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any, get_args

import pytest

from pruning.measure.cost import count_params
from pruning.measure.widths import AllowedWidths
from pruning.methods.sparsity import sparsity_of
from pruning.model.surgery import keep_all_block
from pruning.repair.compensation import repaired_model
from search.method import METHODS, Method
from search.outcome import Candidate, Outcome, State
from search.trial.context import TrialContext
from search.trial.measure import build
from search.trial.methods import PRUNERS, TRAINERS
from search.trial.progress import Epoch, Rung
from search.trial.trial import Ended, run_to_end, start_trial
from tests.search_tests import tiny
from tests.search_tests.trial import trials
from tests.search_tests.trial.trials import EPOCHS, EXITS, accuracy, measured, new_candidate, run

NAMES: tuple[Method, ...] = get_args(Method)


def share(context: TrialContext, outcome: Outcome) -> float:
    """The share of the dense multiply-adds that are left."""
    return measured(outcome).macs / context.dense_macs


# The tables


def test_every_method_has_one_function() -> None:
    assert set(METHODS) == set(NAMES) == set(PRUNERS) | set(TRAINERS)
    assert not set(PRUNERS) & set(TRAINERS)


@pytest.mark.parametrize("name", NAMES)
def test_traits_of_a_method_are_those_that_its_trial_shows(context: TrialContext, name: Method) -> None:
    method = METHODS[name]
    candidate = new_candidate(name, target_ratio=0.6, round_to=8)
    if method.takes_tokens:
        candidate = replace(candidate, token_reduction="attention-merge", token_share=0.75)
        if method.takes_channels:
            candidate = replace(candidate, target_ratio=0.2)  # so little that it takes both
    if method.has_budgets:
        candidate = replace(candidate, drop_budget=(100.0,) * tiny.DEPTH)
    if not method.needs_profile:
        context = trials.with_known(context, profiles={})
    if not method.repairs:
        context = trials.with_known(context, sensitivities={})
    *events, ended = start_trial(trials.with_search(context, reduction_factor=2.0), candidate, "t000")
    assert isinstance(ended, Ended)
    outcome = ended.outcomes[0]
    assert outcome.plan is not None, outcome.reason
    assert any(isinstance(event, Epoch) for event in events) == method.trains
    assert any(isinstance(event, Rung) for event in events) == method.has_rungs
    assert bool(outcome.block_drops) == method.has_budgets
    assert outcome.has_weights != method.repairs
    assert [outcome.plan.exit_block for outcome in ended.outcomes if outcome.plan is not None] == (
        EXITS[::-1] if method.serves_every_exit else [tiny.DEPTH]
    )
    dense = keep_all_block(context.anatomy.blocks[0])
    narrowed = any(block.keep_hidden != dense.keep_hidden for block in outcome.plan.blocks)
    shortened = any(block.num_tokens != dense.num_tokens for block in outcome.plan.blocks)
    assert (narrowed, shortened) == (method.takes_channels, method.takes_tokens)
    assert (measured(outcome).sparsity > 0) == method.is_sparse


# Without training


ODD = AllowedWidths(attention=((3, 5), (7, 2), (16, 16)), hidden=(21, 77, 128), reduction=1000.0)
"""Widths that no measurement would give, so that they come from nowhere else."""


@pytest.mark.parametrize(
    ("method", "token_reduction", "exit_block"),
    [
        ("cascade", "attention-merge", 2), ("cascade", "none", 3),
        ("global", "attention-merge", 3), ("global", "none", 2),
    ],
)  # fmt: skip
def test_widths_are_those_that_the_block_may_have_also_before_an_exit(
    context: TrialContext, method: Any, token_reduction: Any, exit_block: int
) -> None:
    allowed_widths = tuple(replace(ODD, hidden=(10 + block, *ODD.hidden)) for block in range(tiny.DEPTH))
    none: Any = {"attention-merge": (), "none": ()}
    odd = trials.with_known(context, allowed_widths=none | {token_reduction: allowed_widths})
    candidate = new_candidate(
        method, token_reduction=token_reduction, exit_block=exit_block, round_to="auto", criterion="obs",
        drop_budget=(100.0 if method == "cascade" else 0.0,) * tiny.DEPTH,
        target_ratio=0.01 if method == "cascade" else 0.2,
    )  # fmt: skip
    outcome = run(odd, candidate)
    assert share(context, outcome) <= 0.35  # the cascade goes as far as it can, which is farther
    assert outcome.plan is not None
    assert outcome.plan.token_reduction == token_reduction
    assert len(outcome.plan.blocks) == exit_block
    for block, allowed in zip(outcome.plan.blocks, allowed_widths, strict=False):
        assert (block.shape.qk_width, block.shape.v_width) in allowed.attention
        assert block.shape.num_hidden in allowed.hidden
        assert token_reduction != "none" or block.num_tokens == 16
    assert any(block.shape.num_hidden < 128 for block in outcome.plan.blocks)


@pytest.mark.parametrize("method", ["cascade", "global"])
def test_widths_that_were_measured_make_a_model_and_so_do_multiples(context: TrialContext, method: Any) -> None:
    candidate = new_candidate(
        method, token_reduction="attention-merge", exit_block=2, criterion="obs", target_ratio=0.45,
        drop_budget=(100.0 if method == "cascade" else 0.0,) * tiny.DEPTH, token_share=0.0,
    )  # fmt: skip
    outcome = run(context, replace(candidate, round_to="auto"))
    assert share(context, outcome) <= 0.45
    assert outcome.plan is not None
    for block, allowed in zip(outcome.plan.blocks, context.allowed_widths["attention-merge"], strict=False):
        assert (block.shape.qk_width, block.shape.v_width) in allowed.attention
        assert block.shape.num_hidden in allowed.hidden
    by_eight = run(context, replace(candidate, round_to=8))
    assert by_eight.plan is not None
    for block in by_eight.plan.blocks:
        assert {block.shape.qk_width % 8, block.shape.v_width % 8, block.shape.num_hidden % 8} == {0}


@pytest.mark.parametrize("method", ["cascade", "global"])
def test_layers_that_too_few_images_repair_are_noted(context: TrialContext, method: Any) -> None:
    candidate = new_candidate(
        method, token_reduction="none", criterion="magnitude", target_ratio=0.5, round_to=1,
        drop_budget=(100.0 if method == "cascade" else 0.0,) * tiny.DEPTH,
    )  # fmt: skip
    few = replace(context, splits=replace(context.splits, num_calibration=1))
    outcome = run(few, candidate)
    measured(outcome)
    assert outcome.plan is not None
    assert outcome.notes
    assert outcome.notes == repaired_model(few.model, outcome.plan, few.splits.calibration, batch_size=64).notes
    assert all("only the bias is repaired" in note for note in outcome.notes)
    assert run(context, new_candidate()).notes == ()


@pytest.mark.parametrize("method", ["constant", "decreasing"])
def test_a_schedule_takes_tokens_alone_and_reaches_its_target(context: TrialContext, method: Method) -> None:
    outcome = run(context, new_candidate(method, token_reduction="merge", target_ratio=0.7))
    assert share(context, outcome) <= 0.7
    assert outcome.plan is not None
    dense = context.anatomy.blocks[0]
    assert all(kept.keep_hidden == keep_all_block(dense).keep_hidden for kept in outcome.plan.blocks)
    counts = [dense.num_patches, *(kept.num_tokens for kept in outcome.plan.blocks)]
    taken = [before - after for before, after in pairwise(counts)]
    assert max(taken) - min(taken) <= 1 if method == "constant" else taken == sorted(taken, reverse=True)


def test_swin_is_pruned_up_to_either_of_its_stages() -> None:
    methods: tuple[Any, ...] = ("cascade", "global")
    space = {"method": list(methods), "token_reduction": "auto", "round_to": "auto", "exit_block": [1, 4]}
    config = tiny.config(space=space)
    inputs = tiny.inputs(config, model=tiny.swin(), splits=tiny.splits(test=False))
    context, dense = tiny.prepared(config, inputs, timer=tiny.timer)  # its widths by the clock
    assert context.allowed_widths.keys() == {"none"}
    odd = tuple(
        AllowedWidths(attention=((8, 8),), hidden=(10 + block, anatomy.num_hidden))
        for block, anatomy in enumerate(context.anatomy.blocks)
    )
    context = trials.with_known(context, allowed_widths={"none": odd})
    for method, exit_block in product(methods, (2, 4)):
        candidate = new_candidate(
            method, criterion="obs", token_reduction="none", round_to="auto", exit_block=exit_block,
            drop_budget=(100.0 if method == "cascade" else 0.0,) * 4, target_ratio=0.6,
        )  # fmt: skip
        outcome = run(context, candidate)
        assert measured(outcome).macs <= 0.6 * dense.macs
        assert outcome.plan is not None
        assert [block.num_tokens for block in outcome.plan.blocks] == [64, 64, 16, 16][:exit_block]
        widths = [block.shape.num_hidden for block in outcome.plan.blocks]
        assert all(width in (10 + block, (64, 64, 128, 128)[block]) for block, width in enumerate(widths))
        assert exit_block == 2 or min(widths) < 64
        assert accuracy(build(context, outcome.plan), context.splits.val) == pytest.approx(measured(outcome).top1)


# Trained


def test_learned_width_gives_a_point_for_each_exit_its_own_first(context: TrialContext) -> None:
    candidate = new_candidate("learned", target_ratio=0.6)
    last, earlier = run_to_end(context, candidate, "t004").outcomes
    assert [last.id, earlier.id] == ["t004", "t004.2"]
    assert last.trial == earlier.trial == "t004"
    assert last.plan is not None and earlier.plan is not None
    assert (last.plan.exit_block, earlier.plan.exit_block) == (3, 2)
    assert earlier.plan.blocks == last.plan.blocks[:2]
    assert 0.58 < share(context, last) <= 0.6
    assert last.candidate == earlier.candidate == candidate
    assert [sorted(epoch) for epoch in last.history] == [["loss", "share"]] * EPOCHS
    assert earlier.history == () and earlier.seconds == 0.0


def test_learned_width_counts_its_target_in_what_the_recipe_says(context: TrialContext) -> None:
    by_params = replace(context, config=trials.config(learned__count="params"))
    outcome = run_to_end(by_params, new_candidate("learned", target_ratio=0.6), "t000").outcomes[0]
    assert 0.57 < measured(outcome).params / count_params(context.model) <= 0.6


def test_target_is_a_share_of_the_dense_model_before_an_exit_too(context: TrialContext) -> None:
    candidate = new_candidate("learned", exit_block=2, target_ratio=0.5)
    assert 0.48 < share(context, run_to_end(context, candidate, "t000").outcomes[0]) <= 0.5


@pytest.mark.parametrize("method", ["learned", "soft-mask"])
def test_target_that_the_exit_alone_reaches_takes_nothing_more(context: TrialContext, method: str) -> None:
    candidate = new_candidate(method, exit_block=2, target_ratio=0.9)
    outcome = run_to_end(context, candidate, "t000").outcomes[0]
    assert outcome.plan is not None, outcome.reason
    assert all(len(block.keep_hidden) == 128 for block in outcome.plan.blocks)


@pytest.mark.parametrize("method", ["learned", "soft-mask"])
def test_target_out_of_reach_is_infeasible_and_says_what_is_within(context: TrialContext, method: str) -> None:
    outcome = run(context, new_candidate(method, target_ratio=0.001))
    assert outcome.state is State.INFEASIBLE
    assert outcome.reason is not None and "cannot be reached; give 0." in outcome.reason


def test_soft_mask_hits_its_target(context: TrialContext) -> None:
    outcome = run(context, new_candidate("soft-mask", target_ratio=0.6))
    assert 0.55 < share(context, outcome) <= 0.6
    assert len(outcome.history) == EPOCHS


@pytest.mark.parametrize(
    ("pattern", "sparsity", "recovery"),
    [("any", 0.4, "none"), ("any", 0.4, "distill"), ("2:4", 0.5, "distill"), ("1:4", 0.75, "none")],
)
def test_sparse_model_has_the_sparsity_asked_for_and_the_dense_shapes(
    context: TrialContext, pattern: str, sparsity: float, recovery: str
) -> None:
    outcome = run(context, new_candidate("unstructured", target_ratio=0.6, pattern=pattern, recovery=recovery))
    assert measured(outcome).sparsity == pytest.approx(sparsity, abs=1e-4)
    assert share(context, outcome) == 1.0
    assert measured(outcome).params == count_params(context.model)
    assert sparsity_of(context.model) == 0.0  # the dense model is left as it was


def test_widths_of_a_training_are_those_that_the_device_is_faster_with(context: TrialContext) -> None:
    candidate = new_candidate("learned", target_ratio=0.6, round_to="auto")
    outcome = run_to_end(context, candidate, "t000").outcomes[0]
    assert outcome.plan is not None, outcome.reason
    (allowed, *_) = context.allowed_widths["none"]
    assert all(allowed.least_hidden(len(block.keep_hidden)) == len(block.keep_hidden) for block in outcome.plan.blocks)


# The fine-tune


def distilled(**changes: Any) -> Candidate:
    return new_candidate(drop_budget=(100.0,) * 3, recovery="distill", **changes)


def test_distillation_follows_the_cascade_and_keeps_its_plan(context: TrialContext) -> None:
    candidate = distilled(target_ratio=0.5, token_reduction="none")
    plain, ended = run(context, replace(candidate, recovery="none")), run_to_end(context, candidate, "t001")
    (tuned,) = ended.outcomes
    assert tuned.plan == plain.plan
    assert (tuned.block_drops, tuned.forward_passes) == (plain.block_drops, plain.forward_passes)
    assert (plain.has_weights, tuned.has_weights) == (False, True)
    assert measured(tuned).macs == measured(plain).macs
    assert tuned.plan is not None
    repaired = build(context, tuned.plan).state_dict()
    weights = ended.models["t001"].state_dict()
    assert weights.keys() == repaired.keys()
    assert not any(tensor.equal(repaired[name]) for name, tensor in weights.items() if name.endswith("fc2.weight"))
    assert [list(epoch) for epoch in tuned.history] == [["loss"]] * EPOCHS


def test_training_that_diverges_fails_with_step_and_learning_rate(context: TrialContext) -> None:
    wild = replace(context, config=trials.config(distill__learning_rate=1e30))
    outcome = run(wild, new_candidate("unstructured", target_ratio=0.6, recovery="distill"))
    assert outcome.state is State.FAILED
    assert outcome.reason is not None
    assert outcome.reason.startswith("training diverged in step ") and "(1e+30)" in outcome.reason


def test_fine_tune_has_a_rung_after_a_third_of_its_epochs_if_the_trial_had_others(context: TrialContext) -> None:
    events = list(start_trial(trials.with_search(context, reduction_factor=2.0), distilled(target_ratio=0.6), "t000"))
    assert " ".join(type(event).__name__ for event in events) == "Rung Rung Epoch Rung Epoch Epoch Ended"
    unstructured = new_candidate("unstructured", target_ratio=0.6, recovery="distill")
    events = list(start_trial(trials.with_search(context, reduction_factor=2.0), unstructured, "t000"))
    assert " ".join(type(event).__name__ for event in events) == "Epoch Epoch Epoch Ended"
