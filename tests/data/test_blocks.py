"""data/blocks.py: a text read in blocks of any size is the text, its documents, its notices and its errors."""

from __future__ import annotations

import hashlib
import io
import random
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet.data import blocks, rows
from bardlet.data.text import Source
from bardlet.errors import BardletError

SOURCE = Source(Path("a.txt"), "a.txt")
ALPHABET = "a\r\n é漢\U0001f980\u0301"


class Trickle(io.BytesIO):
    """A file that returns a few bytes at a time, and first a whole byte order mark."""

    def __init__(self, content: bytes, seed: int) -> None:
        super().__init__(content)
        self.random = random.Random(seed)

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        return super().read(self.random.randint(1 if self.tell() else 4, 9) if size == blocks.BLOCK else size)


def read(content: bytes, seed: int = 0) -> tuple[str, list[str]]:
    notices: list[str] = []
    text = "".join(blocks.decoded(Trickle(content, seed), SOURCE, lambda _, notice: notices.append(notice)))
    return text, notices


@settings(max_examples=150, deadline=None)
@given(st.text(ALPHABET, max_size=60), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]), st.integers(0, 99))
def test_blocks_of_any_size_are_the_text(text, encoding, seed):
    decoded, notices = read(text.encode(encoding), seed)
    whole = text.encode(encoding).decode("utf-8-sig" if encoding.startswith("utf-8") else encoding)
    assert decoded == whole.replace("\r\n", "\n")
    assert any("CR LF" in notice for notice in notices) == ("\r\n" in whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ab\ncd\xffe", "not valid UTF-8 at byte 5 (line 2): 0xFF"),
        (b"\xef\xbb\xbfab\ncd\n" + "é".encode() * 20 + b"\xe9 x", "not valid UTF-8 at byte 49 (line 3): 0xE9"),
        (b"ab\ncd\n" * 9 + b"\xe6\xbc", "not valid UTF-8 at byte 54 (line 19): 0xE6"),
        (b"a\n" * 30 + b"b\0", "NUL at byte 61 (line 31)"),
        (b"\xff\xfe" + "ab\0".encode("utf-16-le"), "NUL at character 2"),
        (b"\xff\xfe" + "ab".encode("utf-16-le") + b"c", "not valid UTF-16 at byte 6"),
        (b"\xfe\xff" + "abcdefgh".encode("utf-16-be") + b"\xdc\x00\0a", "not valid UTF-16 at byte 18"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_errors_name_the_byte_wherever_a_block_ends(content, message, seed):
    with pytest.raises(BardletError) as error:
        read(content, seed)
    assert "\n" not in str(error.value)
    assert message in str(error.value), str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["Once upon a time\n", "Жили-были дед да баба.\n" * 4,
                                  "春眠不覺曉，處處聞啼鳥。\n" * 9])
def test_utf16_and_utf32_without_a_byte_order_mark_are_named_with_the_command(tmp_path, encoding, text):
    path = tmp_path / "my text.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(BardletError) as error:
        list(blocks.read_text(Source(path, path.name), lambda *_: None))
    message, _, command = str(error.value).partition("; convert it: ")
    assert message.endswith(f"looks like {encoding[:6].upper()} without a byte order mark")
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert command == f"iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > 'my text-utf8.txt'"
    if subprocess.run(["which", "iconv"], capture_output=True).returncode == 0:
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert (tmp_path / "my text-utf8.txt").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("content", [bytes(range(256)), b"ab\ncd\0e", b"a" * 200 + b"\0",
                                     random.Random(0).randbytes(999)])
def test_other_files_with_zero_bytes_are_binary(content):
    with pytest.raises(BardletError, match=r"NUL at byte|not valid UTF-8"):
        read(content)


SEPARATORS = [r"\n", r"\n?<\|endoftext\|>\n?", r"(?<!\n)\n(?!\n)", re.escape("\n---\n"), "==+="]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["\n", "\n\n", "<|endoftext|>", "---", "a", "b c", "===", "é"]), max_size=30),
       st.sampled_from(SEPARATORS[:4]), st.integers(0, 99))
def test_documents_are_those_between_the_separators(parts, separator, seed):
    text, rng = "".join(parts), random.Random(seed)
    cuts = sorted(rng.choices(range(len(text) + 1), k=5))
    stream = (text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
    found: dict[str, str] = {}
    for location, block in blocks._documents(stream, Source(Path("a"), "a", separator=separator)):
        found[location] = found.get(location, "") + block
    assert list(found.values()) == re.split(separator, text)
    assert list(found) == [f"a, document {number}" for number in range(1, len(found) + 1)]


@pytest.mark.parametrize("in_memory", [1, 2_000, 1 << 24])
def test_a_list_is_ordered_by_hash_in_memory_and_on_disk(tmp_path, monkeypatch, in_memory):
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(blocks, "IN_MEMORY", in_memory)
    rng = random.Random(0)
    lines = ["".join(rng.choices("abcé\t", k=rng.randint(1, 9))) for _ in range(300)]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    source = Source(path, "list.txt", separator=r"\n", shuffled=True)
    read = list(blocks.read_text(source, lambda *_: None))
    assert [text for _, text in read] == sorted(lines, key=lambda line: hashlib.sha256(line.encode()).digest())
    assert all(lines[int(location.rpartition(" ")[2]) - 1] == text for location, text in read)


@settings(max_examples=100, deadline=None)
@given(st.text("ab\r\n,\"", max_size=40), st.integers(0, 99))
def test_lines_of_blocks_are_those_of_the_text(text, seed):
    cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=4))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert list(rows._split_lines(pieces, rows._ANY)) == list(io.StringIO(text, newline=""))
    assert list(rows._split_lines(pieces, rows._LF)) == io.StringIO(text, newline="\n").readlines()
