"""timm's interface to the features between blocks, for models whose blocks are not timm's.

A block that merges tokens hands on their sizes as one more channel, and where tokens are reduced there is no grid; a
Swin's blocks stand in one row, not in stages. The classes here hide that, so that `forward_intermediates` and its kin
give what they give of a dense model.

B images, N tokens (P prefix tokens first), C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pruning.errors import PlanError
from pruning.model.layers import SlimBlock, unpack
from pruning.model.windows import Size

Indices = int | Sequence[int] | None
"""Blocks or stages whose output is taken: the last n, these (counted from 0, or from the end with -1), or all."""


class ReducedVisionTransformer(VisionTransformer):
    """A vision transformer whose blocks reduce tokens."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Returns the outputs of blocks as timm does; `output_fmt="NLC"` is (B, N - P, C), N of each block its own.

        Raises:
            PlanError: `output_fmt="NCHW"` of a block that has fewer tokens than the grid, or an attention mask.
        """
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        taken = absolute(indices, len(self.blocks))
        end = taken[-1] if stop_early else len(self.blocks) - 1
        streams = self._streams(x, sorted({*taken, end}), stop_early, attn_mask=attn_mask, is_causal=is_causal)
        chosen = [self.norm(streams[index]) if norm else streams[index] for index in taken]
        prefixes = [stream[:, : self.num_prefix_tokens] for stream in chosen]
        intermediates = [stream[:, self.num_prefix_tokens :] for stream in chosen]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            intermediates = [_as_grid(*numbered, grid) for numbered in zip(intermediates, taken, strict=True)]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": intermediates}
            found |= {"image_intermediates_prefix": prefixes} if with_prefix else {}
            return found if intermediates_only else found | {"image_features": self.norm(streams[end])}
        features = list(zip(intermediates, prefixes, strict=True)) if with_prefix else intermediates
        return features if intermediates_only else (self.norm(streams[end]), features)

    def _streams(self, x: Tensor, indices: Sequence[int], stop_early: bool, **masks: Any) -> dict[int, Tensor]:
        """Returns all tokens after some blocks, (B, N, C) each."""
        parent: Any = super()
        found = parent.forward_intermediates(
            x, list(indices), return_prefix_tokens=True, stop_early=stop_early, output_fmt="NLC", output_dict=True,
            intermediates_only=True, **masks,
        )  # fmt: skip
        streams: list[Tensor] = found["image_intermediates"]
        if "image_intermediates_prefix" in found:
            streams = [
                torch.cat(parts, dim=1) for parts in zip(found["image_intermediates_prefix"], streams, strict=True)
            ]
        return {index: unpack(stream, self.embed_dim)[0] for index, stream in zip(indices, streams, strict=True)}

    def prune_intermediate_layers(self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True) -> Any:
        """Leaves out the blocks after the last of these; the new last one takes off the sizes of its tokens."""
        parent: Any = super()
        taken = parent.prune_intermediate_layers(indices, prune_norm, prune_head)
        if isinstance(self.blocks[-1], SlimBlock):
            self.blocks[-1].is_last = True
        return taken


class ReducedVisionTransformerDistilled(ReducedVisionTransformer, VisionTransformerDistilled):
    """A distilled DeiT whose blocks reduce tokens."""


class SwinOfBlocks(SwinTransformer):
    """A Swin whose `layers` are its blocks on sequences of tokens, between a flattening and its reverse."""

    grad_checkpointing = False

    def forward_features(self, x: Tensor) -> Tensor:
        """Turns images into the normed grid of the last block, (B, height, width, C)."""
        features: Tensor = self.norm(self.layers[-1](self._run(self.layers[:-1], self._embedded(x))))
        return features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Returns the outputs of stages as timm does, (B, C, height, width) each."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        ends = self._stage_ends()
        taken = absolute(indices, len(ends))
        stages = list(pairwise([0, *ends]))
        tokens, intermediates = self.layers[0](self._embedded(x)), []
        for stage, (start, end) in enumerate(stages[: taken[-1] + 1] if stop_early else stages):
            tokens = self._run(self.layers[1 + start : 1 + end], tokens)
            grid = tokens.unflatten(1, _grid_of(self.layers[end]))
            normed = self.norm(grid) if stage == len(ends) - 1 else grid
            if stage in taken:
                intermediates.append((normed if norm else grid).permute(0, 3, 1, 2).contiguous())
        return intermediates if intermediates_only else (normed, intermediates)

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leaves out the stages after the last of these."""
        ends = self._stage_ends()
        taken = absolute(indices, len(ends))
        is_shorter = taken[-1] < len(ends) - 1
        if is_shorter:
            kept = self.layers[: 1 + ends[taken[-1]]]
            self.layers = nn.Sequential(*kept, nn.Unflatten(1, _grid_of(kept[-1])))
            self.num_features = self.head_hidden_size = self.feature_info[taken[-1]]["num_chs"]
        if prune_norm or is_shorter:
            self.norm = nn.Identity()
        if prune_head or is_shorter:
            self.reset_classifier(0, "")
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes each block anew in the backward pass, in place of keeping what it needs."""
        self.grad_checkpointing = enable

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Refuses another size, for which the windows would have to be cut anew.

        Raises:
            PlanError: always.
        """
        raise PlanError("a Swin that was pruned or cut keeps its image size; prune it with another model.args.img_size")

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters without weight decay: the windows' tables of relative positions."""
        tables = ("relative_position_bias_table", "windows.bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns the patterns of the groups of a layer-wise learning rate: one a block."""
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    def _embedded(self, x: Tensor) -> Tensor:
        """Turns images into the grid that the first block takes, (B, height, width, C)."""
        grid: Tensor = self.patch_embed(x)
        planned = _grid_of(self.layers[1])
        if (*grid.shape[1:3],) != (*planned,):
            raise PlanError(f"the model was pruned for grids of {planned} patches, and got {(*grid.shape[1:3],)}")
        return grid

    def _run(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        checkpointed = self.grad_checkpointing and torch.is_grad_enabled()
        result: Tensor = checkpoint_seq(layers, x) if checkpointed else layers(x)
        return result

    def _stage_ends(self) -> list[int]:
        """Returns the numbers of blocks after which the stages end."""
        blocks = list(self.layers[1:-1])
        return [*(index for index in range(1, len(blocks)) if blocks[index].downsample is not None), len(blocks)]


def with_features(model: nn.Module, num_blocks: int) -> nn.Module:
    """Returns the model as one of the classes here, where its blocks need one; its modules stay the same.

    Args:
        model: a copy of a model with other blocks, which is not used any more.
        num_blocks: the number of its blocks.
    """
    kind: type[nn.Module] = type(model)
    if isinstance(model, SwinTransformer):
        kind = SwinOfBlocks
    elif any(isinstance(block, SlimBlock) and block.reducer is not None for block in model.modules()):
        is_distilled = isinstance(model, VisionTransformerDistilled)
        kind = ReducedVisionTransformerDistilled if is_distilled else ReducedVisionTransformer
    result: Any = kind.__new__(kind)
    result.__dict__.update(model.__dict__)
    num_taps = len(result._stage_ends()) if isinstance(result, SwinOfBlocks) else num_blocks
    result.feature_info = result.feature_info[:num_taps]
    assert isinstance(result, nn.Module)
    return result


def absolute(indices: Indices, count: int) -> list[int]:
    """Returns the chosen ones of `count` as numbers from 0, ascending, each once."""
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        assert 0 < last <= count, f"last-n ({last}) is out of range (1 to {count})"
        return list(range(count - last, count))
    wrong = [index for index in indices if not -count <= index < count]
    assert not wrong, f"feature index {wrong[0]} is out of range (0 to {count - 1})"
    return sorted({index % count for index in indices})


def _as_grid(patches: Tensor, index: int, grid: Size) -> Tensor:
    """Turns the patches after a block (B, N - P, C) into their grid (B, C, height, width)."""
    if patches.shape[1] != grid[0] * grid[1]:
        raise PlanError(
            f"block {index} leaves {patches.shape[1]} of {grid[0] * grid[1]} patch tokens, which are no grid; "
            "give output_fmt='NLC' (or reshape=False)"
        )
    return patches.transpose(1, 2).unflatten(2, grid).contiguous()


def _grid_of(block: Any) -> Size:
    """Returns the grid on which a Swin's block attends."""
    grid: Size = block.attn.windows.grid if hasattr(block, "attn") else block.block.input_resolution
    return grid
