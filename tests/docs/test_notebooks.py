"""The notebooks: as written from their sources, and they run from top to bottom with tiny settings.

Their code runs in this process: a kernel costs as much again. tests/acceptance runs them in a kernel, at full size.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import notebook_runs
import pytest
from test_docs import load

from bardlet.errors import BardletError

ROOT = Path(__file__).parents[2]
writer = load(ROOT / "docs" / "notebooks.py", "bardlet_docs_notebooks")
NOTEBOOKS = ROOT / "notebooks"
NAMES = sorted(path.stem for path in (NOTEBOOKS / "sources").glob("*.md"))


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    """Every notebook as its source gives it, by name."""
    return {path.stem: text for path, text in writer.notebooks().items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_notebook_is_the_one_that_its_source_gives(name: str, written: dict[str, str]) -> None:
    stored = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert stored == written[name], "run: python docs/notebooks.py"


def test_every_notebook_has_a_source() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_has_no_outputs(name: str, written: dict[str, str]) -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = json.loads(written[name])
    nbformat.validate(notebook)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            ast.parse("".join(cell["source"]))


@pytest.mark.parametrize("name", NAMES)
def test_the_text_of_a_notebook_stands_alone(name: str, written: dict[str, str]) -> None:
    """No directive, no note of mkdocs, and no link into the course, which is elsewhere once it is built."""
    for cell in json.loads(written[name])["cells"]:
        text = "".join(cell["source"])
        assert not re.search(r"\{\{|type checker", text)
        if cell["cell_type"] == "markdown":
            assert not re.search(r"^(!!!|\?\?\?|~~~)|\]\((?!https://)", text, re.M), text


def test_every_adapted_sentence_is_in_a_page() -> None:
    pages = [" ".join(path.read_text(encoding="utf-8").split()) for path in (ROOT / "docs").rglob("*.md")]
    for sentence in writer.ADAPTED:
        assert any(sentence in page for page in pages), sentence


@pytest.mark.parametrize(("source", "message"), [
    ("{{ part: rungs/99-none.md | What }}\n", "docs/rungs/99-none.md does not exist"),
    ("{{ part: rungs/01-bigram.md | Whence }}\n", "has no section 'Whence'; choose from "),
    ("{{ listing: bardlet.training.losses.nothing }}\n", "there is no bardlet.training.losses.nothing"),
    ("{{ rung: 99 }}\n", "there is no rung 99"),
    ("{{ curve: 3 }}\n", "unknown directive"),
])  # fmt: skip
def test_a_bad_directive_is_an_error(source: str, message: str) -> None:
    with pytest.raises(BardletError, match=re.escape(message)):
        writer.notebook(source, "a.md", writer.Course.load(ROOT / "docs"))


# ---------------------------------------------------------------------------- they run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a short text of the reader's; figures are open until the test ends."""
    lines = (f"the {n} little bards sang {n * n % 97} songs\n" for n in range(200))
    (tmp_path / "my.txt").write_text("To be, or not to be\n" + "".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # agg shows nothing
        yield tmp_path
    plt.close("all")


def test_the_code_of_the_lecture_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook_runs.run_code(NOTEBOOKS / "lecture.ipynb", folder, 'TEXT = "my.txt"\nSHARE = 0.001\nSAMPLE = 20')
    printed = capsys.readouterr().out
    assert len(re.findall(r"validation loss \d\.\d{3}; uniform guessing has", printed)) == 7
    assert "7. LayerNorm" in printed and printed.count("no normal band") == 7
    assert len(plt.get_fignums()) == 6, "the bigram's table, four of attention, the curves"


def test_the_code_of_a_model_of_your_own_text_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("IPython")
    made = notebook_runs.run_code(NOTEBOOKS / "own-text.ipynb", folder, notebook_runs.OWN_TEXT)
    assert re.search(r"validation split of my: \d\.\d{3} nats per character", capsys.readouterr().out)
    assert len(plt.get_fignums()) == 1, "the curves"
    assert made["run"].record.steps == 10 and made["guesses"]("To be").data.count("\n") == 1 + len("To be") - 1


def test_the_code_of_the_chat_model_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("IPython")
    steps = {"train": 2, "sft": 2, "reward": 2, "dpo": 2, "grpo": 2}
    made = notebook_runs.run_code(NOTEBOOKS / "chat.ipynb", folder, f"STEPS = {steps}\nCHECKED = 2")
    assert len(re.findall(r"\d+% of the answers are right", capsys.readouterr().out)) == 3
    assert len(plt.get_fignums()) == 1, "the rewards"
    assert made["rows"][0] == "| sum | sft | dpo | grpo |" and len(made["rows"]) == 2 + 2 + 1
