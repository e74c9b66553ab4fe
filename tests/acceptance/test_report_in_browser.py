"""The ladder's page in a real browser: no requests, no console messages, no overlap, no overflow.

Needs Chromium on the path (`chromium`, `chromium-browser` or `google-chrome`), driven over a pipe without a package.
BARDLET_SCREENSHOTS=FOLDER saves screenshots of the page.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, CONTRAST, MEASURE, Browser
from ladder.test_report import FACTS, SENTENCE, tiny_outcomes

from bardlet.ladder import report

pytestmark = pytest.mark.skipif(CHROMIUM is None or os.name == "nt", reason="no Chromium on the path")

VIEWS = [(width, scheme) for width in (1280, 390, 320) for scheme in ("light", "dark")]

@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small report with rungs of every kind; BARDLET_REPORT=FILE tests a real report instead."""
    if os.environ.get("BARDLET_REPORT"):
        return Path(os.environ["BARDLET_REPORT"]).resolve()
    folder = tmp_path_factory.mktemp("report")
    outcomes = tiny_outcomes(folder / "ladder", (1, 2, 3, 4, 7, 8, 12), seeds=2)
    return report.write(folder / "out", outcomes, SENTENCE, FACTS)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests in this file."""
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_page_logs_nothing_and_fits(browser: Browser, page: Path, width: int, scheme: str) -> None:
    """No console message, no request except the file, no overflow, no overlapping text, no broken picture."""
    browser.open(page, width, scheme)
    layout = browser.value(MEASURE)
    if os.environ.get("BARDLET_SCREENSHOTS"):
        browser.screenshot(Path(os.environ["BARDLET_SCREENSHOTS"]) / f"report-{width}-{scheme}.png")
    messages = [e for e in browser.events if e.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown",
                                                                 "Log.entryAdded")]  # fmt: skip
    urls = {e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"}
    assert messages == []
    assert {url for url in urls if not url.startswith("data:")} == {page.as_uri()}
    assert (layout["inner"], layout["scroll"], layout["wide"]) == (width, width, [])
    assert layout["texts"] > 200 and layout["broken"] == 0
    assert layout["covered"] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_pictures_in_both_themes(browser: Browser, page: Path, scheme: str) -> None:
    """All text has a contrast of 4.5:1 to its background (WCAG AA), and each theme shows its own pictures."""
    browser.open(page, 1280, scheme)
    assert browser.value(CONTRAST) == []
    dark = "[...document.images].every((i) => i.currentSrc === i.parentElement.querySelector('source').srcset)"
    assert browser.value(dark) == (scheme == "dark")


def test_checks_detect_broken_pages(browser: Browser, page: Path) -> None:
    """Overlapping text, overflow and pale text are detected."""
    browser.open(page, 390, "light")
    browser.value("""document.querySelector('h1').style.cssText = 'position: absolute; top: 20rem; color: #999';
        document.querySelector('footer').style.width = '600px'; 0""")
    layout = browser.value(MEASURE)
    assert layout["covered"] and layout["wide"] and layout["scroll"] > 390 and browser.value(CONTRAST)


def test_narrow_page_shows_code_in_one_column(browser: Browser, page: Path) -> None:
    """On a phone, an unchanged line appears once and a changed line twice, each with its sign."""
    browser.open(page, 390, "light")
    section = "document.querySelector('#rung-4, #rung-9').closest('section')"
    shown = f"(kind) => [...{section}" + """.querySelectorAll('tr.' + kind)].map(
        (row) => [...row.querySelectorAll('.line')].filter((e) => e.checkVisibility()).map(
        (e) => getComputedStyle(e, '::before').content))"""
    assert all(len(signs) == 1 for signs in browser.value(f"({shown})('same')"))
    assert {tuple(signs) for signs in browser.value(f"({shown})('changed')")} == {('"−"', '"+"')}
    assert {tuple(signs) for signs in browser.value(f"({shown})('added')")} == {('"+"',)}
