"""What a model copies: from its text, from its answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bardlet.cli import main
from bardlet.errors import BardletError
from bardlet.evaluation import memorization

ANSWER = "I sang of {} rivers until the morning came, and nobody in the village slept."
TINY = ["--batch-size", "8", "--compile", "off", "--dtype", "fp32"]
FAST = ["--lr", "0.01", "--muon-lr", "0.05"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen the same answer again and again."""
    folder = tmp_path_factory.mktemp("memorization")
    (folder / "text.txt").write_text("".join(f"{n} " + ANSWER.format("nine") + "\n" for n in range(300)),
                                     encoding="utf-8")
    assert main(["train", str(folder / "text.txt"), "--tokenizer", "char", "--n-layer", "2", "--n-head", "2",
                 "--n-embd", "32", "--block-size", "160", "--steps", "80", *FAST, *TINY, "--out",
                 str(folder / "base")]) == 0
    return folder / "base"


def test_a_model_that_repeats_its_text_is_found_out(base: Path) -> None:
    found = memorization.measure(base, 1000, 0.5, 0)
    assert found.own.share > 0.5 and sum(map(len, found.written)) >= 1000
    assert str(found).startswith(f"{found.own.share:.1%} of ") and "occur in the training text" in str(found)


def test_answers_are_compared_with_answers(base: Path, tmp_path: Path) -> None:
    """Held-out prompts; the questions themselves do not count."""
    rows = [{"prompt": f"What did you do in night {n}?", "response": ANSWER.format(n % 7)} for n in range(80)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["sft", str(base), str(tmp_path / "chats.jsonl"), "--steps", "100", *FAST, *TINY, "--out",
                 str(tmp_path / "run")]) == 0
    found = memorization.measure(tmp_path / "run", 100, 0.1, 0)
    assert found.source == "answers it was trained on" and 0 < len(found.written) <= len(found.held_out) == 8
    assert found.own.share > 0.5 and found.chance.share > 0.9
    assert not any("What did you" in text for text in found.held_out)


def test_what_has_no_text_is_one_sentence(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"n {n}", "chosen": "ab", "rejected": "cd"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"], "response": "ab"}) + "\n"
                                                  for row in rows), encoding="utf-8")
    assert main(["sft", str(base), str(tmp_path / "chats.jsonl"), "--steps", "2", *TINY, "--out",
                 str(tmp_path / "chat")]) == 0
    assert main(["dpo", str(tmp_path / "chat"), str(tmp_path / "pairs.jsonl"), "--steps", "2", *TINY, "--out",
                 str(tmp_path / "run")]) == 0
    with pytest.raises(BardletError, match="a model after dpo is not checked for memorization"):
        memorization.measure(tmp_path / "run", 10, 1.0, 0)
