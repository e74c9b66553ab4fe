"""`bardlet serve`: an OpenAI-compatible server for models, on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.server.settings import ServerSettings

log = logging.getLogger("bardlet")

SWITCH_SECONDS = 0.0002
"""Time after which the event loop gives way to the inference thread. That one waits for it after each operation of
torch, so with Python's 5 ms a flood of requests would slow it down many times."""

USAGE = Usage(
    "serve", "[DIR ...] [OPTIONS]",
    "Serve models to programs, by the API of OpenAI, and to your browser. Without DIR: every run below runs/. Programs "
    "send a key, which the command prints; $BARDLET_API_KEY or --api-key sets it. Ctrl-C stops the server.",
    (("bardlet serve", "serve every run below runs/"),
     ("bardlet serve runs/my-qwen3 --dtype int8", "serve a model, fastest on a CPU"),
     ("bardlet serve --host 0.0.0.0 --allow-host gpt.example.org", "for other machines; $BARDLET_API_KEY has the key")),
    (Group("network", ("host", "port", "api_key", "allow_host", "allow_origin")),
     Group("limits", ("memory", "max_waiting", "max_rows", "timeout")), Group("machine", ("device", "dtype")),
     Group("output", ("log_requests", "json"))),
    positionals={"dir": "DIR"},
    metavars={"host": "ADDRESS", "api_key": "KEY", "allow_host": "NAME", "allow_origin": "ORIGIN", "memory": "GB",
              "timeout": "SECONDS"})


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command line."""

    dir: tuple[str, ...] = ()
    """Folders of models to serve (default: every run below runs/)."""
    host: str = "127.0.0.1"
    """Address to answer on. 0.0.0.0: on all networks; this needs a key that you choose."""
    port: int = 8000
    """Port to answer on. 0: a free one."""
    api_key: str | None = None
    """Key that clients send (default: $BARDLET_API_KEY, else a new one)."""
    allow_host: tuple[str, ...] = ()
    """Further names of this server, such as that of a reverse proxy."""
    allow_origin: tuple[str, ...] = ()
    """Origins of other web pages that may use the API, as http://localhost:3000."""
    memory: float | None = None
    """Memory for loaded models and their caches, in GB (default: half of the machine's)."""
    max_waiting: int = 256
    """Sequences that may wait; further requests get the status 429."""
    max_rows: int = 64
    """Sequences that generate at the same time."""
    timeout: float = 600.0
    """Seconds after which a request ends."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto takes an NVIDIA GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Precision of the weights. int8 is fastest on a CPU."""
    log_requests: bool = False
    """Print a line for each request, without its text."""
    json: bool = False
    """Print one JSON object when the server answers."""

    def __post_init__(self) -> None:
        for flag, value, valid, requirement in (
            ("port", self.port, 0 <= self.port <= 65_535, "from 0 to 65535"),
            ("memory", self.memory, self.memory is None or 0 < self.memory < 1e6, "above 0"),
            ("max-waiting", self.max_waiting, self.max_waiting >= 0, "0 or more"),
            ("max-rows", self.max_rows, self.max_rows >= 1, "at least 1"),
            ("timeout", self.timeout, 0 < self.timeout < 1e7, "above 0"),
        ):
            if not valid:
                raise BardletError(f"--{flag} {value:g}: must be {requirement}")
        for origin in self.allow_origin:
            if not origin.startswith(("http://", "https://")) or "/" in origin.partition("://")[2].rstrip("/"):
                raise BardletError(f"--allow-origin {origin}: write it as http://NAME:PORT, without a path")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    console.show_notices()
    key, given = api_key(command.api_key)
    check_installed()
    from bardlet.server import protocol, security
    from bardlet.server.folders import is_model
    from bardlet.server.limits import most_connections
    from bardlet.server.settings import Limits, ServerSettings, machine_memory
    from bardlet.server.start import Starting

    if not given and not security.is_loopback(command.host):
        raise BardletError(f"--host {command.host}: other machines can reach it, so choose a key; set "
                           "BARDLET_API_KEY to a long random text, or use --host 127.0.0.1")
    roots = folders(command.dir)
    settings = ServerSettings(
        folders=roots, runs=next((Path(root).resolve() for root in roots if not is_model(Path(root))), None),
        host=command.host, port=command.port, api_key=key, dtype=command.dtype, device=command.device,
        max_waiting=command.max_waiting, max_rows=command.max_rows, timeout=command.timeout,
        memory_gb=machine_memory() / 2 if command.memory is None else command.memory, allow_host=command.allow_host,
        allow_origin=command.allow_origin, log_requests=command.log_requests,
        limits=Limits(connections=most_connections(Limits.connections)))
    sys.setswitchinterval(SWITCH_SECONDS)
    listener = protocol.bind(settings.host, settings.port)
    with listener:
        settings = replace(settings, port=listener.getsockname()[1])
        starting = Starting(settings, lambda: load(settings), lambda app: announce(Addresses(
            protocol.url(settings.host, settings.port), app.state.sessions.new_token(),
            key if command.api_key or not given else None), app.state.models.names(), command.json))
        server = protocol.make_server(starting, settings, starting.stop)
        starting.failed = partial(setattr, server, "should_exit", True)
        server.run([listener])
    if starting.error is not None:
        raise starting.error
    return 0


def load(settings: ServerSettings) -> Any:
    """Return the app, with its models. It imports FastAPI, which takes most of the time of a start."""
    from bardlet.server.app import create_app
    from bardlet.server.models import Models

    return create_app(settings, Models(settings.folders, settings))


def api_key(typed: str | None) -> tuple[str, bool]:
    """Return the key of the server, and True if somebody chose it."""
    if typed is not None:
        log.warning("--api-key: other users of this machine can read command lines; BARDLET_API_KEY is safer")
    key = os.environ.get("BARDLET_API_KEY") if typed is None else typed
    if key is None or (typed is None and not key):
        return secrets.token_urlsafe(24), False
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        name = "BARDLET_API_KEY" if typed is None else "--api-key"
        raise BardletError(f"{name}: use ASCII letters, digits and punctuation, without spaces")
    return key, True


def check_installed() -> None:
    """BardletError if the packages of the server are missing."""
    for name in ("fastapi", "uvicorn", "pydantic", "prometheus_client"):
        if find_spec(name) is None:
            raise BardletError(f'bardlet serve needs the package {name}; install it with: pip install "bardlet[serve]"')


def folders(typed: Sequence[str]) -> tuple[str, ...]:
    """Return the folders in which the server looks for models: those that were typed, or runs/."""
    for folder in typed:
        if not os.path.isdir(folder):
            raise BardletError(f"{folder}: no such folder; `bardlet runs` lists the runs")
    return tuple(typed) or ("runs",)


@dataclass(frozen=True)
class Addresses:
    """The address of the server, the token of its link, and the key unless it is in BARDLET_API_KEY."""

    url: str
    token: str
    key: str | None

    @property
    def link(self) -> str:
        """The link that signs a browser in. Browsers do not send the part after #."""
        return f"{self.url}/#token={self.token}"


def announce(addresses: Addresses, models: Sequence[str], json: bool) -> None:
    """Print how to reach the server."""
    url, key = addresses.url, addresses.key
    if json:
        facts = {"url": url, "link": addresses.link, "models": list(models)}
        console.say_json(facts | ({"api_key": key} if key else {}))
        return
    shown = f"serving {console.count(len(models), 'model')} at {url}; Ctrl-C stops the server"
    hint = "" if models else "\nno models yet; train one in the browser, or by `bardlet train my.txt --minutes 5`"
    in_python = f'"{key}"' if key else 'os.environ["BARDLET_API_KEY"]'
    console.say(f"{shown}{hint}\n\nthe studio, in a browser (the link works once, for 10 minutes; later, sign in with "
                f"the key):\n  {addresses.link}\n\nthe key, for programs and for signing in: "
                f"{key or 'that of BARDLET_API_KEY'}\n"
                f'  curl {url}/v1/models -H "Authorization: Bearer {key or "$BARDLET_API_KEY"}"\n'
                f'  openai.OpenAI(base_url="{url}/v1", api_key={in_python})')
