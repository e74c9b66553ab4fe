"""A GGUF file: the same weights, and a byte-level BPE that gives the ids of every tokenizer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import foreign_tokenizers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bardlet import models
from bardlet import tokenizer as tk
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.export import gguf
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
    added = tk.train_bpe([ALPHABET] * 9, 300)
    added.inner.add_tokens(["bards"])
    with pytest.raises(BardletError, match="has the added token 'bards'"):
        gguf.write(tmp_path / "n.gguf", model, tk.Tokenizer(added.inner.to_str()), "m")
    with pytest.raises(BardletError, match="this tokenizer lowercases"):
        gguf.write(tmp_path / "n.gguf", model, tk.train_bpe([ALPHABET] * 9, 300, lowercase=True), "m")


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
