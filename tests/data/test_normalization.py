"""Unicode normalization in blocks, mixed accents, and `--normalize nfc` from the text to the prompt."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet import tokenizer as tk
from bardlet.data import corpus, normalization, shards
from bardlet.tokenizer import load

TEXTS = {
    "french": "Les élèves où ça, naïve cœur. ",
    "vietnamese": "Tiếng Việt có thanh điệu, đường phố. ",
    "korean": "대한민국 사람들은 한국어를 말한다. ",
    "mixed": "e\u0301 ạ̈ q\u0307\u0323 ガ パ \u1100\u1161\u11a8 Ω K é ",
}


@settings(max_examples=200, deadline=None)
@given(st.text("aeq \u0301\u0323\u0308é\u1100\u1161\u11a8가\u3099か漢\u0915\u093c\U0001f980", max_size=40),
       st.integers(0, 99))
def test_blocks_have_the_form_of_the_whole_text(text, seed):
    cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=6))
    blocks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(normalization.nfc(blocks)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("name", TEXTS)
def test_blocks_of_real_languages(name):
    text = unicodedata.normalize("NFD", TEXTS[name] * 200)
    blocks = [text[i:i + 7] for i in range(0, len(text), 7)]
    normal = list(normalization.nfc(blocks))
    assert "".join(normal) == unicodedata.normalize("NFC", text) and max(map(len, normal)) < 100


def notices_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    list(corpus.find([str(path)]).documents())
    return [record.getMessage() for record in caplog.records if "accents" in record.getMessage()]


@pytest.mark.parametrize(("text", "count"), [
    ("é e\u0301 a\u0300\n", 2), (TEXTS["french"] + unicodedata.normalize("NFD", TEXTS["french"]), 5),
    ("x" * 2_000_000 + "é" + "e\u0301", 1)])
def test_mixed_accents_are_counted(tmp_path, caplog, text, count):
    [line] = notices_of(tmp_path, caplog, text)
    assert f"accents in two ways: {count} stand apart" in line and line.endswith("--normalize nfc")


@pytest.mark.parametrize("text", [
    TEXTS["french"], unicodedata.normalize("NFD", TEXTS["french"]), "m\u0303 é q\u0307", "plain", TEXTS["korean"]])
def test_one_way_of_writing_accents_is_no_notice(tmp_path, caplog, text):
    assert notices_of(tmp_path, caplog, text) == []


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("name", ["french", "vietnamese", "korean"])
def test_a_normalized_text_gives_the_tokens_of_its_nfc_form(tmp_path, kind, name):
    text = TEXTS[name] * 60
    folder = tmp_path / "cache"
    for form in ("NFC", "NFD"):
        (tmp_path / f"{form}.txt").write_text(unicodedata.normalize(form, text), encoding="utf-8")
    composed, decomposed = (
        shards.tokenize_corpus(corpus.find([str(tmp_path / f"{form}.txt")], normalize="nfc"), kind, cache=folder)
        for form in ("NFC", "NFD"))
    assert composed.train.tolist() == decomposed.train.tolist() and composed.val.tolist() == decomposed.val.tolist()
    assert composed.train_chars == decomposed.train_chars
    plain = shards.tokenize_corpus(corpus.find([str(tmp_path / "NFC.txt")]), kind, cache=folder)
    assert plain.folder != composed.folder and plain.train.tolist() == composed.train.tolist()
    prompt = unicodedata.normalize("NFD", TEXTS[name])
    tokenizer = load(composed.folder)
    assert tokenizer.kind == kind and tokenizer.nfc and not plain.tokenizer.nfc
    assert tokenizer.encode(prompt).tolist() == plain.tokenizer.encode(unicodedata.normalize("NFC", prompt)).tolist()
    assert tokenizer.inner.encode(prompt, add_special_tokens=False).ids == tokenizer.encode(prompt).tolist()


def test_nfc_is_added_to_a_tokenizer_once_and_never_to_a_foreign_one():
    char = tk.train_char("abé", separator=True)
    normal = char.with_nfc()
    assert normal.with_nfc() is normal and normal.vocab == char.vocab and normal.with_tokens(["<|x|>"]).nfc
    assert normal.drop_unseen("e\u0301z") == ("é", 1)
    data = json.loads(char.json)
    data["normalizer"] = {"type": "NFKC"}
    foreign = tk.Tokenizer(json.dumps(data))
    assert foreign.kind == "other" and foreign.with_nfc() is foreign and not foreign.nfc
