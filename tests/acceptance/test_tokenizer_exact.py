"""10,000 texts per kind of tokenizer round-trip exactly, with the ids of transformers (rows 2 and 6 of the issue)."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet import tokenizer as tk
from bardlet.data import corpus, shards

DATA = os.environ.get("BARDLET_DATA")
pytestmark = pytest.mark.skipif(not (DATA and Path(DATA).is_dir()), reason="BARDLET_DATA is not a folder")
TEN_THOUSAND = settings(max_examples=10_000)

# a real vocabulary of each kind, as `auto` or a user would choose it
TOKENIZERS = {
    "char": ("tinyshakespeare", "char", None),
    "byte": ("tinyshakespeare", "byte", None),
    "bpe": ("tinyshakespeare", "bpe", 1024),
    "bpe of names": ("names", "bpe", 512),
    "bpe of French": ("eltec-fra", "bpe", 8192),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory) -> tk.Tokenizer:
    name, kind, vocab_size = TOKENIZERS[request.param]
    cache = tmp_path_factory.mktemp("cache")
    return shards.tokenize_corpus(corpus.find([name]), kind, vocab_size, cache=cache).tokenizer


def test_ten_thousand_texts_round_trip(tokenizer):
    @TEN_THOUSAND
    @given(st.text(tokenizer.alphabet) if tokenizer.alphabet else st.text())
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = tk.StreamDecoder(tokenizer)
        assert "".join([stream.feed(i) for i in ids] + [stream.finish()]) == text
        assert ids.tolist() == tokenizer.inner.encode(text, add_special_tokens=False).ids

    check()


def test_transformers_agrees_on_random_and_real_text(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    points = [ord(c) for c in tokenizer.alphabet or ""] or [*range(0xD800), *range(0xE000, 0x110000)]
    texts = ["".join(map(chr, rng.choices(points, k=rng.randrange(200)))) for _ in range(1000)]
    real = next(corpus.find(["tinyshakespeare"]).documents())
    texts += [real[i : i + 5000] for i in range(0, len(real), 5000)]
    if tokenizer.kind != "char":
        poems = list(corpus.find(["chinese-poetry"]).documents("val"))
        texts += poems[:1000] + list(corpus.find(["eltec-fra"]).documents("val"))
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
