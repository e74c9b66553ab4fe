"""Sharded models, Muon's division of work, and what processes agree on in a step.

tests/acceptance/test_sharding.py trains every stage on up to eight processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from processes import CAN_FORK
from sharded_runs import EAGER, TRAINING, Runs, difference

from bardlet import models
from bardlet.cli import main
from bardlet.config.pretraining import TrainConfig
from bardlet.errors import BardletError
from bardlet.planning import memory, sharding
from bardlet.runtime.distributed import Dist
from bardlet.runtime.signals import StopRequest
from bardlet.training.optimizers import Muon
from bardlet.training.shared_muon import SharedMuon
from bardlet.training.together import Together

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("sharded"))


@pytest.mark.skipif(not CAN_FORK, reason="no forks on this system")
def test_two_processes_compiled_train_what_one_does(runs: Runs) -> None:
    """With the default optimizer, as copies and as shares, in float64."""
    argv = [*runs.argv("qwen3"), "--warmup-steps", "2", "--dtype", "fp32", "--threads", "1", "--eval-every", "0",
            "--compile", "on", "--steps", "10", "--n-layer", "2", "--keep", "last"]  # fmt: skip
    alone = runs.train(1, argv)
    assert not difference(runs.train(2, argv), alone, 1e-9)
    assert not difference(runs.train(2, [*argv, "--shard", "on"]), alone, 1e-9)


@pytest.mark.skipif(not CAN_FORK, reason="no forks on this system")
def test_shares_of_pairs_train_what_one_process_does(runs: Runs) -> None:
    """An encoder-decoder, with dropout and accumulation; its samples come from gathered weights."""
    argv = [*runs.argv("encdec"), *TRAINING, *EAGER, "--elastic", "2", "--dropout", "0.1", "--grad-accum", "2",
            "--steps", "6", "--sample-tokens", "3", "--eval-every", "3"]  # fmt: skip
    assert not difference(runs.train(2, argv), runs.train(1, argv), 1e-9)


@pytest.mark.parametrize("slices", [None, 1, 4])
def test_shared_muon_alone_is_muon(slices: int | None) -> None:
    """Matrices of three shapes, one of them still."""
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4), (1, 5), (6, 4)]
    mine, theirs = ([torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)).double())
                     for i, shape in enumerate(shapes)] for _ in range(2))
    shared, plain = SharedMuon(mine, 0.1, 0.2, Dist(0, 1, CPU, slices)), Muon(theirs, 0.1, 0.2)
    for _ in range(3):
        for index, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            p.grad = torch.randn(shapes[index]).double() * (index != 2)
            q.grad = p.grad.clone()
        shared.step()
        plain.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@dataclass(frozen=True)
class Fake(Dist):
    """One of three processes; the others send these rows."""

    others: tuple[tuple[float, ...], ...] = ()

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        rows = [torch.tensor(row, dtype=own.dtype) for row in self.others]
        return torch.stack([*rows[: self.rank], own, *rows[self.rank :]])


def test_one_message_carries_signals_plans_and_faults() -> None:
    """Losses are added up; the largest signal counts, and the steps of rank 0."""
    together, request = Together(Fake(1, 3, CPU, others=((2.5, 0, 90, 0), (1.0, 15, 70, 1)))), StopRequest()
    asked: list[int] = []

    def replan() -> int:
        asked.append(1)
        return 80

    request.number = 2
    assert (together.stop(request), together.steps(replan), together.faulty) == (0, 0, [])  # nobody knows yet
    together.report_weights(True)
    assert together.add_up(torch.tensor([0.25], dtype=torch.float64), request) == [3.75]
    assert (together.stop(request), together.faulty) == (15, [2])
    assert (together.steps(replan), len(asked)) == (90, 1)  # the new plan applies before the clock is asked again


def test_one_process_knows_at_once() -> None:
    together, request = Together(Dist(0, 1, CPU)), StopRequest()
    request.number = 15
    together.report_weights(False)
    assert (together.stop(request), together.steps(lambda: 7), together.faulty) == (15, 7, [0])
    assert together.add_up(torch.tensor([0.25, 2.0], dtype=torch.float64), request) == [0.25, 2.0]


@pytest.mark.parametrize(("choice", "free", "slices", "ranks"), [
    ("auto", 10**9, None, 1), ("auto", 3 * 10**6, None, 2), ("auto", 10**5, None, 4), ("auto", 10**5, 4, 1),
    ("auto", None, None, 1), ("on", 10**9, None, 2), ("on", 10**5, None, 4), ("on", None, 4, 2),
    ("off", 10**5, None, 1),
])  # fmt: skip
def test_a_model_is_shared_if_copies_do_not_fit(choice: Any, free: int | None, slices: int | None, ranks: int,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines with two processes each, and 100,000 parameters; a process alone shares nothing."""
    monkeypatch.setattr(memory, "free_here", lambda dist: free)
    monkeypatch.setattr(Dist, "all_max", lambda self, value: value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = TrainConfig(model="gpt2", n_layer=2, n_head=2, n_embd=64, block_size=8, shard=choice).resolved()
    model = models.build(config.model_config(11))
    assert sharding.ranks_per_copy(config, model, Dist(0, 4, CPU, slices)) == ranks
    assert sharding.ranks_per_copy(config, model, Dist(0, 1, CPU)) == 1


def test_alone_nothing_is_shared(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(text), *TINY, "--steps", "2", "--shard", "on", "--out", str(tmp_path / "run")]) == 0
    message = "--shard on: there is one process, so nothing is shared; start several with torchrun"
    assert message in capsys.readouterr().err


def test_slices_are_a_power_of_two_unless_shares_are_added() -> None:
    with pytest.raises(BardletError, match="--elastic 24: must be a power of two, at most 1024"):
        TrainConfig(elastic=24)
    assert TrainConfig(elastic=24, shard="on").elastic == 24
