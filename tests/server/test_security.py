"""Access: each refusal, by a request that the check alone refuses."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import BEARER, KEY, Running, make_app, running

from bardlet.errors import BardletError
from bardlet.server import files, security
from bardlet.server.errors import escaped, public_message
from bardlet.server.security import HEADERS, Sessions

ORIGIN = "http://127.0.0.1:8000"


class Client:
    """A client of an app, without a network."""

    def __init__(self, **settings: Any) -> None:
        self.app = make_app(**settings)

    def __call__(self, method: str, path: str, headers: Any = None, scheme: str = "http",
                 **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url=f"{scheme}://127.0.0.1:8000") as client:
                return await client.request(method, path, headers=headers, **options)

        return asyncio.run(send())

    def signed_in(self, **headers: str) -> dict[str, str]:
        """Return the headers of a browser that followed the link."""
        token = self.app.state.sessions.new_token()
        answer = self("POST", "/session", {"Origin": ORIGIN}, json={"token": token})
        assert answer.status_code == 204
        return {"Cookie": answer.headers["set-cookie"].split(";")[0], **headers}


@pytest.fixture(scope="module")
def client() -> Client:
    return Client()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


# ---------------------------------------------------------------- the key


PATHS = ("/docs", "/metrics", "/openapi.json", "/v1/models", "/echo", "/no-such-path", "/static/no-such-file", "/redoc",
         "/health/", "/static", "/session", "/Health")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_without_the_key_every_path_gives_the_same_answer(client: Client, method: str) -> None:
    answers = [client(method, path) for path in PATHS if (method, path) != ("POST", "/session")]
    assert {answer.status_code for answer in answers} == {401}
    assert len({(answer.content, tuple(answer.headers.items())) for answer in answers}) == 1
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert method == "HEAD" or answers[0].json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY,
                                   f"Bearer {KEY.upper()}", "Bearer \xe9"])
def test_a_wrong_key_is_refused(client: Client, value: str) -> None:
    assert client("GET", "/metrics", {"Authorization": value.encode("latin-1")}).status_code == 401  # type: ignore[dict-item]


def test_the_key_opens_everything(client: Client) -> None:
    for path in ("/docs", "/metrics", "/openapi.json"):
        assert client("GET", path, BEARER).status_code == 200
    assert client("POST", "/echo", BEARER, json={"text": "a"}).json() == {"text": "a"}
    assert client("GET", "/no-such-path", BEARER).json()["error"]["code"] == "unknown_path"
    assert client("DELETE", "/echo", BEARER).json()["error"]["code"] == "unknown_method"
    assert client("GET", "/docs", {"Authorization": f"bearer  {KEY} "}).status_code == 200


def test_two_keys_are_refused_even_if_one_is_right(client: Client) -> None:
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")]
    assert client("GET", "/metrics", headers).status_code == 400


def test_public_paths_need_no_key_and_hold_no_data(client: Client) -> None:
    assert client("GET", "/health").json() == {"status": "ok"}
    for path in ("/", *files.STATIC):
        answer = client("GET", path)
        assert answer.status_code == 200 and client("HEAD", path).status_code == 200
        assert KEY not in answer.text
    assert client("POST", "/").status_code == 401


@pytest.mark.parametrize("query", ["api_key=x", "API-KEY=x", "key=x", "access_token=x", "token=x", "a=1&%6bey=x",
                                   "a=1;key=x", "key", f"k={KEY}", f"authorization=Bearer%20{KEY}"])
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/no-such-path"])
def test_a_key_in_the_address_is_refused(client: Client, path: str, query: str) -> None:
    for headers in (None, BEARER):
        answer = client("GET", f"{path}?{query}", headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "key_in_query")


# ---------------------------------------------------------------- signing in


def test_a_link_signs_in_once_and_the_cookie_is_out_of_reach_of_scripts_and_other_sites(client: Client) -> None:
    token = client.app.state.sessions.new_token()
    answer = client("POST", "/session", {"Origin": ORIGIN}, json={"token": token})
    assert re.fullmatch(r"bardlet_8000=[\w-]{43}; Path=/; HttpOnly; SameSite=Strict", answer.headers["set-cookie"])
    cookie = {"Cookie": answer.headers["set-cookie"].split(";")[0]}
    assert client("GET", "/metrics", cookie).status_code == 200
    again = client("POST", "/session", {"Origin": ORIGIN}, json={"token": token})
    assert again.status_code == 401 and "used before" in again.json()["error"]["message"]
    assert "set-cookie" not in again.headers
    client("DELETE", "/session", {**cookie, "Origin": ORIGIN})
    assert client("GET", "/metrics", cookie).status_code == 401


def test_over_https_the_cookie_is_secure(client: Client) -> None:
    answer = client("POST", "/session", {"Origin": "https://127.0.0.1:8000"}, "https", json={"key": KEY})
    assert answer.headers["set-cookie"].endswith("; Secure")
    wrong = client("POST", "/session", json={"key": "x"})
    assert wrong.status_code == 401 and client("POST", "/session", json={}).status_code == 401


def test_links_and_sessions_expire() -> None:
    now = [0.0]
    sessions = Sessions(KEY, clock=lambda: now[0])
    late, token = sessions.new_token(), sessions.new_token()
    session = sessions.redeem(token)
    assert session and sessions.redeem(token) is None
    now[0] = security.TOKEN_SECONDS
    assert sessions.redeem(late) is None
    now[0] = security.SESSION_SECONDS - 1
    assert sessions.is_valid(session)
    now[0] += security.SESSION_SECONDS
    assert not sessions.is_valid(session)
    first = sessions.sign_in(KEY)
    for _ in range(security.MOST_SESSIONS):
        now[0] += 1
        last = sessions.sign_in(KEY)
    assert first and last and not sessions.is_valid(first) and sessions.is_valid(last)
    assert len(sessions.sessions) == security.MOST_SESSIONS


def test_a_session_changes_something_only_from_our_own_page(client: Client) -> None:
    """Browsers send a SameSite cookie with requests of other ports of this host, too."""
    cookie, body = client.signed_in(), {"text": "a"}
    assert client("POST", "/echo", {**cookie, "Origin": ORIGIN}, json=body).status_code == 200
    assert client("POST", "/echo", {**cookie, "Sec-Fetch-Site": "same-origin"}, json=body).status_code == 200
    assert client("POST", "/echo", cookie, json=body).status_code == 403
    assert client("POST", "/echo", {**cookie, "Sec-Fetch-Site": "none"}, json=body).status_code == 403
    for site in ("same-site", "cross-site"):
        assert client("GET", "/metrics", {**cookie, "Sec-Fetch-Site": site}).status_code == 401
    assert client("GET", "/metrics", {**cookie, "Sec-Fetch-Site": "none"}).status_code == 200


def test_a_wrong_key_is_not_rescued_by_a_session(client: Client) -> None:
    assert client("GET", "/metrics", client.signed_in(Authorization="Bearer x")).status_code == 401
    for value in ("bardlet_8000=", "bardlet_8000=x", "other=x; bardlet_8000"):
        assert client("GET", "/metrics", {"Cookie": value}).status_code == 401


def test_a_person_without_a_session_gets_a_page_to_sign_in(client: Client) -> None:
    for path in ("/docs", "/no-such-path"):
        answer = client("GET", path, {"Accept": "text/html,*/*"})
        assert answer.status_code == 401 and 'id="sign-in"' in answer.text
        assert answer.headers["www-authenticate"] == "Bearer"


# ---------------------------------------------------------------- Host, Origin, headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "10.0.0.1",
                                  "evil@127.0.0.1", "127.0.0.1:99999", "127.0.0.1/", "127.0.0.1 ", "", "[::1", "a,b"])
def test_other_host_names_are_refused(client: Client, host: str) -> None:
    """DNS rebinding: a page of evil.example whose name now leads here."""
    for path in ("/", "/health", "/metrics"):
        answer = client("GET", path, {**BEARER, "Host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (421, "unknown_host")


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "127.0.0.1:3", "[::1]:8000", "LOCALHOST", "127.9.9.9"])
def test_loopback_names_are_accepted(client: Client, host: str) -> None:
    assert client("GET", "/health", {"Host": host}).status_code == 200


def test_a_public_server_answers_under_addresses_and_given_names() -> None:
    client = Client(host="0.0.0.0", allow_host=("gpt.example.org",))
    for host, status in (("192.168.1.7:8000", 200), ("gpt.example.org", 200), ("evil.example", 421)):
        assert client("GET", "/health", {"Host": host}).status_code == status
    behind = {"Host": "gpt.example.org", "Origin": "https://gpt.example.org"}  # the proxy speaks TLS, we do not
    assert client("GET", "/health", behind).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:3000", "https://127.0.0.1:8000",
                                    "http://localhost:8000", "http://127.0.0.1", "", "127.0.0.1:8000"])
def test_other_origins_are_refused_even_with_the_key(client: Client, origin: str) -> None:
    for method, path in (("GET", "/health"), ("POST", "/echo"), ("OPTIONS", "/echo"), ("POST", "/session")):
        answer = client(method, path, {**BEARER, "Origin": origin, "Access-Control-Request-Method": "POST"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_allowed_origin_gets_cors_and_needs_the_key() -> None:
    client, origin = Client(allow_origin=("http://localhost:3000",)), {"Origin": "http://localhost:3000"}
    asked = {**origin, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    preflight = client("OPTIONS", "/no-such-path", asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert preflight.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert "access-control-allow-credentials" not in preflight.headers
    answer = client("POST", "/echo", {**origin, **BEARER}, json={"text": "a"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert answer.headers["vary"] == "Origin"
    assert client("POST", "/echo", {**origin, **client.signed_in()}, json={"text": "a"}).status_code == 401
    assert client("POST", "/echo", {"Origin": "http://localhost:3001", **BEARER}).status_code == 403
    assert "access-control-allow-origin" not in client("GET", "/health").headers


def test_every_response_has_the_headers(client: Client) -> None:
    for path, headers in (("/", None), ("/static/docs.js", None), ("/health", None), ("/docs", BEARER), ("/docs", None),
                          ("/fail", BEARER), ("/no-such-path", BEARER), ("/health?key=1", None)):
        answer = client("GET", path, headers)
        for name, value in HEADERS.items():
            if name == "cache-control" and answer.headers["content-type"][:9] != "applicati":
                value = "no-cache"
            assert answer.headers.get_list(name) == [value], (path, name)
        assert "server" not in answer.headers
    for part in ("default-src 'none'", "script-src 'self';", "frame-ancestors 'none'"):
        assert part in HEADERS["content-security-policy"]


def test_our_pages_have_no_inline_code_and_no_address_of_others() -> None:
    for name in ("home.html", "docs.html", "studio.html"):
        page = files.read(name).decode()
        assert not re.search(r"<script(?![^>]* src=)|\son\w+=|\sstyle=|<style|javascript:|https?:", page)
    for name in files.STATIC.values():
        script = files.read(name).decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|https?:|@import",
                             script)


# ---------------------------------------------------------------- files and paths


@pytest.mark.parametrize("path", [
    "/static/../errors.py", "/static/%2e%2e/errors.py", "/static/..%2ferrors.py", "/static/..%5cerrors.py",
    "/static/docs.js%00", "/static//etc/passwd", "/static/%2fetc/passwd", "/..%2f..%2fetc/passwd", "/static/home.html",
    "/static/%252e%252e/errors.py", "/static/docs.js/", "/static/./docs.js", "/static/C:%5cwindows", "/static/\xff",
    "//health", "/static/../health", "/./health"])
def test_no_path_leads_out_of_the_table_of_files(server: Running, path: str) -> None:
    """As they are on the wire: clients would simplify some of them."""
    for key, status in (("", b"401"), (f"Authorization: Bearer {KEY}", b"404")):
        target = path.encode("latin-1").replace(b"\xff", b"%ff").decode()
        lines = [f"GET {target} HTTP/1.1", "Connection: close", *([key] if key else [])]
        answer = server.connect().send(*lines).until_closed()
        assert answer.split()[1] == status, answer


def test_errors_have_no_paths_of_this_machine(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    answer = client("GET", "/fail?kind=user", BEARER)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "passwd: no such model; see /v1/models"
    with caplog.at_level(logging.ERROR, "bardlet"):
        answer = client("GET", "/fail", BEARER)
    error = answer.json()["error"]
    assert answer.status_code == 500 and error["type"] == "server_error"
    assert "secret" not in answer.text and "/home" not in answer.text
    number = re.fullmatch(r"Internal error (\w{8}); .*", error["message"])
    assert number and number[1] in caplog.text and "RuntimeError: secret" in caplog.text
    assert "\x1b" not in caplog.text
    assert client("GET", "/fail?kind=refusal", BEARER).status_code == 409


def test_public_message_replaces_folders_by_names(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "secret place" / "model-a"
    folder.mkdir(parents=True)
    for written in (folder, "secret place/model-a"):
        message = public_message(BardletError(f"{written}/config.json: damaged; see {tmp_path}/x.log"), [str(written)])
        assert message == "model-a/config.json: damaged; see x.log"
    assert public_message(BardletError("2 tokens/s and/or /v1/models.")) == "2 tokens/s and/or /v1/models."


def test_requests_are_logged_without_their_query_and_with_controls_escaped(caplog: pytest.LogCaptureFixture) -> None:
    client = Client(log_requests=True)
    with caplog.at_level(logging.INFO, "bardlet"):
        client("GET", "/%1b[31m%0afake?api_key=hunter2")
    [line] = [record.getMessage() for record in caplog.records if record.name == "bardlet"]
    assert line.startswith("127.0.0.1 GET /\\x1b[31m\\nfake: 400 in ")
    assert escaped("a\u202eb\x9b\ud800") == "a\\u202eb\\x9b\\ud800" and len(escaped("x" * 9999)) == 503


def test_errors_are_in_ascii(client: Client) -> None:
    answer = client("POST", "/echo", BEARER, json={"text": "a", "\x1b\x9b31m\u202e\u2028": 1})
    assert re.fullmatch(rb"[ -~]*", answer.content)
    assert answer.json()["error"]["param"] == "\x1b\x9b31m\u202e\u2028"


def test_metrics_have_no_text_of_clients(client: Client) -> None:
    client("BREW", "/<script>", BEARER)
    client("POST", "/echo", BEARER, json={"text": "hunter2"})
    client("GET", "/metrics")
    text = client("GET", "/metrics", BEARER).text
    assert 'bardlet_requests_total{method="POST",route="/echo",status="200"}' in text
    assert 'bardlet_requests_total{method="other",route="other",status="404"}' in text
    assert 'bardlet_refusals_total{reason="invalid_api_key"}' in text
    assert "script" not in text and "hunter2" not in text
    metrics = client.app.state.metrics
    metrics.tokens(read=3, generated=2)
    metrics.first_token(0.2)
    metrics.watch(lambda: 7, lambda: 9)
    for line in ("bardlet_tokens_generated_total 2.0", "bardlet_tokens_read_total 3.0", "bardlet_sequences_running 7.0",
                 "bardlet_sequences_waiting 9.0", "bardlet_first_token_seconds_count 1.0"):
        assert line in metrics.text().decode()


def test_openapi_names_the_key_and_the_refusals(client: Client) -> None:
    schema = client("GET", "/openapi.json", BEARER).json()
    assert schema["security"] == [{"key": []}] and schema["paths"]["/health"]["get"]["security"] == []
    assert "422" not in schema["paths"]["/echo"]["post"]["responses"] and "/session" not in schema["paths"]
    assert {"400", "401", "413", "429"} <= schema["paths"]["/echo"]["post"]["responses"].keys()
