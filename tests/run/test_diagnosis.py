"""Findings from the losses and the text of a run; each case next to a similar one without a finding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY

from bardlet import runner
from bardlet.cli import main
from bardlet.config.finetuning import SFTConfig
from bardlet.config.pretraining import TrainConfig
from bardlet.run import diagnosis, metrics

CONFIG = TrainConfig(warmup_steps=50)
RECORD = {"bigram": 2.5, "characters_per_token": 1.0}


def lines(train: list[float], val: list[float] = []) -> list[dict[str, Any]]:  # noqa: B006
    """Return a line of training loss for every 10 steps, and evenly spaced evaluations."""
    training: list[dict[str, Any]] = [{"step": 10 * n, "train_loss": loss} for n, loss in enumerate(train, 1)]
    every = 10 * len(train) // len(val) if val else 0
    return training + [{"step": every * n, "val_loss": loss} for n, loss in enumerate(val, 1)]


def messages(*args: Any, config: TrainConfig = CONFIG, steps: int = 1000, record: dict[str, float] = RECORD) -> str:
    return " | ".join(finding.message for finding in diagnosis.of_losses(lines(*args), config, steps, record))


FALLING = list(np.linspace(4, 1.5, 40))


def test_a_good_run_has_no_findings() -> None:
    assert messages(FALLING, list(np.linspace(3, 1.6, 10))) == ""
    assert messages([4.0], [4.0]) == ""
    assert messages([]) == ""


def test_overfitting() -> None:
    """Found from the best evaluation on; not if the training loss also rose, or too few evaluations followed."""
    val = [2.5, 2.0, 1.8, 1.9, 2.0, 2.1, 2.2, 2.3]
    assert "overfitting since step 150: the validation loss rose from 1.800 to 2.300" in messages(FALLING, val)
    assert "the weights of step 150 are kept" in messages(FALLING, val)
    assert "--minutes" not in messages(FALLING, val) and messages(FALLING, val).endswith("or a shorter run")
    assert "--keep best would keep" in messages(FALLING, val, config=TrainConfig(keep="last"))
    assert messages(FALLING, val[:5]) == "", "only two evaluations since"
    assert messages(FALLING, [2.5, 2.0, 1.8, 1.805, 1.81, 1.805]) == "", "noise"
    assert "overfitting" not in messages([*FALLING[:20], *[3.15] * 20], val)


def test_before_the_last_step_overfitting_needs_a_rise_that_will_not_vanish() -> None:
    """The decay of the learning rate lowers the loss by up to 8 %; at the end, nothing follows."""
    rises = {"small": [2.5, 1.8, 1.85, 1.9, 1.95], "ends": [2.5, 1.8, 2.1, 2.3, 2.2],
             "noisy": [2.5, 1.8, 2.2, 2.1, 2.3]}
    for name, val in rises.items():
        assert messages(FALLING, val) == "", name
        assert "overfitting since step 160" in messages(FALLING, val, steps=400), name
    assert "overfitting since step 160" in messages(FALLING, [2.5, 1.8, 2.0, 2.1, 2.2])


def test_a_refuted_warning_is_taken_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, when the validation loss is lower than ever. A later rise is a new warning."""
    val = [2.5, 1.8, 2.0, 2.1, 2.2, 1.9, 1.75, 1.7, 2.0, 2.1, 2.2]
    trainer: Any = SimpleNamespace(run=tmp_path, config=CONFIG, record=SimpleNamespace(mapping=dict),
                                   state=SimpleNamespace(step=0, steps=2000))
    reported: dict[str, int] = {}
    for number, loss in enumerate(val, 1):
        trainer.state.step = 100 * number
        metrics.append_metrics(tmp_path, {"step": 100 * number, "train_loss": 4.0 - number / 10})
        metrics.append_metrics(tmp_path, {"step": 100 * number, "val_loss": loss})
        runner._diagnose(trainer, SimpleNamespace(loss_is_telling=True), reported)  # type: ignore[arg-type]
    told = [record.getMessage()[:55] for record in caplog.records]
    assert told == ["overfitting since step 200: the validation loss rose fr",
                    "no overfitting after all: the validation loss fell agai",
                    "overfitting since step 800: the validation loss rose fr"]


def test_a_learning_rate_that_is_too_high() -> None:
    """The training loss rises, or is stuck above the bigram's loss; below that, a plateau is fine."""
    rising, stuck = [*np.linspace(4, 2, 20), 2.5, 2.6, 2.5, 2.6, 2.7], [4, 3.8, 3.5, 3.2, *[3.0] * 15]
    assert "too high: the training loss rose from 2.11 at step 190 to 2.60" in messages(rising)
    assert "too high: the training loss has been stuck at 3.00 since step 50" in messages(stuck)
    assert messages([4, 3.8, 3.5, 3.2, *[2.4] * 15]) == ""
    guessing = {**RECORD, "guessing": 4.2}
    assert "too high: the training loss was 620.00 at step 20, and uniform guessing gives 4.20" in messages(
        [142, 620, 4.2], record=guessing)
    assert messages([5.1, 4.0], record=guessing) == ""
    assert messages([9.9, 4.0], record=guessing, config=TrainConfig(init="x")) == ""
    assert messages([0.5, 0.3, 0.18, 0.18, 0.18, 0.23, 0.23, 0.23]) == "", "noise at the bottom"
    assert messages([4, 3.8, 3.5, 3.2, *[3.0] * 5]) == "", "too soon after warmup"
    low = TrainConfig(lr=1e-6, warmup_steps=50)
    assert "too low: the training loss has been stuck at 4.17" in messages([4.17] * 20, config=low)
    assert messages([*np.linspace(4, 2, 20), 2.5, 2.1, 2.0]) == "", "one bad batch"


def test_worse_than_a_bigram() -> None:
    """Judged by the best evaluation, in nats per token, and only late in the run."""
    pairs = {"bigram": 2.5, "characters_per_token": 2.0}
    assert "5.20 nats per token, against 5.00" in messages([9.0], [5.2], steps=10, record=pairs)
    assert "2.60 nats per character, against 2.50 for counting character pairs" in messages([4.0], [2.6], steps=10)
    assert messages([4.0], [2.6], steps=1000) == ""
    assert messages([4.0], [2.6], steps=10, record={"bigram": 2.5, "characters_per_token": 3.0}) == ""
    assert messages([4.0], [2.6], steps=10, record={}) == ""
    assert messages([4.0] * 5, [2.6], steps=100) == "", "half of the steps are left"
    assert messages([4.0], [2.6], steps=10, config=TrainConfig(model="bigram")) == ""


def test_an_earlier_learning_rate_warning_is_kept() -> None:
    """The losses fall once the learning rate decays; other findings during training are dropped."""
    train = [4, 3.8, 3.5, 3.2, *[3.0] * 15, *np.linspace(2.9, 1.6, 20)]
    findings = diagnosis.of_run(lines(train, [3.0, 2.9, 2.0, 1.7]), CONFIG, 10 * len(train), RECORD)
    assert [finding.about for finding in findings] == ["learning rate"] and "stuck at" in findings[0].message
    assert diagnosis.of_run(lines(FALLING, [3.0, 2.0]), CONFIG, 400, RECORD) == []


@pytest.mark.parametrize(("record", "expected"), [
    ({"duplicated": 0.6, "leaked": 0.0}, "most of the text is duplicated: 60%"),
    ({"duplicated": 0.4, "leaked": 0.2}, "validation text occurs in training: 20%"),
    ({"duplicated": 0.6, "leaked": 0.2}, "60% of it repeats earlier text; validation text occurs in training: 20%"),
    ({"duplicated": 0.4, "leaked": 0.01}, ""), ({}, "")])
def test_findings_about_the_text(record: dict[str, float], expected: str) -> None:
    found = " | ".join(finding.message for finding in diagnosis.of_text(record))
    assert expected in found and bool(found) == bool(expected) == found.count("remove the copies")


def test_a_run_prints_each_finding_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text repeated three times, and a model after two steps."""
    path = tmp_path / "thrice.txt"
    path.write_text("".join(f"{n} little bards sang {n * n % 97} songs\n" for n in range(80)) * 3)
    assert main(["train", str(path), "--out", str(tmp_path / "run"), *TINY, "--steps", "2"]) == 0
    err = capsys.readouterr().err
    for note in ("note: most of the text is duplicated", "; validation text occurs in training: 100%",
                 "note: the loss after step 2 is higher than a bigram's"):
        assert err.count(note) == 1, err


def test_a_fine_tuned_model_that_has_memorized_its_conversations() -> None:
    """Far lower loss on them than on held-out ones, at the end of many epochs."""
    def message(last: float, held_out: float, batches: int, steps: int = 400) -> str:
        return messages([*FALLING[:-1], last], [held_out] * 8, config=SFTConfig(init="base"), steps=steps,
                        record={"batches": batches, "documents": 30})

    assert "memorized its 30 conversations in 100 epochs: the loss is 0.100 on them and 1.900" in message(0.1, 1.9, 4)
    assert message(0.7, 1.9, 4) == "" == message(0.1, 0.35, 4), "no more than usual"
    assert message(0.1, 1.9, 100) == "", "few epochs"
    assert message(0.1, 1.9, 4, steps=800) == "", "not finished"
