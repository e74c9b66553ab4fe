"""Export a model from Python."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

from bardlet.api import arguments
from bardlet.config import toml
from bardlet.export import export as exporting
from bardlet.run import hub

log = logging.getLogger("bardlet")


Format = Literal["html", "gguf", "onnx", "hf"]


def export_model(folder: str | os.PathLike[str], to: Format, out: str | os.PathLike[str] | None = None, *,
                 dtype: str | None = None) -> list[Path]:
    """Export a model: one HTML page, a GGUF file, a folder with an ONNX graph, or a clean Hugging Face folder.

    Args:
        folder: the folder, a `Run`, or OWNER/NAME on the Hugging Face Hub.
        to: html, gguf, onnx or hf.
        out: the file, for onnx and hf the folder; it must not exist yet. None: the name of the model, here, as in
            my-qwen3.html or my-qwen3-hf.
        dtype: precision of the weights: int8, fp16, fp32 (html); f32, f16, bf16, q8_0 (gguf). None: the first.

    Returns:
        The files or the folder that were written.

    Raises:
        BardletError: no such model, a format that cannot hold it, or something in the way.
    """
    to = toml.typed(to, Format, "bardlet.export_model: to")
    dtype = toml.typed(dtype, str | None, "bardlet.export_model: dtype")
    path = None if out is None else Path(arguments.path(out, "bardlet.export_model: out"))
    source = hub.folder(arguments.path(folder, "bardlet.export_model: folder"))
    return exporting.export(source, to, path, dtype, log.warning)
