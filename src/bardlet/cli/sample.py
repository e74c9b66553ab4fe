"""`bardlet sample DIR`: generate text, streaming."""

from __future__ import annotations

import logging
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.config.inference import MAX_TEXTS, SamplingOptions
from bardlet.errors import BardletError, quoted

log = logging.getLogger("bardlet")

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
    """A run folder, or a gpt2 or Llama-like model of Hugging Face: its folder, or OWNER/NAME on the Hub."""
    prompt: str = ""
    """Text to continue; - reads it from standard input (default: start a new text)."""
    num: int = 1
    """Number of texts."""
    json: bool = False
    """Print one JSON object on the last line instead of streaming."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise BardletError(f"--num {self.num}: must be at least 1")
        if self.num > MAX_TEXTS:
            raise BardletError(f"--num {self.num}: must be at most {MAX_TEXTS}; run the command again for more")
        super().__post_init__()


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    console.show_notices()
    if Path(command.run).is_file() and Path(command.run).suffix != ".gguf":  # `load` tells how to convert one
        raise BardletError(f"{command.run}: a file, not a run; `bardlet sample RUN --prompt TEXT` continues a text")
    from bardlet.api.models import load
    from bardlet.data import chat_template

    model = load(command.run, device=command.device, dtype=command.dtype)
    prompt = read_prompt(command.prompt)
    line_break = "\\n is a backslash and an n; in bash, --prompt $'a\\nb' has a line break"
    try:  # before anything is printed
        model.prompt_ids(prompt)
    except BardletError as error:
        hint = f"; {line_break}" * ("\\n" in prompt)
        raise BardletError(f"--prompt: {error}{hint}" if prompt else str(error)) from None
    if "\\n" in prompt:
        log.warning("--prompt: %s", line_break)
    if chat_template.is_own(model.tokenizer):
        log.warning("a chat model; sample continues a text, for answers run: bardlet chat %s", quoted(command.run))
    if not command.json and command.num == 1:
        print(prompt, end="", flush=True)
        for piece in model.stream(prompt, **command.sampling):
            print(console.shown(piece), end="", flush=True)
        print(flush=True)
        return 0
    started = time.monotonic()
    texts, tokens = model.complete([prompt] * command.num, **command.sampling)
    if command.json:
        console.say_json({"prompt": prompt, "completions": texts,
                          "tokens_per_second": round(tokens / (time.monotonic() - started), 1)})
        return 0
    for number, text in enumerate(texts, 1):
        console.say(console.shown(f"--- {number} ---\n{prompt}{text}\n"))
    return 0


def read_prompt(typed: str) -> str:
    """Return the prompt: as typed, from standard input for "-", or what is piped in if there is no other.

    One line break at the end of standard input is left out: it ends the line of `echo`.
    """
    if typed != "-" and (typed or not _is_piped()):
        return typed
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise BardletError(f"standard input: not valid UTF-8 at byte {error.start}; pipe in UTF-8 text") from None


def _is_piped() -> bool:
    """Return True if text is ready on standard input; a script's idle standard input must not block."""
    try:
        return not sys.stdin.isatty() and bool(select.select([sys.stdin], [], [], 0)[0])
    except (AttributeError, OSError, ValueError):  # closed, or Windows, where only sockets can be asked
        return False
