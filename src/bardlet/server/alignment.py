"""Cross-attention between a line and its translation, for the studio. Imports torch."""

from __future__ import annotations

import asyncio
from typing import Any

from bardlet.errors import BardletError
from bardlet.inference import translate
from bardlet.server.errors import Refusal
from bardlet.server.generation import in_engine
from bardlet.server.models import Loaded, Models
from bardlet.server.translation import check_translates

MOST = 250_000
"""Weights of one answer, all layers together: 2 MB of JSON."""
DIGITS = 4


async def align(models: Models, loaded: Loaded, source: str, target: str) -> dict[str, Any]:
    """Return the tokens of both lines and the weights between them, averaged over heads.

    attention: for each decoder layer a T x S matrix. mean: their average. Row t has the weights with which the decoder
    predicts target token t. The last token of each side ends its line.
    """
    module, tokenizer = loaded.model.module, loaded.model.tokenizer
    check_translates(loaded)
    if not hasattr(module, "cross_attention"):
        raise Refusal(400, f"{loaded.name}: a decoder-only translator, which has no cross-attention to show; train "
                      "an encoder-decoder with `bardlet train --pair de-en --model encdec`", param="model",
                      code="model_not_supported")
    try:
        stop, start = translate.check(module, tokenizer, translate.TranslateOptions())
        sides = {"source": source, "target": target}
        ids = await asyncio.to_thread(
            lambda: {side: [*tokenizer.encode(line.strip()).tolist(), stop] for side, line in sides.items()})
    except BardletError as error:
        raise Refusal(400, loaded.public(error), code="invalid_value") from None
    for side, row in ids.items():
        if len(row) > loaded.window:
            raise Refusal(400, f"{side}: has {len(row) - 1:,} tokens, but the model reads at most "
                          f"{loaded.window - 1:,}; shorten it", param=side, code="context_length_exceeded")
    size = len(ids["source"]) * len(ids["target"]) * module.config.n_layer
    if size > MOST:
        raise Refusal(400, f"the lines have {size:,} weights between them, but at most {MOST:,} are shown; use shorter "
                      "lines", param="source", code="context_length_exceeded")

    def weights() -> dict[str, Any]:
        maps_LTS = translate.attention_between(module, ids["source"], ids["target"], start).mean(1).double()
        return {"attention": maps_LTS.numpy().round(DIGITS).tolist(),
                "mean": maps_LTS.mean(0).numpy().round(DIGITS).tolist()}

    named = {side: [tokenizer.decode([token]) for token in row] for side, row in ids.items()}
    return {"model": loaded.name, **named, **await in_engine(models, weights)}
