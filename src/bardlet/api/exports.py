"""Export a model from Python."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from bardlet.api import arguments
from bardlet.export import export as exporting
from bardlet.run import hub

log = logging.getLogger("bardlet")


def export_model(folder: str | os.PathLike[str], *, to: str, out: str | os.PathLike[str],
                 dtype: str | None = None) -> list[Path]:
    """Export a model: one HTML page, a GGUF file, a folder with an ONNX graph, or a clean Hugging Face folder.

    Args:
        folder: the folder, a `Run`, or OWNER/NAME on the Hugging Face Hub.
        to: html, gguf, onnx or hf.
        out: the file, for onnx and hf the folder; it must not exist yet.
        dtype: precision of the weights: int8, fp16, fp32 (html); f32, f16, bf16, q8_0 (gguf). None: the first.

    Returns:
        The files or the folder that were written.

    Raises:
        BardletError: no such model, a format that cannot hold it, or something in the way.
    """
    source = hub.folder(arguments.path(folder, "bardlet.export_model: folder"))
    return exporting.export(source, to, Path(arguments.path(out, "bardlet.export_model: out")), dtype, log.warning)
