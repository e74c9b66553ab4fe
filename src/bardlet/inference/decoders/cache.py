"""Steps of the decoders of gpt2 and Llama on a model's own cache; `pages.py` has the step on shared pages.

Inference only. Shape suffixes: `models/layers.py`; N tokens of a step (B T), G query heads that share keys, Q queries
of these keys (T G).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bardlet.errors import BardletError
from bardlet.models.layers import KVCache


def without_plans(device: torch.device) -> AbstractContextManager[Any]:
    """Attention without cuDNN on a GPU: it plans each new shape, which takes tenths of a second, and there are many."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return nullcontext() if device.type == "cpu" else sdpa_kernel(kernels)


class Step(Protocol):
    """One more token for each row: its position, and its attention to the tokens before it."""

    position: Tensor  # (B,) int64

    def attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        """Write each row's key and value, and return its attention output: (B, H D).

        The queries must already be divided by sqrt(D).
        """


class CacheStep:
    """One more token for every row of a cache, which this step makes longer: its position and its attention mask."""

    def __init__(self, cache: KVCache) -> None:
        length = cache.length_B.tolist()
        reach = max(length) + 1
        if reach > cache.k.shape[3]:
            raise BardletError(f"the cache is full after {cache.k.shape[3]} tokens; create a longer one")
        self.position = cache.length_B.clone()
        cache.length_B += 1
        self.equal_lengths = min(length) == max(length)  # rows of equal length need no mask
        key_S = torch.arange(reach, device=cache.k.device)
        self.mask = None if self.equal_lengths else (key_S <= self.position[:, None])[:, None, None]
        self.row_B = torch.arange(len(length), device=cache.k.device)
        # views for all layers at once: the visible positions and, for rows of equal length, the new token's position
        self.k, self.v = cache.k[:, :, :, :reach].unbind(0), cache.v[:, :, :, :reach].unbind(0)
        self.new_k, self.new_v = cache.k[:, :, :, reach - 1].unbind(0), cache.v[:, :, :, reach - 1].unbind(0)

    def attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        """See `Step.attend`."""
        k_BKSD, v_BKSD = self.k[layer], self.v[layer]
        if self.equal_lengths:
            self.new_k[layer].copy_(k_BKD)
            self.new_v[layer].copy_(v_BKD)
        else:
            k_BKSD[self.row_B, :, self.position] = k_BKD.to(k_BKSD.dtype)
            v_BKSD[self.row_B, :, self.position] = v_BKD.to(v_BKSD.dtype)
        grouped = q_BHD.shape[1] != k_BKD.shape[1]
        q_BH1D = q_BHD.unsqueeze(2).to(k_BKSD.dtype)
        y_BH1D = F.scaled_dot_product_attention(q_BH1D, k_BKSD, v_BKSD, self.mask, enable_gqa=grouped, scale=1.0)
        return y_BH1D.reshape(len(q_BHD), -1).to(v_BKD.dtype)  # (B, H, 1, D) -> (B, HD)


class StaticStep:
    """T more tokens for each row of a cache: a `Step` whose shapes depend on no length, for a CUDA graph.

    A token attends to the positions up to its own; later positions are masked.
    """

    def __init__(self, cache: KVCache, position_BT: Tensor, heads: int, reach: int,
                 row_B: Tensor | None = None) -> None:
        """position_BT: int64. reach: number of positions to read, more than each of these. row_B: rows of the cache
        (int64); None: all."""
        device, group = position_BT.device, heads // cache.k.shape[2]
        self.position, self.position_BT, self.row_B = position_BT.flatten(), position_BT, row_B
        self.row_B1 = (torch.arange(len(position_BT), device=device) if row_B is None else row_B)[:, None]
        self.k, self.v = cache.k[:, :, :, :reach].unbind(0), cache.v[:, :, :, :reach].unbind(0)
        hidden_BTS = torch.arange(reach, device=device) > position_BT[:, :, None]
        mask_BTS = torch.zeros(hidden_BTS.shape, dtype=cache.k.dtype, device=device)
        mask_BTS.masked_fill_(hidden_BTS, float("-inf"))
        self.mask_B1QS = mask_BTS[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)[:, None]

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Write each token's key and value, and return its attention output: (N, H D), with N = B T.

        The queries must already be divided by sqrt(D). Heads that share keys are further queries of these keys, so
        that no kernel has to repeat the keys.
        """
        k_BKSD, v_BKSD, K = self.k[layer], self.v[layer], k_NKD.shape[1]
        B, T = self.position_BT.shape
        k_BKSD[self.row_B1, :, self.position_BT] = k_NKD.unflatten(0, (B, T)).to(k_BKSD.dtype)
        v_BKSD[self.row_B1, :, self.position_BT] = v_NKD.unflatten(0, (B, T)).to(v_BKSD.dtype)
        if self.row_B is not None:
            k_BKSD, v_BKSD = k_BKSD[self.row_B], v_BKSD[self.row_B]
        q_BTKGD = q_NHD.to(k_BKSD.dtype).unflatten(1, (K, -1)).unflatten(0, (B, T))
        q_BKQD = q_BTKGD.transpose(1, 2).flatten(2, 3)
        y_BKQD = F.scaled_dot_product_attention(q_BKQD, k_BKSD, v_BKSD, self.mask_B1QS, scale=1.0)
        return y_BKQD.unflatten(2, (T, -1)).transpose(1, 2).reshape(B * T, -1).to(v_NKD.dtype)
