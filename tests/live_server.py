"""`bardlet serve` in its own process, and clients that see every byte: for tests under load."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY = "correct-horse-battery-staple"
HANGS = 300
"""Seconds after which a request counts as hanging: no machine is that slow."""


@dataclass
class Reply:
    """An answer. whole: it ended as its head said, and a stream with [DONE]."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    value: Any = None
    events: list[Any] = field(default_factory=list)
    whole: bool = False

    @property
    def text(self) -> str:
        """The text of the first choice of a completion."""
        if self.value is not None:
            return str(self.value["choices"][0]["text"])
        return "".join(choice["text"] for event in self.events for choice in event.get("choices", ())
                       if choice["index"] == 0)


class Live:
    """A server process. All paths need the key."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def head(self, length: int, path: str = "/v1/completions", *lines: str) -> bytes:
        """Return the head of a POST request."""
        return "\r\n".join([f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", f"Authorization: Bearer {KEY}",
                            "Content-Type: application/json", f"Content-Length: {length}", "Connection: close", *lines,
                            "", ""]).encode()

    @asynccontextmanager
    async def posted(self, body: Any, path: str = "/v1/completions"
                     ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Send a request; yield its connection, which is closed afterwards."""
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**26)
        try:
            writer.write(self.head(len(data), path) + data)
            yield reader, writer
        finally:
            writer.close()

    async def ask(self, body: Any, path: str = "/v1/completions", events: int | None = None) -> Reply:
        """Send a request and read its answer; events: leave after this many of a stream."""
        async with asyncio.timeout(HANGS), self.posted(body, path) as (reader, _):
            return await read(reader, events)

    def get(self, path: str, key: str = KEY) -> str:
        """Return the answer to GET."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}",
                                         headers={"Authorization": f"Bearer {key}"} if key else {})
        with urllib.request.urlopen(request, timeout=HANGS) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """Return a figure of /metrics."""
        match = re.search(rf"^bardlet_{name} (\S+)$", self.get("/metrics"), re.MULTILINE)
        assert match, name
        return float(match[1])

    def until_idle(self) -> None:
        """Wait until nothing runs or waits: sequences of clients that left would go on for minutes."""
        end = time.monotonic() + HANGS
        while self.metric("sequences_running") or self.metric("sequences_waiting"):
            assert time.monotonic() < end, "a sequence without a client still runs"
            time.sleep(0.01)

    def resident(self) -> int:
        """Return the bytes of memory that the process holds now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


async def read(reader: asyncio.StreamReader, events: int | None = None) -> Reply:
    """Read an answer to its end, or up to a number of events."""
    reply = Reply()
    try:
        reply.status = int((await reader.readuntil(b"\r\n")).split()[1])
        while line := (await reader.readuntil(b"\r\n")).strip():
            name, _, value = line.decode("latin-1").partition(":")
            reply.headers[name.lower()] = value.strip()
        if (length := reply.headers.get("content-length")) is not None:
            reply.value = json.loads(await reader.readexactly(int(length)))
            reply.whole = True
            return reply
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                reply.events.append(json.loads(line[6:]))
            if line.startswith(b"data: [DONE]"):
                reply.whole = True
            if events is not None and len(reply.events) >= events:
                return reply
    except (asyncio.IncompleteReadError, ConnectionError, json.JSONDecodeError):
        reply.whole = False
    return reply


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the connection ends, orderly or not."""
    data = b""
    try:
        while part := await reader.read(65_536):
            data += part
    except ConnectionError:
        pass
    return data


def leave(writer: asyncio.StreamWriter, how: str) -> None:
    """Leave a connection: by "close", by "reset", or by "half-close", which says that no further request comes."""
    if how == "half-close":
        writer.write_eof()
    elif how == "reset":
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()


def environment() -> dict[str, str]:
    """Return the environment of a server: its key, and one thread."""
    return {**os.environ, "BARDLET_API_KEY": KEY, "OMP_NUM_THREADS": "1"}


@contextmanager
def live(folders: Sequence[Path], log: Path, *argv: str, port: int = 0, cwd: Path | None = None) -> Iterator[Live]:
    """Yield a server of these folders; its standard error goes to a file."""
    with log.open("a") as errors:
        command = [sys.executable, "-m", "bardlet", "serve", *map(str, folders), "--port", str(port), "--json", *argv]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=cwd,
                                   env=environment())
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Live(process, int(json.loads(line)["url"].rpartition(":")[2]), log)
    finally:
        process.kill()
        process.communicate()
