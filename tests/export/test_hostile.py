"""Hostile texts, prompts and names in every export: they are data everywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import bardlet
from bardlet.cli import main
from bardlet.errors import BardletError
from bardlet.run import hf

TEXT = '</script><script>alert(1)</script> <!-- \u202edlrow\u202c {{ 7 * 7 }} {% raw %} & "q" | ``` a\x00\n# x\n'
NAMES = ['a <script>x`y``z', "\u202e</b>[l](javascript:1) {{ 7 }}\n# t".replace("/", ""), "``` \"q\" 'r' | & %s"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / 'te`xt "<b>.jsonl'
    path.write_text("".join(json.dumps({"text": f"{TEXT}{n}"}) + "\n" for n in range(200)), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / request.param
    assert main(["train", str(text), "--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "16",
                 "--batch-size", "4", "--steps", "2", "--compile", "off", "--tokenizer", "char",
                 "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("to", ["hf", "onnx"])
def test_the_card_shows_them(to: str, run: Path, tmp_path: Path) -> None:
    """Its Markdown has no HTML, link or heading of theirs, and its code blocks end where ours end."""
    pytest.importorskip("onnx") if to == "onnx" else None
    [out] = bardlet.export_model(run, to=to, out=tmp_path / "out")  # type: ignore[arg-type]
    card = (out / "README.md").read_text(encoding="utf-8")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["model-index"][0]["name"] == run.name
    ModelCard(card)
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    children = [child for token in tokens for child in token.children or []]
    assert not [token for token in (*tokens, *children) if token.type in ("html_block", "html_inline", "link_open")]
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"]
    assert len([token for token in tokens if token.type == "fence"]) == {"hf": 3, "onnx": 2}[to]
    assert len([token for token in tokens if token.type == "table_open"]) == 1
    assert "\x00" not in card and "49" not in re.sub(r"[\d.]{4,}", "", card)


def test_a_page_has_them_as_data(run: Path, tmp_path: Path) -> None:
    [out] = bardlet.export_model(run, to="html", out=tmp_path / "page.html")
    page = out.read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 4 and "<!--" not in page
    blocks = [json.loads(block) for block in re.findall(r'type="application/json"[^>]*>(.*?)</script>', page, re.S)]
    assert run.name in [block["about"]["title"] for block in blocks if isinstance(block, dict)]


def test_gguf_and_its_modelfile_have_them_as_data(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not run.name.isprintable():
        with pytest.raises(BardletError, match="a Modelfile cannot name such a file; choose another out"):
            bardlet.export_model(run, to="gguf")
        assert not list(tmp_path.iterdir())
    gguf = pytest.importorskip("gguf")
    out, modelfile = bardlet.export_model(run, to="gguf", out=tmp_path / "m.gguf")
    file = gguf.GGUFReader(out)
    assert file.fields["general.name"].contents() == run.name
    assert len(file.fields["tokenizer.ggml.tokens"].contents()) == hf.read_folder(run)[1].vocab_size
    lines = modelfile.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./m.gguf" and all(re.match("TEMPLATE|PARAMETER", line) for line in lines[1:])


def test_prompts_are_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run), "--prompt", '</script> {{ 7 * 7 }} ``` "q"', "--tokens", "5", "--seed", "1"]) == 0
    assert '</script> {{ 7 * 7 }} ``` "q"' in capsys.readouterr().out
    assert main(["sample", str(run), "--prompt", "\udcff", "--tokens", "5"]) == 1  # an argument that is not UTF-8
    assert "bardlet: " in capsys.readouterr().err
