"""Packed linear layers, int8 weights and the transposed cache, against reference implementations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet.errors import BardletError
from bardlet.inference.decoders.cache import DecodeStep, TransposedCache
from bardlet.models.layers import KVCache
from bardlet.ops.linear import Int8Linear, PackedLinear, has_fast_embedding_bag, linear_rows

few = settings(max_examples=30)


@few
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.sampled_from(["float32", "bfloat16"])
)
def test_packed_linear_matches_linear(width: int, out: int, rows: int, bias: bool, dtype: str) -> None:
    torch.manual_seed(0)
    weight, b = torch.randn(out, width), torch.randn(out) if bias else None
    x = torch.randn(rows, width)
    weight, x = weight.to(getattr(torch, dtype)), x.to(getattr(torch, dtype))
    b = None if b is None else b.to(weight.dtype)
    got, want = PackedLinear(weight, b)(x), F.linear(x.double(), weight.double(), None if b is None else b.double())
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
    for got in (rounded(x), rounded._linear(x) * rounded.scale_O + wide_b, F.linear(x.double(), dequantized) + wide_b):
        want = F.linear(x.double(), dequantized) + wide_b  # all paths use the same rounded weights
        assert bool(((got.double() - want).abs() <= 0.012 * sums + 1e-12).all())


def test_int8_results_do_not_depend_on_the_number_of_rows() -> None:
    """The int8 operator and the widened weights agree up to bf16 rounding.

    The bound is 1.5 times the worst relative error of 270 rows, 0.0044, the same with AVX-512 and with AVX2.
    """
    torch.manual_seed(0)
    rounded, x = Int8Linear(torch.randn(96, 64), torch.randn(96), torch.bfloat16), torch.randn(9, 64).bfloat16()
    together = rounded(x).float()
    for row in range(9):
        alone = rounded(x[row : row + 1])[0].float()
        assert float((alone - together[row]).norm() / together[row].norm()) < 0.0066
    rounded.scale_O[3] *= 1.25
    assert float((rounded(x).float() - together).norm() / together.norm()) > 0.0066


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [127, 3, 60]])
@pytest.mark.skipif(not has_fast_embedding_bag(torch.device("cpu"), torch.float32), reason="needs x86")
def test_transposed_cache_matches_the_plain_cache(heads: int, kv_heads: int, lengths: list[int]) -> None:
    """Token by token, past the initial capacity, with removed rows and a refilled row."""
    torch.manual_seed(0)
    L, B, D, S = 2, len(lengths), 8, 160
    cache = KVCache(torch.randn(L, B, kv_heads, S, D), torch.randn(L, B, kv_heads, S, D), torch.tensor(lengths))
    transposed = TransposedCache(cache, heads, torch.float32)

    def check_step(rows: int) -> None:
        plain, fast = DecodeStep(cache), transposed.step()
        for layer in range(L):
            q, k, v = torch.randn(rows, heads, D), torch.randn(rows, kv_heads, D), torch.randn(rows, kv_heads, D)
            torch.testing.assert_close(fast.attend(layer, q, k, v), plain.attend(layer, q, k, v), rtol=1e-4, atol=1e-5)
        cache.length_B += 1

    for _ in range(4):
        check_step(B)
    cache = KVCache(cache.k[:, [0, 2]], cache.v[:, [0, 2]], cache.length_B[[0, 2]])
    transposed.select([0, 2])
    for _ in range(3):
        check_step(2)
    row = KVCache(torch.randn(L, 1, kv_heads, 2, D), torch.randn(L, 1, kv_heads, 2, D), torch.tensor([2]))

    def fill(empty: KVCache) -> None:
        empty.k[:], empty.v[:], empty.length_B[0] = row.k, row.v, 2

    transposed.refill(1, 2, fill)
    cache.k[:, 1, :, :2], cache.v[:, 1, :, :2], cache.length_B[1] = row.k[:, 0], row.v[:, 0], 2
    for _ in range(20):
        check_step(2)
    transposed.length = [S, 4]
    with pytest.raises(BardletError, match="the cache is full after 160 tokens"):
        transposed.step()
