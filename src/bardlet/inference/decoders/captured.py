"""Decoding on a GPU: one step is captured as a CUDA graph and replayed, and the host reads CHUNK tokens at a time.

Launching the operations of a small step takes longer than computing them, and reading each token makes host and GPU
wait for each other. Here a step only reads and writes tensors that stay in place: tokens, positions, random numbers,
keys and values. It runs on every device; on a GPU it is captured.

The random numbers are those of `drawing.Draws`, from the CPU. So a seed draws the same tokens as on a CPU, except where
rounding moves a logit across the edge of a draw. Rounding depends on the GPU and on the number of rows.

Inference only. Shape suffixes: `models/layers.py`; N steps of a chunk.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from bardlet.errors import one_line
from bardlet.inference.decoders.cache import StaticStep, without_plans
from bardlet.inference.decoders.pages import page_dtype
from bardlet.inference.drawing import Draws, Sampling
from bardlet.inference.sampling import GREEDY, draw_on_device, not_finite

log = logging.getLogger("bardlet")

CHUNK = 16
"""Steps between two looks at the tokens. A row that has ended computes in vain until the next look."""
SHORTEST, ALIGNED = 256, 64
"""Positions that a step reads, masked or not: the smallest number, which doubles; its largest is a multiple of 64."""
PROMPT_TOKENS = 1024
"""Tokens of prompts that are read at a time."""
WARM_UP = 3
"""Steps before a capture: CUDA's libraries choose kernels and allocate memory at first."""


def is_for(model: Any) -> bool:
    """Return True if `generate` completes prompts of this model here: on a GPU, and with keys and values.

    Cumulative sums on a GPU have no deterministic algorithm.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    return on_gpu and hasattr(model, "new_cache") and not torch.are_deterministic_algorithms_enabled()


@dataclass
class Row:
    """A prompt on its way through a row of the cache. ids: the tokens in the window, at least one."""

    number: int
    ids: list[int]
    draws: Draws


class TokenSteps:
    """Steps of one token for each of a fixed number of rows, with a graph for each length of the cache.

    All rows have the same `sampling`. The graphs hold for the lifetime of this object, for any prompts.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, decoder: Any, sampling: Sampling, rows: int, longest: int,
                 capture: bool | None = None) -> None:
        """decoder: see `decoders.decoder`. longest: tokens of a prompt and its completion. capture: None: on a GPU."""
        c, self.device = model.config, next(model.parameters()).device
        self.decoder, self.sampling, self.rows, self.heads = decoder, sampling, rows, c.n_head
        self.capture = self.device.type == "cuda" if capture is None else capture
        self.window, self.length = c.block_size, min(c.block_size, longest)
        self.capacity = self.length + -self.length % ALIGNED
        self.cache = model.new_cache(rows, self.capacity, page_dtype(self.device, decoder.dtype))
        zeros = partial(torch.zeros, device=self.device)
        self.token_B, self.position_B = zeros(rows, dtype=torch.int64), zeros(rows, dtype=torch.int64)
        self.number_NB, self.drawn_NB = zeros(CHUNK, rows), zeros(CHUNK, rows, dtype=torch.int64)
        self.step_1, self.finite = zeros(1, dtype=torch.int64), zeros((), dtype=torch.bool)
        changes = sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty
        self.count_BV = zeros(rows if changes else 0, c.vocab_size)
        self.bias_V = zeros(c.vocab_size)
        for token, bias in sampling.logit_bias.items():
            self.bias_V[token] = bias
        self._graphs: dict[int, Callable[[], object]] = {}
        self._pool: Any = None

    def reach(self, positions: int) -> int:
        """Return the number of positions that a step reads if it needs `positions`: few numbers, as each has a graph.
        """
        reach = SHORTEST
        while reach < positions:
            reach *= 2
        return min(reach, self.capacity)

    @torch.inference_mode()
    def forget(self, row: int) -> None:
        """Start a row anew: no token was drawn yet."""
        self.count_BV[row : row + 1] = 0

    @torch.inference_mode()
    def read(self, ids: Mapping[int, Sequence[int]]) -> None:
        """Read the ids of some rows but the last one of each, from position 0 on."""
        start, left = 0, {row: each[:-1] for row, each in ids.items()}
        while left := {row: each for row, each in left.items() if len(each) > start}:
            T = min(max(1, PROMPT_TOKENS // len(left)), max(map(len, left.values())) - start)
            idx = [[*each[start : start + T], *[0] * (start + T - len(each))] for each in left.values()]
            position_BT = torch.arange(start, start + T, device=self.device).expand(len(left), -1)
            row_B = torch.tensor(list(left), device=self.device)
            step = StaticStep(self.cache, position_BT, self.heads, self.reach(start + T), row_B)
            with without_plans(self.device):
                self.decoder.hidden(torch.tensor(idx, device=self.device).flatten(), step)
            start += T

    @torch.inference_mode()
    def run(self, rows: Mapping[int, Row]) -> list[list[int]]:
        """Return the next tokens of all rows, for up to CHUNK steps; those of rows that are not in `rows` mean nothing.

        Raises BardletError if a logit is not finite.
        """
        number = min(CHUNK, *(self.length + 1 - len(row.ids) for row in rows.values()))
        tokens, positions, numbers = [0] * self.rows, [0] * self.rows, [[0.0] * self.rows for _ in range(number)]
        for i, row in rows.items():
            tokens[i], positions[i] = row.ids[-1], len(row.ids) - 1
            for of_step in numbers if self.sampling.temperature >= GREEDY else ():
                of_step[i] = next(row.draws.numbers)
        self.token_B.copy_(torch.tensor(tokens))
        self.position_B.copy_(torch.tensor(positions))
        self.number_NB[:number].copy_(torch.tensor(numbers))
        self.step_1.zero_()
        self.finite.fill_(True)
        with without_plans(self.device):
            step = self._step_of(self.reach(max(positions) + number))
            for _ in range(number):
                step()
        drawn = self.drawn_NB[:number].tolist()
        if not self.finite.item():
            raise not_finite()
        return drawn

    def _step(self, reach: int) -> None:
        """Read a token of each row, draw the next one, and move on."""
        s = self.sampling
        x_BC = self.decoder.hidden(self.token_B, StaticStep(self.cache, self.position_B[:, None], self.heads, reach))
        logits_BV = self.decoder.logits(x_BC)
        self.finite.logical_and_(logits_BV.sum(dtype=torch.float32).isfinite())
        if len(self.count_BV):
            penalty_BV = s.frequency_penalty * self.count_BV + s.presence_penalty * (self.count_BV > 0)
            logits_BV = logits_BV.float() + self.bias_V - penalty_BV
        u_B1 = self.number_NB.index_select(0, self.step_1).t()
        token_B = draw_on_device(logits_BV, s.temperature, s.top_k, s.top_p, u_B1)
        if len(self.count_BV):
            self.count_BV.scatter_(1, token_B[:, None], self.count_BV.gather(1, token_B[:, None]) + 1)
        self.drawn_NB.index_copy_(0, self.step_1, token_B[None])
        self.token_B.copy_(token_B)
        self.position_B.add_(1)
        self.step_1.add_(1)

    def _step_of(self, reach: int) -> Callable[[], object]:
        """Return a step that reads `reach` positions: on a GPU a graph, which is captured when it is first needed."""
        step = partial(self._step, reach)
        if self.capture and reach not in self._graphs:
            try:
                self._graphs[reach] = self._captured(step)
            except RuntimeError as error:
                log.warning("no CUDA graph of a step: %s; continuing without, which is slower", one_line(error))
                self.capture = False
        return self._graphs.get(reach, step)

    def _captured(self, step: Callable[[], None]) -> Callable[[], object]:
        """Return a replay of the step as a CUDA graph; all graphs share their memory, which keeps no result."""
        current, (warm_up, capture) = torch.cuda.current_stream(self.device), _streams(self.device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            warm_up.wait_stream(current)
            with torch.cuda.stream(warm_up):
                self._warm_up(step)
            current.wait_stream(warm_up)
            try:
                # other threads may use the GPU meanwhile
                with torch.cuda.graph(graph, pool=self._pool, stream=capture, capture_error_mode="thread_local"):
                    step()
            except RuntimeError:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own
                raise
        return graph.replay

    def _warm_up(self, step: Callable[[], None]) -> None:
        """Run a step WARM_UP times, each time from the same state, and restore it.

        The keys and values that this writes are those that the next step writes.
        """
        state = (self.token_B, self.position_B, self.drawn_NB, self.step_1, self.finite, self.count_BV)
        before = [tensor.clone() for tensor in state]
        for _ in range(WARM_UP):
            step()
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)


@cache
def _streams(device: torch.device) -> tuple[Any, Any]:
    """Return the streams of a GPU for warm-up and capture: each stream has memory of its own, so there are only two."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def complete(steps: TokenSteps, prompts: Sequence[tuple[int, Sequence[int], Draws]],
             keep: Callable[[int, int], bool]) -> Iterator[dict[int, list[int]]]:  # fmt: skip
    """Complete prompts, up to `steps.rows` at a time; yield the new tokens of each prompt, by its number.

    A context that fills the window starts again with its last half, as in `readers.PagedReader`. keep: see
    `generate.generate_each`.
    """
    waiting, rows, unread = deque(prompts), dict[int, Row](), dict[int, list[int]]()
    while waiting or rows:
        for i in range(steps.rows):
            if i not in rows and waiting:
                number, ids, draws = waiting.popleft()
                rows[i] = Row(number, list(ids[-steps.window :]), draws)
                unread[i] = rows[i].ids
                steps.forget(i)
        steps.read(unread)
        unread.clear()
        drawn = steps.run(rows)
        new: dict[int, list[int]] = {row.number: [] for row in rows.values()}
        for i, row in list(rows.items()):
            for tokens in drawn:
                row.ids.append(tokens[i])
                new[row.number].append(tokens[i])
                if not keep(row.number, tokens[i]):
                    del rows[i]
                    break
            else:
                if len(row.ids) > steps.window:
                    del row.ids[: -max(1, steps.window // 2)]
                    unread[i] = row.ids
        yield new
