"""One token at a time: products with few rows, int8 weights, and a cache that is read at the speed of memory.

What the decoders of gpt2 and qwen3 are made of. Nothing here is trained. Shape suffixes: `layers.py`; I inputs and
O outputs of a product, P slices of its weight, R positions that a cache has room for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.models.layers import KVCache

# ---------------------------------------------------------------------------- products


def sums_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `embedding_bag` adds up weighted rows at the speed of memory: on x86, in fp32 and bf16."""
    x86 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return x86 and dtype in (torch.float32, torch.bfloat16)


class Product:
    """x W^T + b for a few tokens, with a weight (O, I) that is not trained further.

    To read the weights is nearly all the work, and on x86 `F.linear` reads them slowly for few tokens. One token: the
    product is a sum of W^T's rows weighted by x, which is what `embedding_bag` computes, at the speed of memory, on a
    transposed copy; a slice of rows for each thread, and the sums are added up. More tokens: oneDNN's product with a
    weight that was brought into its own order before. Each copy is made when it is first needed.

    Measured for the 24 matrices of 10.6 M parameters, 2 threads, us: one token by `F.linear` 2,400, so 410 in fp32 and
    330 in bf16; 4 tokens 600 and 420 (sums of slices: 1,450 in fp32); 16 tokens 1,080 and 650 (2,900; `x @ W` in bf16
    970).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.sums = sums_rows(weight.device, weight.dtype)

    def __call__(self, x_BI: Tensor) -> Tensor:
        if len(x_BI) != 1 or not self.sums:
            return self._many(x_BI)
        weight_IO, row_I, start_P = self._slices
        y_PO = torch.embedding_bag(weight_IO, row_I, start_P, False, 0, False, x_BI.view(-1))[0]
        y_BO = y_PO.sum(0, keepdim=True)
        return y_BO if self.bias is None else y_BO.add_(self.bias)

    @cached_property
    def _slices(self) -> tuple[Tensor, Tensor, Tensor]:
        width = self.weight.shape[1]
        slices = next(n for n in range(torch.get_num_threads(), 0, -1) if width % n == 0)
        return self.weight.t().contiguous(), torch.arange(width), torch.arange(0, width, width // slices)

    @cached_property
    def _many(self) -> Callable[[Tensor], Tensor]:
        return many_rows(self.weight, self.bias)


def many_rows(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x W^T + b for more than one token: by oneDNN where it is there and knows the dtype, else by `F.linear`.

    In fp32, rounded to bf16, where a CPU has no product in bf16: to emulate it takes nine times as long (64 tokens).
    """
    onednn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None  # some builds have no such operators
    half = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if half and not (onednn and onednn._is_mkldnn_bf16_supported()):
        wide = many_rows(weight.float(), None if bias is None else bias.float())
        return lambda x_BI: wide(x_BI.float()).to(weight.dtype)
    if not (onednn and sums_rows(weight.device, weight.dtype)):
        return lambda x_BI: F.linear(x_BI, weight, bias)
    packed = onednn._reorder_linear_weight(weight.contiguous(), None)
    return lambda x_BI: onednn._linear_pointwise(x_BI, packed, bias, "none", [], "")  # no function behind the sum


class RoundedProduct:
    """x W^T + b with W rounded to int8, one scale for each output.

    Symmetric: row o is scale_O[o] * q, q a whole number of -127 .. 127, so an entry is off by half a scale at most.
    The scale itself is one that bf16 holds. What the numbers are does not depend on the machine: where torch has the
    operator for a few bf16 tokens (x86; 180 us for the 24 matrices of `Product` and one token), it reads the bytes; for
    more tokens, and elsewhere, q is widened (exactly: bf16 holds whole numbers up to 256).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        wide = weight.detach().float()
        tiny = torch.finfo(torch.bfloat16).tiny  # a row of zeros
        self.scale_O = (wide.abs().amax(1) / 127).clamp_min(tiny).bfloat16()
        self.q_OI = (wide / self.scale_O[:, None].float()).round_().clamp_(-127, 127).to(torch.int8)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype, self.scale_O = dtype, self.scale_O.to(dtype)
        # the operator takes 16 bytes at a time, and reads beyond the end of a row that is no multiple of them
        reads_bytes = sums_rows(weight.device, dtype) and dtype == torch.bfloat16 and weight.shape[1] % 16 == 0
        self.few = 4 if reads_bytes and hasattr(torch, "_weight_int8pack_mm") else 0  # with 8 the widened one wins

    def __call__(self, x_BI: Tensor) -> Tensor:
        if len(x_BI) <= self.few:
            y_BO = torch._weight_int8pack_mm(x_BI, self.q_OI, self.scale_O)
        else:
            y_BO = self._many(x_BI).mul_(self.scale_O)
        return y_BO if self.bias is None else y_BO.add_(self.bias)

    @cached_property
    def _many(self) -> Callable[[Tensor], Tensor]:
        return many_rows(self.q_OI.to(self.dtype))


def product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product | RoundedProduct:
    """The product of a decoder whose weights are of `dtype`: torch.int8, or a floating one."""
    if dtype == torch.int8:
        return RoundedProduct(weight, bias, computing_dtype(weight, dtype))
    return Product(weight.to(dtype), None if bias is None else bias.to(dtype))


def computing_dtype(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a decoder computes in. For int8 weights bf16 on x86, where that product is made for it."""
    if dtype == torch.int8:
        return torch.bfloat16 if sums_rows(weight.device, torch.bfloat16) else weight.dtype
    return dtype or weight.dtype


# ---------------------------------------------------------------------------- the cache


class Step:
    """One more token for every row of a cache: where it goes, and whom it sees. Reads length_B once."""

    def __init__(self, cache: KVCache) -> None:
        length = cache.length_B.tolist()
        reach = max(length) + 1
        if reach > cache.k.shape[3]:
            raise BardletError(f"the cache is full after {cache.k.shape[3]} tokens: make a longer one")
        self.position = cache.length_B.clone()
        self.even = min(length) == max(length)  # then the rows need no mask
        key_S = torch.arange(reach, device=cache.k.device)
        self.mask = None if self.even else (key_S <= self.position[:, None])[:, None, None]
        self.row_B = torch.arange(len(length), device=cache.k.device)
        # views, made once for all layers: what is seen, and the place of a new token where the rows are even
        self.k, self.v = cache.k[:, :, :, :reach].unbind(0), cache.v[:, :, :, :reach].unbind(0)
        self.new_k, self.new_v = cache.k[:, :, :, reach - 1].unbind(0), cache.v[:, :, :, reach - 1].unbind(0)

    def attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        """Puts the token's key and value into the cache; what the token reads there: (B, H D).

        The queries come divided by sqrt(D).
        """
        k_BKSD, v_BKSD = self.k[layer], self.v[layer]
        if self.even:
            self.new_k[layer].copy_(k_BKD)
            self.new_v[layer].copy_(v_BKD)
        else:
            k_BKSD[self.row_B, :, self.position] = k_BKD.to(k_BKSD.dtype)
            v_BKSD[self.row_B, :, self.position] = v_BKD.to(v_BKSD.dtype)
        grouped = q_BHD.shape[1] != k_BKD.shape[1]
        q_BH1D = q_BHD.unsqueeze(2).to(k_BKSD.dtype)
        y_BH1D = F.scaled_dot_product_attention(q_BH1D, k_BKSD, v_BKSD, self.mask, enable_gqa=grouped, scale=1.0)
        return y_BH1D.reshape(len(q_BHD), -1).to(v_BKD.dtype)  # (B, H, 1, D) -> (B, HD)


class Columns:
    """A cache for decoding where `sums_rows` holds: a value is a row, a key is a column.

    One query's attention is then two sums of weighted rows, as in `Product`: its scores are the sum of the D rows of
    K^T, weighted by the query; what it reads is the sum of the rows of V, weighted by the softmax of the scores.
    `embedding_bag` makes all of them at once, a bag for each head of each row, and reads the cache at the speed of
    memory, in bf16, too. Measured, 6 heads of 64, us a layer, beside SDPA in fp32 (in bf16 that takes much longer):
    1 row of 500 positions 35 in bf16 and 41 in fp32 for 44; 16 rows 300 and 540 for 843. What is kept grows by
    `PART` positions at a time, as bags are of whole rows.
    """

    PART = 128

    def __init__(self, cache: KVCache, heads: int, dtype: torch.dtype) -> None:
        self.length, self.room, self.heads = [int(n) for n in cache.length_B], cache.k.shape[3], heads
        L, B, K, _, D = cache.k.shape
        reach = max(self.length, default=0)
        self._make(cache.k.new_zeros((L, B, K, D, 0), dtype=dtype), cache.v.new_zeros((L, B, K, 0, D), dtype=dtype),
                   reach + 1)  # fmt: skip
        self.k_LBKDR[..., :reach] = cache.k[:, :, :, :reach].transpose(-1, -2)
        self.v_LBKRD[..., :reach, :] = cache.v[:, :, :, :reach]

    def _make(self, k_LBKDR: Tensor, v_LBKRD: Tensor, reach: int) -> None:
        """Room for `reach` positions and some more, with what was kept so far; the rows of each bag."""
        L, B, K, D, had = k_LBKDR.shape
        H, R = self.heads, -(-reach // self.PART) * self.PART
        self.k_LBKDR, self.v_LBKRD = k_LBKDR.new_zeros((L, B, K, D, R)), v_LBKRD.new_zeros((L, B, K, R, D))
        keep = min(had, R)
        self.k_LBKDR[..., :keep], self.v_LBKRD[..., :keep, :] = k_LBKDR[..., :keep], v_LBKRD[..., :keep, :]
        self.k_rows, self.v_rows = self.k_LBKDR.view(L, -1, R).unbind(0), self.v_LBKRD.view(L, -1, D).unbind(0)
        head_BH1 = (torch.arange(B)[:, None] * K + torch.arange(H) // (H // K))[..., None]  # the one that each reads
        self.k_index, self.k_start = (head_BH1 * D + torch.arange(D)).view(-1).int(), torch.arange(B * H).int() * D
        self.v_index, self.v_start = (head_BH1 * R + torch.arange(R)).view(-1).int(), torch.arange(B * H).int() * R
        seen_BR = torch.arange(R) < torch.tensor(self.length)[:, None]
        self.mask = torch.zeros(B, 1, R, dtype=k_LBKDR.dtype).masked_fill_(~seen_BR[:, None], float("-inf"))

    def step(self) -> Columns:
        """Makes room for one more token of every row; `position` is then where it stands."""
        place, last = self.length, max(self.length)
        if last >= self.room:
            raise BardletError(f"the cache is full after {self.room} tokens: make a longer one")
        if last >= self.mask.shape[-1]:
            self._make(self.k_LBKDR, self.v_LBKRD, last + 1)
        self.even = min(place) == last
        self.position: int | Tensor = last
        if self.even:
            self.mask[..., last] = 0
            self.new_k, self.new_v = self.k_LBKDR[..., last].unbind(0), self.v_LBKRD[..., last, :].unbind(0)
        else:
            self.position, self.row_B = torch.tensor(place), torch.arange(len(place))
            self.mask[self.row_B, 0, self.position] = 0
        self.length = [n + 1 for n in place]
        return self

    def attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        """As `Step.attend`."""
        if self.even:
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

    def keep(self, rows: list[int]) -> None:
        """Goes on with these rows only."""
        self.length = [self.length[row] for row in rows]
        self._make(self.k_LBKDR[:, rows], self.v_LBKRD[:, rows], max(self.length) + 1)

    def put(self, row: int, cache: KVCache) -> None:
        """Starts `row` again with what is in the one row of `cache`."""
        length = self.length[row] = int(cache.length_B)
        if length > self.mask.shape[-1]:
            self._make(self.k_LBKDR, self.v_LBKRD, length)
        self.k_LBKDR[:, row, ..., :length] = cache.k[:, 0, :, :length].transpose(-1, -2)
        self.v_LBKRD[:, row, :, :length] = cache.v[:, 0, :, :length]
        self.mask[row] = float("-inf")
        self.mask[row, :, :length] = 0
