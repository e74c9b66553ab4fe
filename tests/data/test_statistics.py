"""Corpus statistics: correct, and cached."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from bardlet.data import corpus, statistics
from bardlet.runtime import cache as runtime_cache


def random_words(n: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(["to", "be", "or", "not", "that", "is", "the", "question"], n).tolist())


def measure(path: Path, cache: Path) -> statistics.CorpusStatistics:
    return statistics.measure_corpus(corpus.find((str(path),)), cache=cache)


def test_lengths_alphabet_and_losses(tmp_path: Path) -> None:
    text = random_words(2_000, 0) + "é"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    measured = measure(tmp_path / "a.txt", tmp_path / "cache")
    assert measured.characters == len(text) and measured.train_characters == int(0.9 * len(text))
    assert measured.alphabet == "".join(sorted(set(text)))
    assert len(measured.losses) == len(measured.quarter) == statistics.LONGEST + 1 + 3
    assert measured.losses[0] > measured.losses[3] > 0 and min(measured.quarter) >= min(measured.losses)


def test_statistics_are_cached_and_a_damaged_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(random_words(2_000, 0), encoding="utf-8")
    first = measure(tmp_path / "a.txt", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_read", lambda *_: pytest.fail("read again"))
        assert measure(tmp_path / "a.txt", tmp_path / "cache") == first
    [file] = (tmp_path / "cache" / "surveys").iterdir()
    content = file.read_text(encoding="utf-8")
    for damage in ("", "[]", "{}", content.replace('"losses"', '"lasses"'), content.replace("1", "2", 1)):
        file.write_text(damage, encoding="utf-8")
        assert measure(tmp_path / "a.txt", tmp_path / "cache") == first


def test_document_ends_add_to_the_loss_but_not_to_the_characters(tmp_path: Path) -> None:
    """Documents of one random letter, a or b: each letter costs ln 2, and the ends are predictable."""
    letters = np.random.default_rng(0).choice(["a", "b"], 40_000).tolist()
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{letter}"}}\n' for letter in letters))
    measured = measure(tmp_path / "a.jsonl", tmp_path / "cache")
    assert measured.counted == measured.train_characters == pytest.approx(36_000, rel=0.05)
    assert measured.losses[1] == pytest.approx(np.log(2), rel=0.01)


def test_the_end_of_a_sorted_list_is_a_domain_shift(tmp_path: Path) -> None:
    """Its names begin with unseen letters, so n-gram models are worse than guessing and tell nothing."""
    random = np.random.default_rng(0)
    names = [first + "".join(random.choice(list("aeiou"), 4).tolist()) for first in "BCDFGHJKLMNPQRSTVWXZ"
             for _ in range(200)]
    measured = {}
    for name, listed in (("sorted", names), ("shuffled", random.permutation(names).tolist())):
        (tmp_path / f"{name}.txt").write_text("\n".join(listed), encoding="utf-8")
        measured[name] = measure(tmp_path / f"{name}.txt", tmp_path / "cache")
    assert measured["sorted"].domain_shift > 0.2 and measured["sorted"].counting is None
    assert abs(measured["shuffled"].domain_shift) < 0.02 and measured["shuffled"].counting is not None


def test_the_held_out_part_is_not_counted(tmp_path: Path) -> None:
    """One part is in another language: only its own losses are high, for validation and for the development split."""
    known = random_words(8_000, 0)
    strange = "".join(np.random.default_rng(1).choice(list("aeioubdgk"), 60_000).tolist())
    for name, text in (("plain", known), ("end", known + strange[:len(known) // 9]),
                       ("before", known + strange[:len(known) // 7] + random_words(700, 2))):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    losses = {(name, part): min(statistics.measure_corpus(corpus.find((str(tmp_path / f"{name}.txt"),)),
                                                          cache=tmp_path / "cache", val_part=part).losses)
              for name in ("plain", "end", "before") for part in ("val", "dev")}
    assert {case for case, loss in losses.items() if loss > 1.5} == {("end", "val"), ("before", "dev")}


@pytest.mark.parametrize("text", ["a" * 20_000, "gattaca" * 3_000, "春眠不覺曉處處聞啼鳥" * 2_000,
                                  "x" * 18_000 + " and so on" * 200], ids=["aaaa", "dna", "no spaces", "one long word"])
def test_texts_without_words_have_character_losses(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    measured = measure(tmp_path / "a.txt", tmp_path / "cache")
    assert measured.losses and all(0 <= x < 20 for x in (*measured.losses, *measured.quarter))
    assert measured.counted == pytest.approx(0.9 * measured.characters, rel=0.01)
    shifted = measured.domain_shift > 1
    assert (measured.counting is None) == shifted == (" and so on" in text), "only that end is a domain shift"


def test_identical_records_have_no_ngram_features(tmp_path: Path) -> None:
    """The loss is 0, which has no logarithm."""
    (tmp_path / "a.jsonl").write_text('{"text": "to be or not to be, that is the question"}\n' * 3_000)
    assert measure(tmp_path / "a.jsonl", tmp_path / "cache").counting is None


def test_a_short_text_has_no_losses(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 5, encoding="utf-8")
    assert measure(tmp_path / "a.txt", tmp_path / "cache").losses == ()


def test_a_sample_is_evenly_spread_and_bounded() -> None:
    sample = statistics._Sample(10 * statistics.PIECE)
    for i in range(64):
        sample.add(chr(0x1000 + i) * (statistics.PIECE - 1))
    text = sample.text()
    assert 5 * statistics.PIECE <= len(text) <= 11 * statistics.PIECE
    seen = sorted(set(map(ord, text)) - {ord(statistics.END)})
    assert seen[0] == 0x1000 and seen[-1] >= 0x1000 + 56 and np.ptp(np.diff(seen)) == 0


def test_an_unwritable_cache_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    runtime_cache.write(tmp_path / "file", {"a": 1}, {"b": 2})
    assert runtime_cache.read(tmp_path / "file", {"a": 1}) is None
    runtime_cache.write(tmp_path / "new", {"a": (1, 2)}, {"b": 2})
    assert runtime_cache.read(tmp_path / "new", {"a": [1, 2]}) == {"b": 2}
    assert runtime_cache.read(tmp_path / "new", {"a": 1}) is None


def test_more_text_helps_a_sorted_list_as_much_as_a_shuffled_one(tmp_path: Path) -> None:
    """A sorted list groups names by their beginning, so a quarter of its pieces would miss most beginnings."""
    random = np.random.default_rng(0)
    stems = ["".join(random.choice(list("abcdefghij"), 4).tolist()) for _ in range(1_000)]
    names = [stem + end for stem in stems for end in ("a", "ina", "ette", "o", "ino", "us", "ias", "y")]
    ratio = {}
    for name, listed in (("sorted", sorted(names)), ("shuffled", random.permutation(names).tolist())):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{item}"}}\n' for item in listed))
        measured = measure(tmp_path / f"{name}.jsonl", tmp_path / "cache")
        best, quarter, *_ = measured.counting or pytest.fail("no n-gram features")
        ratio[name] = quarter / best
    assert ratio["sorted"] == pytest.approx(ratio["shuffled"], rel=0.05)


@pytest.mark.parametrize("period", [2, 4])
def test_the_quarter_samples_every_kind_of_alternating_lines(tmp_path: Path, period: int) -> None:
    """For example questions and answers, or the lines of a stanza; each kind has its own letters."""
    random = np.random.default_rng(0)
    lines = ["".join(random.choice(list("abcdefghijklmnopqrst"[5 * (i % period):][:5]), 20).tolist())
             for i in range(4_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    best, quarter, *_ = measure(tmp_path / "a.txt", tmp_path / "cache").counting or pytest.fail("no n-gram features")
    assert quarter / best < 1.05


@pytest.mark.parametrize(("order", "above"), [("in order", True), ("shuffled", False)])
def test_the_end_of_a_text_in_order_of_time_drifts(order: str, above: bool, tmp_path: Path) -> None:
    """Each chapter has words of its own; shuffled, every passage has words of every chapter."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(400)]
    chapters = [words[start:start + 20] for start in range(0, 400, 20)]
    lines = [" ".join(rng.choices(chapter, k=12)) for chapter in chapters for _ in range(60)]
    if order == "shuffled":
        rng.shuffle(lines)
    (tmp_path / "t.txt").write_text("\n".join(lines))
    assert (measure(tmp_path / "t.txt", tmp_path).drift > 0.15) == above
