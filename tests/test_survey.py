"""The survey of a text: right, kept, and without a look at the validation part."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bardlet import corpus, kept, survey


def words(n: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(random.choice(["to", "be", "or", "not", "that", "is", "the", "question"], n).tolist())


def look(path: Path, cache: Path) -> survey.Survey:
    return survey.survey(corpus.find((str(path),)), cache=cache)


def test_what_it_counts(tmp_path: Path) -> None:
    text = words(2_000, 0) + "é"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = look(tmp_path / "a.txt", tmp_path / "cache")
    assert found.characters == len(text) and found.train_characters == int(0.9 * len(text))
    assert found.alphabet == "".join(sorted(set(text)))
    assert len(found.losses) == len(found.quarter) == survey.LONGEST + 1 + 3
    assert found.losses[0] > found.losses[3] > 0 and min(found.quarter) >= min(found.losses)


def test_it_is_read_once_and_again_where_the_file_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(words(2_000, 0), encoding="utf-8")
    first = look(tmp_path / "a.txt", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(survey, "_read", lambda *_: pytest.fail("read again"))
        assert look(tmp_path / "a.txt", tmp_path / "cache") == first
    [file] = (tmp_path / "cache" / "surveys").iterdir()
    for damage in ("", "[]", file.read_text(encoding="utf-8").replace('"losses"', '"lasses"')):
        file.write_text(damage, encoding="utf-8")
        assert look(tmp_path / "a.txt", tmp_path / "cache") == first


@pytest.mark.parametrize("documents", [1, 40])
def test_the_validation_part_is_not_looked_at(tmp_path: Path, documents: int) -> None:
    """Other validation text of the same length, the same losses."""
    found = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for i in range(documents):
            text = words(40_000 // documents, i)
            last = words(40_000 // documents, 100 * seed + i)
            cut = int(0.9 * len(text))
            changed = text[:cut] + last.ljust(len(text))[cut:len(text)] if documents == 1 else (
                last if i % 10 == 9 else text)
            (folder / f"{i:02}.txt").write_text(changed, encoding="utf-8")
        found.append(look(folder, tmp_path / "cache"))
    assert found[0].losses == found[1].losses and found[0].quarter == found[1].quarter


def test_whole_documents_are_held_out_where_validation_has_its_own(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Five documents with a loop of their own each: the end of one is no surprise, a whole one is."""
    lines = [f"{chr(97 + i) * 3} sings {chr(65 + i) * 2} alone\n" * 200 for i in range(6)]
    for i, line in enumerate(lines):
        (tmp_path / f"{i}.txt").write_text(line, encoding="utf-8")
    found = corpus.find((str(tmp_path),))
    ends = survey.survey(found, cache=tmp_path / "one")
    apart = corpus.Corpus(found.name, tuple(
        dataclasses.replace(s, part="val" if i == 0 else "train") for i, s in enumerate(found.sources)))
    assert apart.whole_documents and not found.whole_documents
    assert min(survey.survey(apart, cache=tmp_path / "two").losses) > 2 * min(ends.losses)


@pytest.mark.parametrize("text", ["a" * 20_000, "gattaca" * 3_000, "春眠不覺曉處處聞啼鳥" * 2_000,
                                  "x" * 18_000 + " and so on" * 200], ids=["aaaa", "dna", "no spaces", "one long word"])
def test_texts_without_words_have_losses_of_characters(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = look(tmp_path / "a.txt", tmp_path / "cache")
    assert found.counting is not None and all(0 <= x < 20 for x in (*found.losses, *found.quarter))
    assert found.counting[2] == pytest.approx(0.81 * found.characters, rel=0.01)


def test_a_text_too_short_for_counting_has_no_losses(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 5, encoding="utf-8")
    assert look(tmp_path / "a.txt", tmp_path / "cache").losses == ()


def test_a_sample_is_spread_over_the_stream_and_bounded() -> None:
    sample = survey._Sample(10 * survey.PIECE)
    for i in range(64):
        sample.add(chr(0x1000 + i) * (survey.PIECE - 1))
    text = sample.text()
    assert 5 * survey.PIECE <= len(text) <= 11 * survey.PIECE
    seen = sorted(set(map(ord, text)) - {ord("\n")})
    assert seen[0] == 0x1000 and seen[-1] >= 0x1000 + 56 and np.ptp(np.diff(seen)) == 0


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    kept.write(tmp_path / "file", {"a": 1}, {"b": 2})
    assert kept.read(tmp_path / "file", {"a": 1}) is None
    kept.write(tmp_path / "new", {"a": (1, 2)}, {"b": 2})
    assert kept.read(tmp_path / "new", {"a": [1, 2]}) == {"b": 2} and kept.read(tmp_path / "new", {"a": 1}) is None
