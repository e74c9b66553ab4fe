"""Packed linear layers, int8 weights and pages of keys and values, against reference implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet.config.model import ModelConfig
from bardlet.inference.decoders.cache import CacheStep
from bardlet.inference.decoders.pages import PAGE, PagedStep, Pages
from bardlet.models.layers import KVCache
from bardlet.ops import linear
from bardlet.ops.linear import (
    Int8Linear,
    elementwise,
    has_fast_embedding_bag,
    in_blocks,
    linear_rows,
    pack_linear,
    quantized,
)

few = settings(max_examples=30)


@few
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.sampled_from(["float32", "bfloat16"])
)
def test_linear_rows_matches_linear(width: int, out: int, rows: int, bias: bool, dtype: str) -> None:
    torch.manual_seed(0)
    weight, b = torch.randn(out, width), torch.randn(out) if bias else None
    x = torch.randn(rows, width)
    weight, x = weight.to(getattr(torch, dtype)), x.to(getattr(torch, dtype))
    b = None if b is None else b.to(weight.dtype)
    got, want = linear_rows(weight, b)(x), F.linear(x.double(), weight.double(), None if b is None else b.double())
    tolerance = 1e-5 if dtype == "float32" else 0.02  # relative to the largest output: bf16 sums of 40 terms
    assert got.dtype == weight.dtype
    assert float((got.double() - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
def test_emulated_bf16_is_computed_in_fp32(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(30, 20).bfloat16(), torch.randn(7, 20).bfloat16()
    b = torch.randn(30).bfloat16() if bias else None
    want = F.linear(x.double(), weight.double(), None if b is None else b.double())
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    got = linear_rows(weight, b)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)  # one rounding, at the end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_rows_works_without_onednn(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a build has none of oneDNN's operators, not even the one that reports bf16 support."""
    torch.manual_seed(0)
    weight, b, x = torch.randn(30, 20).to(dtype), torch.randn(30).to(dtype), torch.randn(7, 20).to(dtype)
    want = F.linear(x.double(), weight.double(), b.double())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    got = linear_rows(weight, b)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)


@few
@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 12), st.booleans(), st.floats(1e-3, 1e3))
def test_int8_rounding_error_is_at_most_half_a_scale(
    width: int, out: int, rows: int, bias: bool, size: float
) -> None:
    torch.manual_seed(0)
    weight, b = torch.randn(out, width) * size, torch.randn(out) if bias else None
    weight[0] = 0  # a row without range
    rounded = Int8Linear(weight, b, torch.bfloat16)
    dequantized = rounded.q_OI.double() * rounded.scale_O.double()[:, None]
    assert bool(((dequantized - weight.double()).abs() <= rounded.scale_O.double()[:, None] / 2 * 1.0001).all())
    assert float(rounded.scale_O[1:].float().max() if out > 1 else 0) <= float(weight.abs().max()) / 127 * 1.01

    x = torch.randn(rows, width).bfloat16()
    wide_b = 0.0 if b is None else b.bfloat16().double()
    sums = x.double().abs() @ dequantized.abs().T + abs(wide_b)
    want = F.linear(x.double(), dequantized) + wide_b
    assert bool(((rounded(x).double() - want).abs() <= 0.012 * sums + 1e-12).all())


@few
@given(st.integers(1, 100), st.integers(1, 5), st.integers(1, 40))
def test_groups_of_inputs_are_rounded_by_scales_of_their_own(width: int, out: int, group: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(out, width) * torch.logspace(-3, 3, width)
    q, scale = quantized(weight, group)
    assert q.shape == weight.shape and q.dtype == torch.int8 and scale.shape == (out, -(-width // group))
    for n, part in enumerate(weight.split(group, 1)):
        q_alone, scale_alone = quantized(part)
        assert torch.equal(q[:, n * group : (n + 1) * group], q_alone) and torch.equal(scale[:, n], scale_alone[:, 0])


WIDTHS = [(48, 40), (64, 96), (130, 65), (384, 1536), (1536, 384), (2048, 130)]
"""(inputs, outputs). AVX-512 adds up a single fp32 row in another order from 1,536 inputs on."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, threads: int, inputs: int, outputs: int) -> None:
    """Bit for bit: alone, among any number, at any place, and beside NaNs."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    product = pack_linear(torch.randn(outputs, inputs), torch.randn(outputs), dtype)
    x = torch.randn(200, inputs).to(torch.bfloat16 if dtype == torch.int8 else dtype)
    if dtype == torch.int8 and not has_fast_embedding_bag(x.device, x.dtype):
        x = x.float()
    together = product(x)
    for rows in (1, 2, 3, 16, 17, 64, 65):
        first = 200 - rows
        assert torch.equal(product(x[first:]), together[first:])
    x[7] = float("nan")
    assert torch.equal(product(x)[8:], together[8:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_row_has_the_bits_that_it_has_among_others(dtype: torch.dtype) -> None:
    """Many rows: with AVX-512, oneDNN's single rows of 1,536 bf16 numbers differ once in a dozen."""
    torch.manual_seed(0)
    product = linear_rows(torch.randn(96, 1536).to(dtype), torch.randn(96).to(dtype))
    x = torch.randn(128, 1536).to(dtype)
    together = product(x)
    assert all(torch.equal(product(x[row : row + 1])[0], together[row]) for row in range(128))


def test_products_that_depend_on_the_number_of_rows_are_made_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fallback, a product is computed in blocks of one shape, or a single row twice."""
    numbers = partial(torch.randint, -9, 10, dtype=torch.float64)  # whose products are exact, in any order
    weight = numbers((4, 8), generator=torch.Generator().manual_seed(1))
    for depends in (lambda rows: rows == 1, lambda rows: rows % 2):
        monkeypatch.setattr(linear, "_trials", {})
        shapes = []

        def product(x: torch.Tensor, depends: Callable[[int], bool] = depends,
                    shapes: list[int] = shapes) -> torch.Tensor:  # fmt: skip
            shapes.append(len(x))
            return F.linear(x, weight) + 1e-3 * depends(len(x))

        rows = linear.independent_rows(product, weight, None)
        x = numbers((40, 8))
        together = rows(x)
        shapes.clear()
        assert all(torch.equal(rows(x[:n]), together[:n]) for n in range(1, 41))
    assert set(shapes) == {linear.BLOCK}
    assert in_blocks(lambda x: x)(x).equal(x)


@pytest.mark.parametrize("block", [7, 64, 100])
@pytest.mark.parametrize("outputs", [8, 7])
def test_row_sums_in_blocks(block: int, outputs: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, 64), torch.randn(3, 64)
    got = linear.row_sums(weight, block)(x)
    torch.testing.assert_close(got, F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert torch.equal(linear.row_sums(weight, block)(x[1:2]), got[1:2])


@pytest.mark.parametrize("function", [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh")])
@pytest.mark.parametrize("width", [30, 64, 1000, 1024])
def test_an_elementwise_function_does_not_depend_on_the_other_rows(function: Any, width: int) -> None:
    torch.set_num_threads(2)
    x = torch.randn(101, 2 * width, generator=torch.Generator().manual_seed(0))[:, :width]
    for given_x in (x, x.contiguous()):
        together = elementwise(function, given_x)
        torch.testing.assert_close(together, function(x), rtol=1e-5, atol=1e-6)
        assert all(torch.equal(elementwise(function, given_x[n : n + 1])[0], together[n]) for n in range(101))


KINDS = [(4, 4, torch.float32), (6, 2, torch.float32), (4, 2, torch.bfloat16)]


def random_pages(kind: tuple[int, int, torch.dtype], bags: bool) -> Pages:
    """Return a pool of 30 pages of 2 layers, all in use, with heads of 16."""
    heads, kv_heads, dtype = kind
    config = ModelConfig("qwen3", vocab_size=65, n_layer=2, n_head=heads, n_kv_head=kv_heads, head_dim=16)
    pages = Pages(config, dtype, torch.device("cpu"), 30)
    pages.bags = bags and pages.bags
    torch.manual_seed(0)
    for tensor in (pages.k_LNKDR, pages.v_LNKRD):
        tensor[:, 1:] = torch.randn_like(tensor[:, 1:])
    return pages


def attend(pages: Pages, step: PagedStep, qkv: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the attention output of layer 1, for queries, keys and values (B, heads, 16)."""
    return step.attend(1, *(x.to(pages.k_LNKDR.dtype) for x in qkv))


@pytest.mark.parametrize("bags", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_match_the_plain_cache(kind: tuple[int, int, torch.dtype], bags: bool) -> None:
    """Token by token, over the edge of a page."""
    pages, lengths, size = random_pages(kind, bags), [5, PAGE - 2, 2 * PAGE + 9], 3 * PAGE
    tables = [[3, 17, 2], [4, 30, 1], [9, 8, 7]]
    k, v = pages.k_LNKDR[:, tables], pages.v_LNKRD[:, tables]  # (L, B, P, K, D, R), (L, B, P, K, R, D)
    cache = KVCache(k.permute(0, 1, 3, 2, 5, 4).flatten(3, 4).float(), v.transpose(2, 3).flatten(3, 4).float(),
                    torch.tensor(lengths))  # fmt: skip
    assert cache.k.shape == (2, 3, kind[1], size, 16)
    for _ in range(5):
        at = cache.length_B.tolist()
        qkv = [torch.randn(3, heads, 16) for heads in (kind[0], kind[1], kind[1])]
        want = CacheStep(cache).attend(1, *(x.to(kind[2]).float() for x in qkv))
        got = attend(pages, PagedStep(pages, [t[: n // PAGE + 1] for t, n in zip(tables, at, strict=True)], at), qkv)
        tolerance = 1e-5 if kind[2] == torch.float32 else 0.03
        torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not has_fast_embedding_bag(torch.device("cpu"), torch.float32), reason="needs x86")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_a_row_does_not_depend_on_the_others(kind: tuple[int, int, torch.dtype], threads: int) -> None:
    """Bit for bit, alone and among rows that read more pages or fewer, and consecutive tokens of one sequence."""
    torch.set_num_threads(threads)
    pages = random_pages(kind, bags=True)
    positions = [5, 6, 7, 70, 130, 200, 270]
    tables = [[1], [1], [1], [2, 3], [4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14, 15]]
    qkv = [torch.randn(7, heads, 16) for heads in (kind[0], kind[1], kind[1])]
    together = attend(pages, PagedStep(pages, tables, positions), qkv)
    for row, (table, position) in enumerate(zip(tables, positions, strict=True)):
        alone = attend(pages, PagedStep(pages, [table], [position]), [x[row : row + 1] for x in qkv])
        assert torch.equal(alone[0], together[row])


def test_a_step_moves_on_as_a_new_one_would() -> None:
    """`advance` and a new `PagedStep` are the same."""
    pages = random_pages(KINDS[0], bags=True)
    step = PagedStep(pages, [[1], [2, 3]], [5, 70])
    step.advance()
    qkv = [torch.randn(2, 4, 16) for _ in range(3)]
    assert torch.equal(attend(pages, step, qkv), attend(pages, PagedStep(pages, [[1], [2, 3]], [6, 71]), qkv))
    assert step.position.tolist() == [6, 71]
