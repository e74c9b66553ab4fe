"""The course in a real browser, from the disk and without a network: live parts, diagrams, both color schemes.

BARDLET_SCREENSHOTS=FOLDER saves screenshots. BARDLET_AXE=FILE names axe.min.js (npm: axe-core), which then checks the
pages.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[2]
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
RUNGS = ("01-bigram", "02-averaging", "03-one-head", "04-multi-head", "05-feed-forward", "06-residual", "07-layer-norm")
PAGES = ["index", "glossary", "encoder-decoder", "stages/sft", "rungs/08-dropout", *(f"rungs/{name}" for name in RUNGS)]

pytestmark = pytest.mark.skipif(CHROMIUM is None or os.name == "nt", reason="no Chromium on the path")
pytest.importorskip("mkdocs", reason="needs the docs extra: pip install -e '.[docs]'")
pytest.importorskip("material", reason="needs the docs extra: pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The course with the models that come with it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "BARDLET_LADDER": ""}, check=True)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


def show(browser: Browser, page: Path, width: int = 1280, scheme: str = "light") -> None:
    """Open a page as at the first visit, and wait for its live parts."""
    browser.open(page, width, scheme)
    browser.value("localStorage.clear(); 1")
    browser.open(page, width, scheme)
    wait(browser)


def wait(browser: Browser) -> None:
    """Wait until the live parts show the newest text."""
    browser.value("Promise.all((globalThis.bardletLive ?? []).map((live) => live.done)).then(() => 1)")
    assert not browser.value("document.querySelectorAll('.live [aria-busy]').length")


def type_into(browser: Browser, field: str, value: str | float) -> None:
    """Set the value of a field, as typing would, and wait for the result."""
    browser.value(f"""(() => {{
      const field = document.querySelector({field!r});
      field.value = {value!r};
      field.dispatchEvent(new Event("input"));
    }})()""")
    wait(browser)


def texts(browser: Browser, selector: str) -> list[str]:
    """Return the texts of all elements that match."""
    found: list[str] = browser.value(f"Array.from(document.querySelectorAll({selector!r}), (e) => e.textContent)")
    return found


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_a_page_opens_from_the_disk(page: str, width: int, scheme: str, site: Path, browser: Browser) -> None:
    show(browser, site / f"{page}.html", width, scheme)
    live = browser.value("globalThis.bardletLive?.length ?? 0")
    assert live == {"index": 2}.get(page, int(page.removeprefix("rungs/") in RUNGS))
    problems = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    requests = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert not problems and all(url.startswith(("file:", "data:")) for url in requests), (problems, requests)
    assert browser.value("document.documentElement.scrollWidth") <= width
    wide = browser.value("""Array.from(document.querySelectorAll(".live, .live *, .diagram, .diagram svg"))
      .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest(".scroll"))
      .map((e) => e.outerHTML.slice(0, 100))""")
    assert not wide, wide
    if folder := os.environ.get("BARDLET_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"course-{page.replace('/', '-')}-{width}-{scheme}.png")
    if os.environ.get("BARDLET_AXE"):
        browser.value(Path(os.environ["BARDLET_AXE"]).read_text(encoding="utf-8") + "; 1")
        found = browser.value(
            "axe.run({include: ['.md-content']}).then((r) => r.violations"
            ".filter((v) => ['serious', 'critical'].includes(v.impact))"
            ".map((v) => v.id + ': ' + v.nodes.map((n) => n.html.slice(0, 160)).join(' | ')))")
        assert not found, found


def test_live_parts_follow_the_switch_to_dark(site: Path, browser: Browser) -> None:
    show(browser, site / "rungs" / "07-layer-norm.html", scheme="light")
    colors = "Array.from(['.live', '.live button, .live input', '.diagram'], " \
             "(s) => getComputedStyle(document.querySelector(s)).color)"
    accent = "getComputedStyle(document.querySelector('.diagram rect')).stroke"
    before: Any = browser.value(colors), browser.value(accent)
    browser.value("document.getElementById('__palette_1').click(); 1")
    assert browser.value("document.body.dataset.mdColorScheme") == "slate"
    after = browser.value(colors), browser.value(accent)
    assert all(a != b for a, b in zip([*before[0], before[1]], [*after[0], after[1]], strict=True)), (before, after)


def test_a_sentence_is_read_position_by_position(site: Path, browser: Browser) -> None:
    """By the keyboard alone: each position has a row for each head, and what it sees ends with its own character."""
    show(browser, site / "rungs" / "07-layer-norm.html")
    browser.value("document.querySelector('.live input').focus(); document.querySelector('.live input').select(); 1")
    for key in "Good\u00a3 morrow".replace("\u00a3", "#"):
        browser.press(key)
    wait(browser)
    assert "Left out" in texts(browser, ".live [role=status]")[0] and "#" in texts(browser, ".live [role=status]")[0]
    assert texts(browser, ".live .tokens") == ["Good morrow"]
    browser.press("Tab")
    assert browser.value("document.activeElement.classList[0]") == "tokens"
    browser.press("Home")
    assert texts(browser, ".live-seen") == ["G"] * 12
    for _ in range(3):
        browser.press("ArrowRight")
    assert texts(browser, ".live-seen") == ["Good"] * 12
    assert "After this \u201cd\u201d" in texts(browser, ".live-body > p[aria-live]")[0]
    browser.press("End")
    assert texts(browser, ".live-seen") == ["d\u2423morrow"] * 12, "eight characters"
    assert texts(browser, ".live section tbody th") == ["embedding", "block 1", "block 2", "block 3"]


def test_the_average_has_no_head(site: Path, browser: Browser) -> None:
    """Each of the characters that rung 2 sees counts the same, and the row says so."""
    show(browser, site / "rungs" / "02-averaging.html")
    assert texts(browser, ".live tbody th") == ["average"] and texts(browser, ".live-seen") == ["question"]
    assert texts(browser, ".live tbody td:last-child") == ["each 12.5\u00a0%"]


def test_every_rung_reads_the_same_sentence(site: Path, browser: Browser) -> None:
    show(browser, site / "index.html")
    part = ".live[data-live=compare]"
    type_into(browser, f"{part} input", "The king is dead")
    losses = browser.value(f"Array.from(document.querySelectorAll('{part} li'), (li) => Number(li.dataset.loss))")
    assert len(losses) == 7 and losses[6] < losses[0] < losses[1]  # the average is worse than the bigram
    first = texts(browser, f"{part} .live-text")
    assert all(text.startswith("The king is dead") and len(text) == 16 + 60 for text in first)
    browser.value(f"document.querySelector('{part} button').click(); 1")
    wait(browser)
    assert all(a != b for a, b in zip(first, texts(browser, f"{part} .live-text"), strict=True))
    type_into(browser, f"{part} input", "x")
    assert "at least two characters" in texts(browser, f"{part} [role=status]")[0]


def test_temperature_reshapes_the_distribution(site: Path, browser: Browser) -> None:
    show(browser, site / "index.html")
    part = ".live[data-live=temperature]"
    largest, written = [], []
    for temperature in (0, 0.5, 1, 2):
        type_into(browser, f"{part} input[type=range]", temperature)
        largest.append(browser.value("Math.max(...bardletLive[0].p)"))
        written.append(texts(browser, f"{part} .live-written")[0])
        assert browser.value("bardletLive[0].p.reduce((a, b) => a + b)") == pytest.approx(1)
    assert largest[0] == 1 > largest[1] > largest[2] > largest[3] and len(set(written)) == 4
    type_into(browser, f"{part} input[type=number]", 1)
    assert texts(browser, f"{part} .live-written")[0] == written[3], "the same seed, the same text"
    browser.value(f"document.querySelector('{part} button').click(); 1")
    wait(browser)
    assert texts(browser, f"{part} .live-written")[0] != written[3]


def test_newer_work_replaces_older(site: Path, browser: Browser) -> None:
    """Fast typing: the page shows the last text, once, and logs no error."""
    show(browser, site / "index.html")
    browser.value("""(() => {
      const field = document.querySelector(".live[data-live=compare] input");
      for (const text of ["O", "O Ro", "O Romeo", "O Romeo, Romeo"]) {
        field.value = text;
        field.dispatchEvent(new Event("input"));
      }
    })()""")
    wait(browser)
    time.sleep(0.2)
    assert all(text.startswith("O Romeo, Romeo") for text in texts(browser, ".live[data-live=compare] .live-text"))
    assert not [e for e in browser.events if e.get("method") == "Runtime.exceptionThrown"]
