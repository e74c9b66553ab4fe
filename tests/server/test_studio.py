"""The studio of a server: the files that people give it, the commands that it runs, and its requests."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import BEARER, make_app

from bardlet.server.errors import Refusal
from bardlet.server.settings import Limits
from bardlet.server.studio.commands import Training, arguments, run_name, shown
from bardlet.server.studio.files import NAME, Files, kind_of, stored_name

# ---------------------------------------------------------------- files


@given(st.text())
def test_a_stored_name_is_a_plain_file_name(name: str) -> None:
    stored = stored_name(name)
    assert stored == stored_name(stored)
    assert 0 < len(stored) <= NAME and shlex.quote(stored).strip("'") == stored
    assert not set(stored) & set("/\\\0\n\r\t '\"$`*?;&|<>") and stored[0] not in "-."


@pytest.mark.parametrize(("given_name", "stored"), [
    ("../../etc/passwd", "passwd"), ("C:\\texts\\my play.txt", "my-play.txt"), ("-rf", "rf"), (".bashrc", "bashrc"),
    ("Ода.txt", "Ода.txt"), ("$(reboot).txt", "reboot-.txt"), ("", "text.txt"),
    ("a" * 500 + ".jsonl", "a" * 74 + ".jsonl")])
def test_stored_names(given_name: str, stored: str) -> None:
    assert stored_name(given_name) == stored


async def parts(*values: bytes) -> AsyncIterator[bytes]:
    for value in values:
        yield value


def receive(files: Files, name: str, *values: bytes) -> str:
    return asyncio.run(files.receive(name, parts(*values))).id


def test_files_of_one_name_and_of_one_content(tmp_path: Path) -> None:
    files = Files(tmp_path / "files", 100)
    first = receive(files, "a.txt", b"one ", b"text")
    assert receive(files, "a.txt", b"one text") == first == "a.txt"
    assert receive(files, "a.txt", b"another") == "a-2.txt"
    assert files.path("a.txt").read_bytes() == b"one text"
    assert {file.id for file in files.all()} == {"a.txt", "a-2.txt"}
    for values, status in (((), 400), ((b"x" * 60, b"x" * 60), 413)):
        with pytest.raises(Refusal) as refusal:
            receive(files, "b.txt", *values)
        assert refusal.value.status == status
    assert sorted(os.listdir(tmp_path / "files")) == ["a-2.txt", "a.txt"]


@pytest.mark.parametrize(("name", "head", "refused"), [
    ("a.docx", b"PK\x03\x04", True), ("A.PDF", b"%PDF-1.7", True), ("a.rtf", b"{\\rtf1", True),
    ("a.txt", b"PK\x03\x04", False), ("a.docx", b"a text after all", False)])
def test_documents_of_a_word_processor_are_refused(name: str, head: bytes, refused: bool, tmp_path: Path) -> None:
    files = Files(tmp_path / "files", 100)
    if not refused:
        receive(files, name, head)
        return
    with pytest.raises(Refusal, match="plain text"):
        receive(files, name, head)
    assert os.listdir(files.folder) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../a.txt", "/etc/passwd", "a.txt/", ".hidden", "link", "no.txt"])
def test_only_stored_files_have_a_path(name: str, tmp_path: Path) -> None:
    files = Files(tmp_path / "files", 100)
    receive(files, "a.txt", b"text")
    (files.folder / ".hidden").write_text("x")
    (files.folder / "link").symlink_to(tmp_path)
    with pytest.raises(Refusal):
        files.path(name)


@pytest.mark.parametrize(("name", "text", "kind"), [
    ("a.txt", '{"messages": []}', "text"), ("a.jsonl", '{"messages": [{"role": "user"', "conversations"),
    ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "preferences"),
    ("a.json", '[\n {"conversations": []}]', "conversations"), ("a.jsonl", '{"text": "a"}', "text"),
    ("a.jsonl", '{"prompt": "a", "completion": "b", "label": true}', "preferences"), ("a.jsonl", "", "text")])
def test_what_a_file_holds(name: str, text: str, kind: str) -> None:
    assert kind_of(Path(name), text) == kind


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize(("form", "command"), [
    ({"files": ["a.txt"], "minutes": 10}, "bardlet train files/a.txt --minutes 10"),
    ({"files": ["names"], "steps": 5, "seed": 3, "tokenizer": "byte"},
     "bardlet train names --tokenizer byte --steps 5 --seed 3"),
    ({"files": ["a.txt"], "base": "b", "tokenizer": "byte"}, "bardlet train files/a.txt --init models/b"),
    ({"kind": "pairs", "files": ["a.de", "a.en"]}, "bardlet train --source files/a.de --target files/a.en"),
    ({"kind": "conversations", "files": ["c.jsonl"], "base": "b", "lora": 8},
     "bardlet sft models/b files/c.jsonl --lora 8"),
    ({"kind": "preferences", "files": ["p.jsonl"], "base": "b", "minutes": 0.5},
     "bardlet dpo models/b files/p.jsonl --minutes 0.5")])
def test_the_command_of_a_form(form: dict[str, Any], command: str) -> None:
    words = arguments(Training(**form), "files/{}".format, "models/{}".format)
    assert shown(words).replace(" --sample-tokens 200", "") == command


@pytest.mark.parametrize("form", [{"kind": "pairs", "files": ["a"]}, {"kind": "conversations", "files": ["a"]}])
def test_incomplete_forms(form: dict[str, Any]) -> None:
    with pytest.raises(Refusal):
        arguments(Training(**form), str, str)


def test_names_of_runs() -> None:
    taken = {"ode", "ode-2"}.__contains__
    assert run_name(Training(files=["ode.txt"]), taken) == "ode-3"
    assert run_name(Training(kind="conversations", files=["c.jsonl"], base="b"), taken) == "c-chat"
    assert run_name(Training(files=["ode.txt"], name="Ода"), taken) == "Ода"
    for name in ("ode", "", ".x", "-x", "a/b", "a b", "..", "$x"):
        with pytest.raises(Refusal):
            run_name(Training(files=["ode.txt"], name=name), taken)


# ---------------------------------------------------------------- requests


def ask(app: Any, method: str, path: str, headers: Any = BEARER, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(send())


@pytest.fixture
def app(tmp_path: Path) -> Any:
    return make_app(runs=tmp_path / "runs", limits=Limits(upload=5_000_000))


FILE, JSON = ({**BEARER, "Content-Type": f"application/{kind}"} for kind in ("octet-stream", "json"))


def test_a_file_is_uploaded_and_trained(app: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file larger than other bodies may be. The job is queued; the app has no queue that would start it here."""
    monkeypatch.chdir(tmp_path)
    app.state.studio.directory = tmp_path
    text = b"a bard sang. " * 300_000
    file = ask(app, "POST", "/studio/files?name=my%20song.txt", FILE, content=text).json()
    assert file["id"] == "my-song.txt" and file["bytes"] == len(text)
    assert ask(app, "GET", "/studio/files").json()["files"] == [file]
    job = ask(app, "POST", "/studio/jobs", json={"files": ["my-song.txt"], "minutes": 1}).json()
    assert job["state"] == "waiting" and job["run"] == "my-song"
    assert job["command"] == ("bardlet train runs/.studio/files/my-song.txt --minutes 1 --sample-tokens 200 --out "
                              "runs/my-song")
    second = ask(app, "POST", "/studio/jobs", json={"files": ["my-song.txt"], "minutes": 1}).json()
    assert second["run"] == "my-song-2"
    assert ask(app, "GET", "/studio/jobs").json()["jobs"] == [{**each, "has_run": False} for each in (second, job)]
    assert ask(app, "POST", f"/studio/jobs/{job['id']}/stop").json()["state"] == "stopped"
    assert ask(app, "GET", "/studio/runs").json() == {"runs": [], "deleted": []}


def test_no_module_of_the_user_is_imported(app: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of texts may also have a random.py: commands that start there do not import it."""
    monkeypatch.chdir(tmp_path)
    app.state.studio.directory = tmp_path
    (tmp_path / "random.py").write_text("raise SystemExit('imported')")
    file = ask(app, "POST", "/studio/files?name=a.txt", FILE, content=b"a bard sang. " * 40).json()
    shown = ask(app, "POST", "/studio/previews", json={"files": [file["id"]]})
    assert shown.status_code == 200 and shown.json()["count"] == 1, shown.text


def test_two_trainings_that_come_at_once_get_two_names(app: Any, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    studio = app.state.studio
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: studio.start(Training(files=["names"])), range(8)))
    assert len({job.run for job in jobs}) == 8


def test_a_folder_is_no_option(app: Any, tmp_path: Path) -> None:
    app.state.studio.directory = tmp_path
    assert app.state.studio._shown(tmp_path / "--json") == "./--json"


def test_files_are_shown_as_a_training_reads_them(app: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    app.state.studio.directory = tmp_path
    good = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
    content = f'{30 * good}{{"a": 1}}\n'.encode()
    file = ask(app, "POST", "/studio/files?name=c.jsonl", FILE, content=content).json()
    form = {"files": [file["id"]], "kind": file["kind"]}
    shown = ask(app, "POST", "/studio/previews", json=form).json()
    assert shown["command"] == "bardlet data show runs/.studio/files/c.jsonl --kind conversations"
    assert (shown["count"], shown["left_out"], shown["first"][0]) == (30, 1, [["user", "Hi"], ["assistant", "Ho"]])
    assert shown["notes"][0].startswith("c.jsonl: left out 1 of 31 records: line 31: ")
    refused = ask(app, "POST", "/studio/previews", json={**form, "kind": "preferences"})
    assert refused.status_code == 400 and "none of the 31 records can be used" in refused.json()["error"]["message"]


ACTIONS = [("POST", "/studio/previews", {"json": {"files": ["names"]}}),
           ("POST", "/studio/ladder", {"json": {}}), ("POST", "/studio/downloads?run=a", {}),
           ("POST", "/studio/files?name=a.txt", {"content": b"x"}),
           ("POST", "/studio/plans", {"json": {"files": ["a"]}}),
           ("POST", "/studio/jobs", {"json": {"files": ["names"]}}), ("POST", "/studio/jobs/x/stop", {}),
           ("POST", "/studio/runs/delete?run=a", {}), ("POST", "/studio/runs/restore?deleted=a", {}),
           ("POST", "/studio/runs/resume?run=a", {})]


def test_every_action_is_tried(app: Any) -> None:
    """ACTIONS has each route that changes something, so that none is left open by mistake."""
    known = {(method, path.partition("?")[0].replace("/x/", "/{job}/")) for method, path, _ in ACTIONS}
    routes = {(method, route.path) for route in app.routes for method in getattr(route, "methods", ())
              if route.path.startswith("/studio") and method != "GET"}
    assert routes - {("POST", f"/studio/{name}") for name in ("inside", "neighbors", "rungs", "alignment")} <= known


@pytest.mark.parametrize(("method", "path", "options"), ACTIONS)
def test_no_action_without_a_key_or_from_another_site(app: Any, method: str, path: str, options: Any,
                                                      tmp_path: Path) -> None:
    for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401),
                            ({**BEARER, "Origin": "http://evil.example"}, 403),
                            ({**BEARER, "Origin": "null"}, 403), ({**BEARER, "Host": "evil.example"}, 421)):
        assert ask(app, method, path, headers, **options).status_code == status
    session = app.state.sessions.sign_in(app.state.settings.api_key)
    cookie = {"Cookie": f"bardlet_8000={session}"}
    for headers in (cookie, {**cookie, "Sec-Fetch-Site": "cross-site"}, {**cookie, "Sec-Fetch-Site": "same-site"},
                    {**cookie, "Origin": "http://127.0.0.1:8001"}):
        assert ask(app, method, path, headers, **options).status_code in (401, 403)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("path", "headers", "options", "status", "code"), [
    ("/studio/files", BEARER, {"content": b"x"}, 400, "invalid_content_type"),
    ("/studio/files", {**BEARER, "Content-Type": "text/plain"}, {"content": b"x"}, 400, "invalid_content_type"),
    ("/studio/files", FILE, {"content": b"x" * 5_000_001}, 413, "body_too_large"),
    ("/studio/files", FILE, {"content": b""}, 400, "empty_file"),
    ("/studio/jobs", BEARER, {"json": {"files": ["../../etc/passwd"]}}, 404, "file_not_found"),
    ("/studio/jobs", BEARER, {"json": {"files": ["names"], "reward": "rm"}}, 400, "unknown_parameter"),
    ("/studio/jobs", JSON, {"content": b'{"files": ["names"], "minutes": 1e999}'}, 400, "invalid_json"),
    ("/studio/jobs", BEARER, {"json": {"files": ["names"], "base": "../x"}}, 404, "run_not_found"),
    ("/studio/jobs", BEARER, {"json": {"files": ["names"], "name": "../x"}}, 400, "invalid_value"),
    ("/studio/jobs/../x/stop", BEARER, {}, 404, "unknown_path"),
    ("/studio/runs/delete?run=../x", BEARER, {}, 404, "run_not_found")])
def test_refusals(app: Any, path: str, headers: Any, options: Any, status: int, code: str) -> None:
    answer = ask(app, "POST", path, headers, **options)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


def test_a_server_of_models_alone_has_no_studio() -> None:
    assert ask(make_app(), "GET", "/studio/runs").json()["error"]["code"] == "no_studio"
