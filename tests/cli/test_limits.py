"""Absurd values: one line before anything slow, no hang, no traceback, no exhausted memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from bardlet.api.models import Model
from bardlet.cli import main
from bardlet.errors import BardletError

HUGE = str(10**12)


@pytest.mark.parametrize(("argv", "message"), [
    (["sample", "run", "--tokens", HUGE], f"--tokens {HUGE}: must be at most 1000000"),
    (["sample", "run", "--tokens", "0"], "--tokens 0: must be at least 1"),
    (["sample", "run", "--tokens", "-1"], "--tokens -1: must be at least 1"),
    (["sample", "run", "--num", HUGE], f"--num {HUGE}: must be at most 1000; run the command again for more"),
    (["chat", "run", "--tokens", HUGE], f"--tokens {HUGE}: must be at most 1000000"),
    (["chat", "run", "--tokens", "0"], "--tokens 0: must be at least 1"),
    (["doctor", "run", "--memorised", "--tokens", HUGE], f"--tokens {HUGE}: must be at most 1000000"),
    (["doctor", "run", "--memorised", "--tokens", "-1"], "--tokens -1: must be at least 1"),
    (["ladder", "--seeds", HUGE], f"--seeds {HUGE}: must be at most 1000"),
    (["grpo", "run", "x.jsonl", "--reward", "exact", "--answer-tokens", HUGE], f"--answer-tokens {HUGE}: must be at"),
    (["grpo", "run", "x.jsonl", "--reward", "exact", "--rollout", HUGE], f"--rollout {HUGE}: must be at most 1048576"),
    (["train", "--n-layer", "1000000"], "--n-layer 1000000: must be at most 1000"),
    (["train", "--model", "encdec", "--pair", "de-en", "--n-encoder-layer", HUGE], "must be at most 1000"),
    # a search among a billion divisors took a minute and gigabytes
    (["train", "--n-embd", "1000000000", "--n-head", "7"], "does not divide among --n-head 7 heads; use --n-head 8 or"),
    (["train", "--n-embd", "7", "--n-head", HUGE], f"--n-head {HUGE}: must be at most 1048576"),
    (["train", "--block-size", HUGE], f"--block-size {HUGE}: must be at most 16777216"),
])  # fmt: skip
def test_a_value_out_of_range_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(("options", "message"), [
    (["--block-size", "100000"], "too few for windows of 100000; use --block-size"),
    (["--n-embd", "100000"], "the model does not fit into memory"),
    (["--n-layer", "1", "--n-inner", HUGE], "the model does not fit into memory"),
    (["--n-embd", "16", "--batch-size", HUGE], "training does not fit into memory"),
])  # fmt: skip
def test_a_model_that_no_machine_holds_is_one_line(options: list[str], message: str, text: Path, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is built."""
    monkeypatch.setattr("bardlet.planning.memory.free_bytes", lambda device: 2**30)
    argv = ["train", str(text), *options, "--steps", "2", "--compile", "off", "--threads", "1"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tokens", [10**12, 0, -1])
def test_generation_in_python_has_the_same_limits(tokens: int) -> None:
    model = object.__new__(Model)  # the check needs no weights
    with pytest.raises(BardletError, match=f"{tokens}: must be at"):
        model.options(tokens, 0.8, 50, None, 0)
