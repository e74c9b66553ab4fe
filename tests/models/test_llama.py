from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import precision
import pytest
import torch
from safetensors.torch import load_file, save_file

from bardlet.config.model import ModelConfig, RopeScaling
from bardlet.errors import BardletError
from bardlet.inference.generate import generate
from bardlet.models.layers import rope_cos_sin
from bardlet.models.llama import Block, Llama
from bardlet.run.stored import StoredTensors

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
CONFIG = ModelConfig("qwen3", vocab_size=29, block_size=128, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=6,
                     n_inner=48, activation="silu", norm_eps=1e-6)  # fmt: skip
LLAMA_3 = RopeScaling(factor=8.0, low=1.0, high=4.0, context=40)
VARIANTS = {
    "qwen3, grouped, narrow heads": CONFIG,
    "qwen3, untied, wide heads": replace(CONFIG, tie_embeddings=False, n_kv_head=4, head_dim=10),
    "qwen3, theta, eps": replace(CONFIG, rope_theta=300.0, norm_eps=1e-3, n_kv_head=1),
    "qwen3, biases": replace(CONFIG, attention_bias=True),
    "llama, untied": replace(CONFIG, model="llama", n_kv_head=4, head_dim=8, tie_embeddings=False, norm_eps=1e-5),
    "llama, tied, grouped": replace(CONFIG, model="llama", head_dim=8, rope_theta=100_000.0),
    "llama, biases, narrow heads": replace(CONFIG, model="llama", attention_bias=True),
    "llama, scaled positions": replace(CONFIG, model="llama", head_dim=16, rope_theta=500.0, rope_scaling=LLAMA_3),
    "mistral, wide heads": replace(CONFIG, model="mistral", head_dim=10, tie_embeddings=False),
    "qwen2, tied": replace(CONFIG, model="qwen2", head_dim=8),
    "qwen2, untied, one key head": replace(CONFIG, model="qwen2", head_dim=8, n_kv_head=1, tie_embeddings=False),
    "smollm3, every second layer without positions": replace(
        CONFIG, model="smollm3", head_dim=8, n_layer=3, layers_without_positions=(1,)),
    "smollm3, biases, no positions at all": replace(
        CONFIG, model="smollm3", head_dim=8, layers_without_positions=(0, 1), attention_bias=True),
}


def random_model(config: ModelConfig) -> Llama:
    torch.manual_seed(0)
    model = Llama(config).eval()
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
    restored = Llama.from_hf(json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8")))
    assert restored == config
    loaded = Llama(restored).eval()
    loaded.load_hf_state_dict(load_file(tmp_path / "theirs" / "model.safetensors"))
    torch.testing.assert_close(loaded(idx), theirs(idx).logits, **CLOSE)
    assert not torch.allclose(loaded(idx), ours(idx))


@pytest.mark.parametrize("variant", VARIANTS)
def test_100_greedy_tokens_match_transformers(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = random_model(VARIANTS[variant])
    write_folder(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=False)
    assert generate(ours, [prompt[0].tolist()], 100, temperature=0) == [expected[0, 5:].tolist()]


def test_state_dict_is_the_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for config in VARIANTS.values():
        ours = random_model(config)
        write_folder(ours, tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
        saved, own = load_file(tmp_path / "theirs" / "model.safetensors"), ours.hf_state_dict()
        assert saved.keys() == own.keys() == ours.state_dict().keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(own[name], saved[name]) and torch.equal(tensor, saved[name])


@torch.no_grad()
def test_checkpoint_with_the_tied_head_loads() -> None:
    ours, other = random_model(CONFIG), Llama(CONFIG).eval()
    idx = torch.randint(CONFIG.vocab_size, (1, 9))
    tensors = ours.hf_state_dict()
    other.load_hf_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert torch.equal(other(idx), ours(idx))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
@torch.no_grad()
def test_the_frequencies_in_an_old_checkpoint_are_left_out(name: str, tmp_path: Path) -> None:
    """As transformers does."""
    from transformers import AutoModelForCausalLM

    ours = random_model(VARIANTS["llama, untied"])
    write_folder(ours, tmp_path)
    wrong = torch.full((4,), 7.0)
    save_file(ours.hf_state_dict() | {name: wrong}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    idx = torch.randint(29, (1, 40))
    wanted = ours(idx)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(idx).logits, wanted, **CLOSE)
    other = Llama(ours.config).eval()
    other.load_hf_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(idx), wanted)
    other.load_hf_state_dict(StoredTensors([tmp_path / "model.safetensors"]))
    assert torch.equal(other(idx), wanted)


def test_mismatched_weights_are_named() -> None:
    model = Llama(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor + 1 for name, tensor in model.hf_state_dict().items()}
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.input_layernorm.weight"}
    with pytest.raises(BardletError, match=r"no tensor 'model\.layers\.1\.input_layernorm\.weight'"):
        model.load_hf_state_dict(missing)
    with pytest.raises(BardletError, match=r"unexpected tensor 'model\.extra'"):
        model.load_hf_state_dict(tensors | {"model.extra": torch.zeros(1)})
    with pytest.raises(BardletError, match=r"'model\.embed_tokens\.weight' has shape \[5, 32\].*\[29, 32\]"):
        model.load_hf_state_dict(tensors | {"model.embed_tokens.weight": torch.zeros(5, 32)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'model_type' is 'gpt2'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'rope_scaling': 'rope_type' is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_type' is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'rope_type' is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "no 'low_freq_factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is 0.5"),
        ({"model_type": "mistral", "sliding_window": 64}, "a sliding window of 64 tokens"),
        ({"model_type": "qwen2", "attention_bias": True}, "'attention_bias' is True"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "'no_rope_layers' is"),
        ({"rope_parameters": 3}, "'rope_parameters' is 3"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 5}, "'head_dim' is 5"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"num_hidden_layers": 2.5}, "'num_hidden_layers' is 2.5"),
    ],
)
def test_unsupported_config_is_refused(change: dict[str, Any], message: str) -> None:
    assert Llama.from_hf(Llama.to_hf(CONFIG)) == CONFIG
    with pytest.raises(BardletError, match=message):
        Llama.from_hf(Llama.to_hf(CONFIG) | change)


def test_missing_config_entries_get_hugging_face_defaults() -> None:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config

    small: dict[str, Any] = {"vocab_size": 29, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    kinds: dict[str, Any] = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig, "smollm3": SmolLM3Config}
    for name, kind in {**kinds, "mistral": MistralConfig}.items():
        assert Llama.from_hf(small | {"model_type": name}) == Llama.from_hf(kind(**small).to_dict())
    for name, kind in {**kinds, "mistral": MistralConfig}.items():  # transformers' default of key-value heads decides
        heads = {key: value for key, value in small.items() if key != "num_key_value_heads"}
        heads |= {"num_attention_heads": 32, "hidden_size": 64}
        by_default = Llama.from_hf(heads | {"model_type": name})
        assert by_default == Llama.from_hf(kind(**heads).to_dict()), name
        assert (by_default.n_kv_head == 32) is (name in ("llama", "qwen2", "qwen3"))
        null = heads | {"num_key_value_heads": None}
        assert Llama.from_hf(null | {"model_type": name}).n_kv_head == 32
        if name != "mistral":  # which transformers 5 refuses
            assert Llama.from_hf(null | {"model_type": name}) == Llama.from_hf(kind(**null).to_dict()), name
    with pytest.raises(BardletError, match="a sliding window of 4096 tokens"):
        Llama.from_hf(small | {"model_type": "mistral", "max_position_embeddings": 8192})
    hf_4 = {key: value for key, value in Llama.to_hf(CONFIG).items() if key != "rope_parameters"}
    hf_5 = {key: value for key, value in Llama.to_hf(CONFIG).items() if key != "rope_theta"}
    for hf in (hf_4 | {"rope_theta": 7.0}, hf_5 | {"rope_parameters": {"rope_theta": 7.0}}):
        assert Llama.from_hf(hf) == replace(CONFIG, rope_theta=7.0)


def test_initialization() -> None:
    torch.manual_seed(0)
    model = Llama(replace(CONFIG, n_layer=8, n_embd=64, n_inner=256, tie_embeddings=False))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            std = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # 1 / sqrt(2 * 8)
            assert 0.9 * std < float(parameter.detach().std()) < 1.1 * std, name
    torch.manual_seed(0)
    again = Llama(model.config)
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
    block = dropping.model.layers[0]
    assert isinstance(block, Block)
    x = torch.randn(64, 16, 32)
    block.eval()
    cos, sin = rope_cos_sin(torch.arange(16)[None], CONFIG.head_dim, CONFIG.rope_theta)
    with torch.no_grad():
        without_dropout = block.self_attn.train()(x, cos, sin)
        assert torch.equal(without_dropout, block.self_attn.eval()(x, cos, sin))
        block.dropout.train()  # on both residual branches
        assert not torch.equal(block(x, cos, sin), block(x, cos, sin))


def bf16_errors(compiled: bool, fault: str = "none") -> tuple[float, float]:
    """Return (mean change of a token's loss in nats, relative change of the gradient) by bf16 autocast."""
    model = random_model(CONFIG).train()
    return precision.bf16_errors(model, model.model.layers, model.model.layers[0].self_attn.o_proj, compiled, fault)


LOSS_BOUND, GRADIENT_BOUND = 0.019, 0.061
"""1.5 times the worst of ten seeds (0.0121 nats of 3.9, and 0.0402), the same with AVX-512 and with AVX2."""


def test_blocks_compile_to_one_graph_each_and_train_in_bf16() -> None:
    """torch.compile captures a block as one graph, and bf16 autocast barely changes loss and gradient."""
    loss, gradient = bf16_errors(compiled=True)
    assert loss < LOSS_BOUND and gradient < GRADIENT_BOUND


@pytest.mark.parametrize("fault", ["a channel scaled by 1.5", "a channel of zeros"])
def test_the_bounds_on_bf16_blocks_detect_a_fault(fault: str) -> None:
    """In the output projection of the first attention."""
    loss, gradient = bf16_errors(False, fault)
    assert loss > LOSS_BOUND and gradient > GRADIENT_BOUND
