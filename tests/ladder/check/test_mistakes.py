"""Each mistake is called by its name, and nothing else is said. `make accept` tests each in several styles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bardlet.ladder.check.mistakes import EXPLAINS, MISTAKES, Finding
from ladder.check.attempts import report
from ladder.check.mistakes import CHANGES, changed, one_of_each

TRAINED = ("does-not-learn",)
"""Mistakes that only training shows."""
CASES = [pytest.param(file, name, pairs, id=f"{file.removesuffix('.py')}-{name}-{number}")
         for number, (file, name, *pairs) in enumerate(one_of_each())]


@pytest.mark.parametrize(("file", "name", "pairs"), CASES)
def test_a_mistake_is_named(file: str, name: str, pairs: list[str], tmp_path: Path) -> None:
    """A right attempt with one change has one finding."""
    until = float("inf") if name in TRAINED else 0.0
    found = report(changed(file, *pairs), tmp_path, until=until)
    assert {finding.name for finding in found.findings} == {name}, found


def test_every_mistake_of_the_table_is_tested() -> None:
    """Except those that are tested on their own below, and those of exercises (test_exercises.py)."""
    own = {"leak", "shape", "not-a-number", "wrong-loss", "mixes-positions", "same-output", "exercise"}
    assert {name for _, name, *_ in CHANGES} | own == set(MISTAKES)


OTHERS = [
    ("lecture.py", "leak", "        x = self.ln_f(x)\n", "        x = self.ln_f(x) + x.mean(1, keepdim=True)\n"),
    ("lecture.py", "wrong-loss", "targets.view(B * T))", 'targets.view(B * T), reduction="sum")'),
    ("lecture.py", "mixes-positions", "        return self.net(x)\n",
     "        return self.net(x + x.mean(1, keepdim=True))\n"),
    ("lecture.py", "same-output", "        logits = self.lm_head(x)\n",
     "        logits = self.lm_head(torch.zeros_like(x).detach() + 0 * x)\n"),
    ("concatenated.py", "not-a-number", "        logits = self.lm_head(x)\n",
     "        logits = self.lm_head(x).log()\n"),
    ("cross.py", "shape", "(self.drop(weights) @ v).transpose(1, 2).flatten(2)",
     "(self.drop(weights.transpose(-1, -2)) @ q).transpose(1, 2).flatten(2)"),
]


@pytest.mark.parametrize(("file", "name", "old", "new"), OTHERS, ids=[name for _, name, *_ in OTHERS])
def test_other_findings(file: str, name: str, old: str, new: str, tmp_path: Path) -> None:
    """A mistake without a name of its own is described."""
    found = report(changed(file, old, new), tmp_path)
    assert name in {finding.name for finding in found.findings}, found


def test_the_leaking_position_is_shown(tmp_path: Path) -> None:
    """A later position, and the earlier one that it changes."""
    old, new = OTHERS[0][2:]
    [finding] = report(changed("lecture.py", old, new), tmp_path).findings
    assert finding.detail == "position 0 changes when position 12 does"


NORM = ("nn.LayerNorm(n_embd)", "nn.Identity()")
ONE = [
    ("rotary.py", "mask-side", "torch.triu(", "torch.tril("),
    ("encoder_decoder.py", "ignores-source", "self.ca(self.n2(x), enc)", "self.ca(self.n2(x), x)"),
    ("lecture.py", "mask-side", "self.tril[:T, :T] == 0", "torch.tril(torch.ones(T, T), diagonal=1) == 1"),
    ("lecture.py", "double-residual", *NORM, *NORM, *NORM, "x = x + self.sa(", "x = x + x + self.sa(",
     "x = x + self.ffwd(", "x = x + x + self.ffwd("),
    ("lecture.py", "no-sum", *NORM, *NORM, *NORM, "F.softmax(wei, dim=-1)", "(wei + 5).exp()")]
"""Mistakes with consequences that check would also report."""


@pytest.mark.parametrize(("file", "name", "pairs"), [(file, name, pairs) for file, name, *pairs in ONE])
def test_a_mistake_explains_its_consequences(file: str, name: str, pairs: list[str], tmp_path: Path) -> None:
    """A mask without a visible key gives no gradient, and a path that doubles gives a high loss at the start."""
    found = report(changed(file, *pairs), tmp_path)
    assert {finding.name for finding in found.findings} == {name}, found
    assert not any("a test of it raises" in reason for reason in found.untested.values()), found


def test_a_finding_is_one_sentence_with_the_minute_and_the_page() -> None:
    """Also with a detail."""
    said = Finding("no-scale", "Head", "here sqrt(16)").sentence()
    assert said == ("Head: The scores are not divided by the square root of the head size, here sqrt(16). "
                    "Lecture 1:16:56; course: page 3, One head of self-attention.")
    for mistake in MISTAKES.values():
        assert mistake.text.endswith(".") and mistake.text.count(". ") == 0


def test_the_pages_exist() -> None:
    """The page that a finding names is a page of the course."""
    docs = Path(__file__).parents[3] / "docs"
    titles = {path.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")
              for path in (*docs.glob("rungs/*.md"), docs / "encoder-decoder.md")}
    pages = {mistake.page.replace(", ", ". ", 1) for name, mistake in MISTAKES.items() if name != "exercise"}
    assert pages <= titles


def test_explained_findings_are_in_the_table() -> None:
    """A misspelled name would explain nothing."""
    assert EXPLAINS.keys() | set().union(*EXPLAINS.values()) <= MISTAKES.keys()


def test_a_lower_rung_has_no_residual_path(tmp_path: Path) -> None:
    """Rung 5 comes before residual connections: a block without them is right there."""
    code = changed("lecture.py", "x = x + self.sa(self.ln1(x))", "x = self.sa(self.ln1(x))")
    assert report(code, tmp_path, rung=5).findings == []


def test_a_factor_on_the_residual_path_is_no_norm(tmp_path: Path) -> None:
    """0.7 x + sa(x) may be meant so; it is not post-norm."""
    code = changed("lecture.py", "x = x + self.sa(self.ln1(x))", "x = 0.7 * x + self.sa(self.ln1(x))")
    assert report(code, tmp_path).findings == []


def test_one_class_is_tested_alone(tmp_path: Path) -> None:
    """As in FILE:Head."""
    code = changed("lecture.py", " * k.shape[-1] ** -0.5", "")
    found = report(code, tmp_path, name="Head")
    assert [(finding.name, finding.where) for finding in found.findings] == [("no-scale", "Head")]
    assert report(code, tmp_path, name="FeedForward").findings == []


def test_a_notebook(tmp_path: Path) -> None:
    """Its code cells are joined, without commands of the shell."""
    from bardlet.ladder.check.source import read

    code = changed("head_only.py", "torch.tril(", "torch.triu(")
    cells = [{"cell_type": "markdown", "source": ["# Title"]},
             {"cell_type": "code", "source": ["!pip install torch\n"]},
             {"cell_type": "code", "source": ["%%time\n", "x = 1\n"]},
             {"cell_type": "code", "source": code.splitlines(keepends=True)}]
    (tmp_path / "book.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert list(read(tmp_path / "book.ipynb").classes) == ["Head"]
