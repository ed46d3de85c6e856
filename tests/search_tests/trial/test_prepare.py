"""The context of a sweep: dense model, exits, sensitivities, profiles and widths, as far as its methods need them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.errors import VitfrontError
from pruning.fingerprints import fingerprint_of_weights
from pruning.measure.accuracy import wilson_interval
from pruning.measure.cost import count_macs, count_params
from pruning.model.anatomy import examine
from pruning.model.exits import truncate
from pruning.model.loading import read_weights
from pruning.model.surgery import keep_all_plan
from pruning.repair.sensitivity import measure_sensitivity
from search.config import Config
from search.errors import SweepError
from search.method import METHODS
from search.outcome import Measurement
from search.space import Space
from search.trial.context import ContextPart, TrialContext
from search.trial.prepare import (
    Step,
    is_whole,
    prepare_locally,
    profile_splits,
    profiled_reductions,
    steps_before,
    steps_for,
    steps_of,
)  # fmt: skip
from search.trial.trial import run_to_end
from search.trial.warm_start import early_candidates, first_candidates
from tests.search_tests import tiny
from tests.search_tests.trial.trials import EXITS, accuracy, new_candidate


def prepared(config: Config, **changes: Any) -> TrialContext:
    """The context of a recipe; `changes` are fields of its inputs or arguments of `prepare`."""
    arguments = {name: changes.pop(name) for name in ("exit_blocks", "known", "proposes") if name in changes}
    return tiny.prepared(config, tiny.inputs(config, **changes), timer=tiny.timer, **arguments)[0]


def space_of(**space: Any) -> Space:
    return Space(tiny.config(space={"token_reduction": "lfe"} | space).space, tiny.DEPTH)


# The dense model


def test_dense_model_is_measured_against_itself() -> None:
    config = tiny.config()
    context, dense = tiny.prepared(config, tiny.inputs(config))  # by the clock
    assert (dense.speedup, dense.speedup_low, dense.speedup_high) == (1.0, 1.0, 1.0)
    assert dense.throughput_img_s == pytest.approx(8 / dense.latency_ms_p50 * 1e3)
    assert dense.macs == context.dense_macs == count_macs(examine(context.model), keep_all_plan(examine(context.model)))
    assert dense.params == count_params(context.model)


def test_dense_model_is_measured_on_val_alone(context: TrialContext, dense: Measurement) -> None:
    assert dense.top1 == pytest.approx(accuracy(context.model, context.splits.val))
    assert (dense.top1_low, dense.top1_high) == wilson_interval(dense.top1, len(context.splits.val))
    assert (dense.top1_test, dense.recall_at_1, dense.mean_average_precision) == (None, None, None)


def test_context_has_a_classifier_for_every_exit_and_its_model_is_done_learning(context: TrialContext) -> None:
    assert sorted(context.exit_heads) == EXITS
    assert not context.model.training
    assert not any(parameter.requires_grad for parameter in context.model.parameters())


def test_exits_are_those_that_are_asked_for_whatever_the_space() -> None:
    assert sorted(prepared(tiny.config(), exit_blocks=[1, 2]).exit_heads) == [1, 2, tiny.DEPTH]  # and the model's own
    assert sorted(prepared(tiny.config()).exit_heads) == [tiny.DEPTH]


def test_recipe_with_training_trains_on_calibration_and_probe(context: TrialContext) -> None:
    for images in (context.splits.calibration, context.splits.probe):  # noise can only be learned by heart
        assert accuracy(context.model, images) > 0.9
    assert accuracy(context.model, context.splits.val) < 0.7


def test_model_that_is_trained_already_is_not_trained_again() -> None:
    context = prepared(tiny.config(model__training={"epochs": 2}))
    fresh = tiny.model().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in context.model.state_dict().items())


def test_model_whose_logits_are_no_numbers_fails() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(VitfrontError, match="the model's logits are not finite"):
        prepared(tiny.config(), model=model)


def test_weights_that_were_trained_here_are_kept(tmp_path: Path) -> None:
    config = tiny.config(model__training={"epochs": 1})
    inputs = tiny.inputs(config, trained=False, cache=tmp_path / "weights.safetensors")
    context, _ = prepare_locally(config, inputs, lambda _: None, timer=tiny.timer)
    kept = read_weights(inputs.cache)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in context.model.state_dict().items())
    assert not torch.equal(kept["head.weight"], tiny.model().head.weight)


def test_weights_trained_anew_are_those_that_the_recipe_pins_or_refused(tmp_path: Path) -> None:
    config = tiny.config(model__training={"epochs": 1})
    inputs = tiny.inputs(config, trained=False, cache=tmp_path / "weights.safetensors")
    prepare_locally(config, inputs, lambda _: None, timer=tiny.timer)
    weights = fingerprint_of_weights(read_weights(inputs.cache))
    for pinned in (weights, "0" * 32):
        fingerprints = inputs.fingerprints.model_dump() | {"weights": pinned}
        config = tiny.config(model__training={"epochs": 1}, fingerprints=fingerprints)
        inputs = tiny.inputs(config, trained=False, cache=tmp_path / "weights.safetensors")
        with pytest.raises(SweepError, match="the weights changed") if pinned != weights else nullcontext():
            prepare_locally(config, inputs, lambda _: None, timer=tiny.timer)


def test_weights_that_were_final_are_not_written(tmp_path: Path) -> None:
    config = tiny.config()
    inputs = tiny.inputs(config, cache=tmp_path / "weights.safetensors")
    prepare_locally(config, inputs, lambda _: None, timer=tiny.timer)
    assert list(tmp_path.iterdir()) == []


# What some methods need


def test_context_has_the_sensitivity_of_every_exit(context: TrialContext) -> None:
    assert sorted(context.sensitivities) == EXITS
    for exit_block, sensitivities in context.sensitivities.items():
        truncated = truncate(context.model, exit_block, context.exit_heads[exit_block])
        expected = measure_sensitivity(truncated, context.splits.calibration)
        for one, other in zip(sensitivities, expected, strict=True):
            assert torch.equal(one.mid.metric, other.mid.metric) and torch.equal(one.out.metric, other.out.metric)
            assert (one.mid.prefix_share, one.out.prefix_share) == (other.mid.prefix_share, other.out.prefix_share)


def test_methods_that_train_alone_need_no_sensitivity() -> None:
    assert prepared(tiny.config(space={"method": ["learned", "unstructured"]})).sensitivities == {}


def test_context_has_the_widths_of_every_block_for_each_token_reduction_where_widths_are_to_be_measured(
    context: TrialContext,
) -> None:
    assert context.allowed_widths.keys() == {"lfe", "attention-merge", "none"}
    for reduction, allowed_widths in context.allowed_widths.items():
        assert allowed_widths == (allowed_widths[0],) * tiny.DEPTH
        assert set(allowed_widths[0].attention) == {(8, 8), (8, 16), (16, 8), (16, 16)}
        assert allowed_widths[0].hidden == tuple(range(8, 129, 8))
        assert (allowed_widths[0].reduction > 0) == (reduction != "none")


@pytest.mark.parametrize(
    ("method", "reductions"), [("learned", ["none"]), ("cascade", ["lfe"]), (["cascade", "soft-mask"], ["lfe", "none"])]
)
def test_widths_are_measured_for_the_token_reductions_that_a_candidate_may_have(
    method: Any, reductions: list[str]
) -> None:
    config = tiny.config(space={"method": method, "token_reduction": "lfe", "round_to": "auto"})
    context, _ = tiny.prepared(config, tiny.inputs(config), timer=tiny.timer, time_widths=lambda *_, **__: ())
    assert context.allowed_widths == dict.fromkeys(reductions, ())


def test_no_widths_are_measured_where_none_are_to_be() -> None:
    assert prepared(tiny.config()).allowed_widths == {}


def test_a_search_has_the_profiles_that_it_begins_with(context: TrialContext) -> None:
    assert context.profiles.keys() == {"lfe", "attention-merge", "none"}  # global is one of its methods
    cascade = tiny.config(space={"token_reduction": "lfe"})
    assert prepared(cascade).profiles == {}  # no trial of the cascade needs one
    assert prepared(cascade, proposes=True).profiles.keys() == {"lfe"}
    assert profiled_reductions(space_of(token_reduction=["lfe", "merge"])) == ("lfe",)
    both = space_of(method=["cascade", "global"], token_reduction=["lfe", "merge"])
    assert profiled_reductions(both) == ("lfe", "merge")
    assert profiled_reductions(space_of(method="learned")) == ()


def test_profiles_are_taken_on_all_images_only_where_trials_depend_on_them(context: TrialContext) -> None:
    splits = context.splits
    assert profile_splits(space_of(method=["cascade", "global"]), splits) is splits
    part = profile_splits(space_of(), splits)
    assert (len(part.calibration), len(part.probe)) == (4, 10)


def test_what_is_known_is_not_measured_again(context: TrialContext) -> None:
    config = tiny.config(space={"token_reduction": "lfe", "round_to": "auto"})
    known = ContextPart(
        sensitivities={3: context.sensitivities[3]}, allowed_widths={"lfe": ()},
        profiles={"lfe": replace(context.profiles["lfe"], forward_passes=-1.0)},
    )  # fmt: skip
    again = prepared(config, known=known, proposes=True)
    assert again.profiles == known.profiles
    assert again.allowed_widths == known.allowed_widths
    assert again.sensitivities[3][0].mid.metric is known.sensitivities[3][0].mid.metric


# Its steps


def ids(steps: Sequence[Step]) -> list[str]:
    return [step.id for step in steps]


ALL: dict[str, Any] = {
    "method": ["cascade", "global"], "exit_block": [1, 3], "token_reduction": ["lfe", "merge"],
    "round_to": [8, "auto"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (
            ALL,
            "sensitivity-3 exits widths-lfe widths-merge curves profile-lfe profile-merge sensitivity-1 sensitivity-2",
        ),
        ({"method": "cascade", "exit_block": 3, "round_to": 8}, "sensitivity-3 curves profile-lfe"),
        ({"method": "cascade", "token_reduction": ["lfe", "merge"], "round_to": 1}, "sensitivity-3 curves profile-lfe"),
        ({"method": "cascade", "exit_block": 2, "round_to": 1}, "sensitivity-3 exits curves profile-lfe sensitivity-2"),
        ({"method": "constant", "round_to": 8}, "sensitivity-3"),
        ({"method": "learned", "exit_block": [2, 3], "round_to": 8}, "exits"),
        ({"method": "soft-mask", "exit_block": 3, "round_to": "auto"}, "widths-none"),
        (
            {"method": ["cascade", "soft-mask"], "exit_block": 3, "round_to": "auto"},
            "sensitivity-3 widths-lfe widths-none curves profile-lfe",
        ),
        ({"method": "unstructured", "exit_block": 3, "round_to": 8}, ""),
    ],
)
def test_a_space_has_the_steps_that_its_trials_need(space: dict[str, Any], expected: str) -> None:
    assert ids(steps_of(space_of(**space))) == expected.split()


def test_a_profile_that_only_proposes_may_be_left_out() -> None:
    assert ids(steps_of(space_of(method="cascade", round_to=8), proposes=False)) == ["sensitivity-3"]
    assert "profile-lfe" in ids(steps_of(space_of(method="global", round_to=8), proposes=False))


@pytest.mark.parametrize("method", [*METHODS, ("cascade", "global"), ("learned", "constant"), ("global", "soft-mask")])
@pytest.mark.parametrize("exit_block", [3, 2, (1, 3)])
@pytest.mark.parametrize("round_to", [8, "auto", (8, "auto")])
def test_every_step_comes_after_those_that_it_needs_and_none_twice(method: Any, exit_block: Any, round_to: Any) -> None:
    space = space_of(method=method, exit_block=exit_block, round_to=round_to)
    steps = steps_of(space)
    assert len(set(ids(steps))) == len(steps)
    for number, step in enumerate(steps):
        assert set(steps_before(step, space)) <= set(steps[:number]), step.id


@pytest.mark.parametrize("method", [*METHODS, ("cascade", "global", "constant")])
def test_every_candidate_needs_steps_of_its_space(method: Any) -> None:
    space = space_of(method=method, exit_block=(1, 3), round_to=(8, "auto"), token_reduction=["lfe", "merge"])
    grid = [*space.full_grid(200, 0), *early_candidates(space), *first_candidates(space)]
    for candidate in grid:
        assert set(steps_for(candidate, space)) <= set(steps_of(space)), candidate


def test_a_candidate_with_nothing_pruned_but_its_depth_needs_no_profile_and_no_sensitivity() -> None:
    space = space_of(**ALL)
    for method in ("cascade", "global"):
        dense = new_candidate(method, round_to="auto", token_reduction="merge")
        assert is_whole(dense)
        assert steps_for(dense, space) == []
        assert ids(steps_for(replace(dense, exit_block=2), space)) == ["exits"]
        pruned = ids(steps_for(replace(dense, target_ratio=0.99, exit_block=2), space))
        assert pruned == ["exits", "sensitivity-2", "widths-merge", *["curves", "profile-merge"] * (method == "global")]
    assert not is_whole(new_candidate("soft-mask"))  # it trains, whatever the target
    assert not is_whole(new_candidate("unstructured"))


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("cascade", {"target_ratio": 0.6, "round_to": 8}, "sensitivity-3"),
        ("cascade", {"target_ratio": 0.6, "round_to": "auto", "token_reduction": "lfe"}, "sensitivity-3 widths-lfe"),
        ("global", {"target_ratio": 0.6, "round_to": 8, "token_reduction": "lfe"}, "sensitivity-3 curves profile-lfe"),
        ("constant", {"target_ratio": 0.6, "round_to": "auto", "token_reduction": "lfe"}, "sensitivity-3"),
        ("constant", {"target_ratio": 0.6, "exit_block": 2, "token_reduction": "lfe"}, "exits sensitivity-2"),
        ("learned", {"target_ratio": 0.6, "round_to": 8}, "exits"),
        ("soft-mask", {"target_ratio": 0.6, "round_to": "auto"}, "widths-none"),
        ("unstructured", {"target_ratio": 0.6, "round_to": 8}, ""),
        ("cascade", {}, ""),
        ("cascade", {"exit_block": 2}, "exits"),
        *((method, {"round_to": "auto"}, "") for method in ("cascade", "global", "constant")),
        *((method, {"round_to": "auto", "exit_block": 2}, "exits") for method in ("cascade", "global", "constant")),
    ],
)
def test_a_trial_runs_with_the_steps_that_it_needs_and_no_others(
    context: TrialContext, method: str, changes: dict[str, Any], expected: str
) -> None:
    candidate = new_candidate(method, **{"drop_budget": (30.0,) * tiny.DEPTH} | changes)
    space = Space(context.config.space, tiny.DEPTH)
    steps = steps_for(candidate, space)
    assert ids(steps) == expected.split()
    known, own = context.known, ContextPart(exit_heads={3: context.exit_heads[3]})
    for step in steps:
        part = {
            "exits": ContextPart(exit_heads=known.exit_heads),
            "sensitivity": ContextPart(sensitivities={step.subject: known.sensitivities.get(step.subject, [])}),
            "widths": ContextPart(allowed_widths={step.subject: known.allowed_widths.get(step.subject, ())}),
            "curves": ContextPart(channel_curves=known.channel_curves),
            "profile": ContextPart(profiles={step.subject: known.profiles.get(step.subject)}),  # type: ignore[dict-item]
        }[step.kind]
        own = own.joined(part)
    outcomes = run_to_end(replace(context, known=own), candidate, "t000").outcomes
    assert [outcome.state for outcome in outcomes if outcome.reason is not None] == []
