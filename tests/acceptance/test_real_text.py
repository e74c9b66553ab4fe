"""Real text other than English prose: Chinese poems, French novels, names, the World Factbook; two minutes each."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not os.environ.get("BARDLET_DATA"), reason="needs BARDLET_DATA with real text")


def is_chinese_poem(text: str) -> bool:
    """Return True for lines of mostly Han characters with Chinese punctuation."""
    signs = [c for c in text if not c.isspace()]
    han = sum("CJK" in unicodedata.name(c, "") for c in signs)
    return han > 0.6 * len(signs) and "\n" in text and any(c in text for c in "，。")


def is_french(text: str) -> bool:
    """Return True for text with common French words and accents."""
    words = set(re.findall(r"[a-zà-ÿ]+", text.lower()))
    return len(words & {"de", "la", "le", "et", "les", "que", "un", "une", "il", "à", "des"}) >= 5 and "é" in text


def is_names(text: str) -> bool:
    """Return True for short capitalized words, one per line."""
    names = [line for line in text.split("\n") if line]
    return sum(bool(re.fullmatch(r"[A-Z][a-z'-]{1,14}", name)) for name in names) > 0.8 * len(names)


def is_factbook(text: str) -> bool:
    """Return True for text with `field: value` lines and numbers."""
    return bool(re.search(r"^[\w -]+: ", text, re.MULTILINE)) and bool(re.search(r"\d", text))


KINDS = {"chinese-poetry": is_chinese_poem, "eltec-fra": is_french, "names": is_names, "factbook": is_factbook}


@pytest.mark.parametrize("name", KINDS)
def test_samples_look_like_the_text(name: str, tmp_path: Path, bardlet: Callable[..., dict[str, Any]],
                                    record_property: Callable[[str, object], None]) -> None:
    """After two minutes, the loss is far below the unigram loss, and samples look like the text."""
    from bardlet.data import corpus, shards

    run = tmp_path / "run"
    bardlet("train", name, "--out", run, "--minutes", "2")
    measured = bardlet("eval", run)
    dataset = shards.tokenize_corpus(corpus.find([name]))
    counts = Counter(dataset.train[:2_000_000].tolist())
    total, vocabulary = sum(counts.values()), dataset.tokenizer.vocab_size
    unigram = -sum(math.log((counts[t] + 1) / (total + vocabulary)) for t in dataset.val.tolist()) / len(dataset.val)
    sample = bardlet("sample", run, "--tokens", "300", "--seed", "0", "--num", "4")["completions"]
    print(f"\n{name}: {measured['nats_per_char']:.4f} nats/char, {measured['bits_per_byte']:.4f} bits/byte, "
          f"{measured['loss']:.3f} nats/token, unigram {unigram:.3f}\n{sample[0]}")
    assert measured["loss"] < unigram - 0.3
    assert KINDS[name]("\n".join(sample)), sample
