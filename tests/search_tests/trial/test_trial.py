"""candidate -> outcome on a tiny untrained model: the dense one, pruned ones, and those that break."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from pruning.data import Images
from pruning.errors import VitfrontError
from pruning.measure.accuracy import wilson_interval
from pruning.measure.cost import count_macs, count_params
from pruning.measure.widths import AllowedWidths
from pruning.model.anatomy import blocks_of, examine
from pruning.model.exits import truncate
from pruning.model.surgery import keep_all_block, keep_all_plan
from pruning.repair.compensation import repaired_model
from pruning.repair.sensitivity import measure_sensitivity
from search.config import Accuracy
from search.method import Method
from search.outcome import Candidate, Measurement, Outcome, State
from search.trial.context import TrialContext, build, confirm, keys_of, known_from, measure, prepare, time_shapes
from search.trial.trial import WorkerCache, run_to_end
from tests.pruning_tests.measure.test_retrieval import slow
from tests.search_tests import builders, tiny

EXITS = [2, 3]


@pytest.fixture(scope="module")
def prepared() -> tuple[TrialContext, Measurement]:
    """A model that knows its noise by heart, so that pruning costs accuracy on the probe images."""
    config = tiny.config(model__training={"epochs": 30, "max_shift": 0, "max_turn": 0, "batch_size": 8})
    return prepare(config, tiny.model(), tiny.splits(), EXITS, trained=False)


@pytest.fixture(scope="module")
def context(prepared: tuple[TrialContext, Measurement]) -> TrialContext:
    return prepared[0]


@pytest.fixture(scope="module")
def paced(context: TrialContext) -> TrialContext:
    """The same model in a sweep that measures what this machine is faster with."""
    config = tiny.config(
        space={
            "method": ["cascade", "global"], "token_reduction": ["attention-merge", "none"], "round_to": [8, "auto"],
            "exit_block": [2, 3],
        }
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pruning.measure.widths._least_times", tiny.steady_times)
        return prepare(config, copy.deepcopy(context.model), context.splits, EXITS, trained=True)[0]


def candidate(**changes: Any) -> Candidate:
    """The dense model, and `changes`."""
    dense = Candidate(
        cutoff_channel=0.1,
        cutoff_token=0.85,
        drop_budget=(0.0,) * tiny.DEPTH,
        token_share=0.5,
        target_ratio=1.0,
        exit_block=tiny.DEPTH,
    )
    return replace(dense, **changes)


def run(context: TrialContext, asked: Candidate, trial_id: str) -> Outcome:
    """The only outcome of a candidate."""
    (outcome,) = run_to_end(context, asked, trial_id).outcomes
    return outcome


def measured(outcome: Outcome) -> Measurement:
    assert outcome.state is State.MEASURED, outcome.reason
    assert outcome.measurement is not None
    return outcome.measurement


def accuracy(model: nn.Module, images: Images) -> float:
    with torch.no_grad():
        logits = model(images.normalized(slice(None)))
    return float((logits.argmax(dim=1) == images.labels).double().mean())


def breaking(context: TrialContext, error: Exception) -> TrialContext:
    """A context whose model breaks."""

    def fail(*_: Any) -> None:
        raise error

    model = tiny.model()
    model.patch_embed.register_forward_hook(fail)
    return replace(context, model=model)


def test_dense_model_is_measured_against_itself(prepared: tuple[TrialContext, Measurement]) -> None:
    context, dense = prepared
    assert (dense.speedup, dense.speedup_low, dense.speedup_high) == (1.0, 1.0, 1.0)
    assert dense.top1 == pytest.approx(accuracy(context.model, context.splits.val))
    assert (dense.top1_low, dense.top1_high) == wilson_interval(dense.top1, len(context.splits.val))
    assert dense.macs == context.dense_macs == count_macs(examine(context.model), keep_all_plan(examine(context.model)))
    assert dense.params == count_params(context.model)
    assert dense.throughput_img_s == pytest.approx(8 / dense.latency_ms_p50 * 1e3)
    assert dense.top1_test is None


def test_context_has_a_classifier_for_every_exit_and_its_model_is_done_learning(context: TrialContext) -> None:
    assert sorted(context.exit_heads) == EXITS
    assert not context.model.training
    assert not any(parameter.requires_grad for parameter in context.model.parameters())


def test_dense_candidate_gives_the_dense_model(prepared: tuple[TrialContext, Measurement]) -> None:
    context, dense = prepared
    outcome = run(context, candidate(), "t007")
    found = measured(outcome)
    assert (outcome.id, outcome.candidate) == ("t007", candidate())
    assert outcome.plan == keep_all_plan(examine(context.model))
    assert outcome.block_drops == (0.0,) * tiny.DEPTH
    assert (found.top1, found.macs, found.params) == (dense.top1, dense.macs, dense.params)
    assert 0.6 < found.speedup < 1.7
    assert outcome.seconds > 0


def test_pruned_outcome_costs_each_block_no_more_than_its_budget_and_reaches_its_target(context: TrialContext) -> None:
    asked = candidate(drop_budget=(5.0, 20.0, 100.0), target_ratio=0.2)
    outcome = run(context, asked, "t000")
    found = measured(outcome)
    assert len(outcome.block_drops) == tiny.DEPTH
    assert all(drop <= budget for drop, budget in zip(outcome.block_drops, asked.drop_budget, strict=True))
    assert outcome.plan is not None
    lost = accuracy(context.model, context.splits.probe) - accuracy(build(context, outcome.plan), context.splits.probe)
    assert sum(outcome.block_drops) == pytest.approx(100 * lost)
    assert found.macs == count_macs(examine(context.model), outcome.plan) <= 0.2 * context.dense_macs
    assert found.params < count_params(context.model)
    assert outcome.forward_passes > 1


def test_budget_of_nothing_loses_no_probe_image(context: TrialContext) -> None:
    outcome = run(context, candidate(target_ratio=0.2), "t000")
    measured(outcome)
    assert max(outcome.block_drops) <= 0
    assert outcome.plan is not None
    model = build(context, outcome.plan)
    assert accuracy(model, context.splits.probe) >= accuracy(context.model, context.splits.probe)


def test_exit_candidate_answers_with_the_classifier_of_its_exit(context: TrialContext) -> None:
    outcome = run(context, candidate(exit_block=2), "t000")
    found = measured(outcome)
    assert outcome.plan is not None
    assert outcome.plan.exit_block == len(outcome.block_drops) == 2
    assert found.macs < context.dense_macs
    model = build(context, outcome.plan)
    assert len(blocks_of(model)) == 2
    assert torch.equal(model.head.weight, context.exit_heads[2]["head.weight"])
    assert not torch.equal(model.head.weight, context.model.head.weight)


def test_target_of_an_exit_counts_in_macs_of_the_dense_model(context: TrialContext) -> None:
    """Two of three blocks are two thirds of the multiply-adds already, so that a target of 0.8 leaves them whole."""
    outcome = run(context, candidate(exit_block=2, target_ratio=0.8, drop_budget=(100.0, 100.0, 0.0)), "t000")
    assert outcome.plan is not None
    assert outcome.plan.blocks == keep_all_plan(examine(context.model)).blocks[:2]


@pytest.mark.parametrize(
    "asked",
    [candidate(drop_budget=(10.0, 10.0, 10.0), target_ratio=0.5), candidate(exit_block=2, drop_budget=(9.0, 9.0, 0.0))],
)
def test_model_built_again_from_the_plan_reaches_the_recorded_accuracy(context: TrialContext, asked: Candidate) -> None:
    outcome = run(context, asked, "t000")
    assert outcome.plan is not None
    model = build(context, outcome.plan)
    assert accuracy(model, context.splits.val) == pytest.approx(measured(outcome).top1)
    assert measure(context, model, outcome.plan).top1 == measured(outcome).top1


def test_trial_leaves_the_context_as_it_was(context: TrialContext) -> None:
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    heads = {name: tensor.clone() for name, tensor in context.exit_heads[2].items()}
    run(context, candidate(exit_block=2, drop_budget=(20.0, 20.0, 0.0), target_ratio=0.4), "t000")
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert all(torch.equal(tensor, heads[name]) for name, tensor in context.exit_heads[2].items())


def test_same_candidate_gives_the_same_plan_and_accuracy(context: TrialContext) -> None:
    asked = candidate(drop_budget=(10.0, 10.0, 10.0), target_ratio=0.5)
    one, other = (run(context, asked, "t000") for _ in range(2))
    assert one.plan == other.plan
    assert measured(one).top1 == measured(other).top1


def test_context_has_the_widths_of_every_block_for_each_token_reduction_where_widths_are_to_be_measured(
    context: TrialContext, paced: TrialContext
) -> None:
    assert context.allowed_widths == {}
    assert paced.allowed_widths.keys() == {"attention-merge", "none"}
    for kind, allowed_widths in paced.allowed_widths.items():
        assert allowed_widths == (allowed_widths[0],) * tiny.DEPTH
        assert set(allowed_widths[0].attention) == {(8, 8), (8, 16), (16, 8), (16, 16)}
        assert allowed_widths[0].hidden == tuple(range(8, 129, 8))
        assert (allowed_widths[0].reduction > 0) == (kind != "none")


ODD = AllowedWidths(attention=((3, 5), (7, 2), (16, 16)), hidden=(21, 77, 128), reduction=1000.0)
"""What no measurement would give, so that widths of it come from nowhere else."""


@pytest.mark.parametrize("exit_block", EXITS)
@pytest.mark.parametrize("token_reduction", ["attention-merge", "none"])
@pytest.mark.parametrize("method", ["cascade", "global"])
def test_widths_are_those_that_the_block_may_have_also_before_an_exit(
    paced: TrialContext, method: Any, token_reduction: Any, exit_block: int
) -> None:
    allowed_widths = tuple(replace(ODD, hidden=(10 + block, *ODD.hidden)) for block in range(tiny.DEPTH))
    others: Any = {"attention-merge": (), "none": ()}
    odd = replace(paced, allowed_widths=others | {token_reduction: allowed_widths})
    asked = candidate(
        method=method, token_reduction=token_reduction, exit_block=exit_block, round_to="auto", criterion="obs",
        drop_budget=(100.0 if method == "cascade" else 0.0,) * tiny.DEPTH,
        target_ratio=0.01 if method == "cascade" else 0.35,
    )  # fmt: skip
    outcome = run(odd, asked, "t000")
    assert measured(outcome).macs <= 0.35 * paced.dense_macs  # the cascade goes as far as it can, which is farther
    assert outcome.plan is not None
    assert outcome.plan.token_reduction == token_reduction
    assert len(outcome.plan.blocks) == exit_block
    for block, allowed in zip(outcome.plan.blocks, allowed_widths, strict=False):
        assert (block.shape.qk_width, block.shape.v_width) in allowed.attention
        assert block.shape.num_hidden in allowed.hidden
        assert token_reduction != "none" or block.num_tokens == 16
    assert any(block.shape.num_hidden < 128 for block in outcome.plan.blocks)


@pytest.mark.parametrize("method", ["cascade", "global"])
def test_widths_that_were_measured_make_a_model_and_so_do_multiples(paced: TrialContext, method: Any) -> None:
    asked = candidate(
        method=method, token_reduction="attention-merge", exit_block=2, criterion="obs", target_ratio=0.45,
        drop_budget=(100.0 if method == "cascade" else 0.0,) * tiny.DEPTH, token_share=0.0,
    )  # fmt: skip
    outcome = run(paced, replace(asked, round_to="auto"), "t000")
    assert measured(outcome).macs <= 0.45 * paced.dense_macs
    assert outcome.plan is not None
    for block, allowed in zip(outcome.plan.blocks, paced.allowed_widths["attention-merge"], strict=False):
        assert (block.shape.qk_width, block.shape.v_width) in allowed.attention
        assert block.shape.num_hidden in allowed.hidden
    by_eight = run(paced, replace(asked, round_to=8), "t001")
    assert by_eight.plan is not None
    for block in by_eight.plan.blocks:
        assert {block.shape.qk_width % 8, block.shape.v_width % 8, block.shape.num_hidden % 8} == {0}


@pytest.mark.parametrize("method", ["cascade", "global"])
def test_layers_that_too_few_images_repair_are_noted(paced: TrialContext, method: Any) -> None:
    asked = candidate(
        method=method, token_reduction="none", criterion="magnitude", target_ratio=0.5, round_to=1,
        drop_budget=(100.0 if method == "cascade" else 0.0,) * tiny.DEPTH,
    )  # fmt: skip
    few = replace(paced, splits=replace(paced.splits, num_calibration=1))
    outcome = run(few, asked, "t000")
    measured(outcome)
    assert outcome.plan is not None
    assert outcome.notes
    assert outcome.notes == repaired_model(few.model, outcome.plan, few.splits.calibration, batch_size=64).notes
    assert all("only the bias is repaired" in note for note in outcome.notes)
    assert run(paced, candidate(), "t001").notes == ()


@pytest.mark.parametrize("method", ["cascade", "global"])
def test_swin_is_pruned_up_to_either_of_its_stages(method: Any) -> None:
    space = {"method": method, "token_reduction": "auto", "round_to": "auto", "exit_block": [1, 4]}
    context, dense = prepare(tiny.config(space=space), tiny.swin(), tiny.splits(test=False), [2, 4], trained=True)
    assert context.allowed_widths.keys() == {"none"}
    for exit_block in (2, 4):
        asked = candidate(
            method=method, criterion="obs", token_reduction="none", round_to="auto", exit_block=exit_block,
            drop_budget=(100.0 if method == "cascade" else 0.0,) * 4, target_ratio=0.6,
        )  # fmt: skip
        context.allowed_widths["none"] = tuple(
            AllowedWidths(attention=((8, 8),), hidden=(10 + block, dense.num_hidden))
            for block, dense in enumerate(examine(context.model).blocks)
        )
        outcome = run(context, asked, "t000")
        assert measured(outcome).macs <= 0.6 * dense.macs
        assert outcome.plan is not None
        assert [block.num_tokens for block in outcome.plan.blocks] == [64, 64, 16, 16][:exit_block]
        widths = [block.shape.num_hidden for block in outcome.plan.blocks]
        assert all(width in (10 + block, (64, 64, 128, 128)[block]) for block, width in enumerate(widths))
        assert exit_block == 2 or min(widths) < 64
        assert accuracy(build(context, outcome.plan), context.splits.val) == pytest.approx(measured(outcome).top1)


def test_error_inside_a_trial_is_a_failed_outcome_that_says_what_and_where(context: TrialContext) -> None:
    outcome = run(breaking(context, RuntimeError("out of memory\nmuch more of it")), candidate(), "t003")
    assert (outcome.id, outcome.state, outcome.candidate) == ("t003", State.FAILED, candidate())
    assert outcome.reason is not None
    assert outcome.reason.startswith("RuntimeError: out of memory (test_trial.py:")
    assert "\n" not in outcome.reason
    assert outcome.seconds > 0


def test_what_is_the_users_doing_is_told_in_its_own_words(context: TrialContext) -> None:
    outcome = run(breaking(context, VitfrontError("give more images")), candidate(), "t000")
    assert (outcome.state, outcome.reason) == (State.FAILED, "give more images")


def test_candidate_without_a_fitted_exit_fails(context: TrialContext) -> None:
    outcome = run(context, candidate(exit_block=1), "t000")
    assert outcome.state is State.FAILED
    assert outcome.reason is not None
    assert outcome.reason.startswith("KeyError: 1 (trial.py:")


def test_model_whose_logits_are_no_numbers_fails(context: TrialContext) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(VitfrontError, match="the model's logits are not finite"):
        prepare(tiny.config(), model, context.splits, [tiny.DEPTH], trained=True)


def by_retrieval(context: TrialContext, accuracy: Accuracy = "recall_at_1") -> TrialContext:
    """The same sweep, searched by retrieval."""
    search = context.config.search.model_copy(update={"accuracy": accuracy})
    return replace(context, config=context.config.model_copy(update={"search": search}))


def retrieval(model: nn.Module, context: TrialContext) -> tuple[float, float]:
    """Recall at 1 and mean average precision of val among the training images, by their definitions."""
    shown = [context.splits.val, context.splits.calibration, context.splits.probe]
    with torch.no_grad():
        found = [
            model.forward_head(model.forward_features(images.normalized(slice(None))), pre_logits=True)  # type: ignore[operator]
            for images in shown
        ]
    queries, *gallery = [(each / each.norm(dim=1, keepdim=True)).tolist() for each in found]
    labels, *known = [images.labels.tolist() for images in shown]
    return slow(queries, labels, gallery[0] + gallery[1], known[0] + known[1])


@pytest.mark.parametrize("accuracy", ["recall_at_1", "mean_average_precision"])
def test_retrieval_ranks_the_training_images_by_the_pruned_models_own_features(
    context: TrialContext, accuracy: Accuracy
) -> None:
    plan = keep_all_plan(examine(context.model))
    few = replace(plan.blocks[0], keep_hidden=plan.blocks[0].keep_hidden[::8], num_tokens=5)
    plan = replace(plan, blocks=(few, replace(plan.blocks[1], num_tokens=5)))
    pruned = build(context, plan)
    found = measure(by_retrieval(context, accuracy), pruned, plan)
    assert (found.recall_at_1, found.mean_average_precision) == pytest.approx(retrieval(pruned, context))
    assert (found.recall_at_1, found.mean_average_precision) != pytest.approx(retrieval(context.model, context))


def test_retrieval_is_not_taken_where_the_recipe_searches_by_top1(prepared: tuple[TrialContext, Measurement]) -> None:
    _, dense = prepared
    assert (dense.recall_at_1, dense.mean_average_precision) == (None, None)


def test_dense_model_and_front_of_a_retrieval_sweep_are_measured_by_it(context: TrialContext) -> None:
    found = confirm(by_retrieval(context), [keep_all_plan(examine(context.model))])
    expected = retrieval(context.model, context)
    for each in (found.dense, *found.measured):
        assert (each.recall_at_1, each.mean_average_precision) == pytest.approx(expected)


def test_training_images_whose_features_are_no_numbers_fail(context: TrialContext) -> None:
    broken = replace(context.splits.training, mean=(float("nan"),) * 3)
    spoilt = by_retrieval(replace(context, splits=replace(context.splits, training=broken)))
    with pytest.raises(VitfrontError, match="the model's features are not finite"):
        measure(spoilt, context.model, keep_all_plan(examine(context.model)))


def test_front_is_confirmed_in_its_order_and_on_test(context: TrialContext) -> None:
    plans = [
        outcome.plan
        for asked in (candidate(exit_block=2), candidate(drop_budget=(50.0, 50.0, 50.0), target_ratio=0.5))
        if (outcome := run(context, asked, "t000")).plan is not None
    ]
    found = confirm(context, plans)
    test = context.splits.test
    assert test is not None
    assert found.dense.top1_test == pytest.approx(accuracy(context.model, test))
    for plan, measured, model in zip(plans, found.measured, found.models, strict=True):
        assert measured.macs == count_macs(examine(context.model), plan)
        assert measured.top1 == pytest.approx(accuracy(model, context.splits.val))
        assert measured.top1_test == pytest.approx(accuracy(model, test))
        assert measured.throughput_img_s == pytest.approx(found.dense.throughput_img_s * measured.speedup)


def test_plans_of_equal_shape_are_timed_once(context: TrialContext, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keep_all_plan(examine(context.model))
    first, *others = whole.blocks
    one, other = (
        replace(whole, blocks=(replace(first, keep_hidden=kept), *others))
        for kept in (first.keep_hidden[:-1], first.keep_hidden[1:])
    )
    shorter = replace(whole, blocks=whole.blocks[:2])
    raced: list[nn.Module] = []

    def fake(dense: nn.Module, models: list[nn.Module], *_: Any, **__: Any) -> tuple[None, list[int]]:
        raced.extend(models)
        return None, [count_params(model) for model in models]

    monkeypatch.setattr("search.trial.context.time_against_dense", fake)
    found = time_shapes(context, [one, shorter, other])
    assert found == [count_params(build(context, plan)) for plan in (one, shorter, other)]
    assert len(raced) == 2


def test_conditions_of_the_final_figures_are_told(context: TrialContext) -> None:
    conditions = confirm(context, []).conditions
    assert conditions.pop("device")
    assert conditions == {"precision": "float32", "threads": 1, "batch_size": 8, "torch": torch.__version__}


def test_front_is_confirmed_without_a_test_split_and_without_points(context: TrialContext) -> None:
    found = confirm(replace(context, splits=tiny.splits(test=False)), [])
    assert (found.dense.top1_test, found.measured, found.models) == (None, [], [])


def test_few_images_are_repeated_to_fill_the_timing_batch(context: TrialContext) -> None:
    config = tiny.config(measure__batch_size=50)
    batch = replace(context, config=config).timing_batch()
    assert batch.shape == (50, 3, 16, 16)
    assert torch.equal(batch[24:48], batch[:24])


def test_recipe_with_training_trains_on_calibration_and_probe(context: TrialContext) -> None:
    for seen in (context.splits.calibration, context.splits.probe):  # noise can only be learned by heart
        assert accuracy(context.model, seen) > 0.9
    assert accuracy(context.model, context.splits.val) < 0.7


def test_model_that_is_trained_already_is_not_trained_again() -> None:
    config = tiny.config(model__training={"epochs": 2})
    context, _ = prepare(config, tiny.model(), tiny.splits(test=False), [tiny.DEPTH], trained=True)
    fresh = tiny.model().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in context.model.state_dict().items())


@pytest.mark.parametrize("method", ["constant", "decreasing"])
def test_a_schedule_takes_tokens_alone_and_reaches_its_target(context: TrialContext, method: Method) -> None:
    asked = builders.candidate(
        exit_block=tiny.DEPTH, method=method, token_reduction="merge", target_ratio=0.7, drop_budget=(0.0,) * tiny.DEPTH
    )
    outcome = run(context, asked, "t000")
    assert outcome.state is State.MEASURED and outcome.plan is not None and outcome.measurement is not None
    assert outcome.measurement.macs <= 0.7 * context.dense_macs
    block = examine(context.model).blocks[0]
    assert all(kept.keep_hidden == keep_all_block(block).keep_hidden for kept in outcome.plan.blocks)
    counts = [block.num_patches, *(kept.num_tokens for kept in outcome.plan.blocks)]
    taken = [before - after for before, after in pairwise(counts)]
    assert max(taken) - min(taken) <= 1 if method == "constant" else taken == sorted(taken, reverse=True)


def test_context_knows_the_sensitivity_of_every_exit(context: TrialContext) -> None:
    assert sorted(context.sensitivities) == EXITS
    for exit_block, found in context.sensitivities.items():
        shorter = truncate(context.model, exit_block, context.exit_heads[exit_block])
        for one, other in zip(found, measure_sensitivity(shorter, context.splits.calibration), strict=True):
            assert torch.equal(one.mid.metric, other.mid.metric) and torch.equal(one.out.metric, other.out.metric)
            assert (one.mid.prefix_share, one.out.prefix_share) == (other.mid.prefix_share, other.out.prefix_share)


def test_methods_that_train_alone_need_no_sensitivity() -> None:
    config = tiny.config(space={"method": ["learned", "unstructured"]})
    context, _ = prepare(config, tiny.model(), tiny.splits(test=False), [tiny.DEPTH], trained=True)
    assert context.sensitivities == {}


def test_trials_that_remember_others_give_what_they_give_alone(paced: TrialContext) -> None:
    memory = WorkerCache()
    tokens: dict[str, Any] = {"token_reduction": "attention-merge", "round_to": 8}
    asked = [
        candidate(drop_budget=(10.0, 10.0, 10.0), target_ratio=0.5, **tokens),
        candidate(drop_budget=(10.0, 10.0, 40.0), target_ratio=0.5, **tokens),
        candidate(drop_budget=(10.0, 10.0, 10.0), target_ratio=0.4, **tokens),
        candidate(drop_budget=(10.0, 10.0, 0.0), target_ratio=0.5, exit_block=2, **tokens),
        candidate(method="global", target_ratio=0.5, **tokens),
        candidate(exit_block=2),
        candidate(exit_block=2, token_reduction="none"),
    ]
    for each in [*asked, asked[0]]:
        alone, ended = run_to_end(paced, each, "t"), run_to_end(paced, each, "t", memory)
        one, other = alone.outcomes[0], ended.outcomes[0]
        assert (one.plan, one.block_drops, one.forward_passes) == (other.plan, other.block_drops, other.forward_passes)
        for name in ("top1", "macs", "params", "sparsity"):
            assert getattr(measured(one), name) == getattr(measured(other), name)
        state = ended.models["t"].state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in alone.models["t"].state_dict().items())
    assert memory.prefix_cache.num_bytes > 0


FAST: Any = {"speedup": 9.5, "speedup_low": 9.25, "speedup_high": 9.75, "latency_ms_p50": 0.5, "throughput_img_s": 7.0}


def test_equal_shapes_are_not_timed_again_nor_equal_models_measured_again(
    prepared: tuple[TrialContext, Measurement],
) -> None:
    context, dense = prepared
    block = replace(keep_all_block(context.anatomy.blocks[0]), keep_hidden=tuple(range(9)))
    plan = replace(keep_all_plan(context.anatomy), blocks=(block,) * tiny.DEPTH)
    other = replace(plan, blocks=(replace(block, keep_hidden=tuple(range(7, 16))), block, block))  # another, as fast
    shape, whole = keys_of(context.anatomy, plan)
    known = {shape: replace(dense, **FAST), whole: replace(dense, top1=0.125)}
    assert measure(context, build(context, plan), plan, known).top1 == 0.125
    for has_weights in (True, False):  # its weights are its own; then they follow from another plan
        model, asked = build(context, other), plan if has_weights else other
        found = measure(context, model, asked, known, has_weights=has_weights)
        assert {name: getattr(found, name) for name in FAST} == FAST
        assert found.top1 == accuracy(model, context.splits.val)
        assert (found.macs, found.params) == (count_macs(context.anatomy, other), count_params(model))
    assert known[keys_of(context.anatomy, other)[1]] == found
    assert known[whole].top1 == 0.125


def test_what_reduces_no_tokens_is_as_fast_whatever_the_reduction_is_called(context: TrialContext) -> None:
    whole = keep_all_plan(context.anatomy)
    fewer = replace(whole, blocks=(whole.blocks[0], *[keep_all_block(context.anatomy.blocks[0], 9)] * 2))
    kinds: tuple[Any, ...] = ("lfe", "merge")
    assert len({keys_of(context.anatomy, replace(whole, token_reduction=kind)) for kind in (*kinds, "none")}) == 1
    assert len({keys_of(context.anatomy, replace(fewer, token_reduction=kind))[0] for kind in kinds}) == 2


def test_an_earlier_run_and_the_dense_model_need_not_be_measured_again(
    prepared: tuple[TrialContext, Measurement],
) -> None:
    context, dense = prepared
    asked = candidate(exit_block=2)
    earlier = run(context, asked, "t000")
    known = known_from(context.anatomy, dense, [earlier, builders.failed("t001")])
    memory = WorkerCache(known=known)
    assert measured(run_to_end(context, asked, "t002", memory).outcomes[0]) == earlier.measurement
    assert measured(run_to_end(context, candidate(), "t003", memory).outcomes[0]) == dense
    trained = known_from(context.anatomy, dense, [replace(earlier, has_weights=True)])
    assert len(known) == 4 and len(trained) == 3
