"""A transformer block whose query/key and value widths differ, and whose tokens are reduced.

B images, N tokens, P prefix tokens, H heads, K query/key width a head, V value width a head, C model width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.errors import PlanError
from pruning.model.tokens import AttentionState, Reduced, Reducer
from pruning.model.windows import Downsample, Windows


class SlimAttention(nn.Module):
    """Self-attention whose heads have query/key channels (K) and value channels (V) in different numbers.

    `scale` is the dense head's: pruning channels does not re-scale the rest.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        *,
        num_heads: int,
        qk_width: int,
        v_width: int,
        scale: float,
        q_norm: nn.Module,
        k_norm: nn.Module,
    ) -> None:
        """Takes the layers as they are; qkv gives H*K queries, H*K keys, H*V values, in this order; proj takes H*V."""
        super().__init__()
        assert qkv.out_features == num_heads * (2 * qk_width + v_width)
        assert proj.in_features == num_heads * v_width
        self.qkv, self.proj, self.q_norm, self.k_norm = qkv, proj, q_norm, k_norm
        self.num_heads, self.qk_width, self.v_width, self.scale = num_heads, qk_width, v_width, scale

    def forward(self, x: Tensor) -> Tensor:
        """Attends and projects. (B, N, C) -> (B, N, C)."""
        return self.proj(self.mix(*self.project(x)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries and keys (B, H, N, K) and values (B, H, N, V) of tokens (B, N, C)."""
        inner = self.num_heads * self.qk_width
        q, k, v = self.qkv(x).split([inner, inner, self.num_heads * self.v_width], dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.q_norm(q), self.k_norm(k), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> Tensor:
        """Mixes the values by fused attention into the input of `proj`: (B, N, H*V).

        Args:
            size: (B, N, 1), the patches that each token stands for: it counts as often (ToMe's proportional attention).
        """
        return self._mix(q, k, v, log_size(size, q.dtype))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        # The fused CPU kernel wants equal widths; zeros change neither the logits nor the kept outputs,
        # and cost less than the unfused product in bf16 (3.4 against 8.8 ms at 16 x 3 x 197 x 64).
        v_width = v.shape[-1]
        if (gap := q.shape[-1] - v_width) and not v.is_cuda:
            q, k, v = (q, k, F.pad(v, (0, gap))) if gap > 0 else (F.pad(q, (0, -gap)), F.pad(k, (0, -gap)), v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return mixed[..., :v_width].transpose(1, 2).flatten(2)

    def mix_with_map(self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the mixed values (B, N, H*V) and the attention map (B, H, N, N), for blocks that need all of it."""
        logits = (q * self.scale) @ k.transpose(-2, -1)
        bias = log_size(size, logits.dtype)
        attention = (logits if bias is None else logits + bias).softmax(dim=-1)
        return (attention.to(v.dtype) @ v).transpose(1, 2).flatten(2), attention


class WindowedAttention(SlimAttention):
    """Attention within windows (Swin): queries, keys and values are (B * windows, H, tokens of a window, width)."""

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, *, windows: Windows, **widths: Any) -> None:
        """Takes the windows beside the arguments of `SlimAttention`."""
        super().__init__(qkv, proj, **widths)
        self.windows = windows

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(self.windows.partition(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> Tensor:
        """Mixes the values within their windows: (B, N, H*V). Tokens of windows have no sizes."""
        assert size is None
        return self.windows.reverse(self._mix(q, k, v, self.windows.logit_bias(q.shape[0]).to(q.dtype)))


def log_size(size: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns the term that proportional attention adds to the logits. (B, N, 1) -> (B, 1, 1, N)."""
    return None if size is None else size.float().log().to(dtype).transpose(1, 2)[:, None]


class SlimMlp(nn.Module):
    """An MLP of two linear layers with an activation between them."""

    def __init__(self, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, act, fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SlimBlock(nn.Module):
    """A block that attends, then reduces the tokens (VTC-LFC's place for it), then applies the MLP.

    Once tokens are merged they have sizes. A size travels with its token, as one more channel behind the C of the
    model, so that code that batches, orders or stores a stream keeps both together; the last block takes it off.
    """

    def __init__(
        self,
        *,
        downsample: Downsample | None,
        norm1: nn.Module,
        attn: SlimAttention,
        ls1: nn.Module,
        reducer: Reducer | None,
        norm2: nn.Module,
        mlp: SlimMlp,
        ls2: nn.Module,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.norm1, self.attn, self.ls1 = norm1, attn, ls1
        self.reducer = reducer
        self.norm2, self.mlp, self.ls2 = norm2, mlp, ls2
        self.width, self.is_last = attn.qkv.in_features, is_last

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Runs the block: (B, N, C), or (B, N, C + 1) with sizes, to N' tokens, those that the reduction leaves.

        Raises:
            PlanError: an attention mask, which timm's blocks take, or images of another number of patches than planned.
        """
        if attn_mask is not None or is_causal:
            raise PlanError("a pruned block takes no attention mask; use the dense model, or leave attn_mask out")
        x, size = self.enter(x)
        mixed, state = self.attend(x, size)
        x, size, _ = self.reduce(x + self.ls1(self.attn.proj(mixed)), state)
        return self.pack(x + self.ls2(self.mlp(self.norm2(x))), size)

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Splits the block's input into tokens (B, N, C) and their sizes (B, N, 1), if any; merges a Swin's patches."""
        return (self.downsample(x), None) if self.downsample is not None else unpack(x, self.width)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the stream after attention and after the MLP, (B, N, C) both, of a block that reduces no tokens."""
        x, size = self.enter(x)
        mid = x + self.ls1(self.attn.proj(self.attend(x, size)[0]))
        return mid, mid + self.ls2(self.mlp(self.norm2(mid)))

    def attend(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, AttentionState]:
        """Returns the input of the attention's projection (B, N, H*V), and the state that a reduction may look at."""
        q, k, v = self.attn.project(self.norm1(x))
        if self.reducer is not None and self.reducer.needs_map:
            mixed, attention = self.attn.mix_with_map(q, k, v, size)
            return mixed, AttentionState(q=q, k=k, scale=self.attn.scale, size=size, attention=attention)
        return self.attn.mix(q, k, v, size), AttentionState(q=q, k=k, scale=self.attn.scale, size=size, attention=None)

    def reduce(self, x: Tensor, state: AttentionState) -> tuple[Tensor, Tensor | None, Reduced | None]:
        """Returns the tokens that go on (B, N', C), their sizes (B, N', 1) if any, and the reduction that was made."""
        if self.reducer is None:
            return x, state.size, None
        self.reducer.check(x)
        reduced = self.reducer.choose(x, state)
        return reduced.apply(x), reduced.size, reduced

    def pack(self, x: Tensor, size: Tensor | None) -> Tensor:
        """Appends the sizes to the tokens, if there are any and a block comes after this one."""
        return x if size is None or self.is_last else torch.cat([x, size.to(x.dtype)], dim=-1)


def unpack(x: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Splits a stream into its tokens (B, N, C) and their sizes (B, N, 1), if they have any."""
    return (x, None) if x.shape[-1] == width else (x[..., :width], x[..., width:])
