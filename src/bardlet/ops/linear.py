"""Linear layers for the tokens of a decoding step: packed, summed row by row, or rounded to int8.

Shape suffixes: `models/layers.py`; I inputs and O outputs of a layer, P parts of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def has_fast_embedding_bag(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if `embedding_bag` sums weighted rows at memory speed: on x86, in fp32 and bf16."""
    x86 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return x86 and dtype in (torch.float32, torch.bfloat16)


def linear_rows(weight: Tensor, bias: Tensor | None = None) -> Product:
    """Return a function x -> x W^T + b for a few tokens, with a weight (O, I) that is no longer trained.

    Reading the weights is nearly all the work, and on x86 `F.linear` reads them slowly for few tokens. oneDNN
    multiplies by a weight packed into its own layout. On a CPU, rows do not depend on each other: `independent_rows`.

    Measured for the 24 matrices of 10.6 M parameters, 2 threads, in us: 1 token takes 2,400 with `F.linear`; 4 tokens
    take 600 here in fp32 and 420 in bf16, 16 tokens 1,080 and 650. Without bf16 products in the processor, bf16 weights
    are summed row by row: emulation takes nine times as long (64 tokens).
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if weight.device.type != "cpu":
        return lambda x_BI: F.linear(x_BI, weight, bias)
    onednn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None  # some builds lack these operators
    fast = has_fast_embedding_bag(weight.device, weight.dtype)
    if weight.dtype == torch.bfloat16 and fast and not (onednn and onednn._is_mkldnn_bf16_supported()):
        return _weighted_sums(weight, bias)
    if not (onednn and fast):
        return in_blocks(lambda x_BI: F.linear(x_BI, weight, bias))
    packed = onednn._reorder_linear_weight(weight.contiguous(), None)
    product: Product = lambda x_BI: onednn._linear_pointwise(x_BI, packed, bias, "none", [], "")  # noqa: E731
    return independent_rows(product, weight)


def _weighted_sums(weight: Tensor, bias: Tensor | None) -> Product:
    """Return x -> x W^T + b as a sum of the rows of W^T, weighted by x, which `embedding_bag` reads at memory speed.

    The rows are cut into a few parts of equal length, so that there is work for several threads. The bias is one more
    row, with the weight 1: the result is rounded once.
    """
    if bias is not None:
        product = _weighted_sums(torch.cat((weight, bias[:, None]), dim=1), None)
        return lambda x_BI: product(F.pad(x_BI, (0, 1), value=1.0))
    outputs, inputs = weight.shape
    parts = next(n for n in (4, 3, 2, 1) if outputs % n == 0)
    weight_XO, part_P = weight.t().contiguous().view(inputs * parts, -1), torch.arange(parts)[:, None]
    index = (torch.arange(inputs) * parts + part_P).view(-1)

    def sums(x_BI: Tensor) -> Tensor:
        B = len(x_BI)
        start = torch.arange(0, B * parts * inputs, inputs)
        weights = x_BI[:, None].expand(B, parts, inputs).reshape(-1)
        return torch.embedding_bag(weight_XO, index.repeat(B), start, False, 0, False, weights)[0].view(B, -1)

    return sums


# ---------------------------------------------------------------------------- rows that do not depend on each other

BLOCK = 16
"""Rows of a product of fixed shape."""


def independent_rows(product: Product, weight: Tensor) -> Product:
    """Return `product`, so that a row of its result has the same bits whatever the other rows are, and how many.

    oneDNN's product by a packed weight is so for two rows and more on all processors we know; with AVX-512, fp32 and
    many inputs it adds up a single row in another order. Which of its kernels run depends on the processor: hence a
    trial, once per shape. Where it fails, a single row is computed twice, or all rows in blocks of BLOCK.
    """
    alone, together = _trial(product, tuple(weight.shape), weight.dtype, torch.get_num_threads())
    if not together:
        return in_blocks(product)
    return product if alone else lambda x_BI: product(x_BI) if len(x_BI) > 1 else product(torch.cat((x_BI, x_BI)))[:1]


_trials: dict[tuple[Any, ...], tuple[bool, bool]] = {}


def _trial(product: Product, shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> tuple[bool, bool]:
    """Return (True if a row alone has the bits that it has among others, True if several rows have)."""
    key = (shape, dtype, threads)
    if key not in _trials:
        x_BI = torch.randn(33, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        want = product(x_BI)
        alone, *others = (torch.equal(product(x_BI[:rows]), want[:rows]) for rows in (1, 2, 3, 16))
        _trials[key] = alone, all(others)
    return _trials[key]


def in_blocks(product: Product) -> Product:
    """Return `product` in blocks of BLOCK rows, the last one padded with zeros: the shape is always the same."""

    def blocks(x_BI: Tensor) -> Tensor:
        padded = F.pad(x_BI, (0, 0, 0, -len(x_BI) % BLOCK))
        return torch.cat([product(block) for block in padded.split(BLOCK)])[: len(x_BI)]

    return blocks


SERIAL, LANES = 16_384, 128
"""Elements from which PyTorch divides gelu between threads (others: 32,768); elements that it computes at a time."""


def elementwise(function: Product, x_BC: Tensor) -> Tensor:
    """Return function(x), such that the bits of a row do not depend on the other rows.

    PyTorch computes the elements in vectors, and the last ones of a tensor, or of a thread's share, one by one: for
    exp() and tanh() with other bits. For elements that are not adjacent it has another gelu.
    """
    x_BC, C = x_BC.contiguous(), x_BC.shape[1]
    if C % LANES:
        return elementwise(function, F.pad(x_BC, (0, -C % LANES)))[:, :C]
    rows = max(1, (SERIAL - 1) // C)
    return function(x_BC) if len(x_BC) <= rows else torch.cat([function(part) for part in x_BC.split(rows)])


class Int8Linear:
    """x W^T + b with W rounded to int8 and one scale per output.

    Symmetric: row o is scale_O[o] * q with integers q in -127 .. 127, so an entry is off by at most half a scale. The
    scale is rounded to bf16. The quantized weights are the same on every machine. For bf16 tokens, torch's operator
    reads the bytes where it has one (x86; 180 us for the 24 matrices of `linear_rows` and one token). Elsewhere q is
    converted to floats (exactly: bf16 holds integers up to 256). From 16 tokens on that would be faster on x86 as well,
    but a token would have other bits beside many others than alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        weight32 = weight.detach().float()
        tiny = torch.finfo(torch.bfloat16).tiny  # for a row of zeros
        self.scale_O = (weight32.abs().amax(1) / 127).clamp_min(tiny).bfloat16()
        self.q_OI = (weight32 / self.scale_O[:, None].float()).round_().clamp_(-127, 127).to(torch.int8)
        self.bias, self.scale_O = None if bias is None else bias.detach().to(dtype), self.scale_O.to(dtype)
        # the operator reads 16 bytes at a time, and past the end of a row whose width is not a multiple of 16
        x86_bf16 = has_fast_embedding_bag(weight.device, dtype) and dtype == torch.bfloat16
        reads_bytes = x86_bf16 and weight.shape[1] % 16 == 0 and hasattr(torch, "_weight_int8pack_mm")
        converted = None if reads_bytes else linear_rows(self.q_OI.to(dtype))
        self._product: Product = (
            (lambda x_BI: torch._weight_int8pack_mm(x_BI, self.q_OI, self.scale_O)) if converted is None
            else lambda x_BI: converted(x_BI).mul_(self.scale_O))

    def __call__(self, x_BI: Tensor) -> Tensor:
        y_BO = self._product(x_BI)
        return y_BO if self.bias is None else y_BO.add_(self.bias)


def pack_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """Return a linear layer for a decoder whose weights have `dtype`, torch.int8 or a floating type."""
    if dtype == torch.int8:
        return Int8Linear(weight, bias, computing_dtype(weight, dtype))
    return linear_rows(weight.to(dtype), None if bias is None else bias.to(dtype))


def computing_dtype(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype a decoder computes in: for int8 weights bf16 on x86, whose int8 operator takes it."""
    if dtype == torch.int8:
        return torch.bfloat16 if has_fast_embedding_bag(weight.device, torch.bfloat16) else weight.dtype
    return dtype or weight.dtype
