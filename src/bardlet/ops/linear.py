"""Linear layers for a few rows: packed, summed row by row, or rounded to int8.

Shape suffixes: `models/layers.py`; I inputs and O outputs of a layer, P slices of its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


def has_fast_embedding_bag(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if `embedding_bag` sums weighted rows at memory speed: on x86, in fp32 and bf16."""
    x86 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return x86 and dtype in (torch.float32, torch.bfloat16)


class PackedLinear:
    """x W^T + b for a few tokens, with a weight (O, I) that is no longer trained.

    Reading the weights is nearly all the work, and on x86 `F.linear` reads them slowly for few tokens. For one token,
    the result is a sum of W^T's rows weighted by x, which `embedding_bag` computes at memory speed on a transposed
    copy: each thread sums a slice of the rows, then the sums are added. For more tokens, oneDNN multiplies by a weight
    packed into its own layout. Each copy is made on first use.

    Measured for the 24 matrices of 10.6 M parameters, 2 threads, in us: one token takes 2,400 with `F.linear`, 410 here
    in fp32 and 330 in bf16; 4 tokens 600 and 420 (`embedding_bag`: 1,450 in fp32); 16 tokens 1,080 and 650
    (`embedding_bag`: 2,900; `x @ W` in bf16: 970).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.use_embedding_bag = has_fast_embedding_bag(weight.device, weight.dtype)

    def __call__(self, x_BI: Tensor) -> Tensor:
        if len(x_BI) != 1 or not self.use_embedding_bag:
            return self._linear(x_BI)
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
    def _linear(self) -> Callable[[Tensor], Tensor]:
        return linear_rows(self.weight, self.bias)


def linear_rows(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return a function x -> x W^T + b for several tokens: oneDNN where it supports the dtype, else `F.linear`.

    On a CPU without bf16 matmul, computes in fp32 and rounds to bf16: emulation takes nine times as long (64 tokens).
    """
    onednn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None  # some builds lack these operators
    bf16 = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if bf16 and not (onednn and onednn._is_mkldnn_bf16_supported()):
        linear32 = linear_rows(weight.float(), None if bias is None else bias.float())
        return lambda x_BI: linear32(x_BI.float()).to(weight.dtype)
    if not (onednn and has_fast_embedding_bag(weight.device, weight.dtype)):
        return lambda x_BI: F.linear(x_BI, weight, bias)
    packed = onednn._reorder_linear_weight(weight.contiguous(), None)
    return lambda x_BI: onednn._linear_pointwise(x_BI, packed, bias, "none", [], "")  # "none": no activation


class Int8Linear:
    """x W^T + b with W rounded to int8 and one scale per output.

    Symmetric: row o is scale_O[o] * q with integers q in -127 .. 127, so an entry is off by at most half a scale. The
    scale is rounded to bf16. The quantized weights are the same on every machine. For a few bf16 tokens, torch's
    operator reads the bytes where it has one (x86; 180 us for the 24 matrices of `PackedLinear` and one token). For
    more tokens, and elsewhere, q is converted to floats (exactly: bf16 holds integers up to 256).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        weight32 = weight.detach().float()
        tiny = torch.finfo(torch.bfloat16).tiny  # for a row of zeros
        self.scale_O = (weight32.abs().amax(1) / 127).clamp_min(tiny).bfloat16()
        self.q_OI = (weight32 / self.scale_O[:, None].float()).round_().clamp_(-127, 127).to(torch.int8)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype, self.scale_O = dtype, self.scale_O.to(dtype)
        # the operator reads 16 bytes at a time, and past the end of a row whose width is not a multiple of 16
        x86_bf16 = has_fast_embedding_bag(weight.device, dtype) and dtype == torch.bfloat16
        reads_bytes = x86_bf16 and weight.shape[1] % 16 == 0 and hasattr(torch, "_weight_int8pack_mm")
        self.max_int8_rows = 4 if reads_bytes else 0  # with 8 rows, converting q is faster

    def __call__(self, x_BI: Tensor) -> Tensor:
        if len(x_BI) <= self.max_int8_rows:
            y_BO = torch._weight_int8pack_mm(x_BI, self.q_OI, self.scale_O)
        else:
            y_BO = self._linear(x_BI).mul_(self.scale_O)
        return y_BO if self.bias is None else y_BO.add_(self.bias)

    @cached_property
    def _linear(self) -> Callable[[Tensor], Tensor]:
        return linear_rows(self.q_OI.to(self.dtype))


def pack_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear | Int8Linear:
    """Return a linear layer for a decoder whose weights have `dtype`, torch.int8 or a floating type."""
    if dtype == torch.int8:
        return Int8Linear(weight, bias, computing_dtype(weight, dtype))
    return PackedLinear(weight.to(dtype), None if bias is None else bias.to(dtype))


def computing_dtype(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype a decoder computes in: for int8 weights bf16 on x86, whose int8 operator takes it."""
    if dtype == torch.int8:
        return torch.bfloat16 if has_fast_embedding_bag(weight.device, torch.bfloat16) else weight.dtype
    return dtype or weight.dtype
