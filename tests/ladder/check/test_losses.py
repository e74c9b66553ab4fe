"""A loss that check cannot compare is a note, never `ok`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ladder.check.attempts import report
from ladder.check.mistakes import changed

OPTIONS = {"ignore_index": "ignore_index=0", "label_smoothing": "label_smoothing=0.1",
           "weight": "weight=torch.linspace(0.5, 2.0, C)"}
FUNCTION = """
def compute_loss(model, x, y):
    logits, _ = model(x)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1){option})
"""
LOSS = """        if targets is None:
            return logits, None
        B, T, C = logits.shape
        loss = F.cross_entropy(logits.view(B * T, C), targets.view(B * T))
        return logits, loss
"""


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_a_loss_with_an_option_is_not_tested(option: str, tmp_path: Path) -> None:
    """Neither ok nor a finding; the note says why."""
    found = report(changed("lecture.py", "targets.view(B * T))", f"targets.view(B * T), {option})"), tmp_path)
    assert found.findings == [] and not found.untested and "loss" not in found.passed["GPTLanguageModel"]
    [note] = [each for each in found.notes if "loss" in each]
    assert note.startswith("GPTLanguageModel: its loss is not tested: it is ") and "ignore_index" in note
    assert len(note) < 200


def test_no_loss_is_not_ok(tmp_path: Path) -> None:
    """A model that takes targets and returns no loss."""
    code = changed("lecture.py", LOSS, "        return logits, None\n")
    found = report(code, tmp_path)
    assert "loss" not in found.passed["GPTLanguageModel"]
    assert "GPTLanguageModel: its loss is not tested: it returns none with targets" in found.notes


@pytest.mark.parametrize(("option", "notes"), [("", 0), (", label_smoothing=0.1", 1)])
def test_a_function_for_the_loss(option: str, notes: int, tmp_path: Path) -> None:
    """The same for a loss outside the model."""
    code = changed("lecture.py", LOSS, "        return logits, None\n", "idx, targets=None):", "idx):")
    found = report(code + FUNCTION.replace("{option}", option), tmp_path)
    assert found.findings == [] and len([each for each in found.notes if "its loss is not tested" in each]) == notes


def test_training_compares_the_cross_entropy(tmp_path: Path) -> None:
    """Label smoothing adds to the loss, and is no sign of a model that does not learn."""
    [call] = [line for line in changed("bigram.py").splitlines() if "F.cross_entropy(" in line]
    code = changed("bigram.py", call, f"{call.rstrip()[:-1]}, label_smoothing=0.5)")
    found = report(code, tmp_path, until=float("inf"))
    [steps] = [each for each in found.passed["BigramLanguageModel"] if each.startswith("200 steps")]
    assert found.findings == [] and "later" not in steps
    assert any("its loss is not tested" in each for each in found.notes)
