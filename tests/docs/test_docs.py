"""The course's pages: every directive works, every rung has a page, and no code is pasted."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bardlet.config.pretraining import TrainConfig
from bardlet.errors import BardletError
from bardlet.ladder.rungs import CPU, LADDER, SMALL

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if path.name != "where.md")
HEADINGS = ["What", "Why", "The figure", "The code", "Is my loss normal?", "Exercise"]


def load(path: Path, name: str) -> Any:
    """Load a file outside the package as a module, with its folder first on the path, as mkdocs does."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


site = load(DOCS / "directives.py", "bardlet_docs_directives")
losses, engine_table, starters = (sys.modules[name] for name in ("losses", "engine_table", "starters"))
answers = load(DOCS / "answers.py", "bardlet_docs_answers")


def measured(falls_by: float = 0.05, deviation: float = 0.004, seeds: Sequence[int] = (1337, 1338, 1339)) -> Any:
    """Return made-up results of a ladder, in which the loss falls by `falls_by` from rung to rung."""

    def loss(mean: float) -> dict[str, float]:
        return {"mean": mean, "deviation": deviation, "low": mean - 0.01, "high": mean + 0.01}

    rungs = {rung.name: {"parameters": 1000, "steps": 5000, "seconds": 10.0, "seeds": seeds,
                         "val_loss": loss(2.5 - falls_by * rung.number), "val_loss_lecture": loss(2.5),
                         "losses": {str(seed): 2.5 - falls_by * rung.number for seed in seeds},
                         "train_loss": loss(2.4), "sample": "To be", "lecture": rung.lecture,
                         "made": {"processor": "a machine", "threads": 2 if rung.scaled else 1},
                         "recorded": {"date": "2026-01-01", "commit": "abc"}} for rung in LADDER}
    note = {"date": "2026-01-02", "commit": "def", "machine": {"processor": "another", "cores": 2}}
    column = "nats per character, one seed"
    extras = {"dropout 0": note | {"figures": rungs["dropout"] | {"seconds": {"mean": 5.0}, "val_loss": loss(2.0)},
                                   "rung": rungs["dropout"]},
              "addition": note | {"figures": [{"hints": "both", "exact": 0.99}]},
              "finetune": note | {"figures": [{"run": name, column: 1.5}
                                              for name in ("scratch", "finetuned", "same steps")]}}
    return {"machine": "a machine", "date": "2026-01-01", "commit": "abc", "rungs": rungs, "extras": extras}


@pytest.fixture
def course(tmp_path: Path) -> Any:
    """A course with all results and pictures; experiments do not run."""
    figures = tmp_path / "figures"
    figures.mkdir()
    for page in PAGES:
        for name, argument in site.DIRECTIVE.findall((DOCS / page).read_text(encoding="utf-8")):
            if name == "figure":
                stem = argument.partition("|")[0].strip()
                (figures / f"{stem}.png").touch()
                (figures / f"{stem}-dark.png").touch()
    shutil.copy(DOCS / "translation.json", tmp_path)
    entries = {name: {"seeds": 1, "measures": "loss", "figures": {"all": 2.5}} for name in answers.ANSWERS}
    return site.Course(tmp_path, measured(), entries)


@pytest.mark.parametrize("page", PAGES)
def test_every_directive_works(page: str, course: Any) -> None:
    text = site.expand((DOCS / page).read_text(encoding="utf-8"), page, course)
    assert not site.DIRECTIVE.search(text), "a directive remains"


@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.name)
def test_every_rung_has_a_page(rung: Any) -> None:
    text = (DOCS / "rungs" / f"{rung.number:02}-{rung.name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {rung.number}. {rung.title}\n")
    assert re.findall(r"^## (.*)", text, re.M) == HEADINGS
    assert '??? success "Answer"' in text and f"{{{{ losses: rung {rung.number} }}}}" in text


@pytest.mark.parametrize("exercise", starters.EXERCISES[:13], ids=lambda exercise: exercise.name)
def test_the_starter_stands_before_the_code_that_gives_it_away(exercise: Any, course: Any) -> None:
    """The page's section on the code begins with the starter. A listing of what to write is folded."""
    text = (DOCS / exercise.page).read_text(encoding="utf-8").partition("\n## The code\n")[2].partition("\n## ")[0]
    assert text.startswith(f"\n{{{{ starter: {exercise.name} }}}}\n")
    shown = re.sub(r"^\?\?\? .*\n(?:\n|    .*\n)+", "", site.expand(text, exercise.page, course), flags=re.M)
    opened = "\n".join(re.findall(r"^~~~ \{ \.python .*?^~~~$", shown, re.M | re.S))
    named = {words(name)[-1] for name in re.findall(r"^(?:class|def) (\w+)", opened, re.M)}
    assert not named & {words(part.partition(".")[0])[-1] for part in exercise.parts}


def words(name: str) -> list[str]:
    """Return the words of a name: RMSNorm is rms, norm."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


@pytest.mark.parametrize("exercise", starters.EXERCISES, ids=lambda exercise: exercise.name)
def test_a_starter_file_is_its_answer_without_the_parts(exercise: Any, course: Any) -> None:
    """As docs/starters.py writes it; its page shows it. An exercise done in a clone counts as committed."""
    file = f"exercises/{exercise.file}"
    assert starters.starter(exercise) in ((ROOT / file).read_text(encoding="utf-8"), committed(file)), (
        f"{file} is not what docs/starters.py writes: call python docs/starters.py, which overwrites your work there")
    page = (DOCS / exercise.page).read_text(encoding="utf-8")
    assert f"{{{{ starter: {exercise.name} }}}}" in page
    shown = site.expand(page, exercise.page, course)
    assert f"bardlet check exercises/{exercise.file}\n" in shown and '??? success "Code that passes"' in shown


def committed(file: str) -> str:
    """Return the text of a file at git's HEAD; empty outside a clone."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(ROOT), "show", f"HEAD:./{file}"]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8").stdout


@pytest.mark.parametrize("page", PAGES)
def test_links_work(page: str) -> None:
    """Every link goes to an existing page and heading; the last line of a course page links to the next page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        other = ((DOCS / page).parent / path).resolve() if path else DOCS / page
        assert other.exists(), target
        slugs = [re.sub(r"[^\w]+", "-", title.lower()).strip("-")
                 for title in re.findall(r"^#+ (.*)", other.read_text(encoding="utf-8"), re.M)]
        assert not anchor or anchor in slugs, target
    last = [line for line in text.splitlines() if line.strip()][-1]
    assert ".md)" in last or page.startswith(("guide/", "reference/")), "the last line must link to the next page"


def test_all_pages_are_in_the_navigation() -> None:
    nav = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    assert sorted(nav) == PAGES and len(nav) == len(set(nav))


@pytest.mark.parametrize("page", PAGES)
def test_no_code_is_pasted(page: str) -> None:
    """No four consecutive lines of a page occur in a source file: code comes from directives."""
    sources = [path.read_text(encoding="utf-8") for folder in ("src", "docs") for path in (ROOT / folder).rglob("*.py")]
    in_sources = {lines for text in sources for lines in four_lines(text)}
    assert not in_sources & set(four_lines((DOCS / page).read_text(encoding="utf-8")))


def four_lines(text: str) -> list[tuple[str, ...]]:
    """Return every four consecutive lines, ignoring indentation and nearly empty lines."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 2]
    return [tuple(lines[i : i + 4]) for i in range(len(lines) - 3)]


@pytest.mark.parametrize(("line", "message"), [
    ("{{ curve: rung 3 }}", "unknown directive; choose from answer, changes, code"),
    ("{{ code: rung 99 }}", "there is no rung 99"),
    ("{{ changes: rung 1 }}", "the first rung has no rung before it"),
    ("{{ source: bardlet.training.losses.nothing }}", "losses.py defines no 'nothing'"),
    ("{{ source: docs/nothing.py }}", "there is no file docs/nothing.py"),
    ("{{ source: bardlet.training.losses.dpo_loss | zebra }}", "has no line with 'zebra'"),
    ("{{ experiment: nothing }}", "unknown experiment"),
    ("{{ starter: nothing }}", "there is no exercise 'nothing'; choose from bigram"),
    ("{{ figure: nothing }}", "docs/figures/nothing.png is missing"),
    ("{{ setting: scaled nothing }}", "name a size, as in: scaled n_embd"),
    ("{{ measured: nothing }}", "docs/measured.json has no 'nothing'"),
    ("{{ answer: nothing }}", "docs/answers.json has no 'nothing'"),
    ("see {{ table: 1-7 }}", "must be on a line of its own"),
])  # fmt: skip
def test_bad_directive_names_page_and_line(line: str, message: str, course: Any) -> None:
    with pytest.raises(BardletError, match=f"docs/a.md, line 3: .*{re.escape(message)}"):
        site.expand(f"# A\n\n{line}\n", "a.md", course)


def test_only_a_draft_may_lack_results(course: Any) -> None:
    course.measured = {}
    with pytest.raises(BardletError, match="has no rung 'one-head'"):
        site.expand("{{ losses: rung 3 }}", "a.md", course)
    course.draft = True
    assert site.expand("{{ losses: rung 3 }}", "a.md", course) == "*not measured yet*"


@pytest.mark.parametrize(("falls_by", "deviation", "text"), [
    (0.05, 0.004, "a fall of 0.0500 with"), (0.05, 0.004, "of 0.0409 to 0.0591 (4 degrees of freedom). **It helped.**"),
    (-0.05, 0.004, "a rise of 0.0500 with"), (-0.05, 0.004, "of 0.0409 to 0.0591"), (-0.05, 0.004, "It did not help"),
    (0.008, 0.004, "of −0.0011 to 0.0171"), (0.008, 0.004, "no difference detected"), (0.05, 0.0, "too few to tell"),
])  # fmt: skip
def test_verdict_follows_from_the_losses(falls_by: float, deviation: float, text: str, course: Any) -> None:
    """Two means of three seeds, equal deviations: 4 degrees of freedom, 2.776 * sqrt(2 * 0.004^2 / 3) = 0.0091."""
    course.measured = measured(falls_by, deviation)
    assert text in site.expand("{{ verdict: rung 9 }}", "a.md", course)


def test_one_seed_gives_no_verdict(course: Any) -> None:
    course.measured = measured(seeds=[1337])
    assert "too few to tell" in site.expand("{{ verdict: rung 9 }}", "a.md", course)


@pytest.mark.parametrize(("freedom", "factor"), [
    (1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5.7, 2.47847), (8, 2.30600), (100, 1.98397),
])  # fmt: skip
def test_t_quantile_matches_published_tables(freedom: float, factor: float) -> None:
    """Two-sided, 95 %; the value for 5.7 comes from an independent numerical integration."""
    assert losses.t_quantile(freedom) == pytest.approx(factor, rel=1e-5)
    if freedom == 1:  # Cauchy's distribution, in closed form
        assert losses.t_quantile(1, 0.5) == pytest.approx(1)


def test_welchs_degrees_of_freedom() -> None:
    """Between the freedom of the smaller sample and that of both together; unequal deviations reduce it."""
    def rung(deviation: float, n: int) -> dict[str, Any]:
        return {"val_loss": {"mean": 2.0, "deviation": deviation}, "seeds": list(range(n))}

    assert losses.difference(rung(0.01, 5), rung(0.01, 5), False)[2] == pytest.approx(8)
    assert losses.difference(rung(0.01, 5), rung(1e-9, 3), False)[2] == pytest.approx(4)
    assert 2 < losses.difference(rung(0.017, 3), rung(0.010, 3), False)[2] < 4


def test_rungs_of_the_same_run_are_compared_seed_by_seed(course: Any) -> None:
    """Rung 13 keeps other weights of rung 12's runs, so the effect of a seed cancels; this is the only such pair."""
    assert [b.number for a, b in itertools.pairwise(LADDER) if losses.same_run(a, b)] == [13]
    rungs = course.measured["rungs"]
    falls = [0.043, 0.035, 0.031]
    for name, values in (("muon", [1.70, 1.60, 1.65]), ("average", [1.70 - 0.043, 1.60 - 0.035, 1.65 - 0.031])):
        rungs[name] |= {"losses": dict(zip(("1337", "1338", "1339"), values, strict=True)),
                        "val_loss": {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}}
    half = 4.30265 * statistics.stdev(falls) / math.sqrt(3)
    text = site.expand("{{ verdict: rung 13 }}", "a.md", course)
    mean = statistics.mean(falls)
    assert f"of {mean - half:.4f} to {mean + half:.4f} (seed by seed, 2 degrees of freedom). **It helped.**" in text
    del rungs["average"]["losses"]
    with pytest.raises(BardletError, match="has no losses by seed"):
        site.expand("{{ verdict: rung 13 }}", "a.md", course)


def test_band_needs_five_seeds(course: Any) -> None:
    assert "normal" not in site.expand("{{ losses: rung 3 }}", "a.md", course)
    course.measured = measured(seeds=range(5))
    assert "**2.340 to 2.360**" in site.expand("{{ losses: rung 3 }}", "a.md", course)


def test_changes_compare_classes_of_the_same_kind(course: Any) -> None:
    text = site.expand("{{ changes: rung 5 }}", "a.md", course)
    assert "FeedForwardModel, compared with MultiHeadModel of rung 4" in text
    assert [line for line in text.splitlines() if "self.ffwd" in line and not line.startswith("+")] == []
    assert "-optimizer = 'adamw'\n+optimizer = 'muon'" in site.expand("{{ changes: rung 12 }}", "a.md", course)


@pytest.mark.parametrize(("rung", "pairs"), [
    (6, ["ProjectedAttention, compared with MultiHeadAttention", "WideFeedForward, compared with FeedForward",
         "ResidualModel, compared with FeedForwardModel"]),
    (8, ["DropoutAttention, compared with ProjectedAttention", "DropoutFeedForward, compared with WideFeedForward",
         "DropoutBlock, compared with LayerNormBlock", "DropoutModel, compared with LayerNormModel"]),
    (10, ["SwiGLUBlock, compared with RotaryBlock", "SwiGLUModel, compared with RotaryModel"]),
])  # fmt: skip
def test_changes_list_every_pair_of_classes(rung: int, pairs: list[str], course: Any) -> None:
    text = site.expand(f"{{{{ changes: rung {rung} }}}}", "a.md", course)
    assert re.findall(r'title="(.*) of rung', text) == pairs


@pytest.mark.parametrize(("lecture_way", "sentence"), [
    (2.274, "our 2.27 is 0.01 below its number"), (2.2849, "our 2.28 agrees with its number"),
    (2.286, "our 2.29 is 0.01 above its number"),
])  # fmt: skip
def test_difference_from_the_lecture_uses_rounded_losses(lecture_way: float, sentence: str, course: Any) -> None:
    course.measured["rungs"]["multi-head"]["val_loss_lecture"]["mean"] = lecture_way
    assert sentence in site.expand("{{ losses: rung 4 }}", "a.md", course)


def test_sizes_come_from_the_ladder(course: Any) -> None:
    assert site.expand("{{ setting: scaled n_embd }} {{ setting: small block_size }}", "a.md", course) \
        == f"{CPU['n_embd']} {SMALL['block_size']}"
    epochs = 5000 * CPU["batch_size"] * CPU["block_size"] / 1_003_854
    assert site.expand("{{ seen: rung 8 }}", "a.md", course) == f"{epochs:.1f} times"


def test_table_names_machine_and_commit_of_its_rungs(course: Any) -> None:
    """Small rungs show one thread, even if the file as a whole names two."""
    text = site.expand("{{ losses: rung 3 }}", "a.md", course)
    assert "on a machine, 1 thread; recorded 2026-01-01 at commit `abc`." in text
    assert "on a machine, 2 threads; recorded" in site.expand("{{ table: 8-13 }}", "a.md", course)
    mixed = course.measured["rungs"]["one-head"]
    mixed["made"], mixed["recorded"] = [{"processor": "x", "threads": 1}, {"processor": "y", "threads": 4}], None
    assert "on a machine, 1 thread; x, 1 thread; y, 4 threads; rec" in site.expand("{{ table: 1-7 }}", "a.md", course)
    assert "not yet recorded with a commit" in site.expand("{{ losses: rung 3 }}", "a.md", course)
    assert "| training time |" in site.expand("{{ table: 1-7 }}", "a.md", course)


def test_compare_shows_the_rung_of_the_same_measurement(course: Any) -> None:
    course.measured["rungs"]["dropout"] = measured(falls_by=0.2)["rungs"]["dropout"] | {"steps": 9}  # retrained
    text = site.expand("{{ compare: dropout 0 with rung 8 }}", "a.md", course)
    assert "| rung 8 | 2.400 ± 0.004 | 2.100 ± 0.004 | 10 s |" in text and "| 2.000 ± 0.004 | 5 s |" in text
    assert "5,000 steps each" in text and "is 0.100 higher than with dropout 0. Recorded 2026-01-02 at" in text
    row = "extras/finetune/figures/scratch/nats per character, one seed"
    assert site.expand(f"{{{{ measured: {row} }}}}", "a.md", course) == "1.500"


def test_settings_come_from_the_ladder(course: Any) -> None:
    text = site.expand("{{ settings }}", "a.md", course)
    assert f"| `n_embd`, C | {SMALL['n_embd']} | {CPU['n_embd']} | 384 |" in text and "| set by time |" in text
    assert "rung 1: `steps = 3000`, `lr = 0.01`; rung 12:" in text


def test_committed_results_are_complete() -> None:
    """The committed results and pictures suffice for every page."""
    if not (DOCS / "measured.json").exists():
        pytest.skip("docs/measured.json: the ladder has not been measured yet")
    real = site.Course.load(DOCS)
    assert not real.draft
    for page in PAGES:
        site.expand((DOCS / page).read_text(encoding="utf-8"), page, real)


def test_source_highlights_lines() -> None:
    text = site.expand("{{ source: bardlet.models.encdec.CrossBlock | encoder_attn }}", "a.md", site.Course.load(DOCS))
    head, *lines = text.splitlines()
    numbers = re.search(r'hl_lines="([\d ]+)"', head)
    assert numbers and [lines[int(n) - 1] for n in numbers[1].split()] == [
        line for line in lines if "encoder_attn" in line]


def test_answers_name_their_measure_and_seeds(course: Any) -> None:
    """Exact counts have no seed."""
    course.answers = {"a": {"seeds": 2, "measures": "loss", "figures": {"x": 2.5}},
                      "b": {"seeds": 1, "measures": "parameters", "figures": {"x": 1056.0}}}
    a, b = (site.expand(f"{{{{ answer: {name} }}}}", "a.md", course) for name in ("a", "b"))
    assert a.endswith("loss |\n| --- | --- |\n| x | 2.500 |\n\nMean of 2 seeds.")
    assert b.endswith("parameters |\n| --- | --- |\n| x | 1,056 |")


def test_curves_explain_their_numbers(course: Any) -> None:
    assert "Rung 13 ends far above" in site.expand("{{ figure: loss-curves-scaled | x }}", "a.md", course)
    small = site.expand("{{ figure: loss-curves-small | x }}", "a.md", course)
    assert "slightly off the number in the legend" in small and "Rung 13" not in small


def test_text_of_the_answers_is_any_file(tmp_path: Path) -> None:
    """A file of the learner's, or one line of text when there is none."""
    (tmp_path / "my.txt").write_text("abc" * 100, encoding="utf-8")
    text = answers.Text(str(tmp_path / "my.txt"))
    assert text.chars == ["a", "b", "c"] and len(text.train) == 270 and len(text.val) == 30
    with pytest.raises(SystemExit, match=r"nothing\.txt"):
        answers.Text(str(tmp_path / "nothing.txt"))


def test_every_answer_has_results() -> None:
    entries = json.loads((DOCS / "answers.json").read_text(encoding="utf-8"))
    assert set(entries) == set(answers.ANSWERS)
    assert all(entries[name]["measures"] == measures for name, (_, _, measures) in answers.ANSWERS.items())


@pytest.mark.parametrize("name", ["first loss", "same distance", "centered", "parameters of a gate", "sharper queries",
                                  "muon update"])  # fmt: skip
def test_answers_without_training_match_the_results(name: str) -> None:
    """They reproduce answers.json: two on Tiny Shakespeare, the others on any text with 65 characters."""
    if name in ("first loss", "muon update"):
        if not os.environ.get("BARDLET_DATA"):
            pytest.skip("needs BARDLET_DATA, with Tiny Shakespeare in it")
        text = answers.Text()
    else:
        text = artificial_text()
    figures = answers.ANSWERS[name][0](text, 1337)
    expected = json.loads((DOCS / "answers.json").read_text(encoding="utf-8"))[name]["figures"]
    assert set(figures) == set(expected)
    assert figures == pytest.approx(expected, rel=1e-3, abs=1e-4)


def artificial_text() -> Any:
    """Return a text with as many characters as Tiny Shakespeare, in a repeating cycle."""
    text = answers.Text.__new__(answers.Text)
    text.chars = [chr(i) for i in range(65)]
    ids = torch.arange(65).repeat(20)
    text.train, text.val = ids[:1170], ids[1170:]
    return text


def test_choices_are_made_without_the_validation_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The development split is the last tenth of the training part, and the number of heads is chosen on it."""
    text = artificial_text()
    development = text.development()
    assert torch.equal(torch.cat([development.train, development.val]), text.train) and len(development.val) == 117
    texts: list[Any] = []
    monkeypatch.setattr(answers, "train", lambda model, text, seed: texts.append(text) or 0.0)
    answers.number_of_heads(text, 1337)
    assert len(texts) == 6 and all(torch.equal(text.val, development.val) for text in texts)


def test_answers_restore_the_rungs_they_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if training fails."""
    average, forward = answers.lecture.average_by_softmax, answers.lecture.ResidualBlock.forward

    def fail(model: Any, text: Any, seed: int) -> float:
        if (answers.lecture.average_by_softmax, answers.lecture.ResidualBlock.forward) != (average, forward):
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(answers, "train", fail)
    for name in ("only itself", "without residual"):
        with pytest.raises(KeyboardInterrupt):
            answers.ANSWERS[name][0](artificial_text(), 1337)
        assert (answers.lecture.average_by_softmax, answers.lecture.ResidualBlock.forward) == (average, forward)


def test_the_keyboard_reaches_code_and_tables() -> None:
    code, linked = "<pre><span></span><code>a\nb</code></pre>", '<table><td><a href="b.html">b</a></td></table>'
    got = site.reachable(f"{code}<table><td>1</td></table>{linked}<p><code>c</code></p>")
    assert got == ('<pre><span></span><code><span tabindex="0">a\nb</span></code></pre>'
                   f'<table tabindex="0"><td>1</td></table>{linked}<p><code>c</code></p>')


def test_figures_and_options_stay_on_one_line_but_code_is_as_written() -> None:
    html = "<td>92.3 ± 1.6 %</td><pre><code>7 % 2 --a</code></pre> 95 % <code>5 ± 1 % a-b --lr=1</code> a % b"
    expected = ("<td>92.3\u00a0±\u00a01.6\u00a0%</td><pre><code>7 % 2 --a</code></pre> 95\u00a0% "
                '<code>5 ± 1 % a-b <span class="option">--lr=1</span></code> a % b')
    assert site.unbroken(html) == expected


def test_long_listings_are_folded(course: Any) -> None:
    """The listing that is named stays open; the others follow, folded."""
    opened, folded = site.expand("{{ code: rung 3 | Head }}", "a.md", course).split("??? note")
    assert "class Head(" in opened and "class OneHeadModel(" in folded and "class OneHeadModel(" not in opened
    opened, folded = site.expand("{{ changes: rung 9 | RotaryBlock }}", "a.md", course).split("??? note")
    assert 'title="RotaryBlock, compared' in opened and folded.count("compared with") == 3
    with pytest.raises(BardletError, match="no listing 'Nothing'; choose from Head, OneHeadModel"):
        site.expand("{{ code: rung 3 | Nothing }}", "a.md", course)


def test_a_table_with_two_sizes_says_so(course: Any) -> None:
    """Rung 8's small model beside the lecture's large one."""
    course.measured["rungs"]["dropout"]["parameters"] = 816_640
    for directive in ("{{ losses: rung 8 }}", "{{ table: 8-13 }}"):
        text = site.expand(directive, "a.md", course)
        assert "**Two sizes in one table**" in text and "13 times the parameters" in text
    assert "| the lecture's large model (10.8 M parameters) | 1.48 |" in site.expand(
        "{{ losses: rung 8 }}", "a.md", course)
    for directive in ("{{ losses: rung 7 }}", "{{ table: 1-7 }}", "{{ losses: rung 9 }}"):
        assert "Two sizes" not in site.expand(directive, "a.md", course)


def test_squared_relu_is_a_causal_model() -> None:
    squared = load(DOCS / "exercises" / "squared_relu.py", "bardlet_docs_squared_relu")
    config = TrainConfig(model="rotary", n_layer=2, n_head=2, n_embd=16, block_size=8).model_config(11)
    torch.manual_seed(0)
    model = squared.SquaredModel(config).eval()
    idx = torch.randint(11, (2, 8))
    other = idx.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    assert model(idx).shape == (2, 8, 11)
    torch.testing.assert_close(model(idx)[:, :5], model(other)[:, :5])  # no position sees the future


# ---------------------------------------------------------------- engines

LINE = {"model": "gpt2-char-english", "engine": "onnxruntime", "version": "1.0", "texts": 100, "prompts": 90,
        "ties": []}


def test_a_row_adds_up_the_models_of_an_engine() -> None:
    lines = [LINE, {**LINE, "model": "qwen3-bpe-chinese", "ties": [2e-5]}, {**LINE, "engine": "page", "version": ""}]
    text = engine_table.table(lines)
    assert "| onnxruntime (1.0) | 2 | 200 | 180 | 1 |" in text
    assert "| page | 1 | 100 | 90 | 0 |" in text
    assert "- onnxruntime, qwen3-bpe-chinese: 2.0e-05" in text


def test_what_llama_cpp_rounds_is_said() -> None:
    lines = [{**LINE, "engine": "llama.cpp", "differ": 2},
             {**LINE, "engine": "llama.cpp", "differ": 1, "model": "qwen3-byte-english"}]
    assert "differs after 2 of 90 prompts" in engine_table.table(lines)


def test_the_results_cover_what_the_page_says() -> None:
    """Every engine has at least 14 language models, 100 prompts (in Chromium 20), and at most five near ties in all."""
    every = [json.loads(line) for line in (ROOT / engine_table.RESULTS).read_text(encoding="utf-8").splitlines()]
    lines = list({(line["engine"], line["model"]): line for line in every}.values())
    models = {engine: {line["model"] for line in lines if line["engine"] == engine}
              for engine in {line["engine"] for line in lines}}
    assert {"transformers 5", "transformers 4", "llama.cpp", "onnxruntime", "transformers.js, Node",
            "transformers.js, Chromium", "page, fp32", "page, Chromium"} <= set(models)
    for engine, names in models.items():
        bases = [name for name in names if name.count("-") == 2 and not name.startswith("encdec")]
        assert len(bases) >= 14, engine
        ties = [gap for line in lines if line["engine"] == engine for gap in line["ties"]]
        assert len(ties) <= 5 and max(ties, default=0.0) < 1e-4, engine
    for line in lines:
        tuned = line["model"].endswith(("-sft", "-lora"))
        if not line["model"].endswith("-reward"):
            assert line["prompts"] == (20 if tuned or "Chromium" in line["engine"] else 100), line
        assert line.get("differ", 0) <= 0.05 * line["prompts"], line
