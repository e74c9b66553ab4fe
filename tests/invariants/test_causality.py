"""Decoder-only models: no token sees a later one, and all ways of computing the logits agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet.config.model import ModelConfig
from bardlet.inference import decoders
from bardlet.inference.generate import decode_step, generate, prefill
from bardlet.models import build

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
V, BLOCK = 23, 24
CONFIGS = {
    "gpt2": ModelConfig("gpt2", vocab_size=V, block_size=BLOCK, n_layer=2, n_head=4, n_kv_head=4, n_embd=32,
                        head_dim=8, n_inner=64),
    "gpt2-untied": ModelConfig("gpt2", vocab_size=V, block_size=BLOCK, n_layer=1, n_head=1, n_kv_head=1, n_embd=16,
                               head_dim=16, n_inner=40, tie_embeddings=False, activation="relu"),
    "qwen3": ModelConfig("qwen3", vocab_size=V, block_size=BLOCK, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                         head_dim=6, n_inner=48, activation="silu", norm_eps=1e-6, rope_theta=500.0),
    "qwen3-untied": ModelConfig("qwen3", vocab_size=V, block_size=BLOCK, n_layer=1, n_head=3, n_kv_head=1, n_embd=15,
                                head_dim=8, n_inner=20, activation="silu", norm_eps=1e-6, tie_embeddings=False),
}  # fmt: skip
families = st.sampled_from(sorted(CONFIGS))
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30)


def random_model(config: ModelConfig, seed: int) -> Any:
    """Return a model with weights large enough that every token matters."""
    torch.manual_seed(seed)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape)


@quick
@given(families, seeds, st.integers(1, BLOCK), st.data())
@torch.no_grad()
def test_a_change_at_t_does_not_affect_logits_before_t(family: str, seed: int, T: int, data: Any) -> None:
    model = random_model(CONFIGS[family], seed)
    t = data.draw(st.integers(0, T - 1))
    idx = tokens(2, T)
    changed = idx.clone()
    changed[:, t:] = (changed[:, t:] + torch.randint(1, V, changed[:, t:].shape)) % V
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.allclose(before[:, t], after[:, t])


@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_every_earlier_token_matters(family: str) -> None:
    """The converse of causality, because a model that ignores all tokens would pass the test above."""
    model = random_model(CONFIGS[family], 1)
    idx = tokens(1, BLOCK)
    for t in range(BLOCK):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        assert not torch.allclose(model(idx)[0, -1], model(changed)[0, -1], rtol=0, atol=1e-6)


@quick
@given(families, seeds, st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 3))
@torch.no_grad()
def test_cached_logits_in_any_chunks_equal_uncached(family: str, seed: int, chunks: list[int], B: int) -> None:
    model = random_model(CONFIGS[family], seed)
    idx = tokens(B, min(BLOCK, sum(chunks)))
    cache, start, logits = model.new_cache(B, idx.shape[1]), 0, []
    for length in chunks:
        chunk = idx[:, start : start + length]
        if chunk.shape[1]:
            logits.append(model(chunk, cache=cache))
        start += length
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx), **CLOSE)
    assert cache.length_B.tolist() == [idx.shape[1]] * B


@quick
@given(families, seeds, st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 12))
@torch.no_grad()
def test_a_ragged_batch_equals_its_rows(family: str, seed: int, lengths: list[int], steps: int) -> None:
    """Compare prefill and decoding, with the model and with its decoder, to the model on each whole row."""
    model = random_model(CONFIGS[family], seed)
    rows = [tokens(n + steps) for n in lengths]
    padded = tokens(len(rows), max(lengths))  # random ids as padding
    for row, n, whole in zip(padded, lengths, rows, strict=True):
        row[:n] = whole[:n]
    model_cache, decoder_cache = model.new_cache(len(rows)), model.new_cache(len(rows))
    decode = decoders.decoder(model)
    logits = prefill(model, padded, torch.tensor(lengths), model_cache)
    torch.testing.assert_close(prefill(model, padded, torch.tensor(lengths), decoder_cache), logits)
    whole_logits = [model(row[None])[0] for row in rows]
    for step in range(steps):
        for row, n, expected in zip(logits, lengths, whole_logits, strict=True):
            torch.testing.assert_close(row, expected[n + step - 1], **CLOSE)
        next_ids = torch.stack([row[n + step] for row, n in zip(rows, lengths, strict=True)])
        logits = decode_step(model, next_ids, model_cache)
        # the decoder sums in another order, and rounding grows with the terms: allow 1e-5 of the largest logit, which
        # is up to 8 here (over 150 seeds: at most 1.2e-5 in absolute terms, above 1e-5 twice)
        size = logits.abs().max().clamp_min(1)
        torch.testing.assert_close(decode(next_ids, decoder_cache) / size, logits / size, **CLOSE)
    assert model_cache.length_B.tolist() == decoder_cache.length_B.tolist() == [n + steps for n in lengths]


@quick
@given(families, seeds, st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=3), min_size=1, max_size=3))
@torch.no_grad()
def test_packed_examples_equal_separate_examples(family: str, seed: int, packing: list[list[int]]) -> None:
    model = random_model(CONFIGS[family], seed)
    T = max(map(sum, packing))
    idx, segment = tokens(len(packing), T), torch.full((len(packing), T), 9)
    for row, lengths in enumerate(packing):
        ids = torch.tensor([i % 2 for i in range(len(lengths))])  # reused ids: only a change starts an example
        segment[row, : sum(lengths)] = ids.repeat_interleave(torch.tensor(lengths))
    packed = model(idx, segment_BT=segment)
    for row, lengths in enumerate(packing):
        start = 0
        for n in lengths:
            alone = model(idx[row : row + 1, start : start + n])[0]
            torch.testing.assert_close(packed[row, start : start + n], alone, **CLOSE)
            start += n


@quick
@given(st.sampled_from(["gpt2", "gpt2-untied", "qwen3", "qwen3-untied"]), seeds, st.integers(2, BLOCK), st.data())
@torch.no_grad()
def test_a_prefix_is_bidirectional_and_the_rest_is_causal(family: str, seed: int, T: int, data: Any) -> None:
    model = random_model(CONFIGS[family], seed)
    prefix = data.draw(st.integers(0, T))
    t = data.draw(st.integers(0, T - 1))
    idx = tokens(1, T)
    changed = idx.clone()
    changed[0, t] = (changed[0, t] + 1) % V
    before, after = (model(x, prefix_B=torch.tensor([prefix]))[0] for x in (idx, changed))
    differs = (before - after).abs().amax(dim=-1) > 0
    seen_from = 0 if t < prefix else t
    assert differs.tolist() == [i >= seen_from for i in range(T)]
    if prefix <= 1:
        torch.testing.assert_close(before, model(idx)[0], **CLOSE)


@quick
@given(st.sampled_from(["gpt2", "qwen3"]), seeds, st.integers(1, 12), st.data())
@torch.no_grad()
def test_a_prefix_can_be_cached(family: str, seed: int, T: int, data: Any) -> None:
    model = random_model(CONFIGS[family], seed)
    prefix = torch.tensor([data.draw(st.integers(0, T)), data.draw(st.integers(0, T))])
    idx, cache = tokens(2, T + 3), model.new_cache(2)
    cached = torch.cat((model(idx[:, :T], cache=cache, prefix_B=prefix), model(idx[:, T:], cache=cache)), dim=1)
    torch.testing.assert_close(cached, model(idx, prefix_B=prefix), **CLOSE)


@torch.no_grad()
def generate_uncached(model: Any, prompt: list[int], count: int) -> tuple[list[int], float]:
    """Generate greedily without a cache, halving a full window; also return the smallest margin of a choice."""
    context, new, margin = prompt[-BLOCK:], [], float("inf")
    for _ in range(count):
        best = model(torch.tensor([context]))[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        new.append(int(best.indices[0]))
        context.append(new[-1])
        if len(context) > BLOCK:
            context = context[-(BLOCK // 2) :]
    return new, margin


@settings(max_examples=15)
@given(families, seeds, st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 70))
def test_generation_past_the_window_matches_an_uncached_loop(
    family: str, seed: int, lengths: list[int], count: int
) -> None:
    model = random_model(CONFIGS[family], seed)
    prompts = [tokens(n).tolist() for n in lengths]
    for prompt, completion in zip(prompts, generate(model, prompts, count, temperature=0), strict=True):
        expected, margin = generate_uncached(model, prompt, count)
        if margin > 1e-4:  # rounding may decide between two equally likely tokens
            assert completion == expected
