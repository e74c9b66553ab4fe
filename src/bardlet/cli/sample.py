"""`bardlet sample DIR`: let a model write, streaming."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bardlet import console
from bardlet.cli.options import Sampling, parse
from bardlet.errors import BardletError

log = logging.getLogger("bardlet")


@dataclass(frozen=True)
class Command(Sampling):
    """Let a model write. The text goes to standard output as it is made."""

    run: Annotated[str, tyro.conf.Positional]
    """A run folder, or a Hugging Face folder with a gpt2 or qwen3 model."""
    prompt: str = ""
    """What the text begins with; none: where a text begins."""
    num: int = 1
    """How many texts."""
    json: bool = False
    """Print one JSON object on one line, last, instead of streaming."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise BardletError(f"--num {self.num}: it must be at least 1")
        super().__post_init__()


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    command = parse(Command, argv, "sample")
    console.show_notices()
    from bardlet.inference import text_generation
    from bardlet.run import folder as run_folder
    from bardlet.run import hf
    from bardlet.runtime import device

    device.tune_malloc()
    folder = Path(command.run)
    model, tokenizer = hf.read_folder(folder)
    if model.config.model == "encdec":
        raise BardletError(f"{folder}: an encoder-decoder translates: `bardlet translate {folder} < LINES`")
    documents = 2
    if (folder / "run.toml").exists():
        try:
            documents = run_folder.settings(folder, changed=True)[1].get("documents", 2)
        except BardletError as error:
            log.warning("%s", error)
    try:  # before anything is printed
        prompt = text_generation.prompt_ids(tokenizer, command.prompt, documents)
    except BardletError as error:
        raise BardletError(f"--prompt: {error}") from None
    options = command.prepared(model)
    begun = time.monotonic()
    if command.json or command.num > 1:
        made = text_generation.complete(model, tokenizer, [prompt] * command.num, command.tokens, **options)
        count = sum(len(ids) for ids in made)
        texts = [tokenizer.decode(ids, skip_special=True) for ids in made]
        if not command.json:
            for number, text in enumerate(texts, 1):
                console.say(f"--- {number} ---\n{command.prompt}{text}\n")
    else:
        print(command.prompt, end="", flush=True)
        count = text_generation.stream(model, tokenizer, prompt, command.tokens,
                                       lambda text: print(text, end="", flush=True), **options)
        print(flush=True)
    if command.json:
        console.say_json({"prompt": command.prompt, "completions": texts,
                          "tokens_per_second": round(count / (time.monotonic() - begun), 1)})
    return 0
