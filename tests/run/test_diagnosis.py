"""What the losses and the text of a run say in plain words; each case beside one that is close to it and is fine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY

from bardlet.cli import main
from bardlet.config.pretraining import TrainConfig
from bardlet.run import diagnosis

CONFIG = TrainConfig(warmup_steps=50)
RECORD = {"bigram": 2.5, "characters_per_token": 1.0}


def lines(train: list[float], val: list[float] = []) -> list[dict[str, Any]]:  # noqa: B006
    """A line of training loss for each 10 steps, and evaluations evenly among them."""
    made: list[dict[str, Any]] = [{"step": 10 * n, "train_loss": loss} for n, loss in enumerate(train, 1)]
    every = 10 * len(train) // len(val) if val else 0
    return made + [{"step": every * n, "val_loss": loss} for n, loss in enumerate(val, 1)]


def said(*args: Any, config: TrainConfig = CONFIG, steps: int = 1000, record: dict[str, float] = RECORD) -> str:
    return " | ".join(found.message for found in diagnosis.of_losses(lines(*args), config, steps, record))


FALLING = list(np.linspace(4, 1.5, 40))


def test_a_good_run_is_left_alone() -> None:
    assert said(FALLING, list(np.linspace(3, 1.6, 10))) == ""
    assert said([4.0], [4.0]) == ""
    assert said([]) == ""


def test_overfitting() -> None:
    """Since its best evaluation, with the weights that are kept; not where training is worse, too, or it is early."""
    val = [2.5, 2.0, 1.8, 1.9, 2.0, 2.1, 2.2, 2.3]
    assert "overfitting since step 150: the validation loss was 1.800 there and is 2.300 now" in said(FALLING, val)
    assert "the weights of step 150 are kept" in said(FALLING, val)
    assert "--keep best would keep" in said(FALLING, val, config=TrainConfig(keep="last"))
    assert said(FALLING, val[:5]) == "", "two evaluations since"
    assert said(FALLING, [2.5, 2.0, 1.8, 1.805, 1.81, 1.805]) == "", "noise"
    assert "overfitting" not in said([*FALLING[:20], *[3.15] * 20], val)


def test_a_learning_rate_that_is_too_high() -> None:
    """The loss rises, or stands still above what counting pairs comes to; below that it may stand."""
    assert "too high: the training loss was 2.11 at step 190" in said([*np.linspace(4, 2, 20), 2.5, 2.6, 2.5, 2.6, 2.7])
    assert "too high: the training loss stands still at 3.00 since step 50" in said([4, 3.8, 3.5, 3.2, *[3.0] * 15])
    assert said([4, 3.8, 3.5, 3.2, *[2.4] * 15]) == ""
    guessing = {**RECORD, "guessing": 4.2}
    assert "too high: the training loss was 620.00 at step 20, and guessing costs 4.20" in said([142, 620, 4.2],
                                                                                                record=guessing)
    assert said([5.1, 4.0], record=guessing) == said([9.9, 4.0], record=guessing, config=TrainConfig(init="x")) == ""
    assert said([0.5, 0.3, 0.18, 0.18, 0.18, 0.23, 0.23, 0.23]) == "", "noise at the bottom"
    assert said([4, 3.8, 3.5, 3.2, *[3.0] * 5]) == "", "only just after the warm-up"
    low = TrainConfig(lr=1e-6, warmup_steps=50)
    assert "too low: the training loss stands still at 4.17" in said([4.17] * 20, config=low)
    assert said([*np.linspace(4, 2, 20), 2.5, 2.1, 2.0]) == "", "one bad batch"


def test_worse_than_counting_pairs() -> None:
    """At the end, or after many steps, by the best evaluation; per token, whatever a token is."""
    assert "2.60 nats per token, and counting pairs of characters comes to 2.50" in said([4.0], [2.6], steps=10)
    assert said([4.0], [2.6], steps=1000) == ""
    assert said([4.0], [2.6], steps=10, record={"bigram": 2.5, "characters_per_token": 3.0}) == ""
    assert said([4.0], [2.6], steps=10, record={}) == ""
    assert said([4.0] * 5, [2.6], steps=100) == "", "half of the steps"
    assert said([4.0], [2.6], steps=10, config=TrainConfig(model="bigram")) == ""


def test_a_rate_that_was_too_high_is_not_forgotten() -> None:
    """The losses fall in the end, when the rate does; what else was said on the way is settled by then."""
    train = [4, 3.8, 3.5, 3.2, *[3.0] * 15, *np.linspace(2.9, 1.6, 20)]
    found = diagnosis.of_run(lines(train, [3.0, 2.9, 2.0, 1.7]), CONFIG, 10 * len(train), RECORD)
    assert [one.about for one in found] == ["learning rate"] and "stands still at" in found[0].message
    assert diagnosis.of_run(lines(FALLING, [3.0, 2.0]), CONFIG, 400, RECORD) == []


@pytest.mark.parametrize(("record", "words"), [
    ({"duplicated": 0.6, "leaked": 0.0}, "most of the text is duplicated: 60%"),
    ({"duplicated": 0.4, "leaked": 0.2}, "validation text occurs in training: 20%"),
    ({"duplicated": 0.4, "leaked": 0.01}, ""), ({}, "")])
def test_of_the_text(record: dict[str, float], words: str) -> None:
    found = " | ".join(one.message for one in diagnosis.of_text(record))
    assert words in found and bool(found) == bool(words)


def test_a_run_says_it_while_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text that is there three times; a model that has two steps: each is said once, as a note."""
    path = tmp_path / "thrice.txt"
    path.write_text("".join(f"{n} little bards sang {n * n % 97} songs\n" for n in range(80)) * 3)
    assert main(["train", str(path), "--out", str(tmp_path / "run"), *TINY, "--steps", "2"]) == 0
    err = capsys.readouterr().err
    for words in ("note: most of the text is duplicated", "note: validation text occurs in training: 100%",
                  "note: the loss after step 2 is higher than a bigram's"):
        assert err.count(words) == 1, err
