"""A corpus that a thread reads while PyTorch is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from bardlet.data import corpus, prefetch
from bardlet.errors import BardletError


def test_the_corpus_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("A text.\n", encoding="utf-8")
    arguments = ([str(tmp_path / "a.txt")], "text", "auto", None)
    with prefetch.reading(*arguments), monkeypatch.context() as patch:
        early = prefetch.find(*arguments)
        patch.setattr(corpus, "find", lambda *_, **__: pytest.fail("read again"))
        assert list(early.documents()) == ["A text.\n"]
    assert prefetch.find(*arguments) is not early, "only the next one"
    assert prefetch.find(*arguments).hash == early.hash


def test_other_arguments_are_read_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("e\u0301", encoding="utf-8")
    with prefetch.reading([str(tmp_path / "a.txt")], "text", "auto", None):
        assert list(prefetch.find([str(tmp_path / "a.txt")], "text", "auto", "nfc").documents()) == ["\u00e9"]


def test_a_corpus_that_nothing_asked_for_is_forgotten(tmp_path: Path) -> None:
    """A command that fails before it needs the corpus leaves nothing for the next one in the same process."""
    (tmp_path / "a.txt").write_text("The old text.\n", encoding="utf-8")
    arguments = ([str(tmp_path / "a.txt")], "text", "auto", None)
    with pytest.raises(BardletError), prefetch.reading(*arguments):
        raise BardletError("another fault")
    (tmp_path / "a.txt").write_text("The new text.\n", encoding="utf-8")
    assert list(prefetch.find(*arguments).documents()) == ["The new text.\n"]


@pytest.mark.parametrize(("content", "message"), [
    (b"", "the file is empty"), (b" \n ", "has no text, only white space"), (b"caf\xe9 " * 9, "not valid UTF-8")])
def test_errors_are_raised_where_the_corpus_is_needed(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with (prefetch.reading([str(tmp_path / "a.txt")], "text", "auto", None),
          pytest.raises(BardletError, match=message)):
        prefetch.find([str(tmp_path / "a.txt")], "text", "auto", None)


def test_nothing_is_downloaded_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download shows its progress."""
    monkeypatch.setattr(prefetch, "locate", lambda name: None)
    monkeypatch.setattr(corpus, "find", lambda *_, **__: pytest.fail("read"))
    for text in ([], ["names"], ["missing.txt"]):
        with prefetch.reading(text, "text", "auto", None):
            assert not prefetch._reading
