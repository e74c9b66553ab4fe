"""A run folder is a Hugging Face folder: `transformers` loads it, and computes and generates the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from folders import write_model
from safetensors.torch import save_file

from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.inference import generate
from bardlet.run import hf
from bardlet.runtime import manifest

transformers = pytest.importorskip("transformers")

WINDOW = ["--block-size", "128", "--steps", "8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """Train a short run of each family with each kind of tokenizer, from the command line."""
    from bardlet.cli import main

    folder, runs = tmp_path_factory.mktemp("runs"), {}
    for model in ("gpt2", "qwen3"):
        for kind in ("char", "byte", "bpe"):
            out = folder / f"{model}-{kind}"
            vocabulary = ["--vocab-size", "300"] if kind == "bpe" else []
            assert main(["train", str(text), "--out", str(out), "--model", model, "--tokenizer", kind, *vocabulary,
                         *TINY, *WINDOW, "--json"]) == 0
            runs[f"{model}-{kind}"] = out
    return runs


NAMES = [f"{model}-{kind}" for model in ("gpt2", "qwen3") for kind in ("char", "byte", "bpe")]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_samples_by_default_as_bardlet_does(name: str, runs: dict[str, Path]) -> None:
    """Greedy decoding, its own default, makes a small model repeat itself."""
    config = transformers.GenerationConfig.from_pretrained(runs[name])
    assert (config.do_sample, config.temperature, config.top_k) == (True, 0.8, 50)
    assert transformers.AutoModelForCausalLM.from_pretrained(runs[name]).generation_config.do_sample


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same_logits(name: str, runs: dict[str, Path]) -> None:
    """Load it with AutoModelForCausalLM, without remote code: logits agree within 1e-5 in float32."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(runs[name])
    ours, _ = hf.read_folder(runs[name])
    assert next(theirs.parameters()).dtype == torch.float32
    torch.manual_seed(0)
    idx = torch.randint(ours.config.vocab_size, (3, 128))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_generates_the_same_100_tokens(name: str, runs: dict[str, Path]) -> None:
    """Greedy decoding with model.generate(**tok(prompt, return_tensors="pt")), as users call it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(runs[name])
    tok = transformers.AutoTokenizer.from_pretrained(runs[name])
    ours, tokenizer = hf.read_folder(runs[name])
    prompt = "the little bard"
    theirs = model.generate(**tok(prompt, return_tensors="pt"), max_new_tokens=100, do_sample=False)[0].tolist()
    start = tokenizer.encode(prompt).tolist()
    assert theirs[: len(start)] == start
    assert theirs[len(start) :] == generate.generate(ours, [start], 100, temperature=0)[0]
    assert tok.decode(theirs) == tokenizer.decode(theirs)


@pytest.mark.parametrize("name", ["gpt2-char", "gpt2-byte", "gpt2-bpe"])
def test_transformers_tokenizes_the_same(name: str, runs: dict[str, Path]) -> None:
    """Compare the ids of 1,000 random strings; for a char tokenizer, of its own characters."""
    tok = transformers.AutoTokenizer.from_pretrained(runs[name])
    _, tokenizer = hf.read_folder(runs[name])
    draw = random.Random(0)
    mixed = "the bard \n\t'sZ0é漢🦊\u200d\u0301 \u00a0" + "".join(map(chr, range(1, 700)))
    letters = tokenizer.alphabet if name.endswith("char") else mixed
    for _ in range(1000):
        string = "".join(draw.choices(letters, k=draw.randrange(1, 40)))
        assert tok(string)["input_ids"] == tokenizer.encode(string).tolist(), repr(string)
        assert tok.decode(tok(string)["input_ids"]) == string


@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_init_from_a_folder_of_transformers(model: str, runs: dict[str, Path], text: Path, tmp_path: Path,
                                            bardlet: Callable[..., dict[str, Any]]) -> None:
    """A model saved with save_pretrained loads with --init, trains, and loads in transformers again."""
    source = runs[f"{model}-bpe"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "theirs")
    before, _ = hf.read_folder(tmp_path / "theirs")
    own, _ = hf.read_folder(source)
    for (name, p), q in zip(before.named_parameters(), own.parameters(), strict=True):
        assert torch.equal(p, q), name
    bardlet("train", text, "--init", tmp_path / "theirs", "--out", tmp_path / "more", "--steps", "3", *TINY[-4:])
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    assert not torch.equal(after.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_init_with_a_padded_vocabulary(model: str, runs: dict[str, Path], text: Path, tmp_path: Path,
                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """7 more embedding rows than tokens, like the published Qwen3 weights: train, eval and sample work."""
    source = runs[f"{model}-bpe"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
    theirs.resize_token_embeddings(307, mean_resizing=False)
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "theirs")
    bardlet("train", text, "--init", tmp_path / "theirs", "--out", tmp_path / "run", "--steps", "3", *TINY[-4:])
    assert bardlet("eval", tmp_path / "run")["tokens"] > 0
    assert bardlet("sample", tmp_path / "run", "--tokens", "5", "--top-k", "1")["completions"]


def test_init_refuses_another_shape(runs: dict[str, Path], text: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """The base's own shape is fine, and so is its run.toml. --block-size may be shorter than the model's context."""
    from bardlet.cli import main
    from bardlet.config.pretraining import TrainConfig
    from bardlet.run.folder import read_run

    base = runs["gpt2-char"]
    command = ["train", str(text), "--init", str(base), "--out", str(tmp_path / "run"), *TINY[-4:]]
    for setting, message in ((["--n-embd", "192"], "--n-embd 192: --init "),
                             (["--tokenizer", "bpe"], "has tokenizer = char,"),
                             (["--no-tie-embeddings"], "drop --no-tie-embeddings")):
        assert main([*command, *setting]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
    own = read_run(base)[0]
    assert isinstance(own, TrainConfig)
    assert main([*command, "--config", str(base / "run.toml"), "--n-embd", str(own.n_embd), "--tokenizer", "char",
                 "--model", "gpt2", "--steps", "2", "--block-size", "32"]) == 0
    assert "ignored" not in capsys.readouterr().err
    config, _ = read_run(tmp_path / "run")
    assert (config.model, config.block_size) == ("gpt2", 32)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["n_positions"] == 128


@pytest.mark.parametrize("change, fragments", [
    ({"model_type": "gemma"}, ["'gemma'", "gpt2", "qwen3"]),
    ({"n_embd": 10**12}, ["config.json"]),
    ({"n_head": "two"}, ["n_head"]),
])
def test_an_unsupported_config_is_one_line(change: dict[str, Any], fragments: list[str], runs: dict[str, Path],
                                           tmp_path: Path) -> None:
    """The line names the file and the key; absurd sizes allocate nothing."""
    for path in runs["gpt2-char"].iterdir():
        if path.is_file() and path.name != "manifest.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BardletError) as caught:
        hf.read_folder(tmp_path)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_the_hash_of_sharded_weights(tmp_path: Path) -> None:
    """The hash of shards changes with any of them; the hash of one file is its sha256."""
    shards = {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.zeros(3)}}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hf.read_weights(tmp_path).keys() == {"x", "y"}
    before = hf.weights_hash(tmp_path)
    save_file({"y": torch.ones(3)}, tmp_path / "b.safetensors")
    assert hf.weights_hash(tmp_path) != before
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert hf.weights_hash(tmp_path) == manifest.sha256(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("family", "chats"), [("qwen3", True), ("qwen3", False), ("gpt2", True)])
def test_a_qwen3_that_chats_says_where_its_answer_is(family: str, chats: bool, tmp_path: Path) -> None:
    """`transformers serve` reads others by Qwen's template. In a padded batch, padding follows the end."""
    transformers = pytest.importorskip("transformers")
    folder = write_model(tmp_path / "model", family)
    model, tokenizer = hf.read_folder(folder)
    tokenizer.chat_template = chat_template.TEMPLATE if chats else None
    hf.write_folder(folder, model, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if not (chats and family == "qwen3"):
        assert getattr(theirs, "response_template", None) is None
        return
    if not hasattr(theirs, "parse_response"):
        pytest.skip("transformers 4 does not know a response template")
    message = [{"role": "user", "content": "sing"}]
    prompt = theirs.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    answer = theirs("the bards<|end|><|pad|><|pad|>")["input_ids"]
    assert theirs.parse_response(answer, prefix=prompt)["content"] == "the bards"
