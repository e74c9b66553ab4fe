"""One step of the decoders of gpt2 and Llama on a model's own cache; `pages.py` has the step on shared pages.

Inference only. Shape suffixes: `models/layers.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.models.layers import KVCache


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
