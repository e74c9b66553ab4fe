"""--elastic: the same bits on any number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY
from processes import CAN_FORK, in_processes
from runtime.test_heartbeat import SETTINGS, outcome
from torch import Tensor

from bardlet import models
from bardlet.cli import main
from bardlet.config.pretraining import TrainConfig
from bardlet.runtime.distributed import Dist
from bardlet.training import losses, slices
from bardlet.training.state import Objective
from bardlet.training.step import InRun, train_step

CPU = torch.device("cpu")


def tree(vectors: list[Tensor]) -> Tensor:
    """Return the sum by the definition: of both halves."""
    half = len(vectors) // 2
    return tree(vectors[:half]) + tree(vectors[half:]) if half else vectors[0]


@pytest.mark.parametrize("number", [1, 2, 4, 8, 64])
def test_the_sum_is_a_binary_tree(number: int) -> None:
    """Bit for bit, with few vectors in memory; another order has other bits."""
    vectors = [torch.randn(1000) * 10.0**n for n in torch.randint(-3, 4, (number,)).tolist()]
    total = slices.TreeSum()
    for vector in vectors:
        total.add(vector.clone())
        assert len(total._sums) <= number.bit_length()
    assert torch.equal(total.root(), tree(vectors))
    assert number < 4 or not torch.equal(total.root(), torch.stack(vectors[::-1]).cumsum(0)[-1])


@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_slices_have_the_gradient_of_the_whole_batch(number: int) -> None:
    """In float64, with gradient accumulation, and for a parameter without a gradient."""
    torch.manual_seed(0)
    config = TrainConfig(model="gpt2", n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=8, grad_accum=2)
    config = config.resolved()
    model = models.build(config.model_config(11)).double()
    model.unused = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    tokens = torch.randint(11, (16, 9))
    batch = {"idx": tokens[:, :-1], "target": tokens[:, 1:].contiguous()}
    objective = Objective(lambda step: batch, losses.next_token_loss, losses.count_targets, lambda model: 0.0)
    gradients = {}
    for dist in (Dist(0, 1, CPU), Dist(0, 1, CPU, slices=number)):
        kept: list[Tensor] = []
        figures = train_step(model, [], batch, objective, config, dist, "fp32", InRun(lambda kept=kept: kept.extend(
            p.grad.clone() for p in model.parameters() if p is not model.unused)))  # fmt: skip
        gradients[dist.slices] = torch.tensor(figures), *kept
        for p in model.parameters():
            p.grad = None
    for got, want in zip(gradients[number], gradients[None], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6 if got.dtype == torch.float32 else 1e-12, atol=1e-12)


@pytest.mark.skipif(not CAN_FORK, reason="no forks on this system")
def test_two_processes_have_the_bits_of_one(text: Path, tmp_path: Path) -> None:
    """With dropout; and a run goes on, on another number of processes."""
    argv = ["train", text, *SETTINGS, "--elastic", "4", "--threads", "1"]
    in_processes(1, [*argv, "--out", tmp_path / "one"], tmp_path / "log")
    in_processes(2, [*argv, "--out", tmp_path / "two"], tmp_path / "log")
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    for step in (60, 40):
        for file in (tmp_path / "two" / "checkpoints" / f"step-{step:08}").iterdir():
            file.unlink()
    output = in_processes(4, ["resume", tmp_path / "two"], tmp_path / "again")
    assert "continuing after step 20" in output
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--elastic", "3"], "--elastic 3: must be a power of two"),
    (["--elastic", "8", "--batch-size", "12"], "--batch-size 12 does not divide among 8 processes or slices"),
])  # fmt: skip
def test_slices_that_do_not_fit_are_refused(arguments: list[str], message: str, text: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(text), *TINY, *arguments, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


def test_more_processes_than_slices_are_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", str(text), *TINY, "--batch-size", "4", "--elastic", "4", "--out", str(tmp_path / "run")])
    assert "--elastic 4: 3 processes cannot share 4 slices equally; start 1, 2, 4 ... or 4" in capsys.readouterr().err
