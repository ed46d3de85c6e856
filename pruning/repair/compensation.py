"""Closed-form repair of a pruned block: no gradient, milliseconds.

Everything is fitted on calibration images that come through the model as it is pruned so far, towards what the dense
model gives for the same images (CORP, arXiv 2602.05243, is the reference for both parts):

- Queries and keys meet only in their product. The K channels a head keeps are refitted to the best rank-K logits:
  with second moments S_q, S_k and the singular value decomposition S_q^(1/2) S_k^(1/2) = U s V^T,
  q' = s^(1/2) U_K^T S_q^(-1/2) q and k' = s^(1/2) V_K^T S_k^(-1/2) k. Keys count from their mean over the image's
  tokens, since softmax does not see what is added to all logits of a query.
- Values are mixed by attention, channel by channel, before the projection P sees them; so any V directions of a head
  may be kept: those of largest share in M^(1/2) P_h C_h^(1/2), M the metric of the loss, C_h the head's covariance.
- A linear layer y = W f + b that keeps only features g of f (a part of the hidden units; the kept directions of the
  values) becomes W' = W_0 + (W f - W_0 g regressed on g) + (drift regressed on g). The drift is what the dense
  stream has and the pruned one lacks at this place, due to all that was pruned before. Each regression has a ridge,
  chosen on held-out images; where no ridge helps there, only the bias is repaired.

B images, N tokens, C model width, H heads, D dense head width, n features, k kept features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.device_sharing import yielding_between
from pruning.model.anatomy import BlockAnatomy, blocks_of, embed, examine, parts_of, with_blocks
from pruning.model.layers import SlimBlock
from pruning.model.surgery import as_slim, check_plan, keep_all_block, slim_block
from pruning.plan import BlockPlan, Plan, TokenReduction
from pruning.precision import Precision, autocast
from pruning.repair.moments import Moments
from pruning.repair.sensitivity import BlockSensitivity, StreamSensitivity, measure_sensitivity

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Tried for every regression, as shares of the features' mean variance."""

PATCH_SAMPLES = 48
"""Patches of an image that are looked at, at least (if it has as many): neighbours tell much the same."""

REPAIR_PASSES = 7
"""Forward passes over the calibration images that `repaired_model` costs: sensitivity 3, dense stream 1, moments 2,
pruned stream 1."""

HELD_EVERY = 4
"""Every fourth calibration image is held out to choose the ridge, then joins the others for the fit."""


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """A block after the repair."""

    block: nn.Module
    notes: tuple[str, ...] = ()
    """Layers of which only the bias could be repaired, for want of images."""


class CalibrationStream:
    """The calibration images on their way through the blocks: as pruned so far, and dense, side by side."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        sensitivity: list[BlockSensitivity],
        *,
        token_reduction: TokenReduction,
        cutoff_token: float,
        batch_size: int = 64,
        precision: Precision = "float32",
    ) -> None:
        """model: dense, in eval mode, on the device to work on."""
        self.anatomies, self.sensitivity = examine(model).blocks, sensitivity
        self.token_reduction, self.cutoff_token = token_reduction, cutoff_token
        self.batch_size, self.precision = batch_size, precision
        self.blocks = list(blocks_of(model))
        device = next(model.parameters()).device
        with torch.no_grad(), autocast(device, precision):
            self.x = torch.cat([embed(model, batch).float() for batch, _ in images.batches(batch_size, device)])
        """(B, N', C), or (B, N', C + 1) with sizes: what the pruned model's block before the current one passes on."""
        self.share: Tensor | None = None
        """(B, N', N): what each token is made of; None while it is the same tokens."""
        self.is_held = torch.arange(len(self.x), device=device) % HELD_EVERY == HELD_EVERY - 1
        self._enter(0, self.x)

    @torch.no_grad()
    def _enter(self, index: int, dense: Tensor) -> None:
        self.index = index
        self._factors: tuple[Tensor, Tensor] | None = None
        self._attentions: dict[tuple[object, ...], tuple[dict[str, Tensor], list[str]]] = {}
        block = as_slim(self.blocks[index], self.anatomy, is_last=False)
        with autocast(dense.device, self.precision):
            mids, outs = zip(*(block.halves(x) for x in yielding_between(dense.split(self.batch_size))), strict=True)
        self.dense_mid, self.dense_out = torch.cat(mids).float(), torch.cat(outs).float()

    def copy(self) -> CalibrationStream:
        """The images where they are now; nothing fitted for the current block."""
        made = copy.copy(self)
        made._factors, made._attentions = None, {}
        return made

    @property
    def anatomy(self) -> BlockAnatomy:
        """Of the current block."""
        return self.anatomies[self.index]

    @property
    def num_tokens(self) -> int:
        """Patches that the current block's attention sees."""
        return min(self.x.shape[1] - self.anatomy.num_prefix_tokens, self.anatomy.num_patches)

    @property
    def num_all_tokens(self) -> int:
        """The same with the prefix tokens."""
        return self.num_tokens + self.anatomy.num_prefix_tokens

    def slim(self, plan: BlockPlan) -> nn.Module:
        """The current block by a plan, not repaired."""
        return slim_block(
            self.blocks[self.index], plan, self.anatomy, num_tokens_in=self.num_tokens,
            token_reduction=self.token_reduction, cutoff_token=self.cutoff_token,
            is_last=self.index == len(self.blocks) - 1,
        )  # fmt: skip

    @torch.no_grad()
    def repaired(self, plan: BlockPlan) -> Repaired:
        """The current block by a plan; repaired, unless all of it stays."""
        block = self.slim(plan)
        if plan == keep_all_block(self.anatomy, self.num_tokens):
            return Repaired(block=block)
        assert isinstance(block, SlimBlock)
        notes = self._repair_attention(block, plan) + _repair_mlp(self, block, plan)
        return Repaired(block=block, notes=tuple(f"block {self.index} {note}" for note in notes))

    def knows_attention(self, plan: BlockPlan) -> bool:
        """The attention that `repaired` would give this plan was fitted before, for another."""
        return self._attention_key(plan) in self._attentions

    def _attention_key(self, plan: BlockPlan) -> tuple[object, ...]:
        shape = plan.shape  # which channels are kept does not matter: all are combined anew
        return plan.keep_heads, shape.qk_width, shape.v_width, plan.num_tokens < self.num_tokens

    def _repair_attention(self, block: SlimBlock, plan: BlockPlan) -> list[str]:
        key = self._attention_key(plan)
        if key not in self._attentions:
            notes = _repair_attention(self, block, plan)
            self._attentions[key] = {name: value.clone() for name, value in block.attn.state_dict().items()}, notes
        weights, notes = self._attentions[key]
        block.attn.load_state_dict(weights)
        return list(notes)

    @torch.no_grad()
    def logit_factors(self) -> tuple[Tensor, Tensor]:
        """Best combinations of query and of key channels, (H, D, D) each, the one that counts most first.

        The same for every plan.
        """
        if self._factors is None:
            self._factors = _logit_factors(self)
        return self._factors

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Takes the images through the finished block, on to the next."""
        after, shares = [], []
        with autocast(self.x.device, self.precision):
            for stage in self.stages(block):
                after.append(stage.finish().float())
                if stage.share is not None:
                    shares.append(stage.share)
        self.x, self.share = torch.cat(after), torch.cat(shares) if shares else None
        if self.index + 1 < len(self.blocks):
            self._enter(self.index + 1, self.dense_out)

    def turn_to(self, index: int, x: Tensor) -> None:
        """Puts the images before any block. x: (B, N, C), what the dense model gives there."""
        self.x, self.share = x, None
        self._enter(index, x)

    def stages(self, block: nn.Module) -> Iterator[BlockBatch]:
        """The images in batches, each halted after the attention of the current block."""
        if not isinstance(block, SlimBlock):
            block = as_slim(block, self.anatomy, is_last=self.index == len(self.blocks) - 1)
        for start in yielding_between(range(0, len(self.x), self.batch_size)):
            yield BlockBatch(self, block, slice(start, start + self.batch_size))


class BlockBatch:
    """A batch on its way through one slim block."""

    def __init__(self, flow: CalibrationStream, block: SlimBlock, batch: slice) -> None:
        self.flow, self.block, self.batch = flow, block, batch
        self.x, size = block.enter(flow.x[batch])
        self.mixed, self.clues = block.attend(self.x, size)
        """(B, N, H*V): what the attention's projection takes."""
        self.share = None if flow.share is None else flow.share[batch]

    def mid_drift(self, projected: Tensor) -> Tensor:
        """What the stream lacks after attention, if `projected` is added. (B, N, C)."""
        target = self.flow.dense_mid[self.batch]
        target = target if self.share is None else self.share @ target
        return target - self.x - projected

    def reduce(self) -> None:
        """Adds the attention and reduces the tokens."""
        block, x = self.block, self.x + self.block.ls1(self.block.attn.proj(self.mixed))
        num_all = self.flow.dense_mid.shape[1]
        self.x, self.size, reduced = block.reduce(x, self.clues)
        if reduced is not None:
            share = torch.eye(num_all, device=x.device).expand(len(x), -1, -1) if self.share is None else self.share
            self.share = reduced.apply(share)

    def out_drift(self, added: Tensor) -> Tensor:
        """What the stream lacks after the MLP, if `added` is added. (B, N', C)."""
        target = self.flow.dense_out[self.batch]
        target = target if self.share is None else self.share @ target
        return target - self.x - added

    def finish(self) -> Tensor:
        """What the block passes on."""
        self.reduce()
        block = self.block
        return block.pack(self.x + block.ls2(block.mlp(block.norm2(self.x))), self.size)


def _repair_attention(flow: CalibrationStream, slim: SlimBlock, plan: BlockPlan) -> list[str]:
    """Refits queries and keys, then values and projection, in place."""
    anatomy, dense_block = flow.anatomy, flow.blocks[flow.index]
    dense, place = parts_of(dense_block), flow.sensitivity[flow.index].mid
    heads = torch.tensor(plan.keep_heads, device=flow.x.device)
    wide_plan = replace(plan, keep_v=(tuple(range(anatomy.head_dim)),) * len(heads))
    wide = flow.slim(wide_plan)
    if not isinstance(wide, SlimBlock):
        wide = as_slim(wide, anatomy, is_last=slim.is_last)
    if plan.shape.qk_width < anatomy.head_dim:
        for part, factor in enumerate(flow.logit_factors()):
            rows = _recombined(dense.qkv, part, factor[heads, : plan.shape.qk_width], heads)
            for block in (wide, slim):
                _write_rows(block.attn.qkv, part * rows[0].shape[0], *rows)

    whole = as_slim(dense_block, anatomy, is_last=slim.is_last)
    columns = (heads[:, None] * anatomy.head_dim + torch.arange(anatomy.head_dim, device=heads.device)).flatten()
    projection = dense.proj.weight[:, columns]
    gain = dense.ls1(torch.ones(anatomy.width, device=heads.device))
    moments, weights = Moments(), place.token_weights(flow.num_all_tokens, anatomy.num_prefix_tokens)
    with autocast(flow.x.device, flow.precision):
        for stage, dense_stage in zip(flow.stages(wide), flow.stages(whole), strict=True):
            kept, given = stage.mixed.float(), dense.proj(dense_stage.mixed).float()
            lost = given - _bias(dense.proj) - kept @ projection.T
            drift = _divided(stage.mid_drift(gain * given), gain)
            moments.add(*samples(stage, weights, kept, lost, drift))

    values = _value_directions(moments.covariance(), projection * gain[:, None], place.metric, len(heads))
    values = values[:, : plan.shape.v_width]
    rows = _recombined(dense.qkv, 2, values, heads)
    _write_rows(slim.attn.qkv, slim.attn.qkv.out_features - rows[0].shape[0], *rows)
    return _refit(slim.attn.proj, dense.proj, projection, torch.block_diag(*values), moments, place, gain, "projection")


def _logit_factors(flow: CalibrationStream) -> tuple[Tensor, Tensor]:
    anatomy, block = flow.anatomy, as_slim(flow.blocks[flow.index], flow.anatomy, is_last=False)
    weights = flow.sensitivity[flow.index].mid.token_weights(flow.num_all_tokens, anatomy.num_prefix_tokens)
    zero = torch.zeros(anatomy.num_heads, anatomy.head_dim, anatomy.head_dim, dtype=torch.float64, device=flow.x.device)
    of_queries, of_keys = zero, zero
    with autocast(flow.x.device, flow.precision):
        for stage in flow.stages(block):
            q, k = stage.clues.q.float(), stage.clues.k.float()
            k = k - k.mean(dim=2, keepdim=True)
            # Tokens of one window are all patches, which weigh the same.
            of_each = weights[:, None] if len(weights) == q.shape[2] else 1 / q.shape[2]
            of_queries = of_queries + ((q * of_each).transpose(-2, -1) @ q).double().sum(dim=0)
            of_keys = of_keys + (k.transpose(-2, -1) @ k).double().sum(dim=0) / k.shape[2]
    factors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for queries, keys in zip(of_queries / len(flow.x), of_keys / len(flow.x), strict=True):
        left, strength, right = torch.linalg.svd(matrix_power(queries, 0.5) @ matrix_power(keys, 0.5))
        root = strength.sqrt()[:, None]
        factors[0].append(root * left.T @ matrix_power(queries, -0.5))
        factors[1].append(root * right @ matrix_power(keys, -0.5))
    return torch.stack(factors[0]), torch.stack(factors[1])


def _repair_mlp(flow: CalibrationStream, slim: SlimBlock, plan: BlockPlan) -> list[str]:
    """Refits the second layer, in place, on the stream as the repaired attention leaves it."""
    dense, place = parts_of(flow.blocks[flow.index]), flow.sensitivity[flow.index].out
    kept_units = torch.tensor(plan.keep_hidden, device=flow.x.device)
    gain = dense.ls2(torch.ones(flow.anatomy.width, device=flow.x.device))
    moments = Moments()
    weights = place.token_weights(plan.num_tokens + flow.anatomy.num_prefix_tokens, flow.anatomy.num_prefix_tokens)
    with autocast(flow.x.device, flow.precision):
        for stage in flow.stages(slim):
            stage.reduce()
            hidden = dense.act(dense.fc1(dense.norm2(stage.x)))
            given, kept = dense.fc2(hidden).float(), hidden[..., kept_units].float()
            lost = given - _bias(dense.fc2) - kept @ dense.fc2.weight[:, kept_units].T
            drift = _divided(stage.out_drift(gain * given), gain)
            moments.add(*samples(stage, weights, kept, lost, drift))
    weight = dense.fc2.weight[:, kept_units]
    return _refit(slim.mlp.fc2, dense.fc2, weight, None, moments, place, gain, "second MLP layer")


def _refit(
    slim: nn.Linear, dense: nn.Linear, weight: Tensor, features: Tensor | None, moments: Moments,
    place: StreamSensitivity, gain: Tensor, name: str,
) -> list[str]:  # fmt: skip
    """Writes W' and b' of a layer whose kept inputs are `features @ f`.

    Args:
        weight: (C, n) of the dense layer on f.
        features: (k, n), or None for f itself.
        moments: of [f, lost, drift]; lost = dense output - weight @ f, without the bias.
    """
    start, num_targets = weight.double(), len(weight)
    transform = None
    if features is not None:
        features = features.double()
        start = start @ torch.linalg.pinv(features)
        eye = torch.eye(2 * num_targets, dtype=start.dtype, device=start.device)
        transform = torch.block_diag(features, eye)
        transform[len(features) : len(features) + num_targets, : weight.shape[1]] = weight.double() - start @ features
    num_features = start.shape[1]
    seconds = {part: _Second.of(moments, part, transform, centred=dense.bias is not None) for part in (0, 1, None)}
    metric = gain.double()[:, None] * place.metric * gain.double()
    slopes, notes = start, []
    second = seconds[None].moment
    kept, lost = second[:num_features, :num_features], second.diagonal()[num_features:][:num_targets].sum()
    for first, what in ((num_features, "lost"), (num_features + num_targets, "drift")):
        target = slice(first, first + num_targets)
        slope = regression(seconds, num_features, target, metric) if moments.has_held else None
        if slope is None:
            # More than rounding, also of bfloat16: a layer that loses nothing needs no note.
            is_lost = what == "lost" and lost > 1e-4 * (lost + ((start @ kept) * start).sum())
            notes += [f"{name}: only the bias is repaired"] if is_lost else []
        else:
            slopes = slopes + slope
    slim.weight.copy_(slopes)
    if dense.bias is not None and slim.bias is not None:
        mean = seconds[None].mean
        wanted = start @ mean[:num_features] + mean[num_features:].view(2, -1).sum(dim=0)
        slim.bias.copy_(dense.bias.double() + wanted - slopes @ mean[:num_features])
    return notes


@dataclass(frozen=True)
class _Second:
    """Mean and second moment of [features, target 0, target 1], float64."""

    mean: Tensor
    """Taken as 0 where the layer has no bias, so that the line must go through 0."""
    moment: Tensor
    """Around this mean."""

    @classmethod
    def of(cls, moments: Moments, part: int | None, transform: Tensor | None, *, centred: bool) -> _Second:
        mean, moment = moments.mean(part), moments.covariance(part)
        if transform is not None:
            mean, moment = transform @ mean, transform @ moment @ transform.T
        return cls(mean, moment) if centred else cls(torch.zeros_like(mean), moment + mean[:, None] * mean)


def regression(seconds: dict[int | None, _Second], num_features: int, target: slice, metric: Tensor) -> Tensor | None:
    """The slope of a target on the features, of the ridge that does best on the held-out samples.

    Args:
        seconds: of the samples to fit on (0), of those held out (1), and of all (None).
        target: which of the moments' rows.
        metric: (C, C) of an error.

    Returns:
        (C, k), or None where no slope does better than none.
    """

    def solve(second: Tensor, ridge: float) -> Tensor:
        inner = second[:num_features, :num_features]
        strength = (ridge * inner.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
        factor, failed = torch.linalg.cholesky_ex(inner + strength * torch.eye(num_features, device=inner.device))
        slope = torch.cholesky_solve(second[:num_features, target], factor).T
        return slope if not failed and bool(slope.isfinite().all()) else torch.zeros_like(slope)

    held = seconds[1].moment
    shift = seconds[1].mean - seconds[0].mean
    cross = held[:num_features, target] + shift[:num_features, None] * shift[target]
    own = held[:num_features, :num_features] + shift[:num_features, None] * shift[:num_features]

    def gain_of(slope: Tensor) -> float:
        """How much smaller the held-out error is than without a slope."""
        weighted = metric @ slope
        return float(2 * (weighted * cross.T).sum() - (weighted * (slope @ own)).sum())

    gains = {ridge: gain_of(solve(seconds[0].moment, ridge)) for ridge in RIDGES}
    best = max(gains, key=lambda ridge: gains[ridge])
    return solve(seconds[None].moment, best) if gains[best] > 0 else None


def _value_directions(covariance: Tensor, projection: Tensor, metric: Tensor, num_heads: int) -> Tensor:
    """(H, D, D): for every head its value directions, the one that counts most first."""
    head_dim = projection.shape[1] // num_heads
    outer, directions = matrix_power(metric, 0.5), []
    for head in range(num_heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        inner = covariance[own, own]
        vectors = torch.linalg.svd(outer @ projection[:, own].double() @ matrix_power(inner, 0.5), full_matrices=True)[
            2
        ]
        directions.append(vectors @ matrix_power(inner, -0.5))
    return torch.stack(directions)


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    """Of a symmetric matrix without negative eigenvalues; directions that are numerically zero stay zero."""
    values, vectors = torch.linalg.eigh(matrix)
    is_there = values > 1e-9 * values.amax().clamp_min(torch.finfo(matrix.dtype).tiny)
    return (vectors * torch.where(is_there, values.clamp_min(0) ** exponent, 0.0)) @ vectors.T


def _recombined(qkv: nn.Linear, part: int, factor: Tensor, heads: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows of q (part 0), k or v whose channels are combined: factor (H', K, D) -> (H'*K, C), (H'*K,)."""
    head_dim = factor.shape[2]
    weight = qkv.weight.unflatten(0, (3, -1, head_dim))[part, heads].double()
    rows = (factor.double() @ weight).flatten(0, 1)
    own: Tensor | None = qkv.bias
    if own is None:
        return rows, None
    bias = own.unflatten(0, (3, -1, head_dim))[part, heads].double()
    return rows, (factor.double() @ bias[..., None]).flatten()


def _write_rows(layer: nn.Linear, start: int, rows: Tensor, bias: Tensor | None) -> None:
    layer.weight[start : start + len(rows)] = rows.to(layer.weight.dtype)
    if bias is not None:
        layer.bias[start : start + len(rows)] = bias.to(layer.bias.dtype)


def _bias(layer: nn.Linear) -> Tensor | float:
    return 0.0 if layer.bias is None else layer.bias


def _divided(drift: Tensor, gain: Tensor) -> Tensor:
    """What a layer must give so that its gain makes the drift of it; nothing where the gain is (nearly) none."""
    return torch.where(gain.abs() > 1e-6, drift / gain, 0.0)


def samples(stage: BlockBatch, weights: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For `Moments.add`: the parts side by side, the tokens' weights, and which are held out.

    Of the patches of a batch no more than `PATCH_SAMPLES` are taken, spread evenly, and count more.
    """
    prefix = stage.flow.anatomy.num_prefix_tokens
    num_patches = parts[0].shape[1] - prefix
    step = max(1, num_patches // PATCH_SAMPLES)
    # Another start for each batch, so that no place in the image is left out.
    patches = torch.arange(stage.batch.start // stage.flow.batch_size % step, num_patches, step) + prefix
    tokens = torch.cat([torch.arange(prefix), patches]).to(weights.device)
    counts = weights[tokens].clone()
    counts[prefix:] *= num_patches / len(patches)
    samples = torch.cat([part[:, tokens] for part in parts], dim=-1)
    held = stage.flow.is_held[stage.batch]
    return samples.flatten(0, 1), counts.repeat(len(samples)), held.repeat_interleave(len(tokens))


@dataclass(frozen=True, kw_only=True)
class RepairedModel:
    """A pruned and repaired model."""

    model: nn.Module
    notes: tuple[str, ...]
    """Layers of which only the bias could be repaired."""


def repaired_model(
    model: nn.Module,
    plan: Plan,
    images: Images,
    sensitivity: list[BlockSensitivity] | None = None,
    *,
    batch_size: int = 64,
    precision: Precision = "float32",
) -> RepairedModel:
    """`apply_plan` with every pruned block repaired on these images, from the first block to the last.

    The cascade does the same on its way, so plan and calibration images give its model again.

    Args:
        model: a dense model of `plan.exit_block` blocks, in eval mode.
        sensitivity: of the dense model on these images; measured if it is not given.

    Raises:
        PlanError: as `apply_plan`.
    """
    check_plan(plan, examine(model))
    if sensitivity is None:
        sensitivity = measure_sensitivity(model, images, batch_size=batch_size, precision=precision)
    flow = CalibrationStream(
        model, images, sensitivity, token_reduction=plan.token_reduction, cutoff_token=plan.cutoff_token,
        batch_size=batch_size, precision=precision,
    )  # fmt: skip
    built: list[nn.Module] = []
    notes: list[str] = []
    for block_plan in plan.blocks:
        repaired = flow.repaired(block_plan)
        built.append(repaired.block)
        notes += repaired.notes
        flow.advance(repaired.block)
    return RepairedModel(model=with_blocks(model, built), notes=tuple(notes))
