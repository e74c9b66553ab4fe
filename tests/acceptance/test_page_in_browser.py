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
FILL = "var fill = (id, value) => { const field = document.getElementById(id); if (field) field.value = value; };"
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
    browser.value("page.inspect(page.answer, Math.min(3, page.answer.steps.length - 1)).then(() => 1)")
    views = browser.value("document.querySelectorAll('.looks table, .looks .heads').length")
    assert views == 2 + (mode == "translate") or os.environ.get("BARDLET_PAGE")
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


def press(browser: Browser, key: str, code: int, modifiers: int = 0) -> None:
    """Press a key and let it go."""
    for kind in ("keyDown", "keyUp"):
        browser("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers)


def choose(browser: Browser, place: int) -> None:
    """Click one of the alternatives, and wait until the page has written on from it."""
    browser.value(f"document.querySelectorAll('.alternatives button')[{place}].click(); 1")
    wait(browser, "!page.running")


def test_keys_select_tokens_and_a_click_branches(browser: Browser, tmp_path: Path) -> None:
    use(browser, page(tmp_path, "write"), 1280, "light", "The little")
    browser.value("document.querySelector('.tokens').focus(); 1")
    for key, code in (("Home", 36), ("ArrowRight", 39), ("ArrowRight", 39)):
        press(browser, key, code)
    assert browser.value("page.answer.list.selected") == 2
    before = browser.value("page.answer.ids")
    choose(browser, 1)
    after = browser.value("page.answer.ids")
    assert after[:2] == before[:2] and after[2] != before[2] and len(after) == 30
    assert browser.value("document.querySelector('.tokens').children.length") == 30
    browser.value("page.answer.list.select(29); 1")  # the last token: nothing follows it
    choose(browser, 1)
    last = browser.value("page.answer.ids")
    assert last[:29] == after[:29] and last[29] != after[29] and len(last) == 30
    assert browser.value("document.querySelector('[aria-selected=true]').id.endsWith('-29')")


def test_the_token_that_ends_texts_ends_the_text(browser: Browser, tmp_path: Path) -> None:
    """Chosen at a token, and at the first, where nothing is left to look at."""
    use(browser, page(tmp_path, "chat"), 1280, "light", "The little")
    for n in (4, 0):
        browser.value(f"page.branch(page.answer, {n}, {{ id: page.spec.stop.at(-1), p: 0.1 }}); 1")
        wait(browser, "!page.running")
        assert browser.value("[page.answer.steps.length, page.answer.list.element.children.length]") == [n, n]
        assert browser.value("page.messages[1].content === page.answer.list.element.textContent")
        assert browser.value("page.status.textContent") == "The text ends here."
        assert browser.value("document.querySelectorAll('.alternatives').length") == (1 if n else 0)


def test_a_branch_in_an_earlier_answer_cuts_the_conversation(browser: Browser, tmp_path: Path) -> None:
    """The page shows the conversation that the model reads next, and counts the tokens of the new answer."""
    use(browser, page(tmp_path, "chat"), 1280, "light", "The")
    for text in ("bards", "sang"):
        browser.value(f"{FILL} fill('input', {text!r}); page.submit(); 1")
        wait(browser, "!page.running")
    assert [m["content"] for m in browser.value("page.messages")][::2] == ["The", "bards", "sang"]
    browser.value("page.answers[1].list.select(3); 1")
    choose(browser, 1)
    messages = browser.value("page.messages")
    shown = browser.value("[...page.output.children].map((e) => e.textContent)")
    assert shown == [m["content"] for m in messages] and len(messages) == 4
    count = browser.value("page.answers[1].steps.length - 4")
    status = browser.value("page.status.textContent")
    assert status.startswith(f"{count} token") and status.endswith("the messages after it are gone."), status
    browser.value(f"{FILL} fill('input', 'they'); page.submit(); 1")
    wait(browser, "!page.running")
    assert [m["content"] for m in browser.value("page.messages")][:4] == [m["content"] for m in messages]


def test_a_long_conversation_forgets_its_beginning(browser: Browser, tmp_path: Path) -> None:
    """An answer has at most half of the window; a message that does not fit is refused, and stays to be shortened."""
    use(browser, page(tmp_path, "chat"), 1280, "light", "The little bards sang")
    for _ in range(3):
        browser.value(f"{FILL} fill('input', 'The little bards sang'); fill('length', 1000); page.submit(); 1")
        wait(browser, "!page.running")
        assert browser.value("page.answer.limit") == 32 >= browser.value("page.answer.steps.length")
    assert "messages no longer fit in the model's window." in browser.value("page.status.textContent")
    count = len(browser.value("page.messages"))
    browser.value(f"{FILL} fill('input', 'bards '.repeat(40)); page.submit(); 1")
    assert browser.value("page.status.textContent").startswith("The message is too long: ")
    assert len(browser.value("page.messages")) == count and browser.value("page.input.value.length") == 240


def test_each_line_is_translated(browser: Browser, tmp_path: Path) -> None:
    """An empty line stays empty, a long one is cut, and a branch leaves the other lines as they are."""
    use(browser, page(tmp_path, "translate"), 1280, "light", "The little\n\n" + "bards 詩 " * 40 + "\nsang")
    wait(browser, "!page.running")
    status = browser.value("page.status.textContent")
    assert status.endswith("Line 3: longer than the 64 tokens that the model reads; only its beginning is translated.")
    before = browser.value("[...page.output.children].map((e) => e.textContent)")
    assert len(before) == 4 and before[1] == "" and all(before[::2])
    assert browser.value("page.answers.map((a) => a.limit)")[1] == 64
    assert browser.value("page.answers.every((a) => a.limit === Math.min(64, 2 * a.source.length + 20))")
    browser.value("page.answers[0].list.select(0); 1")
    choose(browser, 1)
    after = browser.value("[...page.output.children].map((e) => e.textContent)")
    assert after[0] != before[0] and after[1:] == before[1:]


def test_the_keyboard_does_not_pass_the_checks_of_the_form(browser: Browser, tmp_path: Path) -> None:
    """Ctrl+Enter writes, but not at a temperature of -1."""
    use(browser, page(tmp_path, "write"), 1280, "light", "The")
    for temperature, writes in ((-1, False), (0.5, True)):
        browser.value(f"{FILL} fill('temperature', {temperature}); page.input.focus(); page.old = page.answer; 1")
        press(browser, "Enter", 13, modifiers=2)
        wait(browser, "!page.running")
        assert browser.value("page.answer !== page.old") is writes


def test_a_large_vocabulary_is_computed_when_it_is_looked_at(browser: Browser, tmp_path: Path) -> None:
    """A pointer that passes tokens reads no block; a step keeps the likeliest tokens, not all."""
    use(browser, page(tmp_path, "write"), 1280, "light", "The")
    assert browser.value("""(() => {
      const read = page.model.read;
      let reads = 0;
      page.model.read = (x) => (reads++, read.call(page.model, x));
      for (let n = 0; n < 20; n++) page.answer.list.select(n);
      return page.inspect(page.answer, 20).then(() => reads);
    })()""") == 3  # the embedding and two blocks, of one token
    assert browser.value("page.answer.steps.every((step) => step.likeliest.length === 10 && !('logits' in step))")


def test_memory_has_a_bound(browser: Browser, tmp_path: Path) -> None:
    """Older tokens are read again when somebody looks at them."""
    use(browser, page(tmp_path, "write"), 1280, "light", "The")
    browser.value(f"page.looks.limit = 5; page.looks.steps = []; {FILL} fill('length', 40); page.submit(); 1")
    wait(browser, "!page.running")
    assert browser.value("page.answer.steps.filter((step) => step.look).length") == 5
    browser.value("page.inspect(page.answer, 2).then(() => 1)")
    assert browser.value("document.querySelectorAll('.looks .attended span').length") == 5
    assert browser.value("page.answer.steps.filter((step) => step.look).length") == 5


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
