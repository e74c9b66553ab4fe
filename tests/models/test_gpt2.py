from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import precision
import pytest
import torch
from safetensors.torch import load_file, save_file

from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.inference.generate import generate
from bardlet.models.gpt2 import GPT2, Block

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
CONFIG = ModelConfig("gpt2", vocab_size=29, block_size=128, n_layer=2, n_head=4, n_kv_head=4, n_embd=32, head_dim=8,
                     n_inner=96)  # fmt: skip
VARIANTS = {
    "gelu_new": CONFIG,
    "gelu, untied": replace(CONFIG, activation="gelu", tie_embeddings=False),
    "relu, eps": replace(CONFIG, activation="relu", norm_eps=1e-3),
}


def random_model(config: ModelConfig) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def write_folder(model: Any, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.to_hf(model.config) | NO_IDS), encoding="utf-8")
    save_file(model.hf_state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_parity_with_transformers_in_both_directions(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = VARIANTS[variant]
    ours = random_model(config)
    idx = torch.randint(config.vocab_size, (3, config.block_size))
    write_folder(ours, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(ours(idx), theirs(idx).logits, **CLOSE)

    for parameter in theirs.parameters():  # change the weights, so that the way back has to carry them
        parameter.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    restored = GPT2.from_hf(json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8")))
    assert restored == config
    loaded = GPT2(restored).eval()
    loaded.load_hf_state_dict(load_file(tmp_path / "theirs" / "model.safetensors"))
    torch.testing.assert_close(loaded(idx), theirs(idx).logits, **CLOSE)
    assert not torch.allclose(loaded(idx), ours(idx))


def test_100_greedy_tokens_match_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = random_model(CONFIG)
    write_folder(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=False)
    assert generate(ours, [prompt[0].tolist()], 100, temperature=0) == [expected[0, 5:].tolist()]


def test_state_dict_is_the_checkpoint_with_four_transposed_matrices(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for config in VARIANTS.values():
        ours = random_model(config)
        write_folder(ours, tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
        saved, own = load_file(tmp_path / "theirs" / "model.safetensors"), ours.hf_state_dict()
        assert saved.keys() == own.keys() == ours.state_dict().keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(own[name], saved[name]) and own[name].is_contiguous()
            transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            assert torch.equal(tensor.t() if transposed else tensor, saved[name])


@torch.no_grad()
def test_all_checkpoint_variants_load() -> None:
    ours, other = random_model(CONFIG), GPT2(CONFIG).eval()
    idx = torch.randint(CONFIG.vocab_size, (1, 9))
    tensors = ours.hf_state_dict()
    forms: dict[str, dict[str, torch.Tensor]] = {
        "with the tied head": tensors | {"lm_head.weight": tensors["transformer.wte.weight"]},
        "without the prefix": {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        "with the old mask buffers": tensors | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)},
    }
    for form in forms.values():
        other = GPT2(CONFIG).eval()
        assert not torch.allclose(other(idx), ours(idx))
        other.load_hf_state_dict(form)
        assert torch.equal(other(idx), ours(idx))


def test_mismatched_weights_are_named() -> None:
    model = GPT2(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor + 1 for name, tensor in model.hf_state_dict().items()}
    missing = {name: tensor for name, tensor in tensors.items() if name != "transformer.h.1.ln_2.bias"}
    with pytest.raises(BardletError, match=r"no tensor 'transformer\.h\.1\.ln_2\.bias'"):
        model.load_hf_state_dict(missing)
    with pytest.raises(BardletError, match=r"unexpected tensor 'transformer\.extra'"):
        model.load_hf_state_dict(tensors | {"transformer.extra": torch.zeros(1)})
    with pytest.raises(BardletError, match=r"'transformer\.wpe\.weight' has shape \[5, 32\].*\[128, 32\]"):
        model.load_hf_state_dict(tensors | {"transformer.wpe.weight": torch.zeros(5, 32)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'model_type' is 'llama'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"activation_function": "tanh"}, "'activation_function' is 'tanh'"),
        ({"n_head": 5}, "n_embd 32 is not divisible by n_head 5"),
        ({"n_embd": None}, "no 'n_embd'"),
        ({"n_layer": "2"}, "'n_layer' is '2', but must be a positive integer"),
        ({"vocab_size": 0}, "'vocab_size' is 0"),
        ({"n_head": True}, "'n_head' is True"),
        ({"layer_norm_epsilon": -1.0}, "'layer_norm_epsilon' is -1.0"),
    ],
)
def test_unsupported_config_is_refused(change: dict[str, Any], message: str) -> None:
    assert GPT2.from_hf(GPT2.to_hf(CONFIG)) == CONFIG
    with pytest.raises(BardletError, match=message):
        GPT2.from_hf(GPT2.to_hf(CONFIG) | change)


def test_missing_config_entries_get_hugging_face_defaults(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import GPT2Config

    small = {"model_type": "gpt2", "vocab_size": 29, "n_embd": 32, "n_head": 4, "n_layer": 2}
    full = GPT2Config(**{key: value for key, value in small.items() if key != "model_type"})
    assert GPT2.from_hf(small) == GPT2.from_hf(full.to_dict())
    with caplog.at_level(logging.WARNING, "bardlet"):
        assert GPT2.from_hf(small | {"embd_pdrop": 0.3}).dropout == 0.1
    assert "embd_pdrop differs" in caplog.text


def test_initialization() -> None:
    torch.manual_seed(0)
    model = GPT2(replace(CONFIG, n_layer=8, n_embd=64, n_inner=256, tie_embeddings=False))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            is_scale = ".ln_" in name and name.endswith("weight")
            assert torch.equal(parameter, torch.full_like(parameter, 1.0 if is_scale else 0.0)), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 1 / sqrt(2 * 8)
            assert 0.9 * std < float(parameter.detach().std()) < 1.1 * std, name
    torch.manual_seed(0)
    again = GPT2(model.config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_dropout_only_in_training() -> None:
    torch.manual_seed(0)
    idx = torch.randint(CONFIG.vocab_size, (2, 16))
    plain, dropping = random_model(CONFIG), random_model(replace(CONFIG, dropout=0.3))
    expected = plain(idx)
    assert torch.equal(plain.train()(idx), expected)
    assert torch.equal(dropping(idx), expected)
    dropping.train()
    assert not torch.equal(dropping(idx), dropping(idx))
    block = dropping.transformer.h[0]
    assert isinstance(block, Block)
    x = torch.randn(64, 16, 32)
    block.eval()
    with torch.no_grad():
        expected = block.attn(x)
        block.attn.train()
        mean = torch.stack([block.attn(x) for _ in range(200)]).mean(0)
        assert float((mean - expected).abs().mean()) < 0.1 * float(expected.abs().mean())  # scaled back up
        assert not torch.equal(block.attn(x), expected)
        block.eval()
        block.mlp.train()
        assert not torch.equal(block(x), block(x))


def bf16_errors(compiled: bool, fault: str = "none") -> tuple[float, float]:
    """Return (mean change of a token's loss in nats, relative change of the gradient) by bf16 autocast."""
    model = random_model(CONFIG).train()
    return precision.bf16_errors(model, model.transformer.h, model.transformer.h[0].attn.c_proj, compiled, fault)


LOSS_BOUND, GRADIENT_BOUND = 0.013, 0.016
"""1.5 times the worst of ten seeds (0.0085 nats of 4.1, and 0.0102), the same with AVX-512 and with AVX2."""


def test_blocks_compile_to_one_graph_each_and_train_in_bf16() -> None:
    """torch.compile captures a block as one graph, and bf16 autocast barely changes loss and gradient."""
    loss, gradient = bf16_errors(compiled=True)
    assert loss < LOSS_BOUND and gradient < GRADIENT_BOUND


@pytest.mark.parametrize("fault", ["a channel scaled by 1.5", "a channel of zeros", "no bias"])
def test_the_bounds_on_bf16_blocks_detect_a_fault(fault: str) -> None:
    """In the output projection of the first attention."""
    loss, gradient = bf16_errors(False, fault)
    assert loss > LOSS_BOUND and gradient > GRADIENT_BOUND
