"""Soft masks (VTP, Zhu et al. 2021; network slimming, Liu et al. 2017): units that learn small gates go.

Every query/key pair, value channel and hidden unit is multiplied by a gate that starts at 1 and is trained with the
weights, under an L1 penalty on all gates. After the last epoch the units with the smallest |gate| go, by one threshold
for the whole model, and the gates of the units that stay become part of the weights.

The penalty is the mean |gate|, each weighted by its unit's multiply-adds (VTP: their plain sum). So a large unit needs
to be worth more to keep the same gate, one threshold is right for all, and the weight of the penalty means the same for
models of any size.

C model width, H heads, D head width, h hidden units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.data import Images
from pruning.errors import TargetError
from pruning.losses import distillation_loss
from pruning.measure.cost import channel_macs, count_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.bisection import bisect
from pruning.methods.ranking import top_indices
from pruning.methods.width import LearnedModel
from pruning.model.anatomy import BlockAnatomy, blocks_of, classify, embed, examine, parts_of
from pruning.model.gates import BlockGates, GatedBlock, Gates
from pruning.model.surgery import apply_plan, as_slim, keep_all_plan
from pruning.plan import BlockPlan, Plan
from pruning.precision import Precision, autocast
from pruning.scores.channel import check_finite
from pruning.training import Loop, LoopSettings

HIGHEST = 1e9
"""A threshold far above any gate: it leaves the fewest units of every kind that are allowed."""


@dataclass(frozen=True, kw_only=True)
class SoftMaskSettings(LoopSettings):
    """Settings of a training of gates and weights."""

    target_ratio: float
    """Share of the dense model's multiply-adds to keep, in (0, 1]."""
    epochs: int = 5
    gate_rate: float = 2e-2
    """Learning rate of the gates, on the schedule of the weights' rate, so that they come to rest."""
    l1: float = 1.0
    """Weight of the penalty, which adds so much to the loss while all gates are 1."""
    distillation: float = 0.5
    """Weight of the dense model's answers against the labels, in [0, 1]."""


class SoftGates(Gates):
    """The gates of one block, which start at 1."""

    def __init__(self, anatomy: BlockAnatomy, device: torch.device) -> None:
        super().__init__()
        channels = anatomy.num_heads, anatomy.head_dim
        # With qk-norm all pairs stay, so their gates are not trained.
        self.qk = nn.Parameter(torch.ones(channels, device=device), requires_grad=not anatomy.has_qk_norm)
        self.v = nn.Parameter(torch.ones(channels, device=device))
        self.hidden = nn.Parameter(torch.ones(anatomy.num_hidden, device=device))
        tokens = anatomy.num_prefix_tokens + anatomy.num_patches
        channel = channel_macs(anatomy, tokens)
        self.weights = {"qk": channel, "v": channel, "hidden": 2 * tokens * anatomy.width}
        """Multiply-adds of one unit, by kind."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The gates that are trained, by kind."""
        return {name: gates for name, gates in self.named_parameters() if gates.requires_grad}

    def forward(self) -> BlockGates:
        return BlockGates(qk=self.qk, v=self.v, hidden=self.hidden)


class SoftMaskTraining:
    """A training of gates and weights, epoch by epoch; its state can be saved and loaded in between."""

    def __init__(
        self, model: nn.Module, images: Images, settings: SoftMaskSettings, *,
        allowed_widths: Sequence[AllowedWidths] | None = None, precision: Precision = "float32",
    ) -> None:  # fmt: skip
        """
        Args:
            model: dense, in eval mode, on the device to work on; it is left as it was.
            allowed_widths: of each block, the widths that it may have; by default any.

        Raises:
            TargetError: no width is as small as the target (says which is the smallest).
        """
        self.settings, self.precision = settings, precision
        self.teacher, self.anatomy = model, examine(model)
        self.allowed_widths = list(allowed_widths or [multiples(block, 1) for block in self.anatomy.blocks])
        self.device = next(model.parameters()).device
        self.trained = copy.deepcopy(model).requires_grad_(True)
        self.gates = [SoftGates(block, self.device) for block in self.anatomy.blocks]
        self.dense_macs = count_macs(self.anatomy, keep_all_plan(self.anatomy))
        self._check_target()
        slim = [
            as_slim(block, anatomy, is_last=False)
            for block, anatomy in zip(blocks_of(self.trained), self.anatomy.blocks, strict=True)
        ]
        self.blocks = [GatedBlock(*pair) for pair in zip(slim, self.gates, strict=True)]
        self.loop = Loop(images, self._optimizer(), settings, self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        gates = [kind for block in self.gates for kind in block.trained().values()]
        return torch.optim.AdamW([
            *self.settings.groups(self.trained.parameters()),
            {"params": gates, "lr": self.settings.gate_rate, "weight_decay": 0.0},
        ])  # fmt: skip

    def _check_target(self) -> None:
        least = count_macs(self.anatomy, self._plan(HIGHEST, HIGHEST)) / self.dense_macs
        if not least <= self.settings.target_ratio <= 1:
            raise TargetError(
                f"target {self.settings.target_ratio:g} of the macs cannot be reached; "
                f"give {math.ceil(1000 * least) / 1000:g} at least, and 1 at most"
            )

    @property
    def is_done(self) -> bool:
        """True once all epochs are trained."""
        return self.loop.is_done

    def run_epoch(self) -> dict[str, float]:
        """Trains one epoch; returns its mean loss, without the penalty, and the mean |gate| at its end.

        Raises:
            VitfrontError: the loss is not finite (names step and learning rate).
        """
        loss = self.loop.run_epoch(self._loss, penalty=self._penalty)
        gates = torch.cat([kind.detach().flatten() for block in self.gates for kind in block.trained().values()])
        return {"loss": loss, "gates": gates.abs().mean().item()}

    def _penalty(self) -> Tensor:
        return self.settings.l1 * weighted_mean(self.gates)

    def _loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.device, self.precision):
            teacher_logits = self.teacher(pixels).float()
        with autocast(self.device, self.precision):
            x = embed(self.trained, pixels)
            for block in self.blocks:
                x = block(x)
            logits = classify(self.trained, x).float()
        return distillation_loss(logits, labels, teacher_logits, teacher_weight=self.settings.distillation)

    def _plan(self, channel_threshold: float, hidden_threshold: float) -> Plan:
        """The plan of the units above the thresholds."""
        return Plan(
            blocks=tuple(
                _units_above(gates(), anatomy, allowed, channel_threshold, hidden_threshold)
                for gates, anatomy, allowed in zip(self.gates, self.anatomy.blocks, self.allowed_widths, strict=True)
            ),
            token_reduction="none",
        )

    def _plan_at_target(self) -> Plan:
        """The plan of the lowest threshold that fits the target.

        A channel goes with those of the other heads, so one step may be a large one; what it leaves of the target is
        filled with hidden units, by a lower threshold of their own.
        """
        threshold = _lowest(lambda both: self._fits(self._plan(both, both)))
        return self._plan(threshold, _lowest(lambda hidden: self._fits(self._plan(threshold, hidden))))

    def _fits(self, plan: Plan) -> bool:
        return count_macs(self.anatomy, plan) <= self.settings.target_ratio * self.dense_macs

    def finish(self) -> LearnedModel:
        """The smaller model; after the last epoch.

        Raises:
            VitfrontError: a gate is not finite.
        """
        assert self.is_done, "the training is not at its end"
        for index, gates in enumerate(self.gates):
            check_finite(index, dict(gates.named_parameters()))
        plan, dense = self._plan_at_target(), folded(self.trained, [gates() for gates in self.gates])
        return LearnedModel(plan=plan, model=apply_plan(dense, plan).requires_grad_(False).eval())

    def state(self) -> dict[str, Any]:
        """All that a training in another process needs to go on: tensors, numbers and strings in dicts and lists."""
        return {
            "loop": self.loop.state(),
            "weights": self.trained.state_dict(),
            "gates": [gates.state_dict() for gates in self.gates],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of a training with the same model, images and settings."""
        self.trained.load_state_dict(state["weights"])
        for gates, learned in zip(self.gates, state["gates"], strict=True):
            gates.load_state_dict(learned)
        self.loop.load(state["loop"])


def weighted_mean(gates: Sequence[SoftGates]) -> Tensor:
    """The mean |gate| of the gates that are trained, each weighted by its unit's multiply-adds; (), 1 at the start."""
    weighted = [(block.weights[kind], parameter) for block in gates for kind, parameter in block.trained().items()]
    total = sum(macs * parameter.numel() for macs, parameter in weighted)
    return torch.stack([macs / total * parameter.abs().sum() for macs, parameter in weighted]).sum()


@torch.no_grad()
def folded(model: nn.Module, gates: Sequence[BlockGates]) -> nn.Module:
    """A copy of a dense model whose weights do what its blocks do with the gates.

    A pair's gate goes to its query alone, a value channel's to its output, and a hidden unit's, which acts after the
    activation, to the layer that reads it. With qk-norm a query's size is lost: there the gates of pairs have to be 1.
    """
    copied = copy.deepcopy(model)
    for block, factors in zip(blocks_of(copied), gates, strict=True):
        parts = parts_of(block)
        rows = torch.cat([factors.qk.flatten(), torch.ones_like(factors.qk).flatten(), factors.v.flatten()])
        parts.qkv.weight.mul_(rows[:, None])
        if parts.qkv.bias is not None:
            parts.qkv.bias.mul_(rows)
        parts.fc2.weight.mul_(factors.hidden)
    return copied


def _units_above(
    gates: BlockGates, anatomy: BlockAnatomy, allowed: AllowedWidths, channel_threshold: float, hidden_threshold: float
) -> BlockPlan:
    """The units whose |gate| is above a threshold, as nearly as the widths allow.

    Of all choices that are allowed, the one whose sum of |gate| - threshold is the largest. With any width allowed
    those are the units above the threshold; and a higher threshold never keeps more.
    """
    qk, v, hidden = (kind.detach().abs().double().cpu() for kind in (gates.qk, gates.v, gates.hidden))
    if anatomy.has_qk_norm:  # the pairs of a head have no gates, and stay or go with its values
        qk = v.mean(dim=1, keepdim=True).expand_as(v)
    pairs = torch.tensor(allowed.attention)
    # (pairs of widths, H): what a head is worth with these widths; it stays if that is more than nothing.
    worth = (_best_sums(qk, channel_threshold)[:, pairs[:, 0]] + _best_sums(v, channel_threshold)[:, pairs[:, 1]]).T
    best_head = worth.amax(dim=1)
    totals = torch.where(best_head > 0, worth.clamp_min(0).sum(dim=1), best_head)
    best = int(totals.argmax())
    qk_width, v_width = allowed.attention[best]
    heads = top_indices(worth[best], max(1, int((worth[best] > 0).sum())))
    widths = torch.tensor(allowed.hidden)
    num_hidden = allowed.hidden[int(_best_sums(hidden[None], hidden_threshold)[0, widths].argmax())]
    return BlockPlan(
        keep_heads=heads,
        keep_qk=tuple(top_indices(qk[head], qk_width) for head in heads),
        keep_v=tuple(top_indices(v[head], v_width) for head in heads),
        keep_hidden=top_indices(hidden, num_hidden),
        num_tokens=anatomy.num_patches,
    )


def _best_sums(sizes: Tensor, threshold: float) -> Tensor:
    """The sums of size - threshold over a row's 0, 1, ..., n largest. (rows, n) -> (rows, n + 1)."""
    return F.pad((sizes.sort(dim=1, descending=True).values - threshold).cumsum(dim=1), (1, 0))


def _lowest(fits: Callable[[float], bool]) -> float:
    """The lowest threshold that fits: with one that fits, all higher ones do."""
    return bisect(fits, 1 / HIGHEST, HIGHEST, 30, geometric=True)[1]
