"""Linear layers for the tokens of a decoding step: packed, summed row by row, or rounded to int8.

Shape suffixes: `models/layers.py`; I inputs and O outputs of a layer, P parts of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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

    Measured for the 24 matrices of 10.6 M parameters, 2 threads, in us: 1 token takes 2,400 with `F.linear` and 410
    here in fp32; 4 tokens 600 and in bf16 420, 16 tokens 1,080 and 650. Without bf16 products in the processor, bf16
    weights are summed row by row: emulation takes nine times as long (64 tokens).
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
    return independent_rows(product, weight, bias)


def _weighted_sums(weight: Tensor, bias: Tensor | None) -> Product:
    """Return x -> x W^T + b as `row_sums`; the bias is one more row, with the weight 1: the result is rounded once."""
    if bias is None:
        return row_sums(weight)
    sums = row_sums(torch.cat((weight, bias[:, None]), dim=1))
    return lambda x_BI: sums(F.pad(x_BI, (0, 1), value=1.0))


def row_sums(weight: Tensor, block: int = 2**31) -> Product:
    """Return x -> x W^T as a sum of the rows of W^T, weighted by x, which `embedding_bag` reads at memory speed.

    The rows are added one after the other, in blocks of `block` rows, and then the sums of the blocks. They are cut
    into a few parts of equal length, so that there is work for several threads.
    """
    outputs, inputs = weight.shape
    parts = next(n for n in (4, 3, 2, 1) if outputs % n == 0)
    weight_XO, first_I = weight.t().contiguous().view(inputs * parts, -1), torch.arange(inputs) * parts
    index = torch.cat([first_I[i : i + block] + part for i in range(0, inputs, block) for part in range(parts)])
    row = torch.cat([torch.arange(inputs)[i : i + block] for i in range(0, inputs, block) for _ in range(parts)])
    sizes = [min(block, inputs - i) for i in range(0, inputs, block) for _ in range(parts)]
    blocks, start_S = len(sizes) // parts, torch.tensor([0, *sizes[:-1]]).cumsum(0)

    def sums(x_BI: Tensor) -> Tensor:
        B = len(x_BI)
        start = (torch.arange(B)[:, None] * len(index) + start_S).view(-1) if B > 1 else start_S
        weights = x_BI.index_select(1, row).view(-1) if len(sizes) > 1 else x_BI.reshape(-1)
        indices = index.repeat(B) if B > 1 else index
        y_BSO = torch.embedding_bag(weight_XO, indices, start, False, 0, False, weights)[0].view(B, blocks, -1)
        y_BO = y_BSO[:, 0]
        for i in range(1, blocks):
            y_BO = y_BO.add_(y_BSO[:, i])
        return y_BO

    return sums


# ---------------------------------------------------------------------------- rows that do not depend on each other

BLOCK = 16
"""Rows of a product of fixed shape."""


def independent_rows(product: Product, weight: Tensor, bias: Tensor | None) -> Product:
    """Return `product`, so that a row of its result has the same bits whatever the other rows are, and how many.

    oneDNN's product by a packed weight is like that from two rows on, on all processors that we know. It chooses
    its kernels by the processor: hence a trial, once per shape. Where it fails, rows are computed in blocks of BLOCK.
    """
    x_BI = _trial_rows(33, weight)

    def agree() -> bool:
        want = product(x_BI)
        return all(torch.equal(product(x_BI[-rows:]), want[-rows:]) for rows in (2, 3, 16))

    return _WithSingleRows(product, weight, bias) if _trial("rows", weight, agree) else in_blocks(product)


class _WithSingleRows:
    """A product of several rows, and one of a single row that has the same bits and takes less time.

    For a single fp32 row, reading the weights as `row_sums` does takes half the time of oneDNN or less, and gives the
    same bits if the rows are added in the same blocks. Otherwise the product is taken, of the row twice if need be.
    The weight is copied when the first single row comes.
    """

    BLOCKS = (512, 1024, 256)
    """With AVX-512, oneDNN adds in blocks of 512 inputs, or 1,024 of 1,536 and more; with AVX2 always of 1,024."""

    def __init__(self, product: Product, weight: Tensor, bias: Tensor | None) -> None:
        self.product, self.weight, self.bias = product, weight, bias
        self.single: Product | None = None

    def __call__(self, x_BI: Tensor) -> Tensor:
        if len(x_BI) > 1:
            return self.product(x_BI)
        self.single = self.single or self._choose()
        return self.single(x_BI)

    def _choose(self) -> Product:
        """Return the fastest product of a single row that has the right bits, by a trial."""
        inputs, x_BI = self.weight.shape[1], _trial_rows(2, self.weight)
        want = self.product(x_BI)[:1]
        if self.weight.dtype != torch.float32:  # its single rows differ in a few values, which a trial may miss
            return self._twice
        blocks = [inputs, *(n for n in self.BLOCKS if n < inputs)]
        ways: dict[str, Callable[[], Product]] = {f"blocks of {n}": partial(self._row_sums, n) for n in blocks}
        for way, make in {**ways, "product": lambda: self.product}.items():
            made: list[Product] = []

            def agrees(make: Callable[[], Product] = make, made: list[Product] = made) -> bool:
                made.append(make())
                return torch.equal(made[0](x_BI[:1]), want)

            if _trial(f"{way}, bias: {self.bias is not None}", self.weight, agrees):
                return made[0] if made else make()
        return self._twice

    def _twice(self, x_BI: Tensor) -> Tensor:
        return self.product(torch.cat((x_BI, x_BI)))[:1]

    def _row_sums(self, block: int) -> Product:
        sums, bias = row_sums(self.weight, block), self.bias
        return sums if bias is None else lambda x_BI: sums(x_BI).add_(bias)


def _trial_rows(rows: int, weight: Tensor) -> Tensor:
    """Return rows of random inputs for a weight: (rows, I)."""
    return torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)


_trials: dict[tuple[Any, ...], bool] = {}


def _trial(name: str, weight: Tensor, passes: Callable[[], bool]) -> bool:
    """Return the outcome of a trial, which is made once for each shape, dtype and number of threads."""
    key = (name, tuple(weight.shape), weight.dtype, torch.get_num_threads())
    if key not in _trials:
        _trials[key] = passes()
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
    """Return function(x), such that on a CPU the bits of a row do not depend on the other rows.

    PyTorch computes the elements in vectors, and the last ones of a tensor, or of a thread's share, one by one: for
    exp() and tanh() with other bits. For elements that are not adjacent it has another gelu.
    """
    x_BC, C = x_BC.contiguous(), x_BC.shape[1]
    if x_BC.device.type != "cpu":
        return function(x_BC)
    if C % LANES:
        return elementwise(function, F.pad(x_BC, (0, -C % LANES)))[:, :C]
    rows = max(1, (SERIAL - 1) // C)
    return function(x_BC) if len(x_BC) <= rows else torch.cat([function(part) for part in x_BC.split(rows)])


def quantized(weight: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (q, scale) of a weight (O, I): int8 of the same shape, and a bf16 scale per output and `group` inputs.

    Symmetric: an entry is its scale times an integer q in -127 .. 127, so it is off by at most half a scale. The scales
    are (O, groups); the last group may be smaller; None: one group. The result is the same on every machine.
    """
    inputs = weight.shape[1]
    group = group or inputs
    parts_OGI = F.pad(weight.detach().float(), (0, -inputs % group)).unflatten(1, (-1, group))
    tiny = torch.finfo(torch.bfloat16).tiny  # for a group of zeros
    scale_OG = (parts_OGI.abs().amax(2) / 127).clamp_min(tiny).bfloat16()
    q_OGI = (parts_OGI / scale_OG[:, :, None].float()).round_().clamp_(-127, 127).to(torch.int8)
    return q_OGI.flatten(1)[:, :inputs].contiguous(), scale_OG


class Int8Linear:
    """x W^T + b with W rounded to int8, for machines without the compiled step (`decoders/native.py`).

    It has one scale per output, see `quantized`, which is coarser than a scale per 32 inputs there: the loss of SmolLM2
    rises by 0.18 % instead of 0.01 %.

    For bf16 tokens, torch's operator reads the bytes where it has one (x86; 180 us for the 24 matrices of `linear_rows`
    and one token). Elsewhere q is converted to floats (exactly: bf16 holds integers up to 256). From 16 tokens on that
    would be faster on x86 as well, but a token would have other bits beside many others than alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.q_OI, scale_OG = quantized(weight)
        self.bias, self.scale_O = None if bias is None else bias.detach().to(dtype), scale_OG[:, 0].to(dtype)
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
