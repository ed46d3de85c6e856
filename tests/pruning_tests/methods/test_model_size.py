"""Sizes against those of models that are built."""

from __future__ import annotations

import pytest
import torch

from pruning.measure.cost import count_macs, count_params
from pruning.methods.model_size import BudgetUnit, ModelSize
from pruning.model.anatomy import examine
from pruning.model.surgery import apply_plan, keep_all_plan
from tests.pruning_tests.model.test_families import model_of, plan_of


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("family", ["vit", "qk_norm", "swin"])
def test_a_size_is_that_of_the_model_that_is_built(family: str, unit: BudgetUnit) -> None:
    model = model_of(family)
    anatomy = examine(model)
    plan, size = plan_of(anatomy), ModelSize(model, anatomy, unit)
    if unit == "macs":
        expected, dense = count_macs(anatomy, plan), count_macs(anatomy, keep_all_plan(anatomy))
    else:
        expected, dense = count_params(apply_plan(model, plan)), count_params(model)
    assert (size.of(plan.blocks), size.dense) == (expected, dense)
    # Ratios of whole numbers of units count as these units do.
    ratios = [
        {
            "heads": block.shape.num_heads / dense_block.num_heads,
            "qk": block.shape.qk_width / dense_block.head_dim,
            "v": block.shape.v_width / dense_block.head_dim,
            "hidden": block.shape.num_hidden / dense_block.num_hidden,
        }
        for block, dense_block in zip(plan.blocks, anatomy.blocks, strict=True)
    ]
    share = size.share([{kind: torch.tensor(ratio) for kind, ratio in by_kind.items()} for by_kind in ratios])
    assert share.item() == pytest.approx(expected / dense, rel=1e-5)
