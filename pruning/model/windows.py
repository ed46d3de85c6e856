"""Attention within windows of a grid of tokens, shifted in every second block (Swin, Liu et al. 2021).

B images, N tokens of the grid (row by row), W windows a grid, T tokens a window, H heads, C model width, n channels.
"""

from __future__ import annotations

from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

Size = tuple[int, int]
"""Height, width."""


class Windows(nn.Module):
    """The windows of a grid, and the terms they add to the logits: relative position, and a mask at the seam."""

    bias_index: Tensor
    mask: Tensor | None

    def __init__(
        self,
        *,
        grid: Size,
        window: Size,
        shift: Size,
        bias_table: nn.Parameter,
        bias_index: Tensor,
        mask: Tensor | None,
    ) -> None:
        """Takes the tensors as they are, not copied.

        Args:
            shift: how far the grid is rolled before it is cut.
            bias_table: (offsets, H), one row for each relative position.
            bias_index: (T, T), rows of `bias_table`.
            mask: (W, T, T), 0 or a large negative number; None without a shift.
        """
        super().__init__()
        self.grid, self.window, self.shift = grid, window, shift
        self.bias_table = bias_table
        self.register_buffer("bias_index", bias_index, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def partition(self, x: Tensor) -> Tensor:
        """Cuts the grid into windows. (B, N, C) -> (B * W, T, C)."""
        x = x.unflatten(1, self.grid)
        if any(self.shift):
            x = x.roll((-self.shift[0], -self.shift[1]), dims=(1, 2))
        return window_partition(x, self.window).flatten(1, 2)

    def reverse(self, x: Tensor) -> Tensor:
        """Puts the windows together again. (B * W, T, n) -> (B, N, n)."""
        x = window_reverse(x.unflatten(1, self.window), self.window, *self.grid)
        if any(self.shift):
            x = x.roll(self.shift, dims=(1, 2))
        return x.flatten(1, 2)

    def logit_bias(self, num_windows: int) -> Tensor:
        """Returns the term added to the logits: (1, H, T, T), or (num_windows, H, T, T) where there is a mask."""
        bias = self.bias_table[self.bias_index].permute(2, 0, 1)[None]
        if self.mask is None:
            return bias
        return (bias + self.mask[:, None]).repeat(num_windows // self.mask.shape[0], 1, 1, 1)

    def of_heads(self, heads: Tensor) -> Windows:
        """Copies the windows for some of the heads, in new memory."""
        table = nn.Parameter(self.bias_table.detach()[:, heads].clone(), requires_grad=self.bias_table.requires_grad)
        return Windows(
            grid=self.grid, window=self.window, shift=self.shift, bias_table=table, bias_index=self.bias_index,
            mask=self.mask,
        )  # fmt: skip


class Downsample(nn.Module):
    """Patch merging on a sequence of tokens: (B, N, C) -> (B, N / 4, C')."""

    def __init__(self, merging: nn.Module, grid: Size) -> None:
        """Wraps timm's patch merging, which works on (B, height, width, C)."""
        super().__init__()
        self.merging, self.grid = merging, grid
        self.training = merging.training

    def forward(self, x: Tensor) -> Tensor:
        """Merges the patches. (B, N, C) -> (B, N / 4, C')."""
        merged: Tensor = self.merging(x.unflatten(1, self.grid))
        return merged.flatten(1, 2)


class GridBlock(nn.Module):
    """A Swin block with the patch merging before it, on a sequence of tokens; it shares the block's memory."""

    def __init__(self, downsample: Downsample | None, block: nn.Module) -> None:
        super().__init__()
        self.downsample, self.block = downsample, block
        self.training = block.training

    def forward(self, x: Tensor) -> Tensor:
        """Runs patch merging and block. (B, N, C) -> (B, N', C')."""
        x = x if self.downsample is None else self.downsample(x)
        after: Tensor = self.block(x.unflatten(1, self.block.input_resolution))
        return after.flatten(1, 2)
