"""Settings of the server. Nothing here imports torch or FastAPI."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

DTYPES = ("auto", "fp32", "bf16", "int8")

MEGABYTE, GIGABYTE = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on clients, in bytes and seconds."""

    body: int = 2 * MEGABYTE
    """Bytes of a request's body."""
    upload: int = 4 * GIGABYTE
    """Bytes of a file for training."""
    head_seconds: float = 10.0
    """Time for the head of a request, from the first byte of a connection or of the next request on it."""
    body_seconds: float = 30.0
    """Time for the body of a request."""
    grace_seconds: float = 5.0
    """Time after which `bytes_per_second` counts."""
    bytes_per_second: int = 1024
    """Slowest average speed of a body that takes longer than `grace_seconds`."""
    send_seconds: float = 60.0
    """Time that a client may leave a response unread."""
    keep_alive_seconds: int = 15
    """Time that a connection may stay open without a request."""
    linger_seconds: float = 2.0
    """Time to discard the body of a refused request, so that its client reads the refusal."""
    connections: int = 4096
    """Open connections; past them, the oldest one without a request is closed."""
    shutdown_seconds: int = 5
    """Time for responses to end after Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server, all of them resolved."""

    folders: tuple[str, ...]
    """Folders of the models to serve."""
    runs: Path | None = None
    """Folder of the runs that the studio trains; None: it only shows models."""
    api_key: str
    """The key that clients send as `Authorization: Bearer KEY`."""
    memory_gb: float
    """Memory for loaded models and their caches, in GB (1e9 bytes)."""
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    device: str = "auto"
    max_waiting: int = 256
    """Sequences that wait for a place; beyond them a request is refused with 429."""
    max_rows: int = 64
    """Sequences that generate at the same time."""
    timeout: float = 600.0
    """Seconds after which a request's generation ends."""
    allow_host: tuple[str, ...] = ()
    """Further names in the Host header: those of a reverse proxy."""
    allow_origin: tuple[str, ...] = ()
    """Origins of pages, other than ours, whose scripts may use the API with the key."""
    log_requests: bool = False
    """Log a line for each request."""
    limits: Limits = field(default_factory=Limits)


def machine_memory(root: Path = Path("/")) -> float:
    """Return the memory of this machine, or of this process's container, in GB; 8 where it is unknown.

    root: folder that contains /sys.
    """
    known = []
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no limit: no file, or "max"
            known.append(int((root / "sys/fs/cgroup" / name).read_text()))
    return min(known, default=8_000_000_000) / 1e9
