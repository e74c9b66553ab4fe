"""Records as conversations, and what is none of them named by its place."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from bardlet.data import records as examples
from bardlet.errors import BardletError

HELLO = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def found(*files: Path) -> examples.Examples:
    return examples.find([*map(str, files)])


def test_both_kinds_of_record_in_all_kinds_of_file(tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [HELLO] * 10 + [
        {"instruction": f"Add {n}", "input": "1 2" if n % 2 else "", "output": "3"} for n in range(11)]
    lines = "".join(json.dumps(value) + "\n" for value in values).encode()
    whole = json.dumps(values).encode()
    for name, content in (("a.jsonl", lines), ("a.jsonl.gz", gzip.compress(lines)), ("a.json", whole),
                          ("a.json.xz", lzma.compress(whole))):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        learned, held = found(tmp_path / name).conversations()
        assert (len(learned), len(held)) == (19, 2)
        assert held[0] == HELLO["messages"]
        assert learned[9] == [{"role": "user", "content": "Add 0"}, {"role": "assistant", "content": "3"}]
        assert learned[10][0]["content"] == "Add 1\n\n1 2"
    assert found(tmp_path / "a.jsonl", tmp_path / "a.json").name == "a-and-1"


@pytest.mark.parametrize(("name", "content", "what"), [
    ("a.jsonl", '{"messages": []}', "line 1: a conversation without a message"),
    ("a.jsonl", '\n{"messages": [{"role": "boss", "content": "x"}]}', "line 2: message 1: its role is 'boss'"),
    ("a.jsonl", '{"messages": "x"}', 'line 1: "messages" is a text, not a list'),
    ("a.jsonl", '{"text": "x"}', "nor prompt and answer, but 'text'"),
    ("a.jsonl", '{"instruction": "x", "output": ["y"]}', '"output" is a list, not a text'),
    ("a.jsonl", "[1]", "line 1: is a list, not an object"), ("a.jsonl", "{", "line 1: is not JSON"),
    ("a.jsonl", '{"instruction": "\\ud800", "output": "x"}', "half of a surrogate pair"),
    ("a.json", '{"a": 1}', "is an object, not a list"), ("a.json", "[3]", "record 1: is a number, not an object"),
    ("a.json", "[" * 100_000, "is not JSON"), ("a.jsonl", json.dumps(HELLO), "1 conversations are too few"),
    ("a.jsonl", "\0", "is NUL"),
])  # fmt: skip
def test_what_is_no_conversation_is_one_line(tmp_path: Path, name: str, content: str, what: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(BardletError) as error:
        found(tmp_path / name).conversations()
    assert what in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for file, what in ((tmp_path / "none.jsonl", "there is no such file"), (tmp_path, "is a folder")):
        with pytest.raises(BardletError, match=what):
            found(file)
    with pytest.raises(BardletError, match="nothing to learn from"):
        found()


def test_all_stages_hold_out_the_same_questions_whatever_else_a_message_has(tmp_path: Path) -> None:
    """Conversations, preferences and questions of one file; records that differ in what no model sees are one."""
    asked = [[{"role": "user", "content": f"{n % 30}?", "id": n}] for n in range(60)]
    records = [{"prompt": one, "chosen": "yes", "rejected": "no", "messages": [*one, HELLO["messages"][1]]}
               for one in asked]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    found_in = found(tmp_path / "a.jsonl")
    parts: list[tuple[set[str], set[str]]] = []
    for both in ([[one[:1] for one in part] for part in found_in.conversations()],
                 [[one.prompt for one in part] for part in found_in.preferences()],
                 [[one.prompt for one in part] for part in found_in.questions()]):  # fmt: skip
        learned, held = ({one[0]["content"] for one in part} for part in both)
        assert len(held) == 3 and len(learned) == 27 and not learned & held
        parts.append((learned, held))
    assert parts[0] == parts[1] == parts[2]


def test_a_misspelled_field_is_named() -> None:
    with pytest.raises(BardletError, match=r"message 1: has no content, but 'role', 'contents'"):
        examples.check([{"role": "user", "contents": "x"}])
