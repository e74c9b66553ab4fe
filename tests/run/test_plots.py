"""Figures of a run: the bigram's line, and no empty panel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bardlet.run import fonts, metrics, plots
from bardlet.run.record import TextRecord


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that a test draws."""
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    return drawn


def write_lines(run: Path, *lines: dict[str, Any]) -> None:
    for line in lines:
        metrics.append_metrics(run, line)


def curves(axes: Any) -> dict[str, list[float]]:
    return {str(line.get_label()): list(map(float, line.get_ydata())) for line in axes.lines}


def test_the_loss_curve_has_the_bigrams_loss(tmp_path: Path, figures: list[Any]) -> None:
    """The dashed line has the unit of the curve, nats per token; an unknown loss has no line."""
    write_lines(tmp_path, {"step": 1, "train_loss": 4.0}, {"step": 2, "train_loss": 3.5}, {"step": 2, "val_loss": 3.6})
    record = TextRecord(bigram=2.5, characters_per_token=1.2)
    plots.loss_curve(tmp_path, "run", bigram=record.bigram_per_token())
    axes = figures[0].axes[0]
    assert curves(axes) == {"training": [4.0, 3.5], "validation": [3.6], "bigram": [3.0, 3.0]}
    assert axes.lines[-1].get_linestyle() == "--" and axes.get_ylabel() == "loss (nats per token)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation", "bigram"]
    plots.loss_curve(tmp_path, "run", bigram=TextRecord(bigram=2.5).bigram_per_token())
    assert "bigram" not in curves(figures[1].axes[0])


def test_a_single_point_is_visible(tmp_path: Path, figures: list[Any]) -> None:
    write_lines(tmp_path, {"step": 1, "train_loss": 4.0, "reward": 1.0, "kl": 0.5})
    plots.loss_curve(tmp_path, "run")
    plots.reward_curve(tmp_path, "run")
    assert [line.get_marker() for figure in figures for axes in figure.axes for line in axes.lines] == ["o"] * 3


def test_no_panel_is_empty(tmp_path: Path, figures: list[Any]) -> None:
    """Without rollouts there is no panel for the KL; without any data the panel says so."""
    plots.loss_curve(tmp_path, "run")
    plots.reward_curve(tmp_path, "run")
    assert [figure.axes[0].texts[0].get_text() for figure in figures] == ["no data in metrics.jsonl"] * 2
    write_lines(tmp_path, {"step": 1, "val_loss": -0.5}, {"step": 2, "reward": None, "kl": float("nan")})
    plots.reward_curve(tmp_path, "run")
    assert [curves(axes) for axes in figures[2].axes] == [{"held-out prompts": [0.5]}]
    write_lines(tmp_path, {"step": 3, "reward": 1.0, "kl": 0.1}, {"step": 4, "reward": 2.0, "kl": 0.2})
    plots.reward_curve(tmp_path, "run")
    assert [next(iter(curves(axes).values())) for axes in figures[3].axes] == [[1.0, 2.0], [0.1, 0.2]]
    plots.margins(tmp_path, "run", np.array([0.5, -0.1]), np.array([0.6]), np.array([0.5]), np.array([2]))
    assert all(axes.has_data() for axes in figures[4].axes)


@pytest.mark.parametrize("name", ["诗歌", "party 🎉", "a $x^ y$", "שלום", "plain"])
def test_a_title_has_no_missing_glyphs(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """https://github.com/PathVisio/pathvisio/issues/110: names with spaces and other scripts. `$` began a formula."""
    write_lines(tmp_path, {"step": 1, "train_loss": 4.0}, {"step": 2, "train_loss": 3.5})
    plots.loss_curve(tmp_path, name)
    plots.attention_maps(tmp_path / "map.png", np.ones((1, 1, 2, 2)), [name, "a"], ["b", name])
    assert (tmp_path / "loss.png").stat().st_size > 1000 and not [str(warning.message) for warning in recwarn]


def test_a_character_that_no_font_has_is_shown_by_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_family_with", lambda character: None)
    assert fonts.drawable(["诗 a", "🎉", "cost: $5"])[0] == ["\\u8bd7 a", "\\U0001f389", r"cost: \$5"]
    assert fonts.drawable(["a\x1b[2J\x07\x9b\tb", "a\nb"])[0] == ["a\\x1b[2J\\x07\\x9b\\tb", "a\nb"]
    assert fonts.drawable(["plain é"]) == (["plain é"], fonts.drawable(["x"])[1])


def test_a_font_that_has_the_character_is_used() -> None:
    """STIX comes with matplotlib, and has characters that the default font lacks."""
    from matplotlib.font_manager import findfont

    character = min(fonts._characters(findfont("STIXGeneral")) - fonts._characters(findfont("DejaVu Sans")))
    [text], families = fonts.drawable([character])
    assert text == character and len(families) == len(fonts.drawable(["x"])[1]) + 1
    assert character in fonts._characters(findfont(families[-1]))
