"""Autoregressive generation: the whole context once (prefill), then one new token per step (decode).

Token ids in, token ids out. Each row has its own random generator: sampling does not disturb a training run, and a
row's completion does not depend on the rest of the batch, on a CPU not in a single bit. Shape suffixes:
`models/layers.py`.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.inference import readers
from bardlet.inference.decoders import captured, native
from bardlet.inference.drawing import Draws, Sampling, next_tokens
from bardlet.inference.sampling import check_finite, row_seeds
from bardlet.inference.speculation import Drafts
from bardlet.models.layers import KVCache
from bardlet.runtime import threads


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and restore its mode on exit."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def prefill(model: Any, idx_BT: Tensor, length_B: Tensor, cache: KVCache, prefix_B: Tensor | None = None) -> Tensor:
    """Read the first length_B tokens (int64, at least 1) of each row of idx_BT (int64) into the cache.

    Rows are padded on the right with any id: causal attention hides the padding from the tokens before it, and the
    next token overwrites it. prefix_B: number of leading tokens per row with bidirectional attention. Returns the
    logits of each row's next token: (B, V).
    """
    start_B = cache.length_B.clone()
    x_BTC = model.hidden(idx_BT, cache, prefix_B=prefix_B)
    cache.length_B.copy_(start_B + length_B)
    return model.logits(x_BTC[torch.arange(len(idx_BT), device=idx_BT.device), length_B - 1])


def decode_step(model: Any, idx_B: Tensor, cache: KVCache) -> Tensor:
    """Append one token (int64) to each row of the cache and return the logits of the next one: (B, V).

    This is the reference implementation; `decoders.decoder(model)` computes the same in fewer operations.
    """
    return model.logits(model.hidden(idx_B[:, None], cache)[:, 0])


# ---------------------------------------------------------------------------- generation


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """Return the new ids of each prompt, up to max_new_tokens or to its first id in stop_ids, which is kept.

    The arguments are those of `stream`, which draws the same ids.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    return generate_each(model, prompts, [max_new_tokens] * len(prompts), sampling, stop_ids=stop_ids, dtype=dtype,
                         seeds=row_seeds(seed, len(prompts)), rows=max(1, len(prompts)))


def generate_each(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    rows: int,
    stop_ids: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    on_end: Callable[[int], object] = lambda done: None,
) -> list[list[int]]:
    """Return the new ids of each prompt, as `generate` does, with up to `rows` prompts at a time.

    A prompt starts as soon as there is room for it, so that short completions do not wait for long ones; on a CPU, each
    of a few threads has its share of the prompts. Each prompt has its own max_new_tokens and its own seed.
    `on_end` is called, in one thread at a time, with the number of completions that have ended.
    """
    check_dtype(model, dtype)
    check(model, prompts, min(max_new_tokens, default=0), sampling.temperature, sampling.top_k, sampling.top_p)
    completions: list[list[int]] = [[] for _ in prompts]
    ended, lock = 0, Lock()
    model = as_dtype(model, dtype)
    device, kind = next(model.parameters()).device, torch.int8 if dtype == torch.int8 else None
    numbers = [i for i, tokens in enumerate(max_new_tokens) if tokens]
    with torch.inference_mode():
        decoder = readers.new_decoder(model, kind)
    together = isinstance(decoder, native.Decoder) and min(rows, len(numbers)) <= TOGETHER
    shares = [numbers] if together and numbers else threads.shares(numbers, device)

    def keep(i: int, token: int) -> bool:
        """Keep a token of prompt i; return True if more follow."""
        nonlocal ended
        completions[i].append(token)
        if token not in stop_ids and len(completions[i]) < max_new_tokens[i]:
            return True
        with lock:
            ended += 1
            on_end(ended)
        return False

    @torch.inference_mode()
    def run(share: Sequence[int]) -> None:
        places = min(len(share), max(1, rows // len(shares)))
        longest = max(len(prompts[i]) + max_new_tokens[i] for i in share)
        work = [(i, prompts[i], Draws(sampling, seeds[i])) for i in share]
        if captured.is_for(model):
            steps = captured.TokenSteps(model, decoder, sampling, places, longest)
            list(captured.complete(steps, work, keep))
            return
        reader = readers.reader(model, decoder, places * readers.pages_for(longest, model.config.block_size))
        _complete(reader, work, places, keep)

    with eval_mode(model):
        list(threads.run_in_threads(run, shares, device))
    return completions


def _complete(reader: readers.Reader, prompts: Sequence[tuple[int, Sequence[int], Draws]], places: int,
              keep: Callable[[int, int], bool]) -> None:  # fmt: skip
    """Complete prompts, up to `places` at a time. keep: see `generate_each`."""
    waiting, running = deque(prompts), dict[readers.Context, tuple[int, Draws]]()
    while waiting or running:
        while waiting and len(running) < places:
            i, prompt, draws = waiting.popleft()
            running[reader.open(prompt)] = i, draws
        contexts, logits_BV = reader.step(PROMPT_TOKENS)
        if not contexts:
            continue
        check_finite(logits_BV)
        for context, token in zip(contexts, next_tokens([running[c][1] for c in contexts], logits_BV), strict=True):
            if keep(running[context][0], token.id):
                reader.append(context, token.id)
            else:
                reader.close(context)
                del running[context]


@torch.inference_mode()
def stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    drafts: bool = True,
) -> Generator[list[int | None], None, None]:
    """Yield the next id of every row, step by step, None for a finished row; stop when all rows are finished.

    A prompt has at least one id; only its last block_size ids are read. When a row fills the context window, its last
    block_size // 2 tokens are read again at the start of the window (`readers.PagedReader`). A model without a cache (a
    lecture model) rereads the last block_size tokens for every token, as the lecture does.

    `seed`: an int seeds each row's generator by its index; a sequence holds one seed per row. The model is in eval mode
    until the iterator is exhausted or closed.

    `dtype`: compute with a copy of the model in that dtype. torch.int8 quantizes the decoder's weights
    (`decoders/native.py`). The model itself does not change.

    `drafts`: read drafts of the next tokens, if there is one prompt (`speculation.py`); the ids are the same without.

    Raises BardletError for invalid settings or prompts, and for weights that are not finite.
    """
    check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    check_dtype(model, dtype)
    model = as_dtype(model, dtype)
    if not prompts or max_new_tokens == 0:
        return
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    draws = [Draws(sampling, one) for one in row_seeds(seed, len(prompts))]
    decoder = readers.new_decoder(model, torch.int8 if dtype == torch.int8 else None)
    window, longest = model.config.block_size, max(map(len, prompts)) + max_new_tokens
    with eval_mode(model):
        if captured.is_for(model):
            steps = captured.TokenSteps(model, decoder, sampling, len(prompts), longest)
            yield from _by_chunks(steps, prompts, draws, frozenset(stop_ids), max_new_tokens)
            return
        reader = readers.reader(model, decoder, len(prompts) * readers.pages_for(longest, window))
        if drafts and len(prompts) == 1 and isinstance(reader, readers.PagedReader):
            yield from _with_drafts(reader, prompts[0], draws[0], frozenset(stop_ids), max_new_tokens)
        else:
            yield from _row_by_row(reader, prompts, draws, frozenset(stop_ids), max_new_tokens)


def _by_chunks(
    steps: captured.TokenSteps,
    prompts: Sequence[Sequence[int]],
    draws: Sequence[Draws],
    stop_ids: frozenset[int],
    max_new_tokens: int,
) -> Iterator[list[int | None]]:
    """Run the steps of `stream` on a GPU, which computes several before their tokens are read."""
    left = [max_new_tokens] * len(prompts)

    def keep(row: int, token: int) -> bool:
        left[row] -= 1
        return token not in stop_ids and left[row] > 0

    for new in captured.complete(steps, [*zip(range(len(prompts)), prompts, draws, strict=True)], keep):
        for column in zip_longest(*(new.get(row, ()) for row in range(len(prompts)))):
            yield list(column)


def _row_by_row(
    reader: readers.Reader,
    prompts: Sequence[Sequence[int]],
    draws: Sequence[Draws],
    stop_ids: frozenset[int],
    max_new_tokens: int,
) -> Iterator[list[int | None]]:
    """Run the steps of any number of prompts, of one token each; there is one of `draws` for each prompt."""
    rows = {reader.open(prompt): row for row, prompt in enumerate(prompts)}
    for step in range(max_new_tokens):
        contexts, logits_BV = _read_all(reader)
        check_finite(logits_BV)
        alive = [rows[context] for context in contexts]
        ids: list[int | None] = [None] * len(prompts)
        tokens = next_tokens([draws[row] for row in alive], logits_BV)
        for context, row, token in zip(contexts, alive, tokens, strict=True):
            ids[row] = token.id
            if token.id in stop_ids:
                reader.close(context)
            else:
                reader.append(context, token.id)
        yield ids
        if step == max_new_tokens - 1 or not reader.contexts:
            return


def _with_drafts(reader: readers.PagedReader, prompt: Sequence[int], draws: Draws, stop_ids: frozenset[int],
                 max_new_tokens: int) -> Iterator[list[int | None]]:
    """Run the steps of one prompt: each reads a token and a draft of those that may follow (`speculation.py`)."""
    context, drafts, draft = reader.open(prompt), Drafts(prompt), list[int]()
    _, logits_NV = _read_all(reader)
    left, seconds = max_new_tokens, 0.0
    while True:
        check_finite(logits_NV)
        for right, logits_V in enumerate(logits_NV):
            [token] = next_tokens([draws], logits_V[None])
            drafts.append(token.id)
            yield [token.id]
            left -= 1
            if token.id in stop_ids or not left:
                reader.close(context)
                return
            if right == len(draft) or token.id != draft[right]:
                break
        if seconds:
            drafts.learn(len(draft), right, seconds)
        reader.take_back(context, len(draft) - right)
        reader.append(context, token.id)
        draft, started = drafts.next(min(reader.room(context), left - 1)), time.perf_counter()
        if context.unread == 1:
            logits_NV = reader.read_ahead(context, draft)
            seconds = time.perf_counter() - started
        else:  # the window begins anew
            _, logits_NV = _read_all(reader)
            seconds = 0.0


def _read_all(reader: readers.Reader) -> tuple[list[readers.Context], Tensor]:
    """Read all contexts to their ends. Returns them, and the logits of their next tokens: (B, V)."""
    contexts, logits_BV = reader.step(PROMPT_TOKENS)
    while any(context.unread for context in reader.contexts):
        more, logits_NV = reader.step(PROMPT_TOKENS)
        contexts, logits_BV = contexts + more, torch.cat((logits_BV, logits_NV)) if contexts else logits_NV
    return contexts, logits_BV


TOGETHER = 16
"""Rows up to which all cores compute one compiled step: then the weights are read once. With 10.65 M parameters and two
cores, 4 rows in fp32 take 0.67 of the time of two threads of 2 rows, 16 rows 0.82; 64 rows take the same. int8 gains up
to 4 rows, and takes 4 to 10 % more at 16."""
PROMPT_TOKENS = 256
"""Tokens of the prompts that one step reads: with more, a step has no more speed and needs more memory."""


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (idx_BT, length_B): rows of different lengths, padded with zeros on the right."""
    length = [len(row) for row in rows]
    padded = [[*row, *[0] * (max(length) - len(row))] for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(length, device=device)


def as_dtype(model: Any, dtype: torch.dtype | None) -> Any:
    """Return the model in `dtype`: a copy, unless it is that already, or is to be quantized (torch.int8)."""
    if dtype in (None, torch.int8, next(model.parameters()).dtype):
        return model
    return copy.deepcopy(model).to(dtype)


def check_dtype(model: Any, dtype: torch.dtype | None) -> None:
    """Raise BardletError if the model cannot be used with weights of this dtype."""
    if dtype == torch.int8 and not hasattr(model, "new_cache"):
        raise BardletError("int8 is for gpt2 and Llama-like models, which have a KV cache; use fp32 or bf16")


def check(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """Raise BardletError for settings or prompts of `stream` that are out of range."""
    if max_new_tokens < 0:
        raise BardletError(f"cannot generate {max_new_tokens} tokens; give 0 or more")
    if not 0 <= temperature < float("inf"):
        raise BardletError(f"temperature {temperature}: must be at least 0 (0: always the likeliest token)")
    if top_k is not None and top_k < 1:
        raise BardletError(f"top_k {top_k}: must be at least 1; None keeps all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise BardletError(f"top_p {top_p}: must be above 0 and at most 1; None keeps all tokens")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise BardletError(f"prompt {number} has no tokens; give at least one")
        invalid = next((i for i in (min(prompt), max(prompt)) if not 0 <= i < model.config.vocab_size), None)
        if invalid is not None:
            raise BardletError(
                f"prompt {number} has token {invalid}; ids must be from 0 to {model.config.vocab_size - 1}"
            )
