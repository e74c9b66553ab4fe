"""Answers of /translate. Imports torch."""

from __future__ import annotations

import asyncio

from bardlet.errors import BardletError
from bardlet.inference import translate
from bardlet.server.errors import Refusal
from bardlet.server.generation import in_engine
from bardlet.server.models import Loaded, Models
from bardlet.server.reply import Reply
from bardlet.server.schema import TranslateRequest

LINES = 4
"""Lines translated at once, without beams. They depend on the request only: others do not change a translation."""


async def answer(models: Models, loaded: Loaded, body: TranslateRequest, reply: Reply) -> None:
    """Send the translations."""
    model, lines = loaded.model, [body.text] if isinstance(body.text, str) else body.text
    check_translates(loaded)
    try:
        options = model.translate_options(body.beam or 1, 1.0 if body.length_penalty is None else body.length_penalty,
                                          LINES)
        lengths = await asyncio.to_thread(lambda: [len(model.tokenizer.encode(line.strip())) + 1 for line in lines])
    except BardletError as error:
        message = loaded.public(error).replace("--beam", "beam")
        raise Refusal(400, message, param="beam" if message.startswith("beam") else "text",
                      code="invalid_value") from None
    most = translate.longest_source(model.module)
    for number, length in enumerate(lengths, 1):
        if length > most:
            raise Refusal(400, f"text: line {number} has {length - 1:,} tokens, but the model reads at most "
                          f"{most - 1:,}; shorten it", param="text", code="context_length_exceeded")
    translations: list[str] = []
    at_once = 1 if (body.beam or 1) > 1 else LINES
    for first in range(0, len(lines), at_once):
        chunk = lines[first : first + at_once]
        translations += await in_engine(
            models, lambda chunk=chunk: translate.translate_lines(model.module, model.tokenizer, chunk, options))
    await reply.json({"model": loaded.name, "translations": translations})


def check_translates(loaded: Loaded) -> None:
    """Refuse a model that was not trained on sentence pairs."""
    if not loaded.model.translates:
        raise Refusal(400, f"{loaded.name}: not trained to translate; train a translator with `bardlet train --pair "
                      "de-en`, or with --source and --target", param="model", code="model_not_supported")
