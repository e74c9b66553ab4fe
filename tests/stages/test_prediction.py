"""Is my loss normal? The verdict on a loss, and what it says to change first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from bardlet.cli import main
from bardlet.run.record import TextRecord
from bardlet.stages import prediction

COUNTING = [1.6, 1.9, 9e5, 0.0, 0.1]


def record(**values: Any) -> TextRecord:
    return TextRecord(**{"bigram": 2.4, "counting": COUNTING, "minutes": 5.0, "expected": 1.4, "nats_per_char": 1.4,
                         "characters": 5e6, "characters_per_token": 1.0, "tokens": 900_000, "steps": 1000,
                         "most_steps": 5000, **values})


def verdict(loss: float, finished: bool = True, **values: Any) -> tuple[str, str]:
    finding = prediction.judge(record(**values), loss, finished)
    return finding.verdict, finding.message


def test_a_good_loss_is_ok() -> None:
    kind, said = verdict(1.25, expected=1.25)
    assert kind == "ok" and "phrases" in said and "below the 2.40 of counting character pairs" in said
    assert "below the 1.60 of counting longer pieces" in said and "as predicted" in said


@pytest.mark.parametrize(("loss", "values", "remedy"), [
    (1.5, {}, "first train longer: --minutes 30 would give about "),
    (1.9, {}, "above predicted"),
    (1.9, {}, "first look at the warnings"),
    (1.9, {"expected": None}, "first train longer, with --minutes 30"),
    (1.9, {"untold": ["lr", "n_layer"]}, "first leave --lr, --n-layer to bardlet"),
    (1.5, {"most_steps": 1000}, "first give it more text: 900,000 characters are few"),
    (3.0, {"expected": None}, "reads like: letters, hardly words; it is above the 2.40 of counting character pairs")])
def test_gibberish_is_never_ok(loss: float, values: dict[str, Any], remedy: str) -> None:
    kind, said = verdict(loss, **values)
    assert kind == "warning" and remedy in said


def test_an_unfinished_run_is_not_compared_with_the_prediction() -> None:
    kind, said = verdict(1.9, finished=False)
    assert kind == "warning" and "predicted" not in said and said.endswith("the run is not finished: let it go on")


def test_a_text_that_repeats_itself() -> None:
    kind, said = verdict(0.2, expected=None)
    assert kind == "warning" and "says little" in said


def test_a_text_without_statistics_is_never_ok() -> None:
    kind, said = verdict(1.5, bigram=None)
    assert kind == "warning" and "cannot say if that is normal" in said


@pytest.mark.parametrize(("loss", "kind"), [(3.9, "ok"), (5.0, "warning"), (5.6, "warning")])
def test_a_script_without_an_alphabet(loss: float, kind: str) -> None:
    found, said = verdict(loss, bigram=5.5, counting=None, expected=None)
    assert found == kind and "reads like" not in said


def test_doctor_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("".join(f"Bard {n * n % 97} sang of {n * n * n % 89} kings. " for n in range(900)))
    assert main(["train", str(tmp_path / "a.txt"), *TINY, "--steps", "10", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["doctor", str(tmp_path / "run"), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    [quality] = [finding for finding in findings if finding["about"] == "quality"]
    assert quality["verdict"] == "warning" and "letters, hardly words" in quality["said"]
    assert "first train longer, with --minutes 3" in quality["said"]


@pytest.mark.parametrize(("loss", "kind", "words"), [(2.49, "ok", "other seeds"), (2.7, "warning", "higher"),
                                                     (1.0, "warning", "see the future")])
def test_a_rung_is_compared_with_other_seeds(loss: float, kind: str, words: str) -> None:
    from bardlet import doctor

    values = {"text": "tinyshakespeare", "rung": "bigram", "characters_per_token": 1.0, "nats_per_char": loss,
              "finished": True}
    _, finding = doctor._quality([{"step": 1, "val_loss": loss}], values)
    assert (finding.about, finding.verdict) == ("rung", kind) and words in finding.message
    assert len(list(doctor._quality([{"step": 1, "val_loss": loss}], {**values, "text": "mine"}))) == 1
