"""The jobs of a sweep on one worker: the look, steps, rebuilds and timings, and how workers learn of each other's."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from pruning.errors import ModelError, VitfrontError
from pruning.measure.cost import count_params
from search.outcome import Measurement
from search.trial.context import ContextPart
from search.trial.jobs import (
    DENSE,
    LOOK,
    POLL_S,
    Dense,
    Job,
    Looked,
    NeedFailedError,
    Rebuild,
    Timed,
    Workplace,
    run_job,
)  # fmt: skip
from search.trial.measure import rebuild
from search.trial.prepare import Step, first_context, measure_dense, run_step, steps_before, steps_of
from search.trial.reuse import plan_key, shape_key
from tests.search_tests import tiny
from tests.search_tests.builders import same
from tests.search_tests.cluster.stores import DictStore
from tests.search_tests.trial.trials import accuracy

SPACE = {"method": ["cascade", "global"], "exit_block": [2, 3], "token_reduction": "lfe", "round_to": [8, "auto"]}
TRAINING = {"model__training": {"epochs": 2}}
LOOK_JOB = Job(id=LOOK, kind="look")


class Products(dict[str, Any]):
    """Products that all workers share; remembers in which order they came and how often each was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.gets: list[str] = []

    def __setitem__(self, key: str, product: Any) -> None:
        self.order.append(key)
        super().__setitem__(key, product)

    def get(self, key: str) -> Any:  # type: ignore[override]
        self.gets.append(key)
        return super().get(key)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("it is not called")


def workplace(products: Products | None = None, *, trained: bool = True, **changes: Any) -> Workplace:
    """A worker's place; `changes` are of its recipe, its inputs and itself."""
    own = {name: changes.pop(name) for name in ("timer", "sleep") if name in changes}
    of_inputs = {name: changes.pop(name) for name in ("model", "splits") if name in changes}
    config = tiny.config(space=SPACE, **changes)
    settings: dict[str, Any] = {"timer": tiny.timer, "time_widths": tiny.time_widths, "sleep": never} | own
    return Workplace(
        config=config, inputs=tiny.inputs(config, trained=trained, **of_inputs),
        products=Products() if products is None else products, jobs=DictStore(), **settings,
    )  # fmt: skip


def do(place: Workplace, job: Job) -> Any:
    """Does a job as a worker does."""
    place.products[job.id] = run_job(job, place)
    return place.products.get(job.id)


def step_job(place: Workplace, step: Step) -> Job:
    before = steps_before(step, place.inputs.space)
    return Job(id=step.id, kind="step", needs=(DENSE, *(one.id for one in before)), subject=step)


def same_weights(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The look


def test_the_look_measures_the_dense_model() -> None:
    place = workplace()
    looked = do(place, LOOK_JOB)
    assert isinstance(looked, Looked)
    assert looked.dense is not None
    assert looked.first.top1 == looked.dense.top1 == accuracy(place.inputs.model, place.inputs.splits.val)
    assert (looked.dense.speedup, looked.first.fault, looked.weights) == (1.0, None, None)
    assert looked.device
    context = place.context()
    for key in (shape_key(context.anatomy, context.dense_plan), plan_key(context.anatomy, context.dense_plan)):
        assert place.measured_cache.get(key) == looked.dense  # no trial measures it again


def test_others_have_the_dense_model_before_it_is_looked_at() -> None:
    products = Products()
    place = workplace(products)
    seen: list[list[str]] = []
    place.inputs.model.register_forward_pre_hook(lambda *_: seen.append(list(products.order)))
    do(place, LOOK_JOB)
    assert seen and all(order == [DENSE] for order in seen)
    assert products.order == [DENSE, LOOK]
    assert products[DENSE] == Dense(precision="float32", weights=None)


def test_a_model_that_is_trained_by_the_look_reaches_the_driver_and_the_other_workers() -> None:
    products = Products()
    first, other = (workplace(products, trained=False, **TRAINING) for _ in range(2))
    looked = do(first, LOOK_JOB)
    trained = first.inputs.model.state_dict()
    assert not torch.equal(trained["head.weight"], tiny.model().head.weight)
    assert looked.weights is not None
    assert same_weights(looked.weights, trained)
    assert same_weights(other.context().model.state_dict(), trained)
    assert not other.context().model.training
    batch = other.inputs.splits.val.normalized(slice(None))
    assert torch.equal(other.context().model(batch), first.context().model(batch))
    step = Step(kind="sensitivity", subject=3)
    assert same(do(other, step_job(other, step)), do(first, step_job(first, step)))


def test_weights_that_were_published_do_not_change_with_the_model() -> None:
    products = Products()
    first = workplace(products, trained=False, **TRAINING)
    do(first, LOOK_JOB)
    before = {name: tensor.clone() for name, tensor in products[DENSE].weights.items()}
    with torch.no_grad():
        for parameter in first.inputs.model.parameters():
            parameter.add_(1.0)
    assert same_weights(products[DENSE].weights, before)


def test_a_wrong_model_is_told_with_its_accuracy_and_nothing_of_it_is_timed() -> None:
    place = workplace(timer=never, model__expected_top1=1.0)
    looked = do(place, LOOK_JOB)
    assert isinstance(looked.first.fault, ModelError)
    assert "below model.expected_top1" in str(looked.first.fault)
    assert looked.dense is None
    assert looked.first.top1 == accuracy(place.inputs.model, place.inputs.splits.val)
    assert place.measured_cache == {}


def broken_model() -> nn.Module:
    model = tiny.model()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    return model


def test_nobody_waits_for_a_model_whose_answers_are_no_numbers() -> None:
    products = Products()
    place, other = workplace(products, model=broken_model()), workplace(products)
    with pytest.raises(VitfrontError, match="the model's logits are not finite") as raised:
        run_job(LOOK_JOB, place)
    assert products[DENSE] is raised.value
    with pytest.raises(NeedFailedError, match="the model's logits are not finite"):
        other.context()


def test_nobody_waits_for_a_model_whose_training_diverges() -> None:
    products = Products()
    training = {"model__training": {"epochs": 2, "learning_rate": 1e38}}
    place, other = (workplace(products, trained=False, **training) for _ in range(2))
    with pytest.raises(VitfrontError, match="training diverged"):
        run_job(LOOK_JOB, place)
    with pytest.raises(NeedFailedError, match="training diverged"):
        other.context([DENSE])


# Steps


def test_workers_share_the_steps_and_learn_from_each_other() -> None:
    products = Products()
    one, other = workplace(products), workplace(products)
    do(one, LOOK_JOB)
    steps = steps_of(one.inputs.space)
    alone = one.context()
    for number, step in enumerate(steps):
        place = (one, other)[number % 2]
        product = do(place, step_job(place, step))
        expected = run_step(alone, step, one.inputs.space, time_widths=tiny.time_widths)
        assert same(product, expected), step.id
        alone = alone.extended(expected)
    names = [step.id for step in steps]
    for place in (one, other):
        assert same(place.context(names).known, alone.known)


def test_a_job_waits_for_what_it_needs() -> None:
    products, waits = Products(), list[float]()
    place = workplace(products)
    do(place, LOOK_JOB)
    exits = do(place, step_job(place, Step(kind="exits")))
    del products["exits"]

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            products["exits"] = exits

    waiting = workplace(products, sleep=sleep)
    product = do(waiting, step_job(waiting, Step(kind="sensitivity", subject=2)))
    assert waits == [POLL_S] * 3
    assert list(product.sensitivities) == [2]


def test_a_worker_fetches_each_part_once() -> None:
    products = Products()
    place = workplace(products)
    do(place, LOOK_JOB)
    do(place, step_job(place, Step(kind="exits")))
    other = workplace(products)
    products.gets.clear()
    for _ in range(3):
        assert sorted(other.context([LOOK, "exits"]).exit_heads) == [2, 3]
    assert sorted(products.gets) == sorted([DENSE, LOOK, "exits"])


def test_a_context_that_was_given_out_does_not_change_with_later_parts() -> None:
    place = workplace()
    do(place, LOOK_JOB)
    before = place.context()
    do(place, step_job(place, Step(kind="exits")))
    assert sorted(place.context(["exits"]).exit_heads) == [2, 3]
    assert sorted(before.exit_heads) == [3]


def test_a_need_that_failed_is_told_in_its_own_words() -> None:
    place = workplace()
    do(place, LOOK_JOB)
    place.products["exits"] = ModelError("the features are not finite")
    with pytest.raises(NeedFailedError, match=r"^the features are not finite$"):
        place.context(["exits"])
    assert sorted(place.context().exit_heads) == [3]  # what needs it not goes on


def test_products_of_steps_lie_on_the_cpu_and_hold_no_context() -> None:
    place = workplace()
    do(place, LOOK_JOB)
    for step in steps_of(place.inputs.space):
        part = do(place, step_job(place, step))
        assert isinstance(part, ContextPart)
        filled = [f.name for f in fields(part) if getattr(part, f.name)]
        kind = {
            "exits": "exit_heads", "sensitivity": "sensitivities", "widths": "allowed_widths",
            "curves": "channel_curves",
        }  # fmt: skip
        assert filled == [kind.get(step.kind, "profiles")]


# The front, once more


@pytest.fixture(scope="module")
def ready() -> Workplace:
    """A worker that knows what building a model takes."""
    place = workplace()
    do(place, LOOK_JOB)
    do(place, step_job(place, Step(kind="sensitivity", subject=3)))
    return place


def dense_of(place: Workplace) -> Measurement:
    dense = place.products.get(LOOK).dense
    assert isinstance(dense, Measurement)
    return dense


@pytest.mark.parametrize("on_all_images", [True, False])
def test_a_model_is_built_once_more(ready: Workplace, on_all_images: bool) -> None:
    context, dense = ready.context(), dense_of(ready)
    blocks = [replace(block, keep_hidden=block.keep_hidden[:24]) for block in context.dense_plan.blocks]
    plan = replace(context.dense_plan, blocks=tuple(blocks))
    order = Rebuild(plan=plan, measured=dense, on_all_images=on_all_images)
    needs = (LOOK, "sensitivity-3")
    measurement, model = do(ready, Job(id="rebuild-t000", kind="rebuild", needs=needs, subject=order))
    expected, other = rebuild(ready.context(needs), plan, dense, on_all_images=on_all_images)
    assert measurement == expected
    assert same_weights(model.state_dict(), other.state_dict())


def test_the_dense_model_that_is_built_once_more_is_another_than_the_context_has(ready: Workplace) -> None:
    context = ready.context()
    order = Rebuild(plan=context.dense_plan, measured=dense_of(ready))
    measurement, model = do(ready, Job(id="rebuild-dense", kind="rebuild", needs=(LOOK,), subject=order))
    assert model is not context.model
    assert same_weights(model.state_dict(), context.model.state_dict())
    assert replace(measurement, top1_test=None) == dense_of(ready)
    own = {id(parameter) for parameter in context.model.parameters()}
    assert not own & {id(parameter) for parameter in model.parameters()}  # it is moved to the CPU


def test_shapes_are_timed_and_the_conditions_told(ready: Workplace) -> None:
    plan = ready.context().dense_plan
    cut = replace(plan, blocks=tuple(replace(block, keep_hidden=block.keep_hidden[:8]) for block in plan.blocks))
    timed = do(ready, Job(id="timing", kind="time", needs=(LOOK,), subject=([cut, plan, cut], 27)))
    assert isinstance(timed, Timed)
    assert timed.dense.num_rounds == 27
    first, whole, again = timed.timings
    assert first == again
    assert first.speedup > whole.speedup == timed.dense.speedup == 1.0
    conditions = dict(timed.conditions)
    assert conditions.pop("device")
    threads = torch.get_num_threads()
    assert conditions == {"precision": "float32", "threads": threads, "batch_size": 8, "torch": torch.__version__}


def test_the_dense_measurement_is_that_of_a_preparation_in_one_process(ready: Workplace) -> None:
    looked = ready.products.get(LOOK)
    context = first_context(ready.config, ready.inputs.model, ready.inputs.splits, "float32", tiny.timer)
    assert measure_dense(context, looked.first) == looked.dense
    assert looked.dense.params == count_params(ready.inputs.model)
