"""`bardlet sample DIR`: generate text, streaming."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.config.inference import SamplingOptions
from bardlet.errors import BardletError

SAMPLING = Group("sampling", ("tokens", "temperature", "top_k", "top_p", "seed"))

USAGE = Usage(
    "sample", "RUN [OPTIONS]", "Generate text with a model. The text streams to standard output.",
    (("bardlet sample runs/my-qwen3 --prompt \"Once\"", "continue a text"),
     ("bardlet sample runs/my-qwen3 --num 3 --temperature 1", "three texts, with more variety")),
    (Group("text", ("prompt", "num")), SAMPLING, Group("machine", ("device", "dtype")), Group("output", ("json",))),
    positionals={"run": "RUN"}, metavars={"prompt": "TEXT"})


@dataclass(frozen=True, kw_only=True)
class Command(SamplingOptions):
    """The command line."""

    run: str
    """A run folder, or a Hugging Face folder with a gpt2 or qwen3 model."""
    prompt: str = ""
    """Text to continue (default: start a new text)."""
    num: int = 1
    """Number of texts."""
    json: bool = False
    """Print one JSON object on the last line instead of streaming."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise BardletError(f"--num {self.num}: must be at least 1")
        super().__post_init__()


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    console.show_notices()
    if Path(command.run).is_file():
        raise BardletError(f"{command.run}: a file, not a run; `bardlet sample RUN --prompt TEXT` continues a text")
    from bardlet.api.models import load

    model = load(command.run, device=command.device, dtype=command.dtype)
    try:  # before anything is printed
        model.prompt_ids(command.prompt)
    except BardletError as error:
        raise BardletError(f"--prompt: {error}" if command.prompt else str(error)) from None
    if not command.json and command.num == 1:
        print(command.prompt, end="", flush=True)
        for piece in model.stream(command.prompt, **command.sampling):
            print(piece, end="", flush=True)
        print(flush=True)
        return 0
    started = time.monotonic()
    texts, tokens = model.complete([command.prompt] * command.num, **command.sampling)
    if command.json:
        console.say_json({"prompt": command.prompt, "completions": texts,
                          "tokens_per_second": round(tokens / (time.monotonic() - started), 1)})
        return 0
    for number, text in enumerate(texts, 1):
        console.say(f"--- {number} ---\n{command.prompt}{text}\n")
    return 0
