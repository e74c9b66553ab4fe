"""Rows shared by forked processes: the same values, the same errors, and nobody left."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bardlet import models
from bardlet.config import TrainConfig
from bardlet.errors import BardletError
from bardlet.generate import generate, stream
from bardlet.processes import together

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def no_child() -> bool:
    """This process has none, running or to be waited for."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def count(n: int) -> Iterator[list[int | None]]:
    yield from ([i, None, torch.get_num_threads()] for i in range(n))


def test_parts_go_step_by_step_until_the_last_has_ended() -> None:
    torch.set_num_threads(2)
    assert list(together([lambda: count(1), lambda: count(3), lambda: count(0)])) == [
        ([0, None, 1], [0, None, 1], None), (None, [1, None, 1], None), (None, [2, None, 1], None)]
    assert torch.get_num_threads() == 2 and no_child()


def fails(error: Exception | int) -> Iterator[int]:
    yield 1
    if isinstance(error, int):
        os.kill(os.getpid(), error)
    else:
        raise error


@pytest.mark.parametrize(("how", "kind", "said"), [
    (BardletError("the disk is full"), BardletError, "^the disk is full$"),
    (ZeroDivisionError("a bug"), RuntimeError, r"(?s)share of the rows.*in fails\n.*ZeroDivisionError: a bug"),
    (MemoryError(), RuntimeError, "MemoryError"),
    (signal.SIGKILL, BardletError, "ended without a word"),
])
def test_what_went_wrong_in_a_child_is_said_here(how: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        list(together([lambda: count(100_000), lambda: fails(how)]))
    assert no_child()


def test_an_iterator_that_is_closed_leaves_nobody() -> None:
    """Nor a child that waits for its pipe to have room."""
    steps = together([lambda: count(1_000_000), lambda: count(1_000_000)])
    assert next(steps) == ([0, None, 1], [0, None, 1])
    steps.close()  # type: ignore[attr-defined]
    assert no_child()


def test_a_child_neither_flushes_what_was_printed_nor_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    print("once", end="")  # stays in the buffer
    assert len(list(together([lambda: count(2), lambda: count(2)]))) == 2
    sys.stdout.flush()
    assert capfd.readouterr().out.count("once") == 1


@pytest.mark.parametrize("model", ["qwen3", "gpt2", "layer-norm"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_is_what_one_process_makes(model: str, temperature: float) -> None:
    """Prompts of several lengths, beyond the context, with rows that end early: row for row the same ids."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
    net = models.build(TrainConfig(model=model, **shape).model_config(50))  # type: ignore[arg-type]
    prompts = [list(range(1, 2 + i % 5)) for i in range(7)]
    how: dict[str, Any] = {"temperature": temperature, "seed": 3, "stop_ids": [7, 8]}
    one = generate(net, prompts, 40, **how)
    assert len({*map(len, one)}) > 1 or temperature == 0
    for processes in (2, 3, 9):
        steps: list[list[int | None]] = []
        assert generate(net, prompts, 40, processes=processes, on_token=steps.append, **how) == one
        assert [[ids[row] for ids in steps if ids[row] is not None] for row in range(7)] == one
    assert no_child() and net.training


def test_a_model_of_nan_is_refused_in_a_child_as_here() -> None:
    shape = TrainConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, tie_embeddings=False)
    net = models.build(shape.model_config(50))
    with torch.no_grad():
        net.model.embed_tokens.weight[9] = float("nan")  # which the second process reads alone
    assert len(generate(net, [[1]], 5, temperature=0.0)[0]) == 5
    with pytest.raises(BardletError, match="not finite"):
        list(stream(net, [[1], [9]], 5, temperature=0.0, processes=2))
    assert no_child()
