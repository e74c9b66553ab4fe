"""`bardlet translate DIR`: lines of one language in, lines of the other out, in the same order."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bardlet import console
from bardlet.cli.options import parse
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.inference.translate import TranslateOptions
    from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")

CHUNK = 2048
"""Lines that are read before the first is translated: among so many there are always some of similar lengths."""


@dataclass(frozen=True)
class Command:
    """Translate standard input, or files, a sentence a line. As many lines come out as go in."""

    run: Annotated[str, tyro.conf.Positional]
    """A run folder of a model that was trained on pairs, or a Hugging Face folder with a pegasus model."""
    files: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files to translate, one after the other; none: standard input."""
    beam: int = 1
    """How many hypotheses are followed side by side; 1: always the likeliest token."""
    length_penalty: float = 1.0
    """The score of a hypothesis is the sum of log p over length to this power: above 1 longer, below 1 shorter."""
    batch_size: int = 64
    """Lines that are translated at once."""
    attention: str | None = None
    """Draw where the first line's translation looked, each layer and head of the cross-attention, into this PNG."""
    device: str = "auto"
    """cpu, cuda, mps; auto takes a GPU where there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights."""
    json: bool = False
    """Print one JSON object on one line, last, instead of the lines."""

    def __post_init__(self) -> None:
        for name, holds, what in (
            ("beam", self.beam >= 1, "at least 1"), ("batch-size", self.batch_size >= 1, "at least 1"),
            ("length-penalty", abs(self.length_penalty) <= 10, "a number from -10 to 10"),
        ):
            if not holds:
                raise BardletError(f"--{name} {getattr(self, name.replace('-', '_'))}: it must be {what}")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    command = parse(Command, argv, "translate")
    console.show_notices()
    from bardlet.runtime import device as runtime_device

    runtime_device.tune_malloc()
    model, tokenizer, how = load(Path(command.run), command.beam, command.length_penalty, command.batch_size)
    runtime_device.place(model, command.device, command.dtype)
    if command.attention and not hasattr(model, "cross_attention"):
        raise BardletError(f"--attention: {model.config.model} has no cross-attention to draw; leave it out")
    if command.attention and not command.attention.lower().endswith(".png"):
        raise BardletError(f"--attention {command.attention}: it draws a PNG; name a file that ends in .png")
    lines, first = read(command.files), None
    made: list[str] = []
    at_once = 1 if not command.files and sys.stdin.isatty() else CHUNK  # a person waits for each answer
    while chunk := list(islice(lines, at_once)):
        done = in_order(model, tokenizer, chunk, how, len(made), None if command.json else console.say)
        first = first or next((source for source, text in zip(chunk, done, strict=True) if text), None)
        made += done
    if not made:
        raise BardletError("there is nothing to translate: standard input is empty; name a file, or pipe lines in"
                           if not command.files else f"{', '.join(command.files)}: there is no line in it")
    if command.attention:
        draw_attention(Path(command.attention), model, tokenizer, first, how)
    if command.json:
        console.say_json({"translations": made})
    return 0


def load(folder: Path, beams: int, length_penalty: float, batch_size: int) -> tuple[Any, Tokenizer, TranslateOptions]:
    """(model, tokenizer, how to translate) of a folder. BardletError for a model that does not translate."""
    from bardlet.config.pretraining import TranslationConfig
    from bardlet.inference import translate
    from bardlet.run import folder as run_folder
    from bardlet.run import hf

    model, tokenizer = hf.read_folder(folder)
    prefix_lm = False
    if model.config.model != "encdec":
        config = run_folder.settings(folder, changed=True)[0] if (folder / "run.toml").exists() else None
        if not isinstance(config, TranslationConfig):
            raise BardletError(f"{folder}: this {model.config.model} model was not trained to translate; train one "
                               "with `bardlet train --pair de-en`, or with --source F --target F")
        prefix_lm = config.prefix_lm
    how = translate.TranslateOptions(beams, length_penalty, batch_size, prefix_lm)
    translate.check(model, tokenizer, how)
    return model, tokenizer, how


def read(files: Sequence[str]) -> Iterator[str]:
    """The lines of files, or of standard input. BardletError where they are no UTF-8 text."""
    from bardlet.data import bitext
    from bardlet.data.text import decoded_lines

    if not files:
        return decoded_lines(sys.stdin.buffer, "standard input")
    return iter([line for file in files for line in bitext.read_lines(Path(file))])


def in_order(model: Any, tokenizer: Tokenizer, lines: Sequence[str], how: TranslateOptions, before: int, say: Any) -> list[str]:
    """The translations of some lines, before which there were others; `say` hears each as soon as its turn has come."""
    from bardlet.inference import translate

    done: dict[int, str] = {}
    said = 0
    for place, text in translate.stream(model, tokenizer, lines, how, before):
        done[place] = text
        while say and said in done:
            say(done[said])
            said += 1
    return [done[i] for i in range(len(lines))]


def draw_attention(path: Path, model: Any, tokenizer: Tokenizer, line: str | None, how: TranslateOptions) -> None:
    """The cross-attention of one sentence and its translation as a picture."""
    from bardlet.inference import translate
    from bardlet.run import plots

    if line is None:
        raise BardletError("--attention: no line with a translation to draw; give one that has words")
    maps, source, target = translate.cross_attention(model, tokenizer, line, how)
    plots.attention_maps(path, maps.numpy(), source, target)
    log.info("the attention of the first line is drawn in %s", path)
