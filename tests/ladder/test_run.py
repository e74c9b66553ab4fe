"""`bardlet ladder`: rungs are trained as the lecture does, what is finished stays, and the figures are measured."""

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
from torch import nn

from bardlet import __version__, console, models
from bardlet.cli import main
from bardlet.config.pretraining import TrainConfig
from bardlet.errors import BardletError
from bardlet.ladder import report, run
from bardlet.ladder.run import Ladder, LadderPlan
from bardlet.ladder.rungs import LADDER, bands, select
from bardlet.run import folder as run_folder
from bardlet.run import hf, metrics
from bardlet.runtime import atomic
from bardlet.runtime.compiler import compile_blocks
from bardlet.runtime.distributed import Dist

HERE = Dist(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Rungs of a few steps; the scaled ones are timed by a clock of their own, and ladders are made on one day."""
    monkeypatch.setattr(clock, "strftime", lambda form: "2026-01-01", raising=False)
    monkeypatch.setattr(run, "SMALL", {**run.SMALL, "steps": 12})
    monkeypatch.setattr(run, "CPU", {**run.CPU, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16,
                                     "batch_size": 4})
    for rung in LADDER[:1]:
        monkeypatch.setitem(rung.settings, "steps", 9)


@contextmanager
def heard() -> Iterator[list[str]]:
    """What bardlet's logger says inside."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, ear = logging.getLogger("bardlet"), Ear(logging.WARNING)
    logger.addHandler(ear)
    yield said
    logger.removeHandler(ear)


def nothing(*told: Any) -> None:
    """A watch that looks away."""


def all_outcomes(ladder: Ladder) -> list[run.Outcome]:
    ladder.plan_steps(nothing)
    return list(ladder.climb(nothing))


# ---------------------------------------------------------------------------- which rungs


@pytest.mark.parametrize("words, numbers", [
    ("1-7", [1, 2, 3, 4, 5, 6, 7]), ("3", [3]), ("5,3, 4", [3, 4, 5]), ("bigram,12-13", [1, 12, 13]),
    ("one-head", [3]), ("layer-norm,7", [7]), ("12-13,2-2", [2, 12, 13]),
])  # fmt: skip
def test_rungs_are_named_by_number_range_and_name(words: str, numbers: list[int]) -> None:
    assert [rung.number for rung in select(words)] == numbers


@pytest.mark.parametrize("words, said", [
    ("", "'' names no rung; give numbers from 1 to 13, as in 1-7"), ("0", "no rung 0; give numbers from 1 to 13"),
    ("14", "no rung 14"), ("7-1", "take 1-7"), ("1-99", "there are 13 rungs; take 1-13"), ("two", "names no rung"),
    ("1,,2", "'' names no rung"), ("-3", "'-3' names no rung"), ("3-", "'3-' names no rung"), ("0-3", "take 1-3"),
    ("20-30", "'20-30' names no rung"), ("layernorm", "did you mean layer-norm?"),
])  # fmt: skip
def test_what_names_no_rung_is_one_line(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BardletError, match=re.escape(said)):
        select(words)
    assert main(["ladder", f"--rungs={words}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_rungs_have_the_lecture_s_settings(monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path) -> None:
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
    assert [c.threads for c in scaled] == [3] * 6, "what the plan says"
    assert [c.optimizer for c in scaled] == ["adamw"] * 4 + ["muon"] * 2
    assert [c.keep for c in scaled] == ["last"] * 5 + ["average"]
    changes = {"model": 0, "optimizer": 0, "muon_lr": 0, "keep": 0}
    for c in scaled:  # but for its one change each trains as the others do
        assert {**vars(c), **changes} == {**vars(scaled[0]), **changes}


def test_on_a_gpu_the_scaled_rungs_have_the_lecture_s_size(text: Path, tmp_path: Path) -> None:
    """Counted without a GPU: 10.8 M parameters (the lecture's 10,788,929 less the head's 65 biases), its batches."""
    ladder = Ladder(LadderPlan(LADDER[7:], tmp_path / "out", (str(text),)), Dist(0, 1, torch.device("cuda")))
    assert ladder.minutes is None
    ladder.plan_steps(nothing)
    for rung in LADDER[7:]:
        c = ladder.config(rung, 1337, ladder.steps[rung.name])
        assert (c.n_layer, c.n_head, c.n_embd, c.block_size, c.batch_size, c.dropout, c.steps, c.lr) == (
            6, 6, 384, 256, 64, 0.2, 5000, 3e-4)
        with torch.device("meta"):
            model = models.build(c.model_config(65))
        size = sum(p.numel() for p in model.parameters())
        assert size == 10_788_864 if rung.number == 8 else 10.5e6 < size < 10.8e6, rung.name


def test_whether_to_compile_is_decided_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rung that is not timed, on a GPU, each seed would time it again, and might decide otherwise."""
    told: list[tuple[str, str]] = []

    def choose(t: Any, seconds: float | None) -> None:
        told.append((t.config.model, t.config.compile))
        t.machine.update(compiled=len(told) == 1)

    monkeypatch.setattr(run.compilation, "choose_compile", choose)
    ladder = Ladder(LadderPlan(select("8,12,13"), tmp_path / "l", (str(text),), seeds=2), HERE)
    for rung, seed in ladder.jobs():
        ladder._compiled(rung, seed, 5)
    assert told == [("dropout", "auto"), ("qk-norm", "auto"), ("qk-norm", "off"),
                    ("dropout", "on"), ("qk-norm", "off"), ("qk-norm", "off")]


def test_only_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the heads inside them, which are lists as well."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled.append(self))
    for name in ("residual", "qk-norm", "gpt2", "qwen3"):
        compiled.clear()
        model = models.build(TrainConfig(model=name, n_layer=2, n_head=2, n_embd=8).model_config(5))
        compile_blocks(model)
        assert len(compiled) == 2 and all("Block" in type(block).__name__ for block in compiled), name


# ---------------------------------------------------------------------------- the command


def test_the_command_ends_with_its_report(bardlet: Callable[..., dict[str, Any]], text: Path, tmp_path: Path) -> None:
    """Small and scaled rungs; tests/acceptance/test_ladder.py has all of them."""
    asked = (1, 5, 8, 11, 12)
    said = bardlet("ladder", text, "--rungs", ",".join(map(str, asked)), "--minutes", "0.002", "--out", tmp_path / "l",
                   "--seeds", "1")
    assert Path(said["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [line["rung"] for line in said["rungs"]] == [*asked]
    for line, rung in zip(said["rungs"], (LADDER[number - 1] for number in asked), strict=True):
        assert line.keys() >= {"rung", "name", "parameters", "seconds", "val_loss", "lecture"}
        assert (line["name"], line["lecture"]) == (rung.name, None), "the lecture has another text"
        folder = tmp_path / "l" / f"{rung.number:02}-{rung.name}" / "seed-1337"
        model, _ = hf.read_folder(folder)
        assert line["parameters"] == sum(p.numel() for p in model.parameters())
        left = {path.name for path in folder.iterdir()}
        assert {"outcome.json", "metrics.jsonl", "run.toml", "README.md", "loss.png"} <= left
        assert (folder / "README.md").read_text(encoding="utf-8").startswith(f"# {rung.name}\n")
        made = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))["made"]
        machine = run_folder.read_run(folder)[1]["machine"]
        assert made == {"date": "2026-01-01", "bardlet": __version__,
                        **{name: machine[name] for name in made.keys() - {"date", "bardlet"}}}
        assert made.keys() == {"date", "bardlet", "torch", "threads", "dtype", "compiled", "processor", "device"}
    weights = [hf.read_weights(tmp_path / "l" / f"{n}" / "seed-1337") for n in ("11-qk-norm", "12-muon")]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0]), "Muon is another training"


def test_measured_as_eval_measures(bardlet: Callable[..., dict[str, Any]], text: Path, tmp_path: Path) -> None:
    """The ladder's validation loss is protocol (b), as `bardlet eval` computes it from the folder alone."""
    said = bardlet("ladder", text, "--rungs", "3,7", "--out", tmp_path / "l")
    for line in said["rungs"]:
        folder = tmp_path / "l" / f"{line['rung']:02}-{line['name']}" / "seed-1337"
        assert bardlet("eval", folder)["loss"] == pytest.approx(line["val_loss"], abs=1e-6)
        assert bardlet("sample", folder, "--tokens", "20", "--seed", "1")["completions"][0]


def test_what_is_finished_stays(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LadderPlan(select("1,3,8"), tmp_path / "l", (str(text),), seeds=2, minutes=0.001)
    first = all_outcomes(Ladder(plan, HERE))
    assert [(o.rung.number, o.seed) for o in first] == [(n, seed) for seed in (1337, 1338) for n in (1, 3, 8)]
    kept = {o.folder: hf.read_weights(o.folder) for o in first}
    lost = first[4]
    (lost.folder / "outcome.json").unlink()

    trained: list[tuple[str, int]] = []
    real = Ladder.train
    monkeypatch.setattr(Ladder, "train", lambda self, rung, seed, *told: (trained.append((rung.name, seed)),
                                                                          real(self, rung, seed, *told))[1])
    again = all_outcomes(Ladder(plan, HERE))
    assert trained == [("one-head", 1338)], "only what is not finished is trained"
    for a, b in zip(first, again, strict=True):
        for name in ("val_loss", "val_loss_lecture", "train_loss", "steps", "sample"):
            assert getattr(a, name) == getattr(b, name)
        weights = hf.read_weights(b.folder)
        assert all(torch.equal(weights[name], kept[a.folder][name]) for name in weights)
    assert first[0].val_loss != first[3].val_loss, "another seed is another run"


def test_the_folder_is_called_as_the_text_is(text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    ladder = Ladder(LadderPlan(select("1"), text=(str(text.parent / "*.txt"),)), HERE)
    assert ladder.out == Path("runs") / f"ladder-{ladder.corpus.name}" and "*" not in ladder.corpus.name
    before = torch.get_num_threads()
    assert len(all_outcomes(ladder)) == 1 and torch.get_num_threads() == before


def test_a_damaged_outcome_is_trained_again(text: Path, tmp_path: Path) -> None:
    plan = LadderPlan(select("1"), tmp_path / "l", (str(text),))
    [first] = all_outcomes(Ladder(plan, HERE))
    (first.folder / "outcome.json").write_text("{", encoding="utf-8")
    with heard() as said:
        [again] = all_outcomes(Ladder(plan, HERE))
    assert again.val_loss == first.val_loss
    assert len(said) == 1 and "outcome.json: damaged" in said[0] and "the rung is trained again" in said[0]


@pytest.mark.parametrize("recorded", [True, False], ids=["outcome.json says with which", "only run.toml says so"])
def test_an_outcome_of_other_settings_is_trained_again(recorded: bool, text: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LadderPlan(select("3,4"), tmp_path / "l", (str(text),))
    first = all_outcomes(Ladder(plan, HERE))
    if not recorded:  # outcomes of an older bardlet
        for path in (tmp_path / "l").glob("*/*/outcome.json"):
            old = json.loads(path.read_text(encoding="utf-8"))
            atomic.write_json(path, {name: value for name, value in old.items() if name not in ("settings", "made")})
    with heard() as said:
        assert [o.val_loss for o in all_outcomes(Ladder(plan, HERE))] == [o.val_loss for o in first]
        assert not said
        monkeypatch.setitem(run.LECTURE, "weight_decay", 0.02)
        again = all_outcomes(Ladder(plan, HERE))
    why = "was trained with another weight_decay (0.01, now 0.02); the rung is trained again"
    assert said == [f"{outcome.folder}: {why}" for outcome in first]
    assert [o.val_loss != f.val_loss for o, f in zip(again, first, strict=True)] == [True, True]


def test_other_threads_than_the_timed_ones_are_said(text: Path, tmp_path: Path) -> None:
    plan = LadderPlan(select("1,8"), tmp_path / "l", (str(text),), minutes=0.001, threads=1)
    all_outcomes(Ladder(plan, HERE))
    with heard() as said:
        all_outcomes(Ladder(replace(plan, threads=2), HERE))  # nothing is left to train
        assert not said
        Ladder(replace(plan, threads=2, seeds=2), HERE).plan_steps(nothing)
        assert len(said) == 1 and "were timed with 1 threads, not with 2" in said[0] and "--threads 1" in said[0]
    assert json.loads((tmp_path / "l" / "ladder.json").read_text(encoding="utf-8"))["threads"] == 1
    planned = json.loads((tmp_path / "l" / "ladder.json").read_text(encoding="utf-8"))
    older = {name: planned[name] for name in ("asked", "steps")}
    atomic.write_json(tmp_path / "l" / "ladder.json", older)
    with heard() as said:
        Ladder(replace(plan, threads=2, seeds=2), HERE).plan_steps(nothing)
    assert not said and "threads" not in json.loads((tmp_path / "l" / "ladder.json").read_text(encoding="utf-8"))


def test_the_plan_is_read_by_who_holds_the_folder(text: Path, tmp_path: Path) -> None:
    """Two calls begin at once: the second waits for nothing, but takes over what the first has planned meanwhile."""
    first, second = (Ladder(LadderPlan(select("8"), tmp_path / "l", (str(text),), minutes=m), HERE) for m in (0.001, 0.001))
    all_outcomes(first)
    second.plan_steps(nothing)
    assert second.steps == first.steps and second.outcome(LADDER[7], 1337)


def test_the_report_shows_what_earlier_calls_made(bardlet: Callable[..., dict[str, Any]], text: Path,
                                                  tmp_path: Path) -> None:
    """Fewer rungs in the same folder: only they are asked for and counted, and the page still shows all."""
    bardlet("ladder", text, "--rungs", "1,3", "--seeds", "2", "--out", tmp_path / "l")
    said = bardlet("ladder", text, "--rungs", "4", "--out", tmp_path / "l")
    assert [line["rung"] for line in said["rungs"]] == [4]
    page = Path(said["report"]).read_text(encoding="utf-8")
    assert all(LADDER[number - 1].title in page for number in (1, 3, 4)) and LADDER[1].title not in page
    ladder = Ladder(LadderPlan(select("4"), tmp_path / "l", (str(text),)), HERE)
    assert [(o.rung.number, o.seed - 1337) for o in ladder.finished()] == [(1, 0), (1, 1), (3, 0), (3, 1), (4, 0)]


def test_other_questions_need_another_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", str(text), "--rungs", "1", "--out", str(tmp_path / "l")]) == 0
    capsys.readouterr()
    assert main(["ladder", str(text), "--rungs", "1", "--tokenizer", "byte", "--out", str(tmp_path / "l")]) == 1
    assert "begun with another tokenizer (char, now byte); name another --out" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary", encoding="utf-8")
    assert main(["ladder", str(text), "--rungs", "1", "--out", str(tmp_path / "mine")]) == 1
    assert "is not empty and holds no ladder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["diary.txt"], "nothing is lost or left"


def test_a_text_too_short_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("hello world", encoding="utf-8")
    assert main(["ladder", str(tmp_path / "short.txt"), "--rungs", "1,8", "--out", str(tmp_path / "l")]) == 1
    said = capsys.readouterr().err
    assert "short: 9 tokens to train on and 2 to validate are too few for the windows of 8 of rung 1, bigram" in said
    assert said.count("\n") == 1 and not (tmp_path / "l").exists()


def test_ctrl_c_keeps_the_rungs_before(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = LadderPlan(select("1,3"), tmp_path / "l", (str(text),))
    ladder = Ladder(plan, HERE)

    def interrupt(rung: Any, seed: int, line: dict[str, Any]) -> None:
        if rung.name == "one-head" and line["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    ladder.plan_steps(nothing)
    with pytest.raises(BardletError, match="stopped in rung 3, one-head; the rungs before it are kept") as stopped:
        list(ladder.climb(interrupt))
    assert stopped.value.exit_code == 130  # type: ignore[attr-defined]
    assert [path.parent.parent.name for path in (tmp_path / "l").glob("*/*/outcome.json")] == ["01-bigram"]
    assert len(all_outcomes(Ladder(plan, HERE))) == 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", ["last step", "measurement"])
def test_a_signal_at_the_end_of_a_rung_stops_the_ladder(when: str, number: int, code: int, text: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """The rung is finished by then, and kept; the next does not begin."""
    ladder = Ladder(LadderPlan(select("1,3,4"), tmp_path / "l", (str(text),)), HERE)
    steps: list[str] = []

    def watch(rung: Any, seed: int, line: dict[str, Any]) -> None:
        steps.append(rung.name)
        if when == "last step" and rung.name == "one-head" and line["step"] == line["steps"]:
            signal.raise_signal(number)

    def measure(self: Ladder, t: Any, rung: Any, seed: int, real: Any = Ladder._measure) -> Any:
        if when == "measurement" and rung.name == "one-head":
            signal.raise_signal(number)
        return real(self, t, rung, seed)

    monkeypatch.setattr(Ladder, "_measure", measure)
    before = signal.getsignal(number)
    ladder.plan_steps(nothing)
    done = []
    with pytest.raises(BardletError, match="stopped after rung 3, one-head; the rungs so far are kept: the same "
                                           "command goes on") as stopped:
        for outcome in ladder.climb(watch):
            done.append(outcome.rung.name)
    assert stopped.value.exit_code == code  # type: ignore[attr-defined]
    assert done == ["bigram", "one-head"] and set(steps) == set(done)
    assert signal.getsignal(number) == before
    assert ladder.outcome(LADDER[2], 1337)


def test_signals_act_at_once_while_a_rung_is_compiled(text: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes a minute, and there is nothing to save."""
    ladder = Ladder(LadderPlan(select("8"), tmp_path / "l", (str(text),), minutes=0.001), HERE)
    ladder.plan_steps(nothing)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def compiling(t: Any, seconds: float | None) -> None:
        assert {number: signal.getsignal(number) for number in handlers} == handlers
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.compilation, "choose_compile", compiling)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        handlers[signal.SIGINT] = signal.default_int_handler
        with pytest.raises(BardletError, match="stopped in rung 8, dropout; the rungs before it are kept") as stopped:
            list(ladder.climb(nothing))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.exit_code == 130  # type: ignore[attr-defined]


def test_the_report_s_facts_are_those_of_the_trainings() -> None:
    def made(**other: Any) -> dict[str, Any]:
        return {"date": "2026-01-02", "bardlet": "1", "torch": "2", "threads": 1, "processor": "x", **other}

    assert report.summary([made(), made(threads=4), made(date="2026-01-01", torch="3", processor="y")]) == {
        "machine": "x, 1 or 4 threads; y, 1 thread", "date": "2026-01-01 to 2026-01-02",
        "versions": "bardlet 1, torch 2; bardlet 1, torch 3"}
    assert report.summary([made()])["date"] == "2026-01-02"


@pytest.mark.parametrize(("words", "says"), [
    ("--rungs 0-3", "there is no rung 0; take 1-3"), ("--rungs 0-20", "take 1-13"), ("--rungs 0", "from 1 to 13"),
    ("--step 5", "did you mean --minutes"), ("--steps=5", "did you mean --minutes"),
])  # fmt: skip
def test_near_misses_are_answered(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", *words.split()]) == 1
    assert says in capsys.readouterr().err


def test_seeds_of_a_scaled_rung_make_the_same_steps(text: Path, tmp_path: Path) -> None:
    ladder = Ladder(LadderPlan(select("8,11"), tmp_path / "l", (str(text),), seeds=2, minutes=0.001), HERE)
    outcomes = all_outcomes(ladder)
    planned = json.loads((tmp_path / "l" / "ladder.json").read_text(encoding="utf-8"))["steps"]
    assert [o.steps for o in outcomes] == [planned["dropout"], planned["qk-norm"]] * 2
    lines = metrics.read_metrics(outcomes[0].folder)
    assert lines[-1]["step"] == outcomes[0].steps


def test_what_a_climb_prints_when_piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line at most every ten seconds: rung, step, both losses, how much of the whole ladder, and when it will end."""
    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    line = {"step": 1, "steps": 100, "train_loss": 4.0, "val_loss": None}
    with console.ladder_progress({"a": 10.0, "b": 30.0}) as watch:
        watch("1 bigram", "a", line)
        assert capsys.readouterr().out == ("rung 1 bigram: step     1/100  train 4.0000  val -  whole ladder   0%\n")
        now += 5
        watch("1 bigram", "a", {**line, "step": 50})
        assert capsys.readouterr().out == "", "too soon after the last"
        now += 6
        watch("1 bigram", "a", {**line, "step": 100, "val_loss": 2.5})
        # a quarter of what is expected took 11 seconds, so the rest takes 33
        assert capsys.readouterr().out == (
            "rung 1 bigram: step   100/100  train 4.0000  val 2.5000  whole ladder  25%  ETA 0:33\n")
        now += 22
        watch("3 one-head", "b", {**line, "step": 50, "train_loss": 3.0, "val_loss": 3.5})
        assert capsys.readouterr().out == (  # the smoothed training loss begins anew
            "rung 3 one-head: step    50/100  train 3.0000  val 3.5000  whole ladder  62%  ETA 0:19\n")


def test_bands_hold_their_means() -> None:
    assert list(bands()) == [rung.name for rung in LADDER[:7]], "the lecture's rungs have bands, the others none"
    for name, band in bands().items():
        assert band["low"] < band["mean"] < band["high"] and band["seeds"] >= 5, name
        assert band["high"] - band["mean"] == pytest.approx(3 * band["deviation"])


def test_explain_needs_no_text(bardlet: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    said = bardlet("ladder", "--explain", "--out", tmp_path / "p")
    assert said["experiments"]["variance"] and list((tmp_path / "p").glob("*-dark.png"))
