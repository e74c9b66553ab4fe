"""The lecture's rungs: their output, causality, and parity with gpt2 and qwen3."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bardlet import tokenizer
from bardlet.config.model import RUNGS, ModelConfig
from bardlet.config.pretraining import TrainConfig
from bardlet.errors import BardletError
from bardlet.inference import generate
from bardlet.models import FAMILIES, build, load_class
from bardlet.models.lecture import (
    BigramModel,
    DropoutAttention,
    Head,
    ProjectedAttention,
    average_by_loop,
    average_by_matrix,
    average_by_softmax,
)
from bardlet.run import hf

V, BLOCK = 23, 12
SETTINGS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": BLOCK}


def random_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """Return a rung in eval mode with weights large enough that every token matters."""
    torch.manual_seed(seed)
    model = build(TrainConfig(model=name, **{**SETTINGS, **changes}).model_config(V)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


# ---------------------------------------------------------------------------- output of the rungs


def test_a_bigram_looks_up_the_row_of_the_current_token() -> None:
    model = random_model("bigram")
    idx = torch.tensor([[3, 1, 3], [0, 6, 2]])
    assert torch.equal(model(idx), model.token_embedding_table.weight[idx])


def test_a_bigram_learns_the_counts_of_its_text() -> None:
    """The best table holds the log-frequencies of the pairs; gradient descent must reach it."""
    torch.manual_seed(0)
    text = torch.tensor([0, 1, 2, 0, 1, 1, 2, 0, 2, 2, 0, 1, 2])
    model = BigramModel(ModelConfig("bigram", vocab_size=3, block_size=16))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(400):
        loss = torch.nn.functional.cross_entropy(model(text[None, :-1])[0], text[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    counts = torch.zeros(3, 3)
    for a, b in itertools.pairwise(text):
        counts[a, b] += 1
    learned = model.token_embedding_table.weight.softmax(-1)
    torch.testing.assert_close(learned, counts / counts.sum(-1, keepdim=True), rtol=0, atol=0.01)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_the_three_averages_agree(B: int, T: int, C: int, seed: int) -> None:
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed))
    loop = average_by_loop(x)
    assert torch.allclose(average_by_matrix(x), loop, rtol=0, atol=1e-6)
    assert torch.allclose(average_by_softmax(x), loop, rtol=0, atol=1e-6)
    assert torch.equal(loop[:, 0], x[:, 0])


def test_a_head_with_zero_queries_averages() -> None:
    """Averaging is attention with equal scores, the lecture's step from rung 2 to rung 3."""
    head = Head(random_model("one-head").config, head_size=32)
    torch.nn.init.zeros_(head.query.weight)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(head(x), average_by_loop(head.value(x)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["one-head", "layer-norm", "dropout", "rotary", "qk-norm"])
def test_attention_weights_are_distributions_over_the_past(name: str) -> None:
    model = random_model(name)
    weights: list[Tensor] = []
    for module in model.modules():
        if hasattr(module, "weights"):
            module.register_forward_pre_hook(lambda module, args: weights.append(module.weights(args[0])))
    model(torch.randint(V, (2, BLOCK)))
    assert weights
    for weight in weights:
        torch.testing.assert_close(weight.sum(-1), torch.ones(weight.shape[:-1]), rtol=0, atol=1e-5)
        assert not weight.triu(1).any() and (weight.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_separate_heads_match_all_heads_in_one_tensor() -> None:
    """The lecture's first exercise."""
    config = random_model("layer-norm").config
    separate, batched = ProjectedAttention(config), DropoutAttention(config).eval()
    with torch.no_grad():
        for kind in ("key", "query", "value"):
            rows = torch.cat([getattr(head, kind).weight for head in separate.heads])  # H times (D, C) -> (C, C)
            getattr(batched, kind).weight.copy_(rows)
        batched.proj.load_state_dict(separate.proj.state_dict())
        x = torch.randn(3, BLOCK, 32)
        torch.testing.assert_close(batched(x), separate(x), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------- properties of all rungs


@pytest.mark.parametrize("name", RUNGS)
@torch.no_grad()
def test_no_rung_looks_ahead(name: str) -> None:
    model = random_model(name)
    for t in range(BLOCK):
        idx = torch.randint(V, (2, BLOCK))
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % V
        before, after = model(idx), model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t], after[:, t])


@pytest.mark.parametrize("name", RUNGS)
@torch.no_grad()
def test_from_rung_2_on_the_past_matters(name: str) -> None:
    model = random_model(name)
    idx = torch.randint(V, (1, BLOCK))
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    assert torch.allclose(model(idx)[:, -1], model(changed)[:, -1]) == (name == "bigram")


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_survives_saving_and_loading(name: str, tmp_path: Any) -> None:
    model, chars = random_model(name, dropout=0.25), tokenizer.train_char("abcdefghijklmnopqrstuvw", separator=False)
    hf.write_folder(tmp_path, model, chars)
    hf.write_weights(tmp_path, model.hf_state_dict())
    loaded, _ = hf.read_folder(tmp_path, dropout=model.config.dropout)
    assert loaded.config == model.config and type(loaded) is type(model)
    idx = torch.randint(V, (2, BLOCK))
    assert torch.equal(loaded(idx), model(idx))
    with pytest.raises(BardletError, match="no tensor"):
        loaded.load_hf_state_dict({})


@pytest.mark.parametrize("change, message", [
    ({"n_head": 5}, "n_embd 32 is not divisible by n_head 5"),
    ({"n_layer": None}, "no 'n_layer'"),
    ({"block_size": "x"}, "'block_size' is 'x'"),
])  # fmt: skip
def test_an_impossible_config_is_refused(change: dict[str, Any], message: str) -> None:
    config = load_class("layer-norm").to_hf(random_model("layer-norm").config) | change
    with pytest.raises(BardletError, match=message):
        load_class("layer-norm").from_hf(config)


@pytest.mark.parametrize("name", RUNGS)
def test_generation_reads_the_last_window_as_the_lecture_does(name: str) -> None:
    model = random_model(name)
    prompts = [[1, 2, 3], list(range(BLOCK + 5))]
    completions = generate.generate(model, prompts, 2 * BLOCK, temperature=0)
    with torch.no_grad():
        for prompt, new in zip(prompts, completions, strict=True):
            ids = list(prompt)
            for _ in range(2 * BLOCK):
                ids.append(int(model(torch.tensor([ids[-BLOCK:]]))[0, -1].argmax()))
            assert ids[len(prompt):] == new


def test_a_row_does_not_depend_on_other_rows_of_the_batch() -> None:
    model, prompts = random_model("layer-norm"), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = generate.generate(model, prompts, 30, seed=[1, 2, 3], stop_ids=[3])
    alone = [generate.generate(model, [p], 30, seed=[s], stop_ids=[3])[0]
             for p, s in zip(prompts, (1, 2, 3), strict=True)]
    assert together == alone and min(map(len, together)) < 30


# ---------------------------------------------------------------------------- parity with the families


def test_rung_8_matches_gpt2() -> None:
    rung = random_model("dropout")
    gpt2 = build(replace(rung.config, model="gpt2")).eval()
    weights = {"transformer.wte.weight": "token_embedding_table.weight",
               "transformer.wpe.weight": "position_embedding_table.weight",
               "transformer.ln_f.weight": "ln_f.weight", "transformer.ln_f.bias": "ln_f.bias",
               "lm_head.weight": "lm_head.weight"}
    parts = {"ln_1": "ln1", "ln_2": "ln2", "attn.c_proj": "sa.proj", "mlp.c_fc": "ffwd.net.0",
             "mlp.c_proj": "ffwd.net.2"}
    state = rung.state_dict()
    new = {theirs: state.pop(ours) for theirs, ours in weights.items()}
    for n in range(2):
        for theirs, ours in parts.items():
            for kind in ("weight", "bias"):
                new[f"transformer.h.{n}.{theirs}.{kind}"] = state.pop(f"blocks.{n}.{ours}.{kind}")
        qkv = [state.pop(f"blocks.{n}.sa.{kind}.weight") for kind in ("query", "key", "value")]
        new[f"transformer.h.{n}.attn.c_attn.weight"] = torch.cat(qkv)
        new[f"transformer.h.{n}.attn.c_attn.bias"] = torch.zeros(3 * 32)  # the lecture's heads have no bias
    assert not state, "every weight of the rung has a counterpart in gpt2"
    gpt2.load_state_dict(new)
    _assert_equal(rung, gpt2)


def test_rung_11_matches_qwen3() -> None:
    rung = random_model("qk-norm")
    qwen3 = build(replace(rung.config, model="qwen3")).eval()
    parts = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2", "self_attn.q_proj": "sa.query",
             "self_attn.k_proj": "sa.key", "self_attn.v_proj": "sa.value", "self_attn.o_proj": "sa.proj",
             "self_attn.q_norm": "sa.query_norm", "self_attn.k_norm": "sa.key_norm", "mlp.gate_proj": "ffwd.gate",
             "mlp.up_proj": "ffwd.up", "mlp.down_proj": "ffwd.down"}
    state = rung.state_dict()
    new = {"model.embed_tokens.weight": state.pop("token_embedding_table.weight"),
           "model.norm.weight": state.pop("ln_f.weight"), "lm_head.weight": state.pop("lm_head.weight")}
    for n in range(2):
        for theirs, ours in parts.items():
            new[f"model.layers.{n}.{theirs}.weight"] = state.pop(f"blocks.{n}.{ours}.weight")
    assert not state, "every weight of the rung has a counterpart in qwen3"
    qwen3.load_state_dict(new)
    _assert_equal(rung, qwen3)


def _assert_equal(rung: Any, family: Any) -> None:
    """Check that logits and the gradient of the token embedding agree."""
    idx = torch.randint(V, (3, BLOCK))
    mine, theirs = rung(idx), family(idx)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    mine.square().mean().backward()
    theirs.square().mean().backward()
    ours, other = next(rung.parameters()).grad, next(family.parameters()).grad
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------- lookup by name


def test_families_are_built_by_name() -> None:
    for name in FAMILIES:
        model = build(ModelConfig(name, vocab_size=7, block_size=4, n_layer=1, n_head=2, n_kv_head=2, n_embd=8,
                                  head_dim=4, n_inner=16))  # fmt: skip
        idx = torch.zeros(1, 4, dtype=torch.int64)
        logits = model(idx, idx) if name == "encdec" else model(idx)
        assert type(model) is load_class(name) and logits.shape == (1, 4, 7)
    with pytest.raises(BardletError, match=r"unknown model 'gpt5'; choose one of bigram, .*gpt2, qwen3, .*encdec"):
        load_class("gpt5")


@pytest.mark.parametrize("name, parameters", [
    ("bigram", 4225), ("averaging", 4481), ("one-head", 7553), ("multi-head", 7553), ("feed-forward", 8609),
    ("residual", 41921), ("layer-norm", 42369),
])  # fmt: skip
def test_rungs_have_the_sizes_of_the_lecture(name: str, parameters: int) -> None:
    """The parameter counts for 65 characters, context 8, 32 channels, 4 heads and 3 blocks, worked out by hand.

    one-head: 65x32 + 8x32 + 3x32x32 + 32x65 + 65; feed-forward adds 32x32 + 32; a block of rung 6 has 3x32x32,
    a projection of 32x32 + 32, 32x128 + 128 and 128x32 + 32; rung 7 adds seven LayerNorms of 64.
    """
    config = TrainConfig(model=name, n_layer=3, n_head=4, n_embd=32, block_size=8).model_config(65)  # type: ignore[arg-type]
    assert sum(p.numel() for p in build(config).parameters()) == parameters
