"""Linear layers for a few rows: packed, summed by rows, or rounded to int8.

Shape suffixes: `models/layers.py`; I inputs and O outputs of a product, P slices of its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


def has_fast_embedding_bag(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `embedding_bag` adds up weighted rows at the speed of memory: on x86, in fp32 and bf16."""
    x86 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return x86 and dtype in (torch.float32, torch.bfloat16)


class PackedLinear:
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
        self.sums = has_fast_embedding_bag(weight.device, weight.dtype)

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
        return linear_rows(self.weight, self.bias)


def linear_rows(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x W^T + b for more than one token: by oneDNN where it is there and knows the dtype, else by `F.linear`.

    In fp32, rounded to bf16, where a CPU has no product in bf16: to emulate it takes nine times as long (64 tokens).
    """
    onednn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None  # some builds have no such operators
    half = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if half and not (onednn and onednn._is_mkldnn_bf16_supported()):
        wide = linear_rows(weight.float(), None if bias is None else bias.float())
        return lambda x_BI: wide(x_BI.float()).to(weight.dtype)
    if not (onednn and has_fast_embedding_bag(weight.device, weight.dtype)):
        return lambda x_BI: F.linear(x_BI, weight, bias)
    packed = onednn._reorder_linear_weight(weight.contiguous(), None)
    return lambda x_BI: onednn._linear_pointwise(x_BI, packed, bias, "none", [], "")  # no function behind the sum


class Int8Linear:
    """x W^T + b with W rounded to int8, one scale for each output.

    Symmetric: row o is scale_O[o] * q, q a whole number of -127 .. 127, so an entry is off by half a scale at most.
    The scale itself is one that bf16 holds. What the numbers are does not depend on the machine: where torch has the
    operator for a few bf16 tokens (x86; 180 us for the 24 matrices of `PackedLinear` and one token), it reads the bytes; for
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
        reads_bytes = has_fast_embedding_bag(weight.device, dtype) and dtype == torch.bfloat16 and weight.shape[1] % 16 == 0
        self.few = 4 if reads_bytes and hasattr(torch, "_weight_int8pack_mm") else 0  # with 8 the widened one wins

    def __call__(self, x_BI: Tensor) -> Tensor:
        if len(x_BI) <= self.few:
            y_BO = torch._weight_int8pack_mm(x_BI, self.q_OI, self.scale_O)
        else:
            y_BO = self._many(x_BI).mul_(self.scale_O)
        return y_BO if self.bias is None else y_BO.add_(self.bias)

    @cached_property
    def _many(self) -> Callable[[Tensor], Tensor]:
        return linear_rows(self.q_OI.to(self.dtype))


def pack_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear | Int8Linear:
    """The product of a decoder whose weights are of `dtype`: torch.int8, or a floating one."""
    if dtype == torch.int8:
        return Int8Linear(weight, bias, computing_dtype(weight, dtype))
    return PackedLinear(weight.to(dtype), None if bias is None else bias.to(dtype))


def computing_dtype(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a decoder computes in. For int8 weights bf16 on x86, where that product is made for it."""
    if dtype == torch.int8:
        return torch.bfloat16 if has_fast_embedding_bag(weight.device, torch.bfloat16) else weight.dtype
    return dtype or weight.dtype
