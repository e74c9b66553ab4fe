"""What the families share: norms, rotary positions, attention, and the cache of keys and values.

Shape suffixes: B rows of a batch, T positions of the input, S positions that are attended to, C channels
(n_embd), H query heads, K key-value heads (H is a multiple of K), D channels of a head, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bardlet.errors import BardletError


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, given back in x's dtype.

    LayerNorm without the mean and the bias (Zhang and Sennrich 2019, *Root Mean Square Layer Normalization*, eq. 4).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


# ---------------------------------------------------------------------------- dropout


@torch.library.custom_op("bardlet::random_bytes", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_bytes(x: Tensor) -> Tensor:
    """Random bytes (uint8, CPU) in the shape of x from torch's generator, eight of each 64-bit number that it draws.

    An operator of its own, so that compiled code calls it, too, and drops what eager code drops. It takes x, not its
    shape: the compiler merges calls with equal arguments, and two places of a block would share a mask.
    """
    drawn = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    return drawn.view(torch.uint8)[: x.numel()].view(x.shape)


@random_bytes.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.uint8)


def drop(x: Tensor, p: float) -> Tensor:
    """x with a part p of its elements, drawn anew at each call, set to 0, and the others grown to keep the mean.

    Srivastava et al. 2014, *Dropout*; scaled in training, as everywhere today. On a CPU F.dropout draws 24 bits for
    each element, which doubled the time of a compiled step. A byte is enough: p is then rounded to a multiple of
    1/256, at least 1 and at most 255 of them, and the scale is that of the rounded p.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    share = kept_share(p, x.device)
    # compared as floats: the compiler has no vector instructions for the bytes themselves, and takes ten times as long
    return torch.where(random_bytes(x.detach()).float() >= round(256 * (1 - share)), x * (1 / share), 0.0)


def kept_share(p: float, device: torch.device) -> float:
    """The part of the elements that `drop` keeps."""
    return 1 - min(max(1, round(256 * p)), 255) / 256 if device.type == "cpu" else 1 - p


class Dropout(nn.Module):
    """`drop` in training, nothing otherwise."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


# ---------------------------------------------------------------------------- rotary positions


def rotary(position_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle by which each channel pair turns at each position: two fp32 (B, T, 1, D).

    Pair i of D/2 turns by position * theta^(-2i/D) (Su et al. 2021, *RoFormer*, section 3.2.2). The pairs are
    (i, i + D/2), the halves of a head, as in Hugging Face's checkpoints; the paper pairs neighbours.
    """
    turn = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=position_BT.device).float() / head_dim)
    angle_BTD = (position_BT[..., None].float() * turn).repeat(1, 1, 2)  # (B, T, D/2) -> (B, T, D)
    return angle_BTD.cos()[:, :, None], angle_BTD.sin()[:, :, None]


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with each channel pair turned by its angle, in x's dtype; cos and sin come from `rotary`."""
    left, right = x_BTHD.chunk(2, dim=-1)
    return (x_BTHD * cos + torch.cat((-right, left), dim=-1) * sin).to(x_BTHD.dtype)


# ---------------------------------------------------------------------------- the cache


@dataclass
class KVCache:
    """Keys and values of every position seen so far, so that a new token only computes its own.

    k, v: (L, B, K, S, D), S is how many positions fit. length_B: int64, how many positions of each row are filled.
    What lies behind a row's length is never attended to, and overwritten as the row grows.
    """

    k: Tensor
    v: Tensor
    length_B: Tensor


Store = tuple[Tensor, Tensor, Tensor]  # a layer's part of the cache: k_BKSD, v_BKSD, position_BT to write at


def new_cache(
    model: nn.Module,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> KVCache:
    """An empty cache of `shape` (L, B, K, S, D), by default in the dtype and on the device of the model's weights.

    Zeros, not uninitialised memory: a masked weight of 0 times a NaN would still be a NaN.
    """
    like = next(model.parameters())
    dtype, device = dtype or like.dtype, device or like.device
    k, v = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    return KVCache(k, v, torch.zeros(shape[1], dtype=torch.int64, device=device))


def layer_store(cache: KVCache | None, layer: int, position_BT: Tensor) -> Store | None:
    """Layer `layer` of the cache, for `remember`."""
    return None if cache is None else (cache.k[layer], cache.v[layer], position_BT)


def remember(store: Store, k_BTKD: Tensor, v_BTKD: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Writes new keys and values at their positions; gives back the first `reach` ones: two (B, K, S, D)."""
    k_BKSD, v_BKSD, position_BT = store
    row_B1 = torch.arange(len(position_BT), device=position_BT.device)[:, None]
    k_BKSD.transpose(1, 2)[row_B1, position_BT] = k_BTKD.to(k_BKSD.dtype)
    v_BKSD.transpose(1, 2)[row_B1, position_BT] = v_BTKD.to(v_BKSD.dtype)
    return k_BKSD[:, :, :reach], v_BKSD[:, :, :reach]


# ---------------------------------------------------------------------------- who sees whom


def place(
    idx_BT: Tensor,
    block_size: int,
    cache: KVCache | None = None,
    segment_BT: Tensor | None = None,
    prefix_B: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Where each token stands, and whom it sees.

    Without options: positions 0 .. T-1, and no mask, which `attention` takes as causal. With `cache`, positions
    go on at each row's own length. `segment_BT`: a new value starts a new example, which sees itself alone and
    starts at position 0. `prefix_B`: the first prefix_B tokens of a row see each other both ways.

    Returns position_BT (or (1, T)) int64, and None or a boolean (B, 1, T, S), True where a token is seen.
    Raises BardletError where the positions do not fit in block_size or the cache.
    """
    B, T = idx_BT.shape
    room = block_size if cache is None else min(block_size, cache.k.shape[3])
    seen = 0 if cache is None else int(cache.length_B.max())
    if seen + T > room:
        raise BardletError(f"{seen + T} tokens do not fit in a context of {room}: give fewer, or a larger --block-size")
    time_T = torch.arange(T, device=idx_BT.device)
    if cache is None and segment_BT is None and prefix_B is None:
        return time_T[None], None
    if cache is not None and segment_BT is not None:
        raise ValueError("a cache holds one example a row: give segment_BT or cache, not both")

    start_BT = torch.zeros_like(idx_BT)  # where the example of each token starts
    if segment_BT is not None:
        first_BT = F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0), value=True)
        start_BT = (time_T * first_BT).cummax(dim=1).values
    slot_BT = time_T.expand(B, T) if cache is None else cache.length_B[:, None] + time_T
    key_S = torch.arange(seen + T, device=idx_BT.device)
    mask_BTS = key_S <= slot_BT[:, :, None]
    if prefix_B is not None:  # never beyond what this call writes
        mask_BTS = mask_BTS | (key_S < torch.minimum(prefix_B, slot_BT[:, -1] + 1)[:, None, None])
    if segment_BT is not None:
        mask_BTS = mask_BTS & (start_BT[:, :, None] == start_BT[:, None, :])
    return slot_BT - start_BT, mask_BTS[:, None]


# ---------------------------------------------------------------------------- attention


def attention(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for each head (Vaswani et al. 2017, eq. 1): (B, H, T, D) in q's dtype.

    Query head h reads key-value head h // (H / K) (grouped queries, Ainslie et al. 2023). `mask` is boolean and
    broadcasts to (B, 1, T, S), True where a key is seen; None is causal, with T = S. `dropout` is the part of the
    weights that is dropped: 0.0 outside training.

    Torch's fused kernel never writes the (T, S) weights down, and wins nearly everywhere. Measured on 2 cores with
    AVX-512 and bf16, it loses on a CPU in half precision on short contexts (a compiled block, T 64: 5.8 ms against
    3.3; T 256: 459 against 440; T 512: even; T 1024: it wins twofold), and where weights are dropped it is none.
    """
    if q_BHTD.dtype != k_BKSD.dtype:  # a cache may be kept wider than the model
        return attention(q_BHTD.to(k_BKSD.dtype), k_BKSD, v_BKSD, mask, dropout).to(q_BHTD.dtype)
    short_half = q_BHTD.dtype in (torch.bfloat16, torch.float16) and k_BKSD.shape[2] <= 256
    if q_BHTD.device.type == "cpu" and (short_half or dropout > 0):
        return attention_by_hand(q_BHTD, k_BKSD, v_BKSD, mask, dropout)
    grouped = q_BHTD.shape[1] != k_BKSD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTD, k_BKSD, v_BKSD, mask, dropout, is_causal=mask is None, enable_gqa=grouped
    )


def attention_by_hand(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The same as `attention`, as one writes it: a product, a softmax, a product."""
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    if mask is None and T >= 128 and T % 2 == 0:
        # the first half of the queries sees the first half of the keys alone: a quarter of the products is saved
        half = T // 2
        first = attention_by_hand(q_BHTD[:, :, :half], k_BKSD[:, :, :half], v_BKSD[:, :, :half], None, dropout)
        hide = torch.full((half, T), float("-inf"), device=q_BHTD.device).triu(half + 1)
        return torch.cat((first, _weigh(q_BHTD[:, :, half:], k_BKSD, v_BKSD, hide, dropout)), dim=2)
    if mask is None:
        hide = torch.full((T, S), float("-inf"), device=q_BHTD.device).triu(1)
    else:
        hide = torch.zeros(mask.shape, device=q_BHTD.device).masked_fill(~mask, float("-inf"))
    return _weigh(q_BHTD, k_BKSD, v_BKSD, hide, dropout)


def _weigh(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, hide: Tensor, dropout: float) -> Tensor:
    """Attention with a mask to be added to the scores, (T, S) or (B, 1, T, S)."""
    B, H, T, D = q_BHTD.shape
    K = k_BKSD.shape[1]
    if H != K:  # the heads of a group as more queries of one head: no copies of k and v
        q_BHTD = q_BHTD.reshape(B, K, H // K * T, D)
        hide = hide.repeat(*[1] * (hide.dim() - 2), H // K, 1)
    y, _, _ = _Weighted.apply(q_BHTD, k_BKSD, v_BKSD, hide, dropout)
    return y.reshape(B, H, T, D)


class _Weighted(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + hide) v, and its gradients from the weights as they were.

    Left to itself, the compiler keeps the scores and makes the weights again from them in the backward pass, masks and
    exponentials and all: that took twice as long as the forward pass. With y = P v and the gradient dy, the gradient of
    the scores is P * (dy v^T - sum of dy * y) (Dao et al. 2022, *FlashAttention*, appendix B.2).
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, hide: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        score = (q @ k.transpose(-2, -1)).to(wide) * (1.0 / math.sqrt(q.shape[-1])) + hide  # (B, K, H/K * T, S)
        weight = F.softmax(score, dim=-1).to(v.dtype)
        kept = drop(weight, dropout) if dropout else weight.new_empty(0)
        return (kept if dropout else weight) @ v, weight, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, _, ctx.dropout = inputs
        y, weight, kept = output
        ctx.mark_non_differentiable(weight, kept)
        ctx.save_for_backward(q, k, v, y, weight, kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        q, k, v, y, weight, kept = ctx.saved_tensors
        dv = (kept if ctx.dropout else weight).transpose(-2, -1) @ dy
        wide = torch.promote_types(q.dtype, torch.float32)
        d_weight = (dy @ v.transpose(-2, -1)).to(wide)
        if ctx.dropout:
            d_weight = torch.where(kept.to(wide) != 0, d_weight / kept_share(ctx.dropout, q.device), 0.0)
        along = (dy.to(wide) * y.to(wide)).sum(-1, keepdim=True)
        d_score = (weight.to(wide) * (d_weight - along) * (1.0 / math.sqrt(q.shape[-1]))).to(q.dtype)
        return d_score @ k, d_score.transpose(-2, -1) @ q, dv, None, None


# ---------------------------------------------------------------------------- initialisation


@contextmanager
def sketching() -> Iterator[None]:
    """Models that are made inside are on the meta device: shapes that take no memory."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """`normal_` does nothing: for it torch loads its compiler on the meta device, which takes a second and 100 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **kwargs or {})


def init_weights(model: nn.Module, residual: tuple[str, ...], n_layer: float) -> None:
    """Weights from a Gaussian of deviation 0.02, as in GPT-2's code, biases 0; norms stay as they are made, 1.

    The projections back into the residual stream, whose names end in one of `residual`, are scaled by
    1 / sqrt(2 n_layer): the stream adds up that many of them (Radford et al. 2019, *GPT-2*, section 2.3).
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                scaled = name.endswith(residual)
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * n_layer) if scaled else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


ACTIVATIONS: dict[str, Any] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
