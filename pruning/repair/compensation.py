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

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.data import Images
from pruning.model.anatomy import examine, parts_of, with_blocks
from pruning.model.layers import SlimAttention, SlimBlock, WindowedAttention
from pruning.model.surgery import as_slim, check_plan, keep_all_block
from pruning.plan import BlockPlan, Plan
from pruning.precision import Precision, autocast
from pruning.repair.flow import (
    BatchStore,
    BlockBatch,
    CalibrationStream,
    DenseStream,
    EnteringBatch,
    Sample,
    num_bytes,
    sample_of,
)
from pruning.repair.moments import Moments
from pruning.repair.regression import fit_layer, matrix_power
from pruning.repair.sensitivity import BlockSensitivity, StreamSensitivity, measure_sensitivity

REPAIR_PASSES = 5
"""Forward passes over the calibration images that `repaired_model` costs: sensitivity 3, dense stream 1, pruned stream
1, which is smaller the more is pruned."""


Projected = tuple[Tensor, Tensor, Tensor]
"""Queries (b, H, N, K), keys (b, H, N, K) and values (b, H, N, V) of a batch."""


@dataclass(frozen=True, kw_only=True)
class RepairedBlock:
    """A pruned block after its repair."""

    block: nn.Module
    notes: tuple[str, ...] = ()
    """The layers of which only the bias could be repaired, for want of images."""


class BlockRepair:
    """Repairs plans of a stream's current block, and remembers what several plans have in common.

    A repair is for one block: once the stream moves on, a new one is made. The images run through the block once, and
    before that their sampled tokens through its attention; activations are kept from one step to the next, as far as
    `CalibrationStream.kept_bytes` allows.
    """

    def __init__(self, stream: CalibrationStream) -> None:
        self.stream, self.index = stream, stream.index
        self._factors: tuple[Tensor, Tensor] | None = None
        self._attentions: dict[tuple[object, ...], tuple[dict[str, Tensor], list[str]]] = {}
        self._projections: BatchStore[Projected] = BatchStore(stream.kept_bytes)
        self._mid_key: tuple[object, ...] | None = None
        self._mids: BatchStore[BlockBatch] = BatchStore(stream.kept_bytes)
        """Batches after the attention of `_mid_key`, before a reduction of tokens."""
        self._last: SlimBlock | None = None
        self._hidden: BatchStore[BlockBatch] = BatchStore(stream.kept_bytes)
        """Batches with the active hidden units of the block that was repaired last."""

    @torch.no_grad()
    def repair(self, plan: BlockPlan) -> RepairedBlock:
        """Cuts the block to a plan and repairs it, unless all of it stays."""
        assert self.index == self.stream.index, "the stream has moved on to another block"
        block = self.stream.slim(plan)
        if plan == keep_all_block(self.stream.anatomy, self.stream.num_tokens):
            return RepairedBlock(block=block)
        assert isinstance(block, SlimBlock)
        notes = self._repair_attention(block, plan) + self._refit_mlp(block, plan)
        return RepairedBlock(block=block, notes=tuple(f"block {self.index} {note}" for note in notes))

    @torch.no_grad()
    def advance(self, repaired: RepairedBlock) -> None:
        """Takes the stream through a block that was repaired here, on to the next one."""
        block, stream = repaired.block, self.stream
        assert self.index == stream.index, "the stream has moved on to another block"
        if not isinstance(block, SlimBlock):
            stream.advance(stream.blocks[self.index])  # all of it stays
        elif block is not self._last:
            stream.advance(block)
        else:
            with self._running():
                stream.leave((batch.finish(), batch.share) for batch in self._activated(block))

    def has_attention(self, plan: BlockPlan) -> bool:
        """Tells whether the attention that `repair` gives this plan was fitted before, for another plan."""
        return self._attention_key(plan) in self._attentions

    def _attention_key(self, plan: BlockPlan) -> tuple[object, ...]:
        # Which channels are kept does not matter: all are combined anew. Tokens are reduced after attention.
        return plan.keep_heads, plan.shape.qk_width, plan.shape.v_width

    @torch.no_grad()
    def logit_factors(self) -> tuple[Tensor, Tensor]:
        """The best combinations of query and of key channels, (H, D, D) each, the one that counts most first.

        They are the same for every plan of the block.
        """
        assert self.index == self.stream.index, "the stream has moved on to another block"
        if self._factors is None:
            self._factors = self._measure_logit_factors()
        return self._factors

    def _repair_attention(self, block: SlimBlock, plan: BlockPlan) -> list[str]:
        key = self._attention_key(plan)
        mid_key = *key, plan.num_tokens < self.stream.num_tokens  # only a reduction looks at queries and keys
        if mid_key != self._mid_key:
            self._mid_key, self._mids = mid_key, BatchStore(self.stream.kept_bytes)
        if key not in self._attentions:
            notes = self._refit_attention(block, plan)
            self._attentions[key] = {name: value.clone() for name, value in block.attn.state_dict().items()}, notes
        weights, notes = self._attentions[key]
        block.attn.load_state_dict(weights)
        return list(notes)

    @cached_property
    def _dense(self) -> SlimBlock:
        """The dense block to cut: where tokens were merged or dropped, refitted to them."""
        dense = as_slim(self.stream.blocks[self.index], self.stream.anatomy, is_last=False)
        if self.stream.share is not None:
            dense.attn.qkv = self._refit_qkv(dense)  # of this form of the block alone
        return dense

    def _refit_qkv(self, dense: SlimBlock) -> nn.Linear:
        """Refits queries, keys and values of the stream's tokens to the means of the dense tokens that they stand for.

        A norm does not commute with the mean, so a merged token is too large behind it.
        """
        # ViT-Tiny, 128 images, seven pairs of models at 0.57 to 0.30 of the multiply-adds: -9 % of divergence (standard
        # error 3 %). Tried and lost: the same where no token is merged (+1.5 %), and for the first MLP layer (+5 %).
        stream, qkv = self.stream, copy.deepcopy(dense.attn.qkv)
        num_prefix, width = stream.anatomy.num_prefix_tokens, stream.anatomy.width
        # The place where the block reads the stream.
        weights = stream.sensitivity[self.index - 1].out.token_weights(stream.num_all_tokens, num_prefix)
        moments = Moments(width)
        for rows in stream.rows():
            batch = EnteringBatch(stream, dense, rows)
            sample = sample_of(batch, weights)
            normed = dense.norm1(batch.x[:, sample.tokens]).float()
            target = batch.as_here(dense.norm1(stream.dense_x[rows]).float(), sample.tokens)
            values = torch.cat([normed, target - normed], dim=-1).flatten(0, 1)
            moments.add(values, sample.weight, sample.is_held)
        weight, eye = qkv.weight.double(), torch.eye(width, dtype=torch.float64, device=qkv.weight.device)
        fit = fit_layer(eye, None if qkv.bias is None else torch.zeros_like(eye[0]), None, moments, weight.T @ weight)
        qkv.weight.copy_(weight @ fit.weight)
        if fit.bias is not None:
            qkv.bias.copy_(qkv.bias.double() + weight @ fit.bias)
        return qkv

    def _running(self) -> AbstractContextManager[object]:
        """Returns the context in which blocks are run; what is fitted is taken in float32 outside it."""
        return autocast(self.stream.x.device, self.stream.precision)

    def _project(self, rows: slice) -> Projected:
        """Returns the dense block's queries, keys and values of a batch."""
        projected = self._projections.get(rows)
        if projected is None:
            with self._running():
                x, _ = self._dense.enter(self.stream.x[rows])
                projected = self._dense.attn.project(self._dense.norm1(x))
            self._projections.keep(rows, projected, num_bytes(projected))
        return projected

    def _refit_attention(self, slim: SlimBlock, plan: BlockPlan) -> list[str]:
        """Refits queries and keys, then values and projection, in place.

        Args:
            slim: the block, cut to the plan.
        """
        stream, anatomy = self.stream, self.stream.anatomy
        sensitivity, dense = stream.sensitivity[self.index].mid, parts_of(stream.blocks[self.index])
        heads = torch.tensor(plan.keep_heads, device=stream.x.device)
        qkv, is_narrow = self._dense.attn.qkv, plan.shape.qk_width < anatomy.head_dim
        eye = torch.eye(anatomy.head_dim, device=heads.device).expand(anatomy.num_heads, -1, -1)
        factors = [
            factor[heads, : plan.shape.qk_width] for factor in (self.logit_factors() if is_narrow else (eye, eye))
        ]
        for part, factor in enumerate(factors):
            rows = _recombined(qkv, part, factor, heads)
            _write_rows(slim.attn.qkv, part * rows[0].shape[0], *rows)
        columns = (heads[:, None] * anatomy.head_dim + torch.arange(anatomy.head_dim, device=heads.device)).flatten()
        layer = _LayerRepair(
            name="projection", dense=dense.proj, slim=slim.attn.proj, weight=dense.proj.weight[:, columns],
            gain=dense.ls1(torch.ones(anatomy.width, device=heads.device)), sensitivity=sensitivity,
            token_weights=sensitivity.token_weights(stream.num_all_tokens, anatomy.num_prefix_tokens), may_lose=True,
        )  # fmt: skip
        has_all_heads = len(heads) == anatomy.num_heads
        for rows_of_batch in stream.rows():
            q, k, v = projected = self._project(rows_of_batch)
            if not has_all_heads:
                q, k, v = q[:, heads], k[:, heads], v[:, heads]
            if is_narrow:
                q, k = (torch.einsum("bhnd,hkd->bhnk", x, f.to(x.dtype)) for x, f in zip((q, k), factors, strict=True))
            batch = EnteringBatch(stream, self._dense, rows_of_batch)
            sample = sample_of(batch, layer.token_weights)
            with self._running():
                features = _mix_at(sample.tokens, slim.attn, (q, k, v), batch.size).float()
            lost = None
            if is_narrow or not has_all_heads:
                with self._running():
                    mixed = _mix_at(sample.tokens, self._dense.attn, projected, batch.size).float()
                lost = mixed @ dense.proj.weight.T - features @ layer.weight.T
            layer.observe(sample, features, lost, batch.missing(stream.dense_mid, sample.tokens))

        covariance = layer.moments.covariance()[:, : len(columns)]
        directions = _value_directions(covariance, layer.weight * layer.gain[:, None], sensitivity.metric, len(heads))
        directions = directions[:, : plan.shape.v_width]
        rows = _recombined(qkv, 2, directions, heads)
        _write_rows(slim.attn.qkv, slim.attn.qkv.out_features - rows[0].shape[0], *rows)
        return layer.refit(torch.block_diag(*directions))

    def _activated(self, block: SlimBlock) -> Iterator[BlockBatch]:
        """Yields the batches with the active hidden units of a block whose attention is repaired."""
        for rows in self.stream.rows():
            batch = self._hidden.get(rows)
            if batch is None:
                with self._running():
                    mid = self._mids.get(rows)
                    if mid is None:
                        mid = BlockBatch(self.stream, block, rows)
                        mid.add_attention()
                        self._mids.keep(rows, mid, mid.num_bytes)
                    batch = mid.of(block)
                    batch.reduce()
                    batch.activate()
                self._hidden.keep(rows, batch, batch.num_bytes)
            yield batch

    def _refit_mlp(self, slim: SlimBlock, plan: BlockPlan) -> list[str]:
        """Refits the second layer, in place, on the stream as the repaired attention leaves it."""
        stream, num_prefix = self.stream, self.stream.anatomy.num_prefix_tokens
        dense, sensitivity = parts_of(stream.blocks[self.index]), stream.sensitivity[self.index].out
        is_kept = torch.zeros(stream.anatomy.num_hidden, dtype=torch.bool, device=stream.x.device)
        is_kept[list(plan.keep_hidden)] = True
        layer = _LayerRepair(
            name="second MLP layer", dense=dense.fc2, slim=slim.mlp.fc2, weight=dense.fc2.weight[:, is_kept],
            gain=dense.ls2(torch.ones(stream.anatomy.width, device=stream.x.device)), sensitivity=sensitivity,
            token_weights=sensitivity.token_weights(plan.num_tokens + num_prefix, num_prefix),
            may_lose=not bool(is_kept.all()),
        )  # fmt: skip
        bias = None if dense.fc1.bias is None else dense.fc1.bias[~is_kept]
        rows, columns = dense.fc1.weight[~is_kept], dense.fc2.weight[:, ~is_kept]
        self._last, self._hidden = slim, BatchStore(stream.kept_bytes)
        for batch in self._activated(slim):
            assert batch.hidden is not None
            sample = sample_of(batch, layer.token_weights)
            lost = None
            if len(rows):
                with self._running():
                    dropped = dense.act(F.linear(dense.norm2(batch.x[:, sample.tokens]), rows, bias)).float()
                lost = dropped @ columns.T
            missing = batch.missing(stream.dense_out, sample.tokens)
            layer.observe(sample, batch.hidden[:, sample.tokens].float(), lost, missing)
        return layer.refit()

    def _measure_logit_factors(self) -> tuple[Tensor, Tensor]:
        stream, anatomy = self.stream, self.stream.anatomy
        shape = (anatomy.num_heads, anatomy.head_dim, anatomy.head_dim)
        weights = stream.sensitivity[self.index].mid.token_weights(stream.num_all_tokens, anatomy.num_prefix_tokens)
        query_moments, key_moments = torch.zeros(2, *shape, dtype=torch.float64, device=stream.x.device)
        for rows in stream.rows():
            q, k = (part.float() for part in self._project(rows)[:2])
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


def _mix_at(tokens: Tensor, attention: SlimAttention, projected: Projected, size: Tensor | None) -> Tensor:
    """Mixes the values for some tokens (n,) alone: (b, n, H*V)."""
    q, k, v = projected
    if isinstance(attention, WindowedAttention):
        return attention.mix(q, k, v, size)[:, tokens]
    return attention.mix(q[:, :, tokens], k, v, size)


def repair_block(stream: CalibrationStream, plan: BlockPlan) -> RepairedBlock:
    """Cuts the stream's current block to a plan and repairs it, unless all of it stays."""
    return BlockRepair(stream).repair(plan)


class _LayerRepair:
    """The repair of one linear layer y = W f + b: what was observed of it so far, and where the result goes."""

    def __init__(
        self, *, name: str, dense: nn.Linear, slim: nn.Linear, weight: Tensor, gain: Tensor,
        sensitivity: StreamSensitivity, token_weights: Tensor, may_lose: bool,
    ) -> None:  # fmt: skip
        """
        Args:
            slim: the layer to write the result to.
            weight: (C, n), the dense weight on the features that are observed.
            gain: (C,), by which the layer's output is multiplied before it is added to the stream.
            sensitivity: of the stream where the layer's output is added.
            token_weights: (N,), how much an error in each token counts.
            may_lose: not all of the dense layer's features stay.
        """
        self.may_lose = may_lose
        self.name, self.dense, self.slim, self.weight, self.gain = name, dense, slim, weight, gain
        self.sensitivity, self.token_weights = sensitivity, token_weights
        self.moments = Moments(weight.shape[1])

    def observe(self, sample: Sample, features: Tensor, lost: Tensor | None, missing: Tensor) -> None:
        """Takes in the sampled tokens of a batch.

        Args:
            features: (b, n, f).
            lost: (b, n, C), what the dense layer's output for the same tokens has beside bias and weight @ features;
                None for nothing.
            missing: (b, n, C), what the stream lacks of the dense one before this output is added.
        """
        output = features @ self.weight.T
        lost = torch.zeros_like(output) if lost is None else lost
        output = output + lost if self.dense.bias is None else output + lost + self.dense.bias
        # The layer cannot make up where its gain is (nearly) none.
        drift = torch.where(self.gain.abs() > 1e-6, missing / self.gain - output, 0.0)
        values = [features, drift, *([lost] if self.may_lose else [])]
        self.moments.add(torch.cat(values, dim=-1).flatten(0, 1), sample.weight, sample.is_held)

    def refit(self, combinations: Tensor | None = None) -> list[str]:
        """Writes the repaired weight and bias; the layer keeps `combinations @ f`, or all of f. Returns notes."""
        gain = self.gain.double()
        metric = gain[:, None] * self.sensitivity.metric * gain
        fit = fit_layer(self.weight, self.dense.bias, combinations, self.moments, metric)
        self.slim.weight.copy_(fit.weight)
        if fit.bias is not None:
            self.slim.bias.copy_(fit.bias)
        return [f"{self.name}: only the bias is repaired"] if fit.is_loss_left else []


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
    dense: DenseStream | None = None,
) -> RepairedModel:
    """Does what `apply_plan` does, and repairs every pruned block on these images, from the first block to the last.

    The cascade does the same on its way, so plan and calibration images give its model again.

    Args:
        model: a dense model of `plan.exit_block` blocks, in eval mode.
        sensitivity: of the dense model on these images; measured if it is not given.
        dense: of these images, to share between plans; by default their own pass through the dense model.

    Raises:
        PlanError: the plan does not fit the model, as for `apply_plan`.
    """
    check_plan(plan, examine(model))
    if sensitivity is None:
        sensitivity = measure_sensitivity(model, images, batch_size=batch_size, precision=precision)
    stream = CalibrationStream(
        model, images, sensitivity, token_reduction=plan.token_reduction, cutoff_token=plan.cutoff_token,
        batch_size=batch_size, precision=precision, dense=dense,
    )  # fmt: skip
    blocks: list[nn.Module] = []
    notes: list[str] = []
    for block_plan in plan.blocks:
        repair = BlockRepair(stream)
        repaired = repair.repair(block_plan)
        blocks.append(repaired.block)
        notes += repaired.notes
        repair.advance(repaired)
    return RepairedModel(model=with_blocks(model, blocks), notes=tuple(notes))
