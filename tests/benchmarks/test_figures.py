"""The figures in README.md and docs/guide/benchmarks.md are those of the lines in benchmarks/results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import figures


@pytest.mark.parametrize("page", figures.PAGES)
def test_tables_are_those_of_the_results(page: str) -> None:
    """Run `python benchmarks/figures.py` if this fails: a line was added, or a table edited by hand."""
    text = (figures.ROOT / page).read_text(encoding="utf-8")
    assert figures.filled(text) == text


def test_each_table_is_on_a_page() -> None:
    found = [match[2] for page in figures.PAGES
             for match in figures.MARKED.finditer((figures.ROOT / page).read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(figures.TABLES)


def test_a_changed_figure_is_noticed() -> None:
    text = (figures.ROOT / "docs/guide/benchmarks.md").read_text(encoding="utf-8")
    wrong = text.replace("| bardlet | llama.cpp |", "| bardlet | llama |", 1)
    assert wrong != text and figures.filled(wrong) == text


def test_a_figure_without_a_line_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"results/peers\.jsonl has no line with {'model': 'none'}"):
        figures.newest("peers", model="none")
