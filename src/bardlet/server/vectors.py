"""Answers of /v1/embeddings: the mean of the final hidden states of a text, of length 1.

The models were not trained for this. A model that was trained on pairs of texts puts similar texts nearer to each
other. Imports torch.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import torch
import torch.nn.functional as F

from bardlet.errors import BardletError
from bardlet.inference.readers import SLICE
from bardlet.server.completion import checked_ids, refuse_translator
from bardlet.server.errors import Refusal
from bardlet.server.generation import in_engine
from bardlet.server.models import Loaded, Models
from bardlet.server.reply import Reply
from bardlet.server.schema import EmbeddingRequest


async def embed(models: Models, loaded: Loaded, body: EmbeddingRequest, reply: Reply) -> None:
    """Send the vectors. Each text is computed alone, so that its neighbors do not change it."""
    refuse_translator(loaded)
    module = loaded.model.module
    if not hasattr(module, "hidden"):
        raise Refusal(400, f"{loaded.name}: a model of the lecture, which has no embeddings; name another model",
                      param="model", code="model_not_supported")
    size = int(module.config.n_embd)
    if body.dimensions not in (None, size):
        raise Refusal(400, f"dimensions: the vectors of this model have {size} numbers; leave it out",
                      param="dimensions", code="unsupported_value")
    rows = await asyncio.to_thread(_rows, loaded, body.input)
    data = []
    for index, ids in enumerate(rows):
        vector = await vector_of(models, module, ids)
        if vector is None:
            raise Refusal(500, "the model's hidden states are not finite", type="server_error",
                          code="generation_failed")
        value: Any = vector
        if body.encoding_format == "base64":
            value = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = sum(map(len, rows))
    await reply.json({"object": "list", "model": loaded.name, "data": data,
                      "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


async def vector_of(models: Models, module: Any, ids: list[int]) -> list[float] | None:
    """Return the vector of a text, which is read in slices between the steps of others; None if it is not finite."""
    cache = await in_engine(models, lambda: module.new_cache(1, len(ids)))
    device = next(module.parameters()).device

    def read(first: int) -> torch.Tensor:
        part = torch.tensor([ids[first : first + SLICE]], device=device)
        return module.hidden(part, cache)[0].float().sum(dim=0)

    sum_C = torch.stack([await in_engine(models, lambda first=first: read(first))
                         for first in range(0, len(ids), SLICE)]).sum(dim=0)
    vector_C = F.normalize(sum_C, dim=0)
    return vector_C.tolist() if bool(vector_C.isfinite().all()) else None


def _rows(loaded: Loaded, texts: Any) -> list[list[int]]:
    """Return the ids of each text. In a worker thread."""
    alone = isinstance(texts, str) or isinstance(texts[0], int)
    rows = []
    for number, text in enumerate([texts] if alone else texts):
        try:
            ids = loaded.model.prompt_ids(text) if isinstance(text, str) else checked_ids(loaded, text, "input")
        except BardletError as error:
            raise Refusal(400, f"input: {loaded.public(error)}", param="input", code="invalid_value") from None
        if len(ids) > loaded.window:
            raise Refusal(400, f"input {number}: {len(ids):,} tokens, but the model's context window has "
                          f"{loaded.window:,}; shorten it", param="input", code="context_length_exceeded")
        rows.append(ids)
    return rows
