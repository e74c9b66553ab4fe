"""Scaled dot-product attention, with a custom backward pass for short contexts on CPUs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bardlet.ops.dropout import byte_dropout, keep_prob

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Positions of a block of a block mask."""


def attention(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | BlockMask | None = None, dropout: float = 0.0
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v for each head (Vaswani et al. 2017, eq. 1): (B, H, T, D) in q's dtype.

    Query head h reads key-value head h // (H / K) (grouped queries, Ainslie et al. 2023). `mask` is boolean and
    broadcasts to (B, 1, T, S), True where a key is attended to, or a block mask (`packed_mask`); None is causal, with
    T = S. `dropout` is the share of the weights to drop: 0.0 outside training.

    Torch's fused kernel never stores the (T, S) weights and is faster nearly everywhere. On a CPU it is slower in half
    precision on short contexts (2 cores with AVX-512 and bf16, a compiled block: T 64, 5.8 ms against 3.3; T 256, 459
    against 440; T 512, equal; T 1024, twice as fast), and with dropout there is no fused kernel.
    """
    if q_BHTD.dtype != k_BKSD.dtype:  # a cache may have a wider dtype than the model
        return attention(q_BHTD.to(k_BKSD.dtype), k_BKSD, v_BKSD, mask, dropout).to(q_BHTD.dtype)
    if hasattr(mask, "mask_mod"):
        return _block_attention(q_BHTD, k_BKSD, v_BKSD, cast(Any, mask), dropout)
    short_half = q_BHTD.dtype in (torch.bfloat16, torch.float16) and k_BKSD.shape[2] <= 256
    if q_BHTD.device.type == "cpu" and (short_half or dropout > 0):
        return attention_by_hand(q_BHTD, k_BKSD, v_BKSD, mask, dropout)
    grouped = q_BHTD.shape[1] != k_BKSD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTD, k_BKSD, v_BKSD, mask, dropout, is_causal=mask is None, enable_gqa=grouped
    )


def packed_mask(start_BT: Tensor) -> Tensor | BlockMask:
    """Return the causal mask of rows that hold several examples, each of which attends only to itself.

    start_BT: int64, the position in its row at which a token's example starts. On an NVIDIA GPU, a mask of blocks: its
    kernel skips the blocks without a pair of tokens to attend. Elsewhere a boolean (B, 1, T, T).
    """
    B, T = start_BT.shape
    if start_BT.device.type == "cuda" and T % BLOCK == 0:
        return block_mask(start_BT)
    time_T = torch.arange(T, device=start_BT.device)
    return ((time_T <= time_T[:, None]) & (start_BT[:, :, None] == start_BT[:, None, :]))[:, None]


def block_mask(start_BT: Tensor) -> BlockMask:
    """Return the mask of `packed_mask` as blocks of BLOCK by BLOCK positions (He et al. 2024, *FlexAttention*)."""
    from torch.nn.attention.flex_attention import create_block_mask  # half a second

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (start_BT[row, query] == start_BT[row, key])

    B, T = start_BT.shape
    return create_block_mask(attends, B, None, T, T, device=start_BT.device, BLOCK_SIZE=BLOCK)


def _block_attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: BlockMask, dropout: float) -> Tensor:
    """Compute `attention` with a block mask; only compiled code has a kernel for it, and that has no dropout."""
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    B, H, T, _ = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    if torch.compiler.is_compiling() and not dropout:
        return flex_attention(q_BHTD, k_BKSD, v_BKSD, block_mask=mask, enable_gqa=H != K)
    return attention(q_BHTD, k_BKSD, v_BKSD, create_mask(mask.mask_mod, B, 1, T, S, q_BHTD.device), dropout)


def attention_by_hand(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Compute `attention` without a fused kernel: a matmul, a softmax, a matmul."""
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    if mask is None and T >= 128 and T % 2 == 0:
        # the first half of the queries needs only the first half of the keys, which saves a quarter of the products
        half = T // 2
        first = attention_by_hand(q_BHTD[:, :, :half], k_BKSD[:, :, :half], v_BKSD[:, :, :half], None, dropout)
        hide = torch.full((half, T), float("-inf"), device=q_BHTD.device).triu(half + 1)
        return torch.cat((first, _masked_attention(q_BHTD[:, :, half:], k_BKSD, v_BKSD, hide, dropout)), dim=2)
    if mask is None:
        hide = torch.full((T, S), float("-inf"), device=q_BHTD.device).triu(1)
    else:
        hide = torch.zeros(mask.shape, device=q_BHTD.device).masked_fill(~mask, float("-inf"))
    return _masked_attention(q_BHTD, k_BKSD, v_BKSD, hide, dropout)


def _masked_attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, hide: Tensor, dropout: float) -> Tensor:
    """Compute attention with a mask that is added to the scores, (T, S) or (B, 1, T, S)."""
    B, H, T, D = q_BHTD.shape
    K = k_BKSD.shape[1]
    if H != K:  # treat the heads of a group as more queries of one head, which avoids copies of k and v
        q_BHTD = q_BHTD.reshape(B, K, H // K * T, D)
        hide = hide.repeat(*[1] * (hide.dim() - 2), H // K, 1)
    y, _, _ = _AttentionByHand.apply(q_BHTD, k_BKSD, v_BKSD, hide, dropout)
    return y.reshape(B, H, T, D)


class _AttentionByHand(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + hide) v, with a backward pass that reuses the attention weights.

    By default the compiler saves the scores and recomputes the weights in the backward pass, masks and exponentials
    included, which took twice as long as the forward pass. With y = P v and the gradient dy, the gradient of the scores
    is P * (dy v^T - sum of dy * y) (Dao et al. 2022, *FlashAttention*, appendix B.2).
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, hide: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        score = (q @ k.transpose(-2, -1)).to(wide) * (1.0 / math.sqrt(q.shape[-1])) + hide  # (B, K, H/K * T, S)
        weight = F.softmax(score, dim=-1).to(v.dtype)
        dropped = byte_dropout(weight, dropout) if dropout else weight.new_empty(0)
        return (dropped if dropout else weight) @ v, weight, dropped

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, _, ctx.dropout = inputs
        y, weight, dropped = output
        ctx.mark_non_differentiable(weight, dropped)
        ctx.save_for_backward(q, k, v, y, weight, dropped)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        q, k, v, y, weight, dropped = ctx.saved_tensors
        dv = (dropped if ctx.dropout else weight).transpose(-2, -1) @ dy
        wide = torch.promote_types(q.dtype, torch.float32)
        d_weight = (dy @ v.transpose(-2, -1)).to(wide)
        if ctx.dropout:
            d_weight = torch.where(dropped.to(wide) != 0, d_weight / keep_prob(ctx.dropout, q.device), 0.0)
        delta = (dy.to(wide) * y.to(wide)).sum(-1, keepdim=True)
        d_score = (weight.to(wide) * (d_weight - delta) * (1.0 / math.sqrt(q.shape[-1]))).to(q.dtype)
        return d_score @ k, d_score.transpose(-2, -1) @ q, dv, None, None
