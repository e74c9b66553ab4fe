"""Looking into models: each view against the model's own computation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bardlet import models
from bardlet.config.model import LLAMA, RUNGS, ModelConfig, RopeScaling
from bardlet.errors import BardletError, Unsupported
from bardlet.inference import inside
from bardlet.inference.generate import generate

SMALL = ModelConfig("gpt2", vocab_size=29, block_size=24, n_layer=2, n_head=4, n_kv_head=4, n_embd=32, head_dim=8,
                    n_inner=48, dropout=0.1)  # fmt: skip
GROUPED = replace(SMALL, model="qwen3", n_kv_head=2, head_dim=6, activation="silu")
RUNG = replace(SMALL, activation="relu", tie_embeddings=False)
CONFIGS = {"gpt2": SMALL, "untied gpt2": replace(SMALL, tie_embeddings=False),
           "qwen3": replace(GROUPED, n_kv_head=4), "grouped qwen3": GROUPED,
           "llama": replace(GROUPED, model="llama", attention_bias=True, tie_embeddings=False, rope_theta=500.0,
                            rope_scaling=RopeScaling(8.0, 1.0, 4.0, 40)),
           "mistral": replace(GROUPED, model="mistral"), "qwen2": replace(GROUPED, model="qwen2", head_dim=8),
           "smollm3": replace(GROUPED, model="smollm3", layers_without_positions=(1,)),
           **{rung: replace(RUNG, model=rung) for rung in RUNGS if rung not in ("bigram", "averaging")}}
FAMILIES = [name for name in CONFIGS if name not in RUNGS]
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


def random_model(config: ModelConfig) -> Any:
    torch.manual_seed(0)
    model = models.build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model  # in training mode: looking must switch dropout off


@pytest.fixture(params=CONFIGS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(CONFIGS[request.param])


@pytest.fixture(autouse=True)
def _unchanged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves the model in training mode and without hooks."""
    yield
    if "model" in request.fixturenames:
        model = request.getfixturevalue("model")
        assert model.training and not hooks(model)


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def own_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits_TV = model.eval()(torch.tensor([ids]))[0]
    model.train()
    return logits_TV


def every_head(model: Any) -> list[tuple[int, int]]:
    parts = inside.anatomy(model)
    return [(layer, head) for layer in range(len(parts.layers)) for head in range(parts.n_head)]


# ---------------------------------------------------------------------------- attention


def test_attention_is_causal_and_rows_sum_to_1(model: Any) -> None:
    weights = inside.read(model, IDS).attention_LHTT
    parts, T = inside.anatomy(model), len(IDS)
    assert weights.shape == (len(parts.layers), parts.n_head, T, T) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert not weights.triu(1).any() and weights.min() >= 0


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_the_attention_that_the_model_used(name: str) -> None:
    """The weights, times the values, give the output of each attention layer."""
    model = random_model(CONFIGS[name]).eval()
    calls: list[tuple[Any, Any]] = []
    layers = inside.anatomy(model).layers
    handles = [layer.attention.register_forward_hook(lambda module, args, y: calls.append((args, y)))
               for layer in layers]
    weights = inside.read(model, IDS).attention_LHTT
    for handle in handles:
        handle.remove()
    assert len(calls) == len(layers) == model.config.n_layer
    with torch.inference_mode():
        for layer, (args, y), weights_HTT in zip(layers, calls, weights, strict=True):
            rope = args[1:3] if model.config.model in LLAMA else ()
            v_BTKD = layer.attention.project(args[0], *rope)[2]
            group = model.config.n_head // v_BTKD.shape[2]
            heads = [weights_HTT[h] @ v_BTKD[0, :, h // group] for h in range(model.config.n_head)]
            out = layer.projection(torch.cat(heads, dim=-1))
            torch.testing.assert_close(out, y[0], rtol=1e-5, atol=1e-5)


def test_attention_of_rungs_gives_the_output_of_the_head() -> None:
    model = random_model(CONFIGS["one-head"]).eval()
    reading = inside.read(model, IDS)
    with torch.inference_mode():
        out = reading.attention_LHTT[0, 0] @ model.sa_head.value(reading.stream_STC[0])
    torch.testing.assert_close(out, reading.stream_STC[1])


@pytest.mark.parametrize("name", ["gpt2", "grouped qwen3"])
def test_half_precision(name: str) -> None:
    """Weights and probabilities are computed in float32 all the same."""
    model = random_model(CONFIGS[name]).bfloat16()
    reading = inside.read(model, IDS, [(0, 1)])
    assert reading.attention_LHTT.dtype == reading.logits_TV.dtype == torch.float32
    torch.testing.assert_close(reading.attention_LHTT.sum(-1), torch.ones(2, 4, len(IDS)))
    assert [guess.token for guess in inside.lens(model, reading, 2)] == reading.logits_TV.argmax(-1).tolist()
    assert inside.Greedy(model, IDS, [(0, 1)]).write(1) == [int(reading.logits_TV[-1].argmax())]


# ---------------------------------------------------------------------------- predictions


def test_the_last_row_of_the_lens_is_the_prediction(model: Any) -> None:
    reading = inside.read(model, IDS)
    logits_TV = own_logits(model, IDS)
    assert torch.equal(reading.logits_TV, logits_TV)
    p_TV = F.softmax(logits_TV, dim=-1)
    last = inside.lens(model, reading, len(reading.steps) - 1)
    assert [guess.token for guess in last] == p_TV.argmax(-1).tolist()
    assert [guess.probability for guess in last] == pytest.approx(p_TV.max(-1).values.tolist(), rel=1e-5)
    assert [guess.following for guess in last[:-1]] == pytest.approx(
        [float(p_TV[t, IDS[t + 1]]) for t in range(len(IDS) - 1)], rel=1e-5)
    assert last[-1].following is None


def test_the_first_row_of_the_lens_reads_the_embedding() -> None:
    model = random_model(CONFIGS["grouped qwen3"]).eval()
    reading = inside.read(model, IDS)
    with torch.inference_mode():
        x_TC = model.model.norm(model.model.embed_tokens(torch.tensor(IDS)))
        p_TV = F.softmax(x_TC @ model.head.T, dim=-1)
    first = inside.lens(model, reading, 0)
    assert reading.steps == ["embedding", "block 1", "block 2"]
    assert [guess.token for guess in first] == p_TV.argmax(-1).tolist()


def test_losses_are_cross_entropies(model: Any) -> None:
    expected = F.cross_entropy(own_logits(model, IDS)[:-1], torch.tensor(IDS[1:]), reduction="none")
    assert inside.losses(inside.read(model, IDS)) == pytest.approx(expected.tolist(), rel=1e-5)
    assert inside.loss_in_windows(model, IDS) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_long_texts_are_scored_in_windows() -> None:
    """For every rung: each token but the first is predicted once."""
    for name in RUNGS:
        model = random_model(replace(RUNG, model=name, block_size=8))
        expected = [F.cross_entropy(own_logits(model, IDS[start : start + 8]), torch.tensor(IDS[start + 1 : start + 9]),
                                    reduction="none") for start in (0,)]
        rest = F.cross_entropy(own_logits(model, IDS[8:14]), torch.tensor(IDS[9:15]), reduction="none")
        assert inside.loss_in_windows(model, IDS) == pytest.approx(float(torch.cat([*expected, rest]).mean()), rel=1e-5)
        assert inside.loss_in_windows(model, IDS[:1]) is None


def test_the_continuation_is_the_greedy_one(model: Any) -> None:
    """Past the context window too."""
    expected = generate(model, [IDS], 40, temperature=0)[0]
    greedy = inside.Greedy(model, IDS)
    assert greedy.write(7) + greedy.write(33) == expected
    assert len(set(expected)) > 1 or not (model.config.tie_embeddings or model.config.model in RUNGS)


# ---------------------------------------------------------------------------- neighbors


def test_neighbors_are_nearest_by_cosine(model: Any) -> None:
    weight = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding)).weight.detach()
    cosines = F.cosine_similarity(weight, weight[5][None])[:20]
    order = [int(i) for i in cosines.argsort(descending=True) if i != 5]
    found = inside.neighbors(model, 5, 4, vocab_size=20)
    assert [each.token for each in found] == order[:4]
    assert [each.similarity for each in found] == pytest.approx(cosines[order[:4]].tolist(), rel=1e-4, abs=1e-5)
    assert len(inside.neighbors(model, 5, 100)) == 28


# ---------------------------------------------------------------------------- heads switched off


def test_no_head_off_changes_nothing(model: Any) -> None:
    plain, same = inside.read(model, IDS), inside.read(model, IDS, [])
    assert torch.equal(plain.logits_TV, same.logits_TV) and torch.equal(plain.attention_LHTT, same.attention_LHTT)
    with inside.switched_off(model, ()):
        assert not hooks(model)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("one-head", "multi-head", "feed-forward")])
def test_all_heads_off_equal_a_projection_of_zeros(name: str) -> None:
    model, without = random_model(CONFIGS[name]), random_model(CONFIGS[name])
    with torch.no_grad():
        for layer in inside.anatomy(without).layers:
            assert layer.projection is not None
            layer.projection.weight.zero_()
    off = every_head(model)
    reading, expected = inside.read(model, IDS, off), inside.read(without, IDS)
    torch.testing.assert_close(reading.logits_TV, expected.logits_TV)
    torch.testing.assert_close(reading.attention_LHTT, expected.attention_LHTT)
    assert inside.Greedy(model, IDS, off).write(30) == inside.Greedy(without, IDS).write(30)
    assert not torch.allclose(reading.logits_TV, inside.read(model, IDS).logits_TV)


@pytest.mark.parametrize("name", ["gpt2", "grouped qwen3", "llama", "smollm3", "residual", "qk-norm"])
def test_one_head_off_equals_zeros_in_the_projection(name: str) -> None:
    model, without = random_model(CONFIGS[name]), random_model(CONFIGS[name])
    projection = inside.anatomy(without).layers[1].projection
    assert projection is not None
    width = projection.weight.shape[1] // 4
    with torch.no_grad():
        projection.weight[:, 2 * width : 3 * width] = 0
    reading = inside.read(model, IDS, {(1, 2)})
    torch.testing.assert_close(reading.logits_TV, inside.read(without, IDS).logits_TV)
    rows = [inside.lens(each, seen, 2) for each, seen in ((model, reading), (without, inside.read(without, IDS)))]
    assert [guess.token for guess in rows[0]] == [guess.token for guess in rows[1]]


@pytest.mark.parametrize("name", ["one-head", "multi-head", "feed-forward"])
def test_heads_without_a_projection_are_switched_off(name: str) -> None:
    model = random_model(CONFIGS[name])
    stream = inside.read(model, IDS, every_head(model)).stream_STC
    assert not stream[1].any() and stream[0].any()
    if name != "one-head":
        one = inside.read(model, IDS, [(0, 1)]).stream_STC[1]
        whole = inside.read(model, IDS).stream_STC[1]
        assert not one[:, 8:16].any()
        assert torch.equal(one[:, :8], whole[:, :8]) and torch.equal(one[:, 16:], whole[:, 16:])


def test_hooks_are_removed_after_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        assert hooks(model)
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "hidden" if hasattr(model, "hidden") else "logits", fail)
    for work in (lambda: inside.read(model, IDS, [(0, 0)]), lambda: inside.Greedy(model, IDS, [(0, 0)]).write(1)):
        with pytest.raises(RuntimeError, match="broken"):
            work()
        assert not hooks(model) and model.training


# ---------------------------------------------------------------------------- refusals


def test_texts_and_heads_are_checked(model: Any) -> None:
    for ids in ([], [0] * 25):
        with pytest.raises(BardletError, match="1 to 24 tokens"):
            inside.read(model, ids)
    for head in ((5, 0), (0, 9), (-1, 0), (0, -1)):
        with pytest.raises(BardletError, match="there is no head"):
            inside.read(model, IDS, [(0, 0), head])


def test_other_models_are_refused() -> None:
    for name in ("bigram", "averaging"):
        with pytest.raises(Unsupported, match="no attention heads"):
            inside.read(random_model(replace(RUNG, model=name)), IDS)
    encdec = models.build(replace(SMALL, model="encdec", n_encoder_layer=1, activation="relu"))
    with pytest.raises(Unsupported, match="encdec: only gpt2, Llama-like models"):
        inside.anatomy(encdec)
    with pytest.raises(Unsupported, match="encdec"):
        inside.neighbors(encdec, 1)
    with pytest.raises(Unsupported, match="reward model"):
        inside.anatomy(models.build(replace(SMALL, scores=True)))


def test_damaged_weights_are_an_error() -> None:
    model = random_model(SMALL)
    with torch.no_grad():
        model.transformer.wte.weight[3] = float("nan")
    for work in (lambda: inside.read(model, IDS), lambda: inside.Greedy(model, IDS).write(1),
                 lambda: inside.neighbors(model, 3), lambda: inside.loss_in_windows(model, IDS)):
        with pytest.raises(BardletError, match="not finite"):
            work()
