"""Tokenizers of open models: the ids of transformers, exact pieces of long texts, whole characters as they stream."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import foreign_tokenizers as foreign
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bardlet import tokenizer as tk
from bardlet.data import named
from bardlet.errors import BardletError
from bardlet.inference.text_generation import prompt_ids

KINDS = list(foreign.BUILDERS)
SENTENCEPIECE = ["llama2", "mistral", "always"]
FRAGMENT_TEXTS = st.lists(st.sampled_from([*foreign.FRAGMENTS, "<0x41>"])).map("".join)
TEXTS = st.text() | FRAGMENT_TEXTS


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the two files of each tokenizer."""
    return {name: foreign.write(tmp_path_factory.mktemp(name), name) for name in KINDS}


@pytest.fixture(scope="session")
def ours(folders: dict[str, Path]) -> dict[str, tk.Tokenizer]:
    return {name: tk.load(folder) for name, folder in folders.items()}


@functools.cache
def theirs(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"),
                                                split_special_tokens=True)


@pytest.mark.parametrize("name", KINDS)
def test_the_ids_are_those_of_transformers(name: str, folders: dict[str, Path], ours: dict[str, tk.Tokenizer]) -> None:
    """Without special tokens, and as a prompt with those that transformers adds by default."""
    tokenizer, peer = ours[name], theirs(folders[name])

    @settings(max_examples=30)
    @given(TEXTS)
    def check(text: str) -> None:
        ids = tokenizer.encode(text).tolist()
        assert ids == peer(text, add_special_tokens=False)["input_ids"]
        if text:
            assert prompt_ids(tokenizer, text) == peer(text)["input_ids"]

    check()
    assert len(tokenizer.prefix_ids) == (name not in ("smollm2", "qwen2"))


@pytest.mark.parametrize("name", KINDS)
def test_decoding_gives_the_text_back(name: str, folders: dict[str, Path], ours: dict[str, tk.Tokenizer]) -> None:
    """The same text as from transformers. A SentencePiece tokenizer writes its own mark for a space as a space; and one
    that puts a space before each text that has none, removes it again."""
    tokenizer, peer = ours[name], theirs(folders[name])

    @settings(max_examples=30)
    @given(TEXTS)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        decoded = tokenizer.decode(ids)
        assert decoded == peer.decode(ids)
        expected = text
        if name in SENTENCEPIECE:
            expected = text.replace(foreign.SPACE, " ")
        if name in ("mistral", "always"):
            expected = expected.removeprefix(" ")
        if name == "qwen2":
            expected = tokenizer.inner.normalizer.normalize_str(text)
        assert decoded == expected

    check()


@pytest.mark.parametrize("name", KINDS)
def test_pieces_of_a_long_text_have_the_ids_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch,
                                                         ours: dict[str, tk.Tokenizer]) -> None:
    tokenizer = ours[name]
    monkeypatch.setattr(tk.base.exact_pieces, "__defaults__", (1,))
    monkeypatch.setattr(tk.base, "PIECE", 1)
    monkeypatch.setattr(tk.base, "BATCH", 2)
    counts = []

    @settings(max_examples=25)
    @example(f"the{foreign.SPACE}   Who{foreign.SPACE} the   the day  <think> day ", 9)
    @example("the day ", 3)
    @example("".join(f"{a}{foreign.SPACE} {b}" for a in "the1€" for b in "summer's day, 1609 Zé漢"), 9)
    @given(st.lists(st.sampled_from(foreign.FRAGMENTS), min_size=20, max_size=60).map("".join), st.integers(1, 9))
    def check(text: str, block: int) -> None:
        parts = list(tokenizer.encode_blocks(text[i : i + block] for i in range(0, len(text), block)))
        counts.append(len(parts))
        whole = tokenizer.inner.encode(text, add_special_tokens=False).ids
        assert [i for part in parts for i in part.tolist()] == whole

    check()
    assert max(counts) > 2


@pytest.mark.parametrize("name", KINDS)
def test_real_text_has_the_ids_of_the_whole(name: str, ours: dict[str, tk.Tokenizer]) -> None:
    for corpus, file in (("tinyshakespeare", "input.txt"), ("chinese-poetry", "song300.jsonl")):
        folder = named.folder_with(corpus, [file])
        if folder is None:
            pytest.skip(f"$BARDLET_DATA/{corpus}/{file} is not on this machine")
        text = (folder / file).read_text(encoding="utf-8")[: 5 * tk.PIECE // 2]
        ids = ours[name].encode(text)
        assert ours[name].decode(ids) == text
        assert ids.tolist() == ours[name].inner.encode(text, add_special_tokens=False).ids


def test_a_text_is_not_cut_where_a_merge_could_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is one with a rule for words that nothing is known about, or with tokens that read the spaces around."""
    inner = foreign.sentencepiece(crossing=True)
    crossing = tk.Tokenizer(inner.to_str())
    assert any(f"e{foreign.SPACE}" in token for token in crossing.vocab) and crossing._cuts is None
    monkeypatch.setattr(tk.base.exact_pieces, "__defaults__", (3,))
    text = foreign.PROSE
    assert crossing.encode(text).tolist() == inner.encode(text, add_special_tokens=False).ids
    rules = json.loads(foreign.raw("llama3").to_str())
    rules["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\S+\s+\S+|\s"}
    assert tk.Tokenizer(json.dumps(rules))._cuts is None
    rules = json.loads(foreign.raw("qwen2").to_str())
    rules["added_tokens"][-1]["lstrip"] = True
    assert tk.Tokenizer(json.dumps(rules))._cuts is None


@pytest.mark.parametrize("name", KINDS)
def test_a_stream_shows_whole_characters(name: str, ours: dict[str, tk.Tokenizer]) -> None:
    """For any ids, its parts joined are the decoded text, and no part of a text has a character cut in two."""
    tokenizer = ours[name]

    def parts_of(ids: list[int], skip: bool) -> list[str]:
        stream = tk.StreamDecoder(tokenizer, skip)
        return [*(stream.feed(i) for i in ids), stream.finish()]

    @settings(max_examples=30)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1)), st.booleans())
    def any_ids(ids: list[int], skip: bool) -> None:
        assert "".join(parts_of(ids, skip)) == tokenizer.decode(ids, skip)

    @settings(max_examples=30)
    @given(TEXTS.filter(lambda text: "\ufffd" not in text))
    def any_text(text: str) -> None:
        parts = parts_of(tokenizer.encode(text).tolist(), False)
        assert "\ufffd" not in "".join(parts) and parts[-1] == ""

    any_ids()
    any_text()


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_character_in_bytes_appears_once_it_is_whole(name: str, ours: dict[str, tk.Tokenizer]) -> None:
    tokenizer = ours[name]
    ids = [tokenizer.vocab[f"<0x{byte:02X}>"] for byte in "€".encode()]
    stream = tk.StreamDecoder(tokenizer, skip_special=True)
    words = [tokenizer.vocab[token] for token in (f"{foreign.SPACE}the", "<s>", f"{foreign.SPACE}the")]
    assert [stream.feed(i) for i in [*words, *ids]] == ["the", "", " the", "", "", "€"]
    assert tokenizer.decode(words, True, continues=True) == " the the" and tokenizer.decode(words, True) == "the the"
    assert [tokenizer.bytes_of(i) for i in ids] == [b"\xe2", b"\x82", b"\xac"]
    assert tokenizer.bytes_of(words[0]) == b" the"


def test_a_decoder_that_does_not_join_bytes_is_the_librarys() -> None:
    """As of WordPiece or T5: a token has no bytes of its own."""
    inner = foreign.Tokenizer.from_str(foreign.raw("mistral").to_str())
    inner.decoder = foreign.decoders.Metaspace()
    tokenizer = tk.Tokenizer(inner.to_str())
    text = "the Who, the day  123"
    ids = tokenizer.encode(text).tolist()
    stream = tk.StreamDecoder(tokenizer)
    assert "".join([*map(stream.feed, ids), stream.finish()]) == tokenizer.decode(ids) == inner.decode(ids) == text
    assert not tokenizer.has_bytes and tokenizer.measure(tokenizer.encode(text)) == (len(text), len(text))


@pytest.mark.parametrize("name", KINDS)
def test_characters_and_bytes_are_those_of_the_text(name: str, monkeypatch: pytest.MonkeyPatch,
                                                    ours: dict[str, tk.Tokenizer]) -> None:
    tokenizer = ours[name]
    monkeypatch.setattr(tk.base, "PIECE", 3)
    monkeypatch.setattr(tk.base, "BATCH", 1)

    @settings(max_examples=30)
    @given(TEXTS)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        decoded = tokenizer.decode(ids)
        assert tokenizer.measure(ids) == (len(decoded), len(decoded.encode()))

    check()


# ---------------------------------------------------------------- special tokens


def test_all_ids_that_end_a_text_are_read(tmp_path: Path) -> None:
    """From generation_config.json, or config.json without it; ids that the tokenizer does not have are left out."""
    folder = foreign.write(tmp_path, "llama3")
    assert tk.load(folder).stop_ids == (2,)
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    assert tk.load(folder).stop_ids == (2, 1)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3, 2, 128009, -1, "x", true]}')
    assert tk.load(folder).stop_ids == (2, 1, 3)


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_a_saved_tokenizer_keeps_its_special_tokens(name: str, tmp_path: Path) -> None:
    """transformers adds the same tokens before and after; like it, we ignore `add_bos_token`."""
    first = foreign.load(tmp_path / "a", name, add_bos_token=False)
    first.save(tmp_path / "b")
    second = tk.load(tmp_path / "b")
    grown = first.with_tokens(["<|new|>"])
    for tokenizer in (second, grown):
        assert (tokenizer.bos, tokenizer.eos, tokenizer.unk) == ("<s>", "</s>", "<unk>")
        assert tokenizer.prefix_ids == [1]
    for folder in ("a", "b"):
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert peer("day")["input_ids"] == [1, *first.encode("day").tolist()]
        assert (peer.bos_token, peer.eos_token, peer.unk_token) == ("<s>", "</s>", "<unk>")


def test_a_tokenizer_without_a_first_token_keeps_none(tmp_path: Path) -> None:
    tokenizer = foreign.load(tmp_path / "a", "qwen2")
    tokenizer.save(tmp_path / "b")
    assert tokenizer.bos is None and tk.load(tmp_path / "b").bos is None
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b").bos_token is None


def test_a_text_never_becomes_a_special_token(ours: dict[str, tk.Tokenizer]) -> None:
    for tokenizer in ours.values():
        text = "".join(tokenizer.special.values())
        assert not set(tokenizer.encode(text).tolist()) & set(tokenizer.special)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_surrogate_pair_is_named(ours: dict[str, tk.Tokenizer]) -> None:
    for tokenizer in ours.values():
        with pytest.raises(BardletError, match=r"U\+D800\) at line 2, column 2"):
            tokenizer.encode("a day\nb\ud800")
