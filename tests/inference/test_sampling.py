"""Sampling: the distribution of each setting, exactness, seeds and independence of the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet.errors import BardletError
from bardlet.inference.sampling import _weights, candidates, draw, row_seeds, sample_next

V = 19
few = settings(max_examples=50)
logit_rows = st.lists(
    st.lists(st.floats(-2, 2, width=32) | st.floats(-20, 20, width=32) | st.just(1.5), min_size=V, max_size=V),
    min_size=1,
    max_size=4,
).map(torch.tensor)


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


# ---------------------------------------------------------------------------- large vocabularies


def large(kind: str, rows: int, size: int, seed: int = 0) -> torch.Tensor:
    """Return logits (rows, size) of the given kind."""
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    if kind == "outliers":  # ids that only an infinite temperature would sample, and one that is nearly certain
        x[:, ::7], x[0, 3] = -1e4, 1e4
    return {"flat": x, "peaked": 6 * x, "untrained": 0.02 * x, "ties": (2 * x).round() / 2, "bf16": x.bfloat16(),
            "constant": torch.zeros_like(x), "outliers": x}[kind]


KINDS = ("flat", "peaked", "untrained", "ties", "bf16", "constant", "outliers")


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_a_plain_float64_reference(kind: str, temperature: float) -> None:
    """The id's interval of the cumulative distribution has u in it, up to 1e-7.

    The float32 weights shift the cumulative distribution by at most 1.3e-8 (20 seeds, with AVX-512 and with AVX2). A
    nucleus that ends within 1e-7 of p may have an id more or less: 6 of 6,720 rows, which are left out.
    """
    logits = large(kind, 4, 6_007)
    u = torch.rand(4, 1, generator=torch.Generator().manual_seed(5))
    compared = 0
    for top_k, top_p in ((None, None), (None, 0.3), (None, 0.9), (None, 0.99), (50, None), (50, 0.9)):
        want = plain(logits, temperature, top_k, top_p)
        above = want.cumsum(-1)
        ids = draw(logits, temperature, top_k, top_p, u)
        whole = plain(logits, temperature, top_k, None).sort(-1, descending=True).values.cumsum(-1)
        for row, token in enumerate(ids.tolist()):
            if top_k and kind in ("ties", "bf16", "constant"):
                continue  # torch.topk may choose any of equal logits
            if top_p is not None and float((whole[row] - top_p).abs().min()) < 1e-7:
                continue
            compared += 1
            assert want[row, token] > 0, (top_k, top_p)
            assert float(above[row, token]) >= float(u[row]) - 1e-7, (top_k, top_p)
            assert float(above[row, token] - want[row, token]) <= float(u[row]) + 1e-7, (top_k, top_p)
    assert compared >= 12


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nucleus_of_a_large_vocabulary_is_exact(kind: str, top_p: float) -> None:
    """Of tens of thousands of ids, the same ones remain as by sorting all of them in float64."""
    logits = large(kind, 2, 30_011, seed=1)
    for temperature in (0.5, 1.5):
        weight = _weights(logits.float(), temperature, top_p)[:, :30_011]
        kept, want = weight > 0, plain(logits, temperature, None, top_p)
        torch.testing.assert_close((weight.double() / weight.double().sum(-1, keepdim=True))[kept], want[kept],
                                   rtol=5e-6, atol=0)  # fmt: skip
        assert torch.equal(kept, want > 0)


@pytest.mark.parametrize(
    ("kind", "temperature", "top_p"),
    [("flat", 1.0, None), ("flat", 1.0, 0.9), ("flat", 2.0, 0.99), ("peaked", 0.1, 0.9), ("peaked", 2.0, 0.95),
     ("ties", 1.0, 0.5), ("ties", 2.0, None), ("bf16", 1.0, 0.9), ("untrained", 1.0, 0.8), ("outliers", 1.0, 0.9)],
)  # fmt: skip
def test_draws_follow_the_distribution(kind: str, temperature: float, top_p: float | None) -> None:
    """By a chi-square test over forty groups of ids; a nucleus has up to tens of thousands."""
    size, rows = 20_011, 1_500
    logits = large(kind, 2, size, seed=2)[1:]
    want = plain(logits, temperature, None, top_p)[0]
    generator = torch.Generator().manual_seed(4)
    draws = [sample_next(logits.expand(250, size), temperature, None, top_p, generator) for _ in range(rows // 250)]
    drawn = torch.cat(draws)
    assert bool((want[drawn] > 0).all())
    order = want.argsort(descending=True, stable=True)
    group = torch.empty(size, dtype=torch.long).scatter_(0, order, (want[order].cumsum(0) * 40).long().clamp_(max=39))
    expected = torch.zeros(40, dtype=torch.float64).scatter_add_(0, group, want) * rows
    seen = group[drawn].bincount(minlength=40).double()
    frequent = expected >= 5
    statistic, freedom = float(((seen - expected) ** 2 / expected)[frequent].sum()), int(frequent.sum()) - 1
    assert statistic < freedom + 3.8 * (2 * max(freedom, 1)) ** 0.5 + 10


@pytest.mark.parametrize("settings", [(None, None), (None, 0.9), (None, 0.99), (50, None), (50, 0.9)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_depends_on_its_row_alone(kind: str, settings: tuple[int | None, float | None]) -> None:
    """Bit for bit: a row alone, among sixteen, and in another place."""
    top_k, top_p = settings
    logits = large(kind, 16, 5_003, seed=3)
    u = torch.rand(16, 1, generator=torch.Generator().manual_seed(6))
    together = draw(logits, 0.9, top_k, top_p, u)
    assert torch.equal(together, draw(logits, 0.9, top_k, top_p, u))
    assert torch.equal(together, torch.cat([draw(logits[i : i + 1], 0.9, top_k, top_p, u[i : i + 1])
                                            for i in range(16)]))  # fmt: skip
    assert torch.equal(together.flip(0), draw(logits.flip(0), 0.9, top_k, top_p, u.flip(0)))
    if top_k is None:
        weight = _weights(logits.float(), 0.9, top_p)
        assert torch.equal(weight[5:9], _weights(logits[5:9].float(), 0.9, top_p))


def test_extreme_logits_and_temperatures_give_an_id() -> None:
    for temperature in (1e-6, 0.1, 2.0, 1e6):
        for kind in ("outliers", "peaked", "constant"):
            logits = large(kind, 3, 2_003) * 1e3
            for top_p in (None, 1e-9, 0.9, 1 - 2**-53):
                for u in (0.0, 0.5, 1 - 2**-24):
                    ids = draw(logits, temperature, None, top_p, torch.full((3, 1), u))
                    assert bool(((ids >= 0) & (ids < 2_003)).all())
                    if (temperature == 1e-6 and kind != "constant") or top_p == 1e-9:
                        assert torch.equal(logits.gather(-1, ids[:, None])[:, 0], logits.amax(-1))


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ((0.8, 50, None), [[136, 178, 305, 57], [565, 90, 766, 761], [707, 905, 459, 820]]),
        ((0.8, 50, 0.9), [[137, 178, 305, 58], [566, 89, 766, 762], [707, 906, 459, 820]]),
        ((0.8, None, 0.9), [[118, 171, 304, 55], [558, 88, 766, 761], [696, 904, 459, 819]]),
        ((1.0, None, None), [[92, 165, 303, 54], [552, 87, 766, 760], [686, 904, 459, 818]]),
    ],
)  # fmt: skip
def test_a_seed_keeps_its_ids(settings: tuple[float, int | None, float | None], ids: list[list[int]]) -> None:
    """The ids of this seed before sampling became faster."""
    steps = torch.arange(997)
    logits = torch.stack([(steps * factor % 997 - 500) / 100 for factor in (7, 11, 13, 17)])
    generator = torch.Generator().manual_seed(3)
    assert [sample_next(logits, *settings, generator).tolist() for _ in range(3)] == ids
