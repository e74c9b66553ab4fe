"""Answers of the studio's tab Inside: attention, the logit lens and losses of a text, with heads switched off.

The inference thread does the work in short parts, so that the texts of others go on. Imports torch.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError, Unsupported
from bardlet.inference import inside
from bardlet.inference.inside import Greedy, Guess, Heads, Reading
from bardlet.server import folders
from bardlet.server.completion import checked_ids, refuse_translator
from bardlet.server.errors import Refusal
from bardlet.server.generation import in_engine
from bardlet.server.models import Loaded, Models
from bardlet.server.text import entries_of, name_of

MOST_WEIGHTS = 400_000
"""Attention weights of an answer: 3 MB of JSON, a tenth of a second of the server's time."""
AT_ONCE = 4
"""Tokens that the inference thread writes before it turns to other texts."""
NEIGHBORS = 12
MOST_RUNGS = 20
"""Rungs of a ladder that an answer compares; there are 13 today."""
RUNG = re.compile(r"(\d\d)-([a-z][a-z-]*)")
"""The folder of a rung, see `ladder/run.py`."""


async def look(models: Models, loaded: Loaded, text: str, off: Heads, tokens: int) -> dict[str, Any]:
    """Return the values that a model computes from a text, and its greedy continuation of up to `tokens` tokens.

    A long text loses its first tokens; `cut` is their number. `attention[layer][head][t]` has t + 1 weights.
    """
    module, parts = loaded.model.module, _parts(loaded)
    layers, heads = len(parts.layers), parts.n_head
    if wrong := [head for head in off if head[0] >= layers or head[1] >= heads]:
        raise Refusal(400, f"off: there is no head {list(wrong[0])}; the model has {layers} layers of {heads} heads, "
                      "both counted from 0", param="off", code="invalid_value")
    ids = await asyncio.to_thread(_ids, loaded, text)
    most = min(inside.limit(module), math.isqrt(2 * MOST_WEIGHTS // (layers * heads)))
    cut, ids = max(0, len(ids) - most), ids[-most:]
    reading: Reading = await in_engine(models, lambda: inside.read(module, ids, off))
    rows = [await in_engine(models, lambda step=step: inside.lens(module, reading, step))
            for step in range(len(reading.steps))]
    written = await _continue(models, loaded, ids, off, tokens)
    return await asyncio.to_thread(_as_json, loaded, reading, rows, cut) | {
        "model": loaded.name, "off": [list(head) for head in off], "continuation": written}


async def near(models: Models, loaded: Loaded, token: int) -> dict[str, Any]:
    """Return the tokens whose embeddings are nearest to a token's."""
    refuse_translator(loaded)
    [token] = checked_ids(loaded, [token], "token")
    tokenizer, module = loaded.model.tokenizer, loaded.model.module
    if token >= tokenizer.vocab_size:
        raise Refusal(400, f"token: id {token} pads the vocabulary and has no text", param="token",
                      code="invalid_value")
    found = await in_engine(models, lambda: inside.neighbors(module, token, NEIGHBORS, tokenizer.vocab_size))
    return {"model": loaded.name, "token": _named(loaded, token), "neighbors": [
        {**_named(loaded, each.token), "similarity": round(each.similarity, 4)} for each in found]}


async def climb(models: Models, loaded: Loaded, text: str, tokens: int) -> dict[str, Any]:
    """Return the loss and the continuation of a text for each rung of a model's ladder; no rungs if it has none."""
    names = await asyncio.to_thread(rungs_of, models.roots, loaded.folder)
    rungs = []
    for number, rung, name in names:
        async with models.use(name) as each:
            rungs.append({"number": number, "name": rung, "model": name, "context": each.window,
                          **await _rung(models, each, text, tokens)})
    return {"model": loaded.name, "rungs": rungs}


async def _rung(models: Models, loaded: Loaded, text: str, tokens: int) -> dict[str, Any]:
    """Return the loss and the continuation of a text for one rung."""
    ids = (await asyncio.to_thread(_ids, loaded, text))[-inside.LONGEST :]
    loss = await in_engine(models, lambda: inside.loss_in_windows(loaded.model.module, ids))
    return {"loss": _rounded(loss), "continuation": await _continue(models, loaded, ids, (), tokens)}


def rungs_of(roots: Sequence[str], folder: Path) -> list[tuple[int, str, str]]:
    """Return (number, name, name of the model) of the rungs beside a rung's run, trained with the same seed."""
    ladder = folder.parent.parent
    if not (ladder / "ladder.json").is_file() or not RUNG.fullmatch(folder.parent.name):
        return []
    found = []
    for name, other in folders.find(roots).items():
        match = RUNG.fullmatch(other.parent.name)
        if match and other.parent.parent == ladder and other.name == folder.name and folders.weight_bytes(other):
            found.append((int(match[1]), match[2], name))
    return sorted(found)[:MOST_RUNGS]


# ---------------------------------------------------------------- parts of an answer


def _parts(loaded: Loaded) -> inside.Anatomy:
    """Return the parts of a model. Refuse one that cannot be looked at."""
    refuse_translator(loaded)
    try:
        return inside.anatomy(loaded.model.module)
    except Unsupported as error:
        raise Refusal(400, f"{loaded.name}: {error}", param="model", code="model_not_supported") from None


def _ids(loaded: Loaded, text: str) -> list[int]:
    """Return the tokens of a text, as the model reads them."""
    try:
        return loaded.model.prompt_ids(text)
    except BardletError as error:
        raise Refusal(400, f"text: {loaded.public(error)}", param="text", code="invalid_value") from None


async def _continue(models: Models, loaded: Loaded, ids: Sequence[int], off: Heads, tokens: int) -> str:
    """Return the greedy continuation of a text, to the end of the document at most."""
    tokenizer, greedy = loaded.model.tokenizer, Greedy(loaded.model.module, ids, off)
    written: list[int] = []
    while len(written) < tokens and not set(tokenizer.stop_ids) & set(written):
        count = min(AT_ONCE, tokens - len(written))
        written += await in_engine(models, lambda count=count: greedy.write(count))
    kept = itertools.takewhile(lambda token: token not in tokenizer.stop_ids, written)
    return tokenizer.decode([i for i in kept if i < tokenizer.vocab_size], skip_special=True, continues=True)


def _as_json(loaded: Loaded, reading: Reading, lens: Sequence[Sequence[Guess]], cut: int) -> dict[str, Any]:
    """Return a reading as JSON. In a worker thread."""
    tokenizer, ids = loaded.model.tokenizer, reading.ids
    text, entries = entries_of(tokenizer, ids)
    losses = inside.losses(reading)
    total, characters = sum(losses), len(text) - entries[0].end
    weights = (reading.attention_LHTT.double() * 1e4).round().div(1e4).tolist()
    return {
        "tokens": [{**_named(loaded, entry.id), "text": text[entry.start : entry.end]} for entry in entries],
        "cut": cut,
        "losses": [None, *map(_rounded, losses)],
        "loss": {"per_token": _rounded(total / len(losses)) if losses else None,
                 "per_character": _rounded(total / characters) if losses and characters else None},
        "attention": [[[row[: t + 1] for t, row in enumerate(head)] for head in layer] for layer in weights],
        "lens": [{"after": name, "guesses": [
            {**_named(loaded, guess.token), "p": _rounded(guess.probability), "following": _rounded(guess.following)}
            for guess in row]} for name, row in zip(reading.steps, lens, strict=True)],
    }


def _named(loaded: Loaded, token: int) -> dict[str, Any]:
    return {"id": token, "name": name_of(loaded.model.tokenizer, token)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
