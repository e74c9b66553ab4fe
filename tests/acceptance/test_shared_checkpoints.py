"""Checkpoints of processes that share a model: killed at 50 moments, on 20 full disks, resumed on other numbers."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from acceptance.test_full_disk import resize, small_disk  # noqa: F401 (a fixture)
from processes import in_processes
from runtime.test_heartbeat import SETTINGS, Launch, resumed_from
from sharded_runs import EAGER, SLICES, TRAINING, Runs, difference
from transformers import AutoModelForCausalLM

from bardlet.run import checkpoint, hf, metrics

RUN = [*SETTINGS, "--n-layer", "3", "--n-embd", "96", "--n-inner", "97", "--batch-size", "8", "--steps", "60",
       "--save-every", "4", "--eval-every", "20", "--keep-checkpoints", "1", "--keep", "last", "--threads", "1",
       "--elastic", "4", "--shard", "on", "--dropout", "0.1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the undisturbed run of two processes."""
    folder = tmp_path_factory.mktemp("whole")
    Launch(folder / "log", "train", text, "--out", folder / "run", *RUN).ends(0)
    return folder / "run"


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Return the metrics of a run without times."""
    return [(line["step"], line.get("train_loss"), line.get("val_loss")) for line in metrics.read_metrics(run)]


@pytest.mark.parametrize("seed", range(10))
def test_killed_at_five_moments(seed: int, text: Path, tmp_path: Path, whole: Path) -> None:
    """A process is killed five times, also while the checkpoint is written: the last whole one is never lost."""
    run, chance = tmp_path / "run", random.Random(seed)
    reached = 0
    for number in range(5):
        argv = ["resume", run] if run.exists() else ["train", text, "--out", run, *RUN]
        launch = Launch(tmp_path / f"log{number}", *argv)
        launch.wait_for(run / "run.toml")
        seen = time.monotonic() + chance.uniform(0, 5)
        while time.monotonic() < seen and launch.launcher.poll() is None:
            time.sleep(0.01)
        if launch.launcher.poll() is None and (pids := launch.workers()):
            os.kill(chance.choice(list(pids.values())), signal.SIGKILL)
        launch.launcher.wait(600)
        if not run.exists():  # killed before its first checkpoint
            assert not reached
            continue
        if reached:
            newest = int(checkpoint.newest_intact(run).name[5:])
            assert newest >= reached
        saved = checkpoint.steps_saved(run)
        reached = int(saved[-1].name[5:]) if saved else reached
    if "finished = true" not in (run / "run.toml").read_text(encoding="utf-8"):
        Launch(tmp_path / "end", "resume", run).ends(0)
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not difference(run, whole, 0)
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("size", [120 * part for part in range(1, 21)])
def test_full_disk(size: int, small_disk: Path, text: Path, tmp_path: Path, whole: Path) -> None:  # noqa: F811
    """The run fits, or a line names file and bytes; with more room it continues from its last whole checkpoint."""
    run = small_disk / "run"
    resize(small_disk, size)
    launch = Launch(tmp_path / "log", "train", text, "--out", run, *RUN)
    launch.launcher.wait(600)
    output = launch.output()
    if launch.launcher.returncode:
        assert re.search(rf"bardlet: {run}\S*: cannot be written: no space left on device", output), output
        assert "Traceback" not in re.sub(r"(?s)torch.*", "", output)
        saved = checkpoint.steps_saved(run) if run.exists() else []
        if saved:
            assert checkpoint.newest_intact(run)
        resize(small_disk, 20_000)
        argv = ["resume", run] if run.exists() else ["train", text, "--out", run, *RUN]
        output = Launch(tmp_path / "again", *argv).ends(0)
        if saved:
            assert (resumed_from(output) or 0) >= int(saved[-1].name[5:])
    assert not difference(run, whole, 0)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, Path]:
    """A run of four processes in float64, with all its checkpoints."""
    runs = Runs(tmp_path_factory.mktemp("four"))
    argv = [*runs.argv("gpt2"), *TRAINING, *EAGER, *SLICES, "--steps", "12", "--save-every", "4",
            "--keep-checkpoints", "9"]
    return runs, runs.train(4, argv)


@pytest.mark.parametrize("count", [1, 3])
def test_saved_on_four_resumed_on_others(count: int, four: tuple[Runs, Path], tmp_path: Path) -> None:
    """They end where the four processes ended."""
    run = tmp_path / "run"
    shutil.copytree(four[1], run)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    in_processes(count, ["resume", run], tmp_path / "log", double=True)
    assert "continuing after step 8 of 12" in (tmp_path / "log").read_text(encoding="utf-8")
    assert not difference(run, four[1], 1e-9)
    assert len(list((run / "checkpoints" / "step-00000012").glob("shares-*"))) == (0 if count == 1 else count)


def test_the_saved_state_is_exact(four: tuple[Runs, Path]) -> None:
    """The rows that four processes saved are, put together, the weights at the root, in any cut."""
    saved = checkpoint.shares_in(checkpoint.newest_intact(four[1]))
    assert saved
    model, _ = hf.read_folder(four[1])
    model = model.double()
    model.load_hf_state_dict(hf.read_tensors(four[1] / "model.safetensors"))
    for name, p in model.named_parameters():
        whole = saved[f"parameter/{name}"]
        assert torch.equal(whole, p)
        cut = max(1, len(whole) // 3)
        parts = [saved.rows(f"parameter/{name}", first, min(cut, len(whole) - first))
                 for first in range(0, len(whole), cut)]  # fmt: skip
        assert torch.equal(torch.cat(parts), whole)


def test_transformers_reads_the_result_and_nothing_is_pickled(text: Path, whole: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole).eval()
    ours, _ = hf.read_folder(whole)
    idx = torch.arange(16)[None] % ours.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(idx).logits, ours(idx), rtol=1e-5, atol=1e-5)
    for path in whole.rglob("*"):
        if path.is_file():
            assert_not_pickled(path)


def assert_not_pickled(path: Path) -> None:
    """Fail unless a file is JSON, text, a picture or safetensors."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    elif path.suffix == ".png":
        assert content.startswith(b"\x89PNG")
    else:
        content.decode("utf-8")
    assert b"PK\x03\x04" not in content[:4] and not content.startswith(b"\x80")
