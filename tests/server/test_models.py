"""The registry: names, loading, memory, and the runs that are still training."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from fake_engine import FakeEngine
from fastapi.testclient import TestClient
from safetensors.torch import load_file
from small_server import LETTERS, app_of, registry, write

from bardlet.run import checkpoint, hf, lock
from bardlet.server import folders, models
from bardlet.server.errors import Refusal
from bardlet.server.models import Models, sampling_defaults

pytest_plugins = ("api_fixtures",)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """A fake engine of its own."""
    engine = FakeEngine()
    yield engine
    engine.close()


def fill(folder: Path) -> Path:
    """Make an empty folder look like a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def refusal(action: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        asyncio.run(action)
    assert "pytest-" not in str(caught.value)  # a path has it
    return caught.value


# ---------------------------------------------------------------------------- names


def test_names_are_the_last_parts_of_folders_made_unique(tmp_path: Path) -> None:
    for name in ("a/x", "b/x", "b/y", "c/d/x", "c/d/e/z", "c/d/e/f/deep", ".hidden/h", "y/checkpoints/step-1"):
        fill(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "b" / "y")
    found = folders.find((str(tmp_path),))
    assert set(found) == {"a/x", "b/x", "d/x", "y"}
    assert folders.find((str(tmp_path / "a" / "x"), str(tmp_path / "b"), str(tmp_path / "a"))).keys() == {
        "a/x", "b/x", "y"}
    assert folders.find((str(tmp_path / "nowhere"),)) == {}
    assert not any(name.startswith("/") for name in found)


def test_a_run_below_a_run_is_found(tmp_path: Path) -> None:
    """As in a ladder."""
    fill(tmp_path / "ladder")
    fill(tmp_path / "ladder" / "rung")
    assert set(folders.find((str(tmp_path),))) == {"ladder", "rung"}


def test_names_can_be_shown(tmp_path: Path) -> None:
    """In JSON and in a terminal, whatever bytes a folder's name has."""
    fill(tmp_path / "red\x1b[31m\n")
    folder = tmp_path / b"\xff".decode("utf-8", "surrogateescape")
    try:
        fill(folder)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    found = folders.find((str(tmp_path),))
    assert len(found) == 2 and all(name.isprintable() and name.encode() for name in found)


def test_new_models_are_listed_without_a_restart(tmp_path: Path, engine: FakeEngine) -> None:
    registry_ = registry(tmp_path, engine)
    assert registry_.names() == []
    assert "no models yet" in str(refusal(registry_.get("new")))
    write(tmp_path / "new")
    assert asyncio.run(registry_.get("new")).name == "new"  # also without a listing
    assert registry_.names() == ["new"]
    shutil.rmtree(tmp_path / "new")
    assert refusal(registry_.get("new")).status == 404


def test_listing_imports_no_torch(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    code = ("import sys; from bardlet.server.models import Models; from bardlet.server.routes import ROUTERS;"
            "from bardlet.server.settings import ServerSettings as S;"
            f"m = Models(({str(tmp_path)!r},), S(folders=(), api_key='', memory_gb=1)); assert m.names() == ['a'];"
            "assert m.cards() and 'torch' not in sys.modules, 'torch'")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_message_names_a_few_models(tmp_path: Path, engine: FakeEngine) -> None:
    for n in range(12):
        fill(tmp_path / f"m{n:02}")
    text = str(refusal(registry(tmp_path, engine).get("x" * 500)))
    assert "m09 and 2 more" in text and len(text) < 300


# ---------------------------------------------------------------------------- loading


def test_requests_share_a_load(root: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    registry_, reads = registry(root, engine), []
    read = Models._read
    monkeypatch.setattr(Models, "_read", lambda self, name, folder: (reads.append(name), read(self, name, folder))[1])

    async def main() -> None:
        assert (registry_.running, registry_.waiting) == (0, 0)
        first, *others = await asyncio.gather(*(registry_.get("bytes") for _ in range(5)))
        assert all(other is first for other in others) and reads == ["bytes"]
        assert await registry_.get("bytes") is first and registry_.loaded == ["bytes"]
        assert first.window == 32 and first.defaults == {"temperature": 0.8, "top_k": 50}

    asyncio.run(main())


def test_a_damaged_folder_is_an_error_without_paths(tmp_path: Path, engine: FakeEngine) -> None:
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    (folder / "manifest.json").unlink()
    refused = refusal(registry(tmp_path, engine).get("m"))
    assert refused.status == 500 and refused.code == "model_not_loadable" and str(refused).startswith("m/model.safe")
    assert refused.headers["x-should-retry"] == "false"


def test_models_that_cannot_generate_are_refused(tmp_path: Path, engine: FakeEngine) -> None:
    config = json.loads((write(tmp_path / "reward") / "config.json").read_text())
    (tmp_path / "reward" / "config.json").write_text(
        json.dumps({**config, "architectures": ["Qwen3ForSequenceClassification"]}))
    fill(tmp_path / "mamba")
    (tmp_path / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    registry_ = registry(tmp_path, engine)
    assert registry_.names() == ["mamba"]
    refused = refusal(registry_.get("reward"))
    assert refused.status == 400 and "reward model" in str(refused)
    refused = refusal(registry_.get("mamba"))
    assert refused.status == 400 and "'mamba' is not supported" in str(refused)


def test_a_run_without_weights_is_not_ready(tmp_path: Path, engine: FakeEngine) -> None:
    (fill(tmp_path / "m") / "run.toml").write_text("")
    refused = refusal(registry(tmp_path, engine).get("m"))
    assert refused.status == 503 and refused.headers["Retry-After"]


def test_an_internal_error_tells_nothing(root: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "add", lambda *arguments: 1 / 0)
    refused = refusal(registry(root, engine).get("bytes"))
    assert refused.status == 500 and "division" not in str(refused)

    def exhausted(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(engine, "add", exhausted)
    assert refusal(registry(root, engine).get("bytes")).status == 503


def test_defaults_out_of_range_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert sampling_defaults(tmp_path) == {}
    path.write_text('{"temperature": 0.5, "top_k": 0, "top_p": 1.5}')
    assert sampling_defaults(tmp_path) == {"temperature": 0.5}
    path.write_text('{"temperature": true, "top_k": 1.5, "top_p": NaN}')
    assert sampling_defaults(tmp_path) == {}
    path.write_text("[")
    assert sampling_defaults(tmp_path) == {}


# ---------------------------------------------------------------------------- memory


def test_the_least_recently_used_idle_model_goes(root: Path, engine: FakeEngine) -> None:
    async def main() -> None:
        registry_ = registry(root, engine, max_rows=1)
        sizes = {name: (await registry_.get(name)).size for name in ("bytes", "letters", "chat")}
        assert registry_.loaded == ["bytes", "letters", "chat"] and len(engine.models) == 3
        registry_ = registry(root, engine, max_rows=1, memory_gb=(sum(sizes.values()) - 1) / 1e9)
        await registry_.get("bytes")
        await registry_.get("letters")
        await registry_.get("bytes")
        await registry_.get("chat")
        assert registry_.loaded == ["bytes", "chat"]

    asyncio.run(main())


def test_models_in_use_stay(root: Path, engine: FakeEngine) -> None:
    """The request for another one is told to come back."""

    async def main() -> None:
        size = (await registry(root, engine, max_rows=1).get("bytes")).size
        registry_ = registry(root, engine, max_rows=1, memory_gb=1.2 * size / 1e9)
        async with registry_.use("bytes"):
            with pytest.raises(Refusal, match="in use") as caught:
                await registry_.get("chat")
            assert caught.value.status == 503 and caught.value.headers["Retry-After"] == "5"
        engine.stuck = True
        with pytest.raises(Refusal, match="in use"):
            await registry_.get("chat")
        engine.stuck = False
        assert (await registry_.get("chat")).name == "chat" and registry_.loaded == ["chat"]

    asyncio.run(main())


def test_a_model_that_never_fits_is_refused(root: Path, engine: FakeEngine) -> None:
    refused = refusal(registry(root, engine, memory_gb=1e-6).get("bytes"))
    assert refused.code == "model_too_large" and "Retry-After" not in refused.headers


def test_a_removed_model_is_loaded_again(root: Path, engine: FakeEngine) -> None:
    """If it is removed between its load and its use."""

    async def main() -> None:
        registry_ = registry(root, engine)
        loaded = await registry_.get("bytes")
        assert registry_._remove(loaded)
        async with registry_.use("bytes") as again:
            assert again is not loaded and again.users == 1
        assert again.users == 0

    asyncio.run(main())


def test_a_request_is_no_larger_than_the_queue(root: Path, engine: FakeEngine) -> None:
    """Otherwise it would be told to come back forever."""
    with TestClient(app_of(registry(root, engine, max_waiting=4))) as client:
        body = {"model": "bytes", "prompt": "a", "max_tokens": 1}
        assert client.post("/v1/completions", json={**body, "n": 4}).status_code == 200
        error = client.post("/v1/completions", json={**body, "n": 5}).json()["error"]
        assert error["param"] == "n" and "at most 4" in error["message"]


# ---------------------------------------------------------------------------- runs in progress


def weights(loaded: models.Loaded) -> dict[str, torch.Tensor]:
    return loaded.model.module.hf_state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_in_progress_serves_its_newest_checkpoint(
        bardlet: Callable[..., Any], text: Path, tmp_path: Path, engine: FakeEngine) -> None:
    """And the next one, as soon as nobody uses the model."""
    run = tmp_path / "run"
    bardlet("train", text, *TINY, "--steps", "4", "--save-every", "2", "--out", run)
    first, second = checkpoint.steps_saved(run)
    old, new = ({name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
                for folder in (first, second))  # of files that do not stay as they are
    hf.write_weights(run, old)  # with --keep best, the root may be older

    async def main() -> None:
        registry_ = registry(tmp_path, engine)
        with lock.locked(run):
            loaded = await registry_.get("run")
            assert same(weights(loaded), new) and not same(old, new)
            assert await registry_.get("run") is loaded
            shutil.copytree(second, hidden := tmp_path / ".hidden")
            shutil.rmtree(second)
            async with registry_.use("run"):
                pass
            async with registry_.use("run") as busy:
                assert same(weights(busy), old)  # it was idle, and is loaded anew
                shutil.copytree(hidden, second)
                assert await registry_.get("run") is busy
            newest = await registry_.get("run")
            assert same(weights(newest), new) and len(engine.models) == 1
            (first / "model.safetensors").write_bytes(b"")
            (second / "model.safetensors").write_bytes(b"")
            second.rename(second.with_name("step-00000005"))
            assert same(weights(await registry_.get("run")), old)  # no checkpoint is whole: the root's weights
            (run / "config.json").write_text("{")
            hf.write_weights(run, new)
            assert same(weights(await registry_.get("run")), old)  # and what is loaded, if those cannot be read

    asyncio.run(main())


def test_a_finished_run_serves_the_weights_of_its_folder(tmp_path: Path, engine: FakeEngine) -> None:
    folder = write(tmp_path / "m", LETTERS)

    async def main() -> None:
        registry_ = registry(tmp_path, engine)
        loaded = await registry_.get("m")
        changed = {name: tensor + 1 for name, tensor in weights(loaded).items()}
        hf.write_weights(folder, changed)
        assert same(weights(await registry_.get("m")), changed)

    asyncio.run(main())
