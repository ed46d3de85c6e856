"""Carries the calibration images through the blocks: as pruned so far and dense, side by side.

B images, N tokens that enter a block, N' tokens that leave it, H heads, V value width a head, C model width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.device_sharing import yielding_between
from pruning.model.anatomy import BlockAnatomy, blocks_of, embed, examine
from pruning.model.layers import SlimBlock
from pruning.model.surgery import as_slim, slim_block
from pruning.plan import BlockPlan, TokenReduction
from pruning.precision import Precision, autocast
from pruning.repair.sensitivity import BlockSensitivity

T = TypeVar("T")

PATCH_SAMPLES = 48
"""The fewest patches of an image that a fit samples, if the image has as many: neighbouring patches differ little."""

KEPT_BYTES = 2**30
"""Bytes of activations that a repair keeps at each of its steps. What does not fit is computed again: a ViT-Base with
1000 images would need 3 GB."""

HELD_EVERY = 4
"""Every fourth calibration image is held out to choose the ridge, then joins the others for the fit."""


class DenseStream:
    """The calibration images on their way through the dense model, kept for all plans that are repaired on them.

    With it a repair runs the pruned model alone.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        *,
        batch_size: int = 64,
        precision: Precision = "float32",
        max_bytes: int = KEPT_BYTES,
    ) -> None:
        """Embeds the images; what they become block by block is computed when it is first asked for.

        Args:
            model: dense, in eval mode, on the device to work on. Models cut from it behind an exit share its stream.
            max_bytes: most bytes to keep. What does not fit is computed again for every plan: ViT-Tiny takes 3.6 MB an
                image, ViT-Base 14 MB.
        """
        self.batch_size, self.precision = batch_size, precision
        device = next(model.parameters()).device
        with torch.no_grad(), autocast(device, precision):
            self.embedded = torch.cat([embed(model, batch).float() for batch, _ in images.batches(batch_size, device)])
        """(B, N, C)."""
        self._halves: dict[int, tuple[Tensor, Tensor]] = {}
        self._bytes_left = max_bytes

    @torch.no_grad()
    def halves(self, index: int, block: SlimBlock, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the stream after attention and after the MLP of block `index`, (B, N, C) both, float32.

        Args:
            x: (B, N, C), the block's input.
        """
        if index in self._halves:
            return self._halves[index]
        with autocast(x.device, self.precision):
            batches = [block.halves(batch) for batch in yielding_between(x.split(self.batch_size))]
        mids, outs = zip(*batches, strict=True)
        halves = torch.cat(mids).float(), torch.cat(outs).float()
        if num_bytes(halves) <= self._bytes_left:
            self._halves[index] = halves
            self._bytes_left -= num_bytes(halves)
        return halves


class CalibrationStream:
    """The calibration images at the input of one block, as the blocks pruned so far give them and as the dense ones do.

    The stream begins at the first block; `advance` takes it to the next one, and `turn_to` to any.
    """

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
        kept_bytes: int = KEPT_BYTES,
        dense: DenseStream | None = None,
    ) -> None:
        """Embeds the images and puts them before the first block.

        Args:
            model: dense, in eval mode, on the device to work on.
            sensitivity: of the dense model's blocks, for whatever is fitted on the stream.
            cutoff_token: cut-off frequency of the token filter, in (0, 1].
            kept_bytes: most bytes of activations that a repair keeps at each of its steps.
            dense: of the same model, images, batch size and precision; made for this stream alone if it is not given.
        """
        self.anatomies, self.sensitivity = examine(model).blocks, sensitivity
        self.token_reduction, self.cutoff_token = token_reduction, cutoff_token
        self.batch_size, self.precision, self.kept_bytes = batch_size, precision, kept_bytes
        self.blocks = list(blocks_of(model))
        if dense is None:
            dense = DenseStream(model, images, batch_size=batch_size, precision=precision, max_bytes=0)
        assert (dense.batch_size, dense.precision) == (batch_size, precision)
        assert len(dense.embedded) == len(images), "the dense stream is of other images"
        self.dense = dense
        self.x = dense.embedded
        """(B, N, C), or (B, N, C + 1) with sizes: the output of the pruned model's block before the current one."""
        self.share: Tensor | None = None
        """(B, N, dense N): each token as a weighted mean of the dense model's tokens; None while they are the same."""
        self.is_held = torch.arange(len(self.x), device=self.x.device) % HELD_EVERY == HELD_EVERY - 1
        """(B,): images that are held out to choose the ridge."""
        self.is_dense = True
        """True while all blocks before the current one were the dense ones."""
        self._enter(0, self.x)

    def _enter(self, index: int, dense_x: Tensor) -> None:
        """Makes block `index` the current one. dense_x: (B, N, C), the dense model's input of it."""
        self.index, self.dense_x = index, dense_x
        block = as_slim(self.blocks[index], self.anatomy, is_last=False)
        self.dense_mid, self.dense_out = self.dense.halves(index, block, dense_x)

    def copy(self) -> CalibrationStream:
        """Returns the stream at the same block; moving one of both on does not move the other."""
        return copy.copy(self)  # tensors are replaced, never changed

    @property
    def anatomy(self) -> BlockAnatomy:
        """The anatomy of the current block."""
        return self.anatomies[self.index]

    @property
    def num_tokens(self) -> int:
        """The number of patches that the current block's attention sees."""
        return min(self.x.shape[1] - self.anatomy.num_prefix_tokens, self.anatomy.num_patches)

    @property
    def num_all_tokens(self) -> int:
        """The number of tokens that the current block's attention sees: patches and prefix tokens."""
        return self.num_tokens + self.anatomy.num_prefix_tokens

    def slim(self, plan: BlockPlan) -> nn.Module:
        """Cuts the current block to a plan, without any repair."""
        return slim_block(
            self.blocks[self.index], plan, self.anatomy, num_tokens_in=self.num_tokens,
            token_reduction=self.token_reduction, cutoff_token=self.cutoff_token,
            is_last=self.index == len(self.blocks) - 1,
        )  # fmt: skip

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Takes the images through `block`, the current one as it was finished, and on to the next block."""
        if self.is_dense and block is self.blocks[self.index]:
            self._leave(self.dense_out, None)
            return
        with autocast(self.x.device, self.precision):
            self.leave((batch.finish(), batch.share) for batch in self.batches(block))

    def leave(self, finished: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Goes on to the next block with what a form of the current one makes of the images.

        Args:
            finished: for every batch, the block's output (b, N', C) or (b, N', C + 1), and `share` of its tokens.
        """
        after, shares = [], []
        for x, share in finished:
            after.append(x.float())
            if share is not None:
                shares.append(share)
        self.is_dense = False
        self._leave(torch.cat(after), torch.cat(shares) if shares else None)

    def _leave(self, x: Tensor, share: Tensor | None) -> None:
        self.x, self.share = x, share
        if self.index + 1 < len(self.blocks):
            self._enter(self.index + 1, self.dense_out)

    def turn_to(self, index: int, x: Tensor) -> None:
        """Puts the images before block `index`, with nothing pruned. x: (B, N, C), the dense model's input of it."""
        self.x, self.share, self.is_dense = x, None, True
        self._enter(index, x)

    def batches(self, block: nn.Module) -> Iterator[BlockBatch]:
        """Yields the images in batches, each halted after the attention of `block`, a form of the current block."""
        if not isinstance(block, SlimBlock):
            block = as_slim(block, self.anatomy, is_last=self.index == len(self.blocks) - 1)
        for rows in self.rows():
            yield BlockBatch(self, block, rows)

    def rows(self) -> Iterator[slice]:
        """Yields the rows of every batch."""
        for start in yielding_between(range(0, len(self.x), self.batch_size)):
            yield slice(start, start + self.batch_size)


class EnteringBatch:
    """A batch of the stream where it enters a slim block."""

    def __init__(self, stream: CalibrationStream, block: SlimBlock, rows: slice) -> None:
        """rows: the batch's rows among the stream's images."""
        self.stream, self.block, self.rows = stream, block, rows
        self.x, self.size = block.enter(stream.x[rows])
        self.share = None if stream.share is None else stream.share[rows]

    def as_here(self, dense: Tensor, tokens: Tensor) -> Tensor:
        """Returns a dense stream of the batch's images at some of the batch's tokens, averaged as these are. (b, n, C).

        Args:
            dense: (b, N of the dense model, C).
            tokens: (n,), indices of the batch's tokens.
        """
        return dense[:, tokens] if self.share is None else self.share[:, tokens] @ dense

    def missing(self, dense: Tensor, tokens: Tensor) -> Tensor:
        """Returns what some of the batch's tokens lack of a dense stream. (b, n, C).

        Args:
            dense: (images, N of the dense model, C), of all the stream's images.
            tokens: (n,), indices of the batch's tokens.
        """
        return self.as_here(dense[self.rows], tokens) - self.x[:, tokens]


class BlockBatch(EnteringBatch):
    """A batch of the stream on its way through one slim block.

    It comes halted after attention, goes on by `add_attention`, `reduce` and `activate`, and ends with `finish`, which
    makes up for the steps that were not taken.
    """

    def __init__(self, stream: CalibrationStream, block: SlimBlock, rows: slice) -> None:
        super().__init__(stream, block, rows)
        self.mixed, self.state = block.attend(self.x, self.size)
        """(b, N, H*V): the input of the attention's projection; and what the token reduction may look at."""
        self.is_added = False
        """True once the attention is added to x."""
        self.hidden: Tensor | None = None
        """(b, N', h): the hidden units, once they are active."""

    def of(self, block: SlimBlock) -> BlockBatch:
        """Returns the batch at the same point of another block, which is the same up to there."""
        batch = copy.copy(self)
        batch.block = block
        return batch

    @property
    def num_bytes(self) -> int:
        """Bytes of the batch's activations."""
        return num_bytes([*vars(self).values(), *vars(self.state).values()])

    def add_attention(self) -> None:
        """Adds the projected attention to the stream."""
        self.x = self.x + self.block.ls1(self.block.attn.proj(self.mixed))
        self.mixed, self.is_added = self.x.new_empty(0), True
        if self.block.reducer is None:
            self._forget_attention()

    def reduce(self) -> None:
        """Reduces the tokens, and adds the attention to the stream before, unless it is there."""
        if not self.is_added:
            self.add_attention()
        num_all = self.stream.dense_mid.shape[1]
        self.x, self.size, reduced = self.block.reduce(self.x, self.state)
        if reduced is not None:
            share = self.share
            if share is None:
                share = torch.eye(num_all, device=self.x.device).expand(len(self.x), -1, -1)
            self.share = reduced.apply(share)
        self._forget_attention()

    def _forget_attention(self) -> None:
        """Frees the memory of what only a token reduction may look at."""
        none = self.x.new_empty(0)
        self.state = replace(self.state, q=none, k=none, attention=None)

    def activate(self) -> Tensor:
        """Makes the hidden units active and returns them. (B, N', h)."""
        mlp = self.block.mlp
        self.hidden = mlp.act(mlp.fc1(self.block.norm2(self.x)))
        return self.hidden

    def finish(self) -> Tensor:
        """Runs the rest of the block and returns its output."""
        if self.hidden is None:
            self.reduce()
        hidden = self.activate() if self.hidden is None else self.hidden
        return self.block.pack(self.x + self.block.ls2(self.block.mlp.fc2(hidden)), self.size)


class BatchStore(Generic[T]):
    """Keeps what was made of a stream's batches, for as many of them as fit into a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._kept: dict[int, T] = {}
        self._bytes_left = max_bytes

    def keep(self, rows: slice, value: T, num_bytes: int) -> None:
        """Keeps what was made of a batch, if it fits."""
        if num_bytes <= self._bytes_left:
            self._kept[rows.start] = value
            self._bytes_left -= num_bytes

    def get(self, rows: slice) -> T | None:
        return self._kept.get(rows.start)


def num_bytes(values: Iterable[object]) -> int:
    """Returns the bytes of the tensors among some values."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The tokens of a batch that a fit looks at."""

    tokens: Tensor
    """(n,), indices into the batch's tokens, ascending."""
    weight: Tensor
    """(b * n,): how much each token of each image counts."""
    is_held: Tensor
    """(b * n,) bool: those of the images that are held out."""


def sample_of(batch: EnteringBatch, weights: Tensor) -> Sample:
    """Picks the tokens of a batch that a fit looks at.

    All prefix tokens are taken. Of the patches, an even spread of at least `PATCH_SAMPLES` and fewer than twice as
    many is taken, and counts for those left out.

    Args:
        weights: (N,), how much each of the batch's tokens counts.
    """
    prefix = batch.stream.anatomy.num_prefix_tokens
    num_patches = len(weights) - prefix
    step = max(1, num_patches // PATCH_SAMPLES)
    # Another start for each batch, so that no place in the image is left out.
    patches = torch.arange(batch.rows.start // batch.stream.batch_size % step, num_patches, step) + prefix
    tokens = torch.cat([torch.arange(prefix), patches]).to(weights.device)
    counts = weights[tokens].clone()
    counts[prefix:] *= num_patches / len(patches)
    is_held = batch.stream.is_held[batch.rows]
    return Sample(tokens=tokens, weight=counts.repeat(len(is_held)), is_held=is_held.repeat_interleave(len(tokens)))


def sample_tokens(batch: BlockBatch, weights: Tensor, *streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Picks the tokens of a batch that a fit looks at, as `sample_of` does, in the form that `Moments.add` takes.

    Args:
        weights: (N,), how much each token counts.
        streams: (B, N, n_i) each, values of the batch's tokens.

    Returns:
        The streams side by side (S, sum of n_i), the weights of these S samples (S,), and which are held out (S,).
    """
    sample = sample_of(batch, weights)
    values = torch.cat([stream[:, sample.tokens] for stream in streams], dim=-1)
    return values.flatten(0, 1), sample.weight, sample.is_held
