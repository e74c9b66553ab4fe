"""An error in the learner's code is one sentence with the line in which it arose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bardlet.ladder.check.source import read
from bardlet.ladder.exercises.table import BY_NAME
from ladder.check.attempts import judged, report
from ladder.check.mistakes import changed

HEAD = """import torch.nn as nn
class Head(nn.Module):
    def __init__(self, n_embd, head_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size)

    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        return self.key(x) @ x
"""


def test_in_a_forward_pass(tmp_path: Path) -> None:
    """The innermost line of the file, not the one in PyTorch."""
    found = report(HEAD, tmp_path)
    assert found.untested["Head"].startswith("its forward raises RuntimeError at attempt.py:11: ")
    assert "\n" not in found.untested["Head"]


def test_in_a_constructor(tmp_path: Path) -> None:
    """And in a class that cannot be defined."""
    found = report(HEAD.replace("head_size)\n\n", "head_size, bias=1 / 0)\n\n"), tmp_path)
    assert found.untested["Head"] == "its constructor raises ZeroDivisionError at attempt.py:5: division by zero"
    with pytest.raises(Exception, match=r"\(Head: NameError at attempt.py:2: name 'missing' is not defined\)"):
        report(HEAD.replace("nn.Module", "missing"), tmp_path)


def test_a_constructor_that_forgets_its_parent(tmp_path: Path) -> None:
    """The reason is the missing call, not an attribute of PyTorch's."""
    code = "import torch.nn as nn\nclass Head(nn.Module):\n    def __init__(self, n_embd):\n        pass\n"
    assert report(code, tmp_path).untested["Head"] == "its constructor does not call super().__init__()"


def test_without_a_message(tmp_path: Path) -> None:
    """No colon is left at the end."""
    found = report(HEAD.replace("return self.helper(x)", "raise NotImplementedError"), tmp_path)
    assert found.untested["Head"] == "its forward raises NotImplementedError at attempt.py:8"


def test_in_generation(tmp_path: Path) -> None:
    """The model itself runs."""
    found = report(changed("bigram.py", "logits[:, -1, :]", "logits[:, -1, :] + missing"), tmp_path)
    [said] = [reason for where, reason in found.untested.items() if where.endswith(".generate")]
    code = changed("bigram.py", "logits[:, -1, :]", "logits[:, -1, :] + missing").splitlines()
    line = next(i for i, text in enumerate(code, start=1) if "missing" in text)
    assert said == f"for a context of 5 tokens it raises NameError at attempt.py:{line}: name 'missing' is not defined"


def test_in_an_exercise(tmp_path: Path) -> None:
    """The finding has the line, too."""
    answer = Path(__file__).parents[3] / "docs" / "exercises" / "answers" / "13_average.py"
    code = answer.read_text(encoding="utf-8").replace("    for name", "    missing\n    for name", 1)
    line = code[: code.index("    missing")].count("\n") + 1
    [finding] = judged(code, tmp_path, BY_NAME["average"]).findings
    assert finding.detail.startswith(f"it raises NameError at attempt.py:{line}: name 'missing' is not defined")


def test_in_a_notebook(tmp_path: Path) -> None:
    """The code cell, and the line there."""
    cells = [{"cell_type": "markdown", "source": ["# Title"]}, {"cell_type": "code", "source": ["%%time\n", "x = 1\n"]},
             {"cell_type": "code", "source": ["x = 1\n", "y = 2"]},
             {"cell_type": "code", "source": HEAD.splitlines(keepends=True)}]
    path = tmp_path / "book.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    source = read(path)
    assert [source.place(line) for line in (1, 2, 3, 13)] == [
        "book.ipynb, code cell 2, line 1", "book.ipynb, code cell 2, line 2", "book.ipynb, code cell 3, line 1",
        "book.ipynb, code cell 3, line 11"]


def test_in_a_file_beside_it(tmp_path: Path) -> None:
    """The name of that file."""
    (tmp_path / "parts_of_mine.py").write_text("def helper(x):\n    return x.missing\n", encoding="utf-8")
    code = HEAD.replace("import torch", "from parts_of_mine import helper\nimport torch", 1)
    found = report(code.replace("self.helper(x)", "helper(x)", 1), tmp_path)
    assert found.untested["Head"].startswith("its forward raises AttributeError at parts_of_mine.py:2: ")
