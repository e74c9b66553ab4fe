"""Read the tokens of several contexts at once, and return the logits of each one's next token.

A step reads one token of each context that is being generated, and slices of prompts. Contexts join and leave between
two steps. On a CPU, the logits of a context have the same bits whatever else is read. Shape suffixes:
`models/layers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bardlet.inference import decoders
from bardlet.inference.decoders import native
from bardlet.inference.decoders.cache import without_plans
from bardlet.inference.decoders.pages import PAGE, PagedStep, Pages, page_dtype
from bardlet.inference.decoders.prefix import WORTH_COPYING, Node, PrefixTree, common
from bardlet.ops import linear

Step = PagedStep | native.PageTable
SLICE, GPU_SLICE = 64, 512
"""Tokens of prompts that one step reads beside the contexts that are being generated, on a CPU and elsewhere."""


class Context:
    """The tokens that predict the next one.

    ids: tokens in the window. read: number of them that the model has read. shared: number of tokens that it shared
    with other contexts when it first started; None before. scores: keep the logits of every token in `logits`, for the
    log-probabilities of a prompt.
    """

    def __init__(self, ids: Sequence[int], scores: bool = False) -> None:
        self.ids, self.scores = list(ids), scores
        self.logits: list[Tensor] = []
        self.nodes: list[Node] = []
        self.read, self.started = 0, False
        self.shared: int | None = None

    @property
    def unread(self) -> int:
        """Number of tokens that the model has not read."""
        return len(self.ids) - self.read


class PagedReader:
    """Contexts of a model with keys and values, in pages.

    A context that fills the window of the model starts again with its last block_size // 2 tokens at position 0:
    positions stay within the trained range, at a constant average cost per token.
    """

    def __init__(self, model: Any, decoder: Any, pages: int) -> None:
        """decoder: see `new_decoder`. pages: at least those of all contexts that are open at the same time, see
        `pages_for`."""
        self.window, self.device, self.decoder = model.config.block_size, next(model.parameters()).device, decoder
        self.tree = PrefixTree(Pages(model.config, page_dtype(self.device, self.decoder.dtype), self.device, pages))
        self.contexts: list[Context] = []
        self._last: tuple[list[Context], Step] | None = None

    def open(self, ids: Sequence[int], scores: bool = False) -> Context:
        """Return a context with the last block_size of these ids, at least one; `step` reads them."""
        context = Context(ids[-self.window :], scores)
        self.contexts.append(context)
        return context

    def append(self, context: Context, token: int) -> None:
        """Append a token, which the next step reads."""
        context.ids.append(token)
        if len(context.ids) > self.window:
            del context.ids[: -max(1, self.window // 2)]
            self.tree.leave(context.nodes)
            context.nodes, context.read, context.started, self._last = [], 0, False, None

    def room(self, context: Context) -> int:
        """Return the number of tokens that `read_ahead` can read, without another page or the end of the window."""
        if self.device.type != "cpu" or context.unread != 1:  # elsewhere, rows depend on each other
            return 0
        return min(PAGE - 1 - context.read % PAGE, self.window - len(context.ids))

    def read_ahead(self, context: Context, draft: Sequence[int]) -> Tensor:
        """Read the last token and a draft of the next ones, up to `room`.

        Returns:
            The logits of the token after each: (len(draft) + 1, V). `take_back` removes those that were not drawn.
        """
        first, context.ids = context.read, [*context.ids, *draft]
        x_BC = self.decoder.hidden(torch.tensor(context.ids[first:]), self._step([(context, len(draft) + 1)]))
        for position in range(first, len(context.ids)):
            context.nodes[position // PAGE].tokens.append(context.ids[position])
        context.read = len(context.ids)
        return self.decoder.logits(x_BC)

    def take_back(self, context: Context, number: int) -> None:
        """Remove the last tokens of a draft that was read."""
        if number:
            del context.ids[-number:], context.nodes[-1].tokens[-number:]
            context.read -= number

    def close(self, context: Context, damaged: bool = False) -> None:
        """Remove a context. Its pages are kept for others, unless they are damaged, until their space is needed."""
        self.contexts.remove(context)
        (self.tree.forget if damaged else self.tree.leave)(context.nodes)
        self._last = None

    def step(self, limit: int | None = None) -> tuple[list[Context], Tensor]:
        """Read one token of each context that is being generated, and up to `limit` tokens of prompts.

        Returns:
            (contexts, logits): the contexts that now have no unread token, and the logits of their next tokens: (B, V).
        """
        nothing = torch.empty(0, device=self.device)
        parts = self._parts(limit or (SLICE if self.device.type == "cpu" else GPU_SLICE))
        if not parts:
            return [], nothing
        idx_B = torch.tensor([token for context, number in parts
                              for token in context.ids[context.read : context.read + number]], device=self.device)
        with without_plans(self.device):
            x_BC = self.decoder.hidden(idx_B, self._step(parts))
        ready, rows, end = [], [], 0
        for context, number in parts:
            for position in range(context.read, context.read + number):  # from now on others may share them
                context.nodes[position // PAGE].tokens.append(context.ids[position])
            context.read += number
            first, end = end, end + number
            if context.scores:
                context.logits.append(self.decoder.logits(x_BC[first:end]))
            if not context.unread:
                ready.append(context)
                rows.append(end - 1)
        if not ready:
            return [], nothing
        return ready, self.decoder.logits(x_BC if len(rows) == len(x_BC) else x_BC[rows])

    def _parts(self, limit: int) -> list[tuple[Context, int]]:
        """Return the contexts that the next step reads, and the number of tokens of each."""
        parts, prompts, reading = list[tuple[Context, int]](), list[Context](), list[Context]()
        for context in self.contexts:
            if context.started and context.unread == 1:
                parts.append((context, 1))
            elif context.unread:
                prompts.append(context)
        for context in prompts[:1] + sorted(prompts[1:], key=lambda context: context.unread):
            if limit and (context.started or self._start(context, reading)):
                # the first one gets half at most, so that short prompts do not wait for a long one
                most = limit if reading or len(prompts) == 1 else (limit + 1) // 2
                number = min(most, context.unread)
                limit -= number
                parts.append((context, number))
                reading.append(context)
        # rows of similar length are computed together; a stable order lets a step continue the one before
        return sorted(parts, key=lambda part: (part[0].read // PAGE).bit_length())

    def _start(self, context: Context, reading: Sequence[Context]) -> bool:
        """Find the beginning of a context in the tree; False if another one is about to read the same tokens."""
        if not context.scores:
            if any(common(context.ids, other.ids) >= other.read + WORTH_COPYING for other in reading):
                return False
            context.nodes, context.read = self.tree.start(context.ids[:-1])  # one is left, to predict the next
        context.started = True
        context.shared = context.read if context.shared is None else context.shared
        return True

    def _step(self, parts: list[tuple[Context, int]]) -> Step:
        """Return the positions and pages of the rows of a step."""
        contexts = [context for context, number in parts]
        on_the_same_page = all(number == 1 and context.read % PAGE for context, number in parts)
        if self._last is not None and on_the_same_page and self._last[0] == contexts:
            self._last[1].advance()
            return self._last[1]
        table, positions = [], list[int]()
        for context, number in parts:
            while len(context.nodes) * PAGE < context.read + number:
                context.nodes.append(self.tree.extend(context.nodes[-1] if context.nodes else None))
            table += [[node.page for node in context.nodes]] * number
            positions += range(context.read, context.read + number)
        step = self.decoder.step_class(self.tree.pages, table, positions)
        self._last = (contexts, step) if len(positions) == len(contexts) else None
        return step


class WindowReader:
    """Contexts of a model without keys and values (a lecture model): each token reads its last block_size again."""

    def __init__(self, model: Any) -> None:
        self.model, self.device, self.contexts = model, next(model.parameters()).device, list[Context]()

    def open(self, ids: Sequence[int], scores: bool = False) -> Context:
        """See `PagedReader.open`."""
        context = Context(ids[-self.model.config.block_size :], scores)
        self.contexts.append(context)
        return context

    def append(self, context: Context, token: int) -> None:
        """Append a token, which the next step reads."""
        context.ids = [*context.ids, token][-self.model.config.block_size :]
        context.read = len(context.ids) - 1

    def close(self, context: Context, damaged: bool = False) -> None:
        """Remove a context."""
        self.contexts.remove(context)

    def step(self, limit: int | None = None) -> tuple[list[Context], Tensor]:
        """See `PagedReader.step`. Each context is read alone, so that it does not depend on the others."""
        ready = [context for context in self.contexts if context.unread]
        last = []
        for context in ready:
            logits_TV = self.model(torch.tensor([context.ids], device=self.device))[0]
            if context.scores and not context.read:
                context.logits.append(logits_TV)
            context.read = len(context.ids)
            last.append(logits_TV[-1])
        return ready, torch.stack(last) if last else torch.empty(0, device=self.device)


Reader = PagedReader | WindowReader


def computing_dtype(model: Any, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a decoder of `model` computes in, for weights of `dtype` (None: the model's own)."""
    return linear.computing_dtype(next(model.parameters()), dtype)


def pages_for(tokens: int, window: int) -> int:
    """Return the number of pages that a context needs which has read up to `tokens` tokens."""
    return -(-min(tokens, window) // PAGE)


def new_decoder(model: Any, dtype: torch.dtype | None) -> Any:
    """Return a decoder for the readers of a model, which may share it; None for a model without a cache.

    dtype: of the decoder's weights; torch.int8 quantizes them, None: the model's own.
    """
    if not hasattr(model, "new_cache"):
        return None
    return native.decoder(model, dtype) or decoders.decoder(model, dtype)


def reader(model: Any, decoder: Any, pages: int) -> Reader:
    """Return a reader for a model; see `PagedReader`. Call this, and use it, in `torch.inference_mode`."""
    return WindowReader(model) if decoder is None else PagedReader(model, decoder, pages)
