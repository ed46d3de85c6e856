"""Learned width and depth (WDPruning, Yu et al., AAAI 2022): which units go is trained together with the weights.

Every unit has a score and every layer a threshold; the layer's keep ratio is the threshold's sigmoid, and the units of
largest score stay. Within a step the ranking hardly moves, so the gradient of a unit's gate goes to its score as it is
(straight through). An augmented Lagrangian takes the whole to its size: loss + a (R - t) + b (R - t)^2 while the share
R is above its target t, with a and b raised by gradient ascent. The classifiers of the exits are trained along, so one
run gives a model for each exit.

Where we differ:
- What a ratio gets is the gradient of the gates at its edge, the next to close and the next to open: what one unit more
  or less does to the loss. The paper sums it over all open gates, which is what it does to the loss to scale the whole
  layer; the weights are at rest with respect to that, so little but noise is left (`ratio_gradient="open"`).
- Once the target is reached, the thresholds move ever less, so that the weights can nearest_allowed.
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
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.errors import TargetError
from pruning.losses import distillation_loss
from pruning.measure.cost import channel_macs, count_macs, count_params
from pruning.measure.widths import AllowedWidths, multiples
from pruning.methods.ranking import top_indices
from pruning.model.anatomy import TAIL_PREFIXES, BlockAnatomy, blocks_of, classify, embed, examine, parts_of
from pruning.model.exits import ExitHead, exit_head_of, truncate
from pruning.model.gates import BlockGates, FixedGates, GatedBlock, Gates, gates_of_plan
from pruning.model.surgery import apply_plan, as_slim, keep_all_block, keep_all_plan
from pruning.plan import BlockPlan, Plan
from pruning.precision import Precision, autocast
from pruning.training import Loop, LoopSettings

OPEN = 10.0
"""What the thresholds start from: its sigmoid keeps everything (the paper's beta = 10)."""

EDGE = 1 / 16
"""Share of a layer's units on either side of the edge whose gradients are averaged; one unit at least."""

KINDS = ("heads", "qk", "v", "hidden")

RatioGradient = Literal["edge", "open"]
"""Of which gates' gradients a keep ratio's is made."""


@dataclass(frozen=True, kw_only=True)
class WidthSettings(LoopSettings):
    """How the width is learned."""

    target_ratio: float
    """Share of the dense model to keep, in (0, 1]."""
    count: Literal["macs", "params"] = "macs"
    """Of what."""
    search_share: float = 0.6
    """Share of the training after which the widths are fixed, in (0, 1)."""
    score_rate: float = 2.5e-3
    """Learning rate of the scores."""
    distillation: float = 0.5
    """Weight of the dense model's answers against the labels, in [0, 1]."""
    multiplier_gain: float = 20.0
    """What the linear multiplier has become if half of the search leaves the share at 1."""
    ratio_gradient: RatioGradient = "edge"
    """Of the gates at the edge between open and closed; or, as in the paper, of all that are open."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What came of one exit."""

    plan: Plan
    model: nn.Module
    """The smaller model, in eval mode."""


class TopShare(torch.autograd.Function):
    """1 for the ceil(ratio * n) largest scores of each row, else 0; straight-through gradients for both.

    With g the gradient of the gates (..., n), the scores get g as it is. The ratio gets, summed over the rows, n times
    the mean of g at the edge (n * ratio gates are open), or the sum of g over the open gates.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, ratio: Tensor, ratio_gradient: RatioGradient) -> Tensor:
        """scores: (..., n); ratio: (), in (0, 1]."""
        count = _count(float(ratio.detach()), scores.shape[-1])
        order = scores.argsort(dim=-1, descending=True, stable=True)
        reach = max(1, round(EDGE * scores.shape[-1]))
        ctx.deciding = order[..., max(0, count - reach) : count + reach]
        ctx.weight = scores.shape[-1] / ctx.deciding.shape[-1]
        if ratio_gradient == "open":
            ctx.deciding, ctx.weight = order[..., :count], 1.0
        return torch.zeros_like(scores).scatter(-1, order[..., :count], 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.weight * gradient.gather(-1, ctx.deciding).sum(), None


class LearnedGates(Gates):
    """The scores of one block's units, and a threshold for each kind."""

    def __init__(self, block: Any, anatomy: BlockAnatomy, ratio_gradient: RatioGradient = "edge") -> None:
        """block: dense and slim; the scores start from the size of its weights, as multiples of their spread."""
        super().__init__()
        self.ratio_gradient = ratio_gradient
        heads = anatomy.num_heads, anatomy.head_dim
        rows = torch.linalg.vector_norm(block.attn.qkv.weight, dim=1).reshape(3, *heads)
        v = rows[2] * torch.linalg.vector_norm(block.attn.proj.weight, dim=0).reshape(heads)
        hidden = torch.linalg.vector_norm(block.mlp.fc1.weight, dim=1) * torch.linalg.vector_norm(
            block.mlp.fc2.weight, dim=0
        )
        scores = {"heads": torch.linalg.vector_norm(v, dim=1), "qk": rows[0] * rows[1], "v": v, "hidden": hidden}
        self.scores = nn.ParameterDict({kind: nn.Parameter(_standard(score)) for kind, score in scores.items()})
        is_fixed = {"qk"} if anatomy.has_qk_norm else set()
        device = v.device
        self.thresholds = nn.ParameterDict(
            {kind: nn.Parameter(torch.tensor(OPEN, device=device)) for kind in KINDS if kind not in is_fixed}
        )

    def ratios(self, shift: float = 0.0) -> dict[str, Tensor]:
        """Keep ratios, in (0, 1), if all thresholds were higher by `shift`."""
        one = torch.ones((), device=self.scores["v"].device)
        return {kind: (self.thresholds[kind] + shift).sigmoid() if kind in self.thresholds else one for kind in KINDS}

    def forward(self) -> BlockGates:
        masks = {
            kind: TopShare.apply(self.scores[kind], ratio, self.ratio_gradient) for kind, ratio in self.ratios().items()
        }
        return BlockGates(qk=masks["qk"], v=masks["v"] * masks["heads"][:, None], hidden=masks["hidden"])

    def plan(self, anatomy: BlockAnatomy, allowed: AllowedWidths, shifts: Mapping[str, float]) -> BlockPlan:
        """What would stay if the thresholds were higher by so much; widths are rounded up to allowed ones."""
        ratios = {
            kind: float((self.thresholds[kind].detach() + shifts[kind]).sigmoid()) if kind in self.thresholds else 1.0
            for kind in KINDS
        }
        heads = top_indices(self.scores["heads"].detach(), _count(ratios["heads"], anatomy.num_heads))
        asked = (_count(ratios[kind], anatomy.head_dim) for kind in ("qk", "v"))
        qk_width, v_width = allowed.least_attention(*asked)
        hidden = allowed.least_hidden(_count(ratios["hidden"], anatomy.num_hidden))
        return BlockPlan(
            keep_heads=heads,
            keep_qk=tuple(top_indices(self.scores["qk"][head].detach(), qk_width) for head in heads),
            keep_v=tuple(top_indices(self.scores["v"][head].detach(), v_width) for head in heads),
            keep_hidden=top_indices(self.scores["hidden"].detach(), hidden),
            num_tokens=anatomy.num_patches,
        )


class Lagrangian:
    """The multipliers of one inequality, share <= target."""

    def __init__(self, target: float, rate: float) -> None:
        self.target, self.rate = target, rate
        self.linear = self.square = 0.0

    def penalty(self, share: Tensor) -> Tensor:
        """What is added to the loss; the multipliers go up by it as long as the share is above its target."""
        over = (share - self.target).clamp_min(0)
        value = self.linear * over + self.square * over.square()
        distance = float(over.detach())
        self.linear += self.rate * distance
        self.square += self.rate * distance**2
        return value


class WidthTraining:
    """One run, epoch by epoch; its state can be saved and loaded in between."""

    def __init__(
        self, model: nn.Module, images: Images, settings: WidthSettings, *, heads: Mapping[int, ExitHead] | None = None,
        allowed_widths: Sequence[AllowedWidths] | None = None, precision: Precision = "float32",
    ) -> None:  # fmt: skip
        """
        Args:
            model: dense, in eval mode, on the device to work on; it is left as it was.
            heads: fitted classifiers of earlier exits, which are trained along.
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
            as_slim(block, each, is_last=False)
            for block, each in zip(blocks_of(self.trained), self.anatomy.blocks, strict=True)
        ]
        self.gates = [
            LearnedGates(block, each, settings.ratio_gradient)
            for block, each in zip(slim, self.anatomy.blocks, strict=True)
        ]
        self.blocks = nn.ModuleList(GatedBlock(*pair) for pair in zip(slim, self.gates, strict=True))
        depth = self.anatomy.depth
        earlier = {block: head for block, head in sorted((heads or {}).items()) if block < depth}
        self.tails = {block: truncate(model, block, head) for block, head in earlier.items()} | {depth: self.trained}
        self._check_target()
        self.plans: list[BlockPlan] | None = None
        """The widths, once they are fixed."""
        self.search_steps = max(1, math.ceil(settings.search_share * settings.num_steps(len(images))))
        self.reached_step: int | None = None
        """The first after which the share was at the target."""
        over = max(1e-6, 1 - settings.target_ratio)
        self.lagrangian = Lagrangian(settings.target_ratio, settings.multiplier_gain / (over * self.search_steps / 2))
        self.loop = Loop(images, self._optimizer(), settings, self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        of_gates = {id(parameter) for gates in self.gates for parameter in gates.parameters()}
        weights = {id(each): each for each in self.blocks.parameters() if id(each) not in of_gates}
        weights |= {id(each): each for each in self.trained.parameters()}
        for tail in self.tails.values():
            for name, parameter in tail.named_parameters():
                if name.startswith(TAIL_PREFIXES):
                    weights[id(parameter.requires_grad_(True))] = parameter
        thresholds = [each for gates in self.gates for each in gates.thresholds.values()]
        scores = [each for gates in self.gates for each in gates.scores.values()]
        return torch.optim.AdamW([
            *settings.groups(weights.values()),
            {"params": scores, "lr": settings.score_rate, "weight_decay": 0.0, "scheduled": False},
            {"params": thresholds, "lr": self._threshold_rate, "weight_decay": 0.0, "scheduled": False},
        ])  # fmt: skip

    def _check_target(self) -> None:
        settings, anatomy = self.settings, self.anatomy
        self.parts = [
            _UnitSizes.of(block, each, settings.count)
            for block, each in zip(blocks_of(self.teacher), anatomy.blocks, strict=True)
        ]
        is_macs = settings.count == "macs"
        self.whole = count_macs(anatomy, keep_all_plan(anatomy)) if is_macs else count_params(self.teacher)
        self.rest = self.whole - sum(
            part.of_plan(keep_all_block(each)) for part, each in zip(self.parts, anatomy.blocks, strict=True)
        )
        least = self._size(self._plans([dict.fromkeys(KINDS, -4 * OPEN)] * len(self.gates))) / self.whole
        if not least <= settings.target_ratio <= 1:
            raise TargetError(
                f"target {settings.target_ratio:g} of the {settings.count} cannot be reached; "
                f"give {math.ceil(1000 * least) / 1000:g} at least, and 1 at most"
            )

    def share(self, shift: float = 0.0) -> Tensor:
        """What the keep ratios make of the model's size, as a share of the dense one; with a gradient.

        shift: added to all thresholds.
        """
        total = torch.full((), float(self.rest), device=self.device)
        for gates, part, each in zip(self.gates, self.parts, self.anatomy.blocks, strict=True):
            ratio = gates.ratios(shift)
            channels = each.head_dim * (ratio["qk"] * part.qk + ratio["v"] * part.v) + part.head
            total = total + each.num_heads * ratio["heads"] * channels + each.num_hidden * ratio["hidden"] * part.hidden
        return total / self.whole

    def _size(self, plans: Sequence[BlockPlan]) -> int:
        return self.rest + sum(part.of_plan(plan) for part, plan in zip(self.parts, plans, strict=True))

    def _plans(self, shifts: Sequence[Mapping[str, float]]) -> list[BlockPlan]:
        """shifts: of each block's thresholds, by kind."""
        return [
            gates.plan(each, allowed, shift)
            for gates, each, allowed, shift in zip(
                self.gates, self.anatomy.blocks, self.allowed_widths, shifts, strict=True
            )
        ]

    @property
    def is_done(self) -> bool:
        """All epochs are trained."""
        return self.loop.is_done

    def run_epoch(self) -> dict[str, float]:
        """Trains one epoch; gives its mean loss, and the share of the dense size at its end.

        Raises:
            VitfrontError: the loss is not finite (names step and learning rate).
        """
        loss = self.loop.run_epoch(
            self._loss, penalty=self._penalty, before_step=self._come_to_rest, after_step=self._stay_above
        )
        share = float(self.share().detach()) if self.plans is None else self._size(self.plans) / self.whole
        return {"loss": loss, "share": share}

    def _come_to_rest(self, step: int) -> None:
        """The thresholds move ever less after the target was reached; at the end of the search the widths are fixed."""
        if step >= self.search_steps and self.plans is None:
            self._fix(self._plan_at_target())
        elif self.reached_step is not None:
            left = (self.search_steps - step) / (self.search_steps - self.reached_step)
            *_, of_thresholds = self.loop.optimizer.param_groups
            of_thresholds["lr"] = self._threshold_rate * max(0.0, left)

    @property
    def _threshold_rate(self) -> float:
        """From all open to half closed takes half of the search, if the gradients agree."""
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
        low, high = 0.0, 2 * OPEN
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self.share(middle)) < target else (low, middle)
        for gates in self.gates:
            for threshold in gates.thresholds.values():
                threshold.add_(high)

    def _penalty(self) -> Tensor:
        still = torch.zeros((), device=self.device)
        return still if self.plans is not None else self.lagrangian.penalty(self.share())

    def _loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """The sum over the exits."""
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

    def _plan_at_target(self) -> list[BlockPlan]:
        """The plans at the target, or just below it: thresholds are moved up together, as far as it allows.

        Thresholds that stand together pass a unit together, so what the target has no room for together is then tried
        one by one; and what it has no room for as heads is made up in channels, and at last in hidden units.
        """
        limit = self.settings.target_ratio * self.whole
        far = 4 * OPEN + max(float(each.detach().abs()) for gates in self.gates for each in gates.thresholds.values())
        shifts = [dict.fromkeys(KINDS, -far) for _ in self.gates]

        def fits(trial: list[dict[str, float]]) -> bool:
            return self._size(self._plans(trial)) <= limit

        for kinds in (KINDS, KINDS[1:], KINDS[-1:]):
            low, high = min(shift[kind] for shift in shifts for kind in kinds), far
            for _ in range(40):
                middle = (low + high) / 2
                is_within = fits([shift | dict.fromkeys(kinds, middle) for shift in shifts])
                low, high = (middle, high) if is_within else (low, middle)
            shifts = [shift | dict.fromkeys(kinds, low) for shift in shifts]
            for shift in shifts:
                for kind in kinds:
                    shift[kind] = high
                    if not fits(shifts):
                        shift[kind] = low
        return self._plans(shifts)

    def _fix(self, plans: list[BlockPlan]) -> None:
        self.plans = plans
        for gated, plan, each in zip(self.blocks, plans, self.anatomy.blocks, strict=True):
            assert isinstance(gated, GatedBlock)
            gated.gates = FixedGates(gates_of_plan(plan, each, self.device))

    def finish(self) -> list[Learned]:
        """The model of every exit, first to last; after the last epoch."""
        assert self.loop.is_done, "the training is not at its end"
        if self.plans is None:  # so few steps that all of them were search
            self._fix(self._plan_at_target())
        assert self.plans is not None
        learned = []
        for exit_block, tail in self.tails.items():
            plan = Plan(blocks=tuple(self.plans[:exit_block]), token_reduction="none")
            whole = truncate(self.trained, exit_block, exit_head_of(tail))
            learned.append(Learned(plan=plan, model=apply_plan(whole, plan).requires_grad_(False).eval()))
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


@dataclass(frozen=True, kw_only=True)
class _UnitSizes:
    """What one unit of a block weighs: multiply-adds, or parameters."""

    head: int
    """A head without its channels."""
    qk: int
    v: int
    hidden: int

    @classmethod
    def of(cls, block: nn.Module, anatomy: BlockAnatomy, count: Literal["macs", "params"]) -> _UnitSizes:
        if count == "macs":
            tokens = anatomy.num_prefix_tokens + anatomy.num_patches
            channel = channel_macs(anatomy, tokens)
            return cls(head=0, qk=channel, v=channel, hidden=2 * tokens * anatomy.width)
        parts, width = parts_of(block), anatomy.width
        row = width + (parts.qkv.bias is not None)
        return cls(
            head=0 if parts.windows is None else len(parts.windows.bias_table),
            qk=2 * row,
            v=row + width,
            hidden=2 * width + (parts.fc1.bias is not None),
        )

    def of_plan(self, plan: BlockPlan) -> int:
        shape = plan.shape
        heads = shape.num_heads * (self.head + shape.qk_width * self.qk + shape.v_width * self.v)
        return heads + shape.num_hidden * self.hidden


def _count(ratio: float, total: int) -> int:
    return min(total, max(1, math.ceil(ratio * total)))


def _standard(scores: Tensor) -> Tensor:
    """Mean 0 and spread 1."""
    scores = scores.detach().float()
    return (scores - scores.mean()) / scores.std().clamp_min(torch.finfo(torch.float32).eps)
