"""OWNER/NAME is fetched from the Hugging Face Hub, here a server in this process, and verified."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_model
from hub_server import Hub, serve
from huggingface_hub import constants, file_download
from safetensors.torch import save_file

import bardlet as python_api
from bardlet.cli import main
from bardlet.errors import BardletError
from bardlet.run import hf, hub

NEVER = ("pytorch_model.bin", "modeling_gpt.py", "training_args.bin", "README.md", "onnx/model.safetensors",
         "x.safetensors")
"""Files of the model that bardlet does not need, and some that it must not fetch."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt2 folder with files that bardlet does not need."""
    folder = write_model(tmp_path_factory.mktemp("model") / "gpt")
    for name in NEVER:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x" * 99)
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub, an empty cache, and an empty folder to work in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_verified", set())
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # between two attempts of a transfer
    with serve(Hub()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def error_of(name: str) -> str:
    """Return the one line about a model that cannot be fetched."""
    with pytest.raises(BardletError) as error:
        hub.folder(name)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{name}: ")
    return str(error.value)


def same_weights(a: Path, b: Path) -> bool:
    return all(torch.equal(x, y) for x, y in zip(hf.read_folder(a)[0].parameters(), hf.read_folder(b)[0].parameters(),
                                                 strict=True))


# ---------------------------------------------------------------- names


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that exists is none, nor one below a folder that exists, nor one in runs/."""
    monkeypatch.chdir(tmp_path)
    for name in ("me/gpt", "openai-community/gpt2", "HuggingFaceTB/SmolLM2-135M", "a/b.c_d", "me/gpt@main",
                 "me/gpt@refs/pr/1", "me/gpt@v1.0", f"me/gpt@{'0' * 40}"):
        assert hub.is_name(name), name
    for name in ("gpt2", "./me/gpt", "/me/gpt", "~/gpt", "me/gpt/x", "runs/gpt", "me/..", "../gpt", "me/gpt@../../x",
                 "me/gpt@", "me /gpt", "me/gpt ", "", "me/", "/", "me/gpt\n", "https://x.example/me/gpt", "-m/gpt"):
        assert not hub.is_name(name), name
    Path("me").mkdir()
    for call in (hub.folder, python_api.load, python_api.evaluate):
        with pytest.raises(BardletError, match="me/gpt: no such folder; me exists here, so this is not looked up on"):
            call("me/gpt")
    Path("me/gpt").mkdir()
    assert hub.folder("me/gpt") == Path("me/gpt") and not hub.is_name("me/gpt")
    with pytest.raises(BardletError, match="runs/gpt: no such folder; `bardlet train` prints"):
        python_api.load("runs/gpt")


# ---------------------------------------------------------------- what is fetched


def test_a_model_is_fetched_and_read(server: Hub, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the needed files; the second time none."""
    for name in ("vocab.json", "merges.txt"):
        (model / name).write_text("x")
    commit = server.add("me/gpt", model)
    for name in ("vocab.json", "merges.txt"):
        (model / name).unlink()
    with caplog.at_level(logging.INFO, "bardlet"):
        folder = hub.folder("me/gpt")
    assert f"fetching me/gpt ({commit[:12]}, 0.0 MB)" in caplog.text
    assert folder.name == commit and folder.parent.name == "snapshots"
    assert sorted(server.fetched()) == sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert same_weights(folder, model)
    assert hub.folder("me/gpt") == folder == hub.folder("me/gpt@main") == hub.folder(f"me/gpt@{commit}")
    assert server.fetched() == []


def test_a_revision_is_fetched(server: Hub, model: Path, tmp_path: Path) -> None:
    """A branch, a nested one as of a pull request, and a commit; a commit in the cache needs no server."""
    other = shutil.copytree(model, tmp_path / "other")
    save_file({name: t + 1 for name, t in hf.read_weights(model).items()}, other / "model.safetensors")
    first, second = server.add("me/gpt", model), server.add("me/gpt", other, "refs/pr/1")
    assert hub.folder("me/gpt@refs/pr/1").name == second != first
    assert hub.folder("me/gpt").name == first
    assert same_weights(hub.folder(f"me/gpt@{second}"), other)
    server.status["me/gpt"] = (503, "")
    assert hub.folder(f"me/gpt@{first}").name == first
    assert "the Hub has no revision v2 of this model" in (server.status.clear() or error_of("me/gpt@v2"))


def test_sharded_weights_are_fetched(server: Hub, model: Path, tmp_path: Path) -> None:
    sharded = shutil.copytree(model, tmp_path / "sharded")
    weights = hf.read_weights(model)
    (sharded / "model.safetensors").unlink()
    names = sorted(weights)
    files = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, sharded / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    server.add("me/gpt", sharded)
    assert same_weights(hub.folder("me/gpt"), model)
    assert len([name for name in server.fetched() if name.endswith(".safetensors")]) == 2
    index["weight_map"][names[0]] = "../../x.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    server.add("me/evil", sharded)
    with pytest.raises(BardletError, match="which is not in this folder"):
        hub.folder("me/evil")


def test_gpt2s_two_tokenizer_files_are_fetched(server: Hub, model: Path, tmp_path: Path) -> None:
    old = shutil.copytree(model, tmp_path / "old")
    pipeline = json.loads((old / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (old / name).unlink()
    (old / "vocab.json").write_text(json.dumps(pipeline["vocab"]))
    (old / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in pipeline["merges"]))
    server.add("me/old", old)
    assert hf.read_folder(hub.folder("me/old"))[1].encode("the bard").tolist() == hf.read_folder(model)[1].encode(
        "the bard").tolist()


def test_a_resumed_transfer(server: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub continues a transfer that is cut once after the last whole chunk, and the hash is right."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)  # the default of 10 MB is more than this model
    size = (model / "model.safetensors").stat().st_size
    for number, (at, again) in enumerate(((70, 64), (6400, 6400), (size - 1, (size - 1) // 64 * 64))):
        server.add(f"me/gpt{number}", model)
        server.cut["model.safetensors"] = at
        assert same_weights(hub.folder(f"me/gpt{number}"), model)
        assert f"RANGE model.safetensors {again}" in server.log


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_cut_transfer(file: str, server: Hub, model: Path, tmp_path: Path) -> None:
    """Whether the connection breaks or the file just ends; the next attempt has all of it."""
    server.add("me/gpt", model)
    for server.short, server.always_cut, server.cut in (({file}, False, {}), (set(), True, {file: 0})):
        assert error_of("me/gpt").endswith(": the transfer was cut; run the command again")
        assert not list((tmp_path / "cache").rglob(file)) and not list((tmp_path / "cache").rglob("*.incomplete"))
    server.cut = {}
    assert same_weights(hub.folder("me/gpt"), model)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_another_content_than_the_hub_lists(file: str, server: Hub, model: Path, tmp_path: Path) -> None:
    """Of the same size, which huggingface_hub does not notice; weights by sha256, the other files by git's hash."""
    server.add("me/gpt", model)
    content = (model / file).read_bytes()
    server.lie[file] = content.replace(b"300", b"299") if file == "config.json" else content[:-2] + b"!" + content[-1:]
    assert len(server.lie[file]) == len(content) and server.lie[file] != content
    assert f"{file} is damaged: its hash is not the one that the Hub lists; it was removed" in error_of("me/gpt")
    cache = tmp_path / "cache"
    assert not list(cache.rglob(file))
    assert server.lie[file] not in {path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    server.lie.clear()
    assert same_weights(hub.folder("me/gpt"), model)


def test_damage_in_the_cache_is_noticed(server: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a server, since the cache names weights by their sha256."""
    commit = server.add("me/gpt", model)
    blob = (hub.folder("me/gpt") / "model.safetensors").resolve()
    for name, status in (("me/gpt", None), ("me/gpt", (503, "")), (f"me/gpt@{commit}", None)):
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
        server.status = {"me/gpt": status} if status else {}
        assert "model.safetensors is damaged" in error_of(name) and not blob.exists()
        server.status = {}
        assert same_weights(hub.folder("me/gpt"), model) and blob.exists()


@pytest.mark.parametrize("status, message", [
    ((401, "RepoNotFound"), "no such folder here, and no such model on the Hub; check the name, or, if the model is "
     "private, run `hf auth login`"),
    ((404, "RepoNotFound"), "no such folder here, and no such model on the Hub; "),
    ((401, "GatedRepo"), "/me/gpt, then run `hf auth login`"),
    ((403, "GatedRepo"), "gated: accept its terms at http"),
    ((429, ""), "answers with an error (429); try again later"),
    ((500, ""), "answers with an error (500); try again later"),
])
def test_answers_of_the_hub(status: tuple[int, str], message: str, server: Hub, model: Path,
                            capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 1, for each command."""
    server.add("me/gpt", model)
    server.status["me/gpt"] = status
    assert message in error_of("me/gpt")
    Path("text.txt").write_text("the little bards\n" * 99)
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    for command in ("sample me/gpt", "chat me/gpt", "eval me/gpt text.txt", "doctor me/gpt", "translate me/gpt a.txt",
                    "train text.txt --init me/gpt --steps 1", "sft me/gpt chats.jsonl", "dpo me/gpt chats.jsonl"):
        assert main(shlex.split(command)) == 1
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out in ("", "reading text.txt\n")
    assert sorted(path.name for path in Path().iterdir()) == ["chats.jsonl", "text.txt"]


def test_no_network(server: Hub, model: Path, monkeypatch: pytest.MonkeyPatch,
                    caplog: pytest.LogCaptureFixture) -> None:
    """Without a copy in the cache an error; with a whole one, that is used; with a part of one, an error."""
    commit = server.add("me/gpt", model)
    endpoint = server.endpoint
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of nothing
    assert "no such folder here, and http://127.0.0.1:9 cannot be reached (" in error_of("me/gpt")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    folder = hub.folder("me/gpt")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.folder("me/gpt") == folder
    assert f"me/gpt: the Hub cannot be reached; using the copy of {commit[:12]} in the cache" in caplog.text
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (folder / name).unlink()
        for model_name in ("me/gpt", f"me/gpt@{commit}"):
            assert "cannot be reached" in error_of(model_name)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert hub.folder("me/gpt") == folder
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.folder("me/gpt") == folder
    assert "HF_HUB_OFFLINE is set" in error_of("me/other")


@pytest.mark.parametrize("answer", [b"<html>Welcome</html>", b"{}", b"[]", b'{"id": "x", "sha": "../../x"}'])
def test_a_server_that_is_no_hub(answer: bytes, server: Hub) -> None:
    server.answer = answer
    assert f"{server.endpoint} does not answer as the Hub does (" in error_of("me/gpt")


def test_without_huggingface_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert error_of("me/gpt") == ("me/gpt: no such folder; to fetch a model of that name from the Hub, run "
                                  "`pip install huggingface-hub`")


def test_a_name_that_the_hub_does_not_allow(server: Hub) -> None:
    for name in ("me/a--b", "me/" + "x" * 100, "me/gpt.git"):
        assert "no such folder here, and not a name of the Hub (" in error_of(name)
    assert not server.log


@pytest.mark.parametrize("change, message, fetched", [
    ({"model.safetensors": None}, "no weights in safetensors, and bardlet never opens a pickle; convert it", 4),
    ({"model.safetensors": None, "adapter_config.json": "{}"}, "an adapter, not a model; merge it", 4),
    ({"model.safetensors": None, "config.json": None, "gpt.gguf": "x"}, "in GGUF, which bardlet does not read", 3),
    ({"tokenizer.json": None}, "no tokenizer.json, which bardlet needs; write one", 3),
    ({"config.json": None}, "no config.json, so not a model that bardlet reads", 3),
    ({"config.json": '{"model_type": "gemma"}'}, "model_type 'gemma' is not supported", 4),
])
def test_a_model_of_another_form_is_refused_before_its_weights_are_fetched(
        change: dict[str, str | None], message: str, fetched: int, server: Hub, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "changed")
    for name, content in change.items():
        (folder / name).unlink(missing_ok=True) if content is None else (folder / name).write_text(content)
    server.add("me/gpt", folder)
    with pytest.raises(BardletError) as error:
        hub.folder("me/gpt")
    assert message in str(error.value) and "\n" not in str(error.value)
    if "`" in str(error.value):
        words = shlex.split(str(error.value).split("`")[1])
        assert words[:2] == ["python", "-c"] and 'from_pretrained("me/gpt"' in words[2]
    names = server.fetched()
    assert len(names) == fetched and not [name for name in names if name.endswith((".safetensors", ".bin", ".gguf"))]


# ---------------------------------------------------------------- runs


def test_a_run_records_the_commit(server: Hub, model: Path, bardlet: Callable[..., dict[str, Any]],
                                  monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In its settings, its record and its card; so a run resumes from the same weights when the branch has moved."""
    commit = server.add("me/gpt", model)
    Path("text.txt").write_text("".join(f"the {n} little bards\n" for n in range(300)))
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n} bards."}]}) + "\n"
        for n in range(30)))
    small = ["--steps", "2", "--batch-size", "2", "--dtype", "fp32", "--compile", "off", "--block-size", "16"]
    bardlet("train", "text.txt", "--init", "me/gpt", "--out", "run", *small)
    bardlet("sft", "me/gpt@main", "chats.jsonl", "--out", "chat", *small)
    for run, command in (("run", "train"), ("chat", "sft")):
        values = tomllib.loads(Path(run, "run.toml").read_text())
        assert values["init"] == f"me/gpt@{commit}" and values["record"]["base_revision"] == commit, command
        card = Path(run, "README.md").read_text()
        assert f"| base model | `me/gpt`, revision {commit} |" in card and "\nbase_model: me/gpt\n" in card
        assert hf.read_folder(Path(run))[0].config.n_embd == 16
    assert bardlet("sample", "me/gpt", "--tokens", "3")["completions"]
    assert bardlet("eval", "me/gpt", "text.txt")["tokens"] > 0
    assert bardlet("doctor", "me/gpt")["damaged"] == 0
    assert python_api.load("me/gpt").module.config.n_embd == 16
    other = shutil.copytree(model, tmp_path / "other")
    save_file({name: t + 1 for name, t in hf.read_weights(model).items()}, other / "model.safetensors")
    assert server.add("me/gpt", other) != commit
    bardlet("train", "--config", "run/run.toml", "--out", "again", *small)
    assert same_weights(Path("again"), Path("run"))
    server.status["me/gpt"] = (503, "")  # the commit is in the cache
    bardlet("resume", "run", "--steps", "3", "--allow-change")
    assert tomllib.loads(Path("run", "run.toml").read_text())["record"]["base_revision"] == commit


def test_a_run_from_a_folder_has_no_commit(model: Path, bardlet: Callable[..., dict[str, Any]], tmp_path: Path,
                                           text: Path) -> None:
    bardlet("train", text, "--init", model, "--out", tmp_path / "run", "--steps", "1", "--batch-size", "2",
            "--dtype", "fp32", "--compile", "off", "--block-size", "16")
    assert "base_revision" not in (tmp_path / "run" / "run.toml").read_text()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "base model |" not in card and "base_model" not in card
