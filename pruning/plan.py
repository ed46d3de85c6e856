"""Plans of what is kept of a model, as pure data: JSON both ways, no tensor, no module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal, get_args

from pruning.errors import PlanError

Indices = tuple[int, ...]

TokenReduction = Literal["none", "lfe", "attention", "merge", "lfe-merge", "attention-merge", "quickshift"]
"""The ways to reduce tokens. none: all tokens stay. lfe: drop by low-frequency energy (VTC-LFC). attention: drop by
class attention, the dropped become one token (EViT). merge: average the most similar pairs (ToMe). lfe-merge,
attention-merge: average pairs, tokens of little low-frequency energy, or of little class attention, first. quickshift:
average each token that goes with its most similar among those of more class attention."""

TOKEN_REDUCTIONS: tuple[TokenReduction, ...] = get_args(TokenReduction)[1:]
"""The token reductions that take tokens away: all but `none`."""


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The units that one block keeps. All indices count in the dense block and ascend."""

    keep_heads: Indices
    """The kept attention heads."""

    keep_qk: tuple[Indices, ...]
    """For every kept head, its kept query/key channels, counted within the head; all heads keep equally many."""

    keep_v: tuple[Indices, ...]
    """For every kept head, its kept value channels, counted within the head; all heads keep equally many."""

    keep_hidden: Indices
    """The kept hidden units of the MLP."""

    num_tokens: int
    """The number of patch tokens that leave the block's attention; prefix tokens always stay and are not counted."""

    def __post_init__(self) -> None:
        for name, kept in (("head", self.keep_heads), ("hidden unit", self.keep_hidden)):
            _check_ascending(name, kept)
        for name, widths in (("qk channel", self.keep_qk), ("v channel", self.keep_v)):
            if len(widths) != len(self.keep_heads):
                raise PlanError(
                    f"{len(widths)} lists of {name}s for {len(self.keep_heads)} kept heads; give one a head"
                )
            if len({len(kept) for kept in widths}) != 1:
                raise PlanError(f"heads keep different numbers of {name}s; every head of a block keeps equally many")
            for kept in widths:
                _check_ascending(name, kept)
        if self.num_tokens < 1:
            raise PlanError(f"{self.num_tokens} patch tokens leave a block; keep 1 at least")

    @property
    def shape(self) -> BlockShape:
        """The widths of the block."""
        return BlockShape(
            num_heads=len(self.keep_heads),
            qk_width=len(self.keep_qk[0]),
            v_width=len(self.keep_v[0]),
            num_hidden=len(self.keep_hidden),
            num_tokens=self.num_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The widths of one block, on which alone its speed depends."""

    num_heads: int
    qk_width: int
    """The number of query/key channels of each head."""
    v_width: int
    """The number of value channels of each head."""
    num_hidden: int
    num_tokens: int
    """The number of patch tokens after the block's attention."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The units of a model that are kept, block by block, and the block after which it answers."""

    blocks: tuple[BlockPlan, ...]
    """The plans of the blocks that stay; the model answers after the last of them."""

    cutoff_token: float = 0.85
    """The cut-off frequency of the token score (LFE) that picks tokens at run time, in (0, 1]."""

    token_reduction: TokenReduction = "lfe"
    """The way in which blocks reduce their tokens."""

    def __post_init__(self) -> None:
        if self.token_reduction not in get_args(TokenReduction):
            names = ", ".join(get_args(TokenReduction))
            raise PlanError(f"no token reduction {self.token_reduction!r}; there are {names}")
        if not self.blocks:
            raise PlanError("the plan keeps no block; keep 1 at least")
        counts = [block.num_tokens for block in self.blocks]
        if counts != sorted(counts, reverse=True):
            raise PlanError(f"patch tokens {counts} grow from one block to the next; a dropped token cannot come back")

    @property
    def exit_block(self) -> int:
        """The number of blocks after which the model answers."""
        return len(self.blocks)

    @property
    def shape_hash(self) -> str:
        """A hash of the widths: equal for plans whose models run equally fast."""
        widths = json.dumps([self.token_reduction, *(asdict(block.shape) for block in self.blocks)], sort_keys=True)
        return hashlib.sha256(widths.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain lists and numbers."""
        # By hand: `asdict` copies every index, 41 ms for a ViT-Base.
        blocks = [
            {
                "keep_heads": list(block.keep_heads),
                "keep_qk": [list(kept) for kept in block.keep_qk],
                "keep_v": [list(kept) for kept in block.keep_v],
                "keep_hidden": list(block.keep_hidden),
                "num_tokens": block.num_tokens,
            }
            for block in self.blocks
        ]
        return {"blocks": blocks, "cutoff_token": self.cutoff_token, "token_reduction": self.token_reduction}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Plan:
        """Reads the plan that `to_json` wrote.

        Raises:
            PlanError: a key is missing or unknown, or the indices are not a plan.
        """
        try:
            _check_keys(record, cls)
            for block in record["blocks"]:
                _check_keys(block, BlockPlan)
            blocks = tuple(
                BlockPlan(
                    keep_heads=tuple(block["keep_heads"]),
                    keep_qk=tuple(map(tuple, block["keep_qk"])),
                    keep_v=tuple(map(tuple, block["keep_v"])),
                    keep_hidden=tuple(block["keep_hidden"]),
                    num_tokens=block["num_tokens"],
                )
                for block in record["blocks"]
            )
            return cls(blocks=blocks, cutoff_token=record["cutoff_token"], token_reduction=record["token_reduction"])
        except (KeyError, TypeError) as error:
            raise PlanError(f"not a plan: {type(error).__name__} {error}") from None


def _check_keys(record: Any, kind: type[Plan] | type[BlockPlan]) -> None:
    if unknown := set(record) - {field.name for field in fields(kind)}:
        raise PlanError(f"not a plan: unknown keys {sorted(unknown)}")


def _check_ascending(name: str, kept: Sequence[int]) -> None:
    if not kept:
        raise PlanError(f"a block keeps no {name}; keep 1 at least, or exit before the block")
    if kept[0] < 0 or any(a >= b for a, b in pairwise(kept)):
        raise PlanError(f"kept {name}s {list(kept)[:8]} do not ascend from 0")
