"""Right attempts in many styles: no finding."""

from __future__ import annotations

from pathlib import Path

import pytest

from bardlet.ladder.check.examine import Report
from ladder.check.attempts import report
from ladder.check.mistakes import RIGHT

FILES = sorted(path.name for path in RIGHT.glob("*.py"))
SEEN = {
    "lecture.py": {"GPTLanguageModel", "Block"}, "fused.py": {"GPT", "TransformerBlock"},
    "einsum.py": {"CharLM", "Layer"},
    "parameters.py": {"MyTransformer", "DecoderLayer"}, "head_only.py": {"Head"}, "rotary.py": {"Llama", "Block"},
    "cross.py": {"EncoderBlock", "DecoderBlock"}, "bigram.py": {"BigramLanguageModel"}, "numbers.py": {"LM"},
    "concatenated.py": {"BigramLanguageModel"}, "torch_attention.py": {"TinyGPT", "Blk"}, "averaging.py": {"AverageLM"},
    "functions.py": {"Decoder", "DecoderLayer"}, "encoder_decoder.py": {"Seq2Seq", "EncoderBlock", "DecoderBlock"},
    "alibi.py": {"GPT", "Block"}, "own_softmax.py": {"Transformer", "Layer"}, "numbers_head.py": {"SelfAttentionHead"},
}
"""The classes that must have been tested."""
ATTENDS = {"lecture.py": "GPTLanguageModel", "fused.py": "GPT", "einsum.py": "CharLM", "parameters.py": "MyTransformer",
           "rotary.py": "Llama", "concatenated.py": "BigramLanguageModel", "numbers.py": "LM",
           "functions.py": "Decoder", "alibi.py": "GPT", "own_softmax.py": "Transformer"}


@pytest.mark.parametrize("file", FILES)
def test_there_is_no_finding(file: str, tmp_path: Path) -> None:
    """Nothing is untested, and every class of interest has been tested, not only built."""
    found = report((RIGHT / file).read_text(encoding="utf-8"), tmp_path)
    assert [finding.sentence() for finding in found.findings] == []
    assert not found.untested and found.passed.keys() >= SEEN[file], found
    if file in ATTENDS:
        assert {"attention", "positions", "no leak", "gradients"} <= set(found.passed[ATTENDS[file]]), found


def test_the_rung_is_guessed(tmp_path: Path) -> None:
    """From what a forward pass does, not from names."""
    rungs = {"bigram.py": 1, "averaging.py": 2, "head_only.py": 3, "concatenated.py": 4, "numbers.py": 5,
             "own_softmax.py": 7, "fused.py": 8}
    for file, rung in rungs.items():
        found: Report = report((RIGHT / file).read_text(encoding="utf-8"), tmp_path)
        assert (found.rung, found.guessed) == (rung, True), file
