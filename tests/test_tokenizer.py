"""Tokenizers: exact round trips, the same ids as the library and transformers, clear errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet import tokenizer as tk
from bardlet.errors import BardletError

PROSE = (
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate:\n"
    "Rough winds do shake the darling buds of May, and summer's lease hath all too short a date. 1609, 14.\n"
    "清明时节雨纷纷，路上行人欲断魂。借问酒家何处有？牧童遥指杏花村。\nŒuvre naïve, déjà vu… \U0001f980\n\n"
) * 4
ALPHABET = "".join(sorted(set(PROSE)))
BPE = tk.train_bpe([PROSE], 400)
BYTE = tk.train_byte(separator=True)
CHAR = tk.train_char(ALPHABET, separator=False)
KINDS = {"bpe": BPE, "byte": BYTE, "char": CHAR}

THOUSAND = settings(max_examples=1000)
HUNDRED = settings(max_examples=100)
# fragments whose order decides where GPT-2's rule splits; random text rarely combines them
FRAGMENTS = [*" \n\t'.,!1aéZ明。\x1c\xa0\u3000", "'s", "'ll", " the", "   "]
FRAGMENT_TEXTS = st.lists(st.sampled_from(FRAGMENTS)).map("".join)
# a vocabulary with merges across all fragments that the rule keeps together, so that a wrong cut changes the ids
FRAGMENT_BPE = tk.train_bpe(["".join(random.Random(seed).choices(FRAGMENTS, k=400)) for seed in range(200)], 1500)


def texts(kind: str) -> st.SearchStrategy[str]:
    return st.text(ALPHABET) if kind == "char" else st.text() | FRAGMENT_TEXTS


# ----------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("kind", KINDS)
def test_decode_inverts_encode(kind):
    @THOUSAND
    @given(texts(kind))
    def check(text):
        ids = KINDS[kind].encode(text)
        assert ids.dtype == np.int64 and KINDS[kind].decode(ids) == text

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_match_the_library(kind):
    """The tables for characters and bytes, and the split into pieces for BPE, do not change the ids."""

    @THOUSAND
    @given(texts(kind))
    def check(text):
        tokenizer = KINDS[kind]
        assert tokenizer.encode(text).tolist() == tokenizer.inner.encode(text, add_special_tokens=False).ids

    check()


@THOUSAND
@given(texts("bpe"), st.integers(1, 12))
def test_pieces_join_to_the_text_and_keep_its_tokens(text, size):
    pieces = list(tk.pieces(text, size))
    assert "".join(pieces) == text and all(pieces)
    assert max(map(len, pieces), default=0) <= 32 * size
    if text and max(map(len, text.replace("\n", " ").split(" "))) < size:  # every cut can be at a word start
        ids = [i for piece in pieces for i in FRAGMENT_BPE.inner.encode(piece, add_special_tokens=False).ids]
        assert ids == FRAGMENT_BPE.inner.encode(text, add_special_tokens=False).ids


def test_encoding_in_batches_gives_the_ids_of_the_whole_text(monkeypatch):
    text = PROSE * 20
    whole = BPE.inner.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(tk.base, "BATCH", 3)
    monkeypatch.setattr(tk.base, "PIECE", 100)
    monkeypatch.setattr(tk.pieces, "__defaults__", (100,))
    parts = list(BPE.encode_pieces(text))
    assert len(parts) > 10 and {p.dtype for p in parts} == {np.dtype("<u2")}
    assert np.concatenate(parts).tolist() == whole


def test_text_without_spaces_is_cut_and_decodes():
    text = "ab" * 40
    assert max(map(len, tk.pieces(text, 2))) == 64
    assert BPE.decode([i for p in tk.pieces(text, 2) for i in BPE.encode(p)]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer, rng = KINDS[kind], random.Random(5)
    tokenizer.save(tmp_path, model_max_length=512)
    # the model's config must not make transformers pick another tokenizer class
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "gpt2", "vocab_size": tokenizer.vocab_size, "bos_token_id": None, "eos_token_id": None}
        )
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ranges = [(32, 127), (9, 14), (0, 0x300), (0x4E00, 0x9FA6), (0x1F300, 0x1F650), (0x300, 0x370), (0xE000, 0x110000)]
    for _ in range(1000):
        if kind == "char":
            text = "".join(rng.choices(ALPHABET, k=rng.randrange(1, 40)))
        else:
            text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40)))
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text, repr(text)
    inputs = theirs("summer", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert theirs.padding_side == "right" and theirs.model_max_length == 512
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eos_id
    assert theirs.pad_token == tokenizer.padding is not None
    assert len(theirs) == tokenizer.vocab_size, "padding takes no token of its own"
    batch = theirs(["summer and more", "su"], padding=True)
    rows, seen = batch["input_ids"], batch["attention_mask"]
    assert len(rows[0]) == len(rows[1]) > sum(seen[1])
    assert [i for i, real in zip(rows[1], seen[1], strict=True) if real] == theirs("su")["input_ids"]
    assert theirs.decode(theirs("summer")["input_ids"], skip_special_tokens=True) == "summer"


def test_transformers_pads_on_the_right_with_pad(tmp_path):
    transformers = pytest.importorskip("transformers")
    BPE.save(tmp_path)
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path)(["summer", "a summer's day"], padding=True)
    short, long = batch["input_ids"]
    assert len(short) == len(long) and short[-1] == BPE.pad_id and BPE.pad_id not in long
    assert batch["attention_mask"][0][-1] == 0


# --------------------------------------------------------------------------------------- special tokens


def test_special_tokens_have_fixed_ids():
    assert [BPE.special[i] for i in range(6)] == list(tk.BPE_SPECIAL) and BPE.vocab_size == 400
    assert (BPE.eos_id, BPE.pad_id) == (0, 1)
    assert (BYTE.vocab_size, BYTE.eos_id, BYTE.pad_id) == (257, 256, None)
    assert (CHAR.vocab_size, CHAR.eos_id, CHAR.pad_id, CHAR.special) == (len(ALPHABET), None, None, {})
    assert tk.train_char("ba", separator=True).vocab == {"a": 0, "b": 1, tk.SEPARATOR: 2}


@pytest.mark.parametrize("tokenizer", [tk.train_char("ba", True), tk.train_char("ba", False), tk.train_byte(True), BPE])
def test_new_tokens_leave_the_ids_of_others(tokenizer):
    """Twice: with characters after special tokens, the library numbers anew what its model does not know."""
    characters = ("c", "d") if tokenizer.kind == "char" else ()
    grown = tokenizer.with_tokens(["<|new|>"], characters[:1]).with_tokens(["<|newer|>"], characters)
    old = sorted(tokenizer.vocab, key=tokenizer.vocab.get)
    expected = [*old, *characters[:1], "<|new|>", *characters[1:], "<|newer|>"]
    assert sorted(grown.vocab, key=grown.vocab.get) == expected and grown.vocab_size == len(expected)
    assert set(grown.special.values()) == {*tokenizer.special.values(), "<|new|>", "<|newer|>"}
    assert (grown.kind, grown.eos_id) == (tokenizer.kind, tokenizer.eos_id)
    if characters:
        assert grown.alphabet == "abcd" and grown.decode(grown.encode("dbca")) == "dbca"
    assert grown.inner.token_to_id("<|new|>") == json.loads(grown.json)["added_tokens"][-2]["id"]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_special_tokens_in_a_text_are_ordinary_text(kind):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode("a<|endoftext|>b<|user|>")
    assert not set(ids.tolist()) & set(tokenizer.special)
    assert tokenizer.decode(ids) == "a<|endoftext|>b<|user|>"


def test_decode_shows_or_skips_special_tokens():
    ids = [*BPE.encode("day"), BPE.eos_id]
    assert BPE.decode(ids) == "day<|endoftext|>" and BPE.decode(ids, skip_special=True) == "day"


# ------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_equals_decoding(kind):
    """For any ids, including those that split characters."""
    tokenizer = KINDS[kind]

    @HUNDRED
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1)), st.booleans())
    def check(ids, skip):
        stream = tk.StreamDecoder(tokenizer, skip_special=skip)
        text = "".join([stream.feed(i) for i in ids] + [stream.finish()])
        assert text == tokenizer.decode(ids, skip_special=skip)

    check()


@HUNDRED
@given(st.text())
def test_streaming_yields_whole_characters(text):
    stream = tk.StreamDecoder(BYTE)
    pieces = [stream.feed(i) for i in BYTE.encode(text)]
    assert [piece for piece in pieces if piece] == list(text) and stream.finish() == ""


def test_an_incomplete_last_character_is_replaced():
    stream = tk.StreamDecoder(BYTE)
    assert [stream.feed(i) for i in "é".encode()[:1]] == [""] and stream.finish() == "\ufffd"


# ------------------------------------------------------------------------------------ unseen characters


def test_an_unseen_character_is_named_with_its_position():
    with pytest.raises(BardletError, match=r'"Q" \(U\+0051\) at line 2, column 4 is not among the \d+ characters'):
        CHAR.encode("summer\nartQ")
    with pytest.raises(BardletError, match=r"a non-printable character \(U\+0000\) at line 1, column 1 "):
        CHAR.check("\0")
    CHAR.check("summer")


def test_unseen_characters_can_be_dropped_and_counted():
    assert CHAR.drop_unseen("sumQmer\0Q") == ("summer", 3)
    assert BYTE.drop_unseen("a\ud800b") == ("ab", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_raises(kind):
    with pytest.raises(BardletError, match=r"U\+D800\) at line 1, column 4"):
        KINDS[kind].encode("day\ud800")
    with pytest.raises(BardletError, match=r"U\+D800"):
        KINDS[kind].check("\ud800")


def test_an_unknown_id_raises():
    for invalid in (-1, BYTE.vocab_size):
        with pytest.raises(BardletError, match="not in the vocabulary"):
            BYTE.decode([invalid])


# -------------------------------------------------------------------------------------------- training


def test_training_is_deterministic_and_learns_merges():
    again = tk.train_bpe([PROSE], 400)
    assert again.json == BPE.json and again.hash == BPE.hash
    assert len(BPE.encode(PROSE)) < len(PROSE.encode()) / 2


def test_a_small_text_gives_a_smaller_vocabulary():
    assert tk.MIN_BPE_VOCAB <= tk.train_bpe(["abab"], 5000).vocab_size < 300


def test_a_vocabulary_too_small_for_the_bytes_raises():
    with pytest.raises(BardletError, match="at least 262"):
        tk.train_bpe([PROSE], 261)
    with pytest.raises(BardletError, match="no characters"):
        tk.train_char("", separator=False)


def test_training_reads_a_bounded_number_of_distinct_words(monkeypatch):
    consumed = []

    def endless():
        for number in range(10**6):
            consumed.append(number)
            yield f"word{number} and\n"

    monkeypatch.setattr(tk.training, "DISTINCT", 1000)
    tk.train_bpe(endless(), 300)
    assert 50 < len(consumed) < 1000


# --------------------------------------------------------------------------------------------- auto


@pytest.mark.parametrize(
    ("characters", "alphabet", "kind"),
    [
        (1_115_394, 65, "char"),
        (48_000, 55, "char"),
        (4_200_000, 63, "bpe"),
        (7_000_000, 9_589, "bpe"),
        (46_000, 2_900, "byte"),
        (1, 1, "char"),
    ],
)
def test_choose_kind(characters, alphabet, kind):
    chosen, vocab_size, reason = tk.choose_kind(characters, alphabet)
    assert chosen == kind and (vocab_size is not None) == (kind == "bpe")
    assert reason.startswith(f"{kind}: {alphabet:,} distinct character") and f"{characters:,}" not in reason[12:]


@HUNDRED
@given(st.integers(0, 10**10), st.integers(1, 150_000))
def test_the_suggested_vocabulary_is_a_power_of_two_in_range(characters, alphabet):
    size = tk.suggest_vocab_size(characters, alphabet)
    assert 512 <= size <= 32_768 and size & (size - 1) == 0


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_round_trip(kind, tmp_path):
    KINDS[kind].save(tmp_path / "new" / "folder")
    loaded = tk.load(tmp_path / "new" / "folder")
    assert (loaded.kind, loaded.hash, loaded.vocab) == (kind, KINDS[kind].hash, KINDS[kind].vocab)
    assert loaded.encode("summer").tolist() == KINDS[kind].encode("summer").tolist()
    assert loaded.alphabet == (ALPHABET if kind == "char" else None)


def test_a_foreign_tokenizer_is_used_unchanged(tmp_path):
    data = json.loads(BPE.json)
    data["normalizer"] = {"type": "NFKC"}  # NFC alone is `--normalize nfc`
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    other = tk.load(tmp_path)
    assert (other.kind, other.eos_id) == ("other", 5)
    ids = other.encode("de\u0301ja\u0300 vu")
    assert other.decode(ids) == "déjà vu"
    stream = tk.StreamDecoder(other)
    assert "".join([stream.feed(i) for i in ids] + [stream.finish()]) == "déjà vu"


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"model": {"type": "Word'])
def test_a_missing_or_damaged_file_is_a_one_line_error(content, tmp_path):
    path = Path(tmp_path) / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BardletError) as error:
        tk.load(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_names_a_token_for_what_is_unknown() -> None:
    """As GPT-2's does; CTranslate2 cannot load a gpt2 without it. The ids of texts are the same."""
    for tokenizer in (BPE, BYTE, tk.train_char("ab", separator=True)):
        assert tokenizer.hf_config()["unk_token"] == tokenizer.eos == "<|endoftext|>"
    for tokenizer in (CHAR, tk.train_byte(separator=False)):
        assert tokenizer.hf_config()["unk_token"] == tokenizer.padding
