"""The text of a choice, and its way from the inference thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import fake_engine
import foreign_tokenizers
import hypothesis.strategies as st
import pytest
from hypothesis import given
from small_server import BPE, BYTES, LETTERS

from bardlet import tokenizer as tokenization
from bardlet.server.choices import Choice, Inbox
from bardlet.server.text import LONGEST, Entry, Pieces, Writer, bytes_of, entries_of, name_of

Token = fake_engine.real.Token
SMALL = tokenization.train_bpe(["abcabcab ababab cabcab aabb é€"] * 20, 290)


def write(tokenizer: Any, ids: list[int], stops: list[str]) -> tuple[str, list[str], list[Entry], bool]:
    """Return (the whole text, its pieces, its tokens, True if a stop string ended it)."""
    writer, pieces, entries = Writer(tokenizer, (), stops), [], []
    for token in ids:
        text, new, stopped = writer.feed(Token(token, -1.0))
        pieces.append(text)
        entries += new
        if stopped:
            return "".join(pieces), pieces, entries, True
    text, new = writer.finish()
    return "".join([*pieces, text]), pieces, entries + new, False


def cut(text: str, stops: list[str]) -> str:
    """Return the text before the stop string that is the first to be complete."""
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)[1]] if ends else text


@given(st.text("abc é€", max_size=40), st.lists(st.text("abc é€", min_size=1, max_size=5), max_size=4), st.data())
def test_a_stream_is_the_text_before_the_first_stop_string(text: str, stops: list[str], data: st.DataObject) -> None:
    """However the text is split into tokens; nothing of the stop string is ever sent."""
    tokenizer = data.draw(st.sampled_from([BYTES, SMALL]))
    parts, rest = [], text
    while rest:
        length = data.draw(st.integers(1, len(rest)))
        parts.append(rest[:length])
        rest = rest[length:]
    ids = [int(i) for part in parts for i in tokenizer.encode(part)]
    whole, pieces, entries, stopped = write(tokenizer, ids, stops)
    assert whole == cut(text, stops) and stopped == any(stop in text for stop in stops)
    assert all(whole.startswith("".join(pieces[:n])) for n in range(len(pieces)))
    assert [entry.id for entry in entries] == ids[: len(entries)]
    assert len(entries) == len(ids) or stopped
    assert all(entry.start < len(whole) or entry.end <= len(whole) for entry in entries)


def test_text_is_held_back_no_longer_than_necessary() -> None:
    pieces = write(BYTES, list(b"ab--c-"), ["--x", "-+"])[1]
    assert pieces == ["a", "b", "", "", "--c", ""]


def test_the_first_complete_stop_string_counts() -> None:
    assert write(BYTES, list(b"abcde"), ["abcde", "bcd"])[0] == "a"


def test_tokens_are_kept_for_log_probabilities_only() -> None:
    writer = Writer(BYTES)
    assert writer.feed(Token(97)) == ("a", [], False) and writer.finish() == ("", [])


def test_an_incomplete_character_ends_a_text() -> None:
    whole, _, entries, stopped = write(BYTES, [97, 0xE2, 0x82], [])
    assert whole == "a\ufffd" and not stopped and [entry.id for entry in entries] == [97, 0xE2, 0x82]


def test_nothing_follows_a_stop_string() -> None:
    """Not the rest of its token either, which may end inside a character."""
    tokenizer = tokenization.Tokenizer(BYTES.json)
    tokenizer._bytes_of_id[46] = b".\xc3"  # type: ignore[index]
    writer = Writer(tokenizer, (), ["."])
    assert writer.feed(Token(46))[::2] == ("", True) and writer.finish() == ("", [])


def test_a_stop_string_may_be_complete_at_the_end_only() -> None:
    """U+FFFD stands for the incomplete character."""
    assert write(BYTES, [97, 0xE2], ["\ufffd"])[0] == "a"


def test_a_tokenizer_of_another_kind_decodes_a_window() -> None:
    """So that each token takes the same time; the text is that of all ids."""
    other = tokenization.Tokenizer(BPE.json)
    other.kind, other._bytes_of_id = "other", None
    text = "the little bards sang naïve songs, é\n" * 40
    ids = [int(i) for i in BPE.encode(text)]
    pieces = Pieces(other)
    assert "".join(map(pieces.feed, ids)) + pieces.finish() == text
    assert len(ids) > 2 * LONGEST > len(pieces._ids)
    assert name_of(other, ids[0]) == name_of(BPE, ids[0]) and bytes_of(other, ids[0]) == bytes_of(BPE, ids[0])


def test_a_completion_keeps_the_space_that_sentencepiece_removes_from_a_text() -> None:
    """A prompt with its first token, and an answer, which begins a text."""
    tokenizer = tokenization.Tokenizer(foreign_tokenizers.raw("llama2").to_str())
    prompt, ids = [1, *tokenizer.encode("the day").tolist()], tokenizer.encode("the Who € 漢").tolist()
    writer = Writer(tokenizer, prompt)
    assert "".join([*(writer.feed(Token(i, None))[0] for i in ids), writer.finish()[0]]) == " the Who € 漢"
    assert write(tokenizer, ids, [])[0] == "the Who € 漢"
    text, entries = entries_of(tokenizer, prompt)
    assert text == "the day" and entries[0] == Entry(1, 0, 0)
    assert name_of(tokenizer, ids[0]) == " the" and bytes_of(tokenizer, tokenizer.vocab["<0xE2>"]) == [0xE2]


def test_the_tokens_of_a_prompt_have_places() -> None:
    text, entries = entries_of(BYTES, [97, 0xC3, 0xA9, 98], hidden=1)
    assert text == "éb" and [(entry.start, entry.end) for entry in entries] == [(0, 0), (0, 0), (0, 1), (1, 2)]


def test_tokens_have_names() -> None:
    assert name_of(BYTES, 0xC3) == "bytes:\\xc3" and bytes_of(BYTES, 0xC3) == [0xC3]
    assert name_of(LETTERS, LETTERS.vocab["é"]) == "é" and bytes_of(LETTERS, LETTERS.vocab["é"]) == [0xC3, 0xA9]
    assert name_of(BYTES, 999) == "token_id:999" and bytes_of(BYTES, 999) is None


def test_a_slow_reader_gets_one_piece() -> None:
    """Text that waits is joined, and the event loop is woken once for it."""

    async def main() -> None:
        inbox = Inbox()
        wakes = 0
        call = inbox._loop.call_soon_threadsafe

        def counted(*arguments: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return call(*arguments)

        inbox._loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        choice = Choice(inbox, Writer(BYTES), streams=True)

        def run() -> None:
            for _ in range(1000):
                choice.token(Token(97))

        for _ in range(2):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            await inbox.wait()
            assert choice.collect().text == "a" * 1000
        choice.end("length", None)
        await inbox.wait()
        assert choice.collect().reason == "length" and wakes == 3

    asyncio.run(main())


def test_a_whole_answer_wakes_the_loop_at_its_end_only() -> None:
    async def main() -> None:
        inbox = Inbox()
        choice = Choice(inbox, Writer(BYTES), [Entry(1, 0, 1), Entry(2, 1, 2)])
        choice.prompt([Token(2, -1.0)])
        choice.token(Token(97))
        choice.token(Token(13))
        choice.token(Token(10))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inbox.wait(), 0.01)
        choice.end("stop", None)
        await inbox.wait()
        news = choice.collect()
        assert news.text == "a\r\n" and [each.logprob for each in news.prompt or []] == [None, -1.0]

    asyncio.run(main())


def test_news_for_a_closed_loop_are_dropped() -> None:
    async def main() -> Inbox:
        return Inbox()

    asyncio.run(main()).ring()
