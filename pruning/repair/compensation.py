"""Closed-form repair of a pruned block: no gradient, milliseconds.

Everything is fitted on calibration images that come through the model as it is pruned so far, towards what the dense
model gives for the same images (CORP, arXiv 2602.05243, is the reference for both parts):

- Queries and keys meet only in their product. The K channels a head keeps are refitted to the best rank-K logits:
  with second moments S_q, S_k and the singular value decomposition S_q^(1/2) S_k^(1/2) = U s V^T,
  q' = s^(1/2) U_K^T S_q^(-1/2) q and k' = s^(1/2) V_K^T S_k^(-1/2) k. Keys count from their mean over the image's
  tokens, since softmax does not see what is added to all logits of a query.
- Values are mixed by attention, channel by channel, before the projection P sees them; so any V directions of a head
  may be kept: those of largest share in M^(1/2) P_h C_h^(1/2), M the metric of the loss, C_h the head's covariance.
- The projection, which keeps some directions of the values, and the second MLP layer, which keeps some hidden units,
  are refitted by ridge regressions (`pruning.repair.regression`). Each ridge is chosen on held-out images; where none
  helps there, only the bias is repaired.

B images, N tokens, C model width, H heads, H' kept heads, D dense head width, n features, k kept features.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.model.anatomy import examine, parts_of, with_blocks
from pruning.model.layers import SlimBlock
from pruning.model.surgery import as_slim, check_plan, keep_all_block
from pruning.plan import BlockPlan, Plan
from pruning.precision import Precision, autocast
from pruning.repair.flow import BlockBatch, CalibrationStream, sample_tokens
from pruning.repair.moments import Moments
from pruning.repair.regression import fit_layer, matrix_power
from pruning.repair.sensitivity import BlockSensitivity, StreamSensitivity, measure_sensitivity

REPAIR_PASSES = 7
"""Forward passes over the calibration images that `repaired_model` costs: sensitivity 3, dense stream 1, moments 2,
pruned stream 1."""


@dataclass(frozen=True, kw_only=True)
class RepairedBlock:
    """A pruned block after its repair."""

    block: nn.Module
    notes: tuple[str, ...] = ()
    """The layers of which only the bias could be repaired, for want of images."""


class BlockRepair:
    """Repairs plans of a stream's current block, and remembers what several plans have in common.

    A repair is for one block: once the stream moves on, a new one is made.
    """

    def __init__(self, stream: CalibrationStream) -> None:
        self.stream, self.index = stream, stream.index
        self._factors: tuple[Tensor, Tensor] | None = None
        self._attentions: dict[tuple[object, ...], tuple[dict[str, Tensor], list[str]]] = {}

    @torch.no_grad()
    def repair(self, plan: BlockPlan) -> RepairedBlock:
        """Cuts the block to a plan and repairs it, unless all of it stays."""
        assert self.index == self.stream.index, "the stream has moved on to another block"
        block = self.stream.slim(plan)
        if plan == keep_all_block(self.stream.anatomy, self.stream.num_tokens):
            return RepairedBlock(block=block)
        assert isinstance(block, SlimBlock)
        notes = self._repair_attention(block, plan) + _refit_mlp(self.stream, block, plan)
        return RepairedBlock(block=block, notes=tuple(f"block {self.index} {note}" for note in notes))

    def has_attention(self, plan: BlockPlan) -> bool:
        """Tells whether the attention that `repair` gives this plan was fitted before, for another plan."""
        return self._attention_key(plan) in self._attentions

    def _attention_key(self, plan: BlockPlan) -> tuple[object, ...]:
        shape = plan.shape  # which channels are kept does not matter: all are combined anew
        return plan.keep_heads, shape.qk_width, shape.v_width, plan.num_tokens < self.stream.num_tokens

    def _repair_attention(self, block: SlimBlock, plan: BlockPlan) -> list[str]:
        key = self._attention_key(plan)
        if key not in self._attentions:
            is_narrow = plan.shape.qk_width < self.stream.anatomy.head_dim
            notes = _refit_attention(self.stream, block, plan, self.logit_factors() if is_narrow else None)
            self._attentions[key] = {name: value.clone() for name, value in block.attn.state_dict().items()}, notes
        weights, notes = self._attentions[key]
        block.attn.load_state_dict(weights)
        return list(notes)

    @torch.no_grad()
    def logit_factors(self) -> tuple[Tensor, Tensor]:
        """The best combinations of query and of key channels, (H, D, D) each, the one that counts most first.

        They are the same for every plan of the block.
        """
        assert self.index == self.stream.index, "the stream has moved on to another block"
        if self._factors is None:
            self._factors = _logit_factors(self.stream)
        return self._factors


def repair_block(stream: CalibrationStream, plan: BlockPlan) -> RepairedBlock:
    """Cuts the stream's current block to a plan and repairs it, unless all of it stays."""
    return BlockRepair(stream).repair(plan)


@dataclass(frozen=True, kw_only=True)
class _LayerRepair:
    """The repair of one linear layer y = W f + b: what was observed of it so far, and where the result goes."""

    name: str
    dense: nn.Linear
    slim: nn.Linear
    """The layer to write the result to."""
    weight: Tensor
    """(C, n): the dense weight on the features that are observed."""
    gain: Tensor
    """(C,): what the layer's output is multiplied by before it is added to the stream."""
    sensitivity: StreamSensitivity
    """The sensitivity of the stream where the layer's output is added."""
    token_weights: Tensor
    """(N,): how much an error in each token counts."""
    moments: Moments = field(default_factory=Moments)

    def observe(self, batch: BlockBatch, features: Tensor, dense_output: Tensor, drift: Tensor) -> None:
        """Takes in a batch.

        Args:
            features: (B, N, n).
            dense_output: (B, N, C), the dense layer's output for the same tokens.
            drift: (B, N, C), what the stream lacks of the dense one after this output is added.
        """
        bias = 0.0 if self.dense.bias is None else self.dense.bias
        lost = dense_output - bias - features @ self.weight.T
        # The layer cannot make up where its gain is (nearly) none.
        drift = torch.where(self.gain.abs() > 1e-6, drift / self.gain, 0.0)
        self.moments.add(*sample_tokens(batch, self.token_weights, features, lost, drift))

    def refit(self, combinations: Tensor | None = None) -> list[str]:
        """Writes the repaired weight and bias; the layer keeps `combinations @ f`, or all of f. Returns notes."""
        gain = self.gain.double()
        metric = gain[:, None] * self.sensitivity.metric * gain
        fit = fit_layer(self.weight, self.dense.bias, combinations, self.moments, metric)
        self.slim.weight.copy_(fit.weight)
        if fit.bias is not None:
            self.slim.bias.copy_(fit.bias)
        return [f"{self.name}: only the bias is repaired"] if fit.is_loss_left else []


def _refit_attention(
    stream: CalibrationStream, slim: SlimBlock, plan: BlockPlan, factors: tuple[Tensor, Tensor] | None
) -> list[str]:
    """Refits queries and keys, then values and projection, in place.

    Args:
        slim: the block, cut to the plan.
        factors: logit factors where the plan drops query/key channels.
    """
    anatomy, dense_block, sensitivity = (
        stream.anatomy,
        stream.blocks[stream.index],
        stream.sensitivity[stream.index].mid,
    )
    dense, heads = parts_of(dense_block), torch.tensor(plan.keep_heads, device=stream.x.device)
    wide = stream.slim(replace(plan, keep_v=(tuple(range(anatomy.head_dim)),) * len(heads)))
    if not isinstance(wide, SlimBlock):
        wide = as_slim(wide, anatomy, is_last=slim.is_last)
    for part, factor in enumerate(factors or ()):
        rows = _recombined(dense.qkv, part, factor[heads, : plan.shape.qk_width], heads)
        for block in (wide, slim):
            _write_rows(block.attn.qkv, part * rows[0].shape[0], *rows)

    columns = (heads[:, None] * anatomy.head_dim + torch.arange(anatomy.head_dim, device=heads.device)).flatten()
    gain = dense.ls1(torch.ones(anatomy.width, device=heads.device))
    layer = _LayerRepair(
        name="projection", dense=dense.proj, slim=slim.attn.proj, weight=dense.proj.weight[:, columns], gain=gain,
        sensitivity=sensitivity,
        token_weights=sensitivity.token_weights(stream.num_all_tokens, anatomy.num_prefix_tokens),
    )  # fmt: skip
    dense_slim = as_slim(dense_block, anatomy, is_last=slim.is_last)
    with autocast(stream.x.device, stream.precision):
        for batch, dense_batch in zip(stream.batches(wide), stream.batches(dense_slim), strict=True):
            dense_output = dense.proj(dense_batch.mixed).float()
            layer.observe(batch, batch.mixed.float(), dense_output, batch.mid_drift(gain * dense_output))

    covariance = layer.moments.covariance()
    directions = _value_directions(covariance, layer.weight * gain[:, None], sensitivity.metric, len(heads))
    directions = directions[:, : plan.shape.v_width]
    rows = _recombined(dense.qkv, 2, directions, heads)
    _write_rows(slim.attn.qkv, slim.attn.qkv.out_features - rows[0].shape[0], *rows)
    return layer.refit(torch.block_diag(*directions))


def _refit_mlp(stream: CalibrationStream, slim: SlimBlock, plan: BlockPlan) -> list[str]:
    """Refits the second layer, in place, on the stream as the repaired attention leaves it."""
    dense, sensitivity = parts_of(stream.blocks[stream.index]), stream.sensitivity[stream.index].out
    num_prefix, units = stream.anatomy.num_prefix_tokens, torch.tensor(plan.keep_hidden, device=stream.x.device)
    gain = dense.ls2(torch.ones(stream.anatomy.width, device=stream.x.device))
    layer = _LayerRepair(
        name="second MLP layer", dense=dense.fc2, slim=slim.mlp.fc2, weight=dense.fc2.weight[:, units], gain=gain,
        sensitivity=sensitivity, token_weights=sensitivity.token_weights(plan.num_tokens + num_prefix, num_prefix),
    )  # fmt: skip
    with autocast(stream.x.device, stream.precision):
        for batch in stream.batches(slim):
            batch.reduce()
            hidden = dense.act(dense.fc1(dense.norm2(batch.x)))
            dense_output = dense.fc2(hidden).float()
            layer.observe(batch, hidden[..., units].float(), dense_output, batch.out_drift(gain * dense_output))
    return layer.refit()


def _logit_factors(stream: CalibrationStream) -> tuple[Tensor, Tensor]:
    anatomy, block = stream.anatomy, as_slim(stream.blocks[stream.index], stream.anatomy, is_last=False)
    sensitivity, shape = stream.sensitivity[stream.index].mid, (anatomy.num_heads, anatomy.head_dim, anatomy.head_dim)
    weights = sensitivity.token_weights(stream.num_all_tokens, anatomy.num_prefix_tokens)
    query_moments, key_moments = torch.zeros(2, *shape, dtype=torch.float64, device=stream.x.device)
    with autocast(stream.x.device, stream.precision):
        for batch in stream.batches(block):
            q, k = batch.state.q.float(), batch.state.k.float()
            k = k - k.mean(dim=2, keepdim=True)
            # Tokens of one window are all patches, which weigh the same.
            query_weights = weights[:, None] if len(weights) == q.shape[2] else 1 / q.shape[2]
            query_moments = query_moments + ((q * query_weights).transpose(-2, -1) @ q).double().sum(dim=0)
            key_moments = key_moments + (k.transpose(-2, -1) @ k).double().sum(dim=0) / k.shape[2]
    query_factors, key_factors = [], []
    for queries, keys in zip(query_moments / len(stream.x), key_moments / len(stream.x), strict=True):
        left, strength, right = torch.linalg.svd(matrix_power(queries, 0.5) @ matrix_power(keys, 0.5))
        root = strength.sqrt()[:, None]
        query_factors.append(root * left.T @ matrix_power(queries, -0.5))
        key_factors.append(root * right @ matrix_power(keys, -0.5))
    return torch.stack(query_factors), torch.stack(key_factors)


def _value_directions(covariance: Tensor, projection: Tensor, metric: Tensor, num_heads: int) -> Tensor:
    """The value directions of every head, (H', D, D), the one that counts most first.

    Args:
        covariance: (H'*D, H'*D) of the mixed values.
        projection: (C, H'*D), with the gain of its outputs.
        metric: (C, C) of an error in the stream.
    """
    head_dim = projection.shape[1] // num_heads
    outer, directions = matrix_power(metric, 0.5), []
    for head in range(num_heads):
        of_head = slice(head * head_dim, (head + 1) * head_dim)
        inner = covariance[of_head, of_head]
        shares = outer @ projection[:, of_head].double() @ matrix_power(inner, 0.5)
        directions.append(torch.linalg.svd(shares, full_matrices=True)[2] @ matrix_power(inner, -0.5))
    return torch.stack(directions)


def _recombined(qkv: nn.Linear, part: int, factor: Tensor, heads: Tensor) -> tuple[Tensor, Tensor | None]:
    """Combines the channels of q (part 0), k or v: factor (H', K, D) -> rows (H'*K, C) and their biases (H'*K,)."""
    head_dim = factor.shape[2]
    weight = qkv.weight.unflatten(0, (3, -1, head_dim))[part, heads].double()
    rows = (factor.double() @ weight).flatten(0, 1)
    qkv_bias: Tensor | None = qkv.bias
    if qkv_bias is None:
        return rows, None
    bias = qkv_bias.unflatten(0, (3, -1, head_dim))[part, heads].double()
    return rows, (factor.double() @ bias[..., None]).flatten()


def _write_rows(layer: nn.Linear, start: int, rows: Tensor, bias: Tensor | None) -> None:
    layer.weight[start : start + len(rows)] = rows.to(layer.weight.dtype)
    if bias is not None:
        layer.bias[start : start + len(rows)] = bias.to(layer.bias.dtype)


@dataclass(frozen=True, kw_only=True)
class RepairedModel:
    """A pruned and repaired model."""

    model: nn.Module
    notes: tuple[str, ...]
    """The layers of which only the bias could be repaired."""


def repaired_model(
    model: nn.Module,
    plan: Plan,
    images: Images,
    sensitivity: list[BlockSensitivity] | None = None,
    *,
    batch_size: int = 64,
    precision: Precision = "float32",
) -> RepairedModel:
    """Does what `apply_plan` does, and repairs every pruned block on these images, from the first block to the last.

    The cascade does the same on its way, so plan and calibration images give its model again.

    Args:
        model: a dense model of `plan.exit_block` blocks, in eval mode.
        sensitivity: of the dense model on these images; measured if it is not given.

    Raises:
        PlanError: the plan does not fit the model, as for `apply_plan`.
    """
    check_plan(plan, examine(model))
    if sensitivity is None:
        sensitivity = measure_sensitivity(model, images, batch_size=batch_size, precision=precision)
    stream = CalibrationStream(
        model, images, sensitivity, token_reduction=plan.token_reduction, cutoff_token=plan.cutoff_token,
        batch_size=batch_size, precision=precision,
    )  # fmt: skip
    blocks: list[nn.Module] = []
    notes: list[str] = []
    for block_plan in plan.blocks:
        repaired = repair_block(stream, block_plan)
        blocks.append(repaired.block)
        notes += repaired.notes
        stream.advance(repaired.block)
    return RepairedModel(model=with_blocks(model, blocks), notes=tuple(notes))
