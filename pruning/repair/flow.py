"""Carries the calibration images through the blocks: as pruned so far and dense, side by side.

B images, N tokens that enter a block, N' tokens that leave it, H heads, V value width a head, C model width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

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

PATCH_SAMPLES = 48
"""The fewest patches of an image that a fit samples, if the image has as many: neighbouring patches differ little."""

HELD_EVERY = 4
"""Every fourth calibration image is held out to choose the ridge, then joins the others for the fit."""


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
    ) -> None:
        """Embeds the images and puts them before the first block.

        Args:
            model: dense, in eval mode, on the device to work on.
            sensitivity: of the dense model's blocks, for whatever is fitted on the stream.
            cutoff_token: cut-off frequency of the token filter, in (0, 1].
        """
        self.anatomies, self.sensitivity = examine(model).blocks, sensitivity
        self.token_reduction, self.cutoff_token = token_reduction, cutoff_token
        self.batch_size, self.precision = batch_size, precision
        self.blocks = list(blocks_of(model))
        device = next(model.parameters()).device
        with torch.no_grad(), autocast(device, precision):
            self.x = torch.cat([embed(model, batch).float() for batch, _ in images.batches(batch_size, device)])
        """(B, N, C), or (B, N, C + 1) with sizes: the output of the pruned model's block before the current one."""
        self.share: Tensor | None = None
        """(B, N, dense N): each token as a weighted mean of the dense model's tokens; None while they are the same."""
        self.is_held = torch.arange(len(self.x), device=device) % HELD_EVERY == HELD_EVERY - 1
        """(B,): images that are held out to choose the ridge."""
        self._enter(0, self.x)

    @torch.no_grad()
    def _enter(self, index: int, dense_x: Tensor) -> None:
        """Makes block `index` the current one. dense_x: (B, N, C), the dense model's input of it."""
        self.index = index
        block = as_slim(self.blocks[index], self.anatomy, is_last=False)
        with autocast(dense_x.device, self.precision):
            halves = [block.halves(x) for x in yielding_between(dense_x.split(self.batch_size))]
        mids, outs = zip(*halves, strict=True)
        self.dense_mid, self.dense_out = torch.cat(mids).float(), torch.cat(outs).float()

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
        after, shares = [], []
        with autocast(self.x.device, self.precision):
            for batch in self.batches(block):
                after.append(batch.finish().float())
                if batch.share is not None:
                    shares.append(batch.share)
        self.x, self.share = torch.cat(after), torch.cat(shares) if shares else None
        if self.index + 1 < len(self.blocks):
            self._enter(self.index + 1, self.dense_out)

    def turn_to(self, index: int, x: Tensor) -> None:
        """Puts the images before block `index`, with nothing pruned. x: (B, N, C), the dense model's input of it."""
        self.x, self.share = x, None
        self._enter(index, x)

    def batches(self, block: nn.Module) -> Iterator[BlockBatch]:
        """Yields the images in batches, each halted after the attention of `block`, a form of the current block."""
        if not isinstance(block, SlimBlock):
            block = as_slim(block, self.anatomy, is_last=self.index == len(self.blocks) - 1)
        for start in yielding_between(range(0, len(self.x), self.batch_size)):
            yield BlockBatch(self, block, slice(start, start + self.batch_size))


class BlockBatch:
    """A batch of the stream on its way through one slim block: after attention, then after `reduce`, then `finish`."""

    def __init__(self, stream: CalibrationStream, block: SlimBlock, rows: slice) -> None:
        """rows: which of the stream's images."""
        self.stream, self.block, self.rows = stream, block, rows
        self.x, size = block.enter(stream.x[rows])
        self.mixed, self.state = block.attend(self.x, size)
        """(B, N, H*V): the input of the attention's projection; and what the token reduction may look at."""
        self.share = None if stream.share is None else stream.share[rows]

    def mid_drift(self, projected: Tensor) -> Tensor:
        """Returns what the stream lacks of the dense one after attention adds `projected`. (B, N, C)."""
        target = self.stream.dense_mid[self.rows]
        target = target if self.share is None else self.share @ target
        return target - self.x - projected

    def reduce(self) -> None:
        """Adds the attention to the stream and reduces the tokens."""
        block, x = self.block, self.x + self.block.ls1(self.block.attn.proj(self.mixed))
        num_all = self.stream.dense_mid.shape[1]
        self.x, self.size, reduced = block.reduce(x, self.state)
        if reduced is not None:
            share = torch.eye(num_all, device=x.device).expand(len(x), -1, -1) if self.share is None else self.share
            self.share = reduced.apply(share)

    def out_drift(self, added: Tensor) -> Tensor:
        """Returns what the stream lacks of the dense one after the MLP adds `added`. (B, N', C)."""
        target = self.stream.dense_out[self.rows]
        target = target if self.share is None else self.share @ target
        return target - self.x - added

    def finish(self) -> Tensor:
        """Runs the rest of the block and returns its output."""
        self.reduce()
        block = self.block
        return block.pack(self.x + block.ls2(block.mlp(block.norm2(self.x))), self.size)


def sample_tokens(batch: BlockBatch, weights: Tensor, *streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Picks the tokens of a batch that a fit looks at, in the form that `Moments.add` takes.

    All prefix tokens are taken. Of the patches, an even spread of at least `PATCH_SAMPLES` and fewer than twice as
    many is taken, and counts for those left out.

    Args:
        weights: (N,), how much each token counts.
        streams: (B, N, n_i) each, values of the batch's tokens.

    Returns:
        The streams side by side (S, sum of n_i), the weights of these S samples (S,), and which are held out (S,).
    """
    prefix = batch.stream.anatomy.num_prefix_tokens
    num_patches = streams[0].shape[1] - prefix
    step = max(1, num_patches // PATCH_SAMPLES)
    # Another start for each batch, so that no place in the image is left out.
    patches = torch.arange(batch.rows.start // batch.stream.batch_size % step, num_patches, step) + prefix
    tokens = torch.cat([torch.arange(prefix), patches]).to(weights.device)
    counts = weights[tokens].clone()
    counts[prefix:] *= num_patches / len(patches)
    values = torch.cat([stream[:, tokens] for stream in streams], dim=-1)
    is_held = batch.stream.is_held[batch.rows]
    return values.flatten(0, 1), counts.repeat(len(values)), is_held.repeat_interleave(len(tokens))
