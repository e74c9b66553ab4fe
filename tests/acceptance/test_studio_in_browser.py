"""The studio in a real browser: every tab at the width of a phone and of a desktop, and by keyboard alone.

BARDLET_AXE=FILE names axe.min.js (npm: axe-core), which then checks each tab. BARDLET_SCREENSHOTS=FOLDER saves
screenshots.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, CONTRAST, MEASURE, Browser
from server import served
from server.served import Server
from studio_page import TEXT

pytestmark = pytest.mark.skipif(CHROMIUM is None or os.name == "nt", reason="no Chromium on the path")
TABS = ("train", "write", "inside", "chat", "translate", "runs", "learn")
VIEWS = [(1280, 1, "light"), (1280, 1, "dark"), (390, 1, "light"), (390, 1, "dark"), (640, 2, "light"),
         (640, 2, "dark")]
"""Widths, pixels of the screen for each, and color schemes. 640 with 2: a window of 1280 pixels at 200 % zoom."""

USES = {
    "train": """t.files = []; t.pasted.value = 'the bards sang of rivers. '.repeat(40); await t.usePasted();
        for (const details of t.element.querySelectorAll('details')) details.open = true;
        while (!t.element.querySelector('.preview')) await wait();""",
    "write": """t.first.model.value = 'verses'; t.prompt.value = 'The'; t.length.value = 30; t.both.click();
        t.second.model.value = 'letters'; await t.write(); t.drafts[0].list.select(3); t.commands.open = true;""",
    "inside": """t.model.value = 'verses'; t.text.value = 'The bards of a village'; t.length.value = 20; await t.look();
        while (!t.element.querySelector('canvas') || !t.element.querySelector('.neighbors')) await wait();
        t.commands.open = true;""",
    "chat": """t.messages = []; t.model.value = 'chat'; t.instructions.value = 'Count.'; t.length.value = 20;
        t.input.value = 'How many birds on day 7?'; t.send(); while (t.abort) await wait(); t.commands.open = true;""",
    "translate": """t.model.value = 'translator';
        t.text.value = 'ein hund rennt\\n\\nhund und park\\n' + 'hund '.repeat(140); await t.translate();
        t.element.querySelector('.translation').click();
        while (!t.element.querySelector('.map')) await wait();""",
    "runs": """await t.show('verses'); while (!t.element.querySelector('.line')) await wait();
        for (const details of t.element.querySelectorAll('details')) details.open = true;
        while (!t.element.querySelector('details table')) await wait();""",
    "learn": """await t.show('3');
        while (!t.element.querySelector('.heads') || !t.element.querySelector('.sample')) await wait();
        [...t.element.querySelectorAll('button')].find((each) => each.textContent === 'Every rung reads it').click();
        while (!t.element.querySelector('.ladder tbody')) await wait();""",
    "compare": """t.chosen = new Set(['verses', 'letters', 'chat']); t.draw(); await t.open();
        while (!t.element.querySelector('svg')) await wait();"""}
"""Scripts that use a tab `t`."""
WAIT = """let waits = 0; const wait = () => new Promise((go, stop) => {
  setTimeout(() => (++waits < 1000 ? go() : stop(new Error('nothing came'))), 30); });"""
AXE = """axe.run(document, {resultTypes: ['violations']}).then((r) =>
  r.violations.filter((v) => ['serious', 'critical'].includes(v.impact)).map((v) => v.id + ': '
    + v.nodes.map((n) => n.html.slice(0, 150) + ' ' + n.any.map((a) => a.message).join('; ')).join(' | ')))"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("studio")
    served.train(folder)
    served.run("ladder", folder / "verses.txt", "--rungs", "1-3", "--out", folder / "runs" / "ladder")
    with served.serving(Path("runs"), folder / "log", cwd=folder) as server:
        yield server
        assert "internal error" not in server.log.read_text()


@pytest.fixture(scope="module")
def browser(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser that the printed link has signed in."""
    running = Browser(tmp_path_factory.mktemp("profile"), loopback=True)
    running.open(server.link, 1280, "light")
    wait(running, "globalThis.studio")
    assert "token" not in running.value("location.href")
    yield running
    running.close()


def wait(browser: Browser, condition: str, seconds: float = 60) -> None:
    """Wait until a condition holds in the page."""
    end = time.monotonic() + seconds
    while not browser.value(f"Boolean({condition})"):
        assert time.monotonic() < end, (condition, browser.value("document.body.innerText")[-2000:])
        time.sleep(0.05)


def open_tab(browser: Browser, server: Server, tab: str, view: tuple[int, float, str] = VIEWS[0]) -> None:
    """Open a tab anew, and wait until it shows what the server has."""
    width, scale, scheme = view
    browser.open("about:blank", width, scheme)  # another part of the same page would load nothing
    browser.open(f"{server.url}/#{tab}", width, scheme, scale)
    wait(browser, f"globalThis.studio?.tabs.{tab}?.element.isConnected")
    ready = {"runs": "tabs.runs.rows.length", "train": "tabs.train.stored", "learn": "tabs.learn.rungs.length"}
    wait(browser, f"studio.{ready.get(tab, 'models.length')}")


def problems(browser: Browser) -> list[Any]:
    """Return exceptions, and what the console shows. A refusal by the server is a line there, too."""
    found = [event["params"] for event in browser.events
             if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]
    entries = [each.get("entry", {}) for each in found]
    return [each for each, entry in zip(found, entries, strict=True)
            if entry.get("level") != "verbose" and "400 (Bad Request)" not in entry.get("text", "")]


def check(browser: Browser, name: str, view: tuple[int, float, str]) -> None:
    """Check the sizes, the contrast, the console and axe's findings of the page as it is now."""
    if os.environ.get("BARDLET_SCREENSHOTS"):
        file = f"studio-{'-'.join(map(str, (name, *view)))}.png"
        browser.screenshot(Path(os.environ["BARDLET_SCREENSHOTS"]) / file)
    facts = browser.value(MEASURE)
    assert facts["scroll"] <= view[0] and not facts["wide"] and not facts["covered"], facts
    assert not browser.value(CONTRAST)
    assert not problems(browser)
    if os.environ.get("BARDLET_AXE"):
        browser.value(Path(os.environ["BARDLET_AXE"]).read_text(encoding="utf-8") + "; 1")
        found = browser.value(AXE)
        assert not found, "\n".join(found)


# ---------------------------------------------------------------------------- sizes, colors, assistive technology


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("use", USES)
def test_a_tab_fits_and_can_be_read(use: str, view: tuple[int, float, str], browser: Browser, server: Server) -> None:
    tab = "runs" if use == "compare" else use
    open_tab(browser, server, tab, view)
    browser.value(f"(async () => {{ const t = studio.tabs.{tab}; {WAIT} {USES[use]} return 1; }})()")
    check(browser, use, view)


# ---------------------------------------------------------------------------- keyboard


def focus(browser: Browser, selector: str, most: int = 60) -> None:
    """Press Tab until an element has the focus. The focus can be seen at each stop."""
    for _ in range(most):
        browser.press("Tab")
        assert browser.value("document.activeElement.matches(':focus-visible, body')")
        if browser.value(f"document.activeElement.matches({selector!r})"):
            box = browser.value("(({left, top, right, bottom}) => [left, top, right, bottom])"
                                "(document.activeElement.getBoundingClientRect())")
            assert box[0] < 1280 and box[1] < 900 and box[2] > 0 and box[3] > 0, (selector, box)
            return
    raise AssertionError((selector, browser.value("document.activeElement.outerHTML")[:300]))


def keys(browser: Browser, text: str) -> None:
    """Type a text."""
    for character in text:
        browser.press(character)


def text_of(browser: Browser, selector: str) -> str:
    return str(browser.value(f"document.querySelector({selector!r})?.textContent ?? ''"))


def test_arrow_keys_move_between_tabs(browser: Browser, server: Server) -> None:
    open_tab(browser, server, "train")
    focus(browser, "[role=tab]")
    seen = []
    for key in ("Home", *["ArrowRight"] * len(TABS), "ArrowLeft", "Home", "End"):
        browser.press(key)
        wait(browser, "document.activeElement.getAttribute('aria-selected') === 'true'")
        name = browser.value("document.activeElement.id").removeprefix("tab-")
        wait(browser, f"studio.current === {name!r} && !document.getElementById('panel-{name}').hidden")
        assert browser.value("document.querySelectorAll('[role=tabpanel]:not([hidden])').length") == 1
        seen.append(name)
    assert seen == [*TABS, "train", "learn", "train", "learn"]
    browser.press("Tab")
    assert not browser.value("document.activeElement.matches('[role=tab]')")  # one stop for all tabs


def test_the_link_over_the_tabs_skips_them(browser: Browser, server: Server) -> None:
    open_tab(browser, server, "write")
    focus(browser, ".skip")
    browser.press("Enter")
    wait(browser, "document.activeElement.id === 'content'")
    assert browser.value("studio.current") == "write"
    browser.press("Tab")
    assert browser.value("Boolean(document.activeElement.closest('#panel-write'))")


def test_writing_by_keyboard(browser: Browser, server: Server) -> None:
    open_tab(browser, server, "write")
    focus(browser, "#panel-write textarea")
    keys(browser, "The bards")
    focus(browser, "#panel-write button[type=submit]")
    browser.press("Enter")
    wait(browser, "studio.tabs.write.drafts.length && !studio.tabs.write.drafts[0].abort")
    focus(browser, ".tokens")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        browser.press(key)
    assert browser.value("studio.tabs.write.drafts[0].list.selected") == 2
    before = browser.value("studio.tabs.write.drafts[0].tokens.map(({ name }) => name)")
    focus(browser, ".alternatives li:nth-child(2) button")
    browser.press("Enter")
    wait(browser, "!studio.tabs.write.drafts[0].abort")
    after = browser.value("studio.tabs.write.drafts[0].tokens.map(({ name }) => name)")
    assert after[:2] == before[:2] and after != before and not problems(browser)


def test_chatting_by_keyboard(browser: Browser, server: Server) -> None:
    open_tab(browser, server, "chat")
    browser.value("studio.tabs.chat.messages = []; studio.tabs.chat.draw(); 1")
    focus(browser, ".compose textarea")
    keys(browser, "How many birds on day 9?")
    browser.press("Enter")
    wait(browser, "studio.tabs.chat.messages.length === 2 && !studio.tabs.chat.abort")
    assert text_of(browser, ".talk .user .said") == "How many birds on day 9?"
    assert browser.value("document.activeElement.matches('.compose textarea')")
    open_tab(browser, server, "chat")  # the conversation is still there
    focus(browser, ".talk .assistant button")
    browser.press("Enter")
    wait(browser, "studio.tabs.chat.messages.length === 2 && !studio.tabs.chat.abort")
    assert browser.value("document.activeElement.matches('.compose textarea')")
    assert not problems(browser)


def test_translating_by_keyboard(browser: Browser, server: Server) -> None:
    open_tab(browser, server, "translate")
    focus(browser, "#panel-translate select")
    keys(browser, "tr")
    assert browser.value("document.activeElement.value") == "translator"
    focus(browser, "#panel-translate textarea")
    keys(browser, "ein hund")
    browser.press("Enter")
    keys(browser, "park")
    browser.press("Enter", modifiers=2)
    wait(browser, "document.querySelectorAll('.translation').length === 2 && !studio.tabs.translate.abort")
    focus(browser, ".translation")
    browser.press("Enter")
    wait(browser, "document.querySelector('.map')")
    assert text_of(browser, "#panel-translate [aria-live]").startswith("Strongest pair: for \u201c")
    rows, columns = browser.value("(({ target, source }) => [target.length, source.length])"
                                  "(studio.tabs.translate.map.found)")
    assert browser.value("document.querySelectorAll('.map td[data-weight]').length") == rows * columns
    focus(browser, "[role=region]")  # a wide map can be scrolled
    assert not problems(browser)


def test_a_model_that_does_not_translate_says_so(browser: Browser, server: Server) -> None:
    open_tab(browser, server, "translate")
    browser.value("(async () => { const t = studio.tabs.translate; t.model.value = 'verses'; t.text.value = 'a\\nb'; "
                  "await t.translate(); return 1; })()")
    assert text_of(browser, "#panel-translate .status").startswith("verses: not trained to translate; train a ")


def test_runs_by_keyboard(browser: Browser, server: Server) -> None:
    """A chosen run keeps the focus; the arrow keys show the values of its chart."""
    open_tab(browser, server, "runs")
    focus(browser, "tbody button.link")
    name = browser.value("document.activeElement.textContent")
    browser.press("Enter")
    wait(browser, "document.querySelector('#panel-runs svg .line')")
    assert browser.value("document.activeElement.textContent") == name
    focus(browser, "svg")
    shown = []
    for key in ("End", "ArrowLeft", "Home", "ArrowRight"):
        browser.press(key)
        shown.append(text_of(browser, "#panel-runs .readout"))
    assert all(text.startswith("step ") and "held-out " in text for text in shown[:2]), shown
    assert len(set(shown)) > 1
    browser.press("Escape")
    assert text_of(browser, "#panel-runs .readout") == "" and not problems(browser)


def test_comparing_runs_by_keyboard(browser: Browser, server: Server) -> None:
    """Filter, sort, choose two, read the table of settings."""
    open_tab(browser, server, "runs")
    focus(browser, "#panel-runs input[type=search]")
    keys(browser, "e")
    rows = browser.value("[...document.querySelectorAll('#panel-runs tbody th')].map((each) => each.textContent)")
    assert {"letters", "verses"} <= set(rows) and "chat" not in rows  # the name or the text has the letter
    focus(browser, "#panel-runs th:nth-child(2) button")
    browser.press("Enter")
    assert browser.value("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"
    for row in (1, 2):
        focus(browser, f"#panel-runs tbody tr:nth-child({row}) input")
        browser.press(" ")
    wait(browser, "document.querySelector('[role=region][aria-label=\"Settings that differ\"]')")
    focus(browser, "[role=region][aria-label='Settings that differ']")
    assert not problems(browser)


def test_the_actions_on_a_run_by_keyboard(browser: Browser, server: Server) -> None:
    """Settings, health, commands, a deletion and its undoing."""
    open_tab(browser, server, "runs")
    browser.value("(async () => { await studio.tabs.runs.show('letters'); return 1; })()")
    wait(browser, "document.querySelector('#panel-runs article')")
    for title, shown in (("Settings and results", "[aria-label=Settings] td"),
                         ("Do the same in a terminal", ".command")):
        browser.value("document.activeElement.blur(); 1")
        browser.value(f"[...document.querySelectorAll('#panel-runs summary')].forEach((each) => "
                      f"{{ each.dataset.wanted = each.textContent === {title!r}; }}); 1")
        focus(browser, "summary[data-wanted=true]")
        browser.press("Enter")
        wait(browser, f"document.querySelector({'#panel-runs article details[open] ' + shown!r})")
    browser.value("[...document.querySelectorAll('#panel-runs article button')].forEach((each) => "
                  "{ each.dataset.text = each.textContent; }); document.activeElement.blur(); 1")
    focus(browser, "button[data-text='Check its files and losses']")
    browser.press("Enter")
    wait(browser, "document.querySelector('#panel-runs .findings li')")
    browser.value("document.activeElement.blur(); 1")
    focus(browser, "button[data-text=Delete]")
    browser.press("Enter")
    wait(browser, "!studio.tabs.runs.rows.some(({ name }) => name === 'letters')")
    browser.value("[...document.querySelectorAll('#toasts button')].forEach((each) => "
                  "{ each.dataset.text = each.textContent; }); 1")
    focus(browser, "#toasts button[data-text=Undo]")
    browser.press("Enter")
    wait(browser, "studio.tabs.runs.rows.some(({ name }) => name === 'letters')")
    assert not problems(browser)


def test_looking_inside_by_keyboard(browser: Browser, server: Server) -> None:
    """A sentence, a token of it, a head of its attention, and a head that is switched off."""
    open_tab(browser, server, "inside")
    focus(browser, "#panel-inside select")
    keys(browser, "ve")
    assert browser.value("document.activeElement.value") == "verses"
    focus(browser, "#panel-inside textarea")
    keys(browser, "The bards")
    browser.press("Enter", modifiers=2)
    wait(browser, "document.querySelector('#panel-inside .neighbors')")
    focus(browser, "#panel-inside .tokens")
    browser.press("Home")
    first = text_of(browser, "#panel-inside .details h3")
    browser.press("ArrowRight")
    assert text_of(browser, "#panel-inside .details h3") != first
    wait(browser, "document.querySelector('#panel-inside .neighbors')")
    focus(browser, "#panel-inside .heads button")
    browser.press("Enter")
    assert browser.value("document.activeElement.getAttribute('aria-pressed')") == "true"
    focus(browser, "#panel-inside .switches button")
    browser.press("ArrowRight")
    browser.press(" ")
    assert browser.value("document.activeElement.getAttribute('aria-label')") == "Switch off head 2 of block 1"
    wait(browser, "studio.tabs.inside.after")
    wait(browser, "document.querySelectorAll('#panel-inside section tbody tr').length")
    assert browser.value("studio.tabs.inside.after.loss.per_token !== studio.tabs.inside.before.loss.per_token")
    assert not problems(browser)


def test_two_writers_by_keyboard(browser: Browser, server: Server) -> None:
    """A second model beside the first, and a copy of a text."""
    open_tab(browser, server, "write")
    focus(browser, "#panel-write input[type=checkbox]")
    browser.press(" ")
    focus(browser, "#panel-write fieldset:nth-of-type(2) select")
    keys(browser, "le")
    assert browser.value("studio.tabs.write.second.model.value") == "letters"
    focus(browser, "#panel-write button[type=submit]")
    browser.press("Enter")
    wait(browser, "studio.tabs.write.drafts.length === 2 && studio.tabs.write.drafts.every(({ abort }) => !abort)")
    assert browser.value("studio.tabs.write.drafts.map(({ values }) => values.model)")[1] == "letters"
    focus(browser, "#panel-write .drafts span button")
    browser.press("Enter")
    wait(browser, "document.querySelector('#panel-write .drafts span .hint').textContent")
    assert not problems(browser)


def test_editing_a_message_by_keyboard(browser: Browser, server: Server) -> None:
    open_tab(browser, server, "chat")
    browser.value("studio.tabs.chat.messages = [{ role: 'user', content: 'How many birds on day 9?' }, "
                  "{ role: 'assistant', content: '9 birds.' }]; studio.tabs.chat.draw(); 1")
    focus(browser, ".talk .user button")
    browser.press("Enter")
    assert browser.value("document.activeElement.value") == "How many birds on day 9?"
    assert browser.value("studio.tabs.chat.messages.length") == 0
    browser.press("Enter")
    wait(browser, "studio.tabs.chat.messages.length === 2 && !studio.tabs.chat.abort")
    assert not problems(browser)


def test_downloading_by_keyboard(browser: Browser, server: Server) -> None:
    open_tab(browser, server, "runs")
    browser.value("(async () => { await studio.tabs.runs.show('verses'); return 1; })()")
    wait(browser, "document.querySelector('#panel-runs article')")
    browser.value("[...document.querySelectorAll('#panel-runs article button')].forEach((each) => "
                  "{ each.dataset.text = each.textContent; }); 1")
    focus(browser, "button[data-text=GGUF]")
    browser.press("Enter")
    wait(browser, "studio.tabs.runs.packing.textContent.startsWith('verses.gguf, ')")
    assert not problems(browser)


def test_stopping_queueing_and_going_on_by_keyboard(browser: Browser, server: Server) -> None:
    """A long training is stopped and goes on; one that waits is taken out of the queue."""
    rng = random.Random(1)
    open_tab(browser, server, "train")
    focus(browser, "#panel-train summary")
    browser.press("Enter")
    focus(browser, "#panel-train textarea")
    browser("Input.insertText", text=" ".join(rng.choices(TEXT.split(), k=30_000)))
    focus(browser, "#panel-train .field + button")
    browser.press("Enter")
    wait(browser, "studio.tabs.train.files.length === 1")
    focus(browser, "#panel-train input[type=number]")
    browser.press("a", modifiers=2)
    keys(browser, "5")
    for number in (1, 2):
        focus(browser, "#panel-train button[type=submit]")
        browser.press("Enter")
        wait(browser, f"studio.tabs.train.queue.querySelectorAll('[aria-label$=queue]').length === {number - 1} "
                      "&& !studio.tabs.train.trainButton.disabled && studio.tabs.train.job?.state === 'running'", 300)
    focus(browser, "#panel-train [aria-label$=queue]")
    browser.press("Enter")
    wait(browser, "!studio.tabs.train.queue.querySelector('[aria-label$=queue]')")
    wait(browser, "studio.tabs.train.view?.now?.step >= 10", 300)
    for text, state in (("Stop", "stopped"), ("Go on", "running"), ("Stop", "stopped")):
        browser.value("[...document.querySelectorAll('#panel-train article button')].forEach((each) => "
                      "{ each.dataset.text = each.textContent; }); 1")
        focus(browser, f"#panel-train article button[data-text='{text}']")
        browser.press("Enter")
        wait(browser, f"studio.tabs.train.job.state === {state!r}", 300)
    assert not problems(browser)


def test_learning_by_keyboard(browser: Browser, server: Server) -> None:
    """Choose a rung, read, and play with its model."""
    open_tab(browser, server, "learn")
    focus(browser, "#panel-learn .rungs li:nth-child(3) button")
    browser.press("Enter")
    wait(browser, "studio.tabs.learn.shown === 3 && document.querySelector('#panel-learn .heads')")
    assert browser.value("document.activeElement.dataset.number") == "3"
    wait(browser, "document.querySelector('#panel-learn .sample')")
    focus(browser, "#panel-learn input:not([type])")
    browser.press("a", modifiers=2)
    keys(browser, "The bards of a ")
    browser.press("Enter")
    wait(browser, "document.querySelector('#panel-learn .sample strong').textContent === 'The bards of a '")
    wait(browser, "!document.querySelector('#panel-learn .status').textContent")
    focus(browser, "#panel-learn input[type=range]")
    looked = "#panel-learn section section h3"  # where it looked back from
    before = text_of(browser, looked)
    browser.press("ArrowLeft")
    assert before.startswith("Where it looked back from") and text_of(browser, looked) != before
    focus(browser, "#panel-learn .heads button")
    browser.press("Enter")
    assert browser.value("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert not problems(browser)


def test_training_by_keyboard(browser: Browser, server: Server) -> None:
    """From a pasted text to the model that it made."""
    open_tab(browser, server, "train")
    focus(browser, "#panel-train summary")
    browser.press("Enter")
    focus(browser, "#panel-train textarea")
    keys(browser, "The bards sang.")
    browser("Input.insertText", text=3 * TEXT)  # as pasted
    focus(browser, "#panel-train .field + button")
    browser.press("Enter")
    wait(browser, "studio.tabs.train.files.length === 1")
    focus(browser, "#panel-train input[type=number]")
    browser.press("a", modifiers=2)
    keys(browser, "0.2")
    assert browser.value("document.activeElement.value") == "0.2"
    focus(browser, "#panel-train button[type=submit]")
    browser.press("Enter")
    wait(browser, "['done', 'failed'].includes(studio.tabs.train.job?.state)", 300)
    assert browser.value("studio.tabs.train.job.state") == "done", text_of(browser, "#panel-train article")
    wait(browser, "document.querySelector('#panel-train .sample')")
    browser.value("for (const details of document.querySelectorAll('article details')) details.open = true; 1")
    check(browser, "trained", VIEWS[0])
    focus(browser, "#panel-train article button")
    browser.press("Enter")
    wait(browser, "studio.current === 'write' && studio.tabs.write?.first.model.value")
    assert browser.value("studio.tabs.write.first.model.value").startswith("The-bards")
    assert browser.value("document.activeElement.id") == "tab-write"  # the button that had the focus is gone
    assert not problems(browser)
