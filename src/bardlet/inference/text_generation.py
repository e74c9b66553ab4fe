"""Text in, text out: prompts from strings, completions as token ids, streamed text or whole texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from bardlet.inference import generate
from bardlet.tokenizer import StreamDecoder, Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str | None, documents: int = 2) -> list[int]:
    """Return the tokens of `prompt`, or those that start a document: the separator, else a line break, else token 0.

    Both begin with the tokenizer's `prefix_ids`, which are enough to start a document.

    documents: number of documents in the training text. With a single one the model has never seen the separator,
    though a BPE tokenizer has one.
    """
    prefix = tokenizer.prefix_ids
    if prompt:
        tokenizer.check(prompt)
        return [*prefix, *(int(i) for i in tokenizer.encode(prompt))]
    if prefix:
        return prefix
    if tokenizer.eos_id is not None and documents > 1:
        return [tokenizer.eos_id]
    if tokenizer.kind != "char" or "\n" in (tokenizer.alphabet or ""):
        return [int(i) for i in tokenizer.encode("\n")][:1]
    return [0]


def complete(model: Any, tokenizer: Tokenizer, prompts: list[list[int]], tokens: int,
             **options: Any) -> list[list[int]]:  # fmt: skip
    """Return the new tokens of each prompt, up to the separator, without the padding ids of the vocabulary."""
    completions = generate.generate(model, prompts, tokens, stop_ids=tokenizer.stop_ids, **options)
    return [[token for token in ids if token < tokenizer.vocab_size] for ids in completions]


def stream(model: Any, tokenizer: Tokenizer, prompt: list[int], tokens: int, **options: Any) -> Iterator[str]:
    """Yield the text as it is generated: one piece per token ("" inside a character), then whatever is left.

    options: see `generate.stream`.
    """
    decoder = StreamDecoder(tokenizer, skip_special=True)
    for token in prompt:  # the prompt may end inside a multi-byte character
        decoder.feed(token)
    with closing(generate.stream(model, [prompt], tokens, stop_ids=tokenizer.stop_ids, **options)) as steps:
        for ids in steps:
            [token] = (i for i in ids if i is not None)  # a single row is never None: the stream ends with it
            yield decoder.feed(token) if token < tokenizer.vocab_size else ""
    yield decoder.finish()


def generate_text(model: Any, tokenizer: Tokenizer, prompt: str | None, *, documents: int, tokens: int,
                  **options: Any) -> str:  # fmt: skip
    """Return a sample of `model` for a model card or a web page.

    documents: number of documents in the training text. Documents may be short (names, say): the sample then has
    several, one per line. options: see `generate.stream`.
    """
    rows = 1 if documents == 1 else 8
    completions = complete(model, tokenizer, [prompt_ids(tokenizer, prompt, documents)] * rows, tokens, **options)
    enough = next((n for n in range(1, rows) if sum(map(len, completions[:n])) >= tokens // 2), rows)
    return "\n".join(tokenizer.decode(ids, skip_special=True, continues=bool(prompt)) for ids in completions[:enough])
