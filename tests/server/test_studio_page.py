"""The studio in a real browser: a text is pasted, trained, and written with, by the page alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from conftest import TINY
from studio_page import TEXT, Page

from bardlet.cli import main
from bardlet.run.metrics import read_metrics

pytestmark = pytest.mark.skipif(CHROMIUM is None or sys.platform == "win32", reason="needs Chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Page]:
    process = subprocess.Popen([sys.executable, "-m", "bardlet", "serve", "--port", "0", "--json"], cwd=folder,
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    browser = Browser(folder / "profile", loopback=True)
    try:
        assert process.stdout is not None
        yield Page(browser, json.loads(process.stdout.readline())["link"])
    finally:
        browser.close()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def run(page: Page, folder: Path) -> Path:
    """A run that the page trained, from a text that was pasted."""
    page.go("train")
    page.do(f"studio.tabs.train.pasted.value = {json.dumps(TEXT)}")
    page.do("document.querySelectorAll('#panel-train details').forEach((each) => { each.open = true; })")
    page.click("Use this text", "#panel-train")
    page.until("tab.train.files.length === 1")
    page.until("document.querySelector('.preview')")
    assert TEXT[:100] in page.value("document.querySelector('.preview').textContent")
    page.do("const { minutes, name } = studio.tabs.train; minutes.min = 0.1; minutes.value = 0.1; name.value = 'song'")
    page.do("studio.tabs.train.form.requestSubmit()")
    page.until("tab.train.job?.state === 'done' && tab.train.finished")
    return folder / "runs" / "song"


def test_what_the_page_shows_of_a_training(page: Page, run: Path) -> None:
    """The curve has the points of metrics.jsonl, the samples are those of the run."""
    lines = read_metrics(run)
    factor = page.value("tab.train.view.now.per_token")
    for number, name in enumerate(("train_loss", "val_loss")):
        points = page.value(f"tab.train.view.chart.data.lines[{number}].points")
        assert points == [[line["step"], line[name] / factor] for line in lines if line.get(name) is not None]
    samples = [json.loads(line)["text"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert page.value("document.querySelector('#panel-train .sample').textContent") == samples[-1]
    assert page.value("document.querySelectorAll('#panel-train .chart path').length") == 2
    command = page.value("document.querySelector('#panel-train article .command code').textContent")
    assert command.startswith("bardlet train runs/.studio/files/") and "--minutes 0.1" in command


def test_the_loss_it_shows_is_what_eval_computes(page: Page, folder: Path, run: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose evaluations read the whole held-out text: the loss in its card, and the lowest point of the curve."""
    (folder / "song.txt").write_text(TEXT)
    counted = folder / "runs" / "counted"
    assert main(["train", str(folder / "song.txt"), "--out", str(counted), *TINY, "--steps", "12", "--eval-every",
                 "4"]) == 0
    capsys.readouterr()
    assert main(["eval", str(counted), "--json"]) == 0
    computed = json.loads(capsys.readouterr().out.splitlines()[-1])["nats_per_char"]
    page.go("runs")
    page.click("counted", "#panel-runs tbody")
    page.until("tab.runs.view?.now?.points")
    assert f"held-out loss {computed:.4f} nats per character" in page.value("tab.runs.view.facts.textContent")
    lowest = page.value("Math.min(...tab.runs.view.chart.data.lines[1].points.map(([, y]) => y))")
    assert lowest == pytest.approx(computed, abs=1e-6)
    shutil.rmtree(counted)
    page.until("tab.runs.rows.length === 1")
    page.go("train")


def test_what_it_writes_is_what_sample_writes(page: Page, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.click("Write with it", "#panel-train")
    page.until("tab.write?.first.model.value === 'song'")
    page.do("const { write } = studio.tabs; write.seed.value = 7; write.length.value = 60; "
            "write.prompt.value = 'The bards'; write.element.querySelector('form').requestSubmit()")
    page.until("tab.write.drafts.length && !tab.write.drafts[0].abort && tab.write.drafts[0].tokens.length === 60")
    text = page.value("tab.write.drafts[0].text")
    capsys.readouterr()
    assert main(["sample", str(run), "--prompt", "The bards", "--tokens", "60", "--temperature", "0.8", "--top-k",
                 "none", "--seed", "7", "--json"]) == 0
    assert [text] == json.loads(capsys.readouterr().out.splitlines()[-1])["completions"]
    assert page.value("document.querySelector('#panel-write .tokens').textContent") == text


def test_another_token_is_chosen(page: Page, run: Path) -> None:
    """What comes before it stays; the text goes on after it."""
    before = page.value("tab.write.drafts[0].tokens.slice(0, 10).map(({ text }) => text).join('')")
    page.do("studio.tabs.write.drafts[0].list.select(10)")
    other = page.value("tab.write.drafts[0].tokens[10].likeliest[3].name")
    page.do("document.querySelectorAll('#panel-write .alternatives button')[3].click()")
    page.until("!tab.write.drafts[0].abort && tab.write.drafts[0].tokens.length === 60")
    assert page.value("tab.write.drafts[0].text").startswith(before + other)


def test_a_run_is_deleted_and_brought_back(page: Page, run: Path) -> None:
    page.go("runs")
    page.until("tab.runs.rows.length === 1")
    page.click("song", "#panel-runs tbody")
    page.click("Delete", "#panel-runs")
    page.until("tab.runs.rows.length === 0")
    assert not run.exists()
    page.click("Undo", "#toasts")
    page.until("tab.runs.rows.length === 1")
    assert (run / "model.safetensors").is_file()


def test_the_browser_had_no_complaint(page: Page, run: Path) -> None:
    assert page.errors() == []
