"""Prompts on the command line: piped, read for -, and with a backslash and an n that is no line break."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from bardlet.cli import main
from bardlet.cli.sample import read_prompt
from bardlet.errors import BardletError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Train a model of each kind of tokenizer for two steps."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    (folder / "a.txt").write_text("ROMEO:\nto be or not to be\n" * 100)
    for kind in ("char", "byte", "bpe"):
        runs[kind] = str(folder / kind)
        assert main(["train", str(folder / "a.txt"), "--tokenizer", kind, "--n-layer", "1", "--n-head", "1", "--n-embd",
                     "16", "--block-size", "16", "--steps", "2", "--compile", "off",
                     "--out", runs[kind]]) == 0  # fmt: skip
    return runs


def pipe(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "piped").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper((tmp_path / "piped").open("rb")))


@pytest.mark.parametrize("typed", ["-", ""])
@pytest.mark.parametrize(("content", "prompt"), [
    (b"ROMEO:\n", "ROMEO:"), (b"ROMEO:\r\nto be\r\n", "ROMEO:\nto be"), (b"\xef\xbb\xbfto be\n\n", "to be\n"),
    ("é 漢".encode(), "é 漢"), (b"", ""), (b"-", "-"),
])  # fmt: skip
def test_standard_input_is_the_prompt_of_a_dash_and_of_none(typed: str, content: bytes, prompt: str, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """https://github.com/invoke-ai/InvokeAI/pull/2087"""
    pipe(content, tmp_path, monkeypatch)
    assert read_prompt(typed) == prompt
    pipe(content, tmp_path, monkeypatch)
    assert read_prompt("typed") == "typed"


@pytest.mark.parametrize(("content", "byte"), [(b"\xff", 0), (b"caf\xe9", 3), ("é".encode()[:1], 0)])
def test_standard_input_that_is_not_utf8_is_an_error(content: bytes, byte: int, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(content, tmp_path, monkeypatch)
    with pytest.raises(BardletError, match=f"standard input: not valid UTF-8 at byte {byte}; pipe in UTF-8 text"):
        read_prompt("-")


@pytest.mark.parametrize(("prompt", "explained"), [
    ("to be\\nor", True), ("\\n", True), ("\\n\\nto", True), ("be\nor", False), ("ROMEO:", False)])
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_backslash_and_an_n_are_explained(kind: str, prompt: str, explained: bool, runs: dict[str, str],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """https://github.com/karpathy/nanoGPT/issues/434: an error if the tokenizer has no backslash, else a notice."""
    code = main(["sample", runs[kind], "--prompt", prompt, "--tokens", "3"])
    output = capsys.readouterr()
    assert code == (1 if explained and kind == "char" else 0)
    assert (r"\n is a backslash and an n; in bash, --prompt $'a\nb' has a line break" in output.err) == explained
    assert output.out.startswith(prompt if code == 0 else "")
