"""The course as a site: `make docs` builds it without a warning, and its pages load nothing from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("mkdocs", reason="needs the docs extra: pip install -e '.[docs]'")
pytest.importorskip("material", reason="needs the docs extra: pip install -e '.[docs]'")


def test_course_builds_without_warnings(tmp_path: Path) -> None:
    """`mkdocs build --strict` succeeds; no page has an unexpanded directive, a missing figure or a broken path."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # hide the theme's announcement; see the Makefile
    environment.pop("BARDLET_DOCS_DRAFT", None)
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    output = built.stdout + built.stderr
    assert built.returncode == 0 and "WARNING" not in output, output
    pages = sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md") if path.name != "where.md")
    for page in pages:
        html = (tmp_path / "site" / page.with_suffix(".html")).read_text(encoding="utf-8")
        assert not re.search(r"\{\{ [a-z]+(: .+?)? \}\}", html), f"{page}: a directive was not expanded"
        assert "not measured yet" not in html, page
        for address in re.findall(r"""<(?:img|script|link)\b[^>]*?(?:src|href)=["']?([^"'\s>]+)""", html):
            assert "//" not in address or address.startswith("data:"), f"{page}: loads {address}"
            if not address.startswith(("data:", "#")):
                path = (tmp_path / "site" / page).parent / address.partition("#")[0].partition("?")[0]
                assert path.exists(), f"{page}: no such file: {address}"
