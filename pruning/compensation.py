"""Closed-form repair: what the dropped inputs of a linear layer gave is regressed on the inputs that stay.

For y = W x + b with kept inputs K and dropped P, mean mu and covariance C of x over calibration tokens,
    W' = W_K + W_P A,   b' = b + W_P (mu_P - A mu_K),   A = C_PK (C_KK + lambda I)^-1
is the least-squares repair (CORP, arXiv 2602.05243): no gradient, milliseconds. It serves the MLP's second
layer (inputs: hidden units) and the attention's projection (inputs: value channels).

n inputs, S samples (tokens of all images).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.anatomy import Anatomy, blocks_of, embed, examine, parts_of, with_blocks
from pruning.data import Images
from pruning.plan import BlockPlan, Plan
from pruning.precision import Precision, autocast
from pruning.surgery import check_plan, keep_all_block, slim_block, value_channels

RIDGE = 1e-3
"""lambda as a share of the inputs' mean variance."""


class Moments:
    """Mean and covariance of samples that come in batches.

    Products are taken in float32 around the first batch's mean and summed in float64: as exact as needed, and fast.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Tensor) -> None:
        """x: (..., n)."""
        x = x.detach().flatten(0, -2).float()
        if self.count == 0:
            self._origin = x.mean(dim=0)
            self._sum = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            self._products = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        x = x - self._origin
        self.count += len(x)
        self._sum += x.sum(dim=0)
        self._products += x.T @ x

    @property
    def mean(self) -> Tensor:
        """(n,), float64."""
        return self._origin.double() + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(n, n), float64, over `count` samples (not count - 1)."""
        shift = self._sum / self.count
        return self._products / self.count - shift[:, None] * shift

    def regress(self, kept: Tensor, dropped: Tensor, *, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
        """A (|P|, |K|) and c (|P|,) of the best x_P ~ A x_K + c in the ridge sense; c is 0 without an intercept."""
        second = self.covariance if intercept else self.covariance + self.mean[:, None] * self.mean
        inner = second[kept][:, kept]
        strength = (ridge * second.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
        inner = inner + strength * torch.eye(len(kept), dtype=inner.dtype, device=inner.device)
        slope = torch.linalg.solve(inner, second[kept][:, dropped]).T
        if not intercept:
            return slope, torch.zeros(len(dropped), dtype=slope.dtype, device=slope.device)
        return slope, self.mean[dropped] - slope @ self.mean[kept]


@dataclass(frozen=True)
class BlockMoments:
    """Of the inputs of a block's two output layers."""

    values: Moments
    """n = heads * head width: inputs of the attention's projection."""
    hidden: Moments
    """Inputs of the MLP's second layer."""


@torch.no_grad()
def block_moments(
    block: nn.Module, x: Tensor, *, batch_size: int = 64, precision: Precision = "float32"
) -> BlockMoments:
    """The moments in a block at its dense widths, run on x: (B, N, C)."""
    moments = BlockMoments(Moments(), Moments())
    parts = parts_of(block)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, into=into: into.add(args[0]))
        for layer, into in ((parts.proj, moments.values), (parts.fc2, moments.hidden))
    ]
    try:
        with autocast(x.device, precision):
            for batch in x.split(batch_size):
                block(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def repair_block(
    slim: nn.Module, dense: nn.Module, plan: BlockPlan, anatomy: Anatomy, moments: BlockMoments, ridge: float = RIDGE
) -> None:
    """Rewrites the output layers of a slim block, in place, to give what the dense ones gave, as well as they can."""
    slim_parts, dense_parts = parts_of(slim), parts_of(dense)
    _repair_linear(slim_parts.proj, dense_parts.proj, value_channels(plan, anatomy), moments.values, ridge)
    _repair_linear(slim_parts.fc2, dense_parts.fc2, torch.tensor(plan.keep_hidden), moments.hidden, ridge)


@torch.no_grad()
def _repair_linear(slim: nn.Linear, dense: nn.Linear, kept: Tensor, moments: Moments, ridge: float) -> None:
    kept = kept.to(dense.weight.device)
    is_dropped = torch.ones(dense.in_features, dtype=torch.bool, device=kept.device)
    is_dropped[kept] = False
    dropped = is_dropped.nonzero().flatten()
    if len(dropped) == 0:
        return
    slope, intercept = moments.regress(kept, dropped, ridge=ridge, intercept=dense.bias is not None)
    lost = dense.weight[:, dropped].double()
    slim.weight.copy_(dense.weight[:, kept].double() + lost @ slope)
    if dense.bias is not None:
        slim.bias.copy_(dense.bias.double() + lost @ intercept)


@torch.no_grad()
def prune_and_repair(
    model: nn.Module,
    plan: Plan,
    images: Images,
    *,
    ridge: float = RIDGE,
    batch_size: int = 64,
    precision: Precision = "float32",
) -> nn.Module:
    """`apply_plan` with every block repaired on these images, from the first block to the last.

    The cascade does the same on its way, so plan and calibration images give its model again.

    Args:
        model: a dense model of `plan.exit_block` blocks.

    Raises:
        PlanError: as `apply_plan`.
    """
    anatomy = examine(model)
    check_plan(plan, anatomy)
    device = next(model.parameters()).device
    with autocast(device, precision):
        x = torch.cat([embed(model, batch).float() for batch, _ in images.batches(batch_size, device)])
    built: list[nn.Module] = []
    num_tokens = anatomy.num_patches
    for dense, block_plan in zip(blocks_of(model), plan.blocks, strict=True):
        slim = slim_block(dense, block_plan, anatomy, num_tokens, plan.cutoff_token)
        whole = keep_all_block(anatomy, block_plan.num_tokens)
        if block_plan != whole:
            wide = slim_block(dense, whole, anatomy, num_tokens, plan.cutoff_token)
            moments = block_moments(wide, x, batch_size=batch_size, precision=precision)
            repair_block(slim, dense, block_plan, anatomy, moments, ridge)
        with autocast(device, precision):
            x = torch.cat([slim(batch).float() for batch in x.split(batch_size)])
        num_tokens = block_plan.num_tokens
        built.append(slim)
    return with_blocks(model, built)
