"""The commands: imports, the contract of --json and of run folders, resume, output."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, settings_of

from bardlet import console
from bardlet.cli import COMMANDS, main
from bardlet.errors import BardletError, neutral
from bardlet.runtime.signals import Stopped

HELPS = [[], ["--help"], ["--version"]]
"""`tests/cli/test_parser.py` has the help of every command."""


@pytest.mark.parametrize("argv", HELPS, ids=" ".join)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    """Help needs no torch, numpy or tokenizers, so it is quick (benchmarks/startup.py)."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "bardlet", *argv], capture_output=True, text=True)
    assert done.returncode == 0
    assert "bardlet" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "bardlet.cli" in imported
    assert not imported & {"torch", "numpy", "tokenizers", "matplotlib", "transformers"}


@pytest.mark.parametrize(("words", "line"), [
    (["train", "my text.txt"], "reading my text.txt"), (["train", "a", "b", "c", "d.txt", "--plan"],
                                                        "reading a, b, c and 1 more"),
    (["train", "--source", "my.de", "--target", "my.en"], "reading my.de, my.en"), (["train"], "no text named")])
def test_the_first_line_names_the_text_before_torch_is_imported(words: list[str], line: str) -> None:
    program = ("import sys\nfrom bardlet import cli, console\n"
               "def say(text):\n    print(text)\n    sys.exit(3 if 'torch' in sys.modules else 0)\n"
               f"console.say = say\ncli.main({words})")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith(line), result


def test_training_without_compilation_does_not_import_the_compiler(tmp_path: Path) -> None:
    """The import would take a second and 70 MB; torch's own optimizers trigger it."""
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 50)
    runs = [["train", str(tmp_path / "a.txt"), *TINY, "--optimizer", optimizer, "--steps", "3",
             "--out", str(tmp_path / optimizer)] for optimizer in ("muon", "adamw")]
    lines = ("import sys", "from bardlet.cli import main", "from bardlet.run import plots",
             "plots.loss_curve = lambda *_: None", f"assert [main(words) for words in {runs}] == [0, 0]",
             "print('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_lists_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command has --json; its --help exits with 0."""
    try:
        code = main([name, "--help"])
    except SystemExit as end:
        code = end.code or 0
    assert code == 0
    assert "--json" in capsys.readouterr().out


def test_the_contract_of_train_sample_eval_resume(text: Path, tmp_path: Path,
                                                  bardlet: Callable[..., dict[str, Any]]) -> None:
    """The keys of --json, and the files of a run folder."""
    run = tmp_path / "run"
    train = {"run", "steps", "resumed_from", "seconds", "train_loss", "val_loss", "nats_per_char", "expected",
             "selected_by", "tokens_per_second", "parameters"}
    result = bardlet("train", text, "--out", run, *TINY, "--steps", "6", "--save-every", "3", "--eval-every", "3")
    assert set(result) == train and result["run"] == str(run)
    assert result["steps"] == 6 and result["resumed_from"] is None
    assert {p.name for p in run.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "run.toml", "metrics.jsonl", "README.md", "loss.png", "manifest.json", "checkpoints"}
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{result['val_loss']:.4f}" in (run / "README.md").read_text(encoding="utf-8")

    more = bardlet("resume", run, "--steps", "8", "--allow-change")
    assert set(more) == train and more["steps"] == 8 and more["resumed_from"] == 6

    measured = bardlet("eval", run)
    assert set(measured) == {"loss", "nats_per_char", "bits_per_byte", "tokens", "skipped_characters"}
    assert abs(measured["loss"] - more["val_loss"]) < 1e-3, "the same text and windows"

    sampled = bardlet("sample", run, "--prompt", "the ", "--tokens", "20", "--num", "3", "--seed", "1")
    assert set(sampled) == {"prompt", "completions", "tokens_per_second"}
    assert len(sampled["completions"]) == 3 and all(len(text) == 20 for text in sampled["completions"])
    assert sampled["completions"] == bardlet("sample", run, "--prompt", "the ", "--tokens", "20", "--num", "3",
                                             "--seed", "1")["completions"]


def test_a_stream_equals_a_batch(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]],
                                 capsys: pytest.CaptureFixture[str]) -> None:
    """Streaming, also past the context window, gives the text that --json gives for the same seed."""
    run = tmp_path / "run"
    bardlet("train", text, "--out", run, *TINY, "--steps", "2", "--tokenizer", "byte")
    whole = bardlet("sample", run, "--prompt", "the", "--tokens", "50", "--seed", "3")["completions"][0]
    assert main(["sample", str(run), "--prompt", "the", "--tokens", "50", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "the" + whole + "\n"


def test_run_toml_repeats_the_run(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    """--config run.toml gives the same weights; settings on the command line take precedence."""
    from bardlet.runtime.manifest import sha256

    bardlet("train", text, "--out", tmp_path / "one", *TINY, "--steps", "4", "--dropout", "0.1")
    bardlet("train", "--config", tmp_path / "one" / "run.toml", "--out", tmp_path / "two")
    assert sha256(tmp_path / "one" / "model.safetensors") == sha256(tmp_path / "two" / "model.safetensors")
    other = bardlet("train", "--config", tmp_path / "one" / "run.toml", "--out", tmp_path / "three", "--steps", "5")
    assert other["steps"] == 5


@pytest.mark.parametrize("model", ["bigram", "multi-head", "layer-norm"])
def test_a_run_can_start_from_any_model(model: str, text: Path, tmp_path: Path,
                                        bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    """--init works for a rung without dropout or layers; so does resuming: no setting is refused as unused."""
    words = [*settings_of(model, TINY), "--steps", "2"]
    bardlet("train", text, "--out", tmp_path / "one", "--model", model, *words)
    bardlet("train", text, "--out", tmp_path / "two", "--init", tmp_path / "one", "--dtype", "fp32", "--steps", "2")
    assert bardlet("resume", tmp_path / "two", "--steps", "3", "--allow-change")["steps"] == 3


def test_a_settings_file_of_another_command(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """`bardlet train` runs the file's command, another stage refuses the file; ignored settings are reported."""
    monkeypatch.chdir(tmp_path)
    Path("text.toml").write_text('stage = "pretrain"\n')
    assert main(["sft", "base", "a.jsonl", "--config", "text.toml"]) == 1
    error = capsys.readouterr().err
    assert "text.toml: has settings of `bardlet train`; run `bardlet train --config text.toml`" in error
    Path("dpo.toml").write_text('stage = "dpo"\ninit = "base"\ntext = ["a.jsonl"]\n')
    assert main(["grpo", "--config", "dpo.toml"]) == 1
    assert "dpo.toml: has settings of `bardlet dpo`; run `bardlet dpo --config dpo.toml`" in capsys.readouterr().err
    for words, wanted in ((["train", "--config", "dpo.toml"], "base: no such folder"),
                          (["dpo", "--config", "dpo.toml"], "base: no such folder"),
                          (["train", "b.jsonl", "--config", "dpo.toml"], "base: no such folder"),
                          (["dpo", "other", "b.jsonl", "--config", "dpo.toml"], "other: no such folder")):
        assert main([*words, "--steps", "1"]) == 1
        assert wanted in capsys.readouterr().err
    Path("pairs.toml").write_text('model = "encdec"\nbatch_size = 3\n')
    assert main(["train", "--pair", "de-xx", "--config", "pairs.toml", "--steps", "1"]) == 1
    errors = capsys.readouterr().err
    assert "note: batch_size: ignored, training on sentence pairs has no such setting" in errors
    assert "--pair de-xx" in errors


@pytest.mark.parametrize(("words", "wanted"), [
    ("--no-pack", "--no-pack: is a setting of `bardlet sft`; drop it"),
    ("--beta 1", "--beta: is a setting of `bardlet dpo`, `bardlet kto`, `bardlet ppo`, `bardlet grpo`; drop it"),
    ("--stage sft", "unknown setting --stage"), ("--lr None", "--lr None: must be a number"),
    ("--planning", "unknown setting --planning; did you mean --plan?"),
])
def test_settings_of_other_stages_are_refused(words: str, wanted: str, text: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert main(["train", str(text), *words.split()]) == 1
    assert wanted in capsys.readouterr().err


def test_positional_arguments_are_not_suggested_as_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """`bardlet resume` has no --run: the run folder is its first word."""
    assert main(["resume", "run", "--rvn", "1"]) == 1
    assert "unknown setting --rvn; `bardlet resume --help`" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_loss_has_one_unit_where_a_token_is_a_character(kind: str, text: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    """At the end of training, in the card, in the picture and in `bardlet eval`."""
    from bardlet.stages import pretrain

    labels: list[str] = []
    monkeypatch.setattr(pretrain.plots, "loss_curve", lambda run, title, label, bigram: labels.append(label))
    run = tmp_path / "run"
    assert main(["train", str(text), "--tokenizer", kind, "--out", str(run), *TINY, "--steps", "2"]) == 0
    assert main(["eval", str(run)]) == 0
    captured = capsys.readouterr()
    words = (captured.out + captured.err, (run / "README.md").read_text(encoding="utf-8").partition("| ---")[2])
    loss = r" [\d.]+ nats per character, [\d.]+ bits per byte"
    for part in words:
        assert re.search(loss if kind == "char" else r" [\d.]+ nats per token," + loss, part), part
        assert kind != "char" or "nats per token" not in part, part
    assert labels == ["loss (nats per character)" if kind == "char" else "loss (nats per token)"]


def test_a_finished_run_is_refused_before_it_is_compiled(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    from bardlet.planning import compilation

    monkeypatch.setattr(compilation, "choose_compile",
                        lambda trainer, **options: trainer.machine.update(compiled=True))
    assert main(["train", str(text), *TINY, "--compile", "on", "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    monkeypatch.setattr(compilation, "choose_compile", lambda trainer, **options: pytest.fail("compiled"))
    assert main(["resume", str(tmp_path / "run")]) == 1
    assert "finished, all 2 steps are done" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [-1, 0, 1, 2])
def test_resume_from_python_refuses_steps_that_are_done(steps: int, text: Path, tmp_path: Path,
                                                        bardlet: Callable[..., dict[str, Any]]) -> None:
    from bardlet import runner

    bardlet("train", text, *TINY, "--steps", "2", "--out", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(BardletError, match=f"^--steps {steps}: "):
        runner.resume(tmp_path / "run", steps=steps, allow_change=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("keep", ["best", "last", "average"])
def test_resume_after_a_kill_behind_the_last_step(keep: str, text: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch,
                                                  bardlet: Callable[..., dict[str, Any]]) -> None:
    """All steps are saved, but not the result: resume writes the result of an uninterrupted run."""
    from bardlet.runtime.manifest import sha256
    from bardlet.training import trainer

    settings = [text, *TINY, "--steps", "10", "--keep", keep, "--eval-every", "5"]
    whole = bardlet("train", *settings, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finish", lambda trainer: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Stopped, match="stopped after step 10, and saved"):
            bardlet("train", *settings, "--out", tmp_path / "killed")
    resumed = bardlet("resume", tmp_path / "killed")
    assert (resumed["resumed_from"], resumed["val_loss"]) == (10, whole["val_loss"])
    assert (tmp_path / "killed" / "README.md").exists() and (tmp_path / "killed" / "loss.png").exists()
    name = "model.safetensors"
    assert sha256(tmp_path / "killed" / name) == sha256(tmp_path / "whole" / name)


def test_the_card_tells_a_partial_evaluation(text: Path, tmp_path: Path,
                                             bardlet: Callable[..., dict[str, Any]]) -> None:
    """With --eval-tokens below the length of the validation split, every k-th window is evaluated."""
    bardlet("train", text, "--out", tmp_path / "run", *TINY, "--steps", "2", "--eval-tokens", "100")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"over \d+ of [\d,]+ tokens", card)


@pytest.mark.parametrize("rewards", [{}, {"reward": 0.1, "kl": 0.02}])
def test_the_progress_bar_of_a_narrow_terminal_shows_the_eta(rewards: dict[str, float],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    screen = Console(width=80, force_terminal=True, record=True)
    monkeypatch.setattr(console, "live", lambda: True)
    monkeypatch.setattr("rich.progress.get_console", lambda: screen)
    with screen.capture() as capture, console.training_progress("tokens") as watch:
        for step in (1, 1200, 1300):
            watch({"train_loss": 1.9758, "val_loss": 1.8523, "step": step, "steps": 13_000, "tokens": 300_000 * step,
                   "seconds": float(step), **rewards})
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capture.get()).split("\r")[-1].split("\n")
    assert any(re.search(r"step  1300/13000 .* ETA \d+:\d\d", line) for line in last), last


def test_the_curve_of_a_notebook_spans_its_values() -> None:
    """The lowest value is at the bottom, the highest at the top; many points become at most 201 a curve."""
    svg = console.curve({"train": [(step, 5.0 - step / 1000) for step in range(1, 2001)], "val": [(2000, 2.5)]}, 2000)
    curves = [[tuple(map(float, point.split(","))) for point in points.split()]
              for points in re.findall(r'points="([^"]*)"', svg)]
    assert [len(curve) for curve in curves] == [201, 2] and set(curves[1]) == {(410.0, 130.0)}
    assert curves[0][0] == (50.2, 10.0) and curves[0][-1][0] == 410.0 and 10 < curves[0][-1][1] < 130
    assert ">5<" in svg and ">2.5<" in svg
    assert console.curve({}, 10) == "" and "polyline" in console.curve({"reward": [(1, 0.0)]}, 10)


def test_sampling_after_a_single_document_starts_with_a_newline(text: Path, tmp_path: Path,
                                                                bardlet: Callable[..., dict[str, Any]]) -> None:
    """A BPE tokenizer has <|endoftext|>, but a model of one document has never seen it."""
    from bardlet.inference.text_generation import prompt_ids
    from bardlet.run import hf

    bardlet("train", text, "--out", tmp_path / "run", *TINY, "--steps", "2", "--tokenizer", "bpe", "--vocab-size",
            "300")
    _, tokenizer = hf.read_folder(tmp_path / "run")
    assert tokenizer.eos_id is not None
    assert prompt_ids(tokenizer, None, documents=2) == [tokenizer.eos_id]
    assert prompt_ids(tokenizer, None, documents=1) == tokenizer.encode("\n").tolist()


def test_plan_creates_no_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--plan prints model and steps."""
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *TINY, "--steps", "7", "--plan"]) == 0
    assert re.search(r"plan: 7 steps of 64 tokens", capsys.readouterr().out)
    assert not (tmp_path / "run").exists()


def test_an_interrupt_before_the_first_step_says_that_nothing_is_saved(text: Path, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """While the text is read, and when the folder exists already, which is removed. A later one says how to go on."""
    from bardlet import runner
    from bardlet.stages import pretrain

    words = ["train", str(text), "--out", str(tmp_path / "run"), *TINY, "--steps", "2"]
    for module, name in ((pretrain.prefetch, "find"), (runner, "fit")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            assert main(words) == 130
        assert capsys.readouterr().err.splitlines()[-1] == (
            "bardlet: interrupted before the first step; nothing was trained or saved")
        assert not (tmp_path / "run").exists()
    monkeypatch.setattr(runner.summary, "say_result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(words) == 130
    assert "stopped after step 2, and saved" in capsys.readouterr().err


def test_only_a_run_that_starts_names_its_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = f"runs/{text.stem}-{TINY[TINY.index('--model') + 1] if '--model' in TINY else 'qwen3'}"
    Path(first).mkdir(parents=True)
    assert main(["train", str(text), *TINY, "--steps", "1", "--plan"]) == 0
    captured = capsys.readouterr()
    assert "runs/" not in captured.out + captured.err
    assert main(["train", str(text), *TINY, "--steps", "1"]) == 0
    assert f"{first} exists; the new run is {first}-2" in capsys.readouterr().err


def test_tensorboard_and_a_missing_wandb(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]],
                                         capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """--tensorboard writes events; a missing extra is a one-line error with the remedy, and leaves no folder."""
    pytest.importorskip("tensorboard")
    bardlet("train", text, "--out", tmp_path / "run", *TINY, "--steps", "3", "--tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", str(text), "--out", str(tmp_path / "no"), *TINY, "--steps", "3", "--wandb", "x"]) == 1
    assert "--wandb: not installed; run `pip install" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_files_in_configs_are_valid() -> None:
    """configs/*.toml name current settings only."""
    from bardlet.config.toml import read_toml

    paths = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
    assert paths
    for path in paths:
        read_toml(path)


def test_json_is_an_object_on_the_last_line(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines before it are prose."""
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *TINY, "--steps", "2", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["steps"] == 2
    assert not any(line.startswith("{") for line in lines[:-1])


# ------------------------------------------------------------------------------------ prompts and terminals


def test_a_prompt_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    """https://github.com/invoke-ai/InvokeAI/pull/2087"""
    (tmp_path / "a.txt").write_text("ROMEO:\nto be or not to be\n" * 100)
    run = str(tmp_path / "run")
    assert main(["train", str(tmp_path / "a.txt"), "--tokenizer", "char", "--n-layer", "1", "--n-head", "1", "--n-embd",
                 "16", "--block-size", "16", "--steps", "2", "--compile", "off", "--out", run]) == 0  # fmt: skip
    for arguments, stdin in ((["--prompt", "-"], "ROMEO:\r\n"), ([], "ROMEO:\n")):
        with (tmp_path / "prompt").open("w+b") as file:
            file.write(stdin.encode())
            file.seek(0)
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
            capsys.readouterr()
            assert main(["sample", run, *arguments, "--tokens", "5"]) == 0
            assert capsys.readouterr().out.startswith("ROMEO:")
    for prompt, code in (("a\\nb", 1), ("be\nor", 0)):
        assert main(["sample", run, "--prompt", prompt, "--tokens", "5"]) == code
    error = capsys.readouterr().err
    assert r"\n is a backslash and an n; in bash, --prompt $'a\nb' has a line break" in error


def test_control_characters_of_a_model_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\x07\x9bb\n\tc\x7f\x00é"
    assert neutral(text) == "a�[2J��b\n\tc��é"
    assert console.shown(text) == text  # a pipe gets the model's own text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert console.shown(text) == neutral(text)


@pytest.mark.parametrize(("text", "shown"), [
    ("\x1b]0;title\x07", "\ufffd]0;title\ufffd"), ("\x9b31mred", "\ufffd31mred"), ("a\rb\x08", "a\ufffdb\ufffd"),
    ("\x90q\x9c", "\ufffdq\ufffd"), ("a\n\tb", "a\n\tb"), ("é 漢 \U0001f980 \u200d", "é 漢 \U0001f980 \u200d"),
])  # fmt: skip
def test_what_commands_a_terminal_is_replaced(text: str, shown: str) -> None:
    """A title, colours with one byte for escape, overwritten text, a device string; not line breaks and emoji."""
    assert neutral(text) == shown


CONTROL = "a\x1b[2J\x07\x9bb"


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_in_names_do_not_reach_a_terminal(terminal: bool, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file, of a field in it, of a run; in messages, errors, JSON and cards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(console, "live", lambda: False)
    Path(f"{CONTROL}.txt").write_text("to be\r\nor not to be\r\n" * 100, newline="")
    Path("b.jsonl").write_text(json.dumps({CONTROL: "text"}))
    argv = [*TINY, "--steps", "2"]
    assert main(["train", f"{CONTROL}.txt", *argv, "--out", f"{CONTROL}-run", "--json"]) == 0
    assert main(["train", "b.jsonl", *argv]) == 1 and main(["sample", CONTROL]) == 1
    output = capsys.readouterr()
    assert "note: a\ufffd[2J\ufffd\ufffdb.txt: has Windows line endings" in output.err
    field, folder = [line for line in output.err.splitlines() if line.startswith("bardlet:")]
    assert "choose one with --field: a\ufffd[2J" in field and "no such folder" in folder
    [result] = [line for line in output.out.splitlines() if line.startswith("{")]
    assert CONTROL in json.loads(result)["run"]
    shown = [output.err, result, Path(f"{CONTROL}-run/README.md").read_text(encoding="utf-8")]
    for text in [*shown, *[output.out] * terminal]:
        assert text == neutral(text)
    assert (CONTROL in output.out) == (not terminal)  # a pipe gets the name as it is
