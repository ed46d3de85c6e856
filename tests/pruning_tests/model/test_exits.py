"""Depth exits: the same logits at the depth, better ones than the dense head's before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pruning.errors import PlanError
from pruning.measure.accuracy import predict, top1
from pruning.model.anatomy import blocks_of, classify, embed, examine
from pruning.model.exits import exit_head_of, fit_exits, truncate
from tests.pruning_tests import builders

IMAGES, OTHERS = builders.toy_images(200, seed=21), builders.toy_images(160, seed=22)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_an_exit_at_the_depth_leaves_logits_bit_equal(family: str) -> None:
    model, x = builders.model(family), builders.batch()
    assert torch.equal(truncate(model, 3)(x), model(x))
    (head,) = fit_exits(model, builders.images(4), [3]).values()
    assert torch.equal(truncate(model, 3, head)(x), model(x))


@pytest.mark.parametrize("exit_block", [1, 2])
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_a_truncated_model_runs_its_first_blocks_and_its_tail(family: str, exit_block: int) -> None:
    model, x = builders.model(family), builders.batch()
    between = embed(model, x)
    for block in blocks_of(model)[:exit_block]:
        between = block(between)
    shorter = truncate(model, exit_block)
    assert torch.equal(shorter(x), classify(model, between))
    assert examine(shorter).depth == exit_block


@pytest.mark.parametrize("family", ["vit", "distilled", "registers_average", "average_pooling"])
def test_the_tail_is_every_parameter_after_the_blocks(family: str) -> None:
    model = builders.model(family)
    before = ("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.", "blocks.")
    assert exit_head_of(model).keys() == {name for name in model.state_dict() if not name.startswith(before)}


@pytest.mark.parametrize("family", ["vit", "distilled", "average_pooling"])
def test_exit_heads_beat_the_dense_head_at_an_early_exit(family: str) -> None:
    model = builders.toy_model(family)
    heads = fit_exits(model, IMAGES, [1, 2, 3], learning_rate=1e-2)
    assert sorted(heads) == [1, 2, 3]
    for exit_block in (1, 2):
        plain, fitted = truncate(model, exit_block), truncate(model, exit_block, heads[exit_block])
        losses = [F.cross_entropy(predict(m, OTHERS), OTHERS.labels).item() for m in (plain, fitted)]
        assert losses[1] < 0.95 * losses[0]
        assert top1(predict(fitted, OTHERS), OTHERS.labels) > top1(predict(plain, OTHERS), OTHERS.labels)


def test_full_distillation_copies_the_dense_answers_and_none_the_labels() -> None:
    model = builders.toy_model()
    wrong = OTHERS.take(torch.arange(160))
    wrong.labels.copy_((wrong.labels + 1) % 4)  # labels that the dense model contradicts
    dense = predict(model, wrong).argmax(dim=1)
    for distillation, wanted in ((1.0, dense), (0.0, wrong.labels)):
        head = fit_exits(model, wrong, [2], epochs=60, learning_rate=1e-2, distillation=distillation)[2]
        assert top1(predict(truncate(model, 2, head), wrong), wanted) > 0.7


@pytest.mark.parametrize("family", ["vit", "distilled", "average_pooling"])
def test_fitting_exits_leaves_the_model_and_all_but_the_tail_as_they_were(family: str) -> None:
    model = builders.toy_model(family)
    before, flags = builders.state(model), [parameter.requires_grad for parameter in model.parameters()]
    head = fit_exits(model, IMAGES, [2], epochs=2)[2]
    assert builders.same_state(model, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    shorter, plain = truncate(model, 2, head).state_dict(), truncate(model, 2).state_dict()
    other = {name for name in plain if not torch.equal(shorter[name], plain[name])}
    assert other == set(head) == set(exit_head_of(model))


def test_the_same_seed_gives_the_same_heads_and_one_exit_does_not_change_another() -> None:
    model = builders.toy_model()
    settings: dict[str, Any] = {"epochs": 3, "seed": 5}
    both, alone = fit_exits(model, IMAGES, [1, 2], **settings), fit_exits(model, IMAGES, [2, 2], **settings)
    assert sorted(both) == [1, 2] and sorted(alone) == [2]
    assert all(torch.equal(both[2][name], alone[2][name]) for name in both[2])
    other = fit_exits(model, IMAGES, [2], epochs=3, seed=6)
    assert any(not torch.equal(other[2][name], alone[2][name]) for name in other[2])


def test_a_truncated_model_shares_no_memory() -> None:
    model = builders.model()
    before = builders.state(model)
    with torch.no_grad():
        for parameter in truncate(model, 2, exit_head_of(model)).parameters():
            parameter.fill_(5)
    for tensor in exit_head_of(model).values():
        tensor.fill_(5)
    assert builders.same_state(model, before)


@pytest.mark.parametrize("exit_block", [-1, 0, 4])
def test_an_exit_outside_the_model_is_refused(exit_block: int) -> None:
    message = f"exit after block {exit_block} of a model with 3 blocks; give 1 to 3"
    with pytest.raises(PlanError, match=message):
        truncate(builders.model(), exit_block)
    with pytest.raises(PlanError, match=message):
        fit_exits(builders.model(), builders.images(4), [1, exit_block])


def test_no_exits_are_no_heads() -> None:
    assert fit_exits(builders.model(), builders.images(4), []) == {}
