"""Write a model as one HTML file that runs it: weights, tokenizer, forward pass and page, with nothing to load.

The scripts of `web/` are put into the page as they are. A content security policy allows only these, and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bardlet.data import chat_template
from bardlet.errors import BardletError, printable
from bardlet.export import canonical
from bardlet.inference import translate
from bardlet.inference.text_generation import prompt_ids
from bardlet.run import hf
from bardlet.runtime import atomic
from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")

DTYPES = ("int8", "fp16", "fp32")
"""Formats of the matrices; vectors are always fp32."""
SCRIPTS = ("forward.js", "tokenizer.js", "prompts.js", "weights.js", "answer.js", "views.js", "page.js")
"""The modules of the page, each after those that it imports."""
MAX_CHARACTERS = 2**29 - 24
"""Length of V8's longest string, and so of the weights in base64 that Chromium, Edge and Node.js can read."""
MAX_FP16 = 65_520
"""Numbers from here on round to infinity in fp16."""


@dataclass(frozen=True)
class Start:
    """Beginning of a text.

    documents: number of documents of the training text. starts_documents: a prompt begins a document.
    """

    documents: int = 2
    starts_documents: bool = False


def write(path: Path, model: Any, tokenizer: Tokenizer, about: Mapping[str, Any], start: Start = Start(),
          dtype: str = "int8") -> None:
    """Write the page.

    Args:
        about: what the page says of the model: `title`, and `notes`, lines of text.
        dtype: one of DTYPES.

    Raises:
        BardletError: the page cannot run such a model.
    """
    named, use = check(model, tokenizer, dtype), mode(model, tokenizer)
    if use == "write" and tokenizer.chat_template:
        log.warning("the page continues texts instead of answering, because the model's chat template is not "
                    "bardlet's; --to hf keeps that template")
    spec = {**canonical.describe(model, named), "tokenizer": describe_tokenizer(tokenizer), "about": dict(about),
            "mode": use, "start": prompt_ids(tokenizer, None, start.documents),
            "startsDocuments": start.starts_documents, "stop": hf.stop_ids(tokenizer), "eos": tokenizer.eos_id,
            "pad": tokenizer.pad_id}
    entries, data = pack(named, dtype)
    atomic.write_text(path, page(spec, entries, data))


def check(model: Any, tokenizer: Tokenizer, dtype: str = "int8") -> dict[str, Tensor]:
    """Return the canonical weights. BardletError if the page cannot run them with this tokenizer, in this precision."""
    canonical.check(model)
    describe_tokenizer(tokenizer)
    if model.config.model == "encdec":
        translate.check(model, tokenizer, translate.TranslateOptions())
    named = canonical.weights(model)
    check_weights(named, dtype)
    return named


def check_weights(weights: Mapping[str, Tensor], dtype: str) -> None:
    """Raise BardletError if the weights are too many for a page, or too large for fp16."""
    limit, sizes = MAX_CHARACTERS // 4 * 3, {kind: stored_bytes(weights, kind) for kind in DTYPES}
    if sizes[dtype] > limit:
        fits = next((f"--dtype {kind}" for kind in reversed(DTYPES) if sizes[kind] <= limit), "--to hf")
        raise BardletError(f"--to html: the weights take {sizes[dtype] / 1e6:,.0f} MB in {dtype}, and a browser reads "
                           f"at most {limit / 1e6:,.0f} MB from a page; use {fits}")
    for name, tensor in weights.items():
        if dtype == "fp16" and tensor.ndim == 2 and (top := float(tensor.abs().max())) >= MAX_FP16:
            raise BardletError(f"--to html: {name} has a weight of size {top:,.0f}, and fp16 ends at 65,504; use "
                               "--dtype fp32 (or int8)")


def mode(model: Any, tokenizer: Tokenizer) -> str:
    """Return the use of the page: "translate", "chat" or "write". The page chats in bardlet's own template only."""
    if model.config.model == "encdec":
        return "translate"
    return "chat" if chat_template.is_own(tokenizer) else "write"


def page(spec: Mapping[str, Any], entries: list[dict[str, Any]], data: bytes) -> str:
    """Return the HTML of a page."""
    script, style = scripts(), read("page.css")
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    policy = f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; base-uri 'none'"
    filled = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "SPEC": in_script(spec),
              "ENTRIES": in_script(entries), "WEIGHTS": base64.b64encode(data).decode()}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], read("page.html"))


def in_parts(model: Any, tokenizer: Tokenizer, about: Mapping[str, Any], dtype: str = "int8") -> dict[str, Any]:
    """Return what `web/lesson.js` opens: spec, entries, weights (in base64) and about. Raises BardletError."""
    named = check(model, tokenizer, dtype)
    entries, data = pack(named, dtype)
    spec = {**canonical.describe(model, named), "tokenizer": describe_tokenizer(tokenizer),
            "stop": hf.stop_ids(tokenizer)}
    return {"spec": spec, "entries": entries, "weights": base64.b64encode(data).decode(), "about": dict(about)}


def in_script(value: Any) -> str:
    """Return JSON that can stand in a <script> element: no `<` begins a tag there, whatever the value says."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def scripts(names: Sequence[str] = SCRIPTS) -> str:
    """Return modules of web/ as one script: without imports and exports, as all are in one scope."""
    modules = (read(name) for name in names)
    return "\n".join(re.sub(r"(?m)^import .*\n|^export ", "", module) for module in modules)


def read(name: str) -> str:
    """Return a file of web/."""
    return (resources.files("bardlet") / "web" / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------- weights


def pack(weights: Mapping[str, Tensor], dtype: str) -> tuple[list[dict[str, Any]], bytes]:
    """Return (name, dtype, shape and offset of each tensor; all of them as bytes). `web/weights.js` unpacks them."""
    entries, parts, offset = [], [], 0
    for name, tensor in weights.items():
        kind = dtype if tensor.ndim == 2 else "fp32"
        if kind == "int8":
            scale, whole = quantize(tensor)
            raw = scale.numpy().astype("<f4").tobytes() + whole.numpy().tobytes()
        else:
            raw = tensor.numpy().astype("<f2" if kind == "fp16" else "<f4").tobytes()
        entries.append({"name": name, "dtype": kind, "shape": list(tensor.shape), "offset": offset})
        parts.append(raw + bytes(-len(raw) % 4))
        offset += len(parts[-1])
    return entries, b"".join(parts)


def stored_bytes(weights: Mapping[str, Tensor], dtype: str) -> int:
    """Return the number of bytes that `pack` makes."""
    width = {"int8": 1, "fp16": 2, "fp32": 4}[dtype]
    sizes = (4 * t.numel() if t.ndim != 2 else width * t.numel() + 4 * len(t) * (dtype == "int8")
             for t in weights.values())
    return sum(size + -size % 4 for size in sizes)


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale of each row, the row in multiples of it, int8). Rows with zeros only have the scale 0."""
    scale = matrix.abs().amax(1) / 127
    whole = (matrix / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return scale, whole.to(torch.int8)


def rounded(matrix: Tensor, dtype: str) -> Tensor:
    """Return a tensor as the page computes with it, in float32."""
    if matrix.ndim != 2 or dtype == "fp32":
        return matrix.float()
    if dtype == "fp16":
        return torch.from_numpy(matrix.float().numpy().astype(np.float16).astype(np.float32))
    scale, whole = quantize(matrix.float())
    return whole.float() * scale[:, None]


# ---------------------------------------------------------------- the tokenizer


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the facts that `web/tokenizer.js` needs. BardletError for a tokenizer that the page does not support."""
    if tokenizer.kind == "other":
        raise BardletError("--to html: this tokenizer splits words by a rule of its own, which the page does not have; "
                           "use --to hf")
    if tokenizer.added:
        more = f" and {len(tokenizer.added) - 1:,} more" if len(tokenizer.added) > 1 else ""
        raise BardletError(f"--to html: the tokenizer has the added token {printable(tokenizer.added[0])}{more}, which "
                           "the page does not support; use --to hf")
    merges: list[int] = []
    results: list[int] = []
    if tokenizer.kind == "bpe":
        for pair in json.loads(tokenizer.json)["model"]["merges"]:
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            merges += tokenizer.vocab[left], tokenizer.vocab[right]
            results.append(tokenizer.vocab[left + right])
    first = results[0] if results else 0
    merged, in_order = set(results), results == list(range(first, first + len(results)))
    return {"kind": tokenizer.kind, "nfc": tokenizer.nfc, "lowercase": tokenizer.lowercase, "merges": merges,
            "mergeIds": None if in_order else results, "firstMerge": first,
            "tokens": [[i, tokenizer.bytes_of(i).hex()] for i in range(tokenizer.vocab_size) if i not in merged],
            "special": {name: i for i, name in tokenizer.special.items()}}
