"""Where to prune: one price of a multiply-add for all units of all blocks (`method: global`).

A profile tells for every block what it costs to remove channels (predicted, `pruning.scores.curves`) and tokens
(measured). All costs are nats an image: the divergence of the pruned model's answers from the dense model's. A plan of
least cost for its multiply-adds pays the same price for the last one everywhere; the price is found by bisection, and
for a given price the numbers of tokens by dynamic programming from the last block to the first.

B images, D head width, h hidden units, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.data import Images
from pruning.device_sharing import yielding_between
from pruning.errors import TargetError
from pruning.measure.accuracy import predict
from pruning.measure.cost import channel_macs, count_macs, reduction_macs
from pruning.measure.widths import AllowedWidths, multiples
from pruning.model.anatomy import Anatomy, blocks_of, classify, embed, examine
from pruning.model.surgery import as_slim, keep_all_block, keep_all_plan, slim_block
from pruning.model.tokens import Schedule, schedule
from pruning.plan import BlockPlan, BlockShape, Plan, TokenReduction
from pruning.precision import Precision, autocast
from pruning.repair.compensation import BlockRepair, repaired_model
from pruning.repair.flow import CalibrationStream
from pruning.repair.sensitivity import BlockSensitivity, measure_sensitivity
from pruning.scores.curves import RemovalCurves, measure_curves

SHARES = (1 / 24, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 3 / 4, 11 / 12)
"""Shares of the tokens whose removal from one block is measured."""

NUM_COUNTS = 99
"""Numbers of tokens that the dynamic programming tells apart, evenly from 1 to all."""

TRIAL_SHARE = (0.9, 0.65)
"""Shares of the multiply-adds at which the cost of fewer channels, and of fewer tokens, is held against a measured one.
Both lose little there: farther down, the errors are no longer small."""


REDUCTION_WEIGHTS = (1.0, 0.5, 0.25, 0.0)
"""What the time of a token reduction is multiplied by, one after the other, until a plan comes close to its target:
where reductions are slow there may be none between many of them and hardly any."""

CLOSE_ENOUGH = 0.05
"""Share of the dense multiply-adds by which a plan may be smaller than asked before the next weight is tried."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What removing costs, block by block."""

    channels: tuple[RemovalCurves, ...]
    channel_scale: float
    """Measured cost of a model with fewer channels / predicted cost; the prediction takes errors to be independent."""
    token_scale: float
    """The same of a model with fewer tokens."""
    tokens: tuple[tuple[float, ...], ...]
    """For every block, nats at the `SHARES`, none of which falls; nothing where no token goes."""
    token_reduction: TokenReduction
    cutoff_token: float
    forward_passes: float
    """What it cost, in forward passes over the calibration images; a backward pass is two."""


def measure_profile(
    model: nn.Module, calibration: Images, probe: Images, *, token_reduction: TokenReduction,
    cutoff_token: float = 0.85, batch_size: int = 64, precision: Precision = "float32",
    sensitivity: list[BlockSensitivity] | None = None,
) -> Profile:  # fmt: skip
    """The profile of a dense model in eval mode; on the CPU.

    Args:
        sensitivity: of the model on the calibration images; measured if it is not given.
        calibration: for the channel curves.
        probe: images on which the cost of removing tokens is measured, and that of a trial of channels.
    """
    anatomy = examine(model)
    if sensitivity is None:
        sensitivity = measure_sensitivity(model, calibration, batch_size=batch_size, precision=precision)
    flow = CalibrationStream(
        model, calibration, sensitivity, token_reduction=token_reduction, cutoff_token=cutoff_token,
        batch_size=batch_size, precision=precision,
    )  # fmt: skip
    channels = []
    for block in blocks_of(model):
        channels.append(measure_curves(BlockRepair(flow)))
        flow.advance(block)
    reduces = token_reduction != "none"
    tokens: tuple[tuple[float, ...], ...] = ((),) * anatomy.depth
    if reduces:
        tokens = _token_costs(model, probe, token_reduction, cutoff_token, batch_size, precision)
    profile = Profile(
        channels=tuple(channels), channel_scale=1.0, token_scale=1.0, tokens=tokens, token_reduction=token_reduction,
        cutoff_token=cutoff_token, forward_passes=0.0,
    )  # fmt: skip
    dense = predict(model, probe, batch_size=batch_size, precision=precision)
    scales = []
    for token_share in (0.0, 1.0) if reduces else (0.0,):
        share = TRIAL_SHARE[token_share > 0]
        target = int(share * count_macs(anatomy, keep_all_plan(anatomy)))
        try:
            plan = allocate(profile, anatomy, target, token_share)
        except TargetError:  # nearly all of the model is patch embedding and classifier
            scales.append(1.0)
            continue
        trial = repaired_model(model, plan, calibration, sensitivity, batch_size=batch_size, precision=precision)
        logits = predict(trial.model, probe, batch_size=batch_size, precision=precision)
        predicted = sum(map(sum, block_costs(profile, anatomy, plan)))  # still unscaled
        scales.append(max(1.0, divergence(dense, logits) / max(predicted, 1e-9)))
    # Sensitivity 3, curves 1, the dense stream 1, a trial 3; probed tokens, and the answers of the models.
    probe_share, probed = len(probe) / len(calibration), len(SHARES) * (anatomy.depth + 1) / 2 + 1 if reduces else 0
    return replace(
        profile,
        channel_scale=scales[0],
        token_scale=scales[-1],
        forward_passes=5 + 3 * len(scales) + probe_share * (1 + len(scales) + probed),
    )


def divergence(dense: Tensor, pruned: Tensor) -> float:
    """Mean KL(softmax dense || softmax pruned) of logits (B, classes), in nats."""
    return F.kl_div(pruned.log_softmax(dim=1), dense.log_softmax(dim=1), log_target=True, reduction="batchmean").item()


@torch.no_grad()
def _token_costs(
    model: nn.Module, images: Images, token_reduction: TokenReduction, cutoff: float, batch_size: int,
    precision: Precision,
) -> tuple[tuple[float, ...], ...]:  # fmt: skip
    """Divergence when one block alone removes a share of its tokens, for every block and share."""
    each, blocks = examine(model).blocks, list(blocks_of(model))
    slim = [as_slim(block, each[index], is_last=index == len(blocks) - 1) for index, block in enumerate(blocks)]
    kept = [max(1, round(each[0].num_patches * (1 - share))) for share in SHARES]
    costs = np.zeros((len(blocks), len(SHARES)))
    device = next(model.parameters()).device
    for batch, _ in images.batches(batch_size, device):
        with autocast(device, precision):
            streams = [embed(model, batch)]
            for block in blocks:
                streams.append(block(streams[-1]))
            dense = classify(model, streams.pop()).float()
            for index, x in enumerate(streams):
                for column, count in enumerate(yielding_between(kept)):
                    y = slim_block(
                        blocks[index], keep_all_block(each[index], count), each[index],
                        num_tokens_in=each[index].num_patches,
                        token_reduction=token_reduction, cutoff_token=cutoff, is_last=index == len(blocks) - 1,
                    )(x)  # fmt: skip
                    for block in slim[index + 1 :]:
                        y = block(y)
                    costs[index, column] += divergence(dense, classify(model, y).float()) * len(batch) / len(images)
    return tuple(tuple(row) for row in np.maximum.accumulate(costs, axis=1).tolist())


def allocate(
    profile: Profile,
    anatomy: Anatomy,
    target_macs: int,
    token_share: float = 0.5,
    allowed_widths: Sequence[AllowedWidths] | None = None,
) -> Plan:
    """A plan of little predicted cost with at most so many multiply-adds.

    No plan on the lower convex hull of costs and multiply-adds that is as small undercuts it; one off the hull may.

    Args:
        token_share: in [0, 1]: 0.5 weighs channels and tokens as the profile does; the cost of channels is
            multiplied by token_share / (1 - token_share). So 0 prunes channels alone, and 1 tokens alone. Without a
            token reduction it has no effect.
        allowed_widths: of each block, and what the time of a token reduction is counted as; by default any width.

    Raises:
        SettingError: no plan is that small.
    """
    whole = replace(keep_all_plan(anatomy), cutoff_token=profile.cutoff_token, token_reduction=profile.token_reduction)
    if count_macs(anatomy, whole) <= target_macs:
        return whole
    if allowed_widths is None:
        allowed_widths = [multiples(block, 1) for block in anatomy.blocks]
    smallest: Plan | None = None
    best: Plan | None = None
    for weight in REDUCTION_WEIGHTS:
        weighed = [replace(allowed, reduction=weight * allowed.reduction) for allowed in allowed_widths]
        smallest, found = _within(_Search(profile, anatomy, token_share, weighed), target_macs)
        best = found or best
        if found is not None and count_macs(anatomy, found) >= target_macs - CLOSE_ENOUGH * count_macs(anatomy, whole):
            break
    if best is None:
        assert smallest is not None
        raise TargetError(
            f"no plan has {target_macs} multiply-adds or fewer; "
            f"the smallest that may be made has {count_macs(anatomy, smallest)}"
        )
    return best


def _within(search: _Search, target_macs: int) -> tuple[Plan, Plan | None]:
    """The smallest plan, and the cheapest found with at most so many multiply-adds, if there is any.

    Two prices next to each other give a plan within the target and one above it. Where these lie far apart, a plan
    whose first blocks are the larger one's comes closer.
    """
    low, high = 1e-16, 1e3  # nats a multiply-add; at the highest, also a tiny model's least plan is the cheapest
    anatomy, smallest, above = search.anatomy, search.plan(high), search.plan(low)
    if count_macs(anatomy, smallest) > target_macs:
        return smallest, None
    best = smallest
    for _ in range(40):
        middle = math.sqrt(low * high)
        plan = search.plan(middle)
        if count_macs(anatomy, plan) <= target_macs:
            best, high = plan, middle
        else:
            above, low = plan, middle
    mixed = [best]
    for index in range(1, anatomy.depth + 1):
        blocks = above.blocks[:index] + best.blocks[index:]
        counts = [block.num_tokens for block in blocks]
        if counts == sorted(counts, reverse=True):
            mixed.append(replace(best, blocks=blocks))
    return smallest, min((plan for plan in mixed if count_macs(anatomy, plan) <= target_macs), key=search.cost)


def scheduled(
    anatomy: Anatomy, target_macs: int, kind: Schedule, token_reduction: TokenReduction, cutoff_token: float = 0.85
) -> Plan:
    """The plan that takes the fewest tokens by a schedule, and nothing else, and has at most so many multiply-adds.

    Raises:
        SettingError: no plan of the schedule is that small.
    """
    num_patches = anatomy.blocks[0].num_patches

    def plan(removed: float) -> Plan:
        counts = schedule(kind, num_patches, anatomy.depth, removed)
        blocks = tuple(keep_all_block(block, count) for block, count in zip(anatomy.blocks, counts, strict=True))
        return Plan(blocks=blocks, cutoff_token=cutoff_token, token_reduction=token_reduction)

    low, high = 0.0, float(num_patches)
    if count_macs(anatomy, plan(low)) <= target_macs:
        return plan(low)
    if (least := count_macs(anatomy, plan(high))) > target_macs:
        raise TargetError(f"no {kind} schedule has {target_macs} multiply-adds or fewer; the smallest has {least}")
    while high - low > 1e-3:  # tokens a block
        middle = (low + high) / 2
        low, high = (low, middle) if count_macs(anatomy, plan(middle)) <= target_macs else (middle, high)
    return plan(high)


class _Search:
    """Plans of least cost at a price."""

    def __init__(
        self, profile: Profile, anatomy: Anatomy, token_share: float, allowed_widths: Sequence[AllowedWidths]
    ) -> None:
        self.profile, self.anatomy = profile, anatomy
        patches = anatomy.blocks[0].num_patches
        self.has_tokens = profile.token_reduction != "none" and token_share > 0
        self.counts = sorted({round(1 + (patches - 1) * i / (NUM_COUNTS - 1)) for i in range(NUM_COUNTS)})
        if not self.has_tokens:
            self.counts = [patches]
        if self.has_tokens and token_share >= 1:
            whole = [multiples(block, max(block.head_dim, block.num_hidden)) for block in anatomy.blocks]
            allowed_widths = [
                replace(one, reduction=allowed.reduction) for one, allowed in zip(whole, allowed_widths, strict=True)
            ]
        self.allowed_widths = allowed_widths
        is_weighed = self.has_tokens and token_share < 1
        self.channel_scale = profile.channel_scale * (token_share / (1 - token_share) if is_weighed else 1.0)
        self.reduction = self._reduction_macs()
        self.reduces = np.array(self.counts)[None] < np.array(self.counts)[:, None]
        """(counts in, counts out)"""
        self.removal = [self._removal_costs(index) for index in range(anatomy.depth)]

    def plan(self, price: float) -> Plan:
        """The plan that no other undercuts by cost + price * multiply-adds."""
        value, choices, widths = np.zeros(len(self.counts)), [], []
        for index in reversed(range(self.anatomy.depth)):
            attention, mlp = self._attention(index, price), self._mlp(index, price)
            widths.append((attention[1:], mlp[1]))
            total = attention[0][:, None] + mlp[0][None] + value[None]
            total = (
                total
                + self.removal[index]
                + price * (self.reduction + self.allowed_widths[index].reduction * self.reduces)
            )
            choices.append(total.argmin(axis=1))
            value = total.min(axis=1)
        blocks, here = [], len(self.counts) - 1
        for index, (choice, ((qk, v), hidden)) in enumerate(zip(reversed(choices), reversed(widths), strict=True)):
            after = int(choice[here])
            blocks.append(self._block(index, int(qk[here]), int(v[here]), int(hidden[after]), self.counts[after]))
            here = after
        return Plan(
            blocks=tuple(blocks), cutoff_token=self.profile.cutoff_token, token_reduction=self.profile.token_reduction
        )

    def cost(self, plan: Plan) -> float:
        """Predicted, in nats an image."""
        costs = block_costs(replace(self.profile, channel_scale=self.channel_scale), self.anatomy, plan)
        return sum(map(sum, costs))

    def _tokens(self, index: int) -> list[int]:
        """The counts, with the prefix tokens, at a block."""
        block = self.anatomy.blocks[index]
        return [block.num_prefix_tokens + min(count, block.num_patches) for count in self.counts]

    def _attention(self, index: int, price: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(counts,) least cost, and the widths that have it, by the number of tokens that enter."""
        block, curves = self.anatomy.blocks[index], self.profile.channels[index]
        a_channel = np.array([block.num_heads * channel_macs(block, tokens) for tokens in self._tokens(index)])
        qk, v = np.array(self.allowed_widths[index].attention).T
        cost = self.channel_scale * (curves.qk.numpy()[block.head_dim - qk] + curves.v.numpy()[block.head_dim - v])
        total = cost[None] + price * a_channel[:, None] * (qk + v)[None]
        best = total.argmin(axis=1)
        return total.min(axis=1), qk[best], v[best]

    def _mlp(self, index: int, price: float) -> tuple[np.ndarray, np.ndarray]:
        """(counts,) least cost, and the hidden units that have it, by the number of tokens that leave attention."""
        block, tokens = self.anatomy.blocks[index], np.array(self._tokens(index))
        widths = np.array(self.allowed_widths[index].hidden)
        cost = self.channel_scale * self.profile.channels[index].hidden.numpy()[block.num_hidden - widths]
        total = cost[None] + price * (2 * tokens * block.width)[:, None] * widths[None]
        return total.min(axis=1), widths[total.argmin(axis=1)]

    def _removal_costs(self, index: int) -> np.ndarray:
        """(counts in, counts out): what the removal of tokens costs; infinite where they would grow."""
        if not self.has_tokens:
            return np.zeros((1, 1))
        counts = np.array(self.counts)
        shares = 1 - counts[None] / counts[:, None]
        costs = _cost_at(self.profile.tokens[index], np.clip(shares, 1e-9, None))
        return np.where(shares > 0, self.profile.token_scale * costs, np.where(shares < 0, np.inf, 0.0))

    def _reduction_macs(self) -> np.ndarray:
        """(counts in, counts out): multiply-adds of the reduction itself."""
        block, macs = self.anatomy.blocks[0], np.zeros((len(self.counts), len(self.counts)))
        for row, entering in enumerate(self.counts):
            for column, leaving in enumerate(self.counts[:row]):
                shape = BlockShape(
                    num_heads=block.num_heads, qk_width=block.head_dim, v_width=block.head_dim,
                    num_hidden=block.num_hidden, num_tokens=leaving,
                )  # fmt: skip
                macs[row, column] = reduction_macs(block, shape, entering, self.profile.token_reduction)
        return macs

    def _block(self, index: int, qk: int, v: int, hidden: int, num_tokens: int) -> BlockPlan:
        curves, block = self.profile.channels[index], self.anatomy.blocks[index]
        return BlockPlan(
            keep_heads=tuple(range(block.num_heads)),
            keep_qk=_kept(curves.qk_order, qk),
            keep_v=_kept(curves.v_order, v),
            keep_hidden=tuple(curves.hidden_order[block.num_hidden - hidden :].sort().values.tolist()),
            num_tokens=min(num_tokens, block.num_patches),
        )


def block_costs(profile: Profile, anatomy: Anatomy, plan: Plan) -> list[tuple[float, float]]:
    """The predicted cost of each block's channels, and of its tokens, in nats an image.

    Args:
        anatomy: of the profiled model, or of its first blocks behind an exit.
    """
    costs, entering = [], anatomy.blocks[0].num_patches
    for block, kept, curves, tokens in zip(anatomy.blocks, plan.blocks, profile.channels, profile.tokens, strict=False):
        shape, of_tokens = kept.shape, 0.0
        of_channels = float(curves.qk[block.head_dim - shape.qk_width] + curves.v[block.head_dim - shape.v_width])
        of_channels += float(curves.hidden[block.num_hidden - shape.num_hidden])
        if tokens and shape.num_tokens < entering:
            of_tokens = float(_cost_at(tokens, np.array(1 - shape.num_tokens / entering)))
        costs.append((profile.channel_scale * of_channels, profile.token_scale * of_tokens))
        entering = shape.num_tokens
    return costs


def _kept(order: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """(H, D) by which goes first -> the `count` last of every head, ascending."""
    return tuple(tuple(row[len(row) - count :].sort().values.tolist()) for row in order)


def _cost_at(costs: Sequence[float], shares: np.ndarray) -> np.ndarray:
    """The costs at any shares of removed tokens: a power law between the measured ones, and beyond the last."""
    known, values = np.log(np.array(SHARES)), np.log(np.maximum(np.array(costs), 1e-7))
    places = np.clip(np.searchsorted(known, np.log(shares)) - 1, 0, len(SHARES) - 2)
    slopes = (values[1:] - values[:-1]) / (known[1:] - known[:-1])
    return np.exp(values[places] + slopes[places] * (np.log(shares) - known[places]))
