"""What trials show at their rungs, on a tiny untrained model."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch

from pruning.measure.accuracy import predict, top1
from pruning.model.exits import truncate
from pruning.model.surgery import apply_plan
from search.config import Config
from search.outcome import Candidate, State
from search.trial.context import TrialContext, prepare
from search.trial.trial import Ended, Epoch, Rung, WorkerCache, run_to_end, start_trial
from tests.search_tests import tiny

EPOCHS = 6


def config(factor: float) -> Config:
    training = {"epochs": EPOCHS, "batch_size": 16, "max_shift": 0.0}
    methods = ["cascade", "global", "learned", "soft-mask", "unstructured"]
    return tiny.config(
        space={"method": methods, "token_reduction": "lfe"}, search__reduction_factor=factor, distill=training,
        learned=training, soft_mask=training,
    )  # fmt: skip


@pytest.fixture(scope="module")
def context() -> TrialContext:
    return prepare(config(2), tiny.model(), tiny.splits(), [tiny.DEPTH], trained=True)[0]


def candidate(**changes: Any) -> Candidate:
    made = Candidate(
        cutoff_channel=0.1, cutoff_token=0.85, drop_budget=(20.0,) * tiny.DEPTH, token_share=0.5, target_ratio=0.6,
        exit_block=tiny.DEPTH,
    )  # fmt: skip
    return replace(made, **changes)


def kinds(events: list[Any]) -> str:
    return " ".join(type(event).__name__ for event in events)


def test_a_first_look_takes_a_quarter_of_the_images(context: TrialContext) -> None:
    subsampled, splits = context.subsampled(), context.splits
    assert (len(subsampled.splits.calibration), len(subsampled.splits.probe), len(subsampled.splits.val)) == (4, 10, 6)
    assert torch.equal(subsampled.splits.val.labels, splits.val.labels[::4])
    assert subsampled.config.measure.num_rounds == 6
    assert subsampled.model is context.model


@pytest.mark.parametrize("method", ["cascade", "global"])
def test_trial_without_training_shows_a_first_look_and_ends_as_it_would_without(
    context: TrialContext, method: Any
) -> None:
    rung, ended = list(start_trial(context, candidate(method=method), "t000"))
    assert isinstance(rung, Rung) and isinstance(ended, Ended)
    ((accuracy, speedup),) = rung.values
    assert accuracy * 6 == pytest.approx(round(accuracy * 6))  # of 6 images
    assert speedup > 0
    (outcome,) = ended.outcomes
    assert (outcome.rungs, outcome.rung_spans) == (rung.values, rung.spans)
    (alone,) = run_to_end(replace(context, config=config(1)), candidate(method=method), "t000").outcomes
    assert alone.rungs == ()
    assert alone.measurement is not None and outcome.measurement is not None
    assert (alone.plan, alone.measurement.top1) == (outcome.plan, outcome.measurement.top1)
    assert 0 <= rung.spans[0][0] < rung.spans[0][1] <= outcome.seconds


def test_trial_that_trains_shows_the_model_before_and_after_a_part_of_its_epochs(context: TrialContext) -> None:
    asked = candidate(recovery="distill")
    events, states = list[Any](), list[dict[str, Any]]()
    for event in start_trial(context, asked, "t000"):
        events.append(event)
        states += [copy.deepcopy(event.state())] if isinstance(event, Epoch) else []
    assert kinds(events) == "Rung Rung Epoch Epoch Rung Epoch Epoch Epoch Epoch Ended"
    _, before, _, _, after_a_third, *_, ended = events
    (pruned,) = run_to_end(replace(context, config=config(1)), candidate(), "t000").outcomes
    assert pruned.plan is not None and pruned.measurement is not None
    assert before.values[1][0] == pruned.measurement.top1  # on all of val
    model, val = apply_plan(truncate(context.model, tiny.DEPTH), pruned.plan), context.splits.val
    model.load_state_dict(states[1]["training"]["weights"])
    assert after_a_third.values[-1][0] == top1(predict(model, val), val.labels)
    assert len({speedup for _, speedup in ended.outcomes[0].rungs[1:]}) == 1  # the same shape all along
    assert len(ended.outcomes[0].rungs) == 3


def test_trial_goes_on_from_a_state_behind_the_rungs_it_has_passed(context: TrialContext) -> None:
    asked = candidate(recovery="distill")
    events: list[Any] = list(start_trial(context, asked, "t000"))
    file = io.BytesIO()
    after_two = next(
        e for e in start_trial(context, asked, "t000") if isinstance(e, Epoch) and e.progress["epoch"] == 2
    )
    torch.save(after_two.state(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    rest: list[Any] = list(start_trial(context, asked, "t000", state))
    assert kinds(rest) == "Epoch Epoch Epoch Epoch Ended"
    whole, resumed = events[-1].outcomes[0], rest[-1].outcomes[0]
    assert [accuracy for accuracy, _ in resumed.rungs] == [accuracy for accuracy, _ in whole.rungs[:2]]


def test_what_nobody_stops_shows_nothing(context: TrialContext) -> None:
    events = list(start_trial(context.without_rungs(), candidate(recovery="distill"), "t000"))
    assert kinds(events) == " ".join(["Epoch"] * EPOCHS) + " Ended"
    assert context.config == config(2)


def test_what_was_fine_tuned_before_ends_at_its_first_rung(context: TrialContext) -> None:
    memory = WorkerCache()
    run_to_end(context, candidate(recovery="distill"), "t000", memory)
    events: list[Any] = list(start_trial(context, candidate(recovery="distill"), "t001", memory=memory))
    assert kinds(events) == "Rung Ended" and events[-1].outcomes[0].same_as == "t000"


@pytest.mark.parametrize("method", ["learned", "soft-mask", "unstructured"])
def test_methods_whose_models_are_not_there_before_the_end_show_nothing(context: TrialContext, method: Any) -> None:
    asked = candidate(method=method, token_reduction="none", drop_budget=(0.0,) * tiny.DEPTH, recovery="distill")
    events: list[Any] = list(start_trial(context, asked, "t000"))
    assert "Rung" not in kinds(events)
    assert events[-1].outcomes[0].state is State.MEASURED


def test_what_breaks_at_the_first_look_is_an_outcome(context: TrialContext) -> None:
    (ended,) = list(start_trial(context, candidate(method="global", target_ratio=1e-6), "t000"))
    assert isinstance(ended, Ended)
    assert ended.outcomes[0].state is State.INFEASIBLE
