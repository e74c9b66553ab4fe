"""`bardlet ladder`: training settings, finished and interrupted rungs, losses, and the command's output."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import Clock
from PIL import Image
from torch import nn

from bardlet import __version__, console, models
from bardlet.cli import main
from bardlet.config.pretraining import TrainConfig
from bardlet.data import windows
from bardlet.errors import BardletError
from bardlet.ladder import pictures, report, run
from bardlet.ladder.run import Ladder, LadderPlan
from bardlet.ladder.rungs import LADDER, bands, select
from bardlet.run import folder as run_folder
from bardlet.run import hf, metrics
from bardlet.runtime import atomic
from bardlet.runtime.compiler import compile_blocks
from bardlet.runtime.distributed import Dist

HERE = Dist(0, 1, torch.device("cpu"))
DRAW = pictures.draw


@pytest.fixture(autouse=True)
def small_ladder(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Shrink the rungs to a few steps, time the scaled rungs with a fake clock, and fix the date."""
    monkeypatch.setattr(clock, "strftime", lambda form: "2026-01-01", raising=False)
    monkeypatch.setattr(run, "SMALL", {**run.SMALL, "steps": 12})
    monkeypatch.setattr(run, "CPU", {**run.CPU, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16,
                                     "batch_size": 4})
    for rung in LADDER[:1]:
        monkeypatch.setitem(rung.settings, "steps", 9)
    random_windows = windows.random_windows
    monkeypatch.setattr(windows, "random_windows", lambda tokens, block, batches, rows, seed: random_windows(
        tokens, block, batches // 20, rows, seed))
    monkeypatch.setattr(pictures, "draw", blank)


def blank(folder: Path, name: str, paint: pictures.Paint) -> None:
    """Write pictures of one pixel. Others test the pictures, which take longer than everything here."""
    for suffix in ("", "-dark"):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (1, 1)).save(folder / f"{name}{suffix}.png")


@contextmanager
def warnings() -> Iterator[list[str]]:
    """Collect the warnings of bardlet's logger."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, collector = logging.getLogger("bardlet"), Collector(logging.WARNING)
    logger.addHandler(collector)
    yield messages
    logger.removeHandler(collector)


def ignore(*args: Any) -> None:
    """A callback that does nothing."""


def train(ladder: Ladder) -> list[run.Outcome]:
    """Train the ladder and return all outcomes."""
    ladder.plan_steps(ignore)
    return list(ladder.train_all(ignore))


# ---------------------------------------------------------------------------- which rungs


@pytest.mark.parametrize("selection, numbers", [
    ("1-7", [1, 2, 3, 4, 5, 6, 7]), ("3", [3]), ("5,3, 4", [3, 4, 5]), ("bigram,12-13", [1, 12, 13]),
    ("one-head", [3]), ("layer-norm,7", [7]), ("12-13,2-2", [2, 12, 13]),
])  # fmt: skip
def test_rungs_are_selected_by_number_range_and_name(selection: str, numbers: list[int]) -> None:
    assert [rung.number for rung in select(selection)] == numbers


@pytest.mark.parametrize("selection, message", [
    ("", "'' is not a rung; use numbers from 1 to 13, such as 1-7"), ("0", "no rung 0; use numbers from 1 to 13"),
    ("14", "no rung 14"), ("7-1", "use 1-7"), ("1-99", "there are 13 rungs; use 1-13"), ("two", "is not a rung"),
    ("1,,2", "'' is not a rung"), ("-3", "'-3' is not a rung"), ("3-", "'3-' is not a rung"), ("0-3", "use 1-3"),
    ("20-30", "'20-30' is not a rung"), ("layernorm", "did you mean layer-norm?"),
])  # fmt: skip
def test_invalid_selection_is_a_one_line_error(selection: str, message: str,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BardletError, match=re.escape(message)):
        select(selection)
    assert main(["ladder", f"--rungs={selection}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_rungs_have_the_lecture_settings(monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path / "cache"))
    ladder = Ladder(LadderPlan(LADDER, tmp_path / "out", (str(text),), threads=3), HERE)
    for rung in LADDER[:7]:
        c = ladder.config(rung, 1337)
        assert (c.batch_size, c.block_size, c.n_embd, c.n_head, c.n_layer, c.threads) == (32, 8, 32, 4, 3, 1)
        assert (c.steps, c.lr) == ((3000, 1e-2) if rung.name == "bigram" else (5000, 1e-3))
        assert (c.optimizer, c.schedule, c.grad_clip, c.keep, c.dropout, c.dtype) == (
            "adamw", "constant", 0.0, "last", 0.0, "fp32")
    scaled = [ladder.config(rung, 1337, 100) for rung in LADDER[7:]]
    assert [c.threads for c in scaled] == [3] * 6, "the threads of the plan"
    assert [c.optimizer for c in scaled] == ["adamw"] * 4 + ["muon"] * 2
    assert [c.keep for c in scaled] == ["last"] * 5 + ["average"]
    changes = {"model": 0, "optimizer": 0, "muon_lr": 0, "keep": 0}
    for c in scaled:  # apart from the one change, all settings are equal
        assert {**vars(c), **changes} == {**vars(scaled[0]), **changes}


def test_scaled_rungs_on_a_gpu_have_the_lecture_size(text: Path, tmp_path: Path) -> None:
    """Checked without a GPU: batch, steps and 10.8 M parameters (the lecture's 10,788,929 minus 65 head biases)."""
    ladder = Ladder(LadderPlan(LADDER[7:], tmp_path / "out", (str(text),)), Dist(0, 1, torch.device("cuda")))
    assert ladder.minutes is None
    ladder.plan_steps(ignore)
    for rung in LADDER[7:]:
        c = ladder.config(rung, 1337, ladder.steps[rung.name])
        assert (c.n_layer, c.n_head, c.n_embd, c.block_size, c.batch_size, c.dropout, c.steps, c.lr) == (
            6, 6, 384, 256, 64, 0.2, 5000, 3e-4)
        with torch.device("meta"):
            model = models.build(c.model_config(65))
        size = sum(p.numel() for p in model.parameters())
        assert size == 10_788_864 if rung.number == 8 else 10.5e6 < size < 10.8e6, rung.name


def test_compile_decision_is_made_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, each seed of an untimed rung on a GPU would be timed again, with possibly another decision."""
    calls: list[tuple[str, str]] = []

    def choose(trainer: Any, seconds: float | None) -> None:
        calls.append((trainer.config.model, trainer.config.compile))
        trainer.machine.update(compiled=len(calls) == 1)

    monkeypatch.setattr(run.compilation, "choose_compile", choose)
    ladder = Ladder(LadderPlan(select("8,12,13"), tmp_path / "l", (str(text),), seeds=2), HERE)
    for rung, seed in ladder.jobs():
        ladder._compiled(rung, seed, 5)
    assert calls == [("dropout", "auto"), ("qk-norm", "auto"), ("qk-norm", "off"),
                     ("dropout", "on"), ("qk-norm", "off"), ("qk-norm", "off")]


def test_only_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads inside the blocks, also in a ModuleList, are not compiled separately."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    for name in ("residual", "qk-norm", "gpt2", "qwen3"):
        compiled.clear()
        model = models.build(TrainConfig(model=name, n_layer=2, n_head=2, n_embd=8).model_config(5))
        compile_blocks(model)
        assert len(compiled) == 2 and all("Block" in type(block).__name__ for block in compiled), name


# ---------------------------------------------------------------------------- the command


def test_command_writes_its_report(bardlet: Callable[..., dict[str, Any]], text: Path, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and scaled rungs, with their pictures; tests/acceptance/test_ladder.py covers all rungs."""
    monkeypatch.setattr(pictures, "draw", DRAW)
    numbers = (1, 5, 8, 11, 12)
    result = bardlet("ladder", text, "--rungs", ",".join(map(str, numbers)), "--minutes", "0.002",
                     "--out", tmp_path / "l", "--seeds", "1")
    assert Path(result["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [row["rung"] for row in result["rungs"]] == [*numbers]
    for row, rung in zip(result["rungs"], (LADDER[number - 1] for number in numbers), strict=True):
        assert row.keys() >= {"rung", "name", "parameters", "seconds", "val_loss", "lecture"}
        assert (row["name"], row["lecture"]) == (rung.name, None), "the lecture uses another text"
        folder = tmp_path / "l" / f"{rung.number:02}-{rung.name}" / "seed-1337"
        model, _ = hf.read_folder(folder)
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        files = {path.name for path in folder.iterdir()}
        assert {"outcome.json", "metrics.jsonl", "run.toml", "README.md", "loss.png"} <= files
        assert f"\n---\n\n# {rung.name}\n" in (folder / "README.md").read_text(encoding="utf-8")
        made = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))["made"]
        machine = run_folder.read_run(folder)[1]["machine"]
        assert made == {"date": "2026-01-01", "bardlet": __version__,
                        **{name: machine[name] for name in made.keys() - {"date", "bardlet"}}}
        assert made.keys() == {"date", "bardlet", "torch", "threads", "dtype", "compiled", "processor", "device"}
    weights = [hf.read_weights(tmp_path / "l" / f"{n}" / "seed-1337") for n in ("11-qk-norm", "12-muon")]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0]), "Muon gives different weights"


def test_losses_match_bardlet_eval(bardlet: Callable[..., dict[str, Any]], text: Path, tmp_path: Path) -> None:
    """The ladder's validation loss follows protocol (b), and `bardlet eval` computes the same from the folder."""
    result = bardlet("ladder", text, "--rungs", "3,7", "--out", tmp_path / "l")
    for row in result["rungs"]:
        folder = tmp_path / "l" / f"{row['rung']:02}-{row['name']}" / "seed-1337"
        assert bardlet("eval", folder)["loss"] == pytest.approx(row["val_loss"], abs=1e-6)
        assert bardlet("sample", folder, "--tokens", "20", "--seed", "1")["completions"][0]


def test_finished_rungs_are_kept(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LadderPlan(select("1,3,8"), tmp_path / "l", (str(text),), seeds=2, minutes=0.001)
    first = train(Ladder(plan, HERE))
    assert [(o.rung.number, o.seed) for o in first] == [(n, seed) for seed in (1337, 1338) for n in (1, 3, 8)]
    before = {o.folder: hf.read_weights(o.folder) for o in first}
    (first[4].folder / "outcome.json").unlink()

    trained: list[tuple[str, int]] = []
    real = Ladder.train
    monkeypatch.setattr(Ladder, "train", lambda self, rung, seed, *args: (trained.append((rung.name, seed)),
                                                                          real(self, rung, seed, *args))[1])
    again = train(Ladder(plan, HERE))
    assert trained == [("one-head", 1338)], "only the unfinished rung is trained"
    for a, b in zip(first, again, strict=True):
        for name in ("val_loss", "val_loss_lecture", "train_loss", "steps", "sample"):
            assert getattr(a, name) == getattr(b, name)
        weights = hf.read_weights(b.folder)
        assert all(torch.equal(weights[name], before[a.folder][name]) for name in weights)
    assert first[0].val_loss != first[3].val_loss, "another seed gives another result"


def test_folder_is_named_after_the_text(text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    ladder = Ladder(LadderPlan(select("1"), text=(str(text.parent / "*.txt"),)), HERE)
    assert ladder.out == Path("runs") / f"ladder-{ladder.corpus.name}" and "*" not in ladder.corpus.name
    before = torch.get_num_threads()
    assert len(train(ladder)) == 1 and torch.get_num_threads() == before


def test_rung_with_a_damaged_outcome_is_retrained(text: Path, tmp_path: Path) -> None:
    plan = LadderPlan(select("1"), tmp_path / "l", (str(text),))
    [first] = train(Ladder(plan, HERE))
    (first.folder / "outcome.json").write_text("{", encoding="utf-8")
    with warnings() as messages:
        [again] = train(Ladder(plan, HERE))
    assert again.val_loss == first.val_loss
    assert len(messages) == 1 and "outcome.json: damaged" in messages[0] and "training this rung again" in messages[0]


@pytest.mark.parametrize("recorded", [True, False], ids=["settings in outcome.json", "settings only in run.toml"])
def test_rung_with_other_settings_is_retrained(recorded: bool, text: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LadderPlan(select("3,4"), tmp_path / "l", (str(text),))
    first = train(Ladder(plan, HERE))
    if not recorded:  # outcomes of an older bardlet
        for path in (tmp_path / "l").glob("*/*/outcome.json"):
            old = json.loads(path.read_text(encoding="utf-8"))
            atomic.write_json(path, {name: value for name, value in old.items() if name not in ("settings", "made")})
    with warnings() as messages:
        assert [o.val_loss for o in train(Ladder(plan, HERE))] == [o.val_loss for o in first]
        assert not messages
        monkeypatch.setitem(run.LECTURE, "weight_decay", 0.02)
        again = train(Ladder(plan, HERE))
    why = "trained with a different weight_decay (0.01, now 0.02); training this rung again"
    assert messages == [f"{outcome.folder}: {why}" for outcome in first]
    assert [o.val_loss != f.val_loss for o, f in zip(again, first, strict=True)] == [True, True]


def test_warning_if_the_number_of_threads_changed(text: Path, tmp_path: Path) -> None:
    plan = LadderPlan(select("1,8"), tmp_path / "l", (str(text),), minutes=0.001, threads=1)
    train(Ladder(plan, HERE))
    with warnings() as messages:
        train(Ladder(replace(plan, threads=2), HERE))  # no rung is left to train
        assert not messages
        Ladder(replace(plan, threads=2, seeds=2), HERE).plan_steps(ignore)
        assert len(messages) == 1
        assert "timed with --threads 1, not 2" in messages[0] and "use --threads 1" in messages[0]
    assert json.loads((tmp_path / "l" / "ladder.json").read_text(encoding="utf-8"))["threads"] == 1
    planned = json.loads((tmp_path / "l" / "ladder.json").read_text(encoding="utf-8"))
    older = {name: planned[name] for name in ("asked", "steps")}
    atomic.write_json(tmp_path / "l" / "ladder.json", older)
    with warnings() as messages:
        Ladder(replace(plan, threads=2, seeds=2), HERE).plan_steps(ignore)
    assert not messages and "threads" not in json.loads((tmp_path / "l" / "ladder.json").read_text(encoding="utf-8"))


def test_plan_is_read_under_the_lock(text: Path, tmp_path: Path) -> None:
    """If two calls start at the same time, the second uses the steps that the first has planned in the meantime."""
    plan = LadderPlan(select("8"), tmp_path / "l", (str(text),), minutes=0.001)
    first, second = Ladder(plan, HERE), Ladder(plan, HERE)
    train(first)
    second.plan_steps(ignore)
    assert second.steps == first.steps and second.outcome(LADDER[7], 1337)


def test_report_includes_rungs_of_earlier_calls(bardlet: Callable[..., dict[str, Any]], text: Path,
                                                tmp_path: Path) -> None:
    """With other rungs in the same folder, --json lists only the selected rungs, and the page shows all."""
    bardlet("ladder", text, "--rungs", "1,3", "--seeds", "2", "--out", tmp_path / "l")
    result = bardlet("ladder", text, "--rungs", "4", "--out", tmp_path / "l")
    assert [row["rung"] for row in result["rungs"]] == [4]
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert all(LADDER[number - 1].title in page for number in (1, 3, 4)) and LADDER[1].title not in page
    ladder = Ladder(LadderPlan(select("4"), tmp_path / "l", (str(text),)), HERE)
    assert [(o.rung.number, o.seed - 1337) for o in ladder.finished()] == [(1, 0), (1, 1), (3, 0), (3, 1), (4, 0)]


def test_rungs_without_attention_are_named_for_a_sentence(text: Path, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ladder", str(text), "--out", str(tmp_path / "l"), "--rungs"]
    assert main([*words, "1"]) == 0
    assert "--sentence" not in capsys.readouterr().out, "nobody asked"
    for rungs, told in (("1", "bigram has"), ("1-3", "bigram and averaging have"), ("3", "")):
        assert main([*words, rungs, "--sentence", "bards sing"]) == 0
        assert capsys.readouterr().out.partition("--sentence: ")[2].partition(" no attention")[0] == told


def test_other_options_need_another_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", str(text), "--rungs", "1", "--out", str(tmp_path / "l")]) == 0
    capsys.readouterr()
    assert main(["ladder", str(text), "--rungs", "1", "--tokenizer", "byte", "--out", str(tmp_path / "l")]) == 1
    assert "started with a different tokenizer (char, now byte); choose another --out" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary", encoding="utf-8")
    assert main(["ladder", str(text), "--rungs", "1", "--out", str(tmp_path / "mine")]) == 1
    assert "not empty and contains no ladder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["diary.txt"], "the folder is unchanged"


def test_text_that_is_too_short_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("hello world", encoding="utf-8")
    assert main(["ladder", str(tmp_path / "short.txt"), "--rungs", "1,8", "--out", str(tmp_path / "l")]) == 1
    error = capsys.readouterr().err
    assert "short: 9 training and 2 validation tokens are too few for the windows of 8 tokens in rung 1" in error
    assert error.count("\n") == 1 and not (tmp_path / "l").exists()


def test_ctrl_c_keeps_finished_rungs(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = LadderPlan(select("1,3"), tmp_path / "l", (str(text),))
    ladder = Ladder(plan, HERE)

    def interrupt(rung: Any, seed: int, line: dict[str, Any]) -> None:
        if rung.name == "one-head" and line["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    ladder.plan_steps(ignore)
    with pytest.raises(BardletError, match="stopped in rung 3, one-head; all steps are saved in ") as stopped:
        list(ladder.train_all(interrupt))
    assert stopped.value.exit_code == 130  # type: ignore[attr-defined]
    assert [path.parent.parent.name for path in (tmp_path / "l").glob("*/*/outcome.json")] == ["01-bigram"]
    assert len(train(Ladder(plan, HERE))) == 2


def stop_at_step_5(rung: Any, seed: int, line: dict[str, Any]) -> None:
    """Raise a signal, as Ctrl-C does."""
    if line["step"] == 5:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", ["3", "12"])
def test_an_interrupted_rung_continues_bit_for_bit(number: str, text: Path, tmp_path: Path) -> None:
    """Its first step is the one after the checkpoint, and its outcome and weights are those of a whole ladder."""
    plan = LadderPlan(select(number), tmp_path / "l", (str(text),), minutes=0.005)
    [whole] = train(Ladder(replace(plan, out=tmp_path / "whole"), HERE))
    first, second = Ladder(plan, HERE), Ladder(plan, HERE)
    first.plan_steps(ignore)
    with pytest.raises(BardletError, match="stopped in rung"):
        list(first.train_all(stop_at_step_5))
    second.plan_steps(ignore)
    steps: list[int] = []
    [again] = second.train_all(lambda rung, seed, line: steps.append(line["step"]))
    assert steps == list(range(6, whole.steps + 1))
    for name in ("val_loss", "val_loss_lecture", "train_loss", "steps", "sample", "settings"):
        assert getattr(again, name) == getattr(whole, name), name
    assert all(torch.equal(tensor, hf.read_weights(whole.folder)[name])
               for name, tensor in hf.read_weights(again.folder).items())
    times = ("seconds", "tokens_per_second")
    [lines, expected] = ([{name: value for name, value in line.items() if name not in times}
                          for line in metrics.read_metrics(folder)] for folder in (again.folder, whole.folder))
    assert lines == expected


@pytest.mark.parametrize("change", ["settings", "machine", "damage"])
def test_an_interrupted_rung_that_cannot_continue_starts_again(change: str, text: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LadderPlan(select("3"), tmp_path / "l", (str(text),))
    first, steps = Ladder(plan, HERE), []
    first.plan_steps(ignore)
    with pytest.raises(BardletError, match="stopped in rung"):
        list(first.train_all(stop_at_step_5))
    if change == "settings":
        monkeypatch.setitem(run.LECTURE, "weight_decay", 0.02)
    elif change == "machine":
        real = Ladder.trainer
        monkeypatch.setattr(Ladder, "trainer", lambda *args: (
            trainer := real(*args), trainer.machine.update(torch="0.1"))[0])
    else:
        [path] = (tmp_path / "l").glob("*/*/checkpoints/*/model.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    second = Ladder(plan, HERE)
    second.plan_steps(ignore)
    list(second.train_all(lambda rung, seed, line: steps.append(line["step"])))
    assert steps[0] == 1 and len(second.finished()) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", ["last step", "measurement"])
def test_late_signal_stops_the_ladder_after_the_rung(when: str, number: int, code: int, text: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The rung is finished and kept; the next rung does not start."""
    ladder = Ladder(LadderPlan(select("1,3,4"), tmp_path / "l", (str(text),)), HERE)
    steps: list[str] = []

    def watch(rung: Any, seed: int, line: dict[str, Any]) -> None:
        steps.append(rung.name)
        if when == "last step" and rung.name == "one-head" and line["step"] == line["steps"]:
            signal.raise_signal(number)

    def measure(self: Ladder, trainer: Any, rung: Any, seed: int, real: Any = Ladder._measure) -> Any:
        if when == "measurement" and rung.name == "one-head":
            signal.raise_signal(number)
        return real(self, trainer, rung, seed)

    monkeypatch.setattr(Ladder, "_measure", measure)
    before = signal.getsignal(number)
    ladder.plan_steps(ignore)
    done = []
    with pytest.raises(BardletError, match="stopped after rung 3, one-head; all steps are saved in ") as stopped:
        for outcome in ladder.train_all(watch):
            done.append(outcome.rung.name)
    assert stopped.value.exit_code == code  # type: ignore[attr-defined]
    assert str(stopped.value).endswith(": run the same command to continue")
    assert done == ["bigram", "one-head"] and set(steps) == set(done)
    assert signal.getsignal(number) == before
    assert ladder.outcome(LADDER[2], 1337)


def test_signals_act_at_once_during_compilation(text: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation takes a minute, and there is nothing to save yet."""
    ladder = Ladder(LadderPlan(select("8"), tmp_path / "l", (str(text),), minutes=0.001), HERE)
    ladder.plan_steps(ignore)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def compiling(trainer: Any, seconds: float | None) -> None:
        assert {number: signal.getsignal(number) for number in handlers} == handlers
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.compilation, "choose_compile", compiling)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores SIGINT
    try:
        handlers[signal.SIGINT] = signal.default_int_handler
        with pytest.raises(BardletError, match="stopped in rung 8, dropout; all steps are saved in ") as stopped:
            list(ladder.train_all(ignore))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.exit_code == 130  # type: ignore[attr-defined]


def test_report_facts_come_from_the_training_runs() -> None:
    def made(**other: Any) -> dict[str, Any]:
        return {"date": "2026-01-02", "bardlet": "1", "torch": "2", "threads": 1, "processor": "x", **other}

    assert report.summary([made(), made(threads=4), made(date="2026-01-01", torch="3", processor="y")]) == {
        "machine": "x, 1 or 4 threads; y, 1 thread", "date": "2026-01-01 to 2026-01-02",
        "versions": "bardlet 1, torch 2; bardlet 1, torch 3"}
    assert report.summary([made()])["date"] == "2026-01-02"


@pytest.mark.parametrize(("options", "message"), [
    ("--rungs 0-3", "there is no rung 0; use 1-3"), ("--rungs 0-20", "use 1-13"), ("--rungs 0", "from 1 to 13"),
    ("--step 5", "did you mean --minutes"), ("--steps=5", "did you mean --minutes"),
])  # fmt: skip
def test_near_misses_get_a_suggestion(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", *options.split()]) == 1
    assert message in capsys.readouterr().err


def test_seeds_of_a_scaled_rung_train_for_the_same_steps(text: Path, tmp_path: Path) -> None:
    ladder = Ladder(LadderPlan(select("8,11"), tmp_path / "l", (str(text),), seeds=2, minutes=0.001), HERE)
    outcomes = train(ladder)
    planned = json.loads((tmp_path / "l" / "ladder.json").read_text(encoding="utf-8"))["steps"]
    assert [o.steps for o in outcomes] == [planned["dropout"], planned["qk-norm"]] * 2
    lines = metrics.read_metrics(outcomes[0].folder)
    assert lines[-1]["step"] == outcomes[0].steps


def test_piped_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At most one line every ten seconds: rung, step, both losses, share of the whole ladder, and ETA."""
    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    line = {"step": 1, "steps": 100, "train_loss": 4.0, "val_loss": None}
    with console.ladder_progress({"a": 10.0, "b": 30.0}) as watch:
        watch("1 bigram", "a", line)
        assert capsys.readouterr().out == ("rung 1 bigram: step     1/100  train 4.0000  whole ladder   0%\n")
        now += 5
        watch("1 bigram", "a", {**line, "step": 50})
        assert capsys.readouterr().out == "", "too soon after the last line"
        now += 6
        watch("1 bigram", "a", {**line, "step": 100, "val_loss": 2.5})
        # a quarter of the expected time took 11 seconds, so the rest takes 33
        assert capsys.readouterr().out == (
            "rung 1 bigram: step   100/100  train 4.0000  val 2.5000  whole ladder  25%  ETA 0:33\n")
        now += 22
        watch("3 one-head", "b", {**line, "step": 50, "train_loss": 3.0, "val_loss": 3.5})
        assert capsys.readouterr().out == (  # the smoothed training loss restarts
            "rung 3 one-head: step    50/100  train 3.0000  val 3.5000  whole ladder  62%  ETA 0:19\n")


def test_bands_contain_their_means() -> None:
    assert list(bands()) == [rung.name for rung in LADDER[:7]], "only the lecture's rungs have bands"
    for name, band in bands().items():
        assert band["low"] < band["mean"] < band["high"] and band["seeds"] >= 5, name
        assert band["high"] - band["mean"] == pytest.approx(3 * band["deviation"])


def test_explain_needs_no_text(bardlet: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = bardlet("ladder", "--explain", "--out", tmp_path / "p")
    assert result["experiments"]["variance"] and list((tmp_path / "p").glob("*-dark.png"))
