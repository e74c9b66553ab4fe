"""Sharded models, Muon's division of work, and what processes agree on in a step.

tests/acceptance/test_sharding.py trains every stage on up to eight processes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from processes import CAN_FORK, in_processes
from sharded_runs import COUNTED, EAGER, TRAINING, Runs, count_messages, difference
from torch import nn

from bardlet import models
from bardlet.cli import main
from bardlet.config.pretraining import TrainConfig
from bardlet.errors import BardletError
from bardlet.evaluation import metrics
from bardlet.planning import memory, sharding
from bardlet.runtime.distributed import Dist
from bardlet.runtime.signals import Interrupted, StopRequest
from bardlet.runtime.turns import shared_by
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


@pytest.mark.skipif(not CAN_FORK, reason="no forks on this system")
@pytest.mark.parametrize(("options", "expected"), [
    ([], {"allreduce_": 1, "allgather_": 1}),
    (["--shard", "on"], {"_allgather_base_": 2 * 3, "_reduce_scatter_base_": 3, "allgather_": 1}),
], ids=["copies", "shares"])  # fmt: skip
def test_a_step_sends_gradients_and_one_message(runs: Runs, tmp_path: Path, options: list[str],
                                                expected: dict[str, int]) -> None:
    """On every process. Copies add up their gradients; shares of two blocks and the rest are gathered twice."""
    argv = [*runs.argv("qwen3"), "--dtype", "fp32", "--threads", "1", "--eval-every", "0", "--compile", "off",
            "--save-every", "0", "--optimizer", "adamw", "--steps", "9", "--n-layer", "2", *options]  # fmt: skip
    log = tmp_path / "log"
    in_processes(2, [*argv, "--out", tmp_path / "run"], log, before=count_messages)
    counts = [json.loads(line) for line in log.read_text("utf-8").splitlines() if line.startswith("{")]
    assert counts == 2 * [{name: number * len(COUNTED) for name, number in expected.items()}]


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
    assert together.add_up(torch.tensor([0.25], dtype=torch.float64), request).tolist() == [3.75]
    together.read()
    assert (together.stop(request), together.faulty) == (15, [2])
    assert (together.steps(replan), len(asked)) == (90, 1)  # the new plan applies before the clock is asked again


def test_one_process_knows_at_once() -> None:
    together, request = Together(Dist(0, 1, CPU)), StopRequest()
    request.number = 15
    together.report_weights(False)
    assert (together.stop(request), together.steps(lambda: 7), together.faulty) == (15, 7, [0])
    assert together.add_up(torch.tensor([0.25, 2.0], dtype=torch.float64), request).tolist() == [0.25, 2.0]
    together.read()
    assert (together.stop(request), together.faulty) == (15, [0])


class Sums(nn.Module):
    """A model whose loss of a batch is the sum of its targets, and which counts the batches."""

    batches = 0

    def forward(self, idx: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        return target.double().sum()


def evaluated(signals: Sequence[int], rows: int = 2) -> list[tuple[float | int, int]]:
    """Return, for each of several processes, (mean loss or signal, batches computed) of batches with 7 and 4 rows."""
    batches = [{"idx": x, "target": x} for x in (torch.arange(7)[:, None] ** 3, torch.arange(4)[:, None])]
    barrier, sent = threading.Barrier(len(signals)), [torch.empty(0)] * len(signals)

    @dataclass(frozen=True)
    class Thread(Dist):
        def gather(self, own: torch.Tensor) -> torch.Tensor:
            sent[self.rank] = own
            barrier.wait()
            return torch.stack(sent)

    def process(rank: int) -> tuple[float | int, int]:
        model = Sums()
        try:
            with shared_by(Thread(rank, len(signals), CPU), lambda: signals[rank]):
                return metrics.mean_loss(model, batches, CPU, rows=rows), model.batches
        except Interrupted as interruption:
            return interruption.args[0], model.batches

    with ThreadPoolExecutor(len(signals)) as pool:
        return list(pool.map(process, range(len(signals))))


def test_processes_share_an_evaluation() -> None:
    """Six micro-batches; the loss is that of one process."""
    mean = (sum(n**3 for n in range(7)) + sum(range(4))) / 11
    assert [evaluated([0] * world) for world in (1, 2, 3)] == [[(mean, 6)], [(mean, 3)] * 2, [(mean, 2)] * 3]
    assert evaluated([0] * 4) == [(mean, 2)] * 4  # two of them compute the last one again


def test_a_signal_to_one_process_ends_the_evaluation_of_all() -> None:
    assert evaluated([0, 15]) == [(15, 3), (15, 0)]


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
