"""What the families share: norms, rotary positions, attention, and the cache of keys and values.

Shape suffixes: B rows of a batch, T positions of the input, S positions that are attended to, C channels
(n_embd), H query heads, K key-value heads (H is a multiple of K), D channels of a head, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    limit = min(max(1, round(256 * p)), 255)
    return torch.where(random_bytes(x.detach()) >= limit, x * (256 / (256 - limit)), 0.0)


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
    if mask is None:
        hide = torch.full((T, S), float("-inf"), device=q_BHTD.device).triu(1)
    else:
        hide = torch.zeros(mask.shape, device=q_BHTD.device).masked_fill(~mask, float("-inf"))
    if H != K:  # the heads of a group as more queries of one head: no copies of k and v
        q_BHTD = q_BHTD.reshape(B, K, H // K * T, D)
        hide = hide.repeat(*[1] * (hide.dim() - 2), H // K, 1)
    score = q_BHTD @ k_BKSD.transpose(-2, -1) * (1.0 / math.sqrt(D)) + hide  # (B, K, H/K * T, S)
    weight = F.softmax(score, dim=-1, dtype=torch.float32).to(v_BKSD.dtype)
    weight = drop(weight, dropout)
    return (weight @ v_BKSD).reshape(B, H, T, D)


# ---------------------------------------------------------------------------- one token at a time


class Product:
    """x W^T + b for a few tokens, with a weight (O, I) that is not trained further.

    To read the weights is nearly all the work, and on x86 `F.linear` reads them slowly for one token (in fp32 on one
    thread). But a product with one token is a sum of W^T's rows weighted by x, which is what `embedding_bag` computes,
    at the speed of memory: on a transposed copy, cut into P slices of rows, two a thread, whose sums are added up.
    Measured for the 24 matrices of 10.6 M parameters, 2 threads: 2.4 ms by `F.linear`, 0.55 so (only to read them:
    0.45); bf16 0.75 against 0.43. A few fp32 tokens gain from the slices, too: 4 take 1.8 ms for 4.0.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        out, width = weight.shape
        x86 = weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        self.sliced = x86 and weight.dtype in (torch.float32, torch.bfloat16)
        if self.sliced:
            slices = next(n for n in range(2 * torch.get_num_threads(), 0, -1) if width % n == 0)
            self.weight = weight.t().contiguous()  # (I, O)
            self.weight_PIO = self.weight.view(slices, width // slices, out)
            self.row_I, self.start_P = torch.arange(width), torch.arange(0, width, width // slices)

    def __call__(self, x_BI: Tensor) -> Tensor:
        if not self.sliced:
            return F.linear(x_BI, self.weight, self.bias)
        if len(x_BI) == 1:
            x_I = x_BI.view(-1)
            sums_PO = F.embedding_bag(self.row_I, self.weight, self.start_P, per_sample_weights=x_I, mode="sum")
            y_BO = sums_PO.sum(0, keepdim=True)
        elif x_BI.dtype == torch.float32:
            x_PBI = x_BI.view(len(x_BI), len(self.start_P), -1).transpose(0, 1)  # (B, I) -> (P, B, I / P)
            y_BO = torch.bmm(x_PBI, self.weight_PIO).sum(0)  # (P, B, O) -> (B, O)
        else:
            y_BO = x_BI @ self.weight
        return y_BO if self.bias is None else y_BO.add_(self.bias)


class Step:
    """One more token for every row of a cache: where it goes, and whom it sees. Reads length_B once."""

    def __init__(self, cache: KVCache) -> None:
        length = cache.length_B.tolist()
        reach = max(length) + 1
        if reach > cache.k.shape[3]:
            raise BardletError(f"the cache is full after {cache.k.shape[3]} tokens: make a longer one")
        self.position_B = cache.length_B
        self.even = min(length) == max(length)  # then the rows need no mask
        key_S = torch.arange(reach, device=cache.k.device)
        self.mask = None if self.even else (key_S <= self.position_B[:, None])[:, None, None]
        self.row_B = torch.arange(len(length), device=cache.k.device)
        # views, made once for all layers: what is seen, and the place of a new token where the rows are even
        self.k, self.v = cache.k[:, :, :, :reach].unbind(0), cache.v[:, :, :, :reach].unbind(0)
        self.new_k, self.new_v = cache.k[:, :, :, reach - 1].unbind(0), cache.v[:, :, :, reach - 1].unbind(0)

    def attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        """Puts the token's key and value into the cache; what the token reads there: (B, H D)."""
        k_BKSD, v_BKSD = self.k[layer], self.v[layer]
        if self.even:
            self.new_k[layer].copy_(k_BKD)
            self.new_v[layer].copy_(v_BKD)
        else:
            k_BKSD[self.row_B, :, self.position_B] = k_BKD.to(k_BKSD.dtype)
            v_BKSD[self.row_B, :, self.position_B] = v_BKD.to(v_BKSD.dtype)
        grouped = q_BHD.shape[1] != k_BKD.shape[1]
        q_BH1D = q_BHD.unsqueeze(2).to(k_BKSD.dtype)
        y_BH1D = F.scaled_dot_product_attention(q_BH1D, k_BKSD, v_BKSD, self.mask, enable_gqa=grouped)
        return y_BH1D.reshape(len(q_BHD), -1).to(q_BHD.dtype)  # (B, H, 1, D) -> (B, HD)


# ---------------------------------------------------------------------------- initialisation


def init_weights(model: nn.Module, residual: tuple[str, ...], n_layer: int) -> None:
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
