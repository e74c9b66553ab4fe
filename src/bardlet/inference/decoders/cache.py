"""KV caches of the gpt2 and qwen3 decoders, and one decoding step on them.

Inference only. Shape suffixes: `models/layers.py`; R is the capacity of a cache in positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.models.layers import KVCache


class DecoderCache(Protocol):
    """The keys and values of a batch, as a decoder extends and reads them."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    @property
    def full(self) -> bool:
        """True if a row has no room for another token."""

    @property
    def copies(self) -> bool:
        """True if `select` copies the whole cache, so that finished rows should be removed rarely."""

    def step(self) -> Any:
        """Make room for one more token per row; return an object with `position` and `attend`, see `DecodeStep`."""

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Keep these rows only, in this order; a row may occur twice."""

    def refill(self, row: int, length: int, fill: Callable[[KVCache], object]) -> None:
        """Replace `row` by what `fill` writes into an empty one-row cache with room for `length` tokens."""


class PlainCache:
    """A model's own cache, read by scaled dot-product attention."""

    copies = False

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    @property
    def rows(self) -> int:
        """See `DecoderCache`."""
        return len(self.cache.length_B)

    @property
    def full(self) -> bool:
        """See `DecoderCache`."""
        return int(self.cache.length_B.max()) >= self.cache.k.shape[3]

    def step(self) -> DecodeStep:
        """See `DecoderCache`."""
        step = DecodeStep(self.cache)
        self.cache.length_B += 1
        return step

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """See `DecoderCache`."""
        self.cache = KVCache(self.cache.k[:, rows], self.cache.v[:, rows], self.cache.length_B[rows])

    def refill(self, row: int, length: int, fill: Callable[[KVCache], object]) -> None:
        """See `DecoderCache`. `fill` writes into views of this cache."""
        rows = slice(row, row + 1)
        view = KVCache(self.cache.k[:, rows], self.cache.v[:, rows], self.cache.length_B[rows])
        view.length_B.zero_()
        fill(view)


class DecodeStep:
    """One more token for every row of a cache: its position and its attention mask. Reads length_B once."""

    def __init__(self, cache: KVCache) -> None:
        length = cache.length_B.tolist()
        reach = max(length) + 1
        if reach > cache.k.shape[3]:
            raise BardletError(f"the cache is full after {cache.k.shape[3]} tokens; create a longer one")
        self.position = cache.length_B.clone()
        self.equal_lengths = min(length) == max(length)  # rows of equal length need no mask
        key_S = torch.arange(reach, device=cache.k.device)
        self.mask = None if self.equal_lengths else (key_S <= self.position[:, None])[:, None, None]
        self.row_B = torch.arange(len(length), device=cache.k.device)
        # views for all layers at once: the visible positions and, for rows of equal length, the new token's position
        self.k, self.v = cache.k[:, :, :, :reach].unbind(0), cache.v[:, :, :, :reach].unbind(0)
        self.new_k, self.new_v = cache.k[:, :, :, reach - 1].unbind(0), cache.v[:, :, :, reach - 1].unbind(0)

    def attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        """Write the token's key and value into the cache and return its attention output: (B, H D).

        The queries must already be divided by sqrt(D).
        """
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


class TransposedCache:
    """A KV cache for CPUs where `has_fast_embedding_bag` is true: values are rows, keys are columns.

    The attention of one query is then two weighted sums of rows, as in `PackedLinear`: the scores are the sum of the D
    rows of K^T, weighted by the query; the output is the sum of the rows of V, weighted by the softmax of the scores.
    `embedding_bag` computes them all at once, one bag per head and row, at memory bandwidth, in bf16 as well. Measured
    with 6 heads of 64, in us per layer, against SDPA in fp32 (SDPA in bf16 is much slower): 1 row of 500 positions
    takes 35 in bf16 and 41 in fp32 vs 44; 16 rows 300 and 540 vs 843. The capacity grows by `PART` positions at a time,
    since a bag covers whole rows.
    """

    PART = 128
    copies = True

    def __init__(self, cache: KVCache, heads: int, dtype: torch.dtype) -> None:
        self.length, self.max_length, self.heads = [int(n) for n in cache.length_B], cache.k.shape[3], heads
        L, B, K, _, D = cache.k.shape
        self.layers, self.kv_heads, self.head_dim, self.like = L, K, D, cache.k.new_empty(0)
        reach = max(self.length, default=0)
        self._allocate(cache.k.new_zeros((L, B, K, D, 0), dtype=dtype), cache.v.new_zeros((L, B, K, 0, D), dtype=dtype),
                   reach + 1)  # fmt: skip
        self.k_LBKDR[..., :reach] = cache.k[:, :, :, :reach].transpose(-1, -2)
        self.v_LBKRD[..., :reach, :] = cache.v[:, :, :, :reach]

    def _allocate(self, k_LBKDR: Tensor, v_LBKRD: Tensor, reach: int) -> None:
        """Allocate at least `reach` positions, copy the old contents, and build the bag indices."""
        L, B, K, D, old_size = k_LBKDR.shape
        H, R = self.heads, -(-reach // self.PART) * self.PART
        self.k_LBKDR, self.v_LBKRD = k_LBKDR.new_zeros((L, B, K, D, R)), v_LBKRD.new_zeros((L, B, K, R, D))
        copied = min(old_size, R)
        self.k_LBKDR[..., :copied], self.v_LBKRD[..., :copied, :] = k_LBKDR[..., :copied], v_LBKRD[..., :copied, :]
        self.k_rows, self.v_rows = self.k_LBKDR.view(L, -1, R).unbind(0), self.v_LBKRD.view(L, -1, D).unbind(0)
        head_BH1 = (torch.arange(B)[:, None] * K + torch.arange(H) // (H // K))[..., None]  # its KV head
        self.k_index, self.k_start = (head_BH1 * D + torch.arange(D)).view(-1).int(), torch.arange(B * H).int() * D
        self.v_index, self.v_start = (head_BH1 * R + torch.arange(R)).view(-1).int(), torch.arange(B * H).int() * R
        seen_BR = torch.arange(R) < torch.tensor(self.length)[:, None]
        self.mask = torch.zeros(B, 1, R, dtype=k_LBKDR.dtype).masked_fill_(~seen_BR[:, None], float("-inf"))

    @property
    def rows(self) -> int:
        """See `DecoderCache`."""
        return len(self.length)

    @property
    def full(self) -> bool:
        """See `DecoderCache`."""
        return max(self.length) >= self.max_length

    def step(self) -> TransposedCache:
        """Make room for one more token per row, at `position`."""
        positions, last = self.length, max(self.length)
        if last >= self.max_length:
            raise BardletError(f"the cache is full after {self.max_length} tokens; create a longer one")
        if last >= self.mask.shape[-1]:
            self._allocate(self.k_LBKDR, self.v_LBKRD, last + 1)
        self.equal_lengths = min(positions) == last
        self.position: int | Tensor = last
        if self.equal_lengths:
            self.mask[..., last] = 0
            self.new_k, self.new_v = self.k_LBKDR[..., last].unbind(0), self.v_LBKRD[..., last, :].unbind(0)
        else:
            self.position, self.row_B = torch.tensor(positions), torch.arange(len(positions))
            self.mask[self.row_B, 0, self.position] = 0
        self.length = [n + 1 for n in positions]
        return self

    def attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        """See `DecodeStep.attend`."""
        if self.equal_lengths:
            self.new_k[layer].copy_(k_BKD)
            self.new_v[layer].copy_(v_BKD)
        else:
            dtype = self.mask.dtype
            self.k_LBKDR[layer][self.row_B, :, :, self.position] = k_BKD.to(dtype)
            self.v_LBKRD[layer][self.row_B, :, self.position] = v_BKD.to(dtype)
        B, R = len(q_BHD), self.mask.shape[-1]
        q = q_BHD.to(self.mask.dtype).reshape(-1)
        score = torch.embedding_bag(self.k_rows[layer], self.k_index, self.k_start, False, 0, False, q)[0]
        weight = score.view(B, -1, R).add_(self.mask).softmax(-1).view(-1)  # (BH, R) -> (B, H, R) -> (BHR)
        y = torch.embedding_bag(self.v_rows[layer], self.v_index, self.v_start, False, 0, False, weight)[0]
        return y.view(B, -1)  # (BH, D) -> (B, HD)

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """See `DecoderCache`."""
        self.length = [self.length[int(row)] for row in rows]
        self._allocate(self.k_LBKDR[:, rows], self.v_LBKRD[:, rows], max(self.length) + 1)

    def refill(self, row: int, length: int, fill: Callable[[KVCache], object]) -> None:
        """See `DecoderCache`."""
        shape, like = (self.layers, 1, self.kv_heads, max(1, length), self.head_dim), self.like
        cache = KVCache(like.new_zeros(shape), like.new_zeros(shape), torch.zeros(1, dtype=torch.int64))
        fill(cache)
        length = self.length[row] = int(cache.length_B)
        if length > self.mask.shape[-1]:
            self._allocate(self.k_LBKDR, self.v_LBKRD, length)
        self.k_LBKDR[:, row, ..., :length] = cache.k[:, 0, :, :length].transpose(-1, -2)
        self.v_LBKRD[:, row, :, :length] = cache.v[:, 0, :, :length]
        self.mask[row] = float("-inf")
        self.mask[row, :, :length] = 0
