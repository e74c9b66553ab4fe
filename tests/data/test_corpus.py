"""data/corpus.py: every kind of file, repairs with a notice, and errors in one line."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import lzma
import os
import random
from pathlib import Path

import pytest

from bardlet.cli import data as cli
from bardlet.data import bitext, named
from bardlet.data import corpus as cp
from bardlet.errors import BardletError

DATA = os.environ.get("BARDLET_DATA")
needs_data = pytest.mark.skipif(not (DATA and Path(DATA).is_dir()), reason="BARDLET_DATA is not set to a folder")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch, request):
    """Hide this machine's cache, network and data; only tests with "real" in their names see the data."""
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path / "cache"))
    if "real" not in request.node.name:
        monkeypatch.delenv("BARDLET_DATA", raising=False)
    tiny = named.NAMED["tinyshakespeare"]
    missing = (tmp_path / "no-such-server" / "input.txt").as_uri()
    monkeypatch.setitem(named.NAMED, "tinyshakespeare", cp.dataclasses.replace(tiny, url=missing))


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(*arguments: object, part: str = "all", field: str = "text") -> list[str]:
    return list(cp.find([str(a) for a in arguments], field).documents(part))


def error_of(*arguments: object, field: str = "text") -> str:
    with pytest.raises(BardletError) as error:
        read(*arguments, field=field)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------- reading


def test_a_file_is_one_document_whatever_its_suffix(tmp_path):
    for name in ("a.txt", "b.py", "c", "d.md"):
        assert read(write(tmp_path / name, "é\nb\n")) == ["é\nb\n"]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_compressed_files_are_read_and_damage_is_an_error(tmp_path, suffix, pack):
    assert read(write(tmp_path / f"a.txt.{suffix}", pack(b"text"))) == ["text"]
    assert read(write(tmp_path / f"a.jsonl.{suffix}", pack(b'{"text": "b"}\n'))) == ["b"]
    damaged = write(tmp_path / f"c.txt.{suffix}", pack(os.urandom(5000).hex().encode())[:-900])
    assert damaged in error_of(damaged) and "compressed data is damaged" in error_of(damaged)
    assert "compressed data is damaged" in error_of(write(tmp_path / f"d.{suffix}", b"not packed"))


def test_jsonl_has_a_document_per_line(tmp_path):
    lines = [{"text": "eins\r\nzwei"}, {"text": ""}, {"text": "漢字", "id": 3}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(line) for line in lines))
    assert read(path) == ["eins\nzwei", "漢字"]


def test_a_folder_is_read_sorted_without_hidden_and_other_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y.jsonl", ".hidden.txt", ".git/x.txt", "image.png", "c.txt.gz", "d.tar.gz"):
        content = '{"text": "a/y.jsonl"}' if name.endswith("jsonl") else name
        write(tmp_path / "t" / name, gzip.compress(name.encode()) if name.endswith("gz") else content)
    assert read(tmp_path / "t") == ["a/y.jsonl", "a/z.md", "b.txt", "c.txt.gz"]


def test_globs_and_multiple_arguments(tmp_path, monkeypatch):
    for name in "cab":
        write(tmp_path / f"{name}.text", name)
    monkeypatch.chdir(tmp_path)
    assert read("*.text") == ["a", "b", "c"]
    assert read("b.text", "*.text") == ["b", "a", "c"], "a file that is named twice is read once"
    assert "no file matches" in error_of("*.nothing")


def test_a_corpus_is_named_after_its_files(tmp_path):
    files = [write(tmp_path / name, "x") for name in ("my poems.txt", "b.jsonl.xz.txt", "c.md", "d.md")]
    assert cp.find(files[:1]).name == "my_poems"
    assert cp.find(files).name == "my_poems+b+c+1"


def test_utf8_does_not_depend_on_the_locale(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    assert read(write(tmp_path / "a.txt", "é漢\U0001f980")) == ["é漢\U0001f980"]


# ------------------------------------------------------------------------- repairs, with one notice


@pytest.mark.parametrize(
    ("content", "text", "notice"),
    [
        (b"\xef\xbb\xbfa\xc3\xa9", "aé", "byte order mark"),
        (b"a\r\nb\r\n", "a\nb\n", "Windows line endings"),
        ("aé".encode("utf-16"), "aé", "UTF-16"),
        (b"\xfe\xff" + "aé".encode("utf-16-be"), "aé", "UTF-16"),
        ("aé".encode("utf-32"), "aé", "UTF-32"),
    ],
)
def test_a_repair_is_logged_once(tmp_path, caplog, content, text, notice):
    path = write(tmp_path / "a.txt", content)
    corpus = cp.find([path])
    with caplog.at_level(logging.WARNING, "bardlet"):
        assert list(corpus.documents()) == list(corpus.documents()) == [text]
    assert sum(notice in record.message and path in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_jsonl_with_a_byte_order_mark(tmp_path, caplog, encoding):
    path = write(tmp_path / "a.jsonl", '{"text": "é"}\r\n{"text": "b"}\r\n'.encode(encoding))
    assert read(path) == ["é", "b"]
    assert any(path in record.message for record in caplog.records)


# ------------------------------------------------------------------------ errors name file and place


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_names_the_byte(tmp_path, mark):
    path = write(tmp_path / "a.txt", mark + b"ab\ncd\xffe")
    assert error_of(path).startswith(f"{path}: not valid UTF-8 at byte {len(mark) + 5} (line 2): 0xFF")
    path = write(tmp_path / "a.jsonl", mark + b'{"text": "ab"}\n{"text": "\xe9"}\n')
    offset = len(mark) + 15 + 10
    assert error_of(path).startswith(f"{path}: not valid UTF-8 at byte {offset} (line 2): 0xE9")


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("a.txt", b"ab\ncd\0e", ["NUL at byte 5 (line 2)"]),
        ("a.bin", bytes(range(256)), ["NUL at byte 0 (line 1)"]),
        ("a.txt", b"\xff\xfea\0b", ["byte 4", "UTF-16"]),
        ("a.txt", b"", ["is empty"]),
        ("a.txt", b"\xef\xbb\xbf", ["no text"]),
        ("a.txt.gz", gzip.compress(b"", mtime=0), ["is empty"]),
        ("a.jsonl", b'{"text": "a"}\n{oops}\n', ["line 2", "not JSON at column 2"]),
        ("a.jsonl", b'[3]', ["record 1", "is a number, not an object"]),
        ("a.jsonl", b'{"body": "a", "title": "b", "n": 1}', ["line 1", 'no field "text"', "--field: body, title"]),
        ("a.jsonl", b'{"n": 1}', ["no field of the record is text: add one"]),
        ("a.jsonl", b'{"text": 5}', ["line 1", "is a number, not text"]),
        ("a.jsonl", b'{"text": "ab\\ud800"}', ["line 1", "half of a surrogate pair"]),
        ("a.jsonl", b'{"text": ""}\n', ["no text"]),
        ("a.jsonl", b"\0\0\0\0", ["line 1", "binary"]),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path, name, content, fragments):
    path = write(tmp_path / name, content)
    line = error_of(path)
    assert path in line and all(fragment in line for fragment in fragments), line


def test_a_path_that_is_not_a_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "FIFO" in error_of(tmp_path / "fifo")
    assert "not a regular file" in error_of("/dev/null")
    (tmp_path / "empty").mkdir()
    assert "no text files in the folder" in error_of(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "check that it still exists" in error_of(tmp_path / "dangling")
    assert "no such file" in error_of(tmp_path / "nowhere.txt")
    assert 'did you mean "eltec-eng"?' in error_of("eltec-en")


def test_a_file_without_read_permission(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bardlet.data.text.open", refuse, raising=False)  # root may read a file without permissions
    assert error_of(path).startswith(f"{path}: permission denied; change its permissions")


def test_an_empty_file_in_a_folder_is_skipped(tmp_path, caplog):
    write(tmp_path / "t" / "a.txt", "")
    write(tmp_path / "t" / "b.txt", "b")
    assert read(tmp_path / "t") == ["b"]
    assert any("empty" in record.message for record in caplog.records)


# --------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 1000, 1003])
def test_a_single_document_holds_out_its_last_tenth(tmp_path, length):
    rng = random.Random(length)
    text = "".join(rng.choices("abcéñ", k=length))
    path = write(tmp_path / "a.txt", text)
    train, val = "".join(read(path, part="train")), "".join(read(path, part="val"))
    assert len(train) == int(0.9 * length) and train + val == text


@pytest.mark.parametrize("count", [2, 19, 20, 45])
def test_twenty_documents_are_split_whole_and_fewer_are_cut(tmp_path, count):
    texts = [f"document {i:04}, ten" for i in range(count)]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t}) for t in texts))
    train, val = read(path, part="train"), read(path, part="val")
    if count < 20:
        assert [a + b for a, b in zip(train, val, strict=True)] == texts
        assert {len(t) for t in train} == {int(0.9 * len(texts[0]))}
    else:
        assert val == texts[9::10] and sorted(train + val) == texts
    corpus = cp.find([path])
    assert (corpus.count, corpus.needs_separator, read(path)) == (count, True, texts)


def test_a_corpus_with_validation_files_uses_them(tmp_path, monkeypatch):
    monkeypatch.setenv("BARDLET_DATA", str(tmp_path))
    for part in ("train", "val"):
        lines = "\n".join(json.dumps({"text": f"{part} {i}"}) for i in range(2))
        write(tmp_path / "eltec-fra" / f"{part}.jsonl.xz", lzma.compress(lines.encode()))
    assert read("eltec-fra", part="train") == ["train 0", "train 1"]
    assert read("eltec-fra", part="val") == ["val 0", "val 1"]
    other = write(tmp_path / "own.txt", "0123456789")
    assert read("eltec-fra", other, part="val") == ["val 0", "val 1", "9"]


# ---------------------------------------------------------------------------------------------- hash


def test_the_hash_depends_on_names_bytes_and_field(tmp_path):
    first = cp.find([write(tmp_path / "1" / "a.txt", "x")]).hash
    assert cp.find([write(tmp_path / "2" / "a.txt", "x")]).hash == first, "not on the folder"
    others = [
        cp.find([write(tmp_path / "1" / "b.txt", "x")]).hash,
        cp.find([write(tmp_path / "3" / "a.txt", "y")]).hash,
        cp.find([write(tmp_path / "4" / "a.jsonl", '{"body": "x"}')], field="body").hash,
        cp.find([]).hash,
    ]
    assert len({first, *others}) == 5


# -------------------------------------------------------------------------------------- named corpora


def test_without_text_or_download_the_embedded_corpus_is_used(caplog):
    with caplog.at_level(logging.WARNING, "bardlet"):
        corpus = cp.find()
    assert corpus.name == "python-docs" and len(caplog.records) == 1
    assert "could not be downloaded" in caplog.records[0].message and "\n" not in caplog.records[0].message


def test_an_unavailable_corpus_is_an_error_with_the_remedy():
    assert "put input.txt into $BARDLET_DATA/tinyshakespeare" in error_of("tinyshakespeare")
    assert "has no download; put core.jsonl.xz" in error_of("eltec-eng")


def test_a_download_is_checked_and_cached(tmp_path, monkeypatch, capsys):
    content = b"To be, or not to be: that is the question." * 9
    url = Path(write(tmp_path / "server" / "input.txt", content)).as_uri()
    good = named.NamedCorpus("a play", ("input.txt",), url=url, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(named.NAMED, "tinyshakespeare", cp.dataclasses.replace(good, sha256="0" * 64))
    assert "its sha256 is" in error_of("tinyshakespeare")
    target = tmp_path / "cache" / "data" / "tinyshakespeare"
    assert list(target.iterdir()) == [], "a download with a wrong sha256 leaves nothing behind"
    monkeypatch.setitem(named.NAMED, "tinyshakespeare", good)
    seen: list[tuple[str, int, int | None]] = []
    assert named.get("tinyshakespeare", lambda *step: seen.append(step)) == target
    assert seen[-1] == ("downloading tinyshakespeare", len(content), len(content))
    (tmp_path / "server" / "input.txt").unlink()
    assert read("tinyshakespeare") == [content.decode()]
    assert [p.name for p in target.iterdir()] == ["input.txt"]
    assert cli.main(["get", "tinyshakespeare", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "tinyshakespeare", "found": str(target)}


def test_a_corpus_name_wins_over_a_file_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "python-docs", "mine")
    assert read("./python-docs") == ["mine"]
    assert cp.find(["python-docs"]).files == () and "./python-docs" in caplog.text
    assert "name it alone" in error_of("python-docs", "./python-docs")


def test_the_embedded_corpus_is_clean_prose():
    text = named.python_docs()
    paragraphs = text.strip("\n").split("\n\n")
    assert text == named.python_docs() and len(text) > 100_000
    assert len(paragraphs) == len(set(paragraphs)) > 500
    assert not any("\n" in p or "  " in p or "::=" in p or ">>>" in p[:4] for p in paragraphs)


@needs_data
def test_real_shakespeare_is_split_like_nanogpt():
    corpus = cp.find(["tinyshakespeare"])
    (train,), (val,) = corpus.documents("train"), corpus.documents("val")
    assert (len(train), len(val), len(set(train + val))) == (1_003_854, 111_540, 65)


@needs_data
@pytest.mark.parametrize(("name", "count"), [("names", 7944), ("wikitext-2", 2), ("factbook", 261)])
def test_real_corpora_have_the_expected_documents(name, count):
    corpus = cp.find([name])
    assert corpus.count == count
    assert sum(map(len, corpus.documents("train"))) > sum(map(len, corpus.documents("val"))) > 0


# ----------------------------------------------------------------------------------------- bardlet data


def test_the_table_lists_every_corpus(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([]) == 0
    *lines, blank, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*named.NAMED, *bitext.NAMED]
    assert any(line.endswith("missing: put female.txt, male.txt into $BARDLET_DATA/names") for line in lines)
    assert not blank and "export BARDLET_DATA=" in last
    assert lines[0].endswith("missing: bardlet data get tinyshakespeare")
    assert cli.main(["--json"]) == 0
    assert {c["name"]: c["found"] for c in json.loads(capsys.readouterr().out)["corpora"]}["names"] is None


def test_wrong_arguments_are_errors(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "bardlet data [get NAME | show FILE ...]" in capsys.readouterr().out
    with pytest.raises(BardletError, match="data gte names: use `bardlet data`, `bardlet data get NAME`"):
        cli.main(["gte", "names"])
    assert cli.main(["get", "python-docs"]) == 0
    with pytest.raises(BardletError, match=r'no corpus called "name".*did you mean "names"'):
        cli.main(["get", "name"])
