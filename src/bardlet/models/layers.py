"""Building blocks shared by the families: RMSNorm, rotary positions, the KV cache, masks and initialization.

Shape suffixes: B rows of a batch, T input positions, S attended positions, C channels (n_embd), H query heads,
K key-value heads (H is a multiple of K), D channels of a head, L layers, V vocabulary.
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

from bardlet.config.model import RopeScaling
from bardlet.errors import BardletError
from bardlet.ops.attention import packed_mask


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 and returned in x's dtype.

    LayerNorm without the mean and the bias (Zhang and Sennrich 2019, *Root Mean Square Layer Normalization*, eq. 4).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


# ---------------------------------------------------------------------------- rotary positions


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None,
                     device: torch.device | None = None) -> Tensor:
    """Return the angle by which each channel pair rotates per position: fp32 (D/2,).

    Pair i of D/2 rotates by theta^(-2i/D) (Su et al. 2021, *RoFormer*, section 3.2.2).
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    if scaling is not None:  # the share of a pair's own frequency is 1 for fast pairs, 0 for slow ones
        turns = scaling.context / (2 * math.pi / frequency)
        share = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        frequency = (1 - share) * frequency / scaling.factor + share * frequency
    return frequency


def rope_cos_sin(position_BT: Tensor, head_dim: int, theta: float,
                 scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angle of each channel pair at each position: two fp32 (B, T, 1, D).

    The pairs are (i, i + D/2), across the halves of a head, as in Hugging Face's checkpoints; the paper pairs
    neighboring channels.
    """
    frequency = rope_frequencies(head_dim, theta, scaling, position_BT.device)
    angle_BTD = (position_BT[..., None].float() * frequency).repeat(1, 1, 2)  # (B, T, D/2) -> (B, T, D)
    return angle_BTD.cos()[:, :, None], angle_BTD.sin()[:, :, None]


def apply_rope(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each channel pair of x by its angle, in x's dtype; cos and sin come from `rope_cos_sin`."""
    left, right = x_BTHD.chunk(2, dim=-1)
    return (x_BTHD * cos + torch.cat((-right, left), dim=-1) * sin).to(x_BTHD.dtype)


# ---------------------------------------------------------------------------- the cache


@dataclass
class KVCache:
    """Keys and values of all positions so far, so that a new token computes only its own.

    k, v: (L, B, K, S, D), where S is the capacity. length_B: int64, the number of filled positions of each row.
    Positions past a row's length are never attended to, and are overwritten as the row grows.
    """

    k: Tensor
    v: Tensor
    length_B: Tensor

    def select(self, rows: Tensor) -> KVCache:
        """Return a cache with these rows (int64) only, in this order; a row may occur twice."""
        return KVCache(self.k[:, rows], self.v[:, rows], self.length_B[rows])


LayerCache = tuple[Tensor, Tensor, Tensor]  # k_BKSD and v_BKSD of a layer, and the position_BT to write at


def new_cache(
    model: nn.Module,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> KVCache:
    """Return an empty cache of `shape` (L, B, K, S, D), by default with the dtype and device of the model's weights.

    Filled with zeros, because a masked attention weight of 0 times a NaN in uninitialized memory would be a NaN.
    """
    like = next(model.parameters())
    dtype, device = dtype or like.dtype, device or like.device
    k, v = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    return KVCache(k, v, torch.zeros(shape[1], dtype=torch.int64, device=device))


def layer_cache(cache: KVCache | None, layer: int, position_BT: Tensor) -> LayerCache | None:
    """Return layer `layer` of the cache, for `update_cache`; None without a cache."""
    return None if cache is None else (cache.k[layer], cache.v[layer], position_BT)


def update_cache(cache: LayerCache, k_BTKD: Tensor, v_BTKD: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Write new keys and values at their positions; return the first `length` positions: two (B, K, S, D)."""
    k_BKSD, v_BKSD, position_BT = cache
    row_B1 = torch.arange(len(position_BT), device=position_BT.device)[:, None]
    k_BKSD.transpose(1, 2)[row_B1, position_BT] = k_BTKD.to(k_BKSD.dtype)
    v_BKSD.transpose(1, 2)[row_B1, position_BT] = v_BTKD.to(v_BKSD.dtype)
    return k_BKSD[:, :, :length], v_BKSD[:, :, :length]


# ---------------------------------------------------------------------------- positions and masks


def positions_and_mask(
    idx_BT: Tensor,
    block_size: int,
    cache: KVCache | None = None,
    segment_BT: Tensor | None = None,
    prefix_B: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Return the position ids and the attention mask of a batch.

    Without options: positions 0 .. T-1, and no mask, which `attention` treats as causal. With `cache`, each row
    continues at its own length. `segment_BT`: a new value starts a new example, which attends only to itself and
    starts at position 0. `prefix_B`: the first prefix_B tokens of a row attend to each other in both directions.

    Returns position_BT (or (1, T)) int64, and a mask for `attention`: None, or a boolean (B, 1, T, S), True where a
    token is attended to, or for packed rows on a GPU a block mask.
    Raises BardletError if the positions do not fit in block_size or the cache.
    """
    B, T = idx_BT.shape
    capacity = block_size if cache is None else min(block_size, cache.k.shape[3])
    cached = 0 if cache is None else int(cache.length_B.max())
    if cached + T > capacity:
        raise BardletError(f"{cached + T} tokens do not fit in a context of {capacity}; "
                           "use fewer tokens or a larger --block-size")
    time_T = torch.arange(T, device=idx_BT.device)
    if cache is None and segment_BT is None and prefix_B is None:
        return time_T[None], None
    if cache is not None and segment_BT is not None:
        raise ValueError("a cache holds one example per row: pass segment_BT or cache, not both")

    start_BT = torch.zeros_like(idx_BT)  # the first position of each token's example
    if segment_BT is not None:
        first_BT = F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0), value=True)
        start_BT = (time_T * first_BT).cummax(dim=1).values
        if prefix_B is None:
            return time_T - start_BT, packed_mask(start_BT)
    slot_BT = time_T.expand(B, T) if cache is None else cache.length_B[:, None] + time_T
    key_S = torch.arange(cached + T, device=idx_BT.device)
    mask_BTS = key_S <= slot_BT[:, :, None]
    if prefix_B is not None:  # but no further than this call writes
        mask_BTS = mask_BTS | (key_S < torch.minimum(prefix_B, slot_BT[:, -1] + 1)[:, None, None])
    if segment_BT is not None:
        mask_BTS = mask_BTS & (start_BT[:, :, None] == start_BT[:, None, :])
    return slot_BT - start_BT, mask_BTS[:, None]


# ---------------------------------------------------------------------------- initialization


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Create models on the meta device, where tensors have shapes but take no memory."""
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    """Skip `normal_`: on the meta device torch would load its compiler for it, a second and 100 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **kwargs or {})


def init_weights(model: nn.Module, residual: tuple[str, ...], n_layer: float) -> None:
    """Draw weights from a Gaussian with standard deviation 0.02, as GPT-2's code does; zero biases; leave norms at 1.

    The projections back into the residual stream, whose names end in an entry of `residual`, are scaled by
    1 / sqrt(2 n_layer), because the stream adds up that many of them (Radford et al. 2019, *GPT-2*, section 2.3).
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
