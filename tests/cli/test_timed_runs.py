"""Runs with --minutes: plans, steps, what they promise and record. The clock is simulated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from clocks import Clock
from conftest import TINY
from processes import power_cut

from bardlet import console
from bardlet.cli import main
from bardlet.run import metrics


def test_minutes_end_on_a_planned_step(text: Path, tmp_path: Path, clock: Clock,
                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """A timed run makes exactly the steps of its last plan, and records the decisions of the clock."""
    from bardlet.run.folder import read_run

    started = clock.now
    result = bardlet("train", text, "--out", tmp_path / "run", *TINY, "--minutes", "0.02")
    config, record = read_run(tmp_path / "run")
    assert record["minutes"] == 0.02 and config.minutes is None
    assert config.replans[0] == (0, config.steps) and config.replans[-1][1] == result["steps"]
    assert 0.9 * 1.2 < clock.now - started <= 1.2, "seconds"


def test_a_machine_that_slows_down_makes_fewer_steps(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     clock: Clock, bardlet: Callable[..., dict[str, Any]]) -> None:
    """The first plan assumes a quarter of the time per step; the clock corrects it during training."""
    from bardlet.planning import clock as planning
    from bardlet.run.folder import read_run
    from bardlet.training import trainer

    warnings: list[str] = []
    timed, started = planning.seconds_per_step, clock.now
    monkeypatch.setattr(trainer.log, "warning",
                        lambda text, *values: warnings.append(text % values if values else text))
    monkeypatch.setattr(planning, "seconds_per_step", lambda *args, **kwargs: timed(*args, **kwargs) / 4)
    result = bardlet("train", text, "--out", tmp_path / "run", *TINY, "--minutes", "0.05", "--eval-tokens", "500")
    config, _ = read_run(tmp_path / "run")
    assert len(config.replans) > 1 and result["steps"] < 0.6 * config.replans[0][1]
    assert f"steps take longer than planned; training for {config.replans[1][1]} steps instead of {config.steps}" in (
        "\n".join(warnings))
    assert clock.now - started <= 3.3, "the first tenth of a plan four times too long costs little"


def test_a_timed_run_that_restarts_has_its_whole_budget(text: Path, tmp_path: Path, clock: Clock,
                                                        bardlet: Callable[..., dict[str, Any]]) -> None:
    """A run that was killed before its first checkpoint restarts with all its minutes."""
    from bardlet.run.folder import read_run

    run = tmp_path / "run"
    power_cut(["train", text, "--out", run, *TINY, "--minutes", "0.02", "--save-every", "0"], step=4, own_clock=True)
    planned, record = read_run(run)
    assert record["minutes"] == 0.02 and planned.replans == ((0, planned.steps),)
    started = clock.now
    result = bardlet("resume", run)
    config, record = read_run(run)
    assert record["minutes"] == 0.02 and config.replans[-1][1] == result["steps"]
    assert 0.9 * 1.2 < clock.now - started <= 1.2


def test_weight_decay_follows_the_timed_steps(text: Path, tmp_path: Path, clock: Clock,
                                              bardlet: Callable[..., dict[str, Any]]) -> None:
    """The calibration took the machine for a thousand times slower; the text would have been read once in part."""
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


def test_a_plan_without_a_prediction_says_why_in_one_sentence(text: Path, clock: Clock,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(text), "--minutes", "1", "--n-layer", "1", "--plan"]) == 0
    assert "\nno prediction: there is one only when bardlet chooses --n-layer\n" in capsys.readouterr().out


def test_plan_with_minutes(text: Path, bardlet: Callable[..., dict[str, Any]], clock: Clock, tmp_path: Path,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    """More minutes give more steps and a lower predicted loss; the user's settings are kept; nothing is written."""
    from bardlet.runtime import cache, compiler

    monkeypatch.chdir(tmp_path)
    short = bardlet("train", text, "--minutes", "12", "--plan")
    longer = bardlet("train", text, "--minutes", "13", "--plan")
    assert short["steps"] < longer["steps"] and longer["expected"] < short["expected"] < 4
    assert any("weights" in reason for reason in short["reasons"]) and any("dropout" in r for r in short["reasons"])
    monkeypatch.setattr(compiler, "compiler_missing", lambda device: None)
    assert [bardlet("train", text, "--minutes", m, "--plan")["compiled"] for m in ("0.5", "60")] == [False, True]
    with monkeypatch.context() as patch:  # a model that was compiled before starts sooner
        read = cache.read
        patch.setattr(cache, "read", lambda folder, key: {} if folder.name == "models" else read(folder, key))
        warm = [bardlet("train", text, "--minutes", m, "--plan") for m in ("0.1", "1")]
    assert [plan["compiled"] for plan in warm] == [False, True]
    mine = bardlet("train", text, "--minutes", "1", "--plan", "--n-embd", "32", "--n-layer", "1", "--block-size", "16",
                   "--batch-size", "5")
    assert mine["tokens_per_step"] == 80 and mine["parameters"] < 20_000
    assert mine["expected"] is None, "the scaling law covers the plan's own choices only"
    assert ("1 layer of 32 channels: --n-layer, --n-embd are set, so bardlet did not choose the shape for the time"
            in mine["reasons"])
    assert bardlet("train", text, "--minutes", "12", "--plan", "--tokenizer", "auto") == short
    (tmp_path / "mine.toml").write_text("n_embd = 32\nn_layer = 1\nblock_size = 16\nbatch_size = 5\n")
    filed = bardlet("train", text, "--config", "mine.toml", "--minutes", "1", "--plan")
    assert (filed["tokens_per_step"], filed["parameters"]) == (80, mine["parameters"])
    assert not (tmp_path / "runs").exists()


def test_a_short_text_ends_early_with_an_estimate(text: Path, tmp_path: Path, clock: Clock,
                                                  capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """From the machine's speed with --plan, else from timed steps. The run itself is left out."""
    monkeypatch.setattr("bardlet.runner.run_to_end", lambda trainer, *_, **__: {"steps": trainer.state.steps})
    words = ["train", str(text), "--minutes", "60", "--compile", "off"]
    assert main([*words, "--plan"]) == 0
    assert re.search(r", ends in about [\d.]+ (s|minutes?) instead of 60 minutes: more steps", capsys.readouterr().out)
    clock.per_step = 0.5
    assert main([*words, "--out", str(tmp_path / "run"), "--json"]) == 0
    out = capsys.readouterr().out
    minutes = json.loads(out.splitlines()[-1])["steps"] * clock.per_step / 60
    told = re.search(r", ends in about ([\d.]+) minutes? instead of 60 minutes: more steps", out)
    assert told and abs(float(told[1]) - minutes) < 1, out


@pytest.mark.parametrize(("seconds", "words"), [
    (0.2, "1 s"), (7.4, "7 s"), (41, "40 s"), (94, "90 s"), (97, "1.5 minutes"), (118, "2 minutes"),
    (290, "5 minutes"), (3600, "60 minutes")])
def test_rough_durations(seconds: float, words: str) -> None:
    assert console.duration(seconds) == f"about {words}"


def test_the_predicted_loss_is_recorded(text: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch,
                                        bardlet: Callable[..., dict[str, Any]]) -> None:
    """In --json and run.toml, in nats per character; a run with --steps has no prediction."""
    from bardlet.planning import scaling_law
    from bardlet.run.folder import read_run

    monkeypatch.setattr(scaling_law, "MIN_STEPS", 50)  # for a short run
    clock.per_step = 0.05
    result = bardlet("train", text, "--out", tmp_path / "run", "--minutes", "0.08", "--compile", "off")
    _, record = read_run(tmp_path / "run")
    assert result["expected"] == record["expected"] > 0
    assert result["nats_per_char"] == pytest.approx(result["val_loss"], rel=0.01), "a token is a character"
    assert len(record["counting"]) == 5 and record["reasons"]
    untimed = bardlet("train", text, "--out", tmp_path / "steps", *TINY, "--steps", "2")
    assert untimed["expected"] is None


def test_repeating_a_timed_run_needs_no_clock(text: Path, tmp_path: Path, clock: Clock,
                                              bardlet: Callable[..., dict[str, Any]]) -> None:
    """run.toml holds the decisions of the clock: the same steps, the same weights."""
    from bardlet.runtime.manifest import sha256

    timed = bardlet("train", text, "--out", tmp_path / "timed", *TINY, "--minutes", "0.015", "--keep", "last")
    again = bardlet("train", "--config", tmp_path / "timed" / "run.toml", "--out", tmp_path / "again")
    assert again["steps"] == timed["steps"]
    assert sha256(tmp_path / "again" / "model.safetensors") == sha256(tmp_path / "timed" / "model.safetensors")


@pytest.mark.parametrize("length", [["--steps", "6"], ["--minutes", "0.015"]], ids=["steps", "minutes"])
def test_a_finished_run_can_train_longer(length: list[str], text: Path, tmp_path: Path, clock: Clock,
                                         bardlet: Callable[..., dict[str, Any]]) -> None:
    """resume --steps N --allow-change trains to exactly N steps, and run.toml repeats that history, too."""
    from bardlet.runtime.manifest import sha256

    first = bardlet("train", text, "--out", tmp_path / "one", *TINY, *length, "--keep", "last", "--eval-every", "0")
    more = bardlet("resume", tmp_path / "one", "--steps", str(first["steps"] + 9), "--allow-change")
    assert (more["resumed_from"], more["steps"]) == (first["steps"], first["steps"] + 9)
    again = bardlet("train", "--config", tmp_path / "one" / "run.toml", "--out", tmp_path / "two")
    assert again["steps"] == more["steps"]
    assert sha256(tmp_path / "two" / "model.safetensors") == sha256(tmp_path / "one" / "model.safetensors")


def test_evaluation_takes_no_longer_than_training(tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    """20 evaluations per run, but only the last one if each reads more tokens than all steps together."""
    (tmp_path / "long.txt").write_text("never ending story, " * 2_000)
    for tokens, evaluations in ((100, 20), (640, 5), (0, 1)):
        out = tmp_path / str(tokens)
        bardlet("train", tmp_path / "long.txt", *TINY, "--steps", "20", "--eval-tokens", str(tokens), "--out", out)
        assert sum("val_loss" in line for line in metrics.read_metrics(out)) == evaluations


def test_progress_shows_no_speed_after_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it, three steps of 64 tokens take 0.25 s each, and 6 s in all have passed: the last two need 4 s."""
    now = 100.0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))
    text = console.StepText("tokens")
    line = {"train_loss": 1.0, "val_loss": None, "steps": 6}
    assert text({**line, "step": 1, "tokens": 64, "seconds": 7.0}) == "step     1/6  train 1.0000"
    now += 6
    assert text({**line, "step": 4, "tokens": 256, "seconds": 7.75}).endswith("    256 tokens/s  ETA 0:04")


def test_a_timed_run_promises_no_number_of_steps_and_no_more_time_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 2 s per step, the last 90 steps would need 3 minutes, but 61 s are left: the clock will plan fewer steps."""
    now = 100.0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))
    text = console.StepText("tokens", 90.0)
    line = {"train_loss": 1.0, "val_loss": None, "tokens": 64, "seconds": 7.0, "steps": 100}
    assert text({**line, "step": 1, "elapsed": 11.0}) == "step     1  train 1.0000", "no steady plan yet"
    now += 18
    tenth = text({**line, "step": 10, "elapsed": 29.0})
    assert tenth.startswith("step    10 of about 100  train") and tenth.endswith("ETA 1:01")
    assert text({**line, "step": 11, "elapsed": 91.0}).endswith("tokens/s  ends soon"), "the time is over"
    now += 22
    assert text({**line, "step": 20, "steps": 21, "elapsed": 51.0}).endswith("ETA 0:02")
    assert text({**line, "step": 21, "steps": 21, "elapsed": 53.0}).startswith("step    21 of 21  train")
