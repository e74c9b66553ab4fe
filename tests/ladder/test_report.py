"""The ladder's report: the rungs' code, their pictures, and the HTML page."""

from __future__ import annotations

import ast
import dataclasses
import html
import itertools
import re
import struct
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import pytest
import torch

from bardlet import models, tokenizer
from bardlet.config.model import ModelConfig
from bardlet.ladder import pictures, report, rungs, sources
from bardlet.ladder.pictures import DARK, LIGHT, Palette
from bardlet.ladder.report import fit_sentence, picture
from bardlet.ladder.run import Outcome
from bardlet.ladder.rungs import LADDER
from bardlet.run import hf, metrics

TOKENIZER = tokenizer.train_char("\n !,.:Tabehinoqrstu$", False)
SENTENCE = "To be, or not to be: that is the question"
FACTS: dict[str, Any] = {"text": "tinyshakespeare", "machine": "a processor, 2 threads", "date": "2026-01-31",
                         "versions": "bardlet 0, torch 0", "comparable": True, "minutes": None, "seconds": 1.0,
                         "seeds": [1, 2], "command": "bardlet ladder --rungs '1-7' <>"}
HOSTILE = "</script><b>bold</b> & \"quoted\" 'single' {{ 7 * 6 }}\n\n  https://example.org/" + "x" * 300


def tiny(name: str, block_size: int = 8) -> Any:
    """Return a small untrained rung with weights large enough to see in pictures."""
    torch.manual_seed(1)
    model = models.build(ModelConfig(name, TOKENIZER.vocab_size, block_size, n_layer=2, n_head=2, n_kv_head=2,
                                     n_embd=16, head_dim=8, n_inner=32, tie_embeddings=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def tiny_outcomes(folder: Path, numbers: Sequence[int], seeds: int = 1, sample: str = HOSTILE) -> list[Outcome]:
    """Write run folders of untrained rungs that look trained, and return their outcomes."""
    outcomes = []
    for rung in (r for r in LADDER if r.number in numbers):
        for seed in range(seeds):
            run = folder / f"{rung.number}-{seed}"
            run.mkdir(parents=True)
            model = tiny(rung.model, 24 if rung.scaled else 8)
            hf.write_folder(run, model, TOKENIZER)
            hf.write_weights(run, model.hf_state_dict())
            for step in range(0, 101, 20):
                metrics.append_metrics(run, {"step": step, "val_loss": 2 + 2 / (step + 1) + seed / 50})
                metrics.append_metrics(run, {"step": step, "train_loss": 2.0, "seconds": step / (10 + seed)})
            outcomes.append(Outcome(rung, seed, run, 12_345, 5000, 61.5, 2.0, 2.1 + seed / 10, 2.2 + seed / 10, sample))
    return outcomes


# ---------------------------------------------------------------------------- sources


@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.name)
def test_source_of_every_rung_is_valid_python(rung: rungs.Rung) -> None:
    """The source has all parts in order; highlighting works line by line and loses no text."""
    code = sources.source(rung)
    names = [node.name for node in ast.parse(code).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert names == [name.rpartition(":")[2] for name in rung.parts]
    lines = sources.highlighted(code)
    assert [html.unescape(re.sub(r"</?span[^>]*>", "", line)) for line in lines] == code.split("\n")
    assert all(line.count("<span") == line.count("</span>") for line in lines)


def test_parts_include_decorators_and_unknown_parts_raise() -> None:
    for name, file, start in (("evaluation/metrics.py:mean_loss", "evaluation/metrics.py",
                               "@torch.no_grad()\ndef mean_loss("),
                              ("Head", "models/lecture.py", "class Head("),
                              ("rope_cos_sin", "models/layers.py", "def rope_cos_sin("),
                              ("ladder/rungs.py:SMALL", "ladder/rungs.py", "SMALL = {")):
        part = sources.part(name)
        assert (part.name, part.file) == (name.rpartition(":")[2], file) and part.code.startswith(start)
        lines = (Path(report.__file__).parents[1] / file).read_text(encoding="utf-8").splitlines()[part.line - 1 :]
        assert "\n".join(lines).startswith(part.code)
    for name in ("NoSuchModel", "training/optim.py:nothing"):
        with pytest.raises(LookupError, match=name):
            sources.part(name)


@pytest.mark.parametrize("rung", LADDER[1:], ids=lambda rung: rung.name)
def test_comparison_contains_both_sources_exactly(rung: rungs.Rung) -> None:
    """The left and right sides reproduce both sources with line numbers, and each row has the right kind."""
    old, new = sources.source(LADDER[rung.number - 2]), sources.source(rung)
    rows = sources.side_by_side(old, new)
    left = [(row.left_number, row.left) for row in rows if row.left_number is not None]
    right = [(row.right_number, row.right) for row in rows if row.right_number is not None]
    assert left == list(enumerate(old.split("\n"), 1)) and right == list(enumerate(new.split("\n"), 1))
    for row in rows:
        kind = ("added" if row.left is None else "removed" if row.right is None else
                "same" if row.left == row.right else "changed")  # fmt: skip
        assert row.kind == kind


def test_changed_lines_share_a_row() -> None:
    """A renamed class is a changed line; a new line between old lines is added."""
    rows = sources.side_by_side(sources.source(LADDER[3]), sources.source(LADDER[4]))
    changed = {row.left.strip(): row.right.strip() for row in rows if row.kind == "changed" and row.left and row.right}
    assert changed["class MultiHeadModel(LectureModel):"] == "class FeedForwardModel(LectureModel):"
    assert "self.ffwd = FeedForward(config)" in [row.right.strip() for row in rows if row.kind == "added" and row.right]
    assert not [row for row in rows if row.kind == "removed"]
    assert [row.kind for row in sources.side_by_side("", "a = 1\nb = 2")] == ["added", "added"]
    assert [row.kind for row in sources.side_by_side("a = 1", "a = 1")] == ["same"]


def test_rungs_with_related_code_are_compared() -> None:
    compared = {rung.name: sources.rung_to_compare(rung) for rung in LADDER}
    assert compared["bigram"] is None and compared["muon"] is None and compared["average"] is None
    for earlier, rung in itertools.pairwise(LADDER[:11]):
        assert compared[rung.name] == earlier
    rotary, swiglu = LADDER[8], LADDER[9]  # helpers that the next rung still uses are left out
    assert "class Head" in sources.source_to_compare(LADDER[6], LADDER[7])
    assert "class RMSNorm" in sources.source(rotary)
    assert "class RMSNorm" not in sources.source_to_compare(rotary, dataclasses.replace(swiglu, parts=("SwiGLUBlock",)))


def test_rungs_with_the_same_model_are_compared_by_settings() -> None:
    """Rungs 12 and 13: the changed settings, without sizes, which depend on the machine."""
    assert [rung.number for rung in LADDER if sources.same_model_predecessor(rung)] == [12, 13]
    old, new = (text.splitlines() for text in sources.settings_to_compare(LADDER[10], LADDER[11]))
    assert set(new) - set(old) == {"optimizer = 'muon'", "muon_lr = 0.01"} and set(old) - set(new) == {
        "optimizer = 'adamw'"}  # fmt: skip
    old, new = (text.splitlines() for text in sources.settings_to_compare(LADDER[11], LADDER[12]))
    assert (set(old) - set(new), set(new) - set(old)) == ({"keep = 'last'"}, {"keep = 'average'"})
    assert not any(line.startswith("n_embd") for line in old)
    own = dataclasses.replace(LADDER[11], settings={**LADDER[11].settings, "lr": 3e-3})  # a rung's own learning rate
    assert [line for text in sources.settings_to_compare(LADDER[10], own) for line in text.splitlines()
            if line.startswith("lr")] == ["lr = 0.001", "lr = 0.003"]  # fmt: skip


# ---------------------------------------------------------------------------- pictures


def size_of(png: Path) -> tuple[int, int]:
    """Return the width and height of a PNG."""
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.laid_out
def test_picture_is_drawn_for_both_themes_and_reproducible(tmp_path: Path) -> None:
    def paint(palette: Palette) -> Any:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(layout="constrained")
        axes.plot([1, 2], color=palette.accent)
        return figure

    for folder in ("one", "other"):
        pictures.draw(tmp_path / folder, "line", paint)
    for name in ("line.png", "line-dark.png"):
        assert size_of(tmp_path / "one" / name)[0] == int(pictures.WIDTH * pictures.DPI)
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert (tmp_path / "one/line.png").read_bytes() != (tmp_path / "one/line-dark.png").read_bytes()


@pytest.mark.parametrize(("palette", "background"), [(LIGHT, "#ffffff"), (DARK, "#1e2129")], ids=["light", "dark"])
def test_colors_have_enough_contrast(palette: Palette, background: str) -> None:
    """4.5:1 for text and 3:1 for lines (WCAG AA); eight different line colors."""

    def luminance(color: str) -> float:
        channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(color: str) -> float:
        low, high = sorted((luminance(color), luminance(background)))
        return (high + 0.05) / (low + 0.05)

    assert min(contrast(palette.foreground), contrast(palette.muted)) >= 4.5
    assert min(contrast(color) for color in (palette.accent, palette.second, *palette.series)) >= 3
    assert len(set(palette.series)) == 8


WITH_ATTENTION = ("one-head", "multi-head", "residual", "dropout", "rotary", "qk-norm")


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_attention_rows_sum_to_one_and_hide_the_future(name: str) -> None:
    """The weights of every head for the last block_size tokens are the weights that the model uses."""
    model = tiny(name)
    maps = pictures.attention(model, torch.from_numpy(TOKENIZER.encode(SENTENCE)))
    assert len(maps) == (1 if name in ("one-head", "multi-head") else 2)
    for _, weights in maps:
        assert weights.shape == (1 if name == "one-head" else 2, 8, 8)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        assert not weights.triu(1).any()
    assert not any(module._forward_pre_hooks for module in model.modules())
    if name == "one-head":  # by hand: the head's output is these weights times its values
        idx = torch.from_numpy(TOKENIZER.encode(SENTENCE))[-8:]
        x = model.token_embedding_table(idx) + model.position_embedding_table.weight
        torch.testing.assert_close(model.lm_head(maps[0][1][0] @ model.sa_head.value(x)), model(idx[None])[0])


def test_rung_without_attention_has_no_maps_and_train_mode_is_kept() -> None:
    for rung in LADDER:
        assert bool(pictures.attention(tiny(rung.model), torch.zeros(3, dtype=torch.int64))) == rung.attends, rung.name
    model = tiny("dropout").train()
    assert len(pictures.attention(model, torch.zeros(3, dtype=torch.int64))) == 2 and model.training


def test_pictures_show_their_values_and_labels() -> None:
    """The axes hold the given numbers and labels, even if a label is LaTeX syntax."""
    probability = tiny("bigram").token_embedding_table.weight.detach().softmax(-1)
    texts = [TOKENIZER.decode([i]) for i in range(TOKENIZER.vocab_size)]
    table = pictures.bigram_table(probability, texts)(LIGHT).axes[0]
    np.testing.assert_allclose(table.images[0].get_array() ** 2, probability, rtol=1e-5)
    assert [t.get_text() for t in table.get_xticklabels()] == ["↵", "␣", *texts[2:]]
    assert (table.get_xlabel(), table.get_ylabel()) == ("next", "current")

    weights = pictures.attention(tiny("residual"), torch.arange(5))
    figure = pictures.attention_maps(weights, list("ab\n $"))(LIGHT)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 4 and [t.get_text() for t in shown[0].get_yticklabels()] == ["a", "b", "↵", "␣", "$"]
    values = shown[0].images[0].get_array()
    assert np.array_equal(values.mask, np.triu(np.ones((5, 5), bool), 1))
    np.testing.assert_allclose(values.filled(0), weights[0][1][0])
    last = pictures.last_row_of_attention(weights, list("abcde"))(LIGHT).axes[0]
    np.testing.assert_allclose(last.images[0].get_array()[2], weights[1][1][0, -1])

    positions = pictures.position_embeddings(torch.eye(4, 6))(DARK).axes
    np.testing.assert_allclose(positions[1].images[0].get_array(), np.eye(4))


def test_bigram_picture_of_a_large_vocabulary_shows_frequent_tokens() -> None:
    """With 300 tokens, of which the last 100 nearly always follow, the picture shows only these."""
    logits = torch.zeros(300, 300)
    logits[:, 200:] = 9.0
    axes = pictures.bigram_table(logits.softmax(-1), [f"t{i}" for i in range(300)])(LIGHT).axes[0]
    names = [t.get_text() for t in axes.get_xticklabels()]
    assert len(names) == pictures.MAX_BIGRAM_TOKENS and all(int(name[1:]) >= 200 for name in names)


def test_loss_curves_have_a_panel_per_kind_of_rung(tmp_path: Path) -> None:
    """Small rungs over steps, scaled rungs over seconds; the mean with a band over seeds."""
    outcomes = tiny_outcomes(tmp_path, (1, 3, 8), seeds=2)
    small, scaled = pictures.loss_curves(outcomes)(LIGHT).axes
    assert (small.get_xlabel(), scaled.get_xlabel()) == ("step", "seconds of training")
    assert [t.get_text() for t in small.get_legend().get_texts()] == ["1 bigram: 2.250", "3 one-head: 2.250"]
    x, y = small.lines[0].get_data()
    assert (x[0], x[-1]) == (0, 100) and y[-1] == pytest.approx(2 + 2 / 101 + 0.01) and len(small.collections) == 2
    assert scaled.lines[0].get_xdata()[-1] == pytest.approx(100 * 61.5 / 5000)  # at the speed of the fastest seed
    assert len(pictures.loss_curves(outcomes[:1])(LIGHT).axes) == 1


def test_invisible_characters_become_symbols() -> None:
    characters = ("a", " ", "\n", "\t", "\x00", "", "é")
    assert [pictures.printable(c) for c in characters] == ["a", "␣", "↵", "⇥", "·", "·", "é"]
    assert pictures.printable("<|endoftext|>") == "end"


# ---------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """The tags and attributes of a page; unclosed tags are an error."""

    VOID = ("meta", "img", "source", "br", "col")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of every tag with this name."""
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The path and text of a report with four rungs, three of them with two seeds, and a hostile sample."""
    folder = tmp_path_factory.mktemp("report")
    outcomes = tiny_outcomes(folder, (1, 4, 8), seeds=2) + tiny_outcomes(folder / "more", (13,))
    path = report.write(folder / "out", outcomes, "To be é or not to be: that is", FACTS)
    return path, path.read_text(encoding="utf-8")


def test_page_loads_nothing_from_the_network(written: tuple[Path, str]) -> None:
    """No URL, no script, and a policy that blocks both."""
    text = written[1].replace(str(markupsafe.escape(HOSTILE)), "")  # a URL in a sample is only text
    assert len(text) < len(written[1])
    assert not re.search(r"https?:|url\(|@import|<script|<iframe|<link|javascript:", text, re.IGNORECASE)
    assert not re.search(r"""(?:src|href|srcset|action|data)\s*=\s*["']?//""", text)
    page = Page(written[1])
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "srcset"):
                assert value is not None and value.startswith("data:image/png;base64,")
            assert not name.startswith("on")
    assert all((a["href"] or "").startswith("#") for a in page.all("a"))
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_generated_text_is_escaped(written: tuple[Path, str]) -> None:
    assert "</script>" not in written[1] and "<b>" not in written[1]
    escaped = "&lt;/script&gt;&lt;b&gt;bold&lt;/b&gt; &amp; &#34;quoted&#34; &#39;single&#39; {{ 7 * 6 }}\n\n  "
    assert escaped in written[1]
    assert "--rungs &#39;1-7&#39; &lt;&gt;" in written[1]


def test_page_is_well_formed_and_accessible(written: tuple[Path, str]) -> None:
    """Links have targets, ids are unique, pictures have alt texts, tables have headers, headings are nested."""
    page = Page(written[1])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "href"):
            if name in attributes:
                assert (attributes[name] or "").removeprefix("#") in ids
    assert page.all("html")[0]["lang"] == "en" and page.all("title") and page.all("main")
    assert all(len(i["alt"] or "") > 40 and i["width"] and i["height"] for i in page.all("img"))
    assert all(th.get("scope") for th in page.all("th"))
    assert [a["href"] for a in page.all("a") if (a["href"] or "").startswith("#rung")][:4] == [
        "#rung-1", "#rung-4", "#rung-8", "#rung-13"]  # fmt: skip
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_page_shows_the_measured_figures(written: tuple[Path, str]) -> None:
    path, text = written
    plain = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))
    assert "2.250 ± 0.071" in plain and "2.150 ± 0.071" in plain and "12,345" in plain
    assert "Removed from the sentence, because the model never saw them: é." in plain
    assert "Code: left, rung 3, one-head; right, rung 4, multi-head" in plain  # even if rung 3 was not trained
    assert "Settings: left, rung 12, muon; right, rung 13, average" in plain
    assert "keep = 'last'" in plain and "keep = 'average'" in plain
    assert "All training steps together took 7 min 10 s. The table shows the seconds" in plain  # seven runs of 61.5 s
    assert "The code of rung 13, average" in plain and "The code of rung 1, bigram" in plain
    assert "the last 8 characters of the sentence" in plain
    names = {p.name for p in (path.parent / "figures").iterdir()}
    expected = ("loss-curves", "01-bigram-table", "04-multi-head-positions", "04-multi-head-attention",
                "08-dropout-positions", "08-dropout-attention", "08-dropout-last", "13-average-attention",
                "13-average-last")  # fmt: skip
    assert names == {f"{name}{suffix}.png" for name in expected for suffix in ("", "-dark")}


def test_bands_and_lecture_figures_need_the_lecture_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The verdict on a loss; no verdict for another text."""
    monkeypatch.setattr(rungs, "bands", lambda: {"bigram": {"low": 2.4, "high": 2.6}})
    outcome = tiny_outcomes(tmp_path, (1,))[0]
    for loss, verdict in ((2.5, "normal"), (2.2, "lower than normal"), (2.7, "higher than normal")):
        row = report.rung_row(1, [dataclasses.replace(outcome, val_loss=loss)], comparable=True)
        assert (row.verdict, row.band, row.lecture, row.val_loss) == (verdict, "2.400 to 2.600", "2.50", f"{loss:.3f}")
    row = report.rung_row(1, [outcome], comparable=False)
    assert (row.verdict, row.band, row.lecture) == ("", "", "")
    text = report.write(tmp_path / "out", [outcome], "", {**FACTS, "comparable": False}).read_text(encoding="utf-8")
    assert "The lecture</th>" not in text and "they do not apply to this text" in text


def test_rungs_can_have_different_numbers_of_seeds(tmp_path: Path) -> None:
    """A folder can contain one rung with three seeds and another with one."""
    for name, outcomes, heading, column in (
            ("mixed", tiny_outcomes(tmp_path / "a", (1,), 3) + tiny_outcomes(tmp_path / "b", (4,)),
             "means over 1 or 3 seeds ± standard deviation", True),
            ("alike", tiny_outcomes(tmp_path / "c", (1, 4), 2), "means over 2 seeds ± standard deviation", False),
            ("single", tiny_outcomes(tmp_path / "d", (1,)), "All rungs</h3>", False)):
        text = report.write(tmp_path / name, outcomes, SENTENCE, FACTS).read_text(encoding="utf-8")
        assert heading in text and ("Seeds</th>" in text) == column, name
        assert ("fastest of 3 seeds" in text) == column and "of 1 seeds" not in text


def test_durations_are_formatted() -> None:
    assert [report.duration(s) for s in (0.2, 59.6, 61, 3599.6, 3600, 9000)] == [
        "0 s", "1 min 0 s", "1 min 1 s", "1 h 0 min", "1 h 0 min", "2 h 30 min"]  # fmt: skip


def test_note_on_a_sentence_appears_only_with_maps(tmp_path: Path) -> None:
    """Rung 1 has no attention maps, so its section has no note."""
    notes = [report.section(tmp_path / "out", outcome, report.rung_row(outcome.rung.number, [outcome], False),
                            "to Ωbe").note
             for outcome in tiny_outcomes(tmp_path, (1, 3))]
    assert notes[0] == "" and notes[1].startswith("Removed from the sentence")


def test_sentence_of_unknown_characters_is_replaced() -> None:
    assert fit_sentence(TOKENIZER, "to be", "") == ("to be", "")
    kept, note = fit_sentence(TOKENIZER, "to Ωbe", "")
    assert kept == "to be" and note.startswith("Removed from the sentence")
    kept, note = fit_sentence(TOKENIZER, "ΩΩ", "")
    assert kept == TOKENIZER.drop_unseen(report.SENTENCE)[0] and "Hamlet" in note
    greek = tokenizer.train_char("αβγ", False)
    assert fit_sentence(greek, "to be", "βα")[0] == "βα"
    assert fit_sentence(greek, "", "")[0] == "αβγ"


def test_picture_size_comes_from_its_file(tmp_path: Path) -> None:
    drawn = picture(tmp_path, "p", "positions", pictures.position_embeddings(torch.eye(3)), "alt", "caption")
    assert (drawn.width, drawn.height) == size_of(tmp_path / "figures" / "p.png")
    assert drawn.light.startswith("data:image/png;base64,") and drawn.light != drawn.dark


def test_long_tokens_and_other_scripts_are_drawn(tmp_path: Path) -> None:
    """Partial characters of a byte-level BPE, words and Chinese draw without a warning; words are rotated."""
    bpe = tokenizer.train_bpe(iter(["the bard sang: 春眠不覺曉。 " * 20]), 300)
    torch.manual_seed(0)
    model = models.build(ModelConfig("one-head", bpe.vocab_size, 8, 1, 2, 2, 16, 8, 32, tie_embeddings=False))
    drawn = report.attention_pictures(tmp_path, "words", model, bpe, "the bard sang: 春眠")
    assert len(drawn) == 1 and "春眠" in drawn[0].caption and "a row for each token" in drawn[0].alt
    table = pictures.bigram_table(torch.eye(3), ["the", " bard", "everlasting"])(LIGHT).axes[0]
    assert [(t.get_text(), t.get_rotation()) for t in table.get_xticklabels()] == [
        ("the", 90), ("␣bard", 90), ("everlas…", 90)]  # fmt: skip
