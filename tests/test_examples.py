"""The scripts of examples/: short, without bardlet, with the losses of the rungs, and runnable to the end."""

from __future__ import annotations

import ast
import hashlib
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import EXAMPLES, assert_same_losses, load
from torch import Tensor, nn

from bardlet.data.named import NAMED
from bardlet.ladder.rungs import CPU, GPU, LADDER, SMALL
from bardlet.training import averaging

LINES = {"bigram": 120, "gpt": 230, "gpt_modern": 300, "encdec": 260, "chatgpt": 400}
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "dropout": 0.2}
TEXTS = ("bigram", "gpt", "gpt_modern")
RUN = {
    "bigram": ["steps=4", "eval_every=2", "eval_batches=1"],
    "gpt": ["steps=4", "eval_every=2", "eval_batches=1", "n_layer=1", "n_embd=16", "n_head=2", "block_size=8"],
    "gpt_modern": ["steps=5", "eval_every=3", "eval_batches=1", "n_layer=1", "n_embd=16", "n_head=2", "block_size=8"],
    "encdec": ["steps=2", "n_layer=1", "n_embd=16", "n_head=2", "n_held_out=8", "n_pairs=300"],
    "chatgpt": ["pretrain_steps=2", "sft_steps=60", "reward_steps=2", "rollouts=1", "n_layer=1", "n_embd=16",
                "n_head=2", "lines=200", "comparisons=2000"],
}


@pytest.mark.parametrize(("name", "number"), [("bigram", 1), ("gpt", 8), ("gpt_modern", 13)])
def test_the_losses_are_those_of_the_rung(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_losses(name, number, 5, TINY, monkeypatch)


def test_the_average_is_that_of_rung_13() -> None:
    example, model = load("gpt_modern"), nn.Linear(3, 2)
    trainer: Any = type("Trainer", (), {"model": model, "average": {},
                                        "state": type("State", (), {"steps": 10, "step": 0, "averaged": 0})})
    average: dict[str, Tensor] = {}
    for step in range(1, 11):
        nn.init.normal_(model.weight)
        trainer.state.step = step
        averaging.add_to_average(trainer)
        if step > 8:
            with torch.no_grad():
                example.add_to_average(average, model, step - 8)
    assert all(torch.equal(average[name], trainer.average[name]) for name in ("weight", "bias"))


def test_the_settings_are_those_of_the_ladder() -> None:
    bigram, gpt, modern = (load(name) for name in TEXTS)
    assert (bigram.lr, bigram.steps) == (LADDER[0].settings["lr"], LADDER[0].settings["steps"])
    assert (bigram.batch_size, bigram.block_size) == (SMALL["batch_size"], SMALL["block_size"])
    for example in (gpt, modern):
        assert {name: getattr(example, name) for name in CPU} == CPU
        assert {name: example.large[name] for name in GPU} == GPU
    assert modern.muon_lr == LADDER[12].settings["muon_lr"]


@pytest.mark.parametrize("name", LINES)
def test_a_script_is_short_and_stands_alone(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LINES[name]
    tree = ast.parse(source)
    assert len((ast.get_docstring(tree) or "").splitlines()) <= 12
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names) == {"torch"}
    assert 'device = "cuda" if torch.cuda.is_available() else "cpu"' in source


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_pages_give_their_lengths(page: str) -> None:
    text = (EXAMPLES.parent / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[?`(\w+\.py)`\S* \| (\d+) \|", text, re.MULTILINE)
    lengths = {f"{name}.py": len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in LINES}
    assert {name: int(number) for name, number in rows} == lengths


def test_all_scripts_are_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == LINES.keys() == RUN.keys()


@pytest.mark.parametrize("name", LINES)
def test_a_script_runs_to_its_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("To be, or not to be, that is the question.\n" * 20, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [name, *(["my.txt"] if name in TEXTS else []), *RUN[name]])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert {"encdec": "exactly right", "chatgpt": "4. PPO"}.get(name, "every character") in out


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_downloaded_and_checked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, named = load(name), NAMED["tinyshakespeare"]
    assert (named.url, named.sha256) == (example.URL, example.SHA256)
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.txt"
    other.write_text("another text", encoding="utf-8")
    monkeypatch.setattr(example, "URL", other.as_uri())
    with pytest.raises(SystemExit, match=r"input\.txt: the download is not Tiny Shakespeare; name a text"):
        example.read_text("input.txt")
    assert not Path("input.txt").exists()
    monkeypatch.setattr(example, "SHA256", hashlib.sha256(other.read_bytes()).hexdigest())
    assert example.read_text("input.txt") == "another text" == Path("input.txt").read_text(encoding="utf-8")
    monkeypatch.setattr(example, "URL", (tmp_path / "missing.txt").as_uri())
    Path("input.txt").unlink()
    for path in ("input.txt", "no.txt"):
        with pytest.raises(SystemExit, match=f"{path}: .*; name a text file in UTF-8, or save"):
            example.read_text(path)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("argument", ["no_setting=1", "seed=many", "F=1", "--help", "-h"])
def test_an_unknown_setting_is_one_line(name: str, argument: str) -> None:
    with pytest.raises(SystemExit, match=f"{argument}: not a setting and its value"):
        load(name).configure([argument])


def test_large_takes_the_settings_of_the_lecture() -> None:
    example = load("gpt")
    example.configure(["--large", "steps=3"])
    assert (example.n_embd, example.block_size, example.steps) == (384, 256, 3)
