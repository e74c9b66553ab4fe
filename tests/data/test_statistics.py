"""The survey of a text: right, and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bardlet.data import corpus, statistics
from bardlet.runtime import cache as kept


def words(n: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(random.choice(["to", "be", "or", "not", "that", "is", "the", "question"], n).tolist())


def look(path: Path, cache: Path) -> statistics.CorpusStatistics:
    return statistics.measure_corpus(corpus.find((str(path),)), cache=cache)


def test_what_it_counts(tmp_path: Path) -> None:
    text = words(2_000, 0) + "é"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = look(tmp_path / "a.txt", tmp_path / "cache")
    assert found.characters == len(text) and found.train_characters == int(0.9 * len(text))
    assert found.alphabet == "".join(sorted(set(text)))
    assert len(found.losses) == len(found.quarter) == statistics.LONGEST + 1 + 3
    assert found.losses[0] > found.losses[3] > 0 and min(found.quarter) >= min(found.losses)


def test_it_is_read_once_and_again_where_the_file_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(words(2_000, 0), encoding="utf-8")
    first = look(tmp_path / "a.txt", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_read", lambda *_: pytest.fail("read again"))
        assert look(tmp_path / "a.txt", tmp_path / "cache") == first
    [file] = (tmp_path / "cache" / "surveys").iterdir()
    whole = file.read_text(encoding="utf-8")
    for damage in ("", "[]", "{}", whole.replace('"losses"', '"lasses"'), whole.replace("1", "2", 1)):
        file.write_text(damage, encoding="utf-8")
        assert look(tmp_path / "a.txt", tmp_path / "cache") == first


def test_the_end_of_a_document_costs_and_is_no_character(tmp_path: Path) -> None:
    """Documents of one letter, a or b by lot: a letter is worth ln 2, whatever stands between two."""
    letters = np.random.default_rng(0).choice(["a", "b"], 40_000).tolist()
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{letter}"}}\n' for letter in letters))
    found = look(tmp_path / "a.jsonl", tmp_path / "cache")
    assert found.counted == found.train_characters == pytest.approx(36_000, rel=0.05)
    assert found.losses[1] == pytest.approx(np.log(2), rel=0.01)


def test_the_end_of_a_sorted_list_is_unlike_the_rest(tmp_path: Path) -> None:
    """Its names begin with letters that none had before: counting is worse there than guessing, and says nothing."""
    random = np.random.default_rng(0)
    names = [first + "".join(random.choice(list("aeiou"), 4).tolist()) for first in "BCDFGHJKLMNPQRSTVWXZ"
             for _ in range(200)]
    found = {}
    for name, listed in (("sorted", names), ("shuffled", random.permutation(names).tolist())):
        (tmp_path / f"{name}.txt").write_text("\n".join(listed), encoding="utf-8")
        found[name] = look(tmp_path / f"{name}.txt", tmp_path / "cache")
    assert found["sorted"].domain_shift > 0.2 and found["sorted"].counting is None
    assert abs(found["shuffled"].domain_shift) < 0.02 and found["shuffled"].counting is not None


def test_what_is_held_out_was_not_counted(tmp_path: Path) -> None:
    """The end speaks another language: counting fails there alone, whether it is validation or the tenth before."""
    known, strange = words(8_000, 0), "".join(np.random.default_rng(1).choice(list("aeioubdgk"), 60_000).tolist())
    for name, text in (("plain", known), ("end", known + strange[:len(known) // 9]),
                       ("before", known + strange[:len(known) // 7] + words(700, 2))):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    hard = {(name, part): min(statistics.measure_corpus(corpus.find((str(tmp_path / f"{name}.txt"),)), cache=tmp_path / "cache",
                                            held_out=part).losses)
            for name in ("plain", "end", "before") for part in ("val", "dev")}
    assert {at for at, loss in hard.items() if loss > 1.5} == {("end", "val"), ("before", "dev")}


@pytest.mark.parametrize("text", ["a" * 20_000, "gattaca" * 3_000, "春眠不覺曉處處聞啼鳥" * 2_000,
                                  "x" * 18_000 + " and so on" * 200], ids=["aaaa", "dna", "no spaces", "one long word"])
def test_texts_without_words_have_losses_of_characters(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = look(tmp_path / "a.txt", tmp_path / "cache")
    assert found.losses and all(0 <= x < 20 for x in (*found.losses, *found.quarter))
    assert found.counted == pytest.approx(0.9 * found.characters, rel=0.01)
    assert (found.counting is None) == (found.domain_shift > 1) == (" and so on" in text), "an end in another language"


def test_records_that_are_all_alike_have_no_difficulty(tmp_path: Path) -> None:
    """Counting knows all of them: nothing to take a logarithm of."""
    (tmp_path / "a.jsonl").write_text('{"text": "to be or not to be, that is the question"}\n' * 3_000)
    assert look(tmp_path / "a.jsonl", tmp_path / "cache").counting is None


def test_a_text_too_short_for_counting_has_no_losses(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 5, encoding="utf-8")
    assert look(tmp_path / "a.txt", tmp_path / "cache").losses == ()


def test_a_sample_is_spread_over_the_stream_and_bounded() -> None:
    sample = statistics._Sample(10 * statistics.PIECE)
    for i in range(64):
        sample.add(chr(0x1000 + i) * (statistics.PIECE - 1))
    text = sample.text()
    assert 5 * statistics.PIECE <= len(text) <= 11 * statistics.PIECE
    seen = sorted(set(map(ord, text)) - {ord(statistics.END)})
    assert seen[0] == 0x1000 and seen[-1] >= 0x1000 + 56 and np.ptp(np.diff(seen)) == 0


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    kept.write(tmp_path / "file", {"a": 1}, {"b": 2})
    assert kept.read(tmp_path / "file", {"a": 1}) is None
    kept.write(tmp_path / "new", {"a": (1, 2)}, {"b": 2})
    assert kept.read(tmp_path / "new", {"a": [1, 2]}) == {"b": 2} and kept.read(tmp_path / "new", {"a": 1}) is None


def test_more_of_a_sorted_list_helps_no_more_than_of_a_list_in_any_order(tmp_path: Path) -> None:
    """Names that begin alike stand together there: every fourth piece of the list would lack most beginnings."""
    random = np.random.default_rng(0)
    stems = ["".join(random.choice(list("abcdefghij"), 4).tolist()) for _ in range(1_000)]
    names = [stem + end for stem in stems for end in ("a", "ina", "ette", "o", "ino", "us", "ias", "y")]
    helps = {}
    for name, listed in (("sorted", sorted(names)), ("shuffled", random.permutation(names).tolist())):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{each}"}}\n' for each in listed))
        best, fewer, *_ = look(tmp_path / f"{name}.jsonl", tmp_path / "cache").counting or pytest.fail("no counting")
        helps[name] = fewer / best
    assert helps["sorted"] == pytest.approx(helps["shuffled"], rel=0.05)


@pytest.mark.parametrize("period", [2, 4])
def test_lines_that_take_turns_are_all_in_the_quarter(tmp_path: Path, period: int) -> None:
    """Questions and answers, or the lines of a stanza, each in letters of its own."""
    random = np.random.default_rng(0)
    lines = ["".join(random.choice(list("abcdefghijklmnopqrst"[5 * (i % period):][:5]), 20).tolist())
             for i in range(4_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    best, fewer, *_ = look(tmp_path / "a.txt", tmp_path / "cache").counting or pytest.fail("no counting")
    assert fewer / best < 1.05
