"""Continuous batching: one thread generates for all requests, which join and leave between two steps.

The same request gives the same tokens, and on a CPU the same log-probabilities to the last bit, whatever else is
running: as `generate.stream` gives them. The queue is bounded, a request that is cancelled or past its deadline ends
before the next step, and requests that begin alike share what the model computed for the beginning.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch

from bardlet.errors import BardletError
from bardlet.inference import generate, readers
from bardlet.inference.decoders.pages import Pages, page_dtype
from bardlet.inference.drawing import Draws, Sampling, Token, next_tokens, with_logprobs
from bardlet.inference.sampling import not_finite

log = logging.getLogger("bardlet")

Result = TypeVar("Result")
Reason = Literal["stop", "length", "cancelled", "deadline"]


class Busy(BardletError):
    """The queue is full. retry_after: seconds after which there is probably room."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Closed(BardletError):
    """The engine takes nothing more."""

    def __init__(self) -> None:
        super().__init__("the engine is closed")


class Listener(Protocol):
    """Receives the tokens of one sequence, in the inference thread: its methods must be quick."""

    def prompt(self, tokens: Sequence[Token]) -> None:
        """Receive the tokens of the prompt with their log-probabilities, once, if the request asked for them."""

    def token(self, token: Token) -> bool:
        """Receive a new token, except a stop id. Return True to end the sequence here, with the reason "stop"."""

    def end(self, reason: Reason, error: BardletError | None) -> None:
        """Receive the end of the sequence, the last call. With an error, the reason is "cancelled"."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A sequence to generate.

    prompt: at least one id; of a longer one the last block_size are read. seed: of this sequence, see
    `sampling.row_seeds`. prompt_logprobs: report those of the prompt; then max_tokens may be 0. deadline: in seconds of
    time.monotonic().
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: frozenset[int] = frozenset()
    prompt_logprobs: bool = False
    deadline: float | None = None


class EngineModel:
    """A model of an engine: its reader, the sequences that run, and those that wait."""

    def __init__(self, module: Any, reader: readers.Reader, pages: int) -> None:
        self.module, self.reader, self.pages = module, reader, pages
        self.window = module.config.block_size
        self.running: dict[readers.Context, Handle] = {}
        self.waiting: deque[Handle] = deque()
        self.reserved = 0

    def pages_of(self, request: Request) -> int:
        """Return the number of pages that a sequence may need."""
        prompt = min(len(request.prompt), self.window)
        return readers.pages_for(prompt + request.max_tokens, self.window)


class Handle:
    """A submitted sequence."""

    def __init__(self, engine: Engine, model: EngineModel, request: Request, listener: Listener) -> None:
        self.engine, self.model, self.request, self.listener = engine, model, request, listener
        self.cancelled = self.ended = False
        self.count, self.scored = 0, list[Token]()
        self.context: readers.Context | None = None
        self.draws = Draws(request.sampling, request.seed)

    def cancel(self) -> None:
        """End the sequence before the next step. May be called by any thread, at any time."""
        self.cancelled = True
        with self.engine.changed:
            self.engine.changed.notify()

    @property
    def cached_tokens(self) -> int:
        """Number of tokens of the prompt that other sequences had read already."""
        return (self.context.shared or 0) if self.context else 0

    @property
    def verdict(self) -> Reason | None:
        """The reason to end before the next step, if there is one."""
        if self.cancelled:
            return "cancelled"
        deadline = self.request.deadline
        return "deadline" if deadline is not None and time.monotonic() >= deadline else None


def failure(reason: str) -> BardletError:
    """Log an internal error of the inference thread, and return the error that its sequences end with."""
    log.error("internal error in the inference thread; report this: %s", reason)
    return BardletError("internal error in the inference thread; the log has the details")


class Engine:
    """One inference thread for all models. All methods may be called by any thread."""

    def __init__(self, *, max_waiting: int = 256, max_rows: int = 64) -> None:
        """max_waiting: sequences in the queue, of all models together. max_rows: sequences of a model that run."""
        self.max_waiting, self.max_rows = max_waiting, max_rows
        self.models: list[EngineModel] = []
        self.calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.changed, self.closed = threading.Condition(), False
        self.seconds_per_sequence = 1.0
        """Moving average of the time between the ends of two sequences, while others wait."""
        self._last_end = time.monotonic()
        self._has_threads = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bardlet inference", daemon=True)
        self._thread.start()
        self._has_threads.wait()

    # ---------------------------------------------------------------- for all threads

    @property
    def running(self) -> int:
        """Number of sequences that are being generated."""
        return sum(len(model.running) for model in self.models)

    @property
    def waiting(self) -> int:
        """Number of sequences in the queue."""
        return sum(len(model.waiting) for model in self.models)

    def add(self, module: Any, dtype: torch.dtype | None, cache_bytes: int) -> EngineModel:
        """Prepare a model and return it, for `submit`. This takes a while: weights are packed.

        Args:
            module: in eval mode; its weights must not change as long as it is here.
            dtype: of the weights; torch.int8 quantizes them, None: the module's own.
            cache_bytes: memory for keys and values. There is always room for one sequence.
        """
        window = module.config.block_size
        pages = readers.pages_for(window, window)
        if hasattr(module, "new_cache"):
            kept = page_dtype(next(module.parameters()).device, readers.computing_dtype(module, dtype))
            affordable = cache_bytes // Pages.bytes_per_page(module.config, kept)
            pages = max(pages, min(affordable, 2 * self.max_rows * pages))  # twice: a half for beginnings to share
        else:
            generate.check_dtype(module, dtype)
            pages *= self.max_rows  # none are used
        with torch.inference_mode():
            model = EngineModel(module, readers.reader(module, readers.new_decoder(module, dtype), pages), pages)
        with self.changed:
            self.models.append(model)
        return model

    def remove(self, model: EngineModel) -> bool:
        """Forget a model that has no sequences; return False if it has some."""
        with self.changed:
            if not self.idle(model):
                return False
            self.models.remove(model)
            return True

    def idle(self, model: EngineModel) -> bool:
        """Return True if the model has no sequences."""
        return not (model.running or model.waiting)

    def submit(self, model: EngineModel, requests: Sequence[tuple[Request, Listener]]) -> list[Handle]:
        """Queue sequences, all of them or none.

        Raises:
            Busy: the queue has no room for them. BardletError: a value is out of range.
        """
        for request, _ in requests:
            s = request.sampling
            generate.check(model.module, [request.prompt], request.max_tokens, s.temperature, s.top_k, s.top_p)
            if request.max_tokens == 0 and not request.prompt_logprobs:
                raise BardletError("cannot generate 0 tokens; ask for at least one")
        handles = [Handle(self, model, request, listener) for request, listener in requests]
        with self.changed:
            if self.closed:
                raise Closed
            free = max(0, self.max_rows - len(model.running) - len(model.waiting))
            if self.waiting + len(handles) > self.max_waiting + free:
                raise self.busy()
            model.waiting.extend(handles)
            self.changed.notify()
        return handles

    def busy(self) -> Busy:
        """Return the error of a request for which the queue has no room."""
        ahead = self.waiting * self.seconds_per_sequence
        return Busy(f"{self.waiting} sequences are waiting, and the queue has {self.max_waiting} places; "
                    "try again later", min(60, max(1, math.ceil(ahead))))

    def call(self, work: Callable[[], Result]) -> Future[Result]:
        """Run `work` in the inference thread, between two steps; it should take 100 ms at most.

        Raises:
            Busy: as many calls wait as sequences may.
        """
        future: Future[Result] = Future()
        with self.changed:
            if self.closed:
                raise Closed
            if len(self.calls) >= max(1, self.max_waiting):
                raise self.busy()
            self.calls.append((work, future))
            self.changed.notify()
        return future

    def close(self) -> None:
        """End all sequences, with the reason "cancelled", and the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self._thread.join()

    # ---------------------------------------------------------------- the inference thread

    def _run(self) -> None:
        torch.get_num_threads()  # the first call in a thread adopts the number that was set
        self._has_threads.set()
        error: BardletError | None = None
        try:
            with torch.inference_mode():
                while self._wait():
                    if self.calls:
                        self._call()
                    for number in range(len(self.models)):
                        self._turn(number)
        except BaseException:
            error = failure(traceback.format_exc())
        finally:
            with self.changed:
                self.closed = True
            for model in self.models:
                for handle in [*model.running.values(), *model.waiting]:
                    self._end(handle, "cancelled", error)
            for _, future in self.calls:
                future.cancel()

    def _turn(self, number: int) -> None:
        """Let the sequences of a model leave, join, and go on by a token. An error ends them, not the thread."""
        with self.changed:
            if number >= len(self.models):  # one was removed
                return
            model = self.models[number]
        try:
            self._leave(model)
            self._join(model)
            if model.running:
                self._step(model)
        except Exception:
            error = failure(traceback.format_exc())
            for handle in [*model.running.values(), *model.waiting]:
                self._end(handle, "cancelled", error, damaged=True)

    def _wait(self) -> bool:
        """Wait for something to do; return False once the engine is closed."""
        with self.changed:
            while not (self.closed or self.calls or self.running or self.waiting):
                self.changed.wait()
            return not self.closed

    def _call(self) -> None:
        work, future = self.calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def _leave(self, model: EngineModel) -> None:
        """End the sequences that were cancelled or are past their deadline."""
        for handle in [*model.running.values(), *model.waiting]:
            if reason := handle.verdict:
                self._end(handle, reason)

    def _join(self, model: EngineModel) -> None:
        """Start waiting sequences, the first first, as far as rows and pages allow."""
        while model.waiting and len(model.running) < self.max_rows:
            handle = model.waiting[0]
            pages = model.pages_of(handle.request)
            if model.reserved + pages > model.pages:
                return
            context = model.reader.open(handle.request.prompt, handle.request.prompt_logprobs)
            with self.changed:
                handle.context = context
                model.running[context] = model.waiting.popleft()
            model.reserved += pages

    def _step(self, model: EngineModel) -> None:
        """Read one token of each running sequence, or a slice of a prompt; draw the next tokens."""
        contexts, logits_BV = model.reader.step()
        handles = [model.running[context] for context in contexts]
        for handle in list(model.running.values()):
            self._score_prompt(handle)
        finite = torch.isfinite(logits_BV.sum(dim=-1, dtype=torch.float32)).tolist() if handles else []
        rows = []
        for row, (handle, good) in enumerate(zip(handles, finite, strict=True)):
            if not good:
                self._end(handle, "cancelled", not_finite(), damaged=True)
            elif not handle.request.max_tokens:
                self._end(handle, "length")
            elif not handle.ended:
                rows.append(row)
        if rows:
            handles, logits_BV = [handles[row] for row in rows], logits_BV[rows]
            tokens = next_tokens([handle.draws for handle in handles], logits_BV)
            for handle, token in zip(handles, tokens, strict=True):
                self._deliver(handle, token)

    def _score_prompt(self, handle: Handle) -> None:
        """Turn the logits of a slice of a prompt into log-probabilities, and report them after the last slice."""
        context = handle.context
        if context is None or not context.logits:
            return
        logits_TV = torch.cat(context.logits)
        context.logits.clear()
        first = context.read - len(logits_TV) + 1
        ids = context.ids[first : context.read + 1]  # after the last token of the prompt, none is known
        if first == 1:
            handle.scored.append(Token(context.ids[0]))
        handle.scored += with_logprobs(ids, logits_TV[: len(ids)], [handle.request.sampling] * len(ids))
        if not context.unread:
            context.scores = False
            self._tell(handle, lambda: handle.listener.prompt(handle.scored))

    def _deliver(self, handle: Handle, token: Token) -> None:
        """Hand a token to its listener, and end the sequence or go on with it."""
        request = handle.request
        if token.id in request.stop_ids:
            self._end(handle, "stop")
            return
        handle.count += 1
        if self._tell(handle, lambda: handle.listener.token(token)):
            self._end(handle, "stop")
        elif handle.count >= request.max_tokens:
            self._end(handle, "length")
        elif handle.context is not None and not handle.ended:
            handle.model.reader.append(handle.context, token.id)

    def _tell(self, handle: Handle, news: Callable[[], Result]) -> Result | None:
        """Return the listener's answer; None if it fails, which ends its own sequence only."""
        try:
            return news()
        except Exception:
            self._end(handle, "cancelled", failure(traceback.format_exc()))
            return None

    def _end(self, handle: Handle, reason: Reason, error: BardletError | None = None, damaged: bool = False) -> None:
        """Free the place of a sequence, then tell its listener."""
        model = handle.model
        with self.changed:
            if handle.ended:
                return
            handle.ended = True
            if handle.context is None:
                model.waiting.remove(handle)
            else:
                model.reader.close(handle.context, damaged)
                del model.running[handle.context]
                model.reserved -= model.pages_of(handle.request)
        now = time.monotonic()
        if model.waiting and reason != "cancelled":
            self.seconds_per_sequence += 0.1 * (min(60.0, now - self._last_end) - self.seconds_per_sequence)
        self._last_end = now
        with suppress(Exception):  # its event loop may be gone
            handle.listener.end(reason, error)
