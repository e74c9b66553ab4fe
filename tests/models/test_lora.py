"""LoRA: a change that begins as none, what learns, what files get; runs that go on; what people get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_run
from processes import power_cut
from safetensors.torch import load_file

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


def moved(model: Any) -> Any:
    """The model with changes that are not nothing."""
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, lora.LoRALinear):
            torch.nn.init.normal_(layer.up, std=0.1)
    return model


@pytest.mark.parametrize("shape", [QWEN3, GPT2])
def test_it_begins_as_the_model_and_ends_as_the_sum(shape: ModelConfig) -> None:
    model = models.build(shape).eval()
    before, weights = model(IDX), {name: x.clone() for name, x in model.hf_state_dict().items()}
    lora.add_lora(model, 4)
    assert torch.equal(model(IDX), before)
    assert all(torch.equal(x, weights[name]) for name, x in model.hf_state_dict().items())
    logits = moved(model)(IDX)
    assert (logits - before).abs().max() > 0.01
    merged = models.build(shape).eval()
    merged.load_hf_state_dict(model.hf_state_dict())
    torch.testing.assert_close(merged(IDX), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [QWEN3, GPT2])
def test_the_decoder_reads_the_sum(shape: ModelConfig) -> None:
    model = models.build(shape).eval()
    lora.add_lora(model, 4)
    moved(model)
    with torch.inference_mode():
        decoder, cache = decoders.decoder(model), model.new_cache(2)
        read = decoder.cache(cache)
        logits = [decoder(column, read) for column in IDX.T]
        torch.testing.assert_close(torch.stack(logits, 1), model(IDX), atol=1e-4, rtol=1e-4)


def test_what_is_loaded_is_the_whole_layer() -> None:
    model = models.build(QWEN3).eval()
    weights = {name: x.clone() for name, x in model.hf_state_dict().items()}
    before = model(IDX)
    lora.add_lora(model, 4)
    moved(model).load_hf_state_dict(weights)
    assert torch.equal(model(IDX), before)


def test_only_the_factors_learn_and_a_new_head() -> None:
    model = models.build(QWEN3)
    lora.add_lora(model, 4)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 2 * 7 and all(name.endswith((".up", ".down")) for name in learning)
    groups = optim.parameter_groups(model, True)
    assert {name for group in groups.values() for name, _ in group} == learning
    scorer = with_scalar_head(models.build(QWEN3))
    lora.add_lora(scorer, 4)
    assert {name for name, p in scorer.named_parameters() if p.requires_grad} == learning | {"score.weight"}


def test_what_is_frozen_stays_bit_for_bit(base: Path, chats: Path, tmp_path: Path) -> None:
    assert main(["sft", str(base), str(chats), "--lora", "2", "--steps", "20", "--dtype", "fp32", "--compile", "off",
                 "--out", str(tmp_path / "run"), "--debug"]) == 0  # fmt: skip
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys()
    matrices = {name for name in before if "_proj" in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == matrices
    for name in matrices:  # the change has the rank that was asked for
        s = torch.linalg.svdvals((after[name] - before[name]).double())
        assert s[1] > 1e-4 > 100 * s[2]


@pytest.mark.parametrize("words", [["sft"], ["train"], ["grpo", "--reward", "exact"], ["ppo", "--reward", "exact"]],
                         ids=lambda words: words[0])  # fmt: skip
def test_a_run_goes_on_bit_for_bit(words: list[str], base: Path, chats: Path, tmp_path: Path,
                                   bardlet: Callable[..., dict[str, Any]]) -> None:
    kind, *rest = words
    what = [base.parent / "text.txt", "--init", base] if kind == "train" else [base, chats]
    own = ["--rollout", "16", "--answer-tokens", "6"] if rest else []
    words = [kind, *map(str, what), *rest, *own, "--lora", "2", "--steps", "10", "--save-every", "5", "--batch-size",
             "8", "--dtype", "fp32", "--compile", "off", "--keep", "average"]  # fmt: skip
    bardlet(*words, "--out", tmp_path / "whole")
    power_cut([*words, "--out", tmp_path / "again"])
    assert bardlet("resume", tmp_path / "again")["resumed_from"] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "again", 10)
    assert hf.read_model_config(tmp_path / "whole") == hf.read_model_config(base)


@pytest.mark.parametrize(("rank", "what"), [
    ("0", "--lora 0: it must be at least 1"),
    ("500", "--lora 500: this model's matrices have a rank of at most 32"),
])
def test_what_people_get_wrong_is_one_line(rank: str, what: str, base: Path, chats: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(base), str(chats), "--lora", rank, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert what in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_without_a_model_there_is_nothing_to_change() -> None:
    with pytest.raises(Exception, match="--lora 4: is a change of a model that has learned already"):
        TrainConfig(lora=4)
