"""Texts of any size: the documents of a corpus in blocks, two openings of each file, and memory that does not grow."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bardlet import tokenizer as tk
from bardlet.data import blocks, corpus, duplicates, shards, statistics, store
from bardlet.errors import BardletError

WORDS = ["Full", "many", "a", "glorious", "mörning", "have", "I", "seen", ",", "1609", "漢字", "\U0001f980", "isn't\n"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path / "cache"))


def prose(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=count))


# ------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("sizes", [[5000], [900, 1, 0, 4000], [30] * 19, [30] * 20 + [0], [2000, *[7] * 60]])
@pytest.mark.parametrize("block", [64, 1000, 1 << 20])
def test_the_blocks_of_a_split_are_its_documents(tmp_path, monkeypatch, sizes, block):
    monkeypatch.setattr(store, "BLOCK", block)
    monkeypatch.setattr(store, "IN_MEMORY", 100)
    texts = [prose(size, seed) for seed, size in enumerate(sizes)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = corpus.find([str(path)])
    texts = [text for text in texts if text]
    if len(texts) < 20:
        expected = {"train": [t[: int(0.9 * len(t))] for t in texts], "val": [t[int(0.9 * len(t)):] for t in texts]}
    else:
        expected = {"val": texts[9::10], "train": [t for i, t in enumerate(texts) if i % 10 != 9]}
    for part, documents in {**expected, "all": texts}.items():
        assert list(found.documents(part)) == [text for text in documents if text]
    assert found.needs_separator == (len([t for t in expected["train"] if t]) > 1) and found.count == len(texts)
    assert found.store.alphabet == "".join(sorted(set("".join(texts))))
    lines = [number for number, size in enumerate(sizes, 1) if size]
    assert [found.location(i) for i in range(len(texts))] == [f"{path}, line {number}" for number in lines]


def test_two_readers_do_not_disturb_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 50)
    (tmp_path / "a.txt").write_text(prose(2000), encoding="utf-8")
    text = corpus.find([str(tmp_path / "a.txt")])
    pairs = list(zip(text.store.blocks("all"), text.store.blocks("all"), strict=True))
    assert all(a == b for a, b in pairs) and "".join(block for (_, block), _ in pairs) == prose(2000)


@pytest.mark.parametrize("content", ["\n" * 40_000, " \t\r\n\u3000\n", "\n\n<|endoftext|>\n \n<|endoftext|>"])
def test_blank_lines_only_are_no_text(tmp_path, content):
    path = tmp_path / "blank.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BardletError, match=r"blank\.txt: has no text, only white space; name a file that has some"):
        shards.tokenize_corpus(corpus.find([str(path)]))


# ---------------------------------------------------------------------------- tokens of a text in blocks

LONG = {
    "prose": prose(12_000),
    "white space": "".join(random.Random(1).choices(["  ", "\n\n", "\t", " a", "the  end", "\u3000", "\xa0x"],
                                                    k=12_000)),
    "digits and marks": "".join(random.Random(2).choices(["12", "3,4", "...", "(x)", "'s ", "don't"], k=12_000)),
    "accents and emoji": "".join(random.Random(3).choices(["é", "e\u0301", "\U0001f469\u200d\U0001f680", "ß "],
                                                          k=16_000)),
    "no spaces": "".join(random.Random(4).choices("春眠不覺曉處處聞啼鳥，。", k=40_000)),
    "one line": "".join(random.Random(5).choices("abcde-", k=1000)) * 10_000,
}


@pytest.fixture(scope="module")
def bpe() -> tk.Tokenizer:
    sample = [text[:30_000] for text in LONG.values()]
    return tk.train_bpe(sample, 600)


@pytest.mark.parametrize("name", [name for name in LONG if name != "one line"])
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_random_blocks_have_the_ids_of_the_whole_text(bpe, kind, name):
    text, rng = LONG[name], random.Random(name)
    tokenizer = {"char": tk.train_char(text, False), "byte": tk.train_byte(False), "bpe": bpe}[kind]
    whole = tokenizer.encode(text)
    assert tokenizer.decode(whole) == text
    if kind != "byte":  # the library encodes the whole text at once; its bytes are slow
        assert tokenizer.inner.encode(text, add_special_tokens=False).ids == whole.tolist()
    for most in (10, 5_000, 100_000):
        cuts = [0]
        while cuts[-1] < len(text):
            cuts.append(cuts[-1] + rng.randint(1, most if most > 10 else 2000 if len(cuts) > 200 else 10))
        pieces = (text[a:b] for a, b in itertools.pairwise(cuts))
        assert np.array_equal(np.concatenate(list(tokenizer.encode_blocks(pieces))), whole)


def test_a_line_of_ten_million_characters_has_the_same_pieces():
    text, rng = LONG["one line"], random.Random(0)
    cuts = sorted({0, len(text), *(rng.randrange(len(text)) for _ in range(30))})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    assert list(tk.pieces(pieces)) == [text[i:i + 32 * tk.PIECE] for i in range(0, len(text), 32 * tk.PIECE)]


@pytest.mark.parametrize("cut", [1, 4, 9, 12])
def test_an_unknown_character_is_located_across_blocks(cut):
    tokenizer, text = tk.train_char("ab\n", False), "ab\nabab\naxb"
    with pytest.raises(BardletError, match=r'"x" \(U\+0078\) at line 3, column 2'):
        list(tokenizer.encode_blocks([text[:cut], text[cut:]]))


# ------------------------------------------------------------------------------------ size and openings


@pytest.fixture
def openings() -> Iterator[Counter[str]]:
    """Count the openings of each file, from now on."""
    found: Counter[str] = Counter()
    active = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if active and event == "open" and isinstance(arguments[0], str | Path):
            found[str(arguments[0])] += 1

    sys.addaudithook(hook)
    yield found
    active = False


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "auto"])
@pytest.mark.parametrize("form", ["txt", "gz", "list", "jsonl", "folder"])
def test_each_file_is_opened_twice_and_once_for_cached_tokens(tmp_path, openings, kind, form):
    folder = tmp_path / "texts"
    folder.mkdir()
    if form == "folder":
        for number in range(25):
            (folder / f"{number}.txt").write_text(prose(50, number), encoding="utf-8")
    elif form == "gz":
        (folder / "a.txt.gz").write_bytes(gzip.compress(prose(5000).encode()))
    elif form == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": prose(60, i)}) + "\n" for i in range(30)))
    else:
        lines = [f"name{random.Random(i).random()}" for i in range(900)]
        (folder / "a.txt").write_text("\n".join(lines) if form == "list" else prose(5000), encoding="utf-8")
    arguments = [str(folder)] if form == "folder" else [str(path) for path in folder.iterdir()]
    openings.clear()
    text = corpus.find(arguments)
    first = shards.tokenize_corpus(text, kind)
    statistics.measure_corpus(text)
    cold = [count for path, count in openings.items() if path.startswith(str(folder))]
    assert len(cold) == len(list(folder.iterdir())) and set(cold) == {2}
    openings.clear()
    assert shards.tokenize_corpus(corpus.find(arguments), kind).folder == first.folder
    assert {count for path, count in openings.items() if path.startswith(str(folder))} == {1}


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch, kind):
    for module, name in ((store, "BLOCK"), (blocks, "BLOCK"), (tk.base, "BATCH")):
        monkeypatch.setattr(module, name, 2 if name == "BATCH" else 1 << 16)
    monkeypatch.setattr(store, "IN_MEMORY", 1 << 16)
    monkeypatch.setattr(duplicates, "CHUNK", 1 << 14)
    monkeypatch.setattr(statistics, "SAMPLE", 1 << 14)
    peaks = []
    for copies in (1, 4):
        path = tmp_path / f"{copies}.txt"
        path.write_text(prose(30_000) * copies + "\U0001f980", encoding="utf-8")
        text = corpus.find([str(path)])
        tracemalloc.start()
        shards.tokenize_corpus(text, kind)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_500_000, peaks


def test_a_file_that_expands_too_much_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("bardlet.data.text.FREE_BYTES", 1 << 20)
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"all work and no play " * 300_000))
    with pytest.raises(BardletError, match=r"bomb\.txt\.gz: holds more than 250 times its size"):
        shards.tokenize_corpus(corpus.find([str(path)]))


# ------------------------------------------------------------------------------ training sample, development split


def test_a_short_text_trains_bpe_whole():
    text = prose(30_000)
    assert "".join(tk.spread_sample(lambda: [[text[:999], text[999:]], ["end"]], len(text) + 3)) == text + "end"


@pytest.mark.parametrize("limit", ["SAMPLE", "DISTINCT"])
def test_a_long_text_trains_bpe_on_parts_from_everywhere(monkeypatch, limit):
    from bardlet.tokenizer import training

    texts = [f"{chr(0x4E00 + i)}{j} " * 1000 for i in range(20) for j in range(20)]
    characters = sum(map(len, texts))
    monkeypatch.setattr(training, limit, characters // 8 if limit == "SAMPLE" else 400)
    sample = list(tk.spread_sample(lambda: [[text] for text in texts], characters))
    where = [texts.index(part) for part in sample]
    assert 0.05 < len(sample) / len(texts) < 0.3 and max(np.diff(where)) < 40 and where[-1] > 360
    assert sample == list(tk.spread_sample(lambda: [[text[:7], text[7:]] for text in texts], characters))


@pytest.mark.parametrize("texts", [["the cat sat on the mat "] * 900, ["été à Zoë\n"] * 2_000, ["漢字 ab"] * 6_000])
@pytest.mark.parametrize("several", [False, True])
def test_the_development_split_does_not_train_bpe(tmp_path, texts, several):
    strange = "qvqw" * 40  # in the last tenth of the training split
    before, after = (0.88, 0.06) if several else (0.83, 0.11)
    documents = [*texts[: int(before * len(texts))], *[strange] * 4, *texts[: int(after * len(texts))]]
    path = tmp_path / ("a.jsonl" if several else "a.txt")
    path.write_text("\n".join(json.dumps({"text": t}) for t in documents) if several else "".join(documents),
                    encoding="utf-8")
    found = corpus.find([str(path)])
    plain, dev = (shards.tokenize_corpus(found, "bpe", 320, val_part=part) for part in ("val", "dev"))
    assert any("qv" in token for token in plain.tokenizer.vocab)
    assert not any("qv" in token for token in dev.tokenizer.vocab)
    assert plain.dev_start is None and dev.dev_start is not None and dev.folder != plain.folder
    train = "".join(found.documents("train"))
    kept = dev.tokenizer.decode(dev.train[: dev.dev_start].tolist(), skip_special=True)
    fewer = dev.tokenizer.decode(dev.train[: dev.dev_start - 1].tolist(), skip_special=True)
    assert len(fewer.rstrip("\ufffd")) < int(0.9 * len(train)) <= len(kept)
    assert shards.tokenize_corpus(found, "char", val_part="dev").dev_start is None


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_held_out_tokens_are_measured_in_parts(monkeypatch, bpe, kind):
    text = prose(3000)
    tokenizer = {"char": tk.train_char(text, True), "byte": tk.train_byte(True), "bpe": bpe}[kind]
    ids = tokenizer.encode(text)
    monkeypatch.setattr(tk.base, "PIECE", 13)
    for start in (0, 1, 2, 3, 50):
        rest = tokenizer.decode(ids[start:].tolist(), skip_special=True)
        assert tokenizer.measure(ids[start:]) == (len(rest), len(rest.encode()))
