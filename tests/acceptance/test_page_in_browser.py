"""An exported page in a real browser, from the disk and without a network: writing, chat, translation, every view.

BARDLET_SCREENSHOTS=FOLDER saves screenshots. BARDLET_AXE=FILE names axe.min.js (npm: axe-core), which then checks the
page. BARDLET_PAGE=FILE tests a page of your own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, CONTRAST, MEASURE, Browser
from export.test_page import TEXT, greedy, model_of

from bardlet import tokenizer as tk
from bardlet.data import chat_template
from bardlet.export import html

pytestmark = pytest.mark.skipif(CHROMIUM is None or os.name == "nt", reason="no Chromium on the path")
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
FILL = "var fill = (id, value) => { document.getElementById(id).value = value; };"
HOSTILE = "</script><img src=x onerror=alert(1)> \u202edlrow"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


def page(folder: Path, mode: str) -> Path:
    """Write a page with random weights; BARDLET_PAGE replaces the one that writes."""
    if mode == "write" and os.environ.get("BARDLET_PAGE"):
        return Path(os.environ["BARDLET_PAGE"]).resolve()
    tokenizer = tk.train_bpe([TEXT] * 9, 320) if mode != "write" else tk.train_char(TEXT, False)
    model = model_of("encdec" if mode == "translate" else "qwen3", tokenizer.vocab_size, block_size=64,
                     activation="relu" if mode == "translate" else "silu")
    if mode == "chat":
        tokenizer.chat_template = chat_template.TEMPLATE
    html.write(folder / f"{mode}.html", model, tokenizer, {"title": HOSTILE, "notes": ["A note."]}, dtype="fp32")
    return folder / f"{mode}.html"


def wait(browser: Browser, condition: str) -> None:
    """Wait until a condition holds in the page; the test's own limit ends it otherwise."""
    while not browser.value(f"Boolean({condition})"):
        time.sleep(0.02)


def use(browser: Browser, path: Path, width: int, scheme: str, text: str) -> None:
    """Open a page, type, and wait until the model has written."""
    browser.open(path, width, scheme)
    wait(browser, "globalThis.page")
    browser.value(f"{FILL} fill('input', {text!r}); fill('temperature', 0); fill('length', 30); page.submit(); 1")
    wait(browser, "!page.running && page.answer.steps.length")


@pytest.mark.parametrize("mode", ["write", "chat", "translate"])
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_a_page_works_without_a_network(mode: str, width: int, scheme: str, browser: Browser, tmp_path: Path) -> None:
    use(browser, page(tmp_path, mode), width, scheme, "The little bards")
    browser.value("page.inspect(page.answer, Math.min(3, page.answer.steps.length - 1)); 1")
    facts = browser.value(MEASURE)
    assert facts["scroll"] <= width and not facts["wide"] and not facts["covered"], facts
    assert not browser.value(CONTRAST)
    problems = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    requests = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert not problems and len(requests) == 1 and requests[0].startswith("file:"), (problems, requests)
    if os.environ.get("BARDLET_SCREENSHOTS"):
        browser.screenshot(Path(os.environ["BARDLET_SCREENSHOTS"]) / f"page-{mode}-{width}-{scheme}.png")
    if os.environ.get("BARDLET_AXE"):
        browser.value(Path(os.environ["BARDLET_AXE"]).read_text(encoding="utf-8") + "; 1")
        found = browser.value(
            "axe.run().then((r) => r.violations.filter((v) => ['serious', 'critical'].includes(v.impact))"
            ".map((v) => v.id + ': ' + v.nodes.map((n) => n.html.slice(0, 100)).join(' | ')))")
        assert not found, found


def test_the_browser_writes_what_bardlet_writes(browser: Browser, tmp_path: Path) -> None:
    if os.environ.get("BARDLET_PAGE"):
        pytest.skip("a page of your own")
    tokenizer = tk.train_char(TEXT, False)
    model = model_of("qwen3", tokenizer.vocab_size, block_size=64, activation="silu")
    use(browser, page(tmp_path, "write"), 1280, "light", "The little bards")
    assert browser.value("page.answer.ids") == greedy(model, [tokenizer.encode("The little bards").tolist()], 30)[0]


def test_keys_select_tokens_and_a_click_branches(browser: Browser, tmp_path: Path) -> None:
    use(browser, page(tmp_path, "write"), 1280, "light", "The little")
    browser.value("document.querySelector('.tokens').focus(); 1")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        for kind in ("keyDown", "keyUp"):
            browser("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                    windowsVirtualKeyCode={"Home": 36, "ArrowRight": 39}[key])
    assert browser.value("page.answer.list.selected") == 2
    before = browser.value("page.answer.ids")


    browser.value("document.querySelectorAll('.alternatives button')[1].click(); 1")
    wait(browser, "!page.running")
    after = browser.value("page.answer.ids")
    assert after[:2] == before[:2] and after[2] != before[2] and len(after) == 30
    assert browser.value("document.querySelector('.tokens').children.length") == 30


def test_the_seed_decides_and_stop_stops(browser: Browser, tmp_path: Path) -> None:
    path = page(tmp_path, "write")
    use(browser, path, 1280, "light", "The")
    texts = []
    for seed in (1, 1, 2):
        browser.value(f"{FILL} fill('temperature', 1); fill('seed', {seed}); page.submit(); 1")
        wait(browser, "!page.running")
        texts.append(browser.value("page.answer.ids"))
    assert texts[0] == texts[1] != texts[2]
    browser.value(f"{FILL} fill('length', 100000); page.submit(); 1")
    wait(browser, "page.answer.steps.length > 5")
    browser.value("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Stop').click(); 1")
    count = browser.value("page.answer.steps.length")
    time.sleep(0.2)
    assert browser.value("page.answer.steps.length") == count < 100_000
