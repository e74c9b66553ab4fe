"""The API in a Jupyter kernel: a run, an error, and an interrupted run that is saved."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

SETTINGS = "n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, compile='off'"


class Notebook:
    """A kernel that runs cells in a folder."""

    def __init__(self, folder: Path) -> None:
        self.manager, self.client = client.manager.start_new_kernel(cwd=str(folder), startup_timeout=300)

    def start(self, code: str) -> str:
        """Send a cell; return its id."""
        return str(self.client.execute(code))

    def output(self, cell: str, until: str | None = None) -> str:
        """Return what a cell printed, with the error that ended it; with `until`, as soon as that text is printed."""
        text = ""
        while True:
            message: dict[str, Any] = self.client.get_iopub_msg(timeout=300)
            if message["parent_header"].get("msg_id") != cell:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                text += content["text"]
            elif message["msg_type"] in ("display_data", "update_display_data"):
                text += content["data"]["text/plain"] + "\n"
            elif message["msg_type"] == "error":
                text += f"{content['ename']}: {content['evalue']}\n"
            if (until and until in text) or (message["msg_type"] == "status" and content["execution_state"] == "idle"):
                return text

    def run(self, code: str) -> str:
        """Run a cell to its end and return its output."""
        return self.output(self.start(code))


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "my.txt").write_text("To be, or not to be, that is the question:\n" * 60, encoding="utf-8")
    notebook = Notebook(folder)
    yield notebook
    notebook.client.stop_channels()
    notebook.manager.shutdown_kernel(now=True)


def test_a_cell_trains_and_generates(notebook: Notebook) -> None:
    output = notebook.run(f"import bardlet\nrun = bardlet.train('my.txt', steps=5, out='run', {SETTINGS})\n"
                          "print(run.folder, run.record.steps)\n"
                          "print('LENGTH', len(run.model.generate('To', max_new_tokens=9, seed=1)))")
    assert "run 5" in output and "LENGTH 9" in output and "Error" not in output


def test_an_error_is_one_line(notebook: Notebook) -> None:
    output = notebook.run("import bardlet\nbardlet.train('my.txt', stepz=5)")
    assert "BardletError: bardlet.train: unknown setting 'stepz'; did you mean 'steps'?" in output


def test_an_interrupted_run_is_saved_and_continues(notebook: Notebook) -> None:
    cell = notebook.start("import bardlet\n"
                          f"bardlet.train('my.txt', steps=100_000, out='long', eval_every=5, {SETTINGS})")
    notebook.output(cell, until="val ")
    notebook.manager.interrupt_kernel()
    output = notebook.output(cell)
    step = re.search(r"stopped after step (\d+), and saved; continue with `bardlet resume long`", output)
    assert step, output
    output = notebook.run(f"run = bardlet.resume('long', steps={int(step[1]) + 2}, allow_change=True)\n"
                          "print('DONE', run.record.steps)")
    assert f"DONE {int(step[1]) + 2}" in output, output


def test_the_progress_is_one_bar_that_changes(notebook: Notebook) -> None:
    """And figures of the reader's own still appear: training leaves pyplot alone."""
    notebook.run("import bardlet")
    cell, kinds = notebook.start(f"bardlet.train('my.txt', steps=20, out='bar', eval_every=2, {SETTINGS})\n"
                                 "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"), []
    while True:
        message: dict[str, Any] = notebook.client.get_iopub_msg(timeout=300)
        if message["parent_header"].get("msg_id") == cell:
            kinds += [message["msg_type"], *message["content"].get("data", {})]
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
    assert kinds.count("update_display_data") >= 9 and "image/png" in kinds
    assert kinds.count("display_data") == 2, "the bar and the figure"


def test_a_run_shows_itself(notebook: Notebook) -> None:
    output = notebook.run(f"import bardlet\nrun = bardlet.train('my.txt', steps=5, out='a<b', {SETTINGS})\n"
                          "html = run._repr_html_()\n"
                          "print('SHOWN', 'a&lt;b' in html, '<b>a<b' in html, 'data:image/png;base64,' in html)\n"
                          "print('METRICS', [line['step'] for line in run.metrics if 'train_loss' in line][-1])")
    assert "SHOWN True False True" in output and "METRICS 5" in output, output
