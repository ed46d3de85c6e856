"""Learned width and depth (WDPruning, Yu et al., AAAI 2022): which units go is trained together with the weights.

Gates choose the units of every layer by learned scores and thresholds (`pruning.methods.learned_gates`). An augmented
Lagrangian takes the model to its size: loss + a (R - t) + b (R - t)^2 while the share R is above its target t, with a
and b raised by gradient ascent. The classifiers of the exits are trained along, so one run gives a model for each exit.

Where we differ:
- Once the target is reached, the thresholds move ever less, so that the weights can settle.
- Thresholds get the gradient of the sigmoid for both terms (the released code passes the loss's on unscaled), the share
  is counted in multiply-adds or parameters of what is really built, and in the last part of the training the widths are
  fixed, at the target exactly.

B images, N tokens, C model width, H heads, D head width, h hidden units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.errors import TargetError
from pruning.losses import distillation_loss
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.bisection import bisect
from pruning.methods.learned_gates import KINDS, OPEN, LearnedGates, RatioGradient
from pruning.methods.model_size import BudgetUnit, ModelSize
from pruning.model.anatomy import TAIL_PREFIXES, blocks_of, classify, embed, examine
from pruning.model.exits import ExitHead, exit_head_of, truncate
from pruning.model.gates import FixedGates, GatedBlock, gates_of_plan
from pruning.model.surgery import apply_plan, as_slim
from pruning.plan import BlockPlan, Plan
from pruning.precision import Precision, autocast
from pruning.training import Loop, LoopSettings

Shifts = Mapping[str, float]
"""Kind -> what is added to that threshold of a block."""


@dataclass(frozen=True, kw_only=True)
class WidthSettings(LoopSettings):
    """Settings of a training of widths and weights."""

    target_ratio: float
    """Share of the dense model's size to keep, in (0, 1]."""
    budget_unit: BudgetUnit = "macs"
    """The unit in which sizes are counted."""
    search_share: float = 0.6
    """Share of the training after which the widths are fixed, in (0, 1)."""
    score_rate: float = 2.5e-3
    """Learning rate of the scores."""
    distillation: float = 0.5
    """Weight of the dense model's answers against the labels, in [0, 1]."""
    multiplier_gain: float = 20.0
    """The linear multiplier's value after half of the search if the share stays at 1."""
    ratio_gradient: RatioGradient = "edge"
    """The gates whose gradients move a keep ratio: those at its edge; or, as in the paper, all that are open."""


@dataclass(frozen=True, kw_only=True)
class LearnedModel:
    """A model whose units were chosen by training."""

    plan: Plan
    model: nn.Module
    """The smaller model, in eval mode."""


class Lagrangian:
    """The multipliers of one inequality, share <= target."""

    def __init__(self, target: float, rate: float) -> None:
        self.target, self.rate = target, rate
        self.linear = self.square = 0.0

    def penalty(self, share: Tensor) -> Tensor:
        """The term to add to the loss; the multipliers go up by it as long as the share is above its target."""
        excess = (share - self.target).clamp_min(0)
        value = self.linear * excess + self.square * excess.square()
        distance = float(excess.detach())
        self.linear += self.rate * distance
        self.square += self.rate * distance**2
        return value


class WidthTraining:
    """A training of width and weights, epoch by epoch; its state can be saved and loaded in between."""

    def __init__(
        self, model: nn.Module, images: Images, settings: WidthSettings, *,
        exit_heads: Mapping[int, ExitHead] | None = None, allowed_widths: Sequence[AllowedWidths] | None = None,
        precision: Precision = "float32",
    ) -> None:  # fmt: skip
        """
        Args:
            model: dense, in eval mode, on the device to work on; it is left as it was.
            exit_heads: fitted classifiers of earlier exits, which are trained along.
            allowed_widths: of each block, the widths that it may have; by default any.

        Raises:
            TargetError: no width is as small as the target (says which is the smallest).
        """
        self.settings, self.images, self.precision = settings, images, precision
        self.teacher, self.anatomy = model, examine(model)
        self.allowed_widths = list(allowed_widths or [multiples(block, 1) for block in self.anatomy.blocks])
        self.device = next(model.parameters()).device
        self.trained = copy.deepcopy(model).requires_grad_(True)
        slim = [
            as_slim(block, anatomy, is_last=False)
            for block, anatomy in zip(blocks_of(self.trained), self.anatomy.blocks, strict=True)
        ]
        self.gates = [
            LearnedGates(block, anatomy, settings.ratio_gradient)
            for block, anatomy in zip(slim, self.anatomy.blocks, strict=True)
        ]
        self.blocks = nn.ModuleList(GatedBlock(*pair) for pair in zip(slim, self.gates, strict=True))
        depth = self.anatomy.depth
        earlier = {block: head for block, head in sorted((exit_heads or {}).items()) if block < depth}
        self.tails = {block: truncate(model, block, head) for block, head in earlier.items()} | {depth: self.trained}
        """Exit block -> a model whose norm and classifier answer there."""
        self.size = ModelSize(model, self.anatomy, settings.budget_unit)
        self._check_target()
        self.plans: list[BlockPlan] | None = None
        """The widths, once they are fixed."""
        self.search_steps = max(1, math.ceil(settings.search_share * settings.num_steps(len(images))))
        self.reached_step: int | None = None
        """The first step after which the share was at the target."""
        excess = max(1e-6, 1 - settings.target_ratio)
        self.lagrangian = Lagrangian(settings.target_ratio, settings.multiplier_gain / (excess * self.search_steps / 2))
        self.loop = Loop(images, self._optimizer(), settings, self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        gates = {id(parameter) for block in self.gates for parameter in block.parameters()}
        weights = {id(parameter): parameter for parameter in self.blocks.parameters() if id(parameter) not in gates}
        weights |= {id(parameter): parameter for parameter in self.trained.parameters()}
        for tail in self.tails.values():
            for name, parameter in tail.named_parameters():
                if name.startswith(TAIL_PREFIXES):
                    weights[id(parameter.requires_grad_(True))] = parameter
        thresholds = [threshold for block in self.gates for threshold in block.thresholds.values()]
        scores = [score for block in self.gates for score in block.scores.values()]
        return torch.optim.AdamW([
            *settings.groups(weights.values()),
            {"params": scores, "lr": settings.score_rate, "weight_decay": 0.0, "scheduled": False},
            {"params": thresholds, "lr": self._threshold_rate, "weight_decay": 0.0, "scheduled": False},
        ])  # fmt: skip

    def _check_target(self) -> None:
        settings = self.settings
        smallest = self._plans([dict.fromkeys(KINDS, -4 * OPEN)] * len(self.gates))
        least = self.size.of(smallest) / self.size.dense
        if not least <= settings.target_ratio <= 1:
            raise TargetError(
                f"target {settings.target_ratio:g} of the {settings.budget_unit} cannot be reached; "
                f"give {math.ceil(1000 * least) / 1000:g} at least, and 1 at most"
            )

    def share(self, shift: float = 0.0) -> Tensor:
        """The model's size under the keep ratios, as a share of the dense size; (), with a gradient.

        Args:
            shift: added to all thresholds.
        """
        return self.size.share([gates.ratios(shift) for gates in self.gates])

    def _plans(self, shifts: Sequence[Shifts]) -> list[BlockPlan]:
        """The plans of all blocks under shifts of each block's thresholds."""
        return [
            gates.plan(anatomy, allowed, shift)
            for gates, anatomy, allowed, shift in zip(
                self.gates, self.anatomy.blocks, self.allowed_widths, shifts, strict=True
            )
        ]

    @property
    def is_done(self) -> bool:
        """True once all epochs are trained."""
        return self.loop.is_done

    def run_epoch(self) -> dict[str, float]:
        """Trains one epoch; returns its mean loss, and the share of the dense size at its end.

        Raises:
            VitfrontError: the loss is not finite (names step and learning rate).
        """
        loss = self.loop.run_epoch(
            self._loss, penalty=self._penalty, before_step=self._slow_down, after_step=self._stay_above
        )
        share = float(self.share().detach()) if self.plans is None else self.size.of(self.plans) / self.size.dense
        return {"loss": loss, "share": share}

    def _slow_down(self, step: int) -> None:
        """Moves the thresholds ever less once the target was reached, and fixes the widths at the end of the search."""
        if step >= self.search_steps and self.plans is None:
            self._fix(self._plans_at_target())
        elif self.reached_step is not None:
            left = (self.search_steps - step) / (self.search_steps - self.reached_step)
            *_, thresholds = self.loop.optimizer.param_groups
            thresholds["lr"] = self._threshold_rate * max(0.0, left)

    @property
    def _threshold_rate(self) -> float:
        """The rate by which, if all gradients agree, a layer goes from open to half closed in half of the search."""
        return 2 * OPEN / self.search_steps

    @torch.no_grad()
    def _stay_above(self, step: int) -> None:
        """Moves all thresholds up together to the target if they fell below it.

        The penalty ends there, but the optimizer's momentum does not: without this a share of 0.6 was aimed at, 0.16
        reached, and the loss was 6.
        """
        target = self.settings.target_ratio
        if self.plans is not None or float(self.share()) >= target:
            return
        if self.reached_step is None:
            self.reached_step = step
        _, shift = bisect(lambda shift: float(self.share(shift)) >= target, 0.0, 2 * OPEN, 12)
        for gates in self.gates:
            for threshold in gates.thresholds.values():
                threshold.add_(shift)

    def _penalty(self) -> Tensor:
        zero = torch.zeros((), device=self.device)
        return zero if self.plans is not None else self.lagrangian.penalty(self.share())

    def _loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of all exits."""
        with torch.no_grad(), autocast(self.device, self.precision):
            teacher_logits = self.teacher(pixels).float()
        total = torch.zeros((), device=self.device)
        with autocast(self.device, self.precision):
            x = embed(self.trained, pixels)
            for index, block in enumerate(self.blocks, start=1):
                x = block(x)
                if index not in self.tails:
                    continue
                logits = classify(self.tails[index], x).float()
                total = total + distillation_loss(
                    logits, labels, teacher_logits, teacher_weight=self.settings.distillation
                )
        return total

    def _plans_at_target(self) -> list[BlockPlan]:
        """The plans at the target, or just below it: thresholds are moved up together, as far as it allows.

        Thresholds that stand together pass a unit together, so what the target has no room for together is then tried
        one by one; and what it has no room for as heads is made up in channels, and at last in hidden units.
        """
        thresholds = [threshold for gates in self.gates for threshold in gates.thresholds.values()]
        farthest = 4 * OPEN + max(float(threshold.detach().abs()) for threshold in thresholds)
        shifts: list[Shifts] = [dict.fromkeys(KINDS, -farthest) for _ in self.gates]
        for kinds in (KINDS, KINDS[1:], KINDS[-1:]):
            shifts = self._shifted_up(shifts, kinds, farthest)
        return self._plans(shifts)

    def _shifted_up(self, shifts: Sequence[Shifts], kinds: Sequence[str], highest: float) -> list[Shifts]:
        """Raises the shifts of some kinds, `highest` at most: all as far as the target allows, then one by one."""
        lowest = min(shift[kind] for shift in shifts for kind in kinds)
        fitting, exceeding = bisect(
            lambda middle: not self._fits([{**shift, **dict.fromkeys(kinds, middle)} for shift in shifts]),
            lowest, highest, 40,
        )  # fmt: skip
        raised = [{**shift, **dict.fromkeys(kinds, fitting)} for shift in shifts]
        for shift in raised:
            for kind in kinds:
                shift[kind] = exceeding
                if not self._fits(raised):
                    shift[kind] = fitting
        return list(raised)

    def _fits(self, shifts: Sequence[Shifts]) -> bool:
        return self.size.of(self._plans(shifts)) <= self.settings.target_ratio * self.size.dense

    def _fix(self, plans: list[BlockPlan]) -> None:
        self.plans = plans
        for gated, plan, anatomy in zip(self.blocks, plans, self.anatomy.blocks, strict=True):
            assert isinstance(gated, GatedBlock)
            gated.gates = FixedGates(gates_of_plan(plan, anatomy, self.device))

    def finish(self) -> list[LearnedModel]:
        """The model of every exit, first to last; after the last epoch."""
        assert self.loop.is_done, "the training is not at its end"
        if self.plans is None:  # so few steps that all of them were search
            self._fix(self._plans_at_target())
        assert self.plans is not None
        learned = []
        for exit_block, tail in self.tails.items():
            plan = Plan(blocks=tuple(self.plans[:exit_block]), token_reduction="none")
            shorter = truncate(self.trained, exit_block, exit_head_of(tail))
            learned.append(LearnedModel(plan=plan, model=apply_plan(shorter, plan).requires_grad_(False).eval()))
        return learned

    def state(self) -> dict[str, Any]:
        """All that a training in another process needs to go on."""
        return {
            "loop": self.loop.state(),
            "weights": self.trained.state_dict(),
            "tails": {block: exit_head_of(tail) for block, tail in self.tails.items()},
            "gates": [gates.state_dict() for gates in self.gates],
            "multipliers": (self.lagrangian.linear, self.lagrangian.square),
            "reached_step": self.reached_step,
            "plan": None if self.plans is None else Plan(blocks=tuple(self.plans)).to_json(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of a training with the same model, images and settings."""
        self.trained.load_state_dict(state["weights"])
        for block, tail in state["tails"].items():
            self.tails[block].load_state_dict(tail, strict=False)
        for gates, learned in zip(self.gates, state["gates"], strict=True):
            gates.load_state_dict(learned)
        self.loop.load(state["loop"])
        self.lagrangian.linear, self.lagrangian.square = state["multipliers"]
        self.reached_step = state["reached_step"]
        if state["plan"] is not None:
            self._fix(list(Plan.from_json(state["plan"]).blocks))
