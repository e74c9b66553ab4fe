"""check accepts the course's own files, which follow no convention of check."""

from __future__ import annotations

from pathlib import Path

import pytest

from ladder.check.attempts import report

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.py"))
SEEN = {"bigram.py": {"Bigram"}, "gpt.py": {"GPT", "Block"}, "gpt_modern.py": {"GPT", "Block"},
        "chatgpt.py": {"GPT", "Block"}, "encdec.py": {"EncoderDecoder", "Block"}}
"""Classes that must have been tested."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_accepted(path: Path, tmp_path: Path) -> None:
    """No finding, and nothing untested: exit code 0."""
    found = report(path.read_text(encoding="utf-8"), tmp_path)
    assert [finding.sentence() for finding in found.findings] == []
    assert not found.untested and found.passed.keys() >= SEEN[path.name], found


VOCABULARY = """
import torch, torch.nn as nn
CHARS = "0123456789+="
class Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding({rows}, 16), nn.Linear(16, {out})
    def forward(self, idx):
        return self.head(self.table(idx))
"""


def test_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    """A model of twelve characters gets no others, in training, too; a table of another length is still an error."""
    right = VOCABULARY.replace("{rows}", "len(CHARS)").replace("{out}", "len(CHARS)")
    found = report(right, tmp_path, until=float("inf"))
    assert found.findings == [] and not found.untested and "gradients" in found.passed["Bigram"]
    assert any(each.startswith("200 steps: loss") for each in found.passed["Bigram"])
    found = report(right.replace("nn.Embedding(len(CHARS)", "nn.Embedding(len(CHARS) - 1"), tmp_path)
    assert found.untested["Bigram"].startswith("its forward raises IndexError at attempt.py:9: ")


def test_a_size_that_depends_on_a_text(tmp_path: Path) -> None:
    """check reads no text, so V = len(alphabet) fails; it has check's own value."""
    code = VOCABULARY.replace("{rows}", "V").replace("{out}", "V")
    code = code.replace('CHARS = "0123456789+="', 'alphabet = sorted(set(open("my.txt").read()))\nV = len(alphabet)')
    found = report(code, tmp_path)
    assert found.findings == [] and not found.untested and "gradients" in found.passed["Bigram"]


def test_there_are_five() -> None:
    """Each with its classes above."""
    assert {path.name for path in EXAMPLES} == SEEN.keys()
