"""Probing against models that are put together and run from outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.measure.accuracy import predict
from pruning.methods.prefix_cache import Threshold
from pruning.methods.probing import Probe, Prober, ProbingSettings, TopDownProber
from pruning.model.anatomy import blocks_of, embed, examine, with_blocks
from pruning.model.surgery import keep_all_block
from pruning.plan import BlockPlan
from pruning.repair.compensation import RepairedBlock
from tests.pruning_tests import builders

PROBE, CALIBRATION = builders.toy_images(90, seed=11), builders.toy_images(24, seed=12)


def prober(kind: type[Prober] = Prober, **settings: Any) -> tuple[nn.Module, Prober]:
    """A trained toy, and its prober before the first block."""
    model = builders.toy_model()
    common: dict[str, Any] = {"batch_size": 16, "token_reduction": "none"}
    return model, kind(model, examine(model), PROBE, CALIBRATION, ProbingSettings(**common | settings), None)


def narrow(model: nn.Module, index: int, num_hidden: int) -> BlockPlan:
    """A plan of a block with some hidden units alone."""
    plan = keep_all_block(examine(model).blocks[index])
    return BlockPlan(**{**vars(plan), "keep_hidden": tuple(range(num_hidden))})


def num_correct(model: nn.Module, blocks: list[nn.Module], images: Images = PROBE) -> int:
    return int((predict(with_blocks(model, blocks), images).argmax(dim=1) == images.labels).sum())


def entering(model: nn.Module, images: Images, blocks: list[nn.Module]) -> Tensor:
    with torch.no_grad():
        x = embed(model, images.normalized(slice(None)))
        for block in blocks:
            x = block(x)
    return x


def test_before_the_first_block_the_correct_images_are_those_of_the_dense_model() -> None:
    model, probing = prober()
    assert probing.num_correct == num_correct(model, list(blocks_of(model)))
    assert sorted(probing.order.tolist()) == list(range(90))
    assert torch.equal(probing.labels, PROBE.labels[probing.order])


@pytest.mark.parametrize("num_hidden", [1, 10, 40, 90])
def test_a_probe_of_all_images_counts_those_that_come_out_right(num_hidden: int) -> None:
    model, probing = prober()
    repaired = probing.repair(narrow(model, 0, num_hidden))
    probe = Probe(repaired, Threshold(90), probing.num_correct)
    assert probing.is_within(probe, surely=True)
    assert probe.num_seen == 90
    assert probe.num_right == num_correct(model, [repaired.block, *blocks_of(model)[1:]])
    probing.accept(probe)
    assert probing.num_correct == probe.num_right


@pytest.mark.parametrize("num_hidden", [1, 10, 40, 90])
def test_a_block_is_within_exactly_those_budgets_that_its_loss_does_not_pass(num_hidden: int) -> None:
    model, probing = prober()
    repaired, before = probing.repair(narrow(model, 0, num_hidden)), probing.num_correct
    loss = before - num_correct(model, [repaired.block, *blocks_of(model)[1:]])
    for budget in (loss - 20, loss - 1, loss, loss + 1, loss + 20):
        probe = Probe(repaired, Threshold(budget), before)
        assert probing.is_within(probe, surely=True) == (budget >= loss)
        if budget == loss - 20:
            assert probe.num_seen < 90  # refused before all images were run


def test_a_block_that_changes_nothing_is_accepted_after_one_batch_unless_it_has_to_be_sure() -> None:
    model, probing = prober()
    probe = Probe(RepairedBlock(block=blocks_of(model)[0]), Threshold(0), probing.num_correct)
    assert probing.is_within(probe, surely=False) and probe.num_seen == 16
    images_run = probing.block_images
    assert probing.is_within(probe, surely=True) and probe.num_seen == 90
    assert probing.block_images - images_run == 3 * (90 - 16)  # goes on where it stopped, through three blocks


def test_accepted_images_are_ordered_by_the_size_of_their_margins() -> None:
    model, probing = prober()
    probe = Probe(probing.repair(narrow(model, 0, 10)), Threshold(90), probing.num_correct)
    probing.is_within(probe, surely=True)
    probing.accept(probe)
    logits = predict(with_blocks(model, [probe.repaired.block, *blocks_of(model)[1:]]), PROBE)[probing.order]
    right = logits.gather(1, probing.labels[:, None])[:, 0]
    margins = right - logits.scatter(1, probing.labels[:, None], -torch.inf).amax(dim=1)
    assert (margins.abs().diff() >= -1e-4).all()
    assert torch.equal(probing.is_right, margins > 0)


def test_an_accepted_block_is_not_run_again_to_go_on() -> None:
    model, probing = prober()
    probe = Probe(probing.repair(narrow(model, 0, 10)), Threshold(90), probing.num_correct)
    probing.is_within(probe, surely=True)
    probing.accept(probe)
    images_run = probing.block_images
    probing.advance(probe.repaired.block)
    assert probing.block_images - images_run == 2 * len(CALIBRATION)  # as they are, and low-pass filtered
    expected = entering(model, PROBE, [probe.repaired.block])[probing.order]
    torch.testing.assert_close(probing.x_probe, expected, rtol=1e-4, atol=1e-4)


def test_blocks_that_run_on_fewer_tokens_count_as_much_less() -> None:
    model, probing = prober(token_reduction="lfe")
    plan = keep_all_block(examine(model).blocks[0], 4)
    probe = Probe(probing.repair(plan), Threshold(90), probing.num_correct)
    images_run = probing.block_images
    assert probing.is_within(probe, surely=True)
    # The block takes all 16 patches and the class token; the two behind it take 4 and the class token.
    assert probing.block_images - images_run == pytest.approx(90 * (1 + 2 * 5 / 17))


def test_without_being_sure_a_block_is_refused_once_it_costs_more_than_chance_explains() -> None:
    model, probing = prober()
    empty = probing.repair(narrow(model, 0, 1))
    empty.block.mlp.fc2.weight.normal_(std=30.0)  # it answers anything
    probe = Probe(empty, Threshold(0), probing.num_correct)
    assert not probing.is_within(probe, surely=False)
    assert probe.num_seen < 90 and probe.num_changed > 0


def test_bottom_up_a_block_sees_what_the_finished_ones_pass_on_and_dense_ones_come_behind_it() -> None:
    model, probing = prober()
    dense, built = list(blocks_of(model)), list[nn.Module]()
    for index in range(3):
        assert probing.index == index and probing.later == dense[index + 1 :]
        torch.testing.assert_close(probing.stream.x, entering(model, CALIBRATION, built), rtol=1e-4, atol=1e-4)
        expected = entering(model, PROBE, built)[probing.order]
        torch.testing.assert_close(probing.x_probe, expected, rtol=1e-4, atol=1e-4)
        built.append(probing.repair(narrow(model, index, 30)).block)
        probing.advance(built[-1])


def test_top_down_a_block_sees_dense_ones_before_it_and_the_finished_ones_behind_it() -> None:
    model, probing = prober(TopDownProber, criterion="taylor")
    dense, built = list(blocks_of(model)), list[nn.Module]()
    for index in (2, 1, 0):
        assert probing.index == index and probing.later == built
        torch.testing.assert_close(probing.stream.x, entering(model, CALIBRATION, dense[:index]), rtol=1e-4, atol=1e-4)
        probe = Probe(probing.repair(narrow(model, index, 30)), Threshold(90), probing.num_correct)
        probing.is_within(probe, surely=True)
        probing.accept(probe)
        assert probing.num_correct == num_correct(model, [*dense[:index], probe.repaired.block, *built])
        built.insert(0, probe.repaired.block)
        probing.advance(probe.repaired.block)


def test_a_copy_goes_on_without_changing_the_original() -> None:
    model, probing = prober(criterion="lfs")
    other = probing.copy()
    before = probing.x_probe, probing.x_low, probing.stream.x, probing.block_images, probing.index
    other.advance(other.repair(narrow(model, 0, 30)).block)
    after = probing.x_probe, probing.x_low, probing.stream.x, probing.block_images, probing.index
    assert all(one is same or one == same for one, same in zip(before, after, strict=True))
    assert other.index == 1 and probing.stream.index == 0
    assert probing.num_bytes > sum(x.numel() * x.element_size() for x in (probing.x_probe, probing.x_low))
