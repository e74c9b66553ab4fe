"""An engine that writes scripted tokens, with the interface of `bardlet.inference.engine`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from bardlet.errors import BardletError
from bardlet.inference import engine as real


class Handle:
    """A submitted sequence. cancelled: set by `cancel`."""

    cached_tokens = 0

    def __init__(self, engine: FakeEngine, request: Any, listener: Any, model: Any) -> None:
        self.engine, self.request, self.listener, self.model = engine, request, listener, model
        self.cancelled, self.ended, self.written, self.begun = threading.Event(), threading.Event(), 0, False

    def cancel(self) -> None:
        with self.engine.news:
            self.cancelled.set()
            self.engine.news.notify_all()

    def step(self) -> None:
        """Write a token, or end."""
        engine, request = self.engine, self.request
        if self.cancelled.is_set():
            return self.finish("cancelled")
        if (error := engine.error) is not None and self.written >= engine.after:
            return self.finish("cancelled", BardletError(error))
        if engine.late and self.written >= engine.after:
            return self.finish("deadline")
        if not self.begun and request.prompt_logprobs:
            tokens = [engine.scored(i, request) for i in request.prompt]
            self.listener.prompt([real.Token(tokens[0].id), *tokens[1:]])
        self.begun = True
        script = engine.script(request)
        if self.written >= request.max_tokens:
            return self.finish("length")
        token = script[self.written % len(script)]
        if token in request.stop_ids:
            return self.finish("stop")
        self.written += 1
        if self.listener.token(engine.scored(token, request)):
            return self.finish("stop")
        if self.written >= request.max_tokens:
            return self.finish("length")

    def finish(self, reason: str, error: BardletError | None = None) -> None:
        self.engine.active.remove(self)
        self.listener.end(reason, error)
        self.ended.set()


class FakeEngine:
    """One thread that gives each sequence a token in turn, while `go` is set."""

    def __init__(self) -> None:
        self.script: Callable[[Any], list[int]] = lambda request: [0]
        self.error: str | None = None
        self.late = self.busy = self.stuck = self.closed = False
        self.infinite = False
        self.after = 0  # tokens before `error` or `late` counts
        self.go = threading.Event()
        self.go.set()
        self.news = threading.Condition()
        self.active: list[Handle] = []
        self.handles: list[Handle] = []
        self.models: list[Any] = []
        self.calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def scored(self, token: int, request: Any) -> Any:
        top = request.sampling.top_logprobs
        if top is None:
            return real.Token(token)
        logprob = float("-inf") if self.infinite else -0.5 - token / 1000
        return real.Token(token, logprob, tuple((i, -0.25 - i / 1000) for i in range(top)))

    def submit(self, model: Any, requests: Sequence[tuple[Any, Any]]) -> list[Handle]:
        if self.busy:
            raise real.Busy("the queue is full", 3)
        with self.news:
            handles = [Handle(self, request, listener, model) for request, listener in requests]
            self.active += handles
            self.handles += handles
            self.news.notify_all()
        return handles

    def add(self, module: Any, dtype: str, cache_bytes: int) -> Any:
        slot = (module, cache_bytes)
        self.models.append(slot)
        return slot

    def remove(self, model: Any) -> bool:
        if not self.idle(model) or self.stuck:
            return False
        self.models = [each for each in self.models if each is not model]
        return True

    @property
    def running(self) -> int:
        return len(self.active) if self.go.is_set() else 0

    @property
    def waiting(self) -> int:
        return len(self.active) - self.running

    def idle(self, model: Any) -> bool:
        return not any(handle.model is model for handle in self.active)

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self.news:
            self.calls.append((work, future))
            self.news.notify_all()
        return future

    def resume(self) -> None:
        """Go on after `go.clear()`."""
        with self.news:
            self.go.set()
            self.news.notify_all()

    def close(self) -> None:
        with self.news:
            self.closed = True
            self.news.notify_all()

    def loop(self) -> None:
        while True:
            with self.news:
                self.news.wait_for(lambda: self.closed or self.calls or any(
                    handle.cancelled.is_set() or self.go.is_set() for handle in self.active))
                if self.closed:
                    return
                calls, self.calls = self.calls, []
                ready = [handle for handle in self.active if self.go.is_set() or handle.cancelled.is_set()]
            for work, future in calls:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(work())
                    except BaseException as error:
                        future.set_exception(error)
            for handle in ready:
                handle.step()
