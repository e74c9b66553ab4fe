"""`bardlet serve`, a real process, under attack: who has no key, lies, sends too much, is slow, or comes 5,000-fold.

`attacks` and `test_what_is_refused` are a table: the attack, and the answer. tests/server has each check alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from live_server import HANGS, KEY, Live, environment, live, rest

from bardlet import models
from bardlet.config.model import ModelConfig
from bardlet.run import hf
from bardlet.tokenizer import train_char

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")

HOSTILE = "<img src=x onerror=alert(1)>\x1b]0;owned\x07\x1b[31m\u202edlrow"
"""HTML, escape sequences of a terminal, and a character that turns the text around."""
PROMPT = "</script><script>alert(1)</script>" + HOSTILE + "\n\r\t\x9b31m\u2028data: [DONE]\n\n"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SHAPE = {"block_size": 128, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 64, "head_dim": 32, "n_inner": 128}
AUTHORIZED, JSON = f"Authorization: Bearer {KEY}", "Content-Type: application/json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two models: one whose name and tokens are hostile, and one without."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_char(sorted(set(PROMPT)), separator=False)
    for name in (HOSTILE, "plain"):
        (root / name).mkdir()
        model = models.build(ModelConfig("qwen3", activation="silu", vocab_size=tokenizer.vocab_size, **SHAPE))
        hf.write_folder(root / name, model, tokenizer)
        hf.write_weights(root / name, model.hf_state_dict())
    return root


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of both models, which logs requests."""
    with live([folder], tmp_path_factory.mktemp("log") / "log", "--log-requests") as server:
        complete(server)
        yield server


def body(**fields: Any) -> bytes:
    """Return a request for a completion."""
    return json.dumps({"model": "plain", "prompt": "alert", "seed": 1, "max_tokens": 40, **fields}).encode()


def complete(server: Live, **fields: Any) -> str:
    """Return the answer of a client that does nothing wrong."""
    data = body(**fields)
    status, _, answer = exchange(server, server.head(len(data)) + data)
    assert status == 200, answer
    return answer.decode()


def exchange(server: Live, data: bytes) -> tuple[int, bytes, bytes]:
    """Send bytes, and return (status, head, body) of the answer; the server ends the connection."""
    with socket.create_connection(("127.0.0.1", server.port), HANGS) as connection:
        connection.sendall(data)
        head, _, rest = everything(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), head, rest


def everything(connection: socket.socket) -> bytes:
    """Return all that the server sends until it ends the connection."""
    parts = []
    try:
        while part := connection.recv(65_536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def request(line: str, *lines: str, host: str = "", data: bytes = b"") -> str:
    """Return a request; {port} stands for the port of the server."""
    length = [f"Content-Length: {len(data)}"] if data else []
    return "\r\n".join([f"{line} HTTP/1.1", f"Host: {host or '127.0.0.1:{port}'}", "Connection: close", *lines,
                        *length, "", ""]) + data.decode()


# ---------------------------------------------------------------- refused


POST = "POST /v1/completions"
TRAVERSALS = ("/static/../../../etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2fetc%2fpasswd",
              "/static/%252e%252e%252fetc/passwd", "//etc/passwd", "/static/..%5c..%5cetc", "/v1/models/../../etc/x",
              "/static/docs.js%00.html", "/v1/models/..%2f..%2f..%2fetc%2fpasswd", "/%c0%ae%c0%ae/etc/passwd")
EVIL = "http://evil.example"


def attacks() -> Iterator[tuple[str, str, int, str]]:
    """Yield (attack, request, status, code of the error)."""
    for line in ("GET /v1/models", "GET /docs", "GET /metrics", "GET /openapi.json", POST, "GET /no-such-path"):
        yield f"no key: {line}", request(line), 401, "invalid_api_key"
        yield f"wrong key: {line}", request(line, f"Authorization: Bearer {KEY}x"), 401, "invalid_api_key"
    for query in (f"api_key={KEY}", f"key={KEY}", f"authorization=Bearer%20{KEY}", f"access_token={KEY}"):
        yield f"key in the query: {query}", request(f"GET /v1/models?{query}"), 400, "key_in_query"
        yield f"and with the key: {query}", request(f"GET /v1/models?{query}", AUTHORIZED), 400, "key_in_query"
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:{port}", "169.254.169.254"):
        yield f"forged Host: {host}", request("GET /v1/models", AUTHORIZED, host=host), 421, "unknown_host"
        yield f"forged Host, public path: {host}", request("GET /health", host=host), 421, "unknown_host"
    for origin in (EVIL, "null", "http://127.0.0.1:1", "http://localhost:{port}"):
        lines = (AUTHORIZED, JSON, f"Origin: {origin}")
        yield f"cross-origin POST: {origin}", request(POST, *lines, data=body()), 403, "foreign_origin"
        yield f"preflight: {origin}", request("OPTIONS /v1/completions", f"Origin: {origin}",
                                              "Access-Control-Request-Method: POST"), 403, "foreign_origin"
    form = "Content-Type: text/plain"
    yield "a form's POST", request(POST, AUTHORIZED, form, data=body()), 400, "invalid_content_type"
    yield "cross-site, no Origin", request(POST, "Sec-Fetch-Site: cross-site", data=body()), 401, "invalid_api_key"
    for path in TRAVERSALS:
        yield f"traversal: {path}", request(f"GET {path}"), 401, "invalid_api_key"
        yield f"traversal with the key: {path}", request(f"GET {path}", AUTHORIZED), 404, ""
    for model in ("../plain", "/etc", "..", "plain/../plain", "plain\0", "./plain", ".", ""):
        data = body(model=model)
        yield f"model: {model!r}", request(POST, AUTHORIZED, JSON, data=data), 404, "model_not_found"
    yield "two lengths", request(POST, AUTHORIZED, JSON, "Content-Length: 3", data=b"{}"), 400, "invalid_http"
    yield "length and chunks", request(POST, AUTHORIZED, JSON, "Transfer-Encoding: chunked",
                                       data=b"0\r\n\r\n"), 400, ""
    yield "deep JSON", request(POST, AUTHORIZED, JSON, data=b"[" * 100_000), 400, "invalid_json"


@pytest.mark.parametrize(("attack", "text", "status", "code"), list(attacks()), ids=[each[0] for each in attacks()])
def test_what_is_refused(server: Live, attack: str, text: str, status: int, code: str) -> None:
    port = str(server.port)
    got, head, answer = exchange(server, text.replace("{port}", port).encode("latin-1"))
    assert got == status, answer
    assert b"passwd" not in answer or b"root:" not in answer
    assert b"access-control-" not in head and b"content-security-policy" in head
    assert KEY.encode() not in head + answer and b"/home" not in answer and b"/tmp" not in answer
    assert not code or json.loads(answer)["error"]["code"] == code


# ---------------------------------------------------------------- too much


def flood(server: Live, head: Sequence[str], total: int) -> tuple[bytes, int]:
    """Send a body of `total` bytes, as far as the server takes it; return (its answer, bytes sent)."""
    chunked = any("chunked" in line for line in head)
    block = b"10000\r\n" + b" " * 65_536 + b"\r\n" if chunked else b" " * 65_536
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), HANGS) as connection:
        lines = [f"{POST} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", JSON, *head, "", ""]
        try:
            connection.sendall("\r\n".join(lines).encode())
            while sent < total:
                connection.sendall(block)
                sent += 65_536
        except ConnectionError:
            pass
        return everything(connection), sent


HUGE = 100 * 2**20


@pytest.mark.parametrize("key", [True, False])
@pytest.mark.parametrize("length", [f"Content-Length: {HUGE}", "Transfer-Encoding: chunked"])
def test_a_body_of_100_mb_is_not_kept(server: Live, key: bool, length: str) -> None:
    def attack() -> None:
        answer, _ = flood(server, [length, *([AUTHORIZED] if key else [])], HUGE)
        assert not answer or answer.split()[1] == (b"413" if key else b"401"), answer

    attack()
    complete(server)
    before = server.resident()
    for _ in range(5):
        attack()
    complete(server)
    assert server.resident() - before < 20 * 2**20


# ---------------------------------------------------------------- slow, and many


async def trickle(server: Live, head: bytes, body: bytes) -> bytes:
    """Send a head, then a byte now and then until the server ends the connection; return what it said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    answer = asyncio.create_task(rest(reader))
    writer.write(head)
    for byte in body:
        writer.write(bytes([byte]))
        if (await asyncio.wait([answer], timeout=0.3))[0]:
            break
    writer.close()
    return await answer


def test_slow_clients_do_not_delay_the_others(server: Live) -> None:
    """200 heads and 200 bodies, a byte at a time: each ends with a 408, and meanwhile everybody is served."""
    expected = complete_text(server)

    async def everybody() -> tuple[list[bytes], int]:
        slow = [asyncio.create_task(trickle(server, *each)) for each in
                [(b"GET /health HTTP/1.1\r\nX: ", b"a" * 10_000), (server.head(100_000), b" " * 10_000)] * 200]
        served = 0
        while not all(task.done() for task in slow):
            assert (await server.ask(json.loads(body()))).text == expected
            served += 1
        return await asyncio.gather(*slow), served

    ended, served = asyncio.run(asyncio.wait_for(everybody(), HANGS))
    late = [answer for answer in ended if answer.split()[1:2] == [b"408"]]
    assert all(answer in late or not answer for answer in ended)  # a byte that crosses the end resets the connection
    print(f"\n{len(ended)} slow clients were cut off, {len(late)} read a 408; {served} others were served meanwhile")


def complete_text(server: Live) -> str:
    """Return the text of the completion of `body()`."""
    return str(json.loads(complete(server))["choices"][0]["text"])


def test_5000_open_connections(server: Live) -> None:
    """Silent ones make room: the newest client is served. Afterwards as many files are open as before."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 6000:
        pytest.skip("the limit on open files of this machine is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 6000), hard))
    expected, connections = complete_text(server), list[socket.socket]()
    try:
        for number in range(5000):
            connections.append(socket.create_connection(("127.0.0.1", server.port), HANGS))
            if number % 500 == 0:
                assert server.get("/health", "") == '{"status":"ok"}'
        assert server.get("/health", "") == '{"status":"ok"}'
        assert complete_text(server) == expected
    finally:
        for connection in connections:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    end = time.monotonic() + HANGS
    while len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) > 100:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert server.get("/health", "") == '{"status":"ok"}'


# ---------------------------------------------------------------- texts


def name_of_hostile(server: Live) -> str:
    """Return the name under which the hostile model is served."""
    [name] = [each["id"] for each in json.loads(server.get("/v1/models"))["data"] if each["id"] != "plain"]
    return str(name)


def test_names_have_no_controls(server: Live) -> None:
    name = name_of_hostile(server)
    assert not CONTROLS.search(name) and name.startswith("<img src=x onerror=alert(1)>")


@pytest.mark.parametrize("stream", [False, True])
def test_texts_go_through_unchanged_in_ascii(server: Live, stream: bool) -> None:
    """No byte of an answer is a control or outside ASCII, no line of a stream is of a text, and nobody sniffs HTML."""
    fields: dict[str, Any] = {"model": name_of_hostile(server), "prompt": PROMPT, "echo": True, "logprobs": 5,
                              "max_tokens": 300, "temperature": 2, "stream": stream}
    data = body(**fields)
    status, head, answer = exchange(server, server.head(len(data)) + data)
    assert status == 200 and b"x-content-type-options: nosniff" in head
    assert re.fullmatch(rb"[\r\n -~]*", answer)
    if stream:
        assert b"content-type: text/event-stream" in head
        lines = [line for line in answer.split(b"\r\n") if line.startswith(b"data: ")]
        events = [json.loads(line[6:]) for line in lines if line.strip() != b"data: [DONE]"]
        assert [line.strip() for line in lines].count(b"data: [DONE]") == 1 and answer.count(b"\ndata: ") == len(lines)
        text = "".join(event["choices"][0]["text"] for event in events)
    else:
        assert b"content-type: application/json" in head
        text = json.loads(answer)["choices"][0]["text"]
    assert text.startswith(PROMPT) and len(text) == len(PROMPT) + 300
    assert {"\x1b", "<", "\u202e"} <= set(text[len(PROMPT) :])


def test_errors_and_logs_escape_the_texts_of_clients(server: Live) -> None:
    for fields in ({"model": HOSTILE}, {HOSTILE: 1}, {"stop": HOSTILE * 99}, {"prompt": "ß" + HOSTILE}):
        data = body(**fields)
        status, head, answer = exchange(server, server.head(len(data)) + data)
        assert status in (400, 404) and b"content-type: application/json" in head and b"nosniff" in head
        assert re.fullmatch(rb"[ -~]*", answer)
    exchange(server, request("GET /%1b[31m%0a<script>%e2%80%ae", AUTHORIZED).replace(
        "{port}", str(server.port)).encode())
    log = server.log.read_text(encoding="utf-8")
    assert "\\x1b[31m\\n<script>\\u202e: 404" in log
    assert not CONTROLS.search(log) and "hunter2" not in log and KEY not in log


def test_a_terminal_sees_no_escape_of_a_name(folder: Path, tmp_path: Path) -> None:
    """What `bardlet serve` prints for people, in a terminal, while a hostile model cannot be loaded."""
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "bardlet", "serve", str(folder / HOSTILE), "--port", "0", "--log-requests"]
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL, env=environment())
    try:
        shown = b""
        while b"openai.OpenAI" not in shown:
            shown += os.read(main, 65_536)
        port = int(re.findall(rb"http://127.0.0.1:(\d+)", shown)[0])
        server = Live(process, port, tmp_path / "log")
        data = body(model=HOSTILE)
        exchange(server, server.head(len(data)) + data)
        process.terminate()
        process.wait(HANGS)
        while b"interrupted" not in shown:
            shown += os.read(main, 65_536)
    finally:
        process.kill()
    assert not CONTROLS.search(shown.decode().replace("\r\n", "\n"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
def test_a_browser_runs_nothing_of_a_text(server: Live, tmp_path: Path) -> None:
    """The pages, and the answers of the API opened as pages: no script of a name, a prompt or an output runs."""
    browser = Browser(tmp_path, loopback=True)
    try:
        browser("Page.addScriptToEvaluateOnNewDocument",
                source="globalThis.alerts = 0; globalThis.alert = () => { globalThis.alerts += 1 }")
        url = f"http://127.0.0.1:{server.port}"
        browser.open(f"{url}/", 1280, "light")
        while browser.value("document.getElementById('sign-in').hidden"):
            time.sleep(0.02)
        browser.value(f"document.getElementById('key').value = {KEY!r}; "
                      "document.getElementById('sign-in').requestSubmit(); 1")
        while not browser.value("Boolean(globalThis.studio)"):
            time.sleep(0.02)
        browser.open(f"{url}/docs", 1280, "light")
        while not browser.value("document.querySelectorAll('details, section, article').length > 0"):
            time.sleep(0.02)
        request = json.dumps({"model": name_of_hostile(server), "prompt": PROMPT, "echo": True, "max_tokens": 50})
        browser.value(f"""(async () => {{
          const area = [...document.querySelectorAll('textarea')].find((e) => e.value.includes('"prompt"'));
          area.closest('details')?.setAttribute('open', '');
          area.value = {json.dumps(request)};
          const form = area.closest('form');
          form ? form.requestSubmit() : area.parentElement.querySelector('button').click();
          return 1;
        }})()""")
        while not browser.value("document.body.textContent.includes('text_completion')"):
            time.sleep(0.02)
        shown = browser.value("document.body.textContent")
        assert "onerror=alert(1)" in shown
        assert browser.value("globalThis.alerts") == 0
        assert browser.value("document.querySelectorAll('img, main script').length") == 0
        for path in ("/v1/models", "/openapi.json", f"/v1/models/{'%3Cscript%3Ealert(1)%3C%2Fscript%3E'}"):
            browser.open(url + path, 1280, "light")
            assert browser.value("globalThis.alerts") == 0
            assert browser.value("document.querySelectorAll('img, script').length") == 0
    finally:
        browser.close()
