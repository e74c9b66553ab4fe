"""The studio under what people and machines do to it: killed servers, large things, hostile names and texts."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from studio_page import TEXT, Page

from bardlet import models
from bardlet.cli import main
from bardlet.config.pretraining import TrainConfig
from bardlet.run import hf
from bardlet.run.metrics import read_metrics
from bardlet.tokenizer import train_char

pytestmark = pytest.mark.skipif(CHROMIUM is None or sys.platform == "win32", reason="needs Chromium")
KEY = "a-key-of-the-tests"
SHAPE = ["--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--block-size", "64", "--batch-size", "8", "--compile",
         "off"]
FRAME = 100
"""Milliseconds that the page may take between two frames."""
TAB = 300
"""MB of memory of the page's process."""


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield (process, address) of a server in a folder."""
    process = subprocess.Popen([sys.executable, "-m", "bardlet", "serve", "--port", str(port), "--json"], cwd=folder,
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "BARDLET_API_KEY": KEY})
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.communicate()


class Signed(Page):
    """A browser that signs in with the key."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url
        self.reload()

    def reload(self) -> None:
        """Open the page anew, and sign in if it asks for the key."""
        self.browser.open("about:blank", 1280, "light")
        self.browser.open(self.url, 1280, "light")
        self.until("globalThis.studio || !document.getElementById('sign-in').hidden")
        self.do(f"if (globalThis.studio) return true; document.getElementById('key').value = {KEY!r}; "
                "document.getElementById('sign-in').requestSubmit()")
        self.until("globalThis.studio")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile", loopback=True)
    yield browser
    browser.close()


def write_text(folder: Path) -> None:
    """Write a text where the studio keeps those that it was given."""
    files = folder / "runs" / ".studio" / "files"
    files.mkdir(parents=True)
    rng, words = random.Random(0), TEXT.replace(",", " ,").split()
    (files / "song.txt").write_text(" ".join(rng.choices(words, k=60_000)))  # long enough for the whole time


# ---------------------------------------------------------------- killed servers


def test_the_server_is_killed_twice_during_a_training(browser: Browser, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on, is found again, and its curve has no gap; a browser that was away sees all of it."""
    write_text(tmp_path)
    with serving(tmp_path) as (first, url):
        page = Signed(browser, url)
        page.do("fetch('/studio/jobs', {method: 'POST', headers: {'Content-Type': 'application/json'}, "
                "body: JSON.stringify({files: ['song.txt'], minutes: 0.7, name: 'song', seed: 5})})")
        page.until("tab.train?.view?.now?.step >= 10")
        first.send_signal(signal.SIGKILL)
        first.wait()
    port = int(url.rpartition(":")[2])
    with serving(tmp_path, port) as (second, _):
        page.reload()
        page.until("tab.train?.view?.now?.step >= 20")
        assert page.value("tab.train.job.state") == "running"
        second.send_signal(signal.SIGKILL)
        second.wait()
    time.sleep(1)
    run = tmp_path / "runs" / "song"
    with serving(tmp_path, port):
        page.reload()
        page.until("tab.train?.finished")
        assert page.value("tab.train.job.state") == "done"
        steps = [line["step"] for line in read_metrics(run) if line.get("train_loss") is not None]
        assert steps == sorted({*range(10, steps[-1], 10), steps[-1]}) and len(steps) > 2
        assert [x for x, _ in page.value("tab.train.view.chart.data.lines[0].points")] == steps
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", str(run / "run.toml"), "--out", str(tmp_path / "straight")]) == 0
    assert len({(folder / "model.safetensors").read_bytes() for folder in (run, tmp_path / "straight")}) == 1


# ---------------------------------------------------------------- large things


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "song.txt").write_text(TEXT)
    assert main(["train", str(folder / "song.txt"), "--steps", "30", "--out", str(folder / "run"), *SHAPE]) == 0
    return folder / "run"


def long_log(run: Path, lines: int) -> None:
    """Write a metrics.jsonl with many lines."""
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(10, 10 * lines + 1, 10):
            text = json.dumps({"step": step, "train_loss": 1 + 3 / (1 + step / 5000), "lr": 0.001})
            file.write(f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n')


OBSERVE = """globalThis.longest = 0;
new PerformanceObserver((list) => list.getEntries().forEach((each) => { longest = Math.max(longest, each.duration); }))
.observe({ entryTypes: ["longtask"] });
setTimeout(() => { const start = performance.now(); while (performance.now() - start < 120); })"""
"""Watch tasks of 50 ms or more, and do one."""


def observe(page: Page) -> None:
    """Begin to note the longest task of the page, once that is known to work."""
    page.do(OBSERVE)
    page.until("longest >= 120")
    page.do("globalThis.longest = 0")


def tab_memory(browser: Browser) -> float:
    """Return the memory of the page's process, in MB."""
    session, browser.session = browser.session, ""
    try:
        renderers = [each["id"] for each in browser("SystemInfo.getProcessInfo")["processInfo"]
                     if each["type"] == "renderer"]
    finally:
        browser.session = session
    sizes = []
    for pid in renderers:
        status = Path(f"/proc/{pid}/status").read_text()
        sizes.append(int(status.partition("RssAnon:")[2].split()[0]) / 1000)
    return max(sizes)


def drop(page: Page, file: Path) -> None:
    """Drop a file on the tab Train."""
    x, y = page.value("(({x, y, width, height}) => [x + width / 2, y + height / 2])"
                      "(document.querySelector('.drop').getBoundingClientRect())")
    data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.browser("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)


def test_large_logs_many_runs_and_a_large_text(browser: Browser, trained: Path, tmp_path: Path) -> None:
    for number in range(300):
        shutil.copytree(trained, tmp_path / "runs" / f"run-{number:03}", ignore=shutil.ignore_patterns("checkpoints"))
    long_log(tmp_path / "runs" / "run-007", 100_000)
    big = tmp_path / "big.txt"
    big.write_text("".join(f"line {i}: " + TEXT[i % 50 : i % 50 + 70] + "\n" for i in range(820_000)))
    assert big.stat().st_size > 60e6
    with serving(tmp_path) as (_, url):
        page = Signed(browser, url)
        observe(page)
        page.go("runs")
        page.until("tab.runs.rows.length === 300")
        page.do("studio.tabs.runs.filter.value = '007'; studio.tabs.runs.filter.dispatchEvent(new Event('input'))")
        page.click("run-007", "#panel-runs tbody")
        page.until("tab.runs.view?.now?.step === 1000000")
        points = page.value("tab.runs.view.chart.data.lines[0].points")
        assert points[0][0] == 10 and points[-1][0] == 1_000_000 and 700 < len(points) <= 1500
        page.do("studio.tabs.runs.filter.value = ''; studio.tabs.runs.filter.dispatchEvent(new Event('input'))")
        page.go("train")
        drop(page, big)
        page.until("tab.train.files.length === 1 && document.querySelector('#panel-train .preview')")
        assert page.value("tab.train.files[0].file.bytes") == big.stat().st_size
        longest, memory = page.value("longest"), tab_memory(browser)
    print(f"\nlongest task {longest:.0f} ms, memory of the tab {memory:.0f} MB")
    assert longest <= FRAME and memory <= TAB


def test_a_model_of_135_million_weights(browser: Browser, tmp_path: Path) -> None:
    """It writes, and shows its inside, while the page stays quick and small."""
    torch.manual_seed(0)
    tokenizer = train_char("".join(map(chr, range(32, 127))), separator=False)
    config = TrainConfig(n_layer=30, n_head=9, n_embd=576, block_size=512).resolved()
    model = models.build(config.model_config(tokenizer.vocab_size))
    folder = tmp_path / "runs" / "large"
    folder.mkdir(parents=True)
    hf.write_folder(folder, model, tokenizer)
    hf.write_weights(folder, model.hf_state_dict())
    with serving(tmp_path) as (_, url):
        page = Signed(browser, url)
        observe(page)
        page.go("write")
        page.until("tab.write.first.model.value === 'large'")
        page.do("studio.tabs.write.length.value = 40; studio.tabs.write.element.querySelector('form').requestSubmit()")
        page.until("tab.write.drafts.length && !tab.write.drafts[0].abort && tab.write.drafts[0].tokens.length === 40")
        page.go("inside")
        page.until("document.querySelector('#panel-inside select').value === 'large'")
        page.do("const area = document.querySelector('#panel-inside textarea'); area.value = 'The bards of a village'; "
                "document.querySelector('#panel-inside form').requestSubmit()")
        page.until("document.querySelectorAll('#panel-inside canvas').length >= 30 * 9")
        longest, memory = page.value("longest"), tab_memory(browser)
        assert page.errors(refusals=False) == []
    print(f"\nlongest task {longest:.0f} ms, memory of the tab {memory:.0f} MB")
    assert longest <= FRAME and memory <= TAB


# ---------------------------------------------------------------- hostile things


EVIL = "<img src=x onerror=hacked=1><script>hacked=2</script>"


def test_hostile_names_texts_and_outputs(browser: Browser, trained: Path, tmp_path: Path) -> None:
    """Nothing of them is run; they are shown as they are, or as codes."""
    name = "<img src=x onerror=hacked=3>"
    for each in (name, "esc\x1b[31mred", "\u202eright to left", "x" * 200):
        shutil.copytree(trained, tmp_path / "runs" / each)
    run = tmp_path / "runs" / name
    (run / "samples.jsonl").write_text(json.dumps({"step": 30, "text": EVIL + "w" * 1_000_000 + "\x1b[2J"}) + "\n")
    with serving(tmp_path) as (_, url):
        page = Signed(browser, url)
        page.go("runs")
        page.until("tab.runs.rows.length === 4")
        page.click(name, "#panel-runs tbody")
        page.until("document.querySelector('#panel-runs .sample')")
        page.click("Check its files and losses", "#panel-runs")
        page.until("document.querySelector('#panel-runs .findings')")
        assert page.value("document.querySelector('#panel-runs .sample').textContent").startswith(EVIL)
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        page.go("train")
        page.do(f"studio.tabs.train.pasted.value = {json.dumps(EVIL + TEXT)}")
        page.do("document.querySelectorAll('#panel-train details').forEach((each) => { each.open = true; })")
        page.click("Use this text", "#panel-train")
        page.until("tab.train.files.length === 1")
        page.do("studio.tabs.train.form.requestSubmit()")
        page.until("tab.train.job?.state === 'running'")
        page.click("Stop", "#panel-train")
        page.until("tab.train.job?.state !== 'running'")
        page.go("write")
        page.until("tab.write.first.model.options.length >= 4")
        page.do(f"studio.tabs.write.first.model.value = {json.dumps(name)}; "
                f"studio.tabs.write.prompt.value = {json.dumps('The <b>bards</b>')}; "
                "studio.tabs.write.element.querySelector('form').requestSubmit()")
        page.until("tab.write.drafts.length && !tab.write.drafts[0].abort")
        assert page.value("typeof hacked") == "undefined"
        assert page.value("document.querySelectorAll('img, iframe, object, main script').length") == 0
        assert page.errors(refusals=False) == []
