"""The notebooks: as written from their sources, and they run from top to bottom with tiny settings."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import notebook_runs
import pytest
from test_docs import load

from bardlet.errors import BardletError

ROOT = Path(__file__).parents[2]
writer = load(ROOT / "docs" / "notebooks.py", "bardlet_docs_notebooks")
Run = Callable[[str, str], list[Any]]
NAMES = sorted(path.stem for path in (ROOT / "notebooks" / "sources").glob("*.md"))


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    """Every notebook as its source gives it, by name."""
    return {path.stem: text for path, text in writer.notebooks().items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_notebook_is_the_one_that_its_source_gives(name: str, written: dict[str, str]) -> None:
    stored = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert stored == written[name], "run: python docs/notebooks.py"


def test_every_notebook_has_a_source() -> None:
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short text of the reader's."""
    folder = tmp_path_factory.mktemp("notebooks")
    lines = (f"the {n} little bards sang {n * n % 97} songs\n" for n in range(200))
    (folder / "my.txt").write_text("To be, or not to be\n" + "".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Iterator[Any]:
    """One kernel for all notebooks, in that folder."""
    kernel = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    kernel.start_kernel(cwd=str(folder))
    yield kernel
    kernel.shutdown_kernel(now=True)


@pytest.fixture
def run(folder: Path, kernel: Any) -> Callable[[str, str], list[Any]]:
    """Run a notebook of the project with these parameters; return its cells."""
    return lambda name, parameters: notebook_runs.run(ROOT / "notebooks" / f"{name}.ipynb", folder, parameters, kernel)


def test_the_lecture_runs(run: Run) -> None:
    cells = run("lecture", 'TEXT = "my.txt"\nSHARE = 0.001\nSAMPLE = 20')
    printed = notebook_runs.printed(cells)
    assert len(re.findall(r"validation loss \d\.\d{3}; uniform guessing has", printed)) == 7
    assert "7. LayerNorm" in printed and printed.count("no normal band") == 7
    assert len(notebook_runs.shown(cells, "image/png")) == 6, "the bigram's table, four of attention, the curves"


def test_a_model_of_your_own_text_trains_and_shows_itself(run: Run) -> None:
    """Progress, curve and table are inline: the bar with its curve, the run, the plot and the guesses."""
    tiny = {"steps": 10, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "compile": "off"}
    cells = run("own-text", f'TEXT = ["my.txt"]\nPROMPT = "To be"\nSETTINGS = {tiny}')
    html = notebook_runs.shown(cells, "text/html")
    assert any('<progress value="10" max="10"' in text and "<polyline" in text for text in html)
    assert any("runs/my-qwen3" in text and "data:image/png;base64," in text for text in html)
    assert len(notebook_runs.shown(cells, "image/png")) == 1
    guesses, runs = notebook_runs.shown(cells, "text/markdown")
    assert guesses.count("\n") == 1 + len("To be") - 1 + 12 - 1 and "%" in guesses
    assert "| runs/my-qwen3 | train | finished |" in runs
    assert re.search(r"validation split of my: \d\.\d{3} nats per character", notebook_runs.printed(cells))


def test_the_stages_of_a_chat_model_run(run: Run) -> None:
    steps = {"train": 2, "sft": 2, "reward": 2, "dpo": 2, "grpo": 2}
    cells = run("chat", f"STEPS = {steps}\nCHECKED = 2")
    printed = notebook_runs.printed(cells)
    assert len(re.findall(r"\d+% of the answers are right", printed)) == 3
    assert len(notebook_runs.shown(cells, "image/png")) == 1, "the rewards"
    [table] = notebook_runs.shown(cells, "text/markdown")
    assert table.startswith("| sum | sft | dpo | grpo |") and table.count("\n") == 4
