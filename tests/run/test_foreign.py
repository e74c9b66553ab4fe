"""Model folders in older or other forms: gpt2's two tokenizer files are read, the others named with a command.

Reports of people whose folders had no tokenizer.json, or pickled weights:
https://github.com/huggingface/transformers.js/issues/93, https://github.com/mgrankin/ru_transformers/issues/7,
https://github.com/lightonai/pylate/pull/68.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_model

from bardlet import tokenizer as tokenization
from bardlet.cli import main
from bardlet.errors import BardletError
from bardlet.run import foreign, hf

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt2 folder."""
    return write_model(tmp_path_factory.mktemp("model") / "gpt")


# ---------------------------------------------------------------- vocab.json and merges.txt

TEXT = ("Naïve café — the \t little\n\n  bards<|endoftext|> é\u0301 🦊👩\u200d👩\u200d👧 plain tool  "
        "<|pad|><|x|> <|y|> <e>\r\n"
        "\u00a0 don't we'll 1234  \u3000清明。   end  ")


def token(content: str, **properties: bool) -> dict[str, Any]:
    """Return a token as transformers writes it."""
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
            "special": True, "__type": "AddedToken", **properties}


SPECIALS: dict[str, dict[str, dict[str, Any]]] = {
    "two files": {},
    "special_tokens_map.json": {"special_tokens_map.json": {
        "eos_token": "<|endoftext|>", "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|x|>", token("<|y|>", lstrip=True)]}},
    "added_tokens.json": {"added_tokens.json": {"<|user|>": 302, "<|pad|>": 300, "plain": 301},
                          "special_tokens_map.json": {"pad_token": "<|pad|>", "additional_special_tokens": ["<|x|>"]}},
    "add_prefix_space": {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": token("<e>"),
                                                   "add_prefix_space": True}},
    "added_tokens_decoder": {"tokenizer_config.json": {
        "tokenizer_class": "GPT2Tokenizer", "pad_token": "<|q|>", "additional_special_tokens": ["<|x|>"],
        "added_tokens_decoder": {"301": token("tool", special=False, normalized=True), "300": token("<|x|>")}}},
}


def two_files(model: Path, folder: Path, extra: dict[str, dict[str, Any]]) -> Path:
    """Copy a model, and write its tokenizer as older versions of transformers did."""
    shutil.copytree(model, folder)
    pipeline = json.loads((folder / "tokenizer.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps(pipeline["model"]["vocab"]))
    merges = "".join(f"{a} {b}\n" for a, b in pipeline["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    for name, values in extra.items():
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("case", SPECIALS)
def test_gpt2s_two_files_give_the_ids_of_transformers(case: str, model: Path, tmp_path: Path) -> None:
    """With accents, emoji, runs of white space and special tokens as text; the added tokens have the same ids, too."""
    folder = two_files(model, tmp_path / "gpt", SPECIALS[case])
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder, split_special_tokens=True)
    ours = tokenization.load(folder)
    for text in (TEXT, TEXT[::-1], "", " ", "the little bards sang"):
        ids = ours.encode(text).tolist()
        assert ids == theirs(text)["input_ids"]
        assert case == "add_prefix_space" or ours.decode(ids) == text
    assert not set(ours.encode("<|endoftext|><|pad|><|x|>").tolist()) & set(ours.special)
    assert ours.vocab == theirs.get_vocab() and ours.vocab_size == len(theirs)
    assert set(ours.special.values()) == set(theirs.all_special_tokens)
    assert ours.eos_id == theirs.eos_token_id and theirs.pad_token_id in (None, ours.pad_id)


def test_a_run_from_two_files_writes_a_tokenizer_of_its_own(model: Path, tmp_path: Path, text: Path,
                                                            bardlet: Callable[..., dict[str, Any]]) -> None:
    """And every command reads the two files."""
    folder = two_files(model, tmp_path / "gpt", {})
    assert bardlet("doctor", folder)["damaged"] == 0
    assert bardlet("sample", folder, "--tokens", "3")["completions"]
    bardlet("train", text, "--init", folder, "--steps", "2", "--batch-size", "2", "--out", tmp_path / "run",
            "--compile", "off", "--dtype", "fp32")
    assert not (tmp_path / "run" / "vocab.json").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run", split_special_tokens=True)
    assert theirs(TEXT)["input_ids"] == tokenization.load(folder).encode(TEXT).tolist()


@pytest.mark.parametrize("name, content, message", [
    ("merges.txt", "#version: 0.2\nÄ Ö\n", "merges.txt: damaged or of another vocab.json"),
    ("merges.txt", "a b c\n", "merges.txt: damaged: the line 'a b c' is not two tokens; copy it again"),
    ("merges.txt", b"\xff\xfe", "merges.txt: cannot be read \\(not UTF-8\\)"),
    ("vocab.json", '{"a": -1}', "vocab.json: damaged: the id of 'a' is not an id"),
    ("vocab.json", '{"a": "0"}', "vocab.json: damaged: the id of 'a' is not an id"),
    ("vocab.json", '{"a": 99999999999}', "vocab.json: damaged: the id of 'a' is not an id"),
    ("vocab.json", "[", "vocab.json: damaged at line 1"),
    ("vocab.json", '{"清": 0}', "damaged"),
    ("added_tokens.json", '{"a": "x"}', "damaged"),
])
def test_damaged_files_of_gpt2s_tokenizer(name: str, content: str | bytes, message: str, model: Path,
                                          tmp_path: Path) -> None:
    folder = two_files(model, tmp_path / "gpt", {})
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BardletError, match=message) as error:
        tokenization.load(folder)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- folders of another form


def code_of(message: str) -> str:
    """Return the line of Python in a printed command, which a shell would take apart as `shlex` does."""
    command = re.search(r"`(.*)`", message)
    assert command, message
    words = shlex.split(command[1])
    assert words[:2] == ["python", "-c"] and len(words) == 3
    ast.parse(words[2])
    return words[2]


def error_of(folder: Path) -> str:
    with pytest.raises(BardletError) as error:
        hf.read_folder(folder)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{folder}: ")
    return str(error.value)


def pickled(model: Path, folder: Path, shards: bool = False) -> Path:
    """Copy a model with its weights as a pickle, as transformers wrote them before version 4.35."""
    shutil.copytree(model, folder)
    weights = {name: t.clone() for name, t in hf.read_weights(folder).items()}
    (folder / "model.safetensors").unlink()
    if not shards:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = sorted(weights)
    parts = {f"pytorch_model-0000{n}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", ["gpt", "it's a \"model\" $HOME", "sharded"])
def test_pickled_weights_are_converted_by_the_printed_command(name: str, model: Path, tmp_path: Path) -> None:
    folder = pickled(model, tmp_path / name, shards=name == "sharded")
    message = error_of(folder)
    assert "is a pickle, which bardlet never opens; convert it (pip install transformers): `python -c " in message
    exec(code_of(message))  # the printed line, which a user would paste
    converted, _ = hf.read_folder(tmp_path / f"{name}-safetensors")
    for a, b in zip(converted.parameters(), hf.read_folder(model)[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name, nested", [("model.ckpt", True), ("weights.pt", False), ("consolidated.00.pth", False)])
def test_a_checkpoint_beside_a_config_is_converted(name: str, nested: bool, model: Path, tmp_path: Path) -> None:
    folder = pickled(model, tmp_path / "gpt")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    torch.save({"state_dict": weights, "epoch": 3} if nested else weights, folder / name)
    torch.save({}, folder / "optimizer.pt")
    message = error_of(folder)
    assert f"{name} is a pickle, which bardlet never opens; convert it: " in message
    exec(code_of(message))
    assert hf.read_folder(folder)[0].config.model == "gpt2"
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    assert f"{name} is a checkpoint of another program, a pickle without a config.json" in error_of(folder)


@pytest.mark.parametrize("base, files", [
    ("me/gpt", ("adapter_config.json", "adapter_model.safetensors")),
    ('x"); import os; os.abort(); ("', ("adapter_config.json", "adapter_model.bin", "README.md")),
    (None, ("adapter_config.json",)),
    ("me/gpt", ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "tokenizer.json")),
])
def test_an_adapter_is_merged_by_the_printed_command(base: str | None, files: tuple[str, ...], tmp_path: Path) -> None:
    """The name of its base model is a string of the command, whatever it contains."""
    folder = tmp_path / "my lora"
    folder.mkdir()
    for name in files:
        (folder / name).write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    message = error_of(folder)
    assert "not a model; merge it into the model (pip install peft): " in message
    calls = [node for node in ast.walk(ast.parse(code_of(message))) if isinstance(node, ast.Call)]
    strings = [node.value for call in calls for node in call.args if isinstance(node, ast.Constant)]
    merged = f"{folder}-merged"
    own = base is None or "tokenizer.json" in files
    assert sorted(strings) == sorted([str(folder), merged, str(folder) if own else base, merged])
    assert {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)} == {
        "from_pretrained", "merge_and_unload", "save_pretrained"}


def test_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a folder and as a file."""
    for name in ("m", "a b", "it's"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "gpt.Q8_0.gguf").write_bytes(b"GGUF")
        (folder / "README.md").write_text("x")
        for path, what in ((folder, "gpt.Q8_0.gguf is in GGUF,"), (folder / "gpt.Q8_0.gguf", "a GGUF file,")):
            message = error_of(path)
            assert f"{path}: {what} which bardlet does not read; convert it (pip install transformers gguf" in message
            call = f"from_pretrained({json.dumps(str(folder))}, gguf_file=\"gpt.Q8_0.gguf\")"
            assert code_of(message).count(call) == 2 and "m.hf_quantizer = None" in code_of(message)
            assert json.dumps(str(folder / "gpt.Q8_0-safetensors")) in code_of(message)
            assert main(["sample", str(path)]) == 1
            assert capsys.readouterr().err == f"bardlet: {message}\n"


def test_another_tokenizer_is_converted_by_the_printed_command(model: Path, tmp_path: Path) -> None:
    """The two files of another class have other ids, and other files need another library."""
    for name, files in (("qwen", {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json":
                                  '{"tokenizer_class": "Qwen2Tokenizer"}'}),
                        ("spiece", {"spiece.model": "x"}), ("llama", {"tokenizer.model": "x"}),
                        ("vocab", {"vocab.txt": "x"})):
        folder = shutil.copytree(model, tmp_path / name)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        for file, content in files.items():
            (folder / file).write_text(content)
        message = error_of(folder)
        install = " (pip install transformers sentencepiece protobuf)" * next(iter(files)).endswith(".model")
        assert f"without a tokenizer.json, which bardlet needs; write it{install}: " in message
        assert next(iter(files)) in message
        path = json.dumps(str(folder))
        assert code_of(message) == ("from transformers import AutoTokenizer as T; "
                                    f"T.from_pretrained({path}).save_pretrained({path})")


def test_a_folder_of_models_names_one(model: Path, tmp_path: Path) -> None:
    for root, inner in (("a", "gpt"), ("models--me--gpt", "snapshots/abc"), ("hub", "models--me--gpt/snapshots/abc")):
        folder = tmp_path / "x" / root
        shutil.copytree(model, folder / inner)
        (folder / ".locks").mkdir()
        assert (f"{folder}: not a model, but a folder with a model in a subfolder; name one, for example "
                f"{folder / inner}") == error_of(folder)
    shutil.copytree(model, tmp_path / "x" / "a" / "my gpt")
    assert "a folder with 2 models; name one, for example " in error_of(tmp_path / "x" / "a")


def test_the_commands_and_the_doctor_say_the_same(model: Path, tmp_path: Path, text: Path,
                                                  capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of another form is not damaged."""
    monkeypatch.chdir(tmp_path)
    pickled(model, tmp_path / "bin")
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text("{}")
    shutil.copytree(model, tmp_path / "gemma")
    config = json.loads(Path("gemma/config.json").read_text())
    Path("gemma/config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    for folder in ("bin", "lora", "gemma"):
        lines = set()
        for command in (f"sample {folder}", f"doctor {folder}", f"chat {folder}", f"eval {folder} {text}",
                        f"train {text} --init {folder} --steps 1", f"sft {folder} chats.jsonl --steps 1"):
            assert main(shlex.split(command)) == 1
            out, err = capsys.readouterr()
            assert "damaged" not in out + err and err.count("\n") == 1
            lines.add(err)
        assert len(lines) == 1
    assert not Path("runs").exists()


def test_ordinary_folders_are_left_alone(model: Path, tmp_path: Path) -> None:
    """Files beside safetensors do not matter, nor what a run left."""
    folder = shutil.copytree(model, tmp_path / "gpt")
    for name in ("pytorch_model.bin", "x.gguf", "adapter_config.json", "training_args.bin", "vocab.json", "merges.txt"):
        (folder / name).write_text("x")
        foreign.check_folder(folder)
        assert hf.read_folder(folder)[0].config.model == "gpt2"
