"""Gates of 0 and 1 against models that are pruned by the same plan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pruning.model.anatomy import blocks_of, classify, embed, examine
from pruning.model.gates import BlockGates, FixedGates, GatedBlock, gates_of_plan, plan_of_gates
from pruning.model.surgery import apply_plan, as_slim
from tests.pruning_tests.model.test_families import batch_of, model_of, plan_of


def logits_with_gates(model: nn.Module, gates: list[BlockGates], pixels: Tensor) -> Tensor:
    anatomies = examine(model).blocks
    x = embed(model, pixels)
    for block, anatomy, block_gates in zip(blocks_of(model), anatomies, gates, strict=True):
        x = GatedBlock(as_slim(block, anatomy, is_last=False), FixedGates(block_gates))(x)
    return classify(model, x)


@pytest.mark.parametrize("family", ["vit", "qk_norm", "deit3", "swin"])
def test_gates_of_0_and_1_give_the_logits_of_the_pruned_model(family: str) -> None:
    model, x = model_of(family), batch_of(family, 3)
    anatomy = examine(model)
    plan = plan_of(anatomy)
    gates = [gates_of_plan(kept, block) for kept, block in zip(plan.blocks, anatomy.blocks, strict=True)]
    plans = [plan_of_gates(block_gates, block) for block_gates, block in zip(gates, anatomy.blocks, strict=True)]
    assert plans == list(plan.blocks)
    torch.testing.assert_close(logits_with_gates(model, gates, x), apply_plan(model, plan)(x), rtol=1e-4, atol=1e-4)
