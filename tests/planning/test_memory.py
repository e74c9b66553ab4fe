"""Free memory, memory per row of a micro-batch, and micro-batches that fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from bardlet import models
from bardlet.cli import main
from bardlet.config.model import RUNGS
from bardlet.config.pretraining import TrainConfig
from bardlet.config.toml import read_toml
from bardlet.data import batch as data_batch
from bardlet.errors import BardletError
from bardlet.models import lora
from bardlet.planning import memory
from bardlet.run.record import Record
from bardlet.runtime import compiler, parallelize
from bardlet.runtime.distributed import Dist
from bardlet.training import losses, optim
from bardlet.training.state import Objective, Trainer
from bardlet.training.step import train_step

CPU = torch.device("cpu")
ALONE = Dist(0, 1, CPU)
needs_compiler = pytest.mark.skipif(compiler.compiler_missing(CPU) is not None, reason="no C++ compiler")


class AgreeingRank(Dist):
    """A rank of several that all have the same values."""

    def all_min(self, value: int) -> int:
        return value


def make_trainer(vocab_size: int = 11, dist: Dist = ALONE, dtype: str = "fp32", **settings: Any) -> Trainer:
    """Return a trainer for a tiny model on random tokens, before its first step."""
    values: dict[str, Any] = {"model": "qwen3", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8,
                              "batch_size": 12}
    config = TrainConfig(**(values | settings)).resolved()
    torch.manual_seed(0)
    net = models.build(config.model_config(vocab_size))
    tokens = torch.randint(vocab_size, (config.batch_size * config.grad_accum, config.block_size + 1))
    batch = {"idx": tokens[:, :-1], "target": tokens[:, 1:]}
    objective = Objective(lambda step: batch, losses.next_token_loss, losses.count_targets, lambda model: 0.0)
    return Trainer(Path(), net, optim.build(net, config), objective, config, dist, {"dtype": dtype}, Record())


def first_rows(trainer: Trainer, rows: int) -> data_batch.Batch:
    """Return copies of the first rows of a batch."""
    return {name: x[:rows].clone() for name, x in trainer.objective.batch(0).items()}


def saved_bytes(trainer: Trainer, rows: int) -> int:
    """Return the bytes that a forward pass of `rows` saves."""
    return sum(size for size, _ in memory.saved_tensors(trainer, first_rows(trainer, rows)))


# ---------------------------------------------------------------- free memory


def write_files(root: Path, files: dict[str, str]) -> Path:
    """Create files below `root`, as on a Linux system, and return it."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


MEMINFO = "MemTotal:       9000 kB\nMemFree:        1000 kB\nMemAvailable:    5000 kB\nHugePages_Total:       0\n"


def test_free_memory_is_memavailable(tmp_path: Path) -> None:
    """Without limits MemAvailable counts, which is in kilobytes."""
    assert memory.free_bytes(CPU, write_files(tmp_path, {"proc/meminfo": MEMINFO})) == 5000 * 1024


def test_a_cgroup_v2_limits_memory(tmp_path: Path) -> None:
    """Limit - usage + cached files, for the group and its parents; "max" means no limit."""
    group = "sys/fs/cgroup/box/job/memory"
    root = write_files(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/box/job\n", f"{group}.max": "max\n",
        f"{group}.current": "700\n", f"{group}.stat": "anon 1\nactive_file 1\ninactive_file 1\n",
        "sys/fs/cgroup/box/memory.max": "4000\n", "sys/fs/cgroup/box/memory.current": "1500\n",
        "sys/fs/cgroup/box/memory.stat": "anon 1000\nactive_file 200\ninactive_file 300\n"})
    assert memory.free_bytes(CPU, root) == 4000 - 1500 + 200 + 300
    (root / f"{group}.max").write_text("1000\n")
    assert memory.free_bytes(CPU, root) == 1000 - 700 + 2


def test_a_cgroup_v1_limits_memory(tmp_path: Path) -> None:
    """The path is the host's and does not exist in the container, whose own group is at the root."""
    group = "sys/fs/cgroup/memory/memory"
    root = write_files(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "9:cpu:/docker/1\n4:memory:/docker/1\n0::/\n",
        f"{group}.limit_in_bytes": "4000\n", f"{group}.usage_in_bytes": "4500\n",
        f"{group}.stat": "inactive_file 9\ntotal_active_file 100\ntotal_inactive_file 200\n"})
    assert memory.free_bytes(CPU, root) == 0, "never negative"
    (root / f"{group}.usage_in_bytes").write_text("3000\n")
    assert memory.free_bytes(CPU, root) == 4000 - 3000 + 100 + 200


def test_the_address_space_limits_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ulimit -v` minus the mapped memory: the first number of statm, in pages."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (10 * resource.getpagesize(), -1))
    root = write_files(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/statm": "7 5 2 1 0 3 0\n"})
    assert memory.free_bytes(CPU, root) == 3 * resource.getpagesize()


def test_without_information_free_memory_is_unknown(tmp_path: Path) -> None:
    """Without /proc, half of the physical memory or None; on Apple's GPUs None."""
    free = memory.free_bytes(CPU, tmp_path)
    assert free is None or free > 2**20
    assert memory.free_bytes(torch.device("mps")) is None


# ---------------------------------------------------------------- memory of a run


def test_the_saved_bytes_of_a_bigram_match_values_by_hand() -> None:
    """With 11 tokens and rows of 8: log p in float32, inputs and targets in int64, and the sum of the weights."""
    trainer = make_trainer(model="bigram")
    sizes = sorted(size for size, _ in memory.saved_tensors(trainer, first_rows(trainer, 1)))
    assert sizes == [4, 8 * 8, 8 * 8, 8 * 11 * 4]
    assert memory.bytes_per_row(trainer) == int(1.8 * (8 * 8 + 8 * 8 + 8 * 11 * 4) + 6 * 8 * 11 * 4)


def test_memory_shared_by_rows_is_not_counted() -> None:
    """Weights in bf16 are saved once for any number of rows."""
    trainer = make_trainer(model="gpt2", dtype="bf16", n_embd=64, vocab_size=5)
    one, two, six = (saved_bytes(trainer, rows) for rows in (1, 2, 6))
    assert two - one < one / 2, "mostly weights"
    assert six - one == 5 * (two - one), "each row adds the same"


def test_the_gradient_of_the_head_is_not_counted_per_row() -> None:
    """It is saved once, also if one row fits and two do not; a frozen head has none."""
    trainer = make_trainer(model="gpt2", vocab_size=3000)
    one, two = (saved_bytes(trainer, rows) for rows in (1, 2))
    assert one > 4 * 3000 * 16 > 5 * (two - one), "mostly the head's gradient"
    row = memory.bytes_per_row(trainer)
    assert row <= memory.bytes_per_row(trainer, two - 4 * 3000 * 16 - 1) < 2 * row
    before = memory.fixed_bytes(trainer)
    trainer.model.transformer.wte.weight.requires_grad_(False)
    assert memory.fixed_bytes(trainer) == before - (2 + 2) * 4 * 3000 * 16, "nor a copy of the head and its gradient"
    assert saved_bytes(trainer, 1) < 4 * 3000 * 16


def test_a_loss_with_all_logits_counts_them_as_saved() -> None:
    """They are not extra memory of `linear_cross_entropy`."""
    trainer = make_trainer(model="gpt2", vocab_size=3000)
    assert memory._logits(trainer, 8)[0] > 0
    trainer.objective = replace(trainer.objective, all_logits=True)
    assert memory._logits(trainer, 8) == (0, 0)


def test_measuring_stops_at_the_limit() -> None:
    """The forward pass stops once it exceeds the limit; if one row fits and two do not, one is measured."""
    trainer = make_trainer(n_layer=6)
    executed: list[int] = []
    for layer, block in enumerate(trainer.model.model.layers):
        block.register_forward_pre_hook(lambda *_, layer=layer: executed.append(layer))
    one, two = (saved_bytes(trainer, rows) for rows in (1, 2))
    executed.clear()
    assert memory.bytes_per_row(trainer, one // 2) > one // 2 and len(executed) < 6
    row = memory.bytes_per_row(trainer)
    assert row <= memory.bytes_per_row(trainer, (one + two) // 2) < 2 * row


@pytest.mark.parametrize("model", ["qwen3", "gpt2", *RUNGS])
def test_the_upper_bound_exceeds_the_measurement(model: str) -> None:
    """A run that is not measured because of the bound does fit."""
    for sizes in ({}, {"n_embd": 64, "n_head": 4, "block_size": 64, "n_layer": 1}, {"vocab_size": 2000}):
        trainer = make_trainer(model=model, **sizes)
        row_logits, max_logits = memory._logits(trainer, trainer.config.block_size)
        rows = trainer.config.batch_size
        measured = rows * memory.bytes_per_row(trainer) + min(rows * row_logits, max_logits)
        assert memory.upper_bound(trainer) - memory.fixed_bytes(trainer) > measured


# ---------------------------------------------------------------- fitting a run into memory


@given(batch=st.integers(1, 200), accumulate=st.integers(1, 6), world=st.sampled_from([1, 2, 3]),
       row=st.integers(1, 10**8), free=st.integers(10**8, 10**10), family=st.sampled_from(["bigram", "qwen3"]))
def test_chosen_micro_batches_fit_and_keep_the_batch(batch: int, accumulate: int, world: int, row: int, free: int,
                                                     family: str) -> None:  # fmt: skip
    """Rows and their logits stay within the budget; the global batch still divides by the number of ranks."""
    trainer = make_trainer(3000 if family == "qwen3" else 11, AgreeingRank(0, world, CPU), model=family,
                           batch_size=batch * world, grad_accum=accumulate)
    row_logits, max_logits = memory._logits(trainer, trainer.config.block_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_here", lambda dist: free)
        patch.setattr(memory, "bytes_per_row", lambda trainer, limit: row)
        patch.setattr(memory, "upper_bound", lambda trainer: 10**11)
        allowed = memory.SHARE * (free - memory.fixed_bytes(trainer))
        try:
            memory.fit_micro_batches(trainer)
        except BardletError:
            outside = memory._outside(trainer)
            assert row + row_logits > allowed or free - memory.fixed_bytes(trainer) < outside
            return
    rows, remainder = divmod(trainer.config.batch_size, world)
    assert remainder == 0 and 1 <= rows <= batch
    assert rows * row + min(rows * row_logits, max_logits) <= allowed
    assert trainer.config.batch_size * trainer.config.grad_accum == batch * world * accumulate


def test_with_lora_only_the_factors_have_gradients_and_averages() -> None:
    """A frozen base in bf16 counts once, as weights that are there already."""
    adapted = make_trainer(n_embd=64)
    adapted.model.bfloat16()
    lora.add_lora(adapted.model, 2)
    adapted.optimizers = optim.build(adapted.model, adapted.config)
    factors = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    host = memory._windows(adapted) + memory.LATER
    assert 2 * 4 * factors < memory.fixed_bytes(adapted) - host <= 4 * 4 * factors
    adapted.machine["dtype"] = "bf16"
    fp32 = sum(p.numel() for p in adapted.model.parameters() if p.dtype == torch.float32)
    assert factors < fp32 < memory._parameters(adapted) / 2
    assert 2 * 4 * factors + 2 * fp32 < memory.fixed_bytes(adapted) - host <= 4 * 4 * factors + 2 * fp32


def test_a_split_step_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient norm of 12 rows at once equal those of micro-batches that fit."""
    trainer = make_trainer()
    arguments = trainer.model, [], trainer.objective.batch(0), trainer.objective
    whole = train_step(*arguments, trainer.config, ALONE, "fp32")
    trainer.model.zero_grad()
    free = memory.fixed_bytes(trainer) + int(5.5 * memory.bytes_per_row(trainer) / memory.SHARE)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory, "_outside", lambda trainer: 0)
    monkeypatch.setattr(memory, "SMALL_FREE", 0)
    memory.fit_micro_batches(trainer)
    assert (trainer.config.batch_size, trainer.config.grad_accum) == (4, 3)
    split = train_step(*arguments, trainer.config, ALONE, "fp32")
    assert split == pytest.approx(whole, rel=1e-5)


def test_a_row_that_does_not_fit_is_computed_again(monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    """Loss and gradients stay the same, with dropout; without recomputation the same memory is refused."""
    results = []
    for recompute in ("off", "auto"):
        trainer = make_trainer(n_layer=8, dropout=0.2, recompute=recompute)
        free = memory.fixed_bytes(trainer) + int(0.9 * memory.bytes_per_row(trainer) / memory.SHARE)
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        monkeypatch.setattr(memory, "_outside", lambda trainer: 0)
        monkeypatch.setattr(memory, "SMALL_FREE", 0)
        if recompute == "off":
            with pytest.raises(BardletError, match="a single row of 8 tokens needs at least"):
                memory.fit_micro_batches(trainer)
        else:
            memory.fit_micro_batches(trainer)
            assert trainer.config.recompute == "on" and "computing activations again" in caplog.text
        results.append(loss_and_gradients(trainer))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_blocks_that_compute_again_keep_what_enters_them() -> None:
    """A row of 16 blocks takes little more than one of a single block whose activations are kept."""
    one, sixteen, again = (make_trainer(n_layer=n, recompute=recompute)
                           for n, recompute in ((1, "off"), (16, "off"), (16, "on")))
    parallelize.recompute(again.model)
    kept, all_kept, computed = map(memory.bytes_per_row, (one, sixteen, again))
    entering = 15 * 4 * again.config.block_size * again.model.config.n_embd
    assert computed == pytest.approx(kept + memory.HEAP["cpu"][0] * entering, rel=0.05)
    assert computed < all_kept / 3
    calls: list[int] = []
    for block in again.model.model.layers:  # all of them compute again afterwards
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    again.objective.loss(again.model, again.objective.batch(0)).backward()
    assert len(calls) == 2 * 16


@needs_compiler
def test_compiled_blocks_compute_again_what_they_dropped() -> None:
    results = []
    for compiled, again in ((False, False), (True, False), (True, True)):
        trainer = make_trainer(n_layer=2, dropout=0.2)
        parallelize.recompute(trainer.model, again)
        compiler.compile_blocks(trainer.model, compiled)
        results.append(loss_and_gradients(trainer))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def loss_and_gradients(trainer: Trainer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return those of the first batch, always with the same dropout."""
    torch.manual_seed(3)
    trainer.model.train()
    loss = trainer.objective.loss(trainer.model, trainer.objective.batch(0))
    return loss.detach(), list(torch.autograd.grad(loss, list(trainer.model.parameters())))


def test_with_plenty_or_unknown_memory_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    before = trainer.config
    monkeypatch.setattr(memory, "bytes_per_row", lambda *_: pytest.fail("measured"))
    for free in (2**40, None):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        memory.fit_micro_batches(trainer)
    assert trainer.config == before and trainer.record == Record()


def test_a_model_too_large_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are counted without allocating them."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    shape = TrainConfig(n_embd=4096, n_head=32, n_layer=32).model_config(65)
    with pytest.raises(BardletError, match=r"takes 1\d\d,\d\d\d MB, but 1,000 MB are free; use a smaller --n-embd"):
        memory.check_weights(shape, ALONE)
    memory.check_weights(replace(shape, n_embd=64, n_inner=128, n_layer=2, n_head=2, n_kv_head=2, head_dim=32), ALONE)


def test_a_resumed_run_keeps_its_micro_batches(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory for 64 windows splits them; `resume` keeps the split, though more memory is free now."""
    monkeypatch.setattr(memory, "LATER", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3_000_000)
    bardlet("train", text, *TINY, "--batch-size", "64", "--steps", "2", "--out", tmp_path / "run")
    config, record = read_toml(tmp_path / "run" / "run.toml")
    assert config.batch_size < 64 and config.batch_size * config.grad_accum == 64
    assert 1 <= record["evaluation_rows"] < 64
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**40)
    bardlet("resume", tmp_path / "run", "--steps", "3", "--allow-change")
    after, record_after = read_toml(tmp_path / "run" / "run.toml")
    assert (after.batch_size, after.grad_accum) == (config.batch_size, config.grad_accum)
    assert record_after["evaluation_rows"] == record["evaluation_rows"]


def test_too_little_memory_for_a_single_window_is_one_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the needed and the free memory and what to do; no folder is left."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 50_000_000)
    assert main(["train", str(text), *TINY, "--steps", "1", "--out", str(tmp_path / "run")]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bardlet:")]
    assert len(lines) == 1 and "MB, but 50 MB are free; use a smaller --block-size, --n-embd or" in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_run_finishes_under_an_address_space_limit(text: Path, tmp_path: Path) -> None:
    """400 MiB more than an empty process needs, for a batch that needs twice as much: split, and trained to the end."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    code = "import bardlet.stages.pretrain; print(open('/proc/self/statm').read())"
    empty = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit = int(empty.stdout.split()[0]) * resource.getpagesize() + 400 * 2**20
    settings = ["--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--block-size", "64", "--batch-size", "1024",
                "--steps", "2", "--compile", "off", "--dtype", "fp32", "--eval-tokens", "500", "--threads", "1"]
    command = [sys.executable, "-m", "bardlet", "train", str(text), *settings, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert done.returncode == 0, done.stderr
    assert "of memory are free, too little for --batch-size 1024" in done.stderr
