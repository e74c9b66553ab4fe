"""The course in a real browser, from the disk and without a network: every page, live parts, both color schemes.

Rungs 1 to 7 have the models that come with the course, rungs 8 to 13 those of a ladder of seconds.
BARDLET_SCREENSHOTS=FOLDER saves screenshots. BARDLET_AXE=FILE names axe.min.js (npm: axe-core), which then checks the
pages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
import torch
import torch.nn.functional as F
from browser import CHROMIUM, Browser

from bardlet.export import html
from bardlet.ladder.run import Ladder, LadderPlan
from bardlet.ladder.rungs import LADDER, Rung
from bardlet.run import hf
from bardlet.runtime.distributed import Dist

ROOT = Path(__file__).parents[2]
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "dropout": 0.1, "lr": 1e-3,
        "steps": 20, "dtype": "fp32", "compile": "off", "threads": 1}
"""Sizes and steps of rungs 8 to 13."""
LARGER = LADDER[7:]

MEASURE = """(() => {
  const all = (selector) => Array.from(document.querySelectorAll(selector));
  const closed = document.documentElement.scrollWidth;
  for (const details of all("details")) details.open = true;
  return {
    width: Math.max(closed, document.documentElement.scrollWidth), scheme: document.body.dataset.mdColorScheme,
    images: all("img").filter((image) => !image.complete || !image.naturalWidth).map((image) => image.src),
    wide: all(".live, .live *, .diagram, .diagram svg")
      .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest(".scroll"))
      .map((e) => e.outerHTML.slice(0, 100)),
    live: (globalThis.bardletLive ?? []).length, ids: all("[id]").map((e) => e.id),
    links: all("a[href]").map((link) => link.href)};
})()"""
"""What a page has, with everything that folds open."""

AXE = """axe.run(document, {preload: false, resultTypes: ["violations"]}).then((result) => result.violations
  .filter((violation) => ["serious", "critical"].includes(violation.impact))
  .map((violation) => violation.id + ": " + violation.nodes.map((node) => node.html.slice(0, 160)).join(" | ")))"""

pytestmark = pytest.mark.skipif(CHROMIUM is None or os.name == "nt", reason="no Chromium on the path")
pytest.importorskip("mkdocs", reason="needs the docs extra: pip install -e '.[docs]'")
pytest.importorskip("material", reason="needs the docs extra: pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder of rungs 8 to 13, which know the characters of the others."""
    folder = tmp_path_factory.mktemp("larger")
    known = json.loads((ROOT / "docs" / "models" / "rungs.json").read_text(encoding="utf-8"))["characters"]
    lines = [f"To be, or not to be, that is question number {n}.\n" for n in range(200)]
    (folder / "my.txt").write_text(known + "\n" + "".join(lines), encoding="utf-8", newline="\n")
    plan = LadderPlan(LARGER, folder / "ladder", (str(folder / "my.txt"),), threads=1)
    ladder = Ladder(plan, Dist(0, 1, torch.device("cpu")))
    ladder.scale, ladder.minutes = TINY, None
    ladder.plan_steps(lambda line: None)
    assert len(list(ladder.train_all(lambda rung, seed, line: None))) == len(LARGER)
    return ladder.out


@pytest.fixture(scope="module")
def site(larger: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The course."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "BARDLET_LADDER": str(larger)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
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


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_every_page_opens_from_the_disk(width: int, scheme: str, site: Path, browser: Browser) -> None:
    """Without scrolling sideways, errors, the network, broken images and links, and serious violations of axe's rules.

    404.html is left out: only a server shows it.
    """
    pages = [path for path in sorted(site.rglob("*.html")) if path != site / "404.html"]
    names = {path.relative_to(site).with_suffix("").as_posix() for path in pages}
    written = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert names == written - {"where"}
    show(browser, pages[0], width, scheme)
    faults: dict[str, list[str]] = {}
    facts: dict[Path, dict[str, Any]] = {}
    for path, name in zip(pages, sorted(names), strict=True):
        browser.open(path, width, scheme)
        wait(browser)
        if folder := os.environ.get("BARDLET_SCREENSHOTS"):
            browser.screenshot(Path(folder) / f"course-{name.replace('/', '-')}-{width}-{scheme}.png")
        facts[path] = browser.value(MEASURE)
        faults[name] = faults_of(browser, facts[path], width, scheme)
        if facts[path]["live"] != {"index": 2}.get(name, int(name.startswith("rungs/"))):
            faults[name].append(f"{facts[path]['live']} live parts")
    for path, name in zip(pages, sorted(names), strict=True):
        faults[name] += broken(facts, path)
    assert not any(faults.values()), {name: found for name, found in faults.items() if found}


def faults_of(browser: Browser, facts: dict[str, Any], width: int, scheme: str) -> list[str]:
    """Return what is wrong with the page that is open, except for its links."""
    logged = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
              or (e.get("method") == "Runtime.consoleAPICalled" and e["params"]["type"] in ("error", "warning"))]
    requests = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    found = [f"logs {json.dumps(event['params'])[:300]}" for event in logged]
    found += [f"requests {url}" for url in requests if not url.startswith(("file:", "data:"))]
    found += [f"no image {address}" for address in facts["images"]] + [f"too wide: {part}" for part in facts["wide"]]
    if facts["width"] > width:
        found.append(f"scrolls sideways: {facts['width']} pixels")
    if facts["scheme"] != {"light": "default", "dark": "slate"}[scheme]:
        found.append(f"shows the scheme {facts['scheme']}")
    if os.environ.get("BARDLET_AXE"):
        browser.value(Path(os.environ["BARDLET_AXE"]).read_text(encoding="utf-8") + "; 1")
        found += browser.value(AXE)
    return found


def broken(facts: dict[Path, dict[str, Any]], page: Path) -> list[str]:
    """Return the links of a page to files and headings that do not exist."""
    found = []
    for address in facts[page]["links"]:
        file, heading = urldefrag(address)
        if file.startswith("file:"):
            path = Path(unquote(file.removeprefix("file://")))
            known = facts[path]["ids"] if path in facts else []
            if not path.is_file() or (heading and unquote(heading) not in known):
                found.append(f"broken link {address}")
    return found


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
    assert len(losses) == len(LADDER)
    assert losses[6] < losses[0] < losses[1], "the average is worse than the bigram"
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


@pytest.mark.parametrize("rung", LARGER, ids=lambda rung: rung.name)
def test_a_rung_of_the_readers_own_reads_a_sentence(rung: Rung, larger: Path, site: Path, browser: Browser) -> None:
    """Every head and the lens of each block, and at each position the probabilities that torch computes."""
    show(browser, site / "rungs" / f"{rung.number:02}-{rung.name}.html")
    sentence = "That is the question, not an answer."
    type_into(browser, ".live input", sentence)
    origin, = texts(browser, ".live > .live-hint:last-child")
    assert origin.startswith(f"This is your own rung {rung.number}, trained")
    assert texts(browser, ".live .tokens") == [sentence] and texts(browser, ".live [role=status]") == [""]
    assert texts(browser, ".live-body tbody th") == ["1.1", "1.2", "2.1", "2.2", "embedding", "block 1", "block 2"]
    assert texts(browser, ".live-seen") == [sentence[-16:].replace(" ", "\u2423")] * 4
    browser.value("document.querySelector('.live .tokens').focus(); 1")
    browser.press("Home")
    assert texts(browser, ".live-seen") == ["T"] * 4 and "After this \u201cT\u201d" in texts(browser, ".live p")[2]

    model, tokenizer = hf.read_folder(larger / f"{rung.number:02}-{rung.name}" / "seed-1337")
    ids = torch.from_numpy(tokenizer.encode(sentence)).long()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(html.rounded(parameter, "int8"))
        windows = [ids[max(0, t - 15) : t + 1][None] for t in range(len(ids))]
        expected = torch.stack([F.softmax(model.eval()(window)[0, -1], -1) for window in windows])
    shown = browser.value("bardletLive[0].reading.steps.map((step) => Array.from(step.logits))")
    torch.testing.assert_close(F.softmax(torch.tensor(shown), -1), expected, atol=1e-5, rtol=1e-3)
