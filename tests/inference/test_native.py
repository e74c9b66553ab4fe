"""The compiled step computes what the models compute, each row on its own."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bardlet.config.model import ModelConfig, RopeScaling
from bardlet.data.named import cache_folder
from bardlet.errors import BardletError
from bardlet.inference import decoders, readers
from bardlet.inference.decoders import native
from bardlet.inference.decoders import pages as paging
from bardlet.inference.decoders.native import GROUP
from bardlet.inference.decoders.pages import PAGE, Pages, page_dtype
from bardlet.inference.generate import generate
from bardlet.models import build
from bardlet.ops.linear import quantized
from bardlet.runtime import native as compilation

SOURCE = Path(native.__file__).with_name("step.cpp")
LLAMA = ModelConfig("llama", vocab_size=29, block_size=200, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=6,
                    n_inner=48, activation="silu", norm_eps=1e-6)  # fmt: skip
GPT2 = ModelConfig("gpt2", vocab_size=131, block_size=200, n_layer=2, n_head=3, n_kv_head=3, n_embd=30, head_dim=10,
                   n_inner=120)  # fmt: skip
CONFIGS = {
    "gpt2": GPT2,
    "gpt2, gelu, untied": replace(GPT2, activation="gelu", tie_embeddings=False),
    "gpt2, relu, one vector": replace(GPT2, activation="relu", n_embd=16, n_head=1, n_kv_head=1, head_dim=16),
    "llama": LLAMA,
    "llama, wide heads, biases": replace(LLAMA, head_dim=100, attention_bias=True, tie_embeddings=False),
    "llama, scaled positions": replace(LLAMA, head_dim=32, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 40)),
    "mistral, wider than a panel": replace(LLAMA, model="mistral", n_embd=136, n_inner=200),
    "qwen2": replace(LLAMA, model="qwen2", head_dim=64, n_kv_head=1),
    "qwen3": replace(LLAMA, model="qwen3", head_dim=48),
    "smollm3": replace(LLAMA, model="smollm3", layers_without_positions=(1,)),
}
DTYPES = [None, torch.bfloat16, torch.int8]

pytestmark = pytest.mark.skipif(compilation.library(SOURCE, cache_folder() / "compiled") is None,
                                reason="this machine has no C++ compiler that bardlet uses")


def random_model(config: ModelConfig) -> Any:
    torch.manual_seed(0)
    model = build(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def decoder(model: Any, dtype: torch.dtype | None) -> native.Decoder:
    made = native.decoder(model, dtype)
    assert made is not None
    return made


def read(decoder: Any, config: ModelConfig, rows: list[list[int]], together: bool = True) -> list[torch.Tensor]:
    """Return the logits of every token of each row: (T, V) each."""
    lengths = [len(row) for row in rows]
    kept = page_dtype(torch.device("cpu"), decoder.dtype)
    pages = Pages(config, kept, torch.device("cpu"), sum(-(-length // PAGE) for length in lengths))
    table, page = [], 1
    for length in lengths:
        table.append(list(range(page, page + -(-length // PAGE))))
        page += len(table[-1])
    parts = [range(len(rows))] if together else [[row] for row in range(len(rows))]
    logits = []
    for part in parts:
        idx = torch.tensor([token for row in part for token in rows[row]])
        step = decoder.step_class(pages, [table[row] for row in part for _ in rows[row]],
                            [position for row in part for position in range(lengths[row])])
        logits += decoder.logits(decoder.hidden(idx, step)).split([lengths[row] for row in part])
    return logits


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_it_computes_what_the_model_computes(name: str) -> None:
    """With errors of the size of the model's own, against float64."""
    config = CONFIGS[name]
    model = random_model(config)
    rows = [torch.randint(config.vocab_size, (length,)).tolist() for length in (1, 65, 150)]
    got = torch.cat(read(decoder(model, None), config, rows))
    own = torch.cat([model(torch.tensor([row]))[0] for row in rows])
    model.double()
    want = torch.cat([model(torch.tensor([row]))[0] for row in rows])
    assert float((got - want).abs().mean()) < 2 * float((own - want).abs().mean())


@pytest.mark.parametrize(("name", "dtype"), [
    ("gpt2", torch.bfloat16), ("qwen3", torch.bfloat16), ("gpt2", torch.int8), ("qwen3", torch.int8),
    ("mistral, wider than a panel", torch.int8)])  # fmt: skip
@torch.inference_mode()
def test_smaller_weights_are_used_as_they_are(name: str, dtype: torch.dtype) -> None:
    """A model with rounded weights in fp32 differs by the rounding of keys and values alone, which are bf16."""
    config = CONFIGS[name]
    model, rounded = random_model(config), random_model(config)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded_weight(module.weight, dtype)
    rounded.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
    embedding = rounded.transformer.wte if config.model == "gpt2" else rounded.model.embed_tokens
    rounded.lm_head.weight.data = rounded_weight(embedding.weight, dtype)
    idx = torch.randint(config.vocab_size, (150,))
    [got] = read(decoder(model, dtype), config, [idx.tolist()])
    plain, want = model(idx[None])[0], rounded(idx[None])[0]
    assert float((got - want).abs().mean()) < 0.01 * float(want.std())
    assert float((got - want).abs().mean()) < 0.5 * float((got - plain).abs().mean())


def rounded_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight as a decoder of that dtype has it, in fp32."""
    if dtype != torch.int8:
        return weight.to(dtype).float()
    q, scale = quantized(weight, GROUP)
    return q.float() * scale.float().repeat_interleave(GROUP, 1)[:, : weight.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@torch.inference_mode()
def test_a_row_does_not_depend_on_others_nor_on_threads(name: str, dtype: torch.dtype | None) -> None:
    """Bit for bit: from 1 to more than 24 rows, tokens of a prompt or of several sequences."""
    config = CONFIGS[name]
    made = decoder(random_model(config), dtype)
    rows = [torch.randint(config.vocab_size, (length,)).tolist() for length in (1, 2, 3, 6, 23, 24, 25, 64, 67, 130)]
    alone = read(made, config, rows, together=False)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            together = read(made, config, rows)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(1)
    one_by_one = [read(made, config, [rows[-1][: n + 1]])[0][-1] for n in range(0, 130, 13)]
    assert all(torch.equal(row, alone[-1][13 * n]) for n, row in enumerate(one_by_one))


@pytest.mark.parametrize("name", ["gpt2", "gpt2, gelu, untied", "qwen3"])
@pytest.mark.parametrize("part", ["norm", "attention", "feed-forward"])
@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_weights_that_are_not_finite_are_an_error(name: str, part: str, dtype: torch.dtype | None) -> None:
    """No rounding, maximum or clamp on the way hides them."""
    for value in (float("nan"), float("inf")):
        model = random_model(CONFIGS[name])
        block = model.transformer.h[0] if name != "qwen3" else model.model.layers[0]
        if name == "qwen3":
            weight = {"norm": block.self_attn.k_norm, "attention": block.self_attn.k_proj, "feed-forward":
                      block.mlp.gate_proj}[part].weight  # fmt: skip
        else:
            weight = {"norm": block.ln_1, "attention": block.attn.c_attn, "feed-forward": block.mlp.c_fc}[part].weight
        weight.data[-1] = value
        with pytest.raises(BardletError, match="not finite"):
            generate(model, [[1, 2, 3]], 5, seed=0, dtype=dtype)


def test_activations_are_exact_to_single_precision() -> None:
    """Of numbers from tiny to huge: they are biases of the inner layer, and channel 0 reads one of them at a time."""
    size = torch.logspace(-30, 20, 100)
    x = torch.cat([torch.linspace(-30, 30, 2001), size, -size])
    for activation, function in (("gelu_new", lambda x: F.gelu(x, approximate="tanh")), ("gelu", F.gelu),
                                 ("relu", F.relu)):  # fmt: skip
        config = replace(GPT2, activation=activation, n_layer=1, n_embd=16, n_head=1, n_kv_head=1, head_dim=16,
                         n_inner=len(x), vocab_size=len(x), tie_embeddings=False)
        model = build(config).eval()
        for parameter in model.parameters():
            parameter.data.zero_()
        block = model.transformer.h[0]
        block.mlp.c_fc.bias.data = x.clone()
        for at in range(0, len(x), 40):
            block.mlp.c_proj.weight.data.zero_()
            block.mlp.c_proj.weight.data[0, at] = 1.0
            with torch.inference_mode():
                made = decoder(model, None)
                pages = Pages(config, torch.float32, torch.device("cpu"), 1)
                got = made.hidden(torch.tensor([0]), made.step_class(pages, [[1]], [0]))[0, 0]
            torch.testing.assert_close(got, function(x.double())[at].float(), rtol=2e-6, atol=1e-7)


@torch.inference_mode()
def test_keys_and_values_may_be_wider_than_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 weights with fp32 pages, as on a processor that is no x86, whose prefixes are copied and cleared."""
    monkeypatch.setattr(paging, "has_fast_embedding_bag", lambda device, dtype: False)
    config = CONFIGS["qwen3"]
    model = random_model(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    prompts = [torch.randint(config.vocab_size, (length,)).tolist() for length in (130, 70, 1)]
    prompts.append(prompts[0][:100])
    want = generate(model, prompts, 60, temperature=0)
    assert generate(model.bfloat16(), prompts, 60, temperature=0) == want


def test_the_structures_of_both_languages_have_the_same_sizes() -> None:
    library = compilation.library(SOURCE, cache_folder() / "compiled")
    assert library is not None
    structures = (native.Matrix, native.Norm, native.Layer, native.Model, native.Step)
    sizes = (ctypes.c_int64 * (len(structures) + 3))()
    library.sizes(sizes)
    assert list(sizes) == [*map(ctypes.sizeof, structures), PAGE, native.PANEL, GROUP]


@pytest.mark.parametrize("flags", [(), ("-mavx2", "-mfma"), ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")])
@torch.inference_mode()
def test_every_processor_computes_the_same(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of sums, which depends on the length of a vector; no flags: code for any processor."""
    if not set(flags) <= set(compilation.processor_flags() or ()):
        pytest.skip(f"this processor lacks {' or '.join(flags)}")
    config = CONFIGS["mistral, wider than a panel"]
    model, ids = random_model(config), [torch.randint(config.vocab_size, (70,)).tolist()]
    want = {dtype: read(decoder(model, dtype), config, ids)[0] for dtype in DTYPES}
    monkeypatch.setattr(compilation, "processor_flags", lambda: flags)
    compilation.library.cache_clear()
    for dtype in DTYPES:
        got = read(decoder(model, dtype), config, ids)[0]
        # keys and values are bf16 for weights that are not fp32: a rounding of one of them may differ
        torch.testing.assert_close(got, want[dtype], rtol=1e-3, atol=1e-3 if dtype is None else 0.03)
    compilation.library.cache_clear()


def test_without_a_compiler_torch_decodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = random_model(CONFIGS["qwen3"])
    want = generate(model, [[1, 2, 3]], 50, temperature=0)
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path))
    for program in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", program)
        compilation.library.cache_clear()
        assert native.decoder(model, None) is None
        assert isinstance(readers.new_decoder(model, None), decoders.llama.Decoder)
        assert generate(model, [[1, 2, 3]], 50, temperature=0) == want
    compilation.library.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


def test_a_damaged_library_is_compiled_again(tmp_path: Path) -> None:
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    first = compilation.library.__wrapped__(source, tmp_path / "compiled")
    assert first is not None and first.answer() == 42
    [made] = (tmp_path / "compiled").iterdir()
    made.unlink()  # a loaded file must not change under the process
    made.write_bytes(b"not a library")
    again = compilation.library.__wrapped__(source, tmp_path / "compiled")
    assert again is not None and again.answer() == 42
    source.write_text("no C++")
    assert compilation.library.__wrapped__(source, tmp_path / "compiled") is None


def test_several_may_compile_at_the_same_time(tmp_path: Path) -> None:
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: compilation.library.__wrapped__(source, tmp_path / "compiled"), range(4)))
    assert [library and library.answer() for library in made] == [42] * 4
    assert len(list((tmp_path / "compiled").iterdir())) == 1


def test_other_models_have_no_compiled_step() -> None:
    config = ModelConfig("encdec", vocab_size=29, block_size=16, n_layer=1, n_encoder_layer=1, n_head=2, n_kv_head=2,
                         n_embd=8, head_dim=4, n_inner=16, activation="relu")  # fmt: skip
    assert native.decoder(build(config), None) is None
    assert native.decoder(random_model(LLAMA).double(), None) is None
