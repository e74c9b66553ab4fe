"""Limits on clients: large, slow, broken and silent ones, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import serving
from serving import HANGS, KEY, Running, running

from bardlet.inference.engine import Busy
from bardlet.server import limits as server_limits
from bardlet.server import protocol
from bardlet.server.app import full_queue
from bardlet.server.errors import Refusal
from bardlet.server.guard import ClientTooSlow, Exchange
from bardlet.server.limits import DEPTH, Bodies, Disconnected, Pace, check_json
from bardlet.server.settings import Limits

AUTHORIZED = f"Authorization: Bearer {KEY}"
JSON = "Content-Type: application/json"

SHORT = Limits(body=20_000, head_seconds=0.3, body_seconds=0.4, grace_seconds=0.2, linger_seconds=0.2, connections=8,
               send_seconds=0.3)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server whose limits end soon."""
    with running(SHORT) as server:
        yield server


def status_of(answer: bytes) -> int:
    """Return the status of a response."""
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> str:
    """Return the code of an error response."""
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"])


def is_well(server: Running) -> bool:
    """Return True if the server answers a new client."""
    return status_of(server.connect().send("GET /health HTTP/1.1", "Connection: close").until_closed()) == 200


# ---------------------------------------------------------------- size


@pytest.mark.parametrize("head", [("Content-Length: 20001",), ("Content-Length: 999999999999999999",)])
def test_a_body_that_says_it_is_too_large_is_refused_unread(server: Running, head: tuple[str, ...]) -> None:
    answer = server.connect().send("POST /raw HTTP/1.1", AUTHORIZED, JSON, *head).until_closed()
    assert (status_of(answer), error_of(answer)) == (413, "body_too_large")
    assert b"\r\nconnection: close\r\n" in answer


def test_a_chunked_body_is_refused_at_the_limit(server: Running) -> None:
    client = server.connect().send("POST /raw HTTP/1.1", AUTHORIZED, JSON, "Transfer-Encoding: chunked")
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    answer = client.send_bytes(chunk * 5).until_closed()  # its end never comes
    assert (status_of(answer), error_of(answer)) == (413, "body_too_large")


def test_a_body_at_the_limit_is_read(server: Running) -> None:
    body = json.dumps("x" * (SHORT.body - 2)).encode()
    client = server.connect().send("POST /raw HTTP/1.1", AUTHORIZED, JSON, f"Content-Length: {len(body)}",
                                   "Connection: close", body=body)
    answer = client.until_closed()
    assert status_of(answer) == 200 and b'{"bytes":20000}' in answer


def test_a_client_without_the_key_reads_its_refusal_though_it_sends_a_lot(server: Running) -> None:
    """Nothing of the body is kept; a connection that closed at once would lose the answer."""
    client = server.connect().send("POST /raw HTTP/1.1", JSON, "Content-Length: 8000000", body=b" " * 8_000_000)
    assert status_of(client.until_closed()) == 401
    client = server.connect().send("POST /session HTTP/1.1", JSON, "Content-Length: 4097", body=b" " * 4097)
    assert status_of(client.until_closed()) == 413


def test_nothing_is_buffered_beyond_the_limit() -> None:
    received = 0

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += 1000
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    async def read() -> None:
        bodies = Bodies(None, Limits(body=5000))  # type: ignore[arg-type]
        await bodies.read({"type": "http", "headers": []}, receive, 5000)

    with pytest.raises(Refusal, match="5,000 bytes"):
        asyncio.run(read())
    assert received == 6000


def test_a_full_queue_is_said_before_the_body_is_checked() -> None:
    paced = 0

    async def pace() -> None:
        nonlocal paced
        paced += 1

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"not JSON", "more_body": False}

    models: Any = SimpleNamespace(is_full=lambda: True, engine=SimpleNamespace(busy=lambda: Busy("full", 7)))
    bodies: Any = Bodies(None, Limits(), lambda: full_queue(models))  # type: ignore[arg-type]
    bodies.pace = pace

    def ask(path: str) -> Refusal:
        with pytest.raises(Refusal) as refusal:
            asyncio.run(bodies({"type": "http", "headers": [], "method": "POST", "path": path}, receive, None))
        return refusal.value

    for path in ("/v1/completions", "/v1/chat/completions"):
        assert (ask(path).status, ask(path).headers) == (429, {"Retry-After": "7"})
    assert ask("/tokenize").status == 400 and paced == 4
    models.is_full = lambda: False
    assert ask("/v1/completions").status == 400


def test_turns_come_at_a_pace() -> None:
    pace = Pace(4)
    assert [pace.seconds_from(now) for now in (9.0, 9.0, 9.0, 9.5, 11.0, 11.0)] == [0, 0.25, 0.5, 0.25, 0, 0.25]


# ---------------------------------------------------------------- form


DEEP = 100_000


@pytest.mark.parametrize("body", [
    b"{", b"", b"'a'", b"{\"text\": NaN}", b"[Infinity]", b"[-Infinity]", b"[1e999]", b"{\"a\": 1, \"a\": 2}",
    b"\xff", b"{\"text\": \"\xc3\"}", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"{\"text\": \"\\ud800\"}",
    b"{\"\\udfff\": 1}", b"[[\"\\ud83d\"]]", b"[" * DEEP + b"]" * DEEP, b"{\"a\":" * DEEP + b"1" + b"}" * DEEP,
    b"[" * (DEPTH + 1) + b"1" + b"]" * (DEPTH + 1), b"[" * 500 + b"]" * 500, b"9" * 10_000, b"{} {}", b"\0"])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal, match="not valid JSON") as refusal:
        check_json(body)
    assert refusal.value.status == 400


@pytest.mark.parametrize("body", [b"{}", b"1", b"\"\\ud83d\\ude00 \\u0000\"", b"[" * DEPTH + b"1" + b"]" * DEPTH,
                                  " {\"\u00e9\": [1.5e3, true, null]}\n".encode()])
def test_what_is_json_passes(body: bytes) -> None:
    check_json(body)


@pytest.mark.parametrize(("body", "kind", "code"), [
    (b"[" * 9000, JSON, "invalid_json"), (b'{"text": "\\ud800"}', JSON, "invalid_json"),
    (b'{"text": "a"}', "Content-Type: text/plain", "invalid_content_type"),
    (b'{"text": "a"}', "X: y", "invalid_content_type"), (b"text=a", "Content-Type: application/x-www-form-urlencoded",
                                                         "invalid_content_type")])
def test_a_bad_body_is_a_400_of_the_server(server: Running, body: bytes, kind: str, code: str) -> None:
    answer = server.connect().send("POST /echo HTTP/1.1", AUTHORIZED, kind, f"Content-Length: {len(body)}",
                                   "Connection: close", body=body).until_closed()
    assert (status_of(answer), error_of(answer)) == (400, code)


def test_an_unknown_field_and_a_missing_one_are_named(server: Running) -> None:
    for body, param, message in ((b'{"text": "a", "tex": 1}', "tex", "unknown field 'tex'"),
                                 (b"{}", "text", "text is missing"),
                                 (b'{"text": 1}', "text", "text: must be"), (b"", None, "the body must be")):
        answer = server.connect().send("POST /echo HTTP/1.1", AUTHORIZED, JSON, f"Content-Length: {len(body)}",
                                       "Connection: close", body=body).until_closed()
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert (status_of(answer), error["param"]) == (400, param) and error["message"].startswith(message)


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                                  b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
                                  b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
                                  b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                                  b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000])
def test_what_is_not_http_gets_a_400_with_the_headers(server: Running, data: bytes) -> None:
    answer = server.connect().send_bytes(data).until_closed()
    assert status_of(answer) == 400 and b"content-security-policy" in answer
    assert error_of(answer) == "invalid_http" and is_well(server)


# ---------------------------------------------------------------- time


def test_a_head_that_does_not_end_is_refused(server: Running) -> None:
    answer = server.connect().send_bytes(b"GET /health HTTP/1.1\r\nHost: loc").until_closed()
    assert (status_of(answer), error_of(answer)) == (408, "request_timeout")


def test_a_silent_connection_is_closed(server: Running) -> None:
    assert server.connect().until_closed() == b""


def test_the_second_head_of_a_connection_has_its_time_too(server: Running) -> None:
    client = server.connect().send("GET /health HTTP/1.1")
    client.until(b'{"status":"ok"}')
    assert status_of(client.send_bytes(b"GET /hea").until_closed()) == 408


@pytest.mark.parametrize("body", [b"", b"{", b"{" + b" " * 9000])
def test_a_body_that_does_not_arrive_is_refused(server: Running, body: bytes) -> None:
    answer = server.connect().send("POST /raw HTTP/1.1", AUTHORIZED, JSON, "Content-Length: 10000",
                                   body=body).until_closed()
    assert (status_of(answer), error_of(answer)) == (408, "request_timeout")


def test_a_body_slower_than_the_slowest_speed_is_refused_before_the_end_of_its_time() -> None:
    """A byte now and then would hold a connection for all of `body_seconds`."""

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def read() -> None:
        bodies = Bodies(None, Limits(body_seconds=1e9, grace_seconds=0.05, bytes_per_second=1024))  # type: ignore[arg-type]
        await bodies.read({"type": "http", "headers": []}, receive, 10**9)

    with pytest.raises(Refusal, match="in time"):
        asyncio.run(read())


def test_a_client_that_leaves_in_its_body_reaches_no_route() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    bodies = Bodies(None, Limits())  # type: ignore[arg-type]
    with pytest.raises(Disconnected):
        asyncio.run(bodies.read({"type": "http", "headers": []}, receive, 10))
    asyncio.run(bodies({"type": "http", "headers": [], "method": "POST"}, receive, None))  # type: ignore[arg-type]


def test_a_client_that_does_not_read_a_stream_is_cut_off(server: Running) -> None:
    client = server.connect().send("GET /stream?endless=true HTTP/1.1", AUTHORIZED)
    while not server.server_state.tasks:
        time.sleep(0.01)
    while server.server_state.tasks:
        time.sleep(0.01)
    assert not client.until_closed().endswith(b"\r\n0\r\n\r\n")  # cut, not ended


def test_a_send_that_blocks_ends() -> None:
    aborted = []

    async def blocked(message: Any) -> None:
        await asyncio.Event().wait()

    async def send() -> None:
        scope = {"bardlet.abort": lambda: aborted.append(True)}
        exchange = Exchange(scope, None, blocked, 0.01)  # type: ignore[arg-type]
        await exchange.send({"type": "http.response.start", "status": 200, "headers": []})

    with pytest.raises(ClientTooSlow):
        asyncio.run(send())
    assert aborted == [True]


def test_an_error_in_a_stream_is_its_last_event(server: Running) -> None:
    client = server.connect().send("GET /stream?broken=true HTTP/1.1", AUTHORIZED, "Connection: close")
    answer = client.until_closed()
    assert b"data: 1" in answer and b'"code":"internal_error"' in answer and b"secret" not in answer


# ---------------------------------------------------------------- connections


def test_idle_connections_make_room_for_new_ones(server: Running) -> None:
    silent = [server.connect() for _ in range(3 * SHORT.connections)]
    for _ in range(3):
        assert is_well(server)
    for client in silent:
        client.close()


def test_connections_with_requests_are_kept_and_a_further_one_is_refused(server: Running) -> None:
    busy = [server.connect().send("GET /stream HTTP/1.1", AUTHORIZED) for _ in range(SHORT.connections)]
    for client in busy:
        client.until(b"data: 1")
    answer = server.connect().send("GET /health HTTP/1.1").until_closed()
    assert (status_of(answer), error_of(answer)) == (503, "too_many_connections")
    assert b"\r\nretry-after: 1\r\n" in answer and b"content-security-policy" in answer
    for client in busy:
        client.close()
    while server.server_state.connections:
        time.sleep(0.01)
    assert is_well(server)


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    request = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
    client = server.connect().send_bytes(f"{request}\r\n{request}\r\n{request}Connection: close\r\n\r\n".encode())
    assert client.until_closed().count(b'{"status":"ok"}') == 3


def test_the_limit_on_open_files_is_raised_for_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    spare = server_limits.SPARE_FILES
    for soft, hard, raised, most in ((1024, 20_000, 4096 + 2 * spare, 4096), (20_000, 20_000, None, 4096),
                                     (256, 1024, 1024, 1024 - spare), (100, 100, 100, 16)):
        calls: list[tuple[int, int]] = []
        monkeypatch.setattr(resource, "getrlimit", lambda which, pair=(soft, hard): pair)
        monkeypatch.setattr(resource, "setrlimit", lambda which, pair, calls=calls: calls.append(pair))
        assert server_limits.most_connections(4096) == most
        assert calls == ([(raised, hard)] if raised else [])


def test_connections_that_are_accepted_at_once_have_open_files_to_spare(server: Running) -> None:
    """asyncio accepts that many in a step, before the first of them can be counted and closed."""
    assert server.config.backlog == protocol.ACCEPTED <= server_limits.SPARE_FILES // 4


# ---------------------------------------------------------------- the end


def test_at_the_end_streams_get_an_error_event_and_the_others_a_503() -> None:
    with running() as server:
        stream = server.connect().send("GET /stream HTTP/1.1", AUTHORIZED)
        stream.until(b"data: 1")
        waiting = server.connect().send("POST /echo HTTP/1.1", AUTHORIZED, JSON, "Content-Length: 10")
        while len(server.app.state.traffic.running) < 2:
            time.sleep(0.01)
        server.should_exit = True
        event, answer = stream.until_closed(), waiting.until_closed()
    assert b'data: {"error":' in event and b'"code":"stopping"' in event and event.endswith(b"0\r\n\r\n")
    assert status_of(answer) == 503



@pytest.mark.parametrize("more", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b"x" * 200_000])
def test_a_client_that_leaves_is_noticed_whatever_it_sent_after_its_request(server: Running, more: bytes) -> None:
    serving.left.clear()
    connection = server.connect().send("POST /wait HTTP/1.1", AUTHORIZED, JSON, "Content-Length: 2", body=b"{}")
    with contextlib.suppress(OSError):  # the server closes the connection of a client that sends too much
        connection.send_bytes(more)
    connection.close()
    assert serving.left.wait(HANGS)
