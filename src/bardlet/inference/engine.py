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
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.inference import generate, readers
from bardlet.inference.decoders.pages import Pages
from bardlet.inference.sampling import _draw

log = logging.getLogger("bardlet")

Result = TypeVar("Result")
Reason = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Rules by which the next token of a sequence is drawn.

    temperature, top_k, top_p: see `sampling.sample_next`. presence_penalty, frequency_penalty: subtracted from the
    logits of new tokens that occurred, and for each occurrence. logit_bias: added to the logits of these ids.
    top_logprobs: report the log-probability of the chosen token and of this many of the likeliest; None: of no token.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A token of a sequence.

    logprob: nats, of the model itself, before temperature, bias and penalties; None if it was not asked for, and for
    the first token of a prompt. top: the likeliest (id, log-probability), likeliest first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Busy(BardletError):
    """The queue is full. retry_after: seconds after which there is probably room."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


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
        self.cancelled = False
        self.new: Counter[int] = Counter()
        self.count = 0
        self.context: readers.Context | None = None
        self.draws = _draws(request.seed)

    def cancel(self) -> None:
        """End the sequence before the next step. May be called by any thread, at any time."""
        self.cancelled = True
        self.engine.wake()

    @property
    def verdict(self) -> Reason | None:
        """The reason to end before the next step, if there is one."""
        if self.cancelled:
            return "cancelled"
        deadline = self.request.deadline
        return "deadline" if deadline is not None and time.monotonic() >= deadline else None


def _draws(seed: int) -> Iterator[float]:
    """Yield the random numbers of a row: those of `sampling._Draws`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.rand(256, generator=generator).tolist()


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
        self._thread = threading.Thread(target=self._run, name="bardlet inference", daemon=True)
        self._thread.start()

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
            kept = readers.page_dtype(next(module.parameters()).device, readers.computing_dtype(module, dtype))
            affordable = cache_bytes // Pages.bytes_per_page(module.config, kept)
            pages = max(pages, min(affordable, 2 * self.max_rows * pages))  # twice: a half for beginnings to share
        else:
            generate.check_dtype(module, dtype)
            pages *= self.max_rows  # none are used
        with torch.inference_mode():
            model = EngineModel(module, readers.reader(module, dtype, pages), pages)
        with self.changed:
            self.models.append(model)
        return model

    def remove(self, model: EngineModel) -> bool:
        """Forget a model that has no sequences; return False if it has some."""
        with self.changed:
            if model.running or model.waiting:
                return False
            self.models.remove(model)
            return True

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
                raise BardletError("the engine is closed")
            if self.waiting + len(handles) > self.max_waiting:
                ahead = self.waiting * self.seconds_per_sequence
                raise Busy(f"{self.waiting} sequences are waiting, and the queue has {self.max_waiting} places; "
                           "try again later", min(60, max(1, math.ceil(ahead))))
            model.waiting.extend(handles)
            self.changed.notify()
        return handles

    def call(self, work: Callable[[], Result]) -> Future[Result]:
        """Run `work` in the inference thread, between two steps; it should take 100 ms at most."""
        future: Future[Result] = Future()
        with self.changed:
            if self.closed:
                raise BardletError("the engine is closed")
            self.calls.append((work, future))
            self.changed.notify()
        return future

    def wake(self) -> None:
        """Let the inference thread look for cancelled sequences."""
        with self.changed:
            self.changed.notify()

    def close(self) -> None:
        """End all sequences, with the reason "cancelled", and the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self._thread.join()

    # ---------------------------------------------------------------- the inference thread

    def _run(self) -> None:
        torch.get_num_threads()  # the first call in a thread adopts the number that was set
        with torch.inference_mode():
            while self._wait():
                if self.calls:
                    self._call()
                for model in list(self.models):
                    self._leave(model)
                    self._join(model)
                    if model.running:
                        self._guarded_step(model)
        for model in self.models:
            for handle in [*model.running.values(), *model.waiting]:
                self._end(handle, "cancelled")
        for _, future in self.calls:
            future.cancel()

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
            with self.changed:
                model.waiting.popleft()
                handle.context = model.reader.open(handle.request.prompt, handle.request.prompt_logprobs)
                model.running[handle.context] = handle
            model.reserved += pages

    def _guarded_step(self, model: EngineModel) -> None:
        """Read and draw once; an unexpected error ends the sequences of this model, not the thread."""
        try:
            self._step(model)
        except Exception as error:
            log.exception("internal error in the inference thread")
            failure = BardletError(f"internal error: {type(error).__name__}")
            for handle in list(model.running.values()):
                self._end(handle, "cancelled", failure)

    def _step(self, model: EngineModel) -> None:
        """Read one token of each running sequence, or a slice of a prompt; draw the next tokens."""
        contexts, logits_BV = model.reader.step()
        if not contexts:
            return
        handles = [model.running[context] for context in contexts]
        finite = torch.isfinite(logits_BV.sum(dim=-1, dtype=torch.float32)).tolist()
        if not all(finite):
            self._refuse(handles, logits_BV, finite)
            rows = [row for row, good in enumerate(finite) if good]
            handles, logits_BV = [handles[row] for row in rows], logits_BV[rows]
        handles, logits_BV = self._report_prompts(handles, logits_BV)
        if handles:
            tokens = _next_tokens(handles, logits_BV)
            for handle, token in zip(handles, tokens, strict=True):
                self._deliver(handle, token)

    def _refuse(self, handles: Sequence[Handle], logits_BV: Tensor, finite: Sequence[bool]) -> None:
        """End the sequences whose logits are not finite."""
        for row, handle in enumerate(handles):
            if not finite[row]:
                try:
                    generate.check_finite(logits_BV[row])
                except BardletError as error:
                    self._end(handle, "cancelled", error, damaged=True)

    def _report_prompts(self, handles: list[Handle], logits_BV: Tensor) -> tuple[list[Handle], Tensor]:
        """Report the log-probabilities of prompts that were read; return the sequences that go on, and their logits."""
        going = []
        for row, handle in enumerate(handles):
            context = handle.context
            if context is not None and context.logits:
                logits_TV, context.logits, context.scores = torch.cat(context.logits), [], False
                ids = context.ids[: len(logits_TV)]
                scored = _tokens(logits_TV[: len(ids) - 1], ids[1:], [handle.request.sampling] * (len(ids) - 1))
                handle.listener.prompt([Token(ids[0]), *scored])
            if handle.request.max_tokens == 0:
                self._end(handle, "length")
            else:
                going.append(row)
        return [handles[row] for row in going], logits_BV if len(going) == len(handles) else logits_BV[going]

    def _deliver(self, handle: Handle, token: Token) -> None:
        """Hand a token to its listener, and end the sequence or go on with it."""
        request, model = handle.request, handle.model
        if token.id in request.stop_ids:
            self._end(handle, "stop")
            return
        handle.count += 1
        handle.new[token.id] += 1
        if self._told(handle, token):
            self._end(handle, "stop")
        elif handle.count >= request.max_tokens:
            self._end(handle, "length")
        elif handle.context is not None:
            model.reader.append(handle.context, token.id)

    def _told(self, handle: Handle, token: Token) -> bool:
        """Return the listener's answer; a listener that fails ends its own sequence only."""
        try:
            return handle.listener.token(token)
        except Exception:
            log.exception("internal error while a token was delivered")
            return True

    def _end(self, handle: Handle, reason: Reason, error: BardletError | None = None, damaged: bool = False) -> None:
        """Free the place of a sequence, then tell its listener."""
        model = handle.model
        with self.changed:
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


# ---------------------------------------------------------------------------- drawing


def _next_tokens(handles: Sequence[Handle], logits_BV: Tensor) -> list[Token]:
    """Draw the next token of each sequence from its logits (B, V)."""
    adjusted_BV = logits_BV
    for row, handle in enumerate(handles):
        s = handle.request.sampling
        if s.logit_bias or (handle.new and (s.presence_penalty or s.frequency_penalty)):
            if adjusted_BV is logits_BV:
                adjusted_BV = logits_BV.float().clone()
            _adjust(adjusted_BV[row], s, handle.new)
    ids = [0] * len(handles)
    rows_of: dict[tuple[Any, ...], list[int]] = {}
    for row, handle in enumerate(handles):
        s = handle.request.sampling
        rows_of.setdefault((s.temperature, s.top_k, s.top_p) if s.temperature else (0.0, None, None), []).append(row)
    for (temperature, top_k, top_p), rows in rows_of.items():
        part_BV = adjusted_BV if len(rows) == len(handles) else adjusted_BV[rows]
        if temperature == 0:
            drawn = part_BV.argmax(dim=-1)
        else:
            drawn = _draw(part_BV, temperature, top_k, top_p, torch.tensor([[next(handles[r].draws)] for r in rows]))
        for row, token in zip(rows, drawn.tolist(), strict=True):
            ids[row] = token
    return _tokens(logits_BV, ids, [handle.request.sampling for handle in handles])


def _adjust(logits_V: Tensor, sampling: Sampling, new: Counter[int]) -> None:
    """Apply penalties and biases to the logits of a row, in place."""
    if new and (sampling.presence_penalty or sampling.frequency_penalty):
        count = torch.tensor(list(new.values()), device=logits_V.device)
        penalty = sampling.presence_penalty + sampling.frequency_penalty * count.float()
        logits_V.index_add_(0, torch.tensor(list(new), device=logits_V.device), penalty, alpha=-1)
    for token, bias in sampling.logit_bias.items():
        logits_V[token] += bias


def _tokens(logits_BV: Tensor, ids: Sequence[int], sampling: Sequence[Sampling]) -> list[Token]:
    """Return tokens with the log-probabilities that were asked for."""
    tokens = [Token(token) for token in ids]
    rows = [row for row, s in enumerate(sampling) if s.top_logprobs is not None]
    if not rows:
        return tokens
    logp_BV = logits_BV[rows].float().log_softmax(dim=-1)
    most = max(sampling[row].top_logprobs or 0 for row in rows)
    top = logp_BV.topk(min(most, logp_BV.shape[-1]), dim=-1)
    chosen = logp_BV[torch.arange(len(rows)), [ids[row] for row in rows]].tolist()
    for row, logprob, values, indices in zip(rows, chosen, top.values.tolist(), top.indices.tolist(), strict=True):
        number = sampling[row].top_logprobs or 0
        tokens[row] = Token(ids[row], logprob, tuple(zip(indices[:number], values[:number], strict=True)))
    return tokens
