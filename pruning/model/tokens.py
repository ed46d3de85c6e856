"""Token reduction: chooses the patch tokens that leave a block, and merges or drops the others.

B images, N tokens (P prefix tokens first, M = N - P patches), H heads, K query/key width a head, C model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

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

    num_tokens: int
    """The number N of tokens that come in."""
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
        kept = _rows(stream, self._kept_rows)
        return kept if self._moved_rows is None else self._add_moved(kept, _rows(stream, self._moved_rows))

    def average(self, stream: Tensor) -> Tensor:
        """Averages every kept token with those that move into it. (B, N, n) -> (B, N', n)."""
        if self.weight is None or self._moved_rows is None:
            return self.total(stream)
        of_kept, of_moved = self._shares
        kept = _rows(stream, self._kept_rows).mul_(of_kept.to(stream.dtype))
        return self._add_moved(kept, _rows(stream, self._moved_rows) * of_moved.to(stream.dtype))

    @cached_property
    def totals(self) -> Tensor:
        """The weights of the tokens that become one, summed: (B, N', 1)."""
        assert self.weight is not None
        return self.total(self.weight)

    @cached_property
    def _shares(self) -> tuple[Tensor, Tensor]:
        """The share of each kept token in its average, (B, N', 1), and of each moved one, (B, R, 1).

        Shares come before products: a token alone has exactly 1, and least weights do not vanish in products.
        """
        assert self.weight is not None and self._moved_rows is not None and self._into_rows is not None
        of_kept, of_moved = _rows(self.weight, self._kept_rows), _rows(self.weight, self._moved_rows)
        return of_kept / self.totals, of_moved / _rows(self.totals, self._into_rows)

    # Rows of all images at once are four times faster on a CPU than a gather along the tokens.

    @cached_property
    def _kept_rows(self) -> Tensor:
        return _row_numbers(self.kept, self.num_tokens)

    @cached_property
    def _moved_rows(self) -> Tensor | None:
        return None if self.moved is None else _row_numbers(self.moved, self.num_tokens)

    @cached_property
    def _into_rows(self) -> Tensor | None:
        return None if self.into is None else _row_numbers(self.into, self.kept.shape[1])

    def _add_moved(self, kept: Tensor, moved: Tensor) -> Tensor:
        """Adds moved tokens (B, R, n) to those they go into (B, N', n), in place."""
        assert self._into_rows is not None
        kept.view(-1, kept.shape[2]).index_add_(0, self._into_rows, moved.flatten(0, 1))
        return kept


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
    counts_sizes = False
    """True where tokens come to stand for several patches, which later attention has to know."""
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

    @classmethod
    def matching_macs(cls, num_patches: int, num_keep: int, qk_width: int) -> int:
        """Counts the multiply-adds of matching the patches of one image by keys of `qk_width` channels a head."""
        return 0

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
        step = Step(num_tokens=x.shape[1], kept=self._keep(best), moved=None, into=None, weight=None)
        return Reduced(steps=(step,), size=None)


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
            num_tokens=x.shape[1],
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

    counts_sizes = True

    def weights(self, x: Tensor, state: AttentionState) -> Tensor | None:
        """Returns the weights of the patches (B, M), at least 0, or None for none; those of merged patches add up."""
        return None

    def choose(self, x: Tensor, state: AttentionState) -> Reduced:
        prefix = self.num_prefix_tokens
        size = torch.ones_like(x[..., :1]) if state.size is None else state.size
        keys, weight = _sum_of_heads(state.k), self.weights(x, state)
        steps = []
        while (num_patches := keys.shape[1] - prefix) > self.num_keep:
            count = min(num_patches - self.num_keep, num_patches // 2)
            moved, partner = _match(keys[:, prefix:], weight, count)
            step = _merging(moved + prefix, partner + prefix, size)
            steps.append(step)
            size = step.totals
            if num_patches - count == self.num_keep:
                break
            keys = step.average(keys)
            weight = None if weight is None else step.total(F.pad(weight, (prefix, 0))[..., None])[:, prefix:, 0]
        return Reduced(steps=tuple(steps), size=size)

    @classmethod
    def matching_macs(cls, num_patches: int, num_keep: int, qk_width: int) -> int:
        total = 0
        while num_patches > num_keep:
            total += (num_patches // 2) * (num_patches - num_patches // 2) * qk_width
            num_patches = max(num_keep, num_patches - num_patches // 2)
        return total


class EnergyMerge(TokenMerge):
    """Merges patches of little low-frequency energy first."""

    has_filter = True

    def weights(self, x: Tensor, state: AttentionState) -> Tensor | None:
        return low_frequency_energy(x[:, self.num_prefix_tokens :], self.token_filter)


class AttentionMerge(TokenMerge):
    """Merges patches of little class attention first."""

    def weights(self, x: Tensor, state: AttentionState) -> Tensor | None:
        return class_attention(state, self.num_prefix_tokens, self.has_class_token)


class Quickshift(Reducer):
    """Averages each patch that goes with its nearest among those attended more (quick shift, Vedaldi & Soatto 2008).

    Distance: 1 - cosine of the mean over heads of the keys, each of length 1, so that every head counts. Those
    patches go whose distance times the root of class attention is least; a patch whose nearest goes too follows it to
    where that ends. Averages are by size.
    """

    # Tried on ViT-Tiny at 0.48 to 0.30 of the multiply-adds, without repair, where this diverges from the dense
    # answers by a fifth less than ToMe's pairs with the same weights (at 0.57 by as much): keys of all heads side by
    # side, or rounds of a quarter of the patches, are no better and slower; keys of any length, or only the less
    # attended half offered, lose half of the gain; attention of all queries instead of the class token's, the weights
    # of both in the cost, and averages by attention gain nothing.

    counts_sizes = True

    def choose(self, x: Tensor, state: AttentionState) -> Reduced:
        prefix, num_patches, count = self.num_prefix_tokens, self.num_patches, self.num_patches - self.num_keep
        size = torch.ones_like(x[..., :1]) if state.size is None else state.size
        if not count:
            return Reduced(steps=(), size=size)
        attention = class_attention(state, prefix, self.has_class_token)
        ascending, order = attention.sort(dim=1, stable=True)  # a patch can only go to one that comes after it
        order = order + prefix
        keys = F.normalize(F.normalize(state.k.float(), dim=-1).mean(dim=1), dim=-1)
        keys = _rows(keys, _row_numbers(order, x.shape[1]))
        excluded = torch.full((num_patches - 1, num_patches), -torch.inf, device=x.device).tril()
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 most near pairs tie, and others are taken
            cosine = torch.baddbmm(excluded, keys[:, :-1], keys.transpose(1, 2))
        # The largest first, then its place in the rows that need it: ten times faster on a CPU than both at once.
        cost = (1 - cosine.amax(dim=-1)) * ascending[:, :-1].sqrt()
        moved = cost.argsort(dim=1, stable=True)[:, :count]
        host = torch.arange(num_patches, device=x.device).expand(len(x), -1)
        host = host.scatter(1, moved, _rows(cosine, _row_numbers(moved, num_patches - 1)).argmax(dim=-1))
        for _ in range((count - 1).bit_length()):  # each time, chains are followed twice as far
            host = host.gather(1, host)
        step = _merging(order.gather(1, moved), order.gather(1, host.gather(1, moved)), size)
        return Reduced(steps=(step,), size=step.totals)

    @classmethod
    def matching_macs(cls, num_patches: int, num_keep: int, qk_width: int) -> int:
        return (num_patches - 1) * num_patches * qk_width


REDUCERS: dict[TokenReduction, type[TokenDrop | TokenFuse | TokenMerge | Quickshift]] = {
    "lfe": TokenDrop,
    "attention": TokenFuse,
    "merge": TokenMerge,
    "lfe-merge": EnergyMerge,
    "attention-merge": AttentionMerge,
    "quickshift": Quickshift,
}


def merges(kind: TokenReduction) -> bool:
    """Tells whether a reduction makes tokens stand for several patches, which later attention has to know."""
    return kind in REDUCERS and REDUCERS[kind].counts_sizes


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


def _match(keys: Tensor, weight: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Finds the `count` nearest pairs: patches that move (B, count), and where to (B, count)."""
    keys = F.normalize(keys, dim=-1)
    with torch.autocast(keys.device.type, enabled=False):  # in bfloat16 most near pairs tie, and others are taken
        distance = torch.bmm(keys[:, ::2], keys[:, 1::2].transpose(1, 2)).neg_().add_(1)
    if weight is not None:
        root = weight.float().sqrt()
        distance.mul_(root[:, ::2, None] + root[:, None, 1::2])
    # The least first, then its place in the rows that need it: ten times faster on a CPU than both at once.
    moved = distance.amin(dim=-1).argsort(dim=1, stable=True)[:, :count]
    partner = _rows(distance, _row_numbers(moved, distance.shape[1])).argmin(dim=-1)
    return 2 * moved, 2 * partner + 1


def _sum_of_heads(keys: Tensor) -> Tensor:
    """Sums the keys of all heads, in float32: (B, H, N, K) -> (B, N, K). On a CPU `mean` takes three times as long."""
    total = keys[:, 0].float()
    for head in range(1, keys.shape[1]):
        total = total + keys[:, head]
    return total


def _merging(moved: Tensor, host: Tensor, size: Tensor) -> Step:
    """Makes the step in which tokens `moved` (B, R) go into tokens `host` (B, R) that stay, both indices into N."""
    stays = torch.ones_like(size[..., 0], dtype=torch.long).scatter_(1, moved, 0)
    kept = stays.argsort(dim=1, descending=True, stable=True)[:, : size.shape[1] - moved.shape[1]]
    # Clamped for an image of NaN, whose choices mean nothing: it must not take the rest of its batch with it.
    into = stays.cumsum(dim=1).gather(1, host).sub_(1).clamp_min_(0)
    return Step(num_tokens=size.shape[1], kept=kept, moved=moved, into=into, weight=size)


def _rows(stream: Tensor, rows: Tensor) -> Tensor:
    """Picks rows, as `_row_numbers` counts them, of all images at once. (B, N, n) -> (B, R, n)."""
    return stream.flatten(0, 1).index_select(0, rows).unflatten(0, (len(stream), -1))


def _row_numbers(chosen: Tensor, num_tokens: int) -> Tensor:
    """Counts tokens `chosen` (B, R) through all images, each of `num_tokens` tokens. (B * R,)."""
    first = torch.arange(0, len(chosen) * num_tokens, num_tokens, device=chosen.device)[:, None]
    return (first + chosen).flatten()
