"""README and guides: every Python snippet runs, every command line can be parsed, every link leads somewhere."""

import io
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from clocks import Clock

from bardlet.cli import COMMANDS, main
from bardlet.cli.completion import command_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/reference/python.md",
         *(str(path.relative_to(ROOT)) for pattern in ("docs/*.md", "docs/guide/*.md")
           for path in sorted(ROOT.glob(pattern)) if path.name != "where.md")]


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page; "" is a block without a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [code for kind, code in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S) if kind == language]


def command_lines() -> Iterator[tuple[str, str]]:
    """Yield (page, command line) of every line that begins with `bardlet`, without its comment."""
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.splitlines():
                if line.strip().startswith("bardlet "):
                    yield page, line.split(" #")[0].strip()


@pytest.mark.parametrize(("page", "line"), list(command_lines()))
def test_every_command_line_can_be_parsed(page: str, line: str) -> None:
    words = shlex.split(re.split(r" [<>|] | && ", line)[0])[1:]
    if words[0].startswith("-"):
        return
    assert words[0] in COMMANDS, line
    parser = command_parser(words[0])
    _, extra = parser.parse_known_intermixed_args(words[1:])
    assert not extra, f"{line}: {extra}"


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Path:
    """A folder with the files and runs that the snippets name; the clock moves by training steps only."""
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("Once upon a time there was a king who had a daughter.\n" * 300, encoding="utf-8")
    chats = [{"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": f"Hello {n}"}]}
             for n in range(40)]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    pairs = [{"prompt": f"Hi {n}", "chosen": "Hello!", "rejected": "What?"} for n in range(40)]
    Path("preferences.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    small = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "64", "--batch-size", "4", "--steps",
             "4", "--compile", "off"]
    assert main(["train", "my.txt", *small, "--out", "runs/my-qwen3"]) == 0
    assert main(["train", "my.txt", "--tokenizer", "bpe", "--vocab-size", "280", *small, "--out", "runs/base"]) == 0
    for language, line in (("de", "ein hund rennt ."), ("en", "a dog runs .")):
        Path(f"my.{language}").write_text("".join(f"{line} {n}\n" for n in range(60)), encoding="utf-8")
    assert main(["train", "--source", "my.de", "--target", "my.en", "--n-layer", "1", "--n-head", "2", "--n-embd", "32",
                 "--vocab-size", "280", "--batch-tokens", "256", "--steps", "4", "--compile", "off",
                 "--out", "runs/multi30k-de-en-encdec"]) == 0
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if any("bardlet." in code for code in blocks(page, "python"))])
def test_every_snippet_runs(page: str, folder: Path) -> None:
    """The snippets of a page run in turn, in one namespace; minutes pass by the clock of the tests."""
    namespace: dict[str, object] = {}
    with redirect_stdout(io.StringIO()):
        for code in blocks(page, "python"):
            if "import transformers" in code or "from transformers" in code:
                continue  # tests/models load folders in transformers
            code = code.replace('run = bardlet.train("my.txt", minutes=2)', 'run = bardlet.open_run("runs/base")', 1)
            exec(compile(code, page, "exec"), namespace)
