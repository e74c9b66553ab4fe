"""The command line: quick help, no heavy imports, what --json promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clocks import Clock
from conftest import TINY, settings_of
from processes import power_cut

from bardlet import console
from bardlet.cli import COMMANDS, main
from bardlet.run import metrics
from bardlet.runtime.signals import Stopped

HELPS = [[], ["--help"], ["--version"], *[[name, "--help"] for name in COMMANDS]]


@pytest.mark.parametrize("argv", HELPS, ids=" ".join)
def test_help_imports_no_torch(argv: list[str]) -> None:
    """Help is printed without torch, numpy or tokenizers: that is what keeps it quick (benchmarks/startup.py)."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "bardlet", *argv], capture_output=True, text=True)
    assert done.returncode == (0 if argv else 2)
    assert "bardlet" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "bardlet.cli" in imported
    assert not imported & {"torch", "numpy", "tokenizers", "matplotlib", "transformers"}


def test_training_without_compilation_does_not_load_the_compiler(tmp_path: Path) -> None:
    """It would take a second and 70 MB; torch's own optimizers load it."""
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 50)
    runs = [["train", str(tmp_path / "a.txt"), *TINY, "--optimizer", optimizer, "--steps", "3",
             "--out", str(tmp_path / optimizer)] for optimizer in ("muon", "adamw")]
    lines = ("import sys", "from bardlet.cli import main", f"assert [main(words) for words in {runs}] == [0, 0]",
             "print('torch._dynamo' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert said.stdout.split()[-1] == "False"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_names_its_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help of a command lists --json, which each has, and ends with exit code 0."""
    try:
        code = main([name, "--help"])
    except SystemExit as end:
        code = end.code or 0
    assert code == 0
    assert "--json" in capsys.readouterr().out


def test_the_contract_of_train_sample_eval_resume(text: Path, tmp_path: Path,
                                                  bardlet: Callable[..., dict[str, Any]]) -> None:
    """The keys of --json, and what a run folder holds."""
    run = tmp_path / "run"
    train = {"run", "steps", "resumed_from", "seconds", "train_loss", "val_loss", "nats_per_char", "expected",
             "selected_by", "tokens_per_second", "parameters"}
    made = bardlet("train", text, "--out", run, *TINY, "--steps", "6", "--save-every", "3", "--eval-every", "3")
    assert set(made) == train and made["run"] == str(run) and made["steps"] == 6 and made["resumed_from"] is None
    assert {p.name for p in run.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "run.toml", "metrics.jsonl", "README.md", "loss.png", "manifest.json", "checkpoints"}
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{made['val_loss']:.4f}" in (run / "README.md").read_text(encoding="utf-8")

    more = bardlet("resume", run, "--steps", "8", "--allow-change")
    assert set(more) == train and more["steps"] == 8 and more["resumed_from"] == 6

    measured = bardlet("eval", run)
    assert set(measured) == {"loss", "nats_per_char", "bits_per_byte", "tokens", "skipped_characters"}
    assert abs(measured["loss"] - more["val_loss"]) < 1e-3, "the same text, the same windows"

    sampled = bardlet("sample", run, "--prompt", "the ", "--tokens", "20", "--num", "3", "--seed", "1")
    assert set(sampled) == {"prompt", "completions", "tokens_per_second"}
    assert len(sampled["completions"]) == 3 and all(len(text) == 20 for text in sampled["completions"])
    assert sampled["completions"] == bardlet("sample", run, "--prompt", "the ", "--tokens", "20", "--num", "3",
                                             "--seed", "1")["completions"]


def test_a_stream_writes_what_a_batch_writes(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]],
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """Streaming, past the context window too, gives the text that --json gives at the same seed."""
    run = tmp_path / "run"
    bardlet("train", text, "--out", run, *TINY, "--steps", "2", "--tokenizer", "byte")
    whole = bardlet("sample", run, "--prompt", "the", "--tokens", "50", "--seed", "3")["completions"][0]
    assert main(["sample", str(run), "--prompt", "the", "--tokens", "50", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "the" + whole + "\n"


def test_a_run_can_be_repeated_from_its_run_toml(text: Path, tmp_path: Path,
                                                 bardlet: Callable[..., dict[str, Any]]) -> None:
    """--config run.toml gives the same weights; what is given beside it goes before it."""
    from bardlet.runtime.manifest import sha256

    bardlet("train", text, "--out", tmp_path / "one", *TINY, "--steps", "4", "--dropout", "0.1")
    bardlet("train", "--config", tmp_path / "one" / "run.toml", "--out", tmp_path / "two")
    assert sha256(tmp_path / "one" / "model.safetensors") == sha256(tmp_path / "two" / "model.safetensors")
    other = bardlet("train", "--config", tmp_path / "one" / "run.toml", "--out", tmp_path / "three", "--steps", "5")
    assert other["steps"] == 5


@pytest.mark.parametrize("model", ["bigram", "multi-head", "layer-norm"])
def test_a_run_may_begin_with_any_model(model: str, text: Path, tmp_path: Path,
                                        bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    """--init of a rung that has no dropout, or no layers, and a resumed run of it: nothing was asked for in vain."""
    words = [*settings_of(model, TINY), "--steps", "2"]
    bardlet("train", text, "--out", tmp_path / "one", "--model", model, *words)
    bardlet("train", text, "--out", tmp_path / "two", "--init", tmp_path / "one", "--dtype", "fp32", "--steps", "2")
    assert bardlet("resume", tmp_path / "two", "--steps", "3", "--allow-change")["steps"] == 3


def test_a_file_of_settings_of_another_command(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """`bardlet train` hands it on, another stage refuses it; what a file has in vain is named."""
    monkeypatch.chdir(tmp_path)
    Path("text.toml").write_text('stage = "pretrain"\n')
    assert main(["sft", "base", "a.jsonl", "--config", "text.toml"]) == 1
    assert "are those of `bardlet train`, not of sft" in capsys.readouterr().err
    Path("dpo.toml").write_text('stage = "dpo"\ninit = "base"\ntext = ["a.jsonl"]\n')
    assert main(["grpo", "--config", "dpo.toml"]) == 1
    assert "are those of `bardlet dpo`, not of grpo" in capsys.readouterr().err
    for words, wanted in ((["train", "--config", "dpo.toml"], "base: there is no such folder"),
                          (["train", "b.jsonl", "--config", "dpo.toml"], "base: there is no such folder"),
                          (["dpo", "other", "b.jsonl", "--config", "dpo.toml"], "other: there is no such folder")):
        assert main([*words, "--steps", "1"]) == 1
        assert wanted in capsys.readouterr().err
    Path("pairs.toml").write_text('model = "encdec"\nbatch_size = 3\n')
    assert main(["train", "--pair", "de-xx", "--config", "pairs.toml", "--steps", "1"]) == 1
    said = capsys.readouterr().err
    assert "note: batch_size: not used, a run on pairs" in said and "--pair de-xx" in said


@pytest.mark.parametrize(("words", "wanted"), [
    ("--no-pack", "--no-pack: is for `bardlet sft`"), ("--beta 1", "--beta: is for `bardlet dpo`, `bardlet ppo`"),
    ("--stage sft", "there is no setting --stage"), ("--lr None", "--lr None: it must be a number"),
    ("--planning", "there is no setting --planning (did you mean --plan?)"),
])
def test_settings_of_other_stages_are_no_settings(words: str, wanted: str, text: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert main(["train", str(text), *words.split()]) == 1
    assert wanted in capsys.readouterr().err


def test_what_has_no_name_on_the_command_line_is_not_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    """The run folder of `bardlet resume` is its first word, and no --run."""
    assert main(["resume", "run", "--rvn", "1"]) == 1
    assert "there is no setting --rvn; `bardlet resume --help`" in capsys.readouterr().err


def test_minutes_end_on_a_planned_step(text: Path, tmp_path: Path, clock: Clock,
                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """A timed run plans steps, makes every one that it planned in the end, and records what the clock decided."""
    from bardlet.run.folder import read_run

    begun = clock.now
    made = bardlet("train", text, "--out", tmp_path / "run", *TINY, "--minutes", "0.05")
    config, record = read_run(tmp_path / "run")
    assert record["minutes"] == 0.05 and config.minutes is None
    assert config.replans[0] == (0, config.steps) and config.replans[-1][1] == made["steps"]
    assert 0.9 * 3 < clock.now - begun <= 3, "seconds"


def test_a_machine_that_became_slow_makes_fewer_steps(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      clock: Clock, bardlet: Callable[..., dict[str, Any]]) -> None:
    """The first plan believes in steps of a quarter of their time: the clock, looked at on the way, knows better."""
    from bardlet.planning import clock as planning
    from bardlet.run.folder import read_run
    from bardlet.training import trainer

    said: list[str] = []
    timed, begun = planning.seconds_per_step, clock.now
    monkeypatch.setattr(trainer.log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(planning, "seconds_per_step", lambda *args, **kwargs: timed(*args, **kwargs) / 4)
    made = bardlet("train", text, "--out", tmp_path / "run", *TINY, "--minutes", "0.05", "--eval-tokens", "500")
    config, _ = read_run(tmp_path / "run")
    assert len(config.replans) > 1 and made["steps"] < 0.6 * config.replans[0][1]
    assert f"steps take longer than planned; training for {config.replans[1][1]} steps instead of {config.steps}" in (
        "\n".join(said))
    assert clock.now - begun <= 3.3, "after a tenth of a plan four times too long, it is late by little"


def test_a_timed_run_that_begins_again_keeps_its_clock(text: Path, tmp_path: Path, clock: Clock,
                                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """Killed before its first checkpoint, it has its minutes again."""
    from bardlet.run.folder import read_run

    run = tmp_path / "run"
    power_cut(["train", text, "--out", run, *TINY, "--minutes", "0.05", "--save-every", "0"], step=9, own_clock=True)
    planned, record = read_run(run)
    assert record["minutes"] == 0.05 and planned.replans == ((0, planned.steps),)
    begun = clock.now
    made = bardlet("resume", run)
    config, record = read_run(run)
    assert record["minutes"] == 0.05 and config.replans[-1][1] == made["steps"]
    assert 0.9 * 3 < clock.now - begun <= 3


def test_weight_decay_is_that_of_the_steps_that_were_timed(text: Path, tmp_path: Path, clock: Clock,
                                                           bardlet: Callable[..., dict[str, Any]]) -> None:
    """The calibration thought the machine a thousand times as slow: the text would hardly be read."""
    from bardlet.planning import plan as budget
    from bardlet.run.folder import read_run

    clock.per_step = 0.05
    for words in ([], ["--weight-decay", "0.2"]):
        out = tmp_path / f"run{len(words)}"
        bardlet("train", text, "--out", out, "--minutes", "0.05", "--compile", "off", *words)
        config, record = read_run(out)
        epochs = config.replans[0][1] * config.tokens_per_step / record["tokens"]
        decay, _ = budget.regularization(budget.memorization(config, epochs, record["tokens"]))
        assert decay > 0.2 and config.weight_decay == (0.2 if words else decay)
        assert f"weight decay {config.weight_decay:g}" in record["reasons"][1]
        assert f"epochs: {epochs:,.0f}, " in record["reasons"][1] or epochs < 10


def test_the_plan_of_minutes_is_made_without_training(text: Path, bardlet: Callable[..., dict[str, Any]],
                                                      clock: Clock, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """More minutes, more steps; a loss to expect; what is set stays; nothing is written."""
    from bardlet.runtime import cache, compiler

    monkeypatch.chdir(tmp_path)
    short = bardlet("train", text, "--minutes", "1", "--plan")
    longer = bardlet("train", text, "--minutes", "3", "--plan")
    assert short["steps"] < longer["steps"] and longer["expected"] < short["expected"] < 4
    assert any("weights" in reason for reason in short["reasons"]) and any("dropout" in r for r in short["reasons"])
    monkeypatch.setattr(compiler, "compiler_missing", lambda device: None)
    assert [bardlet("train", text, "--minutes", m, "--plan")["compiled"] for m in ("0.5", "60")] == [False, True]
    with monkeypatch.context() as patch:  # a model that was compiled before takes less
        read = cache.read
        patch.setattr(cache, "read", lambda folder, key: {} if folder.name == "models" else read(folder, key))
        warm = [bardlet("train", text, "--minutes", m, "--plan") for m in ("0.1", "0.5")]
    assert [plan["compiled"] for plan in warm] == [False, True]
    mine = bardlet("train", text, "--minutes", "1", "--plan", "--n-embd", "32", "--n-layer", "1", "--block-size", "16",
                   "--batch-size", "5")
    assert mine["tokens_per_step"] == 80 and mine["parameters"] < 20_000
    assert mine["expected"] is None, "the law knows the dial's own plans alone"
    assert any("whatever the time" in reason and "--n-embd" in reason for reason in mine["reasons"])
    assert bardlet("train", text, "--minutes", "1", "--plan", "--tokenizer", "auto") == short
    (tmp_path / "mine.toml").write_text("n_embd = 32\nn_layer = 1\nblock_size = 16\nbatch_size = 5\n")
    filed = bardlet("train", text, "--config", "mine.toml", "--minutes", "1", "--plan")
    assert (filed["tokens_per_step"], filed["parameters"]) == (80, mine["parameters"])
    assert not (tmp_path / "runs").exists()


def test_what_came_is_said_beside_what_was_expected(text: Path, tmp_path: Path, clock: Clock,
                                                    bardlet: Callable[..., dict[str, Any]]) -> None:
    """In --json and run.toml, in nats per character; a run by --steps expects nothing."""
    from bardlet.run.folder import read_run

    made = bardlet("train", text, "--out", tmp_path / "run", "--minutes", "0.05", "--compile", "off")
    _, record = read_run(tmp_path / "run")
    assert made["expected"] == record["expected"] > 0
    assert made["nats_per_char"] == pytest.approx(made["val_loss"], rel=0.01), "characters are its tokens"
    assert len(record["counting"]) == 5 and record["reasons"]
    untimed = bardlet("train", text, "--out", tmp_path / "steps", *TINY, "--steps", "2")
    assert untimed["expected"] is None


def test_a_timed_run_is_repeated_without_a_clock(text: Path, tmp_path: Path, clock: Clock,
                                                 bardlet: Callable[..., dict[str, Any]]) -> None:
    """What the clock decided stands in run.toml: the same steps, the same weights."""
    from bardlet.runtime.manifest import sha256

    timed = bardlet("train", text, "--out", tmp_path / "timed", *TINY, "--minutes", "0.04", "--keep", "last")
    again = bardlet("train", "--config", tmp_path / "timed" / "run.toml", "--out", tmp_path / "again")
    assert again["steps"] == timed["steps"]
    assert sha256(tmp_path / "again" / "model.safetensors") == sha256(tmp_path / "timed" / "model.safetensors")


@pytest.mark.parametrize("length", [["--steps", "6"], ["--minutes", "0.03"]], ids=["steps", "minutes"])
def test_a_finished_run_goes_on_with_more_steps(length: list[str], text: Path, tmp_path: Path, clock: Clock,
                                                bardlet: Callable[..., dict[str, Any]]) -> None:
    """resume --steps N --allow-change makes exactly N, and run.toml repeats that history, too."""
    from bardlet.runtime.manifest import sha256

    first = bardlet("train", text, "--out", tmp_path / "one", *TINY, *length, "--keep", "last", "--eval-every", "0")
    more = bardlet("resume", tmp_path / "one", "--steps", str(first["steps"] + 9), "--allow-change")
    assert (more["resumed_from"], more["steps"]) == (first["steps"], first["steps"] + 9)
    again = bardlet("train", "--config", tmp_path / "one" / "run.toml", "--out", tmp_path / "two")
    assert again["steps"] == more["steps"]
    assert sha256(tmp_path / "two" / "model.safetensors") == sha256(tmp_path / "one" / "model.safetensors")


@pytest.mark.parametrize("keep", ["best", "last", "average"])
def test_a_kill_after_the_last_step_is_mended_by_resume(keep: str, text: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        bardlet: Callable[..., dict[str, Any]]) -> None:
    """All steps are done and saved, the result is not: resume leaves at the root what an unbroken run leaves."""
    from bardlet.runtime.manifest import sha256
    from bardlet.training import trainer

    settings = [text, *TINY, "--steps", "10", "--keep", keep, "--eval-every", "5"]
    whole = bardlet("train", *settings, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finish", lambda t: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Stopped, match="stopped after step 10, and saved"):
            bardlet("train", *settings, "--out", tmp_path / "broken")
    mended = bardlet("resume", tmp_path / "broken")
    assert (mended["resumed_from"], mended["val_loss"]) == (10, whole["val_loss"])
    assert (tmp_path / "broken" / "README.md").exists() and (tmp_path / "broken" / "loss.png").exists()
    name = "model.safetensors"
    assert sha256(tmp_path / "broken" / name) == sha256(tmp_path / "whole" / name)


def test_a_part_of_a_long_validation_text_is_said_to_be_a_part(text: Path, tmp_path: Path,
                                                               bardlet: Callable[..., dict[str, Any]]) -> None:
    """--eval-tokens below the text's length: every k-th window, and the card says over how many tokens."""
    bardlet("train", text, "--out", tmp_path / "run", *TINY, "--steps", "2", "--eval-tokens", "100")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"over \d+ of [\d,]+ tokens", card)


def test_looking_takes_no_longer_than_learning(tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    """20 evaluations in a run, but none but the last where each reads more than all steps."""
    (tmp_path / "long.txt").write_text("never ending story, " * 10_000)
    for tokens, evaluations in ((100, 20), (640, 5), (0, 1)):
        out = tmp_path / str(tokens)
        bardlet("train", tmp_path / "long.txt", *TINY, "--steps", "20", "--eval-tokens", str(tokens), "--out", out)
        assert sum("val_loss" in line for line in metrics.read_metrics(out)) == evaluations


def test_after_one_step_nobody_knows_the_speed() -> None:
    """Three steps more take a quarter of a second each for 64 tokens, and so will the last two."""
    line = {"train_loss": 1.0, "val_loss": None, "steps": 6}
    first = {**line, "step": 1, "tokens": 64, "seconds": 7.0}
    last = {**line, "step": 4, "tokens": 256, "seconds": 7.75}
    assert console._facts(first, 1.0, first, 0.0, "tokens").endswith("      - tokens/s  ETA -")
    assert console._facts(last, 1.0, first, 6.0, "tokens").endswith("    256 tokens/s  ETA 0:04")


def test_a_single_document_does_not_begin_with_the_separator(text: Path, tmp_path: Path,
                                                             bardlet: Callable[..., dict[str, Any]]) -> None:
    """A BPE tokenizer has <|endoftext|>, but a model of one document has never seen it: sampling starts elsewhere."""
    from bardlet.inference.text_generation import prompt_ids
    from bardlet.run import hf

    bardlet("train", text, "--out", tmp_path / "run", *TINY, "--steps", "2", "--tokenizer", "bpe", "--vocab-size",
            "300")
    _, tokenizer = hf.read_folder(tmp_path / "run")
    assert tokenizer.eos_id is not None
    assert prompt_ids(tokenizer, None, documents=2) == [tokenizer.eos_id]
    assert prompt_ids(tokenizer, None, documents=1) == tokenizer.encode("\n").tolist()


def test_a_plan_is_only_a_plan(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--plan prints model and steps, and makes no folder."""
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *TINY, "--steps", "7", "--plan"]) == 0
    assert re.search(r"plan: 7 steps of 64 tokens", capsys.readouterr().out)
    assert not (tmp_path / "run").exists()


def test_tensorboard_and_a_missing_wandb(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]],
                                         capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """--tensorboard writes events; an extra that is not installed is one line with the remedy, and leaves no folder."""
    pytest.importorskip("tensorboard")
    bardlet("train", text, "--out", tmp_path / "run", *TINY, "--steps", "3", "--tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", str(text), "--out", str(tmp_path / "no"), *TINY, "--steps", "3", "--wandb", "x"]) == 1
    assert "pip install 'bardlet[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_every_config_of_the_repository_is_read() -> None:
    """configs/*.toml are complete and current."""
    from bardlet.config.toml import read_toml

    paths = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
    assert paths
    for path in paths:
        read_toml(path)


def test_json_is_one_object_on_the_last_line(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands before it is for people."""
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *TINY, "--steps", "2", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["steps"] == 2
    assert not any(line.startswith("{") for line in lines[:-1])
