"""Memory: what is free, what a row of a micro-batch needs, and micro-batches that fit."""

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
from bardlet.planning import memory
from bardlet.run.record import Record
from bardlet.runtime.distributed import Dist
from bardlet.training import losses, optim
from bardlet.training.state import Objective, Trainer
from bardlet.training.trainer import train_step

CPU = torch.device("cpu")
ALONE = Dist(0, 1, CPU)


class Many(Dist):
    """One of several processes, which all find the same."""

    def least(self, value: int) -> int:
        return value


def trainer(vocab_size: int = 11, dist: Dist = ALONE, dtype: str = "fp32", **settings: Any) -> Trainer:
    """A run of a tiny model on random tokens, not begun."""
    values: dict[str, Any] = {"model": "qwen3", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8,
                              "batch_size": 12}
    config = TrainConfig(**(values | settings)).resolved()
    torch.manual_seed(0)
    net = models.build(config.model_config(vocab_size))
    tokens = torch.randint(vocab_size, (config.batch_size * config.grad_accum, config.block_size + 1))
    batch = {"idx": tokens[:, :-1], "target": tokens[:, 1:]}
    objective = Objective(lambda step: batch, losses.next_token_loss, losses.count_targets, lambda model: 0.0)
    return Trainer(Path(), net, optim.build(net, config), objective, config, dist, {"dtype": dtype}, Record())


def first(trainer: Trainer, rows: int) -> data_batch.Batch:
    """The first rows of a batch, which own their memory."""
    return {name: x[:rows].clone() for name, x in trainer.objective.batch(0).items()}


# ---------------------------------------------------------------- what there is


def write(root: Path, files: dict[str, str]) -> Path:
    """A folder that looks like the root of a Linux system."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


MEMINFO = "MemTotal:       9000 kB\nMemFree:        1000 kB\nMemAvailable:    5000 kB\nHugePages_Total:       0\n"


def test_free_is_what_linux_calls_available(tmp_path: Path) -> None:
    """Without limits the line MemAvailable counts, in kilobytes."""
    assert memory.free_bytes(CPU, write(tmp_path, {"proc/meminfo": MEMINFO})) == 5000 * 1024


def test_a_container_of_version_2_has_its_own_limit(tmp_path: Path) -> None:
    """Limit - use + cached files, of the group and those around it; "max" is no limit."""
    group = "sys/fs/cgroup/box/job/memory"
    root = write(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/box/job\n", f"{group}.max": "max\n",
        f"{group}.current": "700\n", f"{group}.stat": "anon 1\nactive_file 1\ninactive_file 1\n",
        "sys/fs/cgroup/box/memory.max": "4000\n", "sys/fs/cgroup/box/memory.current": "1500\n",
        "sys/fs/cgroup/box/memory.stat": "anon 1000\nactive_file 200\ninactive_file 300\n"})
    assert memory.free_bytes(CPU, root) == 4000 - 1500 + 200 + 300
    (root / f"{group}.max").write_text("1000\n")
    assert memory.free_bytes(CPU, root) == 1000 - 700 + 2


def test_a_container_of_version_1_has_its_own_limit(tmp_path: Path) -> None:
    """The path is one of the host, which the container does not see: the top of what it sees is itself."""
    group = "sys/fs/cgroup/memory/memory"
    root = write(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "9:cpu:/docker/1\n4:memory:/docker/1\n0::/\n",
        f"{group}.limit_in_bytes": "4000\n", f"{group}.usage_in_bytes": "4500\n",
        f"{group}.stat": "inactive_file 9\ntotal_active_file 100\ntotal_inactive_file 200\n"})
    assert memory.free_bytes(CPU, root) == 0, "never less than nothing"
    (root / f"{group}.usage_in_bytes").write_text("3000\n")
    assert memory.free_bytes(CPU, root) == 4000 - 3000 + 100 + 200


def test_the_address_space_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ulimit -v` less what is mapped already, the first number of statm, in pages."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10 * resource.getpagesize(), -1))
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/statm": "7 5 2 1 0 3 0\n"})
    assert memory.free_bytes(CPU, root) == 3 * resource.getpagesize()


def test_where_nothing_is_known_nothing_is_said(tmp_path: Path) -> None:
    """No /proc: a part of what the machine has. Apple's GPUs: nothing."""
    free = memory.free_bytes(CPU, tmp_path)
    assert free is None or free > 2**20
    assert memory.free_bytes(torch.device("mps")) is None


# ---------------------------------------------------------------- what is needed


def test_what_a_table_saves_worked_by_hand() -> None:
    """The bigram, 11 words, rows of 8: log p in float32, tokens and targets in int64, and the sum of the weights."""
    t = trainer(model="bigram")
    assert sorted(size for size, _ in memory.saved(t, first(t, 1))) == [4, 8 * 8, 8 * 8, 8 * 11 * 4]
    assert memory.per_row(t) == int(1.8 * (8 * 8 + 8 * 8 + 8 * 11 * 4) + 6 * 8 * 11 * 4)


def test_what_rows_share_is_not_counted() -> None:
    """Weights in bf16 are saved once, however many rows there are."""
    t = trainer(model="gpt2", dtype="bf16", n_embd=64, vocab_size=5)
    one, two, six = (sum(size for size, _ in memory.saved(t, first(t, rows))) for rows in (1, 2, 6))
    assert two - one < one / 2, "the weights are most of it"
    assert six - one == 5 * (two - one), "each row takes the same"


def test_the_gradient_of_the_head_is_no_row_s() -> None:
    """It is saved once: also where one row fits and two do not, and not at all where the head does not learn."""
    t = trainer(model="gpt2", vocab_size=3000)
    one, two = (sum(size for size, _ in memory.saved(t, first(t, rows))) for rows in (1, 2))
    assert one > 4 * 3000 * 16 > 5 * (two - one), "most of it is the head's"
    row = memory.per_row(t)
    assert row <= memory.per_row(t, two - 4 * 3000 * 16 - 1) < 2 * row
    before = memory.fixed(t)
    t.model.transformer.wte.weight.requires_grad_(False)
    assert memory.fixed(t) == before - 2 * 4 * 3000 * 16
    assert sum(size for size, _ in memory.saved(t, first(t, 1))) < 4 * 3000 * 16


def test_a_loss_that_has_all_logits_counts_them_as_its_own() -> None:
    """That is not `linear_cross_entropy`."""
    t = trainer(model="gpt2", vocab_size=3000)
    assert memory._logits(t, 8)[0] > 0
    t.objective = replace(t.objective, all_logits=True)
    assert memory._logits(t, 8) == (0, 0)


def test_measuring_ends_as_soon_as_it_is_too_much() -> None:
    """No more is computed than would fit; where one row fits and two do not, the answer says one."""
    t = trainer(n_layer=6)
    ran: list[int] = []
    for layer, block in enumerate(t.model.model.layers):
        block.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
    one, two = (sum(size for size, _ in memory.saved(t, first(t, rows))) for rows in (1, 2))
    ran.clear()
    assert memory.per_row(t, one // 2) > one // 2 and len(ran) < 6
    row = memory.per_row(t)
    assert row <= memory.per_row(t, (one + two) // 2) < 2 * row


@pytest.mark.parametrize("model", ["qwen3", "gpt2", *RUNGS])
def test_the_formula_is_above_the_measurement(model: str) -> None:
    """What is not measured because it cannot matter does not."""
    for sizes in ({}, {"n_embd": 64, "n_head": 4, "block_size": 64, "n_layer": 1}, {"vocab_size": 2000}):
        t = trainer(model=model, **sizes)
        each, most = memory._logits(t, t.config.block_size)
        rows = t.config.batch_size
        assert memory.upper_bound(t) - memory.fixed(t) > rows * memory.per_row(t) + min(rows * each, most)


# ---------------------------------------------------------------- what is done about it


@given(batch=st.integers(1, 200), accumulate=st.integers(1, 6), world=st.sampled_from([1, 2, 3]),
       row=st.integers(1, 10**8), free=st.integers(10**8, 10**10), family=st.sampled_from(["bigram", "qwen3"]))
def test_what_is_chosen_fits_and_is_the_same_step(batch: int, accumulate: int, world: int, row: int, free: int,
                                                  family: str) -> None:  # fmt: skip
    """What rows and their logits take is within what is allowed; the batch and its division by processes stay."""
    t = trainer(3000 if family == "qwen3" else 11, Many(0, world, CPU), model=family, batch_size=batch * world,
                grad_accum=accumulate)
    each, most = memory._logits(t, t.config.block_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_here", lambda dist: free)
        patch.setattr(memory, "per_row", lambda t, limit: row)
        patch.setattr(memory, "upper_bound", lambda t: 10**11)
        allowed = memory.SHARE * (free - memory.fixed(t))
        try:
            memory.fit_micro_batches(t)
        except BardletError:
            assert row + each > allowed
            return
    rows, odd = divmod(t.config.batch_size, world)
    assert odd == 0 and 1 <= rows <= batch and rows * row + min(rows * each, most) <= allowed
    assert t.config.batch_size * t.config.grad_accum == batch * world * accumulate


def test_a_cut_step_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient of 12 rows at once, and of as many as fit."""
    t = trainer()
    whole = train_step(t.model, [], t.objective.batch(0), t.objective, t.config, ALONE, "fp32")
    t.model.zero_grad()
    free = memory.fixed(t) + int(5.5 * memory.per_row(t) / memory.SHARE)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory, "UPDATE", 0)
    monkeypatch.setattr(memory, "SMALL_FREE", 0)
    memory.fit_micro_batches(t)
    assert (t.config.batch_size, t.config.grad_accum) == (4, 3)
    done = train_step(t.model, [], t.objective.batch(0), t.objective, t.config, ALONE, "fp32")
    assert done == pytest.approx(whole, rel=1e-5)


def test_where_memory_is_no_question_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much is free, or nobody knows how much."""
    t = trainer()
    before = t.config
    monkeypatch.setattr(memory, "per_row", lambda *_: pytest.fail("measured"))
    for free in (2**40, None):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        memory.fit_micro_batches(t)
    assert t.config == before and t.record == Record()


def test_a_model_too_large_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are counted without memory for them."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    shape = TrainConfig(n_embd=4096, n_head=32, n_layer=32).model_config(65)
    with pytest.raises(BardletError, match=r"takes 1\d\d,\d\d\d MB, 1,000 MB are free; take a smaller --n-embd"):
        memory.check_weights(shape, ALONE)
    memory.check_weights(replace(shape, n_embd=64, n_inner=128, n_layer=2, n_head=2, n_kv_head=2, head_dim=32), ALONE)


def test_a_run_is_cut_to_the_memory_and_goes_on_so(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little for 64 windows: fewer at once; `resume` computes as the run began, though there is more now."""
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


def test_too_little_for_a_single_window_is_one_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    """What is wanted, what is free, what to do; nothing is left behind."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 50_000_000)
    assert main(["train", str(text), *TINY, "--steps", "1", "--out", str(tmp_path / "run")]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bardlet:")]
    assert len(lines) == 1 and "MB or more, 50 MB are free; take a smaller --block-size, --n-embd or" in lines[0]
    assert not (tmp_path / "run").exists()


def test_under_a_limit_of_the_system_itself_a_run_ends_well(text: Path, tmp_path: Path) -> None:
    """400 MiB more than an empty process has, for a batch that wants twice as much: cut, and trained to its end."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    code = "import bardlet.stages.pretrain; print(open('/proc/self/statm').read())"
    begun = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit = int(begun.stdout.split()[0]) * resource.getpagesize() + 400 * 2**20
    words = ["--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--block-size", "64", "--batch-size", "1024",
             "--steps", "2", "--compile", "off", "--dtype", "fp32", "--eval-tokens", "500", "--threads", "1"]
    done = subprocess.run([sys.executable, "-m", "bardlet", "train", str(text), *words, "--out", str(tmp_path / "run")],
                          capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert done.returncode == 0, done.stderr
    assert "of memory are free, too little for --batch-size 1024" in done.stderr
