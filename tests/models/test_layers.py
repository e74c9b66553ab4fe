from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet import models
from bardlet.config.pretraining import TrainConfig
from bardlet.errors import BardletError
from bardlet.inference.decoders.cache import CacheStep
from bardlet.models.layers import KVCache, RMSNorm, apply_rope, positions_and_mask, rope_cos_sin
from bardlet.ops.attention import attention, attention_by_hand, block_mask, packed_mask
from bardlet.ops.dropout import Dropout, byte_dropout
from bardlet.runtime.compiler import compiler_missing

quick = settings(max_examples=30)
needs_compiler = pytest.mark.skipif(compiler_missing(torch.device("cpu")) is not None, reason="no C++ compiler")


def test_rms_norm_matches_its_formula_and_keeps_the_dtype() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 16) * 0.1
    x64 = x.double()
    expected = x64 / (x64.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@quick
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_rotated_dot_products_depend_only_on_distance(m: int, n: int, shift: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        cos, sin = rope_cos_sin(torch.tensor([[position]]), 8, 10_000.0)
        return apply_rope(x[None, None, None], cos.double(), sin.double())[0, 0, 0]

    shifted = rotated(q, m + shift) @ rotated(k, n + shift)
    torch.testing.assert_close(rotated(q, m) @ rotated(k, n), shifted, rtol=0, atol=2e-4)
    torch.testing.assert_close(rotated(q, m).norm(), q.norm(), rtol=1e-6, atol=1e-6)
    assert torch.equal(rotated(q, 0), q)


def attention_by_loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Compute attention one query at a time, in float64; mask is (B, T, S)."""
    B, H, T, D = q.shape
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            kv = h // (H // k.shape[1])
            for t in range(T):
                seen = mask[b, t].nonzero()[:, 0]
                score = k[b, kv, seen].double() @ q[b, h, t].double() / math.sqrt(D)
                out[b, h, t] = score.softmax(0) @ v[b, kv, seen].double()
    return out


@quick
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_both_attentions_match_the_formula(B: int, K: int, group: int, T: int, causal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(B, K * group, T, 4), torch.randn(B, K, T, 4), torch.randn(B, K, T, 4)
    mask = torch.ones(B, T, T, dtype=torch.bool).tril()
    if not causal:
        mask = mask | (torch.rand(B, T, T) < 0.3)
    expected = attention_by_loop(q, k, v, mask)
    for attend in (attention, attention_by_hand):
        got = attend(q, k, v, None if causal else mask[:, None])
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_drops_weights_and_scales_the_rest(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    T, dropout = 64, 0.25
    q, k = torch.randn(2, 4, T, T, dtype=dtype), torch.randn(2, 2, T, T, dtype=dtype)
    v = torch.eye(T, dtype=dtype).expand(2, 2, T, T)  # makes the output equal the weights
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril() if masked else None
    whole = attention(q, k, v, mask).float()
    dropped = attention(q, k, v, mask, dropout).float()
    seen = whole > 0
    gone = (dropped == 0) & seen
    assert 0.22 < gone.sum() / seen.sum() < 0.28
    torch.testing.assert_close(dropped[~gone], whole[~gone] / (1 - dropout), rtol=2e-2, atol=1e-6)
    assert attention(q, k, v, mask, dropout).dtype == dtype


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_a_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    """The share is p to the nearest 256th; the rest is scaled to keep the mean; gradients use the same mask."""
    torch.manual_seed(0)
    share = min(max(1, round(256 * p)), 255) / 256
    x = torch.ones(1000, 1001, dtype=dtype, requires_grad=True)
    y = byte_dropout(x, p)
    kept = y != 0
    assert y.dtype == dtype
    assert abs((~kept).float().mean() - share) < 0.003
    torch.testing.assert_close(y[kept].float(), torch.full([int(kept.sum())], 1 / (1 - share)), rtol=4e-3, atol=0)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    assert not torch.equal(byte_dropout(x, p) != 0, kept)  # a new mask at each call
    torch.manual_seed(0)
    assert torch.equal(byte_dropout(x, p), y)  # and the same mask from the same seed


def test_dropout_does_nothing_outside_training() -> None:
    x = torch.randn(4, 5)
    layer = Dropout(0.5)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(byte_dropout(x, 0.0), x)
    assert (layer.train()(x) == 0).any()


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (8, 8)])
def test_dropout_works_on_any_shape(shape: tuple[int, ...]) -> None:
    assert byte_dropout(torch.ones(shape), 0.5).shape == shape


@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_compiled_and_eager_blocks_drop_the_same_values(model: str) -> None:
    """Dropout layers of equal shape get different masks, forward and backward agree, and so does the generator."""
    torch.manual_seed(0)
    net = models.build(TrainConfig(model=model, n_layer=1, n_head=2, n_embd=16, dropout=0.3).model_config(11))
    idx = torch.arange(8)[None] % 11
    results = []
    for call in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        net.zero_grad()
        loss = call(idx).square().sum()
        loss.backward()
        results.append([loss.detach(), torch.rand(1), *(p.grad for p in net.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_gradients_of_both_attentions_agree() -> None:
    torch.manual_seed(0)
    grads = []
    inputs = [torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)]
    for attend in (attention, attention_by_hand):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        attend(q, k, v).square().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_attention_by_hand_match_finite_differences(dropout: float, masked: bool) -> None:
    """In float64, with grouped queries, dropout and arbitrary masks."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True)
              for shape in ((2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3))]
    mask = torch.rand(2, 1, 5, 5) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # drop the same weights at each call
        return attention_by_hand(q, k, v, mask if masked else None, dropout)

    assert torch.autograd.gradcheck(f, inputs)


def test_attention_in_halves_matches_attention_in_one() -> None:
    """A long causal row of even length is computed in two halves, one of odd length at once; the results agree."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 160, 8), torch.randn(1, 2, 160, 8), torch.randn(1, 2, 160, 8)]
    causal = torch.ones(1, 1, 160, 160, dtype=torch.bool).tril()
    grads = []
    for mask in (None, causal):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        y = attention_by_hand(q, k, v, mask)
        y.square().sum().backward()
        grads.append((y, q.grad, k.grad, v.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)
    odd = attention_by_hand(*(x[:, :, :159] for x in inputs))
    torch.testing.assert_close(odd, grads[0][0][:, :, :159], rtol=1e-5, atol=1e-5)


def test_bf16_attention_is_close_to_fp32() -> None:
    """1.5 times the worst relative error of 30 seeds, 0.0040, the same with AVX-512 and with AVX2."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 32, 16).unbind(0)
    for T in (32, 8):
        got = attention(*(x[:, :, :T].bfloat16() for x in (q, k, v)))
        want = attention(*(x[:, :, :T] for x in (q, k, v)))
        assert float((got.float() - want).norm() / want.norm()) < 0.006
        wrong = attention(*(x[:, :, :T] * scale for x, scale in zip((q, k, v), (1.05, 1, 1), strict=True)))
        assert float((wrong - want).norm() / want.norm()) > 0.006  # a scale of the scores that is off by a twentieth


def test_positions_and_mask() -> None:
    idx = torch.zeros(2, 5, dtype=torch.int64)
    position, mask = positions_and_mask(idx, 8)
    assert position.tolist() == [[0, 1, 2, 3, 4]] and mask is None

    position, mask = positions_and_mask(idx, 8, segment_BT=torch.tensor([[7, 7, 7, 3, 3], [1, 2, 2, 1, 1]]))
    assert position.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 0, 1]]
    assert mask is not None and mask.shape == (2, 1, 5, 5)
    assert mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]

    _, mask = positions_and_mask(idx, 8, prefix_B=torch.tensor([0, 3]))
    assert mask is not None
    assert mask[0, 0].int().tolist() == torch.ones(5, 5).tril().int().tolist()
    assert mask[1, 0].int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]

    empty = torch.zeros(1, 2, 1, 8, 4)
    position, mask = positions_and_mask(idx[:, :2], 8, cache=KVCache(empty, empty, torch.tensor([1, 3])))
    assert position.tolist() == [[1, 2], [3, 4]]
    assert mask is not None
    assert mask[:, 0].int().tolist() == [[[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]


def test_too_many_tokens_raise() -> None:
    idx = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(BardletError, match="5 tokens do not fit in a context of 4"):
        positions_and_mask(idx, 4)
    empty = torch.zeros(1, 1, 1, 6, 4)
    cache = KVCache(empty, empty, torch.tensor([2]))
    with pytest.raises(BardletError, match="7 tokens do not fit in a context of 6"):
        positions_and_mask(idx, 8, cache)
    with pytest.raises(ValueError, match="segment_BT or cache"):
        positions_and_mask(idx[:, :1], 8, cache, segment_BT=idx[:, :1])
    with pytest.raises(BardletError, match="cache is full"):
        CacheStep(KVCache(empty, empty, torch.tensor([6])))


def test_a_meta_model_does_not_load_the_compiler() -> None:
    """Loading it would take a second and 100 MB at start-up."""
    lines = ("import sys", "from bardlet import models", "from bardlet.config.pretraining import TrainConfig",
             "from bardlet.models.layers import on_meta_device",
             "config = TrainConfig().model_config(65)",
             "with on_meta_device(): shapes = [p.shape for p in models.build(config).parameters()]",
             "assert shapes == [p.shape for p in models.build(config).parameters()]",
             "print('torch._dynamo' in sys.modules)")
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def packed_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys, values and start_BT of two rows of 256 tokens: eight examples, and one."""
    torch.manual_seed(0)
    q_BHTD, k_BKSD, v_BKSD = torch.randn(2, 4, 256, 16), torch.randn(2, 2, 256, 16), torch.randn(2, 2, 256, 16)
    starts = torch.tensor([0, 3, 40, 41, 128, 200, 201, 255])
    start_B0 = starts[torch.searchsorted(starts, torch.arange(256), right=True) - 1]
    return q_BHTD, k_BKSD, v_BKSD, torch.stack((start_B0, torch.zeros(256, dtype=torch.int64)))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_blocks_of_packed_rows_attend_as_the_mask_does(compiled: bool) -> None:
    """Compiled, by the kernel that GPUs use; the CPU has its forward pass only."""
    q, k, v, start_BT = packed_batch()
    mask = packed_mask(start_BT)
    assert isinstance(mask, torch.Tensor) and mask.sum() == 256 * 257 // 2 + sum(
        n * (n + 1) // 2 for n in (3, 37, 1, 87, 72, 1, 54, 1))
    attend = torch.compile(attention) if compiled else attention
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, block_mask(start_BT)), attention(q, k, v, mask), rtol=1e-5,
                                   atol=1e-5)


def test_block_masks_have_gradients_where_there_is_no_kernel() -> None:
    """In eager code, and with dropout, the mask becomes a tensor."""
    q, k, v, start_BT = packed_batch()
    gradients = []
    for mask in (block_mask(start_BT), packed_mask(start_BT)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(attention(*leaves, mask, 0.1).square().sum(), leaves))
    torch.testing.assert_close(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_on_a_gpu_have_the_gradients_of_the_mask(dtype: torch.dtype) -> None:
    q, k, v, start_BT = (x.cuda() for x in packed_batch())
    mask, gradients = packed_mask(start_BT), []
    assert not isinstance(mask, torch.Tensor)
    for attend, how in ((torch.compile(attention), mask), (attention, packed_mask(start_BT.cpu()).cuda())):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        gradients.append(torch.autograd.grad(attend(*leaves, how).float().square().sum(), leaves))
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)
