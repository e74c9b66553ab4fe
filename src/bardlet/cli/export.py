"""`bardlet export RUN --to FORMAT`: a model for other programs, or as one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.config.paths import given
from bardlet.errors import quoted

NEXT = {"hf": "to publish it: hf upload OWNER/NAME {0}", "html": "open it in a browser, or send it to somebody",
        "gguf": "for Ollama: ollama create NAME -f {1}", "onnx": "onnxruntime and transformers.js load it"}
"""The next step with an export; {0} and {1} are the paths that were written."""

USAGE = Usage(
    "export", "RUN --to FORMAT [--out PATH] [OPTIONS]",
    "Export a model. html: one page that runs the model in any browser, without a network. gguf: a file for llama.cpp, "
    "Ollama and LM Studio. onnx: a folder for onnxruntime and transformers.js. hf: a clean folder for the Hugging Face "
    "Hub, without checkpoints.",
    (("bardlet export runs/my-qwen3 --to html", "a page to send to a friend"),
     ("bardlet export runs/my-qwen3 --to gguf --dtype q8_0", "a small file for llama.cpp and Ollama"),
     ("bardlet export runs/my-qwen3 --to hf --out my-model", "a folder to upload")),
    (Group("export", ("to", "out", "dtype")), Group("output", ("json",))), positionals={"run": "RUN"},
    metavars={"to": "FORMAT", "out": "PATH", "dtype": "NAME"})


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command line."""

    run: str
    """A run folder, or a gpt2, Llama-like or pegasus model of Hugging Face: its folder, or OWNER/NAME on the Hub."""
    to: Literal["html", "gguf", "onnx", "hf"]
    """html, gguf, onnx or hf."""
    out: str | None = None
    """The file, for onnx and hf the folder (default: the name of the model, here)."""
    dtype: str | None = None
    """Precision of the weights: int8, fp16, fp32 (html); f32, f16, bf16, q8_0 (gguf). The first is the default."""
    json: bool = False
    """Print one JSON object on the last line."""

    def __post_init__(self) -> None:
        if self.out is not None:
            object.__setattr__(self, "out", given(self.out))


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    console.show_notices()
    from bardlet.export import export
    from bardlet.run import hub

    folder = hub.folder(command.run)
    out = Path(command.out) if command.out else None
    written = export.export(folder, command.to, out, command.dtype, console.say)
    for path in written:
        size = path.stat().st_size if path.is_file() else 0  # of a folder, no size is shown
        shown = f", {size / 1e6:.1f} MB" if size >= 1e5 else f", {size:,} bytes"
        console.say(f"wrote {quoted(path)}{shown * bool(size)}")
    console.say(NEXT[command.to].format(*(quoted(path) for path in written)))
    if command.json:
        console.say_json({"format": command.to, "files": [str(path) for path in written]})
    return 0
