"""Twelve forms of conversations and ten of preferences, 200 real records each: the ids of bardlet's own form.

Needs $BARDLET_DATA with alpaca and llamafactory-demo.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest
from data.test_forms import CONVERSATIONS, PREFERENCES, own, write

from bardlet import tokenizer as tokenization
from bardlet.data import chat_template, preferences

DATA = Path(os.environ.get("BARDLET_DATA", "none"))
pytestmark = pytest.mark.skipif(not (DATA / "alpaca").is_dir(), reason="BARDLET_DATA has no alpaca")


@pytest.fixture(scope="module")
def alpaca() -> list[tuple[str, str, str]]:
    """(question, context, answer) of 200 instructions, every second with a context."""
    with lzma.open(DATA / "alpaca" / "alpaca_data.json.xz", "rt", encoding="utf-8") as file:
        rows = [(row["instruction"], row["input"], row["output"]) for row in json.load(file) if row["output"].strip()]
    return [row for row in rows if row[1]][:100] + [row for row in rows if not row[1]][:100]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str, str, str]]:
    """(question, system message, chosen, rejected) of 200 preferences."""
    with gzip.open(DATA / "llamafactory-demo" / "dpo_en_demo.json.gz", "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = json.load(file)
    return [(row["conversations"][0]["value"], "Be brief." if n % 2 else "", row["chosen"]["value"],
             row["rejected"]["value"]) for n, row in enumerate(rows)
            if row["chosen"]["value"].strip() and row["rejected"]["value"].strip() != row["chosen"]["value"].strip()
            and "Human:" not in row["conversations"][0]["value"]][:200]


@pytest.fixture(scope="module")
def tokenizer(alpaca: list[tuple[str, str, str]]) -> tokenization.Tokenizer:
    return tokenization.train_bpe(["\n".join(row) for row in alpaca], 1000)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name: str, alpaca: list[tuple[str, str, str]], tokenizer: tokenization.Tokenizer,
                       tmp_path: Path) -> None:
    """Five records of each file are unusable, and counted exactly."""
    bad: list[Any] = [{"messages": []}, {"prompt": "x", "answer": ""}, {"text": "x"}, 3, {"prompt": "x"}]
    expected = write(tmp_path / "own.jsonl", [{"messages": own(*row)} for row in alpaca]).conversations()
    examples = write(tmp_path / "other.jsonl", [*bad, *(CONVERSATIONS[name][1](*row) for row in alpaca)])
    for part, own_part in zip(examples.conversations(), expected, strict=True):
        assert [chat_template.encode(tokenizer, messages)[0].tolist() for messages in part] == [
            chat_template.encode(tokenizer, messages)[0].tolist() for messages in own_part]
    assert (examples.report.total, examples.report.unusable) == (205, 5)


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name: str, pairs: list[tuple[str, str, str, str]], tokenizer: tokenization.Tokenizer,
                     tmp_path: Path) -> None:
    bad: list[Any] = [{"prompt": "x", "chosen": "y", "rejected": "y"}, {"prompt": "x", "chosen": "y"}, [1]]
    expected = write(tmp_path / "own.jsonl", [{"prompt": own(q, "", a, s)[:-1], "chosen": a.strip() if "hh" in name
                                               else a, "rejected": b.strip() if "hh" in name else b}
                                              for q, s, a, b in pairs]).preferences()
    examples = write(tmp_path / "other.jsonl", [*bad, *(PREFERENCES[name][1](*row) for row in pairs)])
    for part, own_part in zip(examples.preferences(), expected, strict=True):
        for side in preferences.SIDES:
            ids, own_ids = (preferences.encode_side(tokenizer, each, side).tokens.tolist() for each in (part, own_part))
            assert ids == own_ids
    assert (examples.report.total, examples.report.unusable) == (203, 3)
