"""Records as conversations and preferences, and errors that name the place of an invalid one."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from bardlet.data import records
from bardlet.errors import BardletError

HELLO = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def find(*files: Path) -> records.Examples:
    return records.find([*map(str, files)])


def test_both_kinds_of_conversation_in_all_kinds_of_file(tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [HELLO] * 10 + [
        {"instruction": f"Add {n}", "input": "1 2" if n % 2 else "", "output": "3"} for n in range(11)]
    lines = "".join(json.dumps(value) + "\n" for value in values).encode()
    whole = json.dumps(values).encode()
    for name, content in (("a.jsonl", lines), ("a.jsonl.gz", gzip.compress(lines)), ("a.json", whole),
                          ("a.json.xz", lzma.compress(whole))):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        train, val = find(tmp_path / name).conversations()
        assert (len(train), len(val)) == (19, 2)
        assert val[0] == HELLO["messages"]
        assert train[9] == [{"role": "user", "content": "Add 0"}, {"role": "assistant", "content": "3"}]
        assert train[10][0]["content"] == "Add 1\n\n1 2"
    assert find(tmp_path / "a.jsonl", tmp_path / "a.json").name == "a-and-1"


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("a.jsonl", '{"messages": []}', 'line 1: its "messages" is empty'),
    ("a.jsonl", '\n{"messages": [{"role": "boss", "content": "x"}]}', "line 2: message 1: its role is 'boss'"),
    ("a.jsonl", '{"messages": "x"}', 'line 1: has no answer'),
    ("a.jsonl", '{"text": "x"}', "or a prompt and an answer, but has 'text'"),
    ("a.jsonl", '{"instruction": "x", "output": ["y"]}', "message 1 is a string, not an object"),
    ("a.jsonl", "[1]", "record 1: is a number, not an object"), ("a.jsonl", "{", "line 1: is not JSON"),
    ("a.jsonl", '{"instruction": "\\ud800", "output": "x"}', "half of a surrogate pair"),
    ("a.json", '{"a": 1}', "has no conversation"), ("a.json", "[3]", "record 1: is a number, not an object"),
    ("a.json", "[" * 100_000, "is not JSON"), ("a.jsonl", json.dumps(HELLO), "1 conversation is too few"),
    ("a.jsonl", "\0", "NUL: this is binary"),
])  # fmt: skip
def test_an_invalid_conversation_is_one_line(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(BardletError) as error:
        find(tmp_path / name).conversations()
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    for file, expected in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(BardletError, match=expected):
            find(file)
    with pytest.raises(BardletError, match="no training data"):
        find()


def test_all_stages_hold_out_the_same_prompts(tmp_path: Path) -> None:
    """Conversations, preferences and questions split alike; fields that the model never sees make no difference."""
    prompts = [[{"role": "user", "content": f"{n % 30}?", "id": n}] for n in range(60)]
    values = [{"prompt": prompt, "chosen": "yes", "rejected": "no", "messages": [*prompt, HELLO["messages"][1]]}
              for prompt in prompts]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    examples = find(tmp_path / "a.jsonl")
    parts: list[tuple[set[str], set[str]]] = []
    for both in ([[messages[:1] for messages in part] for part in examples.conversations()],
                 [[preference.prompt for preference in part] for part in examples.preferences()],
                 [[question.prompt for question in part] for part in examples.questions()]):  # fmt: skip
        train, val = ({prompt[0]["content"] for prompt in part} for part in both)
        assert len(val) == 3 and len(train) == 27 and not train & val
        parts.append((train, val))
    assert parts[0] == parts[1] == parts[2]


def test_a_misspelled_field_is_named() -> None:
    with pytest.raises(BardletError, match=r"message 1: has no content, only 'role', 'contents'"):
        records.check([{"role": "user", "contents": "x"}])
