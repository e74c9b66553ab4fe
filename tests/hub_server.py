"""A small Hugging Face Hub on this machine, with the answers that huggingface_hub needs to fetch a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """The models on the server, and how it misbehaves.

    files: (OWNER/NAME, commit) to the contents by name. branches: (OWNER/NAME, branch) to a commit. large: suffixes of
    files in Git LFS, which have a sha256. lie: contents that are served in place of the listed ones, of the same size.
    cut: bytes after which the transfer of a file ends, each used once or, with `always_cut`, each time. short: files
    that are served, whole for HTTP, without their second half. status: (code, X-Error-Code) of every answer about a
    model. answer: the answer to every request. log: the requests.
    """

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    large: tuple[str, ...] = (".safetensors", ".bin")
    lie: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    always_cut: bool = False
    short: set[str] = field(default_factory=set)
    status: dict[str, tuple[int, str]] = field(default_factory=dict)
    answer: bytes | None = None
    log: list[str] = field(default_factory=list)
    endpoint: str = ""

    def add(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Add the files of a folder as a commit of a branch, and return the commit."""
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
                    if path.is_file()}
        commit = hashlib.sha1(repr((repo, sorted(contents.items()))).encode()).hexdigest()
        self.files[repo, commit], self.branches[repo, branch] = contents, commit
        return commit

    def commit(self, repo: str, revision: str) -> str | None:
        """Return the commit of a branch or a commit."""
        return self.branches.get((repo, revision), revision if (repo, revision) in self.files else None)

    def fetched(self) -> list[str]:
        """Return the names of the files whose contents were sent, and forget them."""
        names = [line.rpartition("/")[2] for line in self.log if line.startswith("GET") and "/resolve/" in line]
        self.log.clear()
        return names


def listing(hub: Hub, repo: str, commit: str) -> dict[str, Any]:
    """Return a model as /api/models/ does with blobs=True."""
    siblings = []
    for name, content in hub.files[repo, commit].items():
        entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
        if name.endswith(hub.large):
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        siblings.append(entry)
    return {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve the models on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.log.append(f"{self.command} {path}")
            if hub.answer is not None:
                return self.reply(200, hub.answer)
            if path.startswith("/api/models/"):
                repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
                name = ""
            else:
                repo, _, rest = path[1:].partition("/resolve/")
                revision, _, name = rest.partition("/")
            if repo in hub.status:
                code, error = hub.status[repo]
                return self.reply(code, b"{}", **{"X-Error-Code": error} if error else {})
            if not any(repo == known for known, _ in hub.files):
                return self.reply(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
            if (commit := hub.commit(repo, revision or "main")) is None:
                return self.reply(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
            if not name:
                return self.reply(200, json.dumps(listing(hub, repo, commit)).encode())
            if name not in hub.files[repo, commit]:
                return self.reply(404, b"{}", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            self.send_file(name, commit, hub.files[repo, commit][name])

        def send_file(self, name: str, commit: str, content: bytes) -> None:
            etag = hashlib.sha256(content).hexdigest() if name.endswith(hub.large) else git_hash(content)
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            if name.endswith(hub.large):
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            if self.command == "HEAD":
                return self.reply(200, content, **headers)
            content = hub.lie.get(name, content)
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                hub.log.append(f"RANGE {name} {start}")
            if name in hub.short:
                content = content[: len(content) // 2]
            cut = hub.cut.get(name) if hub.always_cut else hub.cut.pop(name, None)
            self.reply(206 if start else 200, content[start:], cut, **headers)

        def reply(self, code: int, content: bytes, cut: int | None = None, **headers: str) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
