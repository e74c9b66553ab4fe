"""Sampling and generation: distributions, seeds, stop ids, dtypes and the context window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.inference import decoders
from bardlet.inference.decoders.cache import PlainCache
from bardlet.inference.generate import generate, stream
from bardlet.inference.sampling import candidates, row_seeds, sample_next
from bardlet.models import build

V = 19
CONFIGS = [
    ModelConfig("bigram", vocab_size=V, block_size=16),
    ModelConfig("gpt2", vocab_size=V, block_size=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, head_dim=8,
                n_inner=32),
    ModelConfig("qwen3", vocab_size=V, block_size=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, head_dim=4,
                n_inner=24, activation="silu", norm_eps=1e-6),
]  # fmt: skip
few = settings(max_examples=50)
logit_rows = st.lists(
    st.lists(st.floats(-2, 2, width=32) | st.floats(-20, 20, width=32) | st.just(1.5), min_size=V, max_size=V),
    min_size=1,
    max_size=4,
).map(torch.tensor)


@pytest.fixture(params=CONFIGS, ids=lambda config: config.model)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    torch.manual_seed(0)
    model = build(request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    yield model.eval()


# ---------------------------------------------------------------------------- sampling


def probabilities(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Return the distribution over all ids, (B, V), float64."""
    index, probability = candidates(logits, temperature, top_k, top_p)
    return torch.zeros(logits.shape, dtype=torch.float64).scatter(-1, index, probability)


def plain(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Return the same distribution as the definitions say: all ids sorted, in float64."""
    scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    ranked, index = scaled.sort(descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = float("-inf")
    weight = ranked.softmax(-1)
    if top_p is not None:
        weight[weight.cumsum(-1) - weight >= top_p] = 0
    return torch.zeros_like(weight).scatter(-1, index, weight / weight.sum(-1, keepdim=True))


@pytest.mark.parametrize("size", [300, 5_000])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (50, None), (None, 0.9), (None, 0.999), (50, 0.9)])
def test_a_large_vocabulary_is_sampled_by_its_distribution(top_k: int | None, top_p: float | None, size: int) -> None:
    """By a chi-square test over many draws, with ids of few expected draws together."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(1, size, generator=generator) * 3
    want = plain(logits, 0.8, top_k, top_p)[0]
    torch.testing.assert_close(probabilities(logits, 0.8, top_k, top_p)[0], want, rtol=1e-9, atol=1e-12)
    n = 6_000_000 // size
    drawn = sample_next(logits.expand(n, size), 0.8, top_k, top_p, generator).bincount(minlength=size).double()
    assert not drawn[want == 0].any()
    frequent = want * n >= 10
    expected = torch.cat((want[frequent] * n, want[~frequent].sum()[None] * n)).clamp(min=1e-9)
    seen = torch.cat((drawn[frequent], drawn[~frequent].sum()[None]))
    kept = expected > 1
    statistic, freedom = float(((seen - expected) ** 2 / expected)[kept].sum()), int(kept.sum()) - 1
    assert statistic < freedom + 3.8 * (2 * freedom) ** 0.5 + 10


def test_large_seeds_differ() -> None:
    """PyTorch's own generator reads 32 bits of a seed only."""
    assert len({row_seeds(seed, 1)[0] % 2**32 for seed in (1, 2**32 + 1, 2**33 + 1, 2**62 + 1)}) == 4
    assert row_seeds(7, 2) == [7_000_021, 7_000_022]  # seeds of 32 bits keep their texts


@few
@given(logit_rows, st.floats(0.05, 5), st.floats(0.01, 0.999), st.none() | st.integers(1, V + 3))
def test_top_p_keeps_the_smallest_set_that_reaches_p(
    logits: torch.Tensor, temperature: float, top_p: float, top_k: int | None
) -> None:
    whole = probabilities(logits, temperature, top_k, None)
    cut = probabilities(logits, temperature, top_k, top_p)
    for before, after in zip(whole, cut, strict=True):
        kept = after > 0
        mass = float(before[kept].sum())
        assert mass >= top_p - 1e-12
        assert mass - float(before[kept].min()) < top_p + 1e-12  # one token fewer would not reach it
        if not kept.all():
            assert float(before[kept].min()) >= float(before[~kept].max())
        torch.testing.assert_close(after[kept], before[kept] / mass, rtol=1e-9, atol=1e-12)


def test_top_p_edge_cases() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    for top_p, kept in ((0.49, 1), (0.5, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.87, 3), (0.88, 4), (1.0, 4)):
        assert int((probabilities(logits, 1.0, None, top_p) > 0).sum()) == kept
    assert probabilities(logits, 1.0, None, 0.76)[0].tolist() == pytest.approx(
        [1 / 7, 4 / 7, 0, 2 / 7]
    )  # ties: the first


@few
@given(logit_rows, st.floats(0.05, 5), st.integers(1, V + 3))
def test_top_k_keeps_exactly_the_k_likeliest(logits: torch.Tensor, temperature: float, top_k: int) -> None:
    cut = probabilities(logits, temperature, top_k, None)
    below = logits.double() - logits.double().amax(-1, keepdim=True)  # 0 and 2e-16 are equal after the subtraction
    want = (below / temperature).softmax(-1)
    for before, after in zip(want, cut, strict=True):
        kept = after > 0
        if float(before.min()) > 1e-300:
            assert int(kept.sum()) == min(top_k, V)
        assert kept.all() or float(before[kept].min()) >= float(before[~kept].max())
        torch.testing.assert_close(after[kept], before[kept] / before[kept].sum(), rtol=1e-9, atol=1e-12)


@few
@given(st.integers(0, 2**32))
def test_temperature_0_and_top_k_1_are_greedy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, V, generator=generator)
    assert torch.equal(sample_next(logits, 0), logits.argmax(-1))
    assert torch.equal(sample_next(logits, 1.3, 1, None, generator), logits.argmax(-1))
    assert torch.equal(sample_next(logits, 1.3, None, 1e-9, generator), logits.argmax(-1))
    assert torch.equal(sample_next(logits * 100, 1e-6, None, None, generator), logits.argmax(-1))


def test_sample_frequencies_match_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, float("-inf"), 2.0])
    n = 40_000
    drawn = sample_next(logits.expand(n, 5), 0.7, None, None, generator).bincount(minlength=5) / n
    want = (logits / 0.7).softmax(-1)
    assert drawn[3] == 0
    assert float((drawn - want).abs().max()) < 4 * (0.25 / n) ** 0.5  # four standard deviations


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_ids_of_probability_0_are_never_sampled(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At both ends of the range of torch.rand."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, u))
    logits = torch.tensor([[float("-inf"), -1.0, float("-inf"), 2.0, float("-inf")]] * 2)
    assert sample_next(logits, 1.0).tolist() == ([1, 1] if u == 0 else [3, 3])


def test_row_seeds() -> None:
    assert row_seeds([5, 6], 2) == [5, 6]
    assert row_seeds(3, 2) == row_seeds(3, 5)[:2]
    assert len(set(row_seeds(1, 50) + row_seeds(2, 50))) == 100
    assert row_seeds(None, 2) != row_seeds(None, 2)
    with pytest.raises(BardletError, match="3 seeds for 2 prompts"):
        row_seeds([1, 2, 3], 2)


# ---------------------------------------------------------------------------- generation


def test_a_row_does_not_depend_on_the_rest_of_the_batch(model: Any) -> None:
    prompts = [[1], [2, 3, 4], [5] * 30, [6, 7]]
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "stop_ids": (11,)}
    seeds = [4, 3, 2, 1]
    together = generate(model, prompts, 40, seed=seeds, **options)
    alone = [generate(model, [p], 40, seed=[s], **options)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert generate(model, prompts, 10, seed=7)[:2] == generate(model, prompts[:2], 10, seed=7)


def test_finished_rows_do_not_affect_the_others(model: Any) -> None:
    """They stay in the cache for a while: some past its end, some until a quarter of the rows is finished."""
    prompts, seeds = [[1 + row % 5] * (1 + row % 13) for row in range(24)], list(range(24))
    options: dict[str, Any] = {"temperature": 0.9, "stop_ids": (4, 9)}
    together = generate(model, prompts, 40, seed=seeds, **options)
    assert len(set(map(len, together))) > 8 and max(map(len, together)) > 16
    assert together == [generate(model, [p], 40, seed=[s], **options)[0] for p, s in zip(prompts, seeds, strict=True)]


def test_the_seed_decides_and_the_global_generator_is_untouched(model: Any) -> None:
    torch.manual_seed(123)
    want = torch.rand(3)
    torch.manual_seed(123)
    first = generate(model, [[1], [1]], 30, seed=5)
    assert torch.equal(torch.rand(3), want)
    assert generate(model, [[1], [1]], 30, seed=5) == first
    assert first[0] != first[1]
    assert generate(model, [[1]], 30, seed=6) != first[:1]
    assert generate(model, [[1]], 30, seed=None) != generate(model, [[1]], 30, seed=None)


def test_rows_end_with_their_first_stop_id(model: Any) -> None:
    free = generate(model, [[1], [2], [3]], 40, seed=0)
    stop = free[0][7]
    steps: list[list[int | None]] = []
    got = generate(model, [[1], [2], [3]], 40, seed=0, stop_ids=[stop], on_token=steps.append)
    for row, unstopped in zip(got, free, strict=True):
        assert row == (unstopped[: unstopped.index(stop) + 1] if stop in unstopped else unstopped)
    assert len(got[0]) <= 8
    assert [[step[row] for step in steps if step[row] is not None] for row in range(3)] == got
    assert len(steps) == max(map(len, got))


def test_stream_yields_the_ids_of_generate_step_by_step(model: Any) -> None:
    whole = generate(model, [[1, 2], [3]], 20, seed=9)
    steps = stream(model, [[1, 2], [3]], 20, seed=9)
    assert [next(steps) for _ in range(5)] == [list(pair) for pair in zip(*whole, strict=True)][:5]


def test_generation_does_not_change_the_model(model: Any) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    generate(model, [[1]], 3, dtype=torch.bfloat16, seed=0)
    steps = stream(model, [[1]], 20)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    steps.close()
    assert model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    model(torch.tensor([[1, 2]])).sum().backward()  # and it can still be trained


def test_generation_disables_dropout(model: Any) -> None:
    with_dropout = build(replace(model.config, dropout=0.5)).train()
    with_dropout.load_state_dict(model.state_dict())
    prompt = [[1, 2, 3, 4, 5, 6, 7]]
    assert generate(with_dropout, prompt, 40, temperature=0) == generate(model, prompt, 40, temperature=0)
    assert with_dropout.training


@pytest.mark.parametrize("cache_dtype", [None, torch.float32])
def test_bf16_is_close_to_fp32(model: Any, cache_dtype: torch.dtype | None) -> None:
    if not hasattr(model, "new_cache"):
        pytest.skip("lecture models have no cache")
    idx = torch.arange(12)[None]
    with torch.inference_mode():
        want = model(idx)[0, -1]
        half = build(model.config).eval()
        half.load_state_dict(model.state_dict())
        half.bfloat16()
        cache = half.new_cache(1, dtype=cache_dtype)
        decode = decoders.decoder(half)
        half(idx[:, :3], cache=cache)
        plain_cache = PlainCache(cache)
        for token in idx[0, 3:]:
            got = decode(token[None], plain_cache)
    assert got.dtype == torch.bfloat16
    assert float((got[0].float() - want).abs().max()) < 0.1 * float(want.abs().max())
    assert len(generate(model, [[1], [2, 3]], 30, dtype=torch.bfloat16, seed=0)[1]) == 30


def test_no_prompts_or_no_tokens_give_empty_results(model: Any) -> None:
    assert generate(model, [], 5) == []
    assert generate(model, [[1], [2]], 0) == [[], []]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"prompts": [[V]]}, "token 19; ids must be from 0 to 18"),
        ({"prompts": [[-1]]}, "token -1"),
        ({"max_new_tokens": -1}, "cannot generate -1 tokens"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
    ],
)
def test_invalid_arguments_raise(change: dict[str, Any], message: str) -> None:
    model = build(CONFIGS[0])
    with pytest.raises(BardletError, match=message):
        generate(model, **({"prompts": [[1]], "max_new_tokens": 3} | change))


def test_nan_weights_raise() -> None:
    model = build(CONFIGS[1])
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = float("nan")
    with pytest.raises(BardletError, match="not finite"):
        generate(model, [[1]], 3)


def test_int8_is_close_to_fp32(model: Any) -> None:
    if not hasattr(model, "new_cache"):
        with pytest.raises(BardletError, match="int8 is for gpt2 and qwen3"):
            generate(model, [[1]], 3, dtype=torch.int8)
        return
    idx = torch.arange(12)[None].repeat(6, 1)  # few rows use the int8 operator, many do not
    with torch.inference_mode():
        want = model(idx)[0, -1]
        for rows in (1, 6):
            cache, decode = model.new_cache(rows), decoders.decoder(model, torch.int8)
            model(idx[:rows, :3], cache=cache)
            cache = decode.cache(cache)
            for token in idx[:rows, 3:].T:
                got = decode(token, cache)
            assert float((got.float() - want).abs().max()) < 0.1 * float(want.abs().max())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(generate(model, [[1], [2, 3]], 40, dtype=torch.int8, seed=0)[1]) == 40  # past the window, too
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_random_numbers_drawn_ahead_match_one_draw_per_step(model: Any) -> None:
    """Each row uses one number of its generator per step; 300 steps are more than are drawn at once.

    The reference truncates a full window: to its last half with a cache, else to the last block_size tokens.
    """
    got = generate(model, [[1], [2]], 300, seed=[8, 9], temperature=1.1)
    window = model.config.block_size
    kept = window // 2 if hasattr(model, "new_cache") else window
    for row, seed, token in ((0, 8, 1), (1, 9, 2)):
        generator, context, ids = torch.Generator().manual_seed(seed), [token], []
        for _ in range(300):
            with torch.inference_mode():
                logits = model(torch.tensor([context]))[:, -1]
            ids.append(int(sample_next(logits, 1.1, generator=generator)[0]))
            context.append(ids[-1])
            if len(context) > window:
                context = context[-kept:]
        assert got[row] == ids


@pytest.mark.parametrize("prompts", [[[1]], [[1], [2, 3, 4], [5] * 12]])
def test_greedy_ids_match_the_uncached_model(model: Any, prompts: list[list[int]]) -> None:
    """Also past the window, where the last half of it is prefilled again."""
    if not hasattr(model, "new_cache"):
        pytest.skip("lecture models have no cache")
    got = generate(model, prompts, 40, temperature=0)
    window = model.config.block_size
    for prompt, new in zip(prompts, got, strict=True):
        context = list(prompt)
        for token in new:
            with torch.inference_mode():
                assert token == int(model(torch.tensor([context]))[0, -1].argmax())
            context.append(token)
            if len(context) > window:
                context = context[-(window // 2) :]
