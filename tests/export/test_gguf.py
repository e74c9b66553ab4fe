"""A GGUF file: the same weights, and a byte-level BPE that gives the ids of every tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import foreign_tokenizers
import gguf_models
import numpy as np
import pytest
import torch
from foreign_tokenizers import raw, with_added
from hypothesis import given
from hypothesis import strategies as st
from models.test_llama import LLAMA_3, VARIANTS, random_model, write_folder
from tokenizers import AddedToken

from bardlet import models
from bardlet import tokenizer as tk
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.export import export, gguf
from bardlet.tokenizer.pipeline import BYTE_OF_CHAR

reader = pytest.importorskip("gguf")
ALPHABET = "abc \n'ïé詩人Пе😀~"
TOKENIZERS = {"char": tk.train_char(ALPHABET, True), "byte": tk.train_byte(False),
              "bpe": tk.train_bpe([ALPHABET] * 9, 300)}
SHAPE = {"block_size": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "head_dim": 8, "n_inner": 64}


def encode_as_ggml(text: str, tokens: list[str], merges: list[str]) -> list[int]:
    """Encode one word as llama.cpp does: merge the pair of the lowest rank, until there is none; then look up."""
    of_byte = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    ranks, ids = {tuple(merge.split(" ")): n for n, merge in enumerate(merges)}, {t: n for n, t in enumerate(tokens)}
    symbols = [of_byte[byte] for byte in text.encode()]
    while pairs := [(ranks[pair], n) for n, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        _, at = min(pairs)
        symbols[at:at + 2] = [symbols[at] + symbols[at + 1]]
    return [ids[part] for symbol in symbols for part in ([symbol] if symbol in ids else symbol) if part in ids]


@pytest.mark.parametrize("kind", ["char", "byte"])
@given(text=st.text(alphabet=ALPHABET, max_size=30))
def test_merges_rebuild_characters_and_bytes(kind: str, text: str) -> None:
    tokens, merges = gguf.byte_level(TOKENIZERS[kind])
    assert encode_as_ggml(text, tokens, merges) == TOKENIZERS[kind].encode(text).tolist()


def test_a_character_outside_the_alphabet_has_no_id() -> None:
    tokens, merges = gguf.byte_level(TOKENIZERS["char"])
    assert encode_as_ggml("a詫b", tokens, merges) == TOKENIZERS["char"].encode("ab").tolist()


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", gguf.DTYPES)
def test_the_file_has_the_weights(family: str, dtype: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["bpe"]
    torch.manual_seed(0)
    changes = {"activation": "silu"} if family == "qwen3" else {"n_kv_head": 4}
    model = models.build(ModelConfig(family, tokenizer.vocab_size, **{**SHAPE, **changes}))
    gguf.write(tmp_path / "m.gguf", model, tokenizer, "a model", dtype)
    file = reader.GGUFReader(tmp_path / "m.gguf")
    stored = {tensor.name: tensor for tensor in file.tensors}
    for name, weights in gguf.tensors(model):
        values = reader.quants.dequantize(stored[name].data, stored[name].tensor_type).reshape(weights.shape)
        bound = {"f32": 0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 1 / 127}[dtype] * weights.abs().max().item()
        assert np.abs(values - weights.numpy()).max() <= (bound if weights.ndim == 2 else 0), name
    assert len(stored) == len(list(gguf.tensors(model)))
    assert file.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert file.fields["tokenizer.ggml.tokens"].contents() == gguf.byte_level(tokenizer)[0]
    assert file.fields[f"{family}.context_length"].contents() == 32


def test_names_and_texts_are_data(tmp_path: Path) -> None:
    model = models.build(ModelConfig("gpt2", TOKENIZERS["char"].vocab_size, **{**SHAPE, "n_kv_head": 4}))
    gguf.write(tmp_path / "m.gguf", model, TOKENIZERS["char"], "</script>\0\u202e")
    assert reader.GGUFReader(tmp_path / "m.gguf").fields["general.name"].contents() == "</script>\0\u202e"


@pytest.mark.parametrize(("changes", "dtype", "message"), [
    ({"n_inner": 48}, "q8_0", "n_inner 48 cannot be divided by 32; use --dtype f16"),
    ({"activation": "relu"}, "f32", "computes gpt2 with gelu_new, not relu"),
    ({"scores": True}, "f32", "does not run bardlet's reward models")])
def test_what_a_file_cannot_hold_is_one_sentence(changes: dict[str, object], dtype: str, message: str,
                                                 tmp_path: Path) -> None:
    shape = {**SHAPE, "n_kv_head": 4, **changes}
    model = models.build(ModelConfig("gpt2", TOKENIZERS["bpe"].vocab_size, **shape))  # type: ignore[arg-type]
    with pytest.raises(BardletError, match=message):
        gguf.write(tmp_path / "m.gguf", model, TOKENIZERS["bpe"], "m", dtype)
    assert not list(tmp_path.iterdir())


def test_a_number_or_a_rule_that_a_file_cannot_hold_is_one_sentence(tmp_path: Path) -> None:
    shape = {**SHAPE, "n_kv_head": 4}
    model = models.build(ModelConfig("gpt2", 300, **shape))  # type: ignore[arg-type]
    with torch.no_grad():
        next(model.parameters())[0, 0] = 1e5
    with pytest.raises(BardletError, match="and f16 ends at 65504; use --dtype bf16 or f32"):
        gguf.write(tmp_path / "m.gguf", model, TOKENIZERS["bpe"], "m", "f16")
    gguf.write(tmp_path / "m.gguf", model, TOKENIZERS["bpe"], "m", "bf16")
    with pytest.raises(BardletError, match="this tokenizer lowercases"):
        gguf.write(tmp_path / "n.gguf", model, tk.train_bpe([ALPHABET] * 9, 300, lowercase=True), "m")


# ---------------------------------------------------------------- models from elsewhere

READABLE = [name for name in VARIANTS if not name.startswith("smollm3") and name != "qwen3, biases"]
"""Variants of which transformers reads a GGUF file, too."""


@pytest.mark.parametrize("variant", READABLE)
@torch.no_grad()
def test_transformers_computes_the_same_from_the_file(variant: str, tmp_path: Path) -> None:
    """Names, the order of rotated channels, biases, norms and the entries on the shape."""
    ours = random_model(VARIANTS[variant])
    config = ours.config
    gguf.write(tmp_path / "m.gguf", ours, tk.train_char("ab", True), "m")
    changes: dict[str, Any] = {"llama": {"attention_bias": config.attention_bias},
                               "qwen3": {"head_dim": config.head_dim}}.get(config.model, {})
    if config.rope_scaling is not None:  # a file has no entry for it, but the factors of the frequencies
        changes["rope_parameters"] = ours.to_hf(config)["rope_parameters"]
    theirs = gguf_models.read_back(tmp_path / "m.gguf", **changes)
    assert theirs.config.model_type == (config.model if config.model != "mistral" else "llama")
    idx = torch.randint(config.vocab_size, (2, 50))
    torch.testing.assert_close(theirs(idx).logits, ours(idx), rtol=1e-5, atol=1e-5)


def test_scaled_positions_are_the_factors_of_transformers(tmp_path: Path) -> None:
    """llama.cpp divides its own frequencies by them."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours = random_model(VARIANTS["llama, scaled positions"])
    gguf.write(tmp_path / "m.gguf", ours, tk.train_char("ab", True), "m")
    file = reader.GGUFReader(tmp_path / "m.gguf")
    [factors] = [torch.from_numpy(tensor.data.copy()) for tensor in file.tensors if tensor.name == "rope_freqs.weight"]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**ours.to_hf(ours.config)), "cpu")
    theta, size = file.fields["llama.rope.freq_base"].contents(), file.fields["llama.rope.dimension_count"].contents()
    plain = 1 / theta ** (torch.arange(0, size, 2) / size)
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-6, atol=0)
    assert len({round(float(factor), 4) for factor in factors}) > 1 and float(factors.max()) == pytest.approx(8.0)


@pytest.mark.parametrize(("variant", "changes", "message"), [
    ("qwen2, tied", {"rope_scaling": LLAMA_3}, "does not scale the positions of qwen2 .'rope_scaling'."),
    ("qwen3, theta, eps", {"rope_scaling": LLAMA_3}, "does not scale the positions of qwen3"),
    ("smollm3, every second layer without positions", {"rope_scaling": LLAMA_3, "layers_without_positions": ()},
     "does not scale the positions of smollm3"),
    ("smollm3, every second layer without positions", {}, "only if every fourth layer has no positions"),
    ("smollm3, every second layer without positions", {"attention_bias": True, "layers_without_positions": ()},
     "has no bias for the attention output of smollm3 .'attention_bias'."),
    ("qwen3, biases", {}, "has no bias for the attention output of qwen3"),
    ("qwen2, tied", {"head_dim": 6}, "only if n_head x head_dim is n_embd, and they are 24 and 32"),
])
def test_a_variant_that_llama_cpp_does_not_run_is_named(variant: str, changes: dict[str, Any], message: str,
                                                        tmp_path: Path) -> None:
    config = replace(VARIANTS[variant], **changes)
    with pytest.raises(BardletError, match=f"^--to gguf: llama.cpp .*{message}.*; use --to hf$"):
        gguf.write(tmp_path / "m.gguf", random_model(config), tk.train_char("ab", True), "m")
    assert not list(tmp_path.iterdir())


def with_rules(inner: Any, **changes: Any) -> tk.Tokenizer:
    """Return a tokenizer of the library with other entries in its tokenizer.json; `model`: in that of its model."""
    pipeline = json.loads(inner.to_str())
    pipeline["model"] |= changes.pop("model", {})
    return tk.Tokenizer(json.dumps(pipeline | changes))


FLAGS = ("lstrip", "rstrip", "single_word")


def test_added_tokens_are_those_that_llama_cpp_finds_in_a_text(tmp_path: Path) -> None:
    """The tokens of Qwen2.5 and Qwen3 that are not special, as <tool_call>, are user-defined; others are control."""
    tokenizer = with_added("qwen2", AddedToken("<tool_call>", normalized=False), AddedToken("bards", normalized=True))
    config = replace(VARIANTS["qwen2, tied"], vocab_size=tokenizer.vocab_size)
    gguf.write(tmp_path / "m.gguf", random_model(config), tokenizer, "m")
    fields = reader.GGUFReader(tmp_path / "m.gguf").fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    user = [token for token, kind in zip(tokens, kinds, strict=True) if kind == reader.TokenType.USER_DEFINED]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == reader.TokenType.CONTROL]
    assert user == ["<think>", "</think>", "<tool_call>", "bards"] and set(control) == set(tokenizer.special.values())
    assert kinds.count(reader.TokenType.NORMAL) == len(tokens) - len(user) - len(control)
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"


@pytest.mark.parametrize(("tokenizer", "message"), [
    *((lambda flag=flag: with_added("qwen2", AddedToken("<x>", **{flag: True})), f"added token '<x>', with '{flag}'")
      for flag in FLAGS),
    (lambda: with_added("qwen2", AddedToken("e\u0301", normalized=True)), "which its normalizer changes .NFC."),
    (lambda: with_added("smollm2", AddedToken("ab"), AddedToken("bcd")), "token 'ab', whose end begins another one"),
    (lambda: with_rules(tk.train_char("ab", False).inner, added_tokens=[{
        "id": 2, "content": "c", "special": False, "normalized": False, **dict.fromkeys(FLAGS, False)}]),
     "'c', and in a GGUF file a tokenizer of characters has none"),
    (lambda: with_rules(raw("smollm2"), normalizer={"type": "NFKC"}), "changes what it reads .'NFKC"),
    (lambda: with_rules(raw("llama3"), normalizer={
        "type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}), "changes what .*'Lowercase'"),
    (lambda: with_rules(raw("llama3"), model={"ignore_merges": False}),
     "llama.cpp looks up whole words before it merges, and this tokenizer does not"),
    (lambda: with_rules(raw("qwen2"), model={"ignore_merges": True}),
     "llama.cpp does not look up whole words before it merges, and this tokenizer does .'ignore_merges'."),
    (lambda: with_rules(tk.train_bpe([ALPHABET] * 9, 300).inner, model={"ignore_merges": True}), "does not look up"),
    (lambda: with_rules(raw("smollm2"), model={"dropout": 0.1}), "this tokenizer has a 'dropout'"),
])
def test_a_tokenizer_that_a_file_cannot_say_is_named(tokenizer: Callable[[], tk.Tokenizer], message: str,
                                                     tmp_path: Path) -> None:
    made = tokenizer()
    config = replace(VARIANTS["llama, untied"], vocab_size=made.vocab_size)
    with pytest.raises(BardletError, match=f"^--to gguf: .*{message}.*; use --to hf$"):
        gguf.write(tmp_path / "m.gguf", random_model(config), made, "m")
    assert not list(tmp_path.iterdir())


def test_added_tokens_of_white_space_and_as_they_are_normalized_are_no_obstacle() -> None:
    config = replace(VARIANTS["llama, untied"], vocab_size=1000)
    spaces = [AddedToken(" " * n, normalized=False) for n in range(2, 9)]
    gguf.check(config, with_added("smollm2", *spaces), "f32")
    gguf.check(config, with_added("qwen2", AddedToken("e\u0301", normalized=False), AddedToken("\u00e9a")), "f32")


@pytest.mark.parametrize(("name", "warns"), [("qwen2", True), ("smollm2", False)])
def test_a_tokenizer_that_composes_accents_is_exported_with_a_warning(
        name: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = foreign_tokenizers.load(tmp_path, name)
    model = random_model(replace(VARIANTS["qwen2, tied"], vocab_size=tokenizer.vocab_size))
    write_folder(model, tmp_path)
    with caplog.at_level(logging.WARNING, "bardlet"):
        export.export(tmp_path, "gguf", tmp_path / "m.gguf")
    assert ("composes accents" in caplog.text) is warns


# ---------------------------------------------------------------- Ollama, and the beginning of a text


def test_a_modelfile_stops_where_the_model_does() -> None:
    tokenizer = tk.train_bpe([ALPHABET] * 9, 300)
    plain = gguf.modelfile("m.gguf", tokenizer, 256)
    assert plain.startswith('FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\n') and "num_ctx 256" in plain
    assert plain.count("PARAMETER stop") == 1 and 'stop "<|endoftext|>"' in plain
    assert "repeat_penalty 1\n" in plain and "top_p 1\n" in plain, "Ollama has penalties of its own"
    assert '{{ .Prompt }}<|endoftext|>"""' in gguf.modelfile("m.gguf", tokenizer, 256, translates=True)
    tokenizer.chat_template = chat_template.TEMPLATE
    chat = gguf.modelfile("m.gguf", tokenizer, 256)
    assert "<|{{ .Role }}|>{{ .Content }}<|end|>" in chat and 'stop "<|end|>"' in chat and '"<|pad|>"' not in chat
    tokenizer.chat_template = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    assert "TEMPLATE" not in gguf.modelfile("m.gguf", tokenizer, 256), "of another template, Ollama knows some itself"


def test_a_stop_is_written_as_it_is() -> None:
    tokenizer = tk.train_bpe([ALPHABET] * 9, 300).with_tokens(["<｜end▁of｜>"])
    tokenizer.chat_template = ("{% for m in messages %}<|user|>{{ m['content'] }}<｜end▁of｜>{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    assert 'PARAMETER stop "<｜end▁of｜>"' in gguf.modelfile("m.gguf", tokenizer, 256)


def test_a_prompt_starts_a_document_where_the_model_learned_it(tmp_path: Path) -> None:
    tokenizer = tk.train_char("ab", True)
    model = models.build(ModelConfig("gpt2", 3, **{**SHAPE, "n_kv_head": 4}))
    for starts in (True, False):
        path = tmp_path / f"{starts}.gguf"
        gguf.write(path, model, tokenizer, "m", starts_documents=starts)
        fields = reader.GGUFReader(path).fields
        assert fields["tokenizer.ggml.add_bos_token"].contents() is starts
        assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.eos_id


@pytest.mark.parametrize(("name", "first", "bos"), [("llama3", True, 0), ("smollm2", False, 1)])
def test_a_foreign_tokenizer_begins_a_prompt_as_elsewhere(name: str, first: bool, bos: int, tmp_path: Path) -> None:
    tokenizer = foreign_tokenizers.load(tmp_path, name)
    config = ModelConfig("llama", tokenizer.vocab_size, **SHAPE, activation="silu", norm_eps=1e-5)
    gguf.write(tmp_path / "m.gguf", models.build(config), tokenizer, "m")
    fields = reader.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is first
    assert fields["tokenizer.ggml.bos_token_id"].contents() == bos
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2


def test_rows_without_a_token_have_names_of_their_own(tmp_path: Path) -> None:
    """llama.cpp wants different ones."""
    tokenizer = tk.train_bpe([ALPHABET] * 9, 300).with_tokens(["<|x|>"])
    model = models.build(ModelConfig("gpt2", 310, **{**SHAPE, "n_kv_head": 4}))
    gguf.write(tmp_path / "m.gguf", model, tokenizer, "m")
    tokens = reader.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == 310
