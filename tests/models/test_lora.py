"""LoRA: the zero update at the start, trainable parameters, saved weights, resuming and user errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_run
from processes import power_cut
from safetensors.torch import load_file, save_file

from bardlet import models
from bardlet.cli import main
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import TrainConfig
from bardlet.inference import decoders
from bardlet.models import lora
from bardlet.models.reward import with_scalar_head
from bardlet.run import hf
from bardlet.training import optim

QWEN3 = ModelConfig("qwen3", vocab_size=30, block_size=16, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, head_dim=8,
                    n_inner=32, activation="silu")  # fmt: skip
GPT2 = ModelConfig("gpt2", vocab_size=30, block_size=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, head_dim=8,
                   n_inner=64)  # fmt: skip
IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "32", "--dtype", "fp32", "--compile",
        "off"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("".join(f"{n} odd? {'yes' if n % 2 else 'no'}\n" for n in range(300)))
    assert main(["train", str(folder / "text.txt"), *TINY, "--tokenizer", "bpe", "--vocab-size", "300", "--steps", "20",
                 "--out", str(folder / "base"), "--debug"]) == 0  # fmt: skip
    return folder / "base"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} odd?", "answer": "yes" if n % 2 else "no"}) + "\n"
                            for n in range(200)), encoding="utf-8")  # fmt: skip
    return path


def with_random_updates(model: Any) -> Any:
    """Return the model with nonzero LoRA updates."""
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, lora.LoRALinear):
            torch.nn.init.normal_(layer.up, std=0.1)
    return model


@pytest.mark.parametrize("shape", [QWEN3, GPT2])
def test_it_starts_as_the_model_and_saves_the_merged_weight(shape: ModelConfig) -> None:
    model = models.build(shape).eval()
    before, weights = model(IDX), {name: x.clone() for name, x in model.hf_state_dict().items()}
    lora.add_lora(model, 4)
    assert torch.equal(model(IDX), before)
    assert all(torch.equal(x, weights[name]) for name, x in model.hf_state_dict().items())
    logits = with_random_updates(model)(IDX)
    assert (logits - before).abs().max() > 0.01
    merged = models.build(shape).eval()
    merged.load_hf_state_dict(model.hf_state_dict())
    torch.testing.assert_close(merged(IDX), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [QWEN3, GPT2])
def test_the_decoder_reads_the_merged_weight(shape: ModelConfig) -> None:
    model = models.build(shape).eval()
    lora.add_lora(model, 4)
    with_random_updates(model)
    with torch.inference_mode():
        decoder = decoders.decoder(model)
        cache = model.new_cache(2)
        logits = [decoder(column, cache) for column in IDX.T]
        torch.testing.assert_close(torch.stack(logits, 1), model(IDX), atol=1e-4, rtol=1e-4)


def test_loading_weights_resets_the_update() -> None:
    model = models.build(QWEN3).eval()
    weights = {name: x.clone() for name, x in model.hf_state_dict().items()}
    before = model(IDX)
    lora.add_lora(model, 4)
    with_random_updates(model).load_hf_state_dict(weights)
    assert torch.equal(model(IDX), before)


def test_only_the_factors_and_a_new_head_are_trainable() -> None:
    model = models.build(QWEN3)
    lora.add_lora(model, 4)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 7 and all(name.endswith((".up", ".down")) for name in trainable)
    groups = optim.parameter_groups(model, True)
    assert {name for group in groups.values() for name, _ in group} == trainable
    scorer = with_scalar_head(models.build(QWEN3))
    lora.add_lora(scorer, 4)
    assert {name for name, p in scorer.named_parameters() if p.requires_grad} == trainable | {"score.weight"}


def test_frozen_weights_stay_bit_for_bit(base: Path, chats: Path, tmp_path: Path) -> None:
    assert main(["sft", str(base), str(chats), "--lora", "2", "--steps", "20", "--dtype", "fp32", "--compile", "off",
                 "--out", str(tmp_path / "run"), "--debug"]) == 0  # fmt: skip
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys()
    matrices = {name for name in before if "_proj" in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == matrices
    for name in matrices:  # the update has the requested rank
        s = torch.linalg.svdvals((after[name] - before[name]).double())
        assert s[1] > 1e-4 > 100 * s[2]


@pytest.mark.parametrize("command", [["sft"], ["train"], ["grpo", "--reward", "exact"], ["ppo", "--reward", "exact"]],
                         ids=lambda command: command[0])  # fmt: skip
def test_a_run_resumes_bit_for_bit(command: list[str], base: Path, chats: Path, tmp_path: Path,
                                   bardlet: Callable[..., dict[str, Any]]) -> None:
    kind, *options = command
    inputs = [base.parent / "text.txt", "--init", base] if kind == "train" else [base, chats]
    sizes = ["--rollout", "16", "--answer-tokens", "6"] if options else []
    argv = [kind, *map(str, inputs), *options, *sizes, "--lora", "2", "--steps", "10", "--save-every", "5",
            "--batch-size", "8", "--dtype", "fp32", "--compile", "off", "--keep", "average"]  # fmt: skip
    bardlet(*argv, "--out", tmp_path / "whole")
    power_cut([*argv, "--out", tmp_path / "resumed"])
    assert bardlet("resume", tmp_path / "resumed")["resumed_from"] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", 10)
    assert hf.read_model_config(tmp_path / "whole") == hf.read_model_config(base)


@pytest.mark.parametrize(("rank", "message"), [
    ("0", "--lora 0: must be at least 1"),
    ("500", "--lora 500: the rank must be at most 32 for this model"),
])
def test_user_errors_are_one_line(rank: str, message: str, base: Path, chats: Path, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(base), str(chats), "--lora", rank, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_lora_needs_a_pretrained_model() -> None:
    with pytest.raises(Exception, match="--lora 4: LoRA adapts a trained model"):
        TrainConfig(lora=4)


@pytest.mark.parametrize("shape", [QWEN3, GPT2])
def test_a_base_in_bf16_computes_what_it_computes_in_fp32(shape: ModelConfig) -> None:
    """Logits, gradients and merged weights, bit for bit; only the matrices of the blocks stay in bf16."""
    rounded = models.build(shape).eval().bfloat16()
    wide = models.build(shape).eval()
    wide.load_state_dict(rounded.state_dict())
    results = []
    for model in (rounded, wide):
        torch.manual_seed(0)
        lora.add_lora(model, 4)
        with_random_updates(model)
        loss = model(IDX[:, :-1], IDX[:, 1:])
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert gradients and all(gradient is not None for gradient in gradients.values())
        results.append((loss, gradients, model.hf_state_dict()))
    (loss, gradients, weights), (wide_loss, wide_gradients, wide_weights) = results
    assert torch.equal(loss, wide_loss)
    assert all(torch.equal(gradient, wide_gradients[name]) for name, gradient in gradients.items())
    assert all(torch.equal(tensor, wide_weights[name]) for name, tensor in weights.items())
    assert {p.dtype for name, p in rounded.named_parameters() if name.endswith("frozen")} == {torch.bfloat16}
    assert {p.dtype for name, p in rounded.named_parameters() if not name.endswith("frozen")} == {torch.float32}


def test_in_bf16_a_layer_computes_in_bf16_whatever_its_base() -> None:
    """With a bias; gradients are those of an fp32 base with the same numbers, up to one rounding."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(16, 24)
    plain.weight.data = plain.weight.data.bfloat16().float()
    layers = [lora.LoRALinear(plain, 4)]
    stored = torch.nn.Linear(16, 24)
    stored.load_state_dict(plain.state_dict())
    stored.weight.data = stored.weight.data.bfloat16()
    layers.append(lora.LoRALinear(stored, 4))
    results = []
    for layer in layers:
        torch.manual_seed(1)
        torch.nn.init.normal_(layer.up)
        layer.down.data = layers[0].down.data.clone()
        x = torch.randn(3, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
        results.append((y.float(), x.grad, layer.up.grad, layer.down.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0.03, atol=0.03 * float(want.detach().abs().max()))


def test_a_bf16_folder_trains_and_resumes_as_in_fp32(base: Path, chats: Path, tmp_path: Path) -> None:
    """The same weights as from the same folder in fp32; interrupted after 3 steps, the same again."""
    left_out = shutil.ignore_patterns("checkpoints", "run.toml", "manifest.json")

    def train(name: str, out: str, *options: str) -> dict[str, torch.Tensor]:
        command = ["sft", str(tmp_path / name), str(chats), "--lora", "4", "--steps", "6", "--dtype", "fp32",
                   "--compile", "off", "--out", str(tmp_path / out), "--debug", *options]  # fmt: skip
        assert main(command) == 0
        return load_file(tmp_path / out / "model.safetensors")

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        shutil.copytree(base, tmp_path / name, ignore=left_out)
        tensors = {key: x.bfloat16().to(dtype) for key, x in load_file(base / "model.safetensors").items()}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    expected = train("fp32", "wide")
    assert all(torch.equal(x, expected[key]) for key, x in train("bf16", "narrow").items())
    train("bf16", "again", "--save-every", "3")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    assert main(["resume", str(tmp_path / "again"), "--debug"]) == 0
    resumed = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(x, expected[key]) for key, x in resumed.items())


def test_a_compiled_layer_keeps_no_widened_matrix() -> None:
    """Of a frozen matrix in bf16, the backward pass keeps the 16 bits: widened, all matrices would fill the memory."""
    layer = lora.LoRALinear(torch.nn.Linear(24, 40, bias=False).bfloat16(), 4)
    kept: list[tuple[torch.Size, torch.dtype]] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append((x.shape, x.dtype))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        torch.compile(layer)(torch.randn(8, 24, requires_grad=True))
    assert ((40, 24), torch.bfloat16) in kept and not {((40, 24), torch.float32), ((24, 40), torch.float32)} & {*kept}
