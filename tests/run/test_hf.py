"""A run folder is a Hugging Face folder: what bardlet trained, `transformers` loads, computes and writes the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from bardlet.errors import BardletError
from bardlet.inference import generate
from bardlet.run import hf
from bardlet.runtime import manifest

transformers = pytest.importorskip("transformers")

WINDOW = ["--block-size", "128", "--steps", "8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """A short run of each family with each kind of tokenizer, trained through the command line."""
    from bardlet.cli import main

    folder, made = tmp_path_factory.mktemp("runs"), {}
    for model in ("gpt2", "qwen3"):
        for kind in ("char", "byte", "bpe"):
            out = folder / f"{model}-{kind}"
            vocabulary = ["--vocab-size", "300"] if kind == "bpe" else []
            assert main(["train", str(text), "--out", str(out), "--model", model, "--tokenizer", kind, *vocabulary,
                         *TINY, *WINDOW, "--json"]) == 0
            made[f"{model}-{kind}"] = out
    return made


NAMES = [f"{model}-{kind}" for model in ("gpt2", "qwen3") for kind in ("char", "byte", "bpe")]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same_logits(name: str, runs: dict[str, Path]) -> None:
    """AutoModelForCausalLM.from_pretrained(run), no remote code: logits within 1e-5 in float32."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(runs[name])
    ours, _ = hf.read_folder(runs[name])
    assert next(theirs.parameters()).dtype == torch.float32
    torch.manual_seed(0)
    idx = torch.randint(ours.config.vocab_size, (3, 128))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_writes_the_same_100_tokens(name: str, runs: dict[str, Path]) -> None:
    """model.generate(**tok(prompt, return_tensors="pt")), as users type it, greedily: the same 100 tokens."""
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
def test_transformers_gives_the_same_ids(name: str, runs: dict[str, Path]) -> None:
    """AutoTokenizer.from_pretrained(run): the ids of 1,000 random strings, over the vocabulary with char."""
    tok = transformers.AutoTokenizer.from_pretrained(runs[name])
    _, tokenizer = hf.read_folder(runs[name])
    draw = random.Random(0)
    wild = "the bard \n\t'sZ0é漢🦊\u200d\u0301 \u00a0" + "".join(map(chr, range(1, 700)))
    letters = tokenizer.alphabet if name.endswith("char") else wild
    for _ in range(1000):
        string = "".join(draw.choices(letters, k=draw.randrange(1, 40)))
        assert tok(string)["input_ids"] == tokenizer.encode(string).tolist(), repr(string)
        assert tok.decode(tok(string)["input_ids"]) == string


@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_a_folder_of_transformers_is_trained_on(model: str, runs: dict[str, Path], text: Path, tmp_path: Path,
                                                bardlet: Callable[..., dict[str, Any]]) -> None:
    """Saved by transformers' save_pretrained and given to --init: loads, trains, and is loaded again."""
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
def test_a_vocabulary_with_rows_to_spare_is_trained_on(model: str, runs: dict[str, Path], text: Path, tmp_path: Path,
                                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """As Qwen3's own uploads have: 7 rows more than the tokenizer has tokens. Trains, samples, is measured."""
    source = runs[f"{model}-bpe"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
    theirs.resize_token_embeddings(307, mean_resizing=False)
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "theirs")
    bardlet("train", text, "--init", tmp_path / "theirs", "--out", tmp_path / "run", "--steps", "3", *TINY[-4:])
    assert bardlet("eval", tmp_path / "run")["tokens"] > 0
    assert bardlet("sample", tmp_path / "run", "--tokens", "5", "--top-k", "1")["completions"]


def test_init_decides_the_shape_and_says_so(runs: dict[str, Path], text: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """Settings that the weights decide are named, also where they equal a default; windows may be shorter."""
    from bardlet.cli import main
    from bardlet.run.folder import read_run

    assert main(["train", str(text), "--init", str(runs["gpt2-char"]), "--out", str(tmp_path / "run"), "--steps", "2",
                 "--model", "qwen3", "--n-embd", "192", "--block-size", "32", *TINY[-4:]]) == 0
    assert "--model, --n-embd: not used, --init" in capsys.readouterr().err
    config, _ = read_run(tmp_path / "run")
    assert (config.model, config.block_size) == ("gpt2", 32)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["n_positions"] == 128


@pytest.mark.parametrize("change, words", [
    ({"model_type": "llama"}, ["'llama'", "gpt2", "qwen3"]),
    ({"n_embd": 10**12}, ["config.json"]),
    ({"n_head": "two"}, ["n_head"]),
])
def test_a_config_that_cannot_be_computed_is_named(change: dict[str, Any], words: list[str], runs: dict[str, Path],
                                                   tmp_path: Path) -> None:
    """One line with the file and the key; nothing is allocated for absurd sizes."""
    for path in runs["gpt2-char"].iterdir():
        if path.is_file() and path.name != "manifest.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BardletError) as caught:
        hf.read_folder(tmp_path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_weights_in_several_files_have_one_hash(tmp_path: Path) -> None:
    """One file's hash is that of its bytes; of parts it changes with any of them, and all of them are read."""
    parts = {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.zeros(3)}}
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hf.read_weights(tmp_path).keys() == {"x", "y"}
    before = hf.weights_hash(tmp_path)
    save_file({"y": torch.ones(3)}, tmp_path / "b.safetensors")
    assert hf.weights_hash(tmp_path) != before
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert hf.weights_hash(tmp_path) == manifest.sha256(tmp_path / "model.safetensors")
