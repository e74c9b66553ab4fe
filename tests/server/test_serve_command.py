"""The command `bardlet serve`: its start, its messages and its end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import BEARER, KEY, make_app

from bardlet.cli import main, serve
from bardlet.errors import BardletError
from bardlet.server.settings import ServerSettings, machine_memory
from bardlet.server.start import Starting

SCRIPT = """
import sys
from bardlet.cli import main
code = main(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def heed_interrupts() -> None:
    """Handle SIGINT, which a shell ignores for programs in the background, and for theirs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def server(folder: Path, *argv: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield a process of `bardlet serve --json` in a folder, and what it printed."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "serve", "--port", "0", "--json", *argv], cwd=folder,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_interrupts if sys.platform != "win32" else None)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def get(url: str, key: str = "") -> Any:
    """Return the JSON at an address."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_answers_before_torch_is_imported_and_ends_by_a_signal(tmp_path: Path, number: int, code: int) -> None:
    for name in range(50):
        folder = tmp_path / "runs" / f"run-{name}"
        folder.mkdir(parents=True)
        (folder / "run.toml").write_text('stage = "pretrain"\n', encoding="utf-8")
        (folder / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with server(tmp_path) as (process, printed):
        assert get(f"{printed['url']}/health") == {"status": "ok"}
        assert "/metrics" in get(f"{printed['url']}/openapi.json", printed["api_key"])["paths"]
        assert printed["link"].startswith(f"{printed['url']}/#token=")
        process.send_signal(number)
        output, errors = process.communicate()
        assert process.returncode == code and output == ""
        assert errors.splitlines() == ["bardlet: interrupted", "False"]


def test_a_port_in_use_is_named_with_another_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"bardlet: --port {port}: another program uses it, perhaps a `bardlet serve` that still "
                            "runs; try --port ")
    assert error.split()[-1] != str(port)


@pytest.mark.parametrize(("argv", "message"), [
    (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines can reach it, so choose a key; set BARDLET_API_KEY to a "
                            "long random text, or use --host 127.0.0.1"),
    (["--host", "::"], "--host ::: other machines can reach it"),
    (["--host", "no-such-host.invalid", "--api-key", "k"], "--host no-such-host.invalid: no such name"),
    (["--host", "192.0.2.1", "--api-key", "k"], "--host 192.0.2.1: not an address of this machine"),
    (["no-such-folder"], "no-such-folder: no such folder; `bardlet runs` lists the runs"),
    (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
    (["--memory", "0"], "--memory 0: must be above 0"),
    (["--max-rows", "0"], "--max-rows 0: must be at least 1"),
    (["--timeout", "0"], "--timeout 0: must be above 0"),
    (["--api-key", ""], "--api-key: use ASCII letters"),
    (["--api-key", "two words"], "--api-key: use ASCII letters"),
    (["--allow-origin", "localhost:3000"], "--allow-origin localhost:3000: write it as http://NAME:PORT"),
    (["--allow-origin", "http://a/b"], "--allow-origin http://a/b: write it as"),
    (["--dtype", "fp8"], "--dtype"),
])
def test_what_cannot_be_served_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *argv]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"bardlet: {message}") and "internal error" not in line


def test_a_missing_package_says_how_to_get_it(capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "fastapi" else name)
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == ("bardlet: bardlet serve needs the package fastapi; install it with: "
                                       'pip install "bardlet[serve]"\n')


def test_the_key_is_typed_or_set_or_made(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("BARDLET_API_KEY", raising=False)
    first, given = serve.api_key(None)
    assert not given and len(first) == 32 and serve.api_key(None)[0] != first
    monkeypatch.setenv("BARDLET_API_KEY", "from-the-environment")
    assert serve.api_key(None) == ("from-the-environment", True) and not caplog.records
    monkeypatch.setattr(logging.getLogger("bardlet"), "propagate", True)
    assert serve.api_key("typed") == ("typed", True)
    assert "other users of this machine can read" in caplog.text


def test_it_prints_the_address_the_link_and_how_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    serve.announce(serve.Addresses("http://127.0.0.1:8000", "TOKEN", "KEY"), ["a", "b"], json=False)
    text = capsys.readouterr().out
    for part in ("serving 2 models at http://127.0.0.1:8000;", "  http://127.0.0.1:8000/#token=TOKEN\n",
                 '  curl http://127.0.0.1:8000/v1/models -H "Authorization: Bearer KEY"\n', 'api_key="KEY")'):
        assert part in text
    serve.announce(serve.Addresses("http://127.0.0.1:8000", "TOKEN", None), [], json=False)
    text = capsys.readouterr().out
    assert "Bearer $BARDLET_API_KEY" in text and 'api_key=os.environ["BARDLET_API_KEY"]' in text
    assert "no models yet" in text


def test_the_memory_is_that_of_the_container(tmp_path: Path) -> None:
    assert 0 < machine_memory() < 1e6
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1000000\n")
    assert machine_memory(tmp_path) == 0.001
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine_memory(tmp_path) == machine_memory(tmp_path / "none")


# ---------------------------------------------------------------- the start


SETTINGS = ServerSettings(folders=(), api_key=KEY, memory_gb=1.0)


async def begin(app: Starting, messages: asyncio.Queue[dict[str, Any]], sent: list[dict[str, Any]]) -> None:
    """Run the lifespan of an app."""

    async def send(message: Any) -> None:
        sent.append(message)

    await messages.put({"type": "lifespan.startup"})
    await app({"type": "lifespan"}, messages.get, send)


def test_health_is_answered_while_the_app_is_loaded_and_other_requests_wait() -> None:
    gate, ready = threading.Event(), threading.Event()

    def load() -> Any:
        gate.wait()
        return make_app()

    async def scenario() -> None:
        app, messages, sent = Starting(SETTINGS, load, lambda app: ready.set()), asyncio.Queue(), []
        life = asyncio.create_task(begin(app, messages, sent))
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            other = asyncio.create_task(client.get("/metrics", headers=BEARER))
            early = await client.get("/health")
            assert early.json() == {"status": "ok"} and not other.done() and not ready.is_set()
            assert (await client.get("/health", headers={"Host": "evil.example"})).status_code == 421
            gate.set()
            assert (await other).status_code == 200
            late = await client.get("/health")
            assert (late.content, dict(late.headers)) == (early.content, dict(early.headers))
        await messages.put({"type": "lifespan.shutdown"})
        await life
        assert ready.is_set() and [message["type"] for message in sent][-1] == "lifespan.shutdown.complete"

    asyncio.run(scenario())


def test_an_app_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> Any:
        raise BardletError("no")

    async def scenario() -> None:
        app, messages = Starting(SETTINGS, load, lambda app: None), asyncio.Queue()
        app.failed = lambda: messages.put_nowait({"type": "lifespan.shutdown"})
        await begin(app, messages, [])
        assert isinstance(app.error, BardletError)

    asyncio.run(scenario())
