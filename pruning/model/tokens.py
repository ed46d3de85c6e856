"""Token reduction: chooses the patch tokens that leave a block, and merges or drops the others.

B images, N tokens (P prefix tokens first, M = N - P patches), H heads, K query/key width a head, C model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.errors import PlanError
from pruning.model.lfe import low_frequency_energy, score_tokens
from pruning.plan import TokenReduction
from pruning.spectrum import token_filter


@dataclass(frozen=True, kw_only=True)
class AttentionState:
    """The state of a block's attention that a token reduction may look at."""

    q: Tensor
    """(B, H, N, K), queries."""
    k: Tensor
    """(B, H, N, K), keys."""
    scale: float
    """The factor of the logits, which are scale * q @ k^T."""
    size: Tensor | None
    """(B, N, 1), the number of patches that each token stands for; None while all are 1."""
    attention: Tensor | None
    """(B, H, N, N), the attention map, only where the reduction needs it."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a reduction: tokens that stay, tokens that go into one of them, and their weights there."""

    kept: Tensor
    """(B, N'), indices into N of the tokens that stay, ascending, the prefix first."""
    moved: Tensor | None
    """(B, R), indices into N of the tokens that go into others; None where the others are dropped."""
    into: Tensor | None
    """(B, R), indices into N': where each moved token goes."""
    weight: Tensor | None
    """(B, N, 1), positive: each token's weight in the average of the tokens that become one."""

    def total(self, stream: Tensor) -> Tensor:
        """Adds to every kept token those that move into it. (B, N, n) -> (B, N', n)."""
        kept = _rows(stream, self.kept)
        if self.moved is not None and self.into is not None:
            rows = _row_numbers(self.into, kept.shape[1])
            kept = kept.flatten(0, 1).index_add(0, rows, _rows(stream, self.moved).flatten(0, 1)).view_as(kept)
        return kept

    def average(self, stream: Tensor) -> Tensor:
        """Averages every kept token with those that move into it. (B, N, n) -> (B, N', n)."""
        if self.weight is None or self.moved is None or self.into is None:
            return self.total(stream)
        # Shares before products: a token alone has a share of exactly 1, and least weights do not vanish in products.
        kept_totals = self.total(self.weight)
        totals = torch.ones_like(self.weight).scatter(1, self.kept[..., None], kept_totals)
        totals = totals.scatter(1, self.moved[..., None], kept_totals.gather(1, self.into[..., None]))
        return self.total(stream * (self.weight / totals).to(stream.dtype))


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """The steps of a reduction that was made, which can be applied to other streams of the same tokens."""

    steps: tuple[Step, ...]
    size: Tensor | None
    """(B, N', 1), the patches that each token stands for; None while all are 1 or the reduction does not count them."""

    def apply(self, stream: Tensor) -> Tensor:
        """Reduces a stream of the same tokens. (B, N, n) -> (B, N', n)."""
        for step in self.steps:
            stream = step.average(stream)
        return stream


class Reducer(nn.Module, ABC):
    """The token reduction of a block: `num_patches` come in, `num_keep` leave; prefix tokens always stay."""

    needs_map = False
    """True where the reduction needs the whole attention map, which fused attention does not give."""
    has_filter = False
    """True where the reduction looks at low-frequency energy."""
    token_filter: Tensor

    def __init__(
        self, *, num_patches: int, num_keep: int, num_prefix_tokens: int, has_class_token: bool, cutoff: float
    ) -> None:
        """Prepares the token filter of the reductions that have one; cutoff is its cut-off frequency, in (0, 1]."""
        super().__init__()
        assert 1 <= num_keep <= num_patches
        self.num_patches, self.num_keep = num_patches, num_keep
        self.num_prefix_tokens, self.has_class_token = num_prefix_tokens, has_class_token
        if self.has_filter:
            self.register_buffer("token_filter", token_filter(num_patches, cutoff), persistent=False)

    def check(self, x: Tensor) -> None:
        """Raises PlanError if tokens (B, N, C) are not as many as planned, as those of images of another size are."""
        found = x.shape[1] - self.num_prefix_tokens
        if found != self.num_patches:
            raise PlanError(
                f"the model was pruned for images of {self.num_patches} patches, and got {found}; resize the images, "
                "or prune it for their size (model.args.img_size)"
            )

    @abstractmethod
    def choose(self, x: Tensor, state: AttentionState) -> Reduced:
        """Chooses the reduction of these tokens. x: (B, N, C), after the block's attention."""

    def _keep(self, patches: Tensor) -> Tensor:
        """Returns the indices of the prefix and of these patches, ascending. (B, n) -> (B, P + n)."""
        prefix = torch.arange(self.num_prefix_tokens, device=patches.device).expand(len(patches), -1)
        return torch.cat([prefix, patches.sort(dim=1).values + self.num_prefix_tokens], dim=1)


class TokenDrop(Reducer):
    """Drops the patches of the lowest LFE score (VTC-LFC, eq. 6-9)."""

    needs_map = has_filter = True

    def choose(self, x: Tensor, state: AttentionState) -> Reduced:
        assert state.attention is not None
        scores = score_tokens(
            x, state.attention, self.token_filter,
            num_prefix_tokens=self.num_prefix_tokens, has_class_token=self.has_class_token,
        )  # fmt: skip
        best = scores.topk(self.num_keep, dim=1).indices
        return Reduced(steps=(Step(kept=self._keep(best), moved=None, into=None, weight=None),), size=None)


class TokenFuse(Reducer):
    """Keeps the patches of most class attention and averages the others to one by it (EViT, Liang et al. 2022)."""

    def choose(self, x: Tensor, state: AttentionState) -> Reduced:
        attention = class_attention(state, self.num_prefix_tokens, self.has_class_token)
        order = attention.argsort(dim=1, descending=True, stable=True)
        # The last of the kept patches takes in all that go; so its place, not its content, stays.
        host, moved = order[:, self.num_keep - 1, None], order[:, self.num_keep :]
        kept = self._keep(order[:, : self.num_keep])
        into = torch.searchsorted(kept[:, self.num_prefix_tokens :].contiguous(), host + self.num_prefix_tokens)
        weight = F.pad(attention, (self.num_prefix_tokens, 0), value=1.0)[..., None]
        step = Step(
            kept=kept,
            moved=moved + self.num_prefix_tokens,
            into=(into + self.num_prefix_tokens).expand_as(moved),
            weight=weight.clamp_min(torch.finfo(torch.float32).tiny),
        )
        return Reduced(steps=(step,), size=None)


class TokenMerge(Reducer):
    """Averages pairs of patches whose keys point the same way (ToMe, Bolya et al. 2023).

    Each patch at an even place is paired with its nearest at an odd place: distance 1 - cosine of the keys' mean over
    heads. The nearest pairs become one token, averaged by size. Where patches have weights w, the distance of a pair
    counts (sqrt(w_a) + sqrt(w_b)) times, so that patches of little weight go first.
    Where more than half of the patches have to go, this is repeated.
    """

    def weights(self, x: Tensor, state: AttentionState) -> Tensor | None:
        """Returns the weights of the patches (B, M), at least 0, or None for none; those of merged patches add up."""
        return None

    def choose(self, x: Tensor, state: AttentionState) -> Reduced:
        prefix = self.num_prefix_tokens
        size = torch.ones_like(x[..., :1]) if state.size is None else state.size
        keys, weight = state.k.mean(dim=1), self.weights(x, state)
        steps = []
        while (num_patches := keys.shape[1] - prefix) > self.num_keep:
            count = min(num_patches - self.num_keep, num_patches // 2)
            moved, partner, stay = _match(keys[:, prefix:], weight, count)
            place = torch.ones_like(keys[:, prefix:, 0], dtype=torch.long).scatter(1, moved, 0).cumsum(dim=1) - 1
            step = Step(
                kept=self._keep(stay), moved=moved + prefix, into=place.gather(1, partner) + prefix, weight=size
            )
            steps.append(step)
            if num_patches - count > self.num_keep:
                keys = step.average(keys)
                weight = None if weight is None else step.total(F.pad(weight, (prefix, 0))[..., None])[:, prefix:, 0]
            else:
                keys = keys[:, : prefix + self.num_keep]
            size = step.total(size)
        return Reduced(steps=tuple(steps), size=size)


class EnergyMerge(TokenMerge):
    """Merges patches of little low-frequency energy first."""

    has_filter = True

    def weights(self, x: Tensor, state: AttentionState) -> Tensor | None:
        return low_frequency_energy(x[:, self.num_prefix_tokens :], self.token_filter)


class AttentionMerge(TokenMerge):
    """Merges patches of little class attention first."""

    def weights(self, x: Tensor, state: AttentionState) -> Tensor | None:
        return class_attention(state, self.num_prefix_tokens, self.has_class_token)


REDUCERS: dict[TokenReduction, type[TokenDrop | TokenFuse | TokenMerge]] = {
    "lfe": TokenDrop,
    "attention": TokenFuse,
    "merge": TokenMerge,
    "lfe-merge": EnergyMerge,
    "attention-merge": AttentionMerge,
}


def merges(kind: TokenReduction) -> bool:
    """Tells whether a reduction makes tokens stand for several patches, which later attention has to know."""
    return kind in REDUCERS and issubclass(REDUCERS[kind], TokenMerge)


def class_attention(state: AttentionState, num_prefix_tokens: int, has_class_token: bool) -> Tensor:
    """Returns the attention of the class token to every patch, the mean over heads: (B, M), at least 0.

    Where there is no class token, the mean query of the patches takes its place. This is one row of the attention map,
    so fused attention stays fused.
    """
    query = state.q[:, :, :1] if has_class_token else state.q[:, :, num_prefix_tokens:].mean(dim=2, keepdim=True)
    logits = (query @ state.k.transpose(-2, -1)).float() * state.scale
    if state.size is not None:
        logits = logits + state.size.float().log().transpose(1, 2)[:, None]
    return logits.softmax(dim=-1)[:, :, 0, num_prefix_tokens:].mean(dim=1)


def _match(keys: Tensor, weight: Tensor | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the `count` nearest pairs: patches that move (B, count), where to (B, count), that stay (B, M - count)."""
    keys = F.normalize(keys.float(), dim=-1)
    with torch.autocast(keys.device.type, enabled=False):  # in bfloat16 most near pairs tie, and others are taken
        distance = 1 - keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    if weight is not None:
        root = weight.float().sqrt()
        distance = distance * (root[:, ::2, None] + root[:, None, 1::2])
    nearest, partner = distance.min(dim=-1)
    order = nearest.argsort(dim=1, stable=True)
    moved, rest = order[:, :count], order[:, count:]
    odd = torch.arange(1, keys.shape[1], 2, device=keys.device).expand(len(keys), -1)
    return 2 * moved, 2 * partner.gather(1, moved) + 1, torch.cat([2 * rest, odd], dim=1)


def _rows(stream: Tensor, chosen: Tensor) -> Tensor:
    """Picks rows of all images at once: four times faster on a CPU than a gather along the tokens."""
    rows = _row_numbers(chosen, stream.shape[1])
    return stream.flatten(0, 1).index_select(0, rows).unflatten(0, (len(stream), -1))


def _row_numbers(chosen: Tensor, num_tokens: int) -> Tensor:
    first = torch.arange(0, len(chosen) * num_tokens, num_tokens, device=chosen.device)[:, None]
    return (first + chosen).flatten()
