"""Figures for /metrics. A label has one of a few values of ours, never a client's text."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The figures of one server, in a registry of its own. Methods may be called from any thread."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("bardlet_requests", "Requests, by route and status", ("method", "route", "status"),
                                 registry=registry)
        self._refusals = Counter("bardlet_refusals", "Refused requests, by reason", ("reason",), registry=registry)
        self._generated = Counter("bardlet_tokens_generated", "Tokens generated", registry=registry)
        self._read = Counter("bardlet_tokens_read", "Prompt tokens", registry=registry)
        self._running = Gauge("bardlet_sequences_running", "Sequences that generate now", registry=registry)
        self._waiting = Gauge("bardlet_sequences_waiting", "Sequences in the queue", registry=registry)
        self._first = Histogram("bardlet_first_token_seconds", "Time from a request to its first token",
                                buckets=FIRST_TOKEN_SECONDS, registry=registry)

    def request(self, method: str, route: str, status: int) -> None:
        """Count a request. route: the template of its path."""
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()

    def refused(self, reason: str) -> None:
        """Count a refusal. reason: a code of ours, such as "rate_limit_exceeded"."""
        self._refusals.labels(reason).inc()

    def tokens(self, *, read: int = 0, generated: int = 0) -> None:
        """Count tokens of prompts, and generated ones."""
        self._read.inc(read)
        self._generated.inc(generated)

    def first_token(self, seconds: float) -> None:
        """Record the time from a request to its first token."""
        self._first.observe(seconds)

    def watch(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Read the number of running and of waiting sequences from these functions."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)
