"""The command lines: help, values, error messages, and completion."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bardlet.cli import COMMANDS, main, sample, stage, train, training
from bardlet.cli.parser import Usage, build, parse, typed
from bardlet.config.docs import docs
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.config.stages import FINE_TUNING
from bardlet.errors import BardletError

Command = tuple[tuple[type[Any], ...], Usage, Sequence[str]]
TUNED = {kind.command: kind for kind in FINE_TUNING}
TRAINING = ("train", *TUNED)


def definition(name: str) -> Command:
    """Return a command's dataclasses, its usage, and the fields that cannot be typed."""
    if name in TUNED:
        return (training.RunOptions, TUNED[name]), stage.usage(TUNED[name]), stage.NOT_TYPED
    if name == "train":
        return (training.RunOptions, TrainConfig, TranslationConfig), train.USAGE, training.NOT_TYPED
    module = importlib.import_module(f"bardlet.cli.{name}")
    return (module.Command,), module.USAGE, ()


def settings(name: str) -> set[str]:
    """Return the fields of a command that can be typed."""
    kinds, _, hidden = definition(name)
    return {each.name for kind in kinds for each in fields(kind)} - set(hidden)


def train_settings(*argv: str) -> dict[str, Any]:
    """Return the settings that a command line of `bardlet train` names."""
    kinds, usage, hidden = definition("train")
    return typed(kinds, argv, usage, hidden)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the error line of a command that fails."""
    assert main([*argv]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("bardlet: ") and "internal error" not in line
    return line


# ---------------------------------------------------------------------------------- help


HELP = """
import contextlib, io, json, sys
from bardlet.cli import COMMANDS, main
results = {}
for name in COMMANDS:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            code = main([name, "--help"])
        except SystemExit as end:
            code = end.code
    results[name] = code, output.getvalue()
heavy = {"torch", "numpy", "tokenizers", "matplotlib", "transformers"} & set(sys.modules)
print(json.dumps([results, sorted(heavy)]))
"""


def test_the_help_of_every_command_is_short_and_imports_nothing_heavy() -> None:
    """At most 60 lines on a terminal with 80 columns: a screen that a reader can take in."""
    done = subprocess.run([sys.executable, "-c", HELP], env={**os.environ, "COLUMNS": "80"}, capture_output=True,
                          text=True, check=True)
    results, heavy = json.loads(done.stdout)
    assert heavy == []
    assert list(results) == list(COMMANDS)
    for name, (code, text) in results.items():
        assert code == 0
        assert text.startswith(f"usage: bardlet {name} ")
        assert text.count("\n") <= 60, name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_mentions_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help-all` works for every command, but only those with more than `--help` shows mention it."""
    _, usage, hidden = definition(name)
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            main([name, flag])
        assert end.value.code == 0
        texts[flag] = capsys.readouterr().out
    flags = set(re.findall(r"--[\w-]+", texts["--help-all"]))
    for setting in settings(name) - set(usage.positionals):
        assert "--" + setting.replace("_", "-") in flags, setting
    assert not {"--" + setting for setting in (*hidden, *usage.positionals)} & flags
    for placeholder in usage.positionals.values():
        assert placeholder in texts["--help-all"]
    assert ("--help-all" in texts["--help"]) == (usage.help_flag == "--help-all")
    if usage.help_flag == "--help":
        assert texts["--help"] == texts["--help-all"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_has_a_help_text_and_a_group(name: str) -> None:
    """A field's docstring is its help; the group "more" is for settings that were forgotten."""
    kinds, usage, hidden = definition(name)
    for kind in kinds:
        assert {each.name for each in fields(kind)} <= docs(kind).keys()
    groups = {group.title: group for group in build(kinds, usage, hidden, everything=True)._action_groups}
    assert groups["more"]._group_actions == []


def test_the_groups_name_only_settings_that_exist() -> None:
    """The groups of the fine-tuning commands are shared: a name must exist in one of them."""
    tuned = set().union(*(settings(name) for name in TUNED))
    for name in COMMANDS:
        for group in definition(name)[1].groups:
            assert {*group.names, *group.more} <= (tuned if name in TUNED else settings(name)), (name, group.title)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_the_help_are_valid(name: str) -> None:
    kinds, usage, hidden = definition(name)
    for line, _ in usage.examples:
        words = shlex.split(re.split(r"[<>]", line.rpartition("| ")[2])[0])
        assert words[:2] == ["bardlet", name]
        typed(kinds, words[2:], usage, hidden)


def test_help_all_shows_defaults_and_choices(capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A default of 0 or on is shown, too; none if the docstring or the plan says it."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main(["grpo", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--beta X KL coefficient against the reference model. 0 disables it (default: 0.0).",
                 "(best, last, average; default: last).", "--seed N Random seed of weights, batches and dropout "
                 "(default: 1337) ", "--lora RANK Train LoRA factors of this rank."):
        assert part in text, part
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Share one matrix between the token embedding and the output head (default: on) " in text
    assert "--lowercase BOOL" in text and "(default: None" not in text


def test_bardlet_alone_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert main(argv) == 0
        text = capsys.readouterr().out
        assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("argv", [["help", "sample"], ["-h", "sample"], ["--help", "sample"]])
def test_help_of_a_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(argv)
    text = capsys.readouterr().out
    assert text.startswith("usage: bardlet sample ")
    assert re.search(r"^  -h, --help +Show this text$", text, re.MULTILINE)


def test_another_process_of_torchrun_does_not_repeat_an_error_of_the_command_line() -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        environment = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        for words in (["--batch-size", "5", "--steps", "1"], ["--lr", "x"]):
            done = subprocess.run([sys.executable, "-m", "bardlet", "train", *words], env=environment,
                                  capture_output=True, text=True)
            assert done.returncode == 1 and len(done.stderr.splitlines()) == lines


# ---------------------------------------------------------------------------------- values


def test_only_typed_settings_are_returned() -> None:
    """A setting that was typed counts even if its value is the default: a settings file must not override it."""
    assert train_settings() == {}
    assert train_settings("--lr", "0.002", "--tie-embeddings", "--json") == {
        "lr": TrainConfig.lr, "tie_embeddings": True, "json": True}
    assert train_settings("--no-tie-embeddings", "--no-tensorboard") == {"tie_embeddings": False, "tensorboard": False}


def test_underscores_equal_dashes() -> None:
    for argv in (("--batch_size=4",), ("--batch-size=4",), ("--batch_size", "4"), ("--batch-size", "4")):
        assert train_settings(*argv) == {"batch_size": 4}
    assert train_settings("--out=a_b", "--wandb", "c_d", "e_f.txt") == {"out": "a_b", "wandb": "c_d",
                                                                     "text": ("e_f.txt",)}


def test_positionals_and_options_can_alternate() -> None:
    expected = {"text": ("a.txt", "b.txt"), "steps": 3, "json": True}
    for line in ("a.txt --steps 3 b.txt --json", "--json a.txt b.txt --steps=3", "--steps 3 --json a.txt b.txt"):
        assert train_settings(*line.split()) == expected


def test_none_is_a_value_of_optional_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_settings("--minutes", "none", "--steps=None", "--lowercase", "none") == {
        "minutes": None, "steps": None, "lowercase": None}
    assert parse(sample.Command, ["run", "--top-k", "none"], sample.USAGE).top_k is None
    with pytest.raises(BardletError, match=r"^--lr none: must be a number$"):
        train_settings("--lr", "none")


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False)])
def test_an_optional_flag_takes_true_or_false(word: str, value: bool) -> None:
    """`bool("false")` would be True."""
    assert train_settings("--lowercase", word) == {"lowercase": value}


def test_a_value_can_begin_with_a_dash() -> None:
    def prompt(*argv: str) -> str:
        return parse(sample.Command, ["run", *argv], sample.USAGE).prompt

    assert prompt("--prompt=-to") == "-to"
    assert prompt("--prompt=--seed") == "--seed"
    assert prompt("--prompt", "- to be") == "- to be"
    assert prompt("--prompt", "-1") == "-1"
    with pytest.raises(BardletError, match=r"^--prompt needs a value; write one that begins with - as --prompt=-to;"):
        prompt("--prompt", "-to")
    with pytest.raises(BardletError, match=r"^--prompt needs a value; see"):
        prompt("--prompt", "--seed", "3")


def test_the_last_of_repeated_settings_counts() -> None:
    assert train_settings("--steps", "3", "--steps", "4") == {"steps": 4}


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("argv", "fragments"), [
    ("train --keep bst", ["--keep bst: must be one of best, last, average; did you mean best?"]),
    ("train --keep x", ["--keep x: must be one of best, last, average"]),
    ("train --steps 1.5", ["--steps 1.5: must be a whole number\n"]),
    ("train --lr much", ["--lr much: must be a number"]),
    ("train --lowercase yes", ["--lowercase yes: must be true or false\n"]),
    ("train --stepz 3", ["setting --stepz", "did you mean --steps?"]),
    ("train --step 3", ["setting --step", "did you mean --steps?"]),
    ("sample run --top-k x", ["--top-k x: must be a whole number, or none"]),
    ("train --minutes abc", ["--minutes abc: must be a number\n"]),
    ("train --minutes -1", ["--minutes -1: must be more than 0"]),
    ("ladder --minutes -1", ["--minutes -1: must be more than 0"]),
    ("sample run --temp 0.5", ["unknown setting --temp; did you mean --temperature?"]),
    ("train --gpu", ["unknown setting --gpu; did you mean --device cuda?"]),
    ("train --learning-rate 1", ["setting --learning-rate; did you mean --lr?"]),
    ("sample run --length 9", ["setting --length; did you mean --tokens?"]),
    ("sft a b --epochs 9", ["setting --epochs; did you mean --steps? A step is not an epoch"]),
    ("runs --sort", ["setting --sort; `bardlet runs --help` lists the settings"]),
    ("train --hlp", ["setting --hlp; `bardlet train --help-all` lists the settings"]),
    ("train --learn 3", ["setting --learn; `bardlet train --help-all` lists the settings"]),
    ("train --tens", ["setting --tens; did you mean --tensorboard?"]),
    ("train --zzz 3", ["setting --zzz", "`bardlet train --help-all`"]),
    ("sample run -t 3", ["setting -t", "`bardlet sample --help`"]),
    ("sample run Once upon", ["Once: unexpected; name the text to continue with --prompt 'Once upon'"]),
    ("sample run --prompt Once upon", ["upon: unexpected; quote a text that has spaces"]),
    ("ladder explain", ["explain: no such text; did you mean `bardlet ladder --explain`?"]),
    ("runs ls", ["ls: not a run folder; did you mean `bardlet runs`?"]),
    ("runs delete a", ["delete: not a run folder; did you mean `bardlet runs a --delete`?"]),
    ("delete a", ["command 'delete'; did you mean `bardlet runs RUN --delete`?"]),
    ("train --device gpu --steps 1", ["--device gpu: no such device; use --device cpu, or --device cuda"]),
    ("resume a b", ["b: unexpected", "quote", "`bardlet resume --help`"]),
    ("resume", ["RUN is missing", "bardlet resume runs/my-qwen3"]),
    ("train --text a.txt", ["--text: ", "TEXT without a flag", "bardlet train my.txt"]),
    ("sample --run a", ["--run: ", "RUN without a flag", "bardlet sample runs/my-qwen3"]),
    ("train --replans 3", ["--replans", "only a settings file", "--config FILE"]),
    ("sft --init a", ["--init: ", "without a flag", "bardlet sft runs/base chats.jsonl"]),
    ("sft a b --model gpt2", ["--model: does not apply to `bardlet sft`; drop it"]),
    ("train --pack", ["--pack: is a setting of `bardlet sft`; drop it"]),
    ("sft", ["name the model to train", "bardlet sft runs/base chats.jsonl"]),
    ("train --json=1", ["--json takes no value; write --json, or --no-json; see `bardlet train --help-all`"]),
    ("sft a b --pack=1", ["--pack takes no value; write --pack, or --no-pack; see `bardlet sft --help-all`"]),
    ("train --lr", ["--lr needs a value: a number; see `bardlet train --help-all`"]),
    ("train --lr --steps 3", ["--lr needs a value: a number; see `bardlet train --help-all`"]),
    ("train --keep", ["--keep needs a value: one of best, last, average; see `bardlet train --help-all`"]),
    ("eval a --task", ["--task needs a value; see `bardlet eval --help`"]),
    ("eval a --limit", ["--limit needs a value: a whole number; see `bardlet eval --help`"]),
    ("--verson", ["command '--verson'", "did you mean `bardlet --version`?"]),
    ("list", ["command 'list'", "did you mean `bardlet runs`?"]),
    ("trian", ["command 'trian'", "did you mean `bardlet train`?"]),
    ("qqqq", ["command 'qqqq'", "`bardlet --help`"]),
])
def test_an_error_names_the_word_and_the_remedy(argv: str, fragments: list[str],
                                                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    line = error_of(capsys, *argv.split())
    for fragment in fragments:
        assert fragment in f"{line}\n"


def test_debug_shows_the_traceback() -> None:
    for argv in (["--debug", "train", "--steps", "x"], ["train", "--steps", "x", "--debug"]):
        with pytest.raises(BardletError, match="--steps x"):
            main(argv)


# ---------------------------------------------------------------------------------- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_print_completion(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The code is for `bardlet`; if the shell is installed, it accepts the syntax."""
    assert main(["--print-completion", shell]) == 0
    code = capsys.readouterr().out
    assert "_ARGCOMPLETE" in code and re.search(r"\bbardlet\b", code)
    assert main([f"--print-completion={shell}"]) == 0
    assert capsys.readouterr().out == code
    if program := shutil.which(shell):
        (tmp_path / "code").write_text(code, encoding="utf-8")
        subprocess.run([program, "-n", str(tmp_path / "code")], check=True)


@pytest.mark.parametrize("argv", [["tcsh"], [], ["bash", "zsh"]])
def test_print_completion_for_another_shell(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "--print-completion", *argv)
    assert line == f"bardlet: {' '.join(['--print-completion', *argv])}: name a shell, bash, zsh, fish"


@pytest.mark.parametrize(("line", "expected"), [
    ("bardlet tr", {"train", "translate"}),
    ("bardlet train --minu", {"--minutes"}),
    ("bardlet train a.txt --keep ", {"best", "last", "average"}),
    ("bardlet grpo runs/one sums.jsonl --rew", {"--reward"}),
    ("bardlet sft runs/one chats.jsonl --no-p", {"--no-pack"}),
    ("bardlet sample runs/", {"runs/one", "runs/two"}),
    ("bardlet kto runs/", {"runs/one", "runs/two"}),
    ("bardlet kto runs/one ", {"runs/", "completions"}),
    ("bardlet eval runs/one --task arc", {"arc-easy", "arc-challenge"}),
    ("bardlet ladder --rungs one", {"one-head"}),
    ("bardlet data ", {"get"}),
    ("bardlet data get ", {"tinyshakespeare"}),
    ("bardlet --v", {"--version"}),
])
def test_the_shell_completes(line: str, expected: set[str], tmp_path: Path) -> None:
    """As argcomplete's shell code asks for completions: by environment variables, without importing torch."""
    for run in ("one", "two"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "run.toml").write_text("", encoding="utf-8")
    (tmp_path / "runs" / "other").mkdir()
    output = tmp_path / "completions"
    environment = {**os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line,
                   "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_STDOUT_FILENAME": str(output)}
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "bardlet"], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, check=True)
    assert {word.strip() for word in output.read_text(encoding="utf-8").split("\n")} == expected
    assert not re.search(r"\| +(torch|numpy)$", done.stderr, re.MULTILINE)
    assert done.stdout == ""


def test_completion_knows_every_command_and_setting() -> None:
    from bardlet.cli.completion import command_parser

    for name in COMMANDS:
        flags = {flag for action in command_parser(name)._actions for flag in action.option_strings}
        _, usage, _ = definition(name)
        assert {"--" + each.replace("_", "-") for each in settings(name) - set(usage.positionals)} <= flags
